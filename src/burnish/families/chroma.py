"""Chroma by Lodestone Rock: FLUX.1-schnell without CLIP, its modulation layers replaced by one small network.

A transformer over 2x2 patches of 16-channel latents that predicts velocity, and reads T5's tokens alone. Padding is
masked in T5 and in the transformer, but for the first padding token, which the transformer was trained to see. What
makes every block's modulation out of the time (`distilled_guidance_layer`) was distilled once and stays as it is: no
target set names it.

Shape letters: B batch, C channels, H W height and width of latents, S prompt tokens, N patches, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import clip
from burnish.families.flux_names import BLOCKS, KINDS, LOST_IN_KOHYA, TARGETS, rows_of_stacks
from burnish.families.masked import is_whole, trimmed
from burnish.families.native import NativeNames, depth
from burnish.families.packing import pack, patch_positions, unpack
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Slot, vae_slot
from burnish.families.text_slots import t5_slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

_GUIDANCE = "distilled_guidance_layer"
NAMES = NativeNames(
    table={
        **BLOCKS,
        f"{_GUIDANCE}.layers.#.in_layer": f"{_GUIDANCE}.layers.#.linear_1",
        f"{_GUIDANCE}.layers.#.out_layer": f"{_GUIDANCE}.layers.#.linear_2",
    },
    # Radiance, which works on pixels, has no `img_in`.
    signs=("double_blocks.0.img_attn.qkv.weight", "img_in.weight", f"{_GUIDANCE}.in_proj.weight"),
    kinds=KINDS,
)
_OUR_SIGNS = {
    "x_embedder.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
    f"{_GUIDANCE}.in_proj.weight",
}
HEAD_DIM = 128


def _find_transformer(layout: Layout) -> Layout | None:
    return layout if set(layout) >= _OUR_SIGNS else NAMES.denoiser(layout, rows_of_stacks)


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    width, in_channels = layout["x_embedder.weight"].shape
    head_dim = layout["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    if head_dim != HEAD_DIM:  # how positions are spread over the heads is not written in a single file
        raise ValueError(f"heads of {HEAD_DIM}: they are of {head_dim}")
    return {
        **shipped,
        "in_channels": in_channels,
        "num_layers": depth(layout, "transformer_blocks."),
        "num_single_layers": depth(layout, "single_transformer_blocks."),
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": layout["context_embedder.weight"].shape[1],
        "approximator_num_channels": layout[f"{_GUIDANCE}.in_proj.weight"].shape[1],
        "approximator_hidden_dim": layout[f"{_GUIDANCE}.in_proj.weight"].shape[0],
        "approximator_layers": depth(layout, f"{_GUIDANCE}.layers."),
    }


def _make_transformer(config: Mapping[str, Any]) -> ChromaTransformer2DModel:
    with (
        warnings.catch_warnings()
    ):  # diffusers takes its position embedding from where it used to be, and says so
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        return ChromaTransformer2DModel.from_config(dict(config))


class Chroma(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 4096), T5's last hidden state, and `mask_BS`, where the transformer looks:
    the caption with its end, and one padding token."""

    name: ClassVar[str] = "chroma"
    title: ClassVar[str] = "Chroma"
    pipelines = ("ChromaPipeline", "ChromaImg2ImgPipeline")
    slots = (
        Slot(
            "transformer",
            "denoiser",
            _make_transformer,
            _find_transformer,
            _transformer_config,
        ),
        vae_slot(),
        t5_slot("text_encoder", "tokenizer"),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers", "comfy", "kohya"),
        modelspec="chroma",
        base_model_version="chroma",
        words={"text_encoder": "t5xxl"},
        prefix={"diffusers": "transformer.", "comfy": "diffusion_model.", "kohya": "lora_unet_"},
        native=NAMES.native_module,
        native_kohya=("ComfyUI", "diffusers"),
        tensors=NAMES.tensors,
        unreadable={
            "diffusers": ("distilled_guidance_layer.*",),
            "kohya": (*LOST_IN_KOHYA, "distilled_guidance_layer.*"),
        },
    )
    latents = LatentShape(channels=16, compression=8, patch=2)
    defaults = SamplerDefaults(steps=40, guidance=3.0, size=(1024, 1024), negative_prompt=True)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        width = self.denoiser.config.joint_attention_dim
        return Conditioning(
            {
                "tokens_BSD": torch.randn(batch, self.prompt_limit, width, generator=generator),
                "mask_BS": torch.ones(batch, self.prompt_limit, dtype=torch.bool),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        return clip.count_tokens(self.tokenizer("text_encoder"), prompt)

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        encoder = self.module("text_encoder")
        tokenizer = self.tokenizer("text_encoder")
        encoded = tokenizer(
            [written_out(tokenizer, prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.prompt_limit,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        states_BSD = encoder(encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
        places_S = torch.arange(self.prompt_limit, device=encoder.device)
        seen_BS = places_S <= encoded.attention_mask.sum(dim=1, keepdim=True)
        tokens_BSD, mask_BS = trimmed(states_BSD.to(self.dtype), seen_BS)
        return Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS})

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        patches_BND = pack(noisy).to(self.dtype)
        tokens_BSD = conditioning["tokens_BSD"].to(self.dtype)
        predicted_BND: Tensor = self.denoiser(
            hidden_states=patches_BND,
            timestep=t_B,
            encoder_hidden_states=tokens_BSD,
            txt_ids=torch.zeros(tokens_BSD.shape[1], 3, device=noisy.device),
            img_ids=patch_positions(height // 2, width // 2, noisy.device),
            attention_mask=_attention_mask(conditioning, patches_BND.shape[1]),
            return_dict=False,
        )[0]
        return unpack(predicted_BND, height, width)

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.transformer_blocks, *self.denoiser.single_transformer_blocks]


def _attention_mask(conditioning: Conditioning, patches: int) -> Tensor | None:
    """Boolean, unlike that of diffusers' pipeline: a floating mask of ones and zeros is added to the attention's
    logits, so that padding is seen after all (https://github.com/huggingface/diffusers/issues/12116).

    None where nothing is masked, which the faster kernels need.
    """
    if is_whole(conditioning):
        return None
    mask_BS = conditioning["mask_BS"].bool()
    return torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), patches)], dim=1)
