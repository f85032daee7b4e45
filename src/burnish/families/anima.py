"""Anima by CircleStone Labs: Cosmos-Predict2's transformer of 2B for still pictures, with a text side of its own.

A prompt is read twice: Qwen3 0.6B gives hidden states, T5's tokenizer alone gives token numbers. A small network, the
text conditioner, embeds the numbers and lets them attend to the states; what comes out, padded with zeros to 512
tokens, is all that the denoiser is told. The conditioner is not trained here and counts as a text encoder, so that its
output is cached. The transformer predicts velocity over 16-channel latents with a time axis of length 1.

The release is a modular pipeline of diffusers (`modular_model_index.json`), or ComfyUI's single file, which holds the
conditioner as `llm_adapter`. Native names: diffusers' `scripts/convert_anima_to_diffusers.py`.

Shape letters: B batch, C channels, H W height and width of latents, S T5 tokens, Q Qwen3 tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, ClassVar

import torch
from diffusers import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
from torch import Tensor, nn

from burnish.families import t5, video_vae
from burnish.families.native import PREFIXES, NativeNames, depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen3_slot
from burnish.families.slots import Config, Slot
from burnish.families.video_vae import wan_vae_slot
from burnish.families.weights import Layout, below
from burnish.family import (
    Conditioning,
    ExportKeys,
    LatentShape,
    Part,
    SamplerDefaults,
    TargetSet,
)

PROMPT_TOKENS = 512  # of either tokenizer
PATCH = 2

_NET = "net."  # what the release puts before every name
_CONDITIONER = "llm_adapter."
_CONDITIONER_SIGN = f"{_CONDITIONER}blocks.0.cross_attn.q_proj.weight"
_OUR_SIGNS = {
    "patch_embed.proj.weight",
    "transformer_blocks.0.norm1.linear_1.weight",
    "time_embed.norm.weight",
}
_BUFFERS = ("pos_embedder.", "accum_")  # of the release's trainer, besides `_extra_state`

_BLOCK = {
    **{
        f"adaln_modulation_{theirs}.{number}": f"norm{place}.linear_{number}"
        for place, theirs in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for number in (1, 2)
    },
    **{
        f"{theirs}.{x}_proj": f"{ours}.to_{x}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for x in "qkv"
    },
    **{
        f"{theirs}.{x}_norm": f"{ours}.norm_{x}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for x in "qk"
    },
    "self_attn.output_proj": "attn1.to_out.0",
    "cross_attn.output_proj": "attn2.to_out.0",
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
}
NAMES = NativeNames(
    table={
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "t_embedding_norm": "time_embed.norm",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
        **{f"blocks.#.{theirs}": f"transformer_blocks.#.{ours}" for theirs, ours in _BLOCK.items()},
    },
    # Without the conditioner it is Cosmos-Predict2 itself.
    signs=("x_embedder.proj.1.weight", "blocks.0.adaln_modulation_self_attn.1.weight", _CONDITIONER_SIGN),
)

_ATTENTION = ("transformer_blocks.*.attn[12].to_[qkv]", "transformer_blocks.*.attn[12].to_out.0")
_FEED_FORWARD = ("transformer_blocks.*.ff.net.0.proj", "transformer_blocks.*.ff.net.2")


def _release(layout: Layout) -> Layout | None:
    """The transformer and its conditioner under the names of the release; None if the file does not hold both."""
    for prefix in (*PREFIXES, *(before + _NET for before in PREFIXES)):
        inside = below(layout, prefix)
        if all(sign in inside for sign in NAMES.signs):
            return inside
    return None


def _find_transformer(layout: Layout) -> Layout | None:
    if set(layout) >= _OUR_SIGNS:
        return layout
    found = _release(layout)
    if found is None:
        return None
    kept = {
        name: piece
        for name, piece in found.items()
        if not name.startswith((_CONDITIONER, *_BUFFERS)) and not name.endswith("_extra_state")
    }
    return NAMES.layout(kept)


def _find_conditioner(layout: Layout) -> Layout | None:
    found = _release(layout)
    return None if found is None else below(found, _CONDITIONER)


def _transformer(config: Config) -> CosmosTransformer3DModel:
    model = CosmosTransformer3DModel.from_config(config)
    # diffusers resizes the mask of padding, which is zero everywhere, by torchvision; `predict` gives it instead.
    model.register_to_config(concat_padding_mask=False)
    return model


def _transformer_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    head_dim = layout["transformer_blocks.0.attn1.norm_q.weight"].shape[0]
    patches = layout["patch_embed.proj.weight"].shape[1] // PATCH**2
    width = layout["transformer_blocks.0.attn1.to_q.weight"].shape[0]
    return {
        **shipped,
        "in_channels": patches - int(shipped["concat_padding_mask"]),
        "out_channels": layout["proj_out.weight"].shape[0] // PATCH**2,
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "num_layers": depth(layout, "transformer_blocks."),
        "mlp_ratio": layout["transformer_blocks.0.ff.net.0.proj.weight"].shape[0] / width,
        "text_embed_dim": layout["transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "adaln_lora_dim": layout["transformer_blocks.0.norm1.linear_1.weight"].shape[0],
    }


def _conditioner_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    vocabulary, target = layout["embed.weight"].shape
    width, source = layout["blocks.0.cross_attn.k_proj.weight"].shape
    return {
        **shipped,
        "source_dim": source,
        "target_dim": target,
        "model_dim": width,
        "num_layers": depth(layout, "blocks."),
        "num_attention_heads": width // layout["blocks.0.cross_attn.q_norm.weight"].shape[0],
        "target_vocab_size": vocabulary,
    }


class Anima(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 512, 1024), zeros after the prompt, which the model was trained to read."""

    name: ClassVar[str] = "anima"
    title: ClassVar[str] = "Anima"
    pipelines = ("AnimaModularPipeline",)
    slots = (
        Slot("transformer", "denoiser", _transformer, _find_transformer, _transformer_config),
        wan_vae_slot(AutoencoderKLQwenImage.from_config, "qwen_image_vae.safetensors"),
        qwen3_slot(file_hint="qwen_3_06b_base.safetensors"),
        Slot(
            "text_conditioner",
            "text_encoders",
            AnimaTextConditioner.from_config,
            _find_conditioner,
            _conditioner_config,
            tokenizer="t5_tokenizer",
            load_tokenizer=t5.tokenizer_in,
            ship_tokenizer=t5.shipped_tokenizer,
            listed_under="denoiser",  # whose file holds it
        ),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of both attentions."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            ("transformer_blocks.*", "patch_embed.proj", "time_embed.t_embedder.*", "norm_out.*", "proj_out"),
            "Every layer of the transformer, modulations and the embedding of time among them.",
        ),
    }
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec="anima",
        base_model_version="anima",
        prefix={"comfy": "diffusion_model.", "diffusers": "transformer."},
        native=NAMES.native_module,
    )
    latents = LatentShape(channels=16, compression=8, patch=PATCH)
    defaults = SamplerDefaults(steps=50, guidance=4.0, size=(1024, 1024), negative_prompt=True)
    prompt_limit = PROMPT_TOKENS

    def identity(self, part: Part) -> str:
        """Separate files of text encoders hold Qwen3 alone; the conditioner is in the denoiser's."""
        own = super().identity(part)
        if part != "text_encoders" or self.source is None or not self.source.source.text_encoders:
            return own
        return sha256((own + super().identity("denoiser")).encode()).hexdigest()

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        width = self.denoiser.config.text_embed_dim
        return Conditioning({"tokens_BSD": torch.randn(batch, PROMPT_TOKENS, width, generator=generator)})

    def count_tokens(self, prompt: str) -> int:
        """Of the tokenizer that makes more of the prompt: either cuts what is too long."""
        readers = [self.tokenizer(folder) for folder in ("text_encoder", "text_conditioner")]
        return max(len(reader(prompt).input_ids) for reader in readers)

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        conditioner = self.module("text_conditioner")
        states_BQD, mask_BQ = self._states(prompts)
        numbers = _tokens(self.tokenizer("text_conditioner"), prompts)
        tokens_BSD: Tensor = conditioner(
            source_hidden_states=states_BQD.to(conditioner.dtype),
            target_input_ids=numbers.input_ids.to(conditioner.device),
            target_attention_mask=numbers.attention_mask.to(conditioner.device),
            source_attention_mask=mask_BQ,
        )
        return Conditioning({"tokens_BSD": tokens_BSD})

    def _states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Qwen3's last hidden states, zero where there is no token, and which of them the conditioner reads.

        An empty prompt has no token. It reads one state of zeros, which adds nothing, as no state at all does; rows
        without any would be undefined in some attention kernels.
        """
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        tokens = _tokens(tokenizer, [prompt or tokenizer.pad_token for prompt in prompts])
        mask_BQ = tokens.attention_mask.bool().to(encoder.device)
        states_BQD = encoder(
            input_ids=tokens.input_ids.to(encoder.device), attention_mask=mask_BQ
        ).last_hidden_state
        is_said_B = torch.tensor([bool(prompt) for prompt in prompts], device=encoder.device)
        return states_BQD * (mask_BQ & is_said_B[:, None])[..., None], mask_BQ

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        seen_BCTHW = noisy[:, :, None].to(self.dtype)
        if self.configs["transformer"].get(
            "concat_padding_mask", True
        ):  # 1 where there is no picture: nowhere
            seen_BCTHW = torch.cat([seen_BCTHW, torch.zeros_like(seen_BCTHW[:, :1])], dim=1)
        predicted_BCTHW: Tensor = self.denoiser(
            hidden_states=seen_BCTHW,
            timestep=t_B.float(),
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            return_dict=False,
        )[0]
        return predicted_BCTHW[:, :, 0]

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)


def _tokens(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """Token numbers and mask, (B, longest); padding on the right, where it shifts no position."""
    return tokenizer(
        list(prompts),
        padding="longest",
        padding_side="right",
        max_length=PROMPT_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
