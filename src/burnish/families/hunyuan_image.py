"""HunyuanImage 2.1 by Tencent (https://github.com/Tencent-Hunyuan/HunyuanImage-2.1), 17 billion parameters.

A transformer of two-stream and one-stream blocks over 64-channel latents, each of 32 x 32 pixels, that predicts
velocity. It reads the third last hidden state of Qwen2.5-VL behind an instruction, and what stands in quotes letter by
letter through ByT5. The distilled release imitates guidance and steps: it is told the scale and where a step ends.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, G letters, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import HunyuanImageTransformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import clip, hunyuan_image_vae
from burnish.families.byt5 import byt5_slot
from burnish.families.guidance import AdaptiveProjection
from burnish.families.hunyuan_image_names import NAMES, TimeGuidance, find_transformer
from burnish.families.hunyuan_names import ATTENTION, FEED_FORWARD, ONE_STREAM, TWO_STREAMS
from burnish.families.native import depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen25_vl_slot
from burnish.families.slots import Config, Slot
from burnish.families.sources import locate, read_json
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import Capabilities, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import Guide, SamplerDefaults

TOKENS, LETTERS = 1000, 128
READ_STATE = -3  # of Qwen2.5-VL, which has a norm after its last
# As released; so many tokens stand before the caption and are not kept.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>"
)
INSTRUCTION_TOKENS = 34
_QUOTES = (r"'(.*?)'", r'"(.*?)"', "‘(.*?)’", "“(.*?)”")


def _transformer(config: Mapping[str, Any]) -> HunyuanImageTransformer2DModel:
    """The denoiser, with a guidance embedding that can be bypassed."""
    transformer: HunyuanImageTransformer2DModel = HunyuanImageTransformer2DModel.from_config(dict(config))
    transformer.time_guidance_embed = TimeGuidance(transformer.time_guidance_embed)
    return transformer


def _transformer_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    width, channels = layout["x_embedder.proj.weight"].shape[:2]
    head_dim = layout[f"{TWO_STREAMS}.0.attn.norm_q.weight"].shape[0]
    return {
        **shipped,
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "rope_axes_dim": [head_dim // 2] * 2,
        "num_layers": depth(layout, f"{TWO_STREAMS}."),
        "num_single_layers": depth(layout, f"{ONE_STREAM}."),
        "num_refiner_layers": depth(layout, "context_embedder.token_refiner.refiner_blocks."),
        "text_embed_dim": layout["context_embedder.proj_in.weight"].shape[1],
        "text_embed_2_dim": layout["context_embedder_2.linear_1.weight"].shape[1],
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in layout,
        "use_meanflow": "time_guidance_embed.timestep_embedder_r.linear_1.weight" in layout,
    }


def quoted(prompt: str) -> str:
    """What ByT5 is told of a prompt: each text in quotes, single ones first; empty where there is none."""
    texts = [text for pattern in _QUOTES for text in re.findall(pattern, prompt)]
    return "".join(f'Text "{text}". ' for text in texts)


class HunyuanImage(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 3584) and `mask_BS`, as long as the prompt; `tokens_glyph_BGD` (B, G, 1472) and
    `mask_glyph_BG`, as long as what it quotes, none where it quotes nothing; `guidance_B` and `until_B` distilled.
    """

    name: ClassVar[str] = "hunyuan_image"
    title: ClassVar[str] = "HunyuanImage"
    pipelines = ("HunyuanImagePipeline",)
    slots = (
        Slot("transformer", "denoiser", _transformer, find_transformer, _transformer_config),
        hunyuan_image_vae.vae_slot(),
        qwen25_vl_slot(),
        byt5_slot("byt5_small_glyphxl_fp16.safetensors"),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*ATTENTION, *FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            (f"{TWO_STREAMS}.*", f"{ONE_STREAM}.*", "proj_out"),
            "Every layer of the blocks, modulations included, and the last layer; not the refiner of the captions.",
        ),
    }
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec="hunyuan-image-2.1",
        base_model_version="hunyuan_image_2.1",
        prefix={"comfy": "transformer.", "diffusers": "transformer."},
        native=NAMES.native_module,
        readers={"comfy": ("ComfyUI",), "diffusers": ("transformer.load_lora_adapter of diffusers",)},
        tensors=NAMES.tensors,
        words={"text_encoder": "qwen25_7b"},
        # ComfyUI respells the blocks of Tencent's names alone.
        unreadable={"comfy": ("context_embedder*", "time_guidance_embed.*")},
    )
    latents = LatentShape(channels=64, compression=32)
    prompt_limit = TOKENS

    def configure(self) -> None:
        config = self.configs["transformer"]
        distilled = bool(config.get("guidance_embeds"))
        self.capabilities = Capabilities(
            guidance_embedding=distilled, mean_flow=bool(config.get("use_meanflow"))
        )
        guiders = {name: self._guider(name) for name in ("guider", "ocr_guider")}
        guided = not distilled and guiders["guider"] is not None
        scale = float((guiders["guider"] or {}).get("guidance_scale", 3.5))
        self.defaults = SamplerDefaults(
            steps=8 if distilled else 50,
            guidance=3.25 if distilled else scale,
            size=(2048, 2048),
            negative_prompt=guided,
            guide_of=(lambda told: _rule(told, guiders)) if guided else None,
        )

    def _guider(self, name: str) -> Config | None:
        """The settings of a guidance rule beside the model; the released ones of a single file."""
        if self.source is None or not self.source.index:
            shipped: Config = self.configs[name]
            return shipped
        path = locate(self.source.source) / name / "guider_config.json"
        return read_json(path) if path.is_file() else None

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        refiners = config["num_refiner_layers"]
        return {**super().with_depth(config, depth), "num_refiner_layers": refiners}

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        config = self.denoiser.config
        return Conditioning(
            {
                "tokens_BSD": torch.randn(batch, 64, config.text_embed_dim, generator=generator),
                "mask_BS": torch.ones(batch, 64, dtype=torch.bool),
                "tokens_glyph_BGD": torch.zeros(batch, 0, config.text_embed_2_dim),
                "mask_glyph_BG": torch.ones(batch, 0, dtype=torch.bool),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        """Of the caption and what closes it, as Qwen reads them."""
        asked = TEMPLATE.format(prompt)
        return clip.count_tokens(self.tokenizer("text_encoder"), asked) - INSTRUCTION_TOKENS

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        return Conditioning.collate([self._encoded(prompt) for prompt in prompts])

    def _encoded(self, prompt: str) -> Conditioning:
        encoder, byt5 = self.module("text_encoder"), self.module("text_encoder_2")
        tokenizer = self.tokenizer("text_encoder")
        asked = tokenizer(
            TEMPLATE.format(written_out(tokenizer, prompt)),
            max_length=INSTRUCTION_TOKENS + TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        states_BSD = encoder(asked.input_ids, output_hidden_states=True).hidden_states[READ_STATE]
        text = quoted(prompt)
        glyphs_BGD = states_BSD.new_zeros(1, 0, byt5.config.d_model)
        if text:
            spelled = self.tokenizer("text_encoder_2")(
                text, max_length=LETTERS, truncation=True, return_tensors="pt"
            ).to(byt5.device)
            glyphs_BGD = byt5(spelled.input_ids).last_hidden_state
        tokens_BSD = states_BSD[:, INSTRUCTION_TOKENS:]
        return Conditioning(
            {
                "tokens_BSD": tokens_BSD,
                "mask_BS": tokens_BSD.new_ones(tokens_BSD.shape[:2], dtype=torch.bool),
                "tokens_glyph_BGD": glyphs_BGD,
                "mask_glyph_BG": glyphs_BGD.new_ones(glyphs_BGD.shape[:2], dtype=torch.bool),
            }
        )

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        guidance_B, until_B = conditioning.get("guidance_B"), conditioning.get("until_B")
        if self.capabilities.mean_flow and until_B is None:
            until_B = t_B
        # Without letters their network is left out, which comes to the same as masking them.
        quotes = conditioning["mask_glyph_BG"].shape[1] > 0
        predicted: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=t_B * 1000,
            timestep_r=until_B * 1000 if self.capabilities.mean_flow and until_B is not None else None,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            encoder_attention_mask=conditioning["mask_BS"],
            encoder_hidden_states_2=conditioning["tokens_glyph_BGD"].to(self.dtype) if quotes else None,
            encoder_attention_mask_2=conditioning["mask_glyph_BG"] if quotes else None,
            guidance=None if guidance_B is None else guidance_B * 1000,
            return_dict=False,
        )[0]
        return predicted

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.transformer_blocks, *self.denoiser.single_transformer_blocks]


def _rule(told: Conditioning, guiders: Mapping[str, Config | None]) -> Guide:
    """The released rule of guidance; where a prompt quotes something, the usual rule holds for longer."""
    settings = dict(guiders["guider"] or {})
    plain = int(settings.get("adaptive_projected_guidance_start_step", 5))
    lettered = int((guiders["ocr_guider"] or settings).get("adaptive_projected_guidance_start_step", plain))
    quotes_B = told["mask_glyph_BG"].any(dim=1)
    return AdaptiveProjection(
        torch.where(quotes_B, lettered, plain),
        scale=float(settings.get("adaptive_projected_guidance_scale", 10.0)),
        momentum=settings.get("adaptive_projected_guidance_momentum", -0.5),
        longest=float(settings.get("adaptive_projected_guidance_rescale", 10.0)),
        along=float(settings.get("eta", 0.0)),
    )
