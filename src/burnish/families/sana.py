"""Sana and Sana 1.5 by NVIDIA (arXiv 2410.10629, 2501.18427).

A transformer with linear attention over the latents of a deep autoencoder: 32 channels, 32 pixels to a latent, one
token each, so that 1024 x 1024 pixels are 1,024 tokens. It predicts velocity. Captions are read by Gemma 2 behind an
instruction to enhance them, of which only the first token and the last are kept; negative prompts and the empty
caption go without.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import gemma
from burnish.families.masked import trimmed
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config, Slot
from burnish.family import NegativePrompt, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

PROMPT_TOKENS = 300
# What the model was trained with, word for word (configs/sana_app_config/Sana_1600M_app.yaml of the release).
INSTRUCTION = "\n".join(
    [
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing "
        "street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering "
        "glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    ]
)

_ATTENTION = ("*.attn[12].to_[qkv]", "*.attn[12].to_out.0")
_FEED_FORWARD = ("*.ff.conv_inverted", "*.ff.conv_point")  # between them a convolution of one channel each


class Sana(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 2304) and `mask_BS`, S the longest caption."""

    name: ClassVar[str] = "sana"
    title: ClassVar[str] = "Sana"
    pipelines = ("SanaPipeline", "SanaPAGPipeline")
    spacing = "scheduler"
    slots = (
        Slot("transformer", "denoiser", SanaTransformer2DModel.from_config),
        Slot("vae", "vae", AutoencoderDC.from_config),
        gemma.slot(),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention, linear and across."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            (
                *_ATTENTION,
                *_FEED_FORWARD,
                "patch_embed.proj",
                "caption_projection.*",
                "time_embed.*",
                "proj_out",
            ),
            "The blocks but for their convolutions by channel, and the layers before and after them.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers",),
        modelspec="sana",
        base_model_version="sana",
        prefix={"diffusers": "transformer."},
        comfyui=False,
        words={"text_encoder": "gemma2_2b"},
    )
    latents = LatentShape(channels=32, compression=32)
    defaults = SamplerDefaults(steps=20, guidance=4.5, size=(1024, 1024), negative_prompt=True)
    prompt_limit = PROMPT_TOKENS

    def configure(self) -> None:
        widths = self.configs.get("vae", {}).get("encoder_block_out_channels")
        if widths:
            self.latents = LatentShape(channels=32, compression=2 ** (len(widths) - 1))

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        """Sana Sprint, which is distilled for one to four steps, reads its guidance as a number."""
        return not config.get("guidance_embeds")

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        width = self.denoiser.config.caption_channels
        return Conditioning(
            {
                "tokens_BSD": torch.randn(batch, PROMPT_TOKENS, width, generator=generator),
                "mask_BS": torch.ones(batch, PROMPT_TOKENS, dtype=torch.bool),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        return gemma.count_tokens(self.tokenizer("text_encoder"), _read(prompt))

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """Captions are read in lower case; of the instruction's tokens the begin mark and the last are kept."""
        rows = [self._encoded(prompt) for prompt in prompts]
        return Conditioning.collate(rows)

    def _encoded(self, prompt: str) -> Conditioning:
        tokenizer, encoder = self.tokenizer("text_encoder"), self.module("text_encoder")
        is_caption = bool(prompt) and not isinstance(prompt, NegativePrompt)
        before = INSTRUCTION if is_caption else ""
        # The instruction's begin mark and last token are among those kept, hence 2 less.
        length = PROMPT_TOKENS + (gemma.count_tokens(tokenizer, before) - 2 if is_caption else 0)
        ids_BS, mask_BS = gemma.token_ids(tokenizer, [before + _read(prompt)], length)
        ids_BS, mask_BS = ids_BS.to(encoder.device), mask_BS.to(encoder.device)
        tokens_BSD = encoder(ids_BS, attention_mask=mask_BS).last_hidden_state
        kept = [0, *range(length - PROMPT_TOKENS + 1, length)]
        tokens_BSD, mask_BS = trimmed(tokens_BSD[:, kept], mask_BS[:, kept])
        return Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS})

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """The autoencoder is deterministic: there is no posterior to take the mode of."""
        vae = self.module("vae")
        latents_BCHW: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent
        return latents_BCHW * float(vae.config.scaling_factor)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.module("vae")
        plain_BCHW = latents.to(vae.device, vae.dtype) / float(vae.config.scaling_factor)
        pixels_B3HW: Tensor = vae.decode(plain_BCHW, return_dict=False)[0]
        return pixels_B3HW

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        denoiser = self.denoiser
        predicted: Tensor = denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=t_B * 1000 * denoiser.config.timestep_scale,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            # As numbers, so that the model makes a bias of them.
            encoder_attention_mask=conditioning["mask_BS"].to(self.dtype),
            return_dict=False,
        )[0]
        return predicted

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)


def _read(prompt: str) -> str:
    return str(prompt).lower().strip()
