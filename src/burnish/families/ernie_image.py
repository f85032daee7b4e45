"""ERNIE-Image by Baidu: a single-stream transformer over FLUX.2's latents that predicts velocity.

Its blocks share one modulation. It reads the hidden states before the last layer of Mistral 3, each caption at its own
length; the picture's first rotary position is the number of text tokens, so that padding has no effect.

Shape letters: B batch, C channels, H W height and width of latents, S prompt tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import ErnieImageTransformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import clip, flux2_vae
from burnish.families.mistral import mistral_slot
from burnish.families.native import depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config, Slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

READ_STATE = -2  # of the text encoder: before its last layer
EPSILON = (
    1e-5  # under the root of the latents' variance, as trained; the released VAE's config says otherwise
)
LONGEST_PROMPT = 2048

_ATTENTION = ("layers.*.self_attention.to_[qkv]", "layers.*.self_attention.to_out.0")
_FEED_FORWARD = tuple(f"layers.*.mlp.{name}" for name in ("gate_proj", "up_proj", "linear_fc2"))


def _find_transformer(layout: Layout) -> Layout | None:
    signs = {"x_embedder.proj.weight", "layers.0.adaLN_sa_ln.weight", "layers.0.mlp.linear_fc2.weight"}
    return layout if signs <= set(layout) else None


def _transformer_config(shipped: Config, layout: Layout) -> dict[str, object]:
    hidden = layout["x_embedder.proj.weight"].shape[0]
    head_dim = layout["layers.0.self_attention.norm_q.weight"].shape[0]
    text = layout["text_proj.weight"].shape[1] if "text_proj.weight" in layout else hidden
    return {
        **shipped,
        "hidden_size": hidden,
        "num_attention_heads": hidden // head_dim,
        "num_layers": depth(layout, "layers."),
        "ffn_hidden_size": layout["layers.0.mlp.gate_proj.weight"].shape[0],
        "text_in_dim": text,
    }


class ErnieImage(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 3072), as long as the prompt, and its `mask_BS`."""

    name: ClassVar[str] = "ernie_image"
    title: ClassVar[str] = "ERNIE-Image"
    pipelines = ("ErnieImagePipeline",)
    slots = (
        Slot(
            "transformer",
            "denoiser",
            ErnieImageTransformer2DModel.from_config,
            _find_transformer,
            _transformer_config,
        ),
        flux2_vae.flux2_vae_slot(),
        mistral_slot("text_encoder", "tokenizer"),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            ("layers.*", "x_embedder.proj", "text_proj", "final_linear"),
            "Every layer of the blocks, and the first and last layer.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers",),
        modelspec="ernie-image",
        base_model_version="ernie_image",
        prefix={"diffusers": "transformer."},
        words={"text_encoder": "ministral3_3b"},
    )
    latents = LatentShape(channels=flux2_vae.CHANNELS, compression=flux2_vae.COMPRESSION)
    defaults = SamplerDefaults(steps=50, guidance=4.0, size=(1024, 1024), negative_prompt=True)
    prompt_limit = LONGEST_PROMPT

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        shape = (batch, 64, self.denoiser.config.text_in_dim)
        return Conditioning(
            {
                "tokens_BSD": torch.randn(shape, generator=generator),
                "mask_BS": torch.ones(batch, 64, dtype=torch.bool),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        """Nothing at all is read as one mark."""
        return max(1, clip.count_tokens(self.tokenizer("text_encoder"), prompt))

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        rows = []
        for prompt in prompts:
            text = written_out(tokenizer, prompt)
            ids = tokenizer(text, truncation=True, max_length=LONGEST_PROMPT).input_ids
            ids_BS = torch.tensor([ids or [tokenizer.bos_token_id or 0]], device=encoder.device)
            tokens_BSD = encoder(input_ids=ids_BS, output_hidden_states=True).hidden_states[READ_STATE]
            mask_BS = torch.ones(ids_BS.shape, dtype=torch.bool, device=encoder.device)
            rows.append(Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS}))
        return Conditioning.collate(rows)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return flux2_vae.encode(self.module("vae"), pixels, EPSILON)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return flux2_vae.decode(self.module("vae"), latents, EPSILON)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        predicted: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=(t_B * 1000).to(self.dtype),
            text_bth=conditioning["tokens_BSD"].to(self.dtype),
            text_lens=conditioning["mask_BS"].sum(1),
            return_dict=False,
        )[0]
        return predicted

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.layers)
