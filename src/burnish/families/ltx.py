"""LTX-Video by Lightricks (arXiv 2501.00103): 0.9 to 0.9.8, of 2 and 13 billion parameters.

A transformer over single latents (the VAE takes 32 x 32 pixels and 8 frames into one) with cross-attention to T5's
tokens, of which padding is masked. Positions are seconds and pixels, so that the denoiser knows the frame rate. A first
frame, where the model is used with one, is kept by giving its latents time 0: they stay clean while the others are
denoised.

Shape letters: B batch, C channels, T frames, H W height and width of latents, N = T * H * W, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import ltx_vae, t5, video_vae
from burnish.families.native import NativeNames, depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config, Slot
from burnish.families.text_slots import t5_slot
from burnish.families.weights import Layout
from burnish.family import Capabilities, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

HEADS = 32  # of both sizes
T5_TOKENS = 128
T5_TOKENS_OF_CONDITION = 256  # the releases since 0.9.5, whose pipeline is LTXConditionPipeline
FIRST_FRAME = "first_frame_BCHW"

_ATTENTION = ("*.attn?.to_[qkv]", "*.attn?.to_out.0")
_FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")
_BLOCK = "transformer_blocks.#"
NAMES = NativeNames(
    table={
        "patchify_proj": "proj_in",
        **{
            f"adaln_single.emb.timestep_embedder.linear_{n}": f"time_embed.emb.timestep_embedder.linear_{n}"
            for n in (1, 2)
        },
        "adaln_single.linear": "time_embed.linear",
        **{f"{_BLOCK}.attn{n}.{x}_norm": f"{_BLOCK}.attn{n}.norm_{x}" for n in (1, 2) for x in "qk"},
    },
    signs=("patchify_proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn1.q_norm.weight"),
    absent=("audio_patchify_proj.weight",),
)


def _find_transformer(layout: Layout) -> Layout | None:
    ours = {"proj_in.weight", "time_embed.linear.weight", "transformer_blocks.0.attn1.norm_q.weight"}
    if ours <= set(layout) and "audio_proj_in.weight" not in layout:
        return layout
    return NAMES.denoiser(layout)


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    width, channels = layout["proj_in.weight"].shape
    return {
        **shipped,
        "in_channels": channels,
        "out_channels": layout["proj_out.weight"].shape[0],
        "num_attention_heads": HEADS,
        "attention_head_dim": width // HEADS,
        "cross_attention_dim": layout["transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "caption_channels": layout["caption_projection.linear_1.weight"].shape[1],
        "num_layers": depth(layout, "transformer_blocks."),
    }


class LTXVideo(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 128, 4096) and `mask_BS`; with a first frame its latents (B, 128, H, W)."""

    name: ClassVar[str] = "ltx"
    title: ClassVar[str] = "LTX-Video"
    pipelines = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")
    slots = (
        Slot(
            "transformer",
            "denoiser",
            LTXVideoTransformer3DModel.from_config,
            _find_transformer,
            _transformer_config,
        ),
        ltx_vae.ltx_vae_slot(),
        t5_slot("text_encoder", "tokenizer"),
    )
    capabilities = Capabilities(video=True)
    variants: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "LTX-Video, image to video": {"model_index": {"_class_name": "LTXImageToVideoPipeline"}},
    }
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of both attentions."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            ("transformer_blocks.*", "caption_projection.linear_[12]", "proj_out"),
            "Every layer that has one name everywhere: the blocks, the captions' projection, the last layer.",
        ),
    }
    # The first layer and the embedding of time have other names in ComfyUI, which diffusers does not know.
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec="ltx-video",
        base_model_version="ltxv",
        words={"text_encoder": "t5xxl"},
        prefix={"comfy": "diffusion_model.", "diffusers": "transformer."},
        native=NAMES.native_module,
        tensors=NAMES.tensors,
        unreadable={"comfy": ("proj_in", "time_embed.*")},
    )
    latents = LatentShape(channels=128, compression=32, frame_compression=8)
    defaults = SamplerDefaults(
        steps=50, guidance=3.0, size=(512, 704), negative_prompt=True, frames=161, fps=25.0
    )
    prompt_limit = T5_TOKENS

    def configure(self) -> None:
        """The same weights go on from a first frame when the user or the folder's model_index.json says so."""
        kind = self.configs["model_index"].get("_class_name")
        if self.asked.first_frame or kind == "LTXImageToVideoPipeline":
            self.capabilities = Capabilities(references=1, first_frame=True, video=True)
        if kind == "LTXConditionPipeline":
            self.prompt_limit = T5_TOKENS_OF_CONDITION

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        width = self.denoiser.config.caption_channels
        return Conditioning(
            {
                "tokens_BSD": torch.randn(batch, self.prompt_limit, width, generator=generator),
                "mask_BS": torch.ones(batch, self.prompt_limit, dtype=torch.bool),
            }
        )

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """T5 itself reads the padding, as in diffusers; the denoiser does not."""
        tokenizer, encoder = self.tokenizer("text_encoder"), self.module("text_encoder")
        ids = t5.token_ids(tokenizer, prompts, self.prompt_limit).to(encoder.device)
        return Conditioning(
            {"tokens_BSD": encoder(ids).last_hidden_state, "mask_BS": ids != tokenizer.pad_token_id}
        )

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        """The first frame's latents; they are the first latent frame of the clip, as the VAE is causal."""
        if not references:
            return Conditioning({})
        return Conditioning({FIRST_FRAME: video_vae.encode(self.module("vae"), references[0])})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return ltx_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Where there is a first frame, its latents go in clean, and what comes out there leads straight to them."""
        _, _, frames, height, width = noisy.shape
        first = conditioning.get(FIRST_FRAME) if frames > 1 else None  # a still has nothing to go on with
        given, time = noisy, t_B * 1000
        if first is not None:
            given = torch.cat([first[:, :, None].to(noisy), noisy[:, :, 1:]], dim=2)
            later_N = torch.ones(frames, height, width, device=noisy.device, dtype=time.dtype)
            later_N[0] = 0
            time = time[:, None] * later_N.flatten()
        velocity_BND = self.denoiser(
            hidden_states=given.flatten(2).transpose(1, 2).to(self.dtype),
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            timestep=time,
            encoder_attention_mask=conditioning["mask_BS"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self.seconds_and_pixels(),
            return_dict=False,
        )[0]
        velocity: Tensor = velocity_BND.transpose(1, 2).unflatten(2, (frames, height, width))
        if first is None:
            return velocity
        # (noisy - data) / t is noise - data: what is given costs no loss, and a sampler arrives at it.
        t_B111 = t_B.view(-1, 1, 1, 1).clamp_min(1e-6)
        # Apple's GPUs lack float64.
        precise = torch.float32 if noisy.device.type == "mps" else torch.float64
        kept = (noisy[:, :, 0].to(precise) - first.to(precise)) / t_B111
        return torch.cat([kept[:, :, None].to(velocity), velocity[:, :, 1:]], dim=2)

    def seconds_and_pixels(self) -> tuple[float, int, int]:
        """How far apart latents are: in seconds at the released frame rate, and in pixels each way."""
        per_latent = self.latents.frame_compression or 1
        return per_latent / self.defaults.fps, self.latents.compression, self.latents.compression

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
