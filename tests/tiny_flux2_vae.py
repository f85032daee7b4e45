"""The autoencoder of FLUX.2, which others share, with the released factors and channels; only widths are small."""

from __future__ import annotations

from diffusers import AutoencoderKLFlux2


def flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )
    # As after training: no channel's mean is nought, no deviation one.
    vae.bn.running_mean.normal_(0, 0.5)
    vae.bn.running_var.uniform_(0.5, 4)
    return vae
