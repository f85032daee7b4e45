"""What a VAE learns: to show a picture again that its encoder made latents of.

Shape letters: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from burnish.config.method import Vae
from burnish.data.batch import Batch
from burnish.errors import UserError
from burnish.family import Family
from burnish.objective import Turn
from burnish.randomness import torch_generator

SCALES = 4  # of edges: each half as fine as the one before
SMALLEST = 8  # pixels each way that a scale has at least


def autoencoder_of(family: Family) -> AutoencoderKL:
    """The family's loaded VAE.

    Raises:
        UserError: it is of a kind that is not trained here.
    """
    vae = family.loaded.get("vae")
    if isinstance(vae, AutoencoderKL):
        return vae
    raise UserError(
        f"method.kind: vae, and the VAE of {family.title} is a {type(vae).__name__}; only AutoencoderKL is trained",
        remedy="Train an adapter. The VAEs of sd15, sd2, sdxl, sd3, flux and others of that kind can be trained.",
    )


def set_recomputing(vae: AutoencoderKL, recomputes: bool) -> None:
    """Whether what its blocks keep for backward is computed again there, where gradients are recorded at all."""
    (vae.enable_gradient_checkpointing if recomputes else vae.disable_gradient_checkpointing)()


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Errors of what the decoder shows of a sample of the encoder's posterior, weighed and added up."""

    mse: float
    l1: float
    edges: float
    kl: float
    encoder: bool  # trains as well
    computed_in: torch.dtype = torch.float32  # the weights are float32

    @classmethod
    def of(cls, method: Vae, computed_in: torch.dtype) -> Self:
        return cls(method.mse, method.l1, method.edges, method.kl, method.encoder, computed_in)

    def turns(self, family: Family, batch: Batch, seed: int) -> Generator[Turn, None, None]:
        """All that is learned of a batch is one turn; zeros stand in place of times."""
        loss_B = self.losses(family, batch, seed)
        yield Turn(batch, loss_B, torch.zeros(len(loss_B)), batch.weight_B)

    def losses(self, family: Family, batch: Batch, seed: int) -> Tensor:
        """Loss per sample in float32, shape (B,)."""
        vae, pixels_B3HW = autoencoder_of(family), batch.latents_BCHW
        with torch.set_grad_enabled(self.encoder and torch.is_grad_enabled()):
            posterior = self._encoded(vae, pixels_B3HW)
        noise_BCHW = torch.stack(
            [
                torch.randn(
                    posterior.mean.shape[1:],
                    generator=torch_generator(seed, "posterior", batch.position, sample_id),
                )
                for sample_id in batch.sample_ids
            ]
        ).to(pixels_B3HW.device)
        latents_BCHW = posterior.mean + posterior.std * noise_BCHW
        loss_B = self.distance(self._decoded(vae, latents_BCHW), pixels_B3HW)
        if self.encoder and self.kl:
            # Both as sums in the paper's code (`LPIPSWithDiscriminator`), so per value of the picture here.
            loss_B = loss_B + self.kl * posterior.kl() / pixels_B3HW[0].numel()
        return loss_B

    def held_out(self, family: Family, batch: Batch, times: Sequence[float], seed: int) -> Tensor:
        """Squared error of each sample as it is decoded in use, from the posterior's mode; times do not matter."""
        vae = autoencoder_of(family)
        shown_B3HW = self._decoded(vae, self._encoded(vae, batch.latents_BCHW).mean)
        return (shown_B3HW - batch.latents_BCHW).square().mean((1, 2, 3))

    def distance(self, shown_B3HW: Tensor, pixels_B3HW: Tensor) -> Tensor:
        """Weighed error per sample, shape (B,)."""
        error_B3HW = shown_B3HW - pixels_B3HW
        loss_B = self.mse * error_B3HW.square().mean((1, 2, 3))
        if self.l1:
            loss_B = loss_B + self.l1 * error_B3HW.abs().mean((1, 2, 3))
        return loss_B + self.edges * edges_of(error_B3HW) if self.edges else loss_B

    def _encoded(self, vae: AutoencoderKL, pixels_B3HW: Tensor) -> DiagonalGaussianDistribution:
        with self._precision(pixels_B3HW):
            told = vae.encode(pixels_B3HW).latent_dist.parameters
        return DiagonalGaussianDistribution(told.float())

    def _decoded(self, vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
        with self._precision(latents_BCHW):
            shown: Tensor = vae.decode(latents_BCHW, return_dict=False)[0]
        return shown.float()

    def _precision(self, tensor: Tensor) -> AbstractContextManager[object]:
        if self.computed_in == torch.float32:
            return nullcontext()
        return torch.autocast(tensor.device.type, self.computed_in)


def edges_of(error_B3HW: Tensor) -> Tensor:
    """Mean absolute value, added up over scales, of what differs from the mean of the nine values around.

    Linear in the error, so that it is the distance of two pictures' edges. After the pyramid of arXiv 1707.05776,
    section 3.2, with boxes for Gaussians: a Laplacian per scale, each scale counting alike.
    """
    total_B = error_B3HW.new_zeros(len(error_B3HW))
    for _ in range(SCALES):
        if min(error_B3HW.shape[-2:]) < SMALLEST:
            break
        around_B3HW = F.avg_pool2d(error_B3HW, 3, stride=1, padding=1, count_include_pad=False)
        total_B = total_B + (error_B3HW - around_B3HW).abs().mean((1, 2, 3))
        error_B3HW = F.avg_pool2d(error_B3HW, 2)
    return total_B
