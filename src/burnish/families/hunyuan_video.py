"""HunyuanVideo by Tencent (arXiv 2412.03603), 13 billion parameters: clips from text or a first frame, and pictures.

A transformer of two-stream and one-stream blocks over 2x2 patches of 16-channel latents (the VAE takes 8 x 8 pixels and
4 frames into one) that predicts velocity. It reads Llama's third last hidden state, of which padding is masked, and
CLIP's pooled embedding; its guidance scale is embedded. Llama is asked in a template for what matters in a video; the
states of that instruction are dropped. The image-to-video releases are told the first frame as in
`hunyuan_first_frame.py`.

Shape letters: B batch, C channels, T frames, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import clip, first_frame, hunyuan_first_frame, hunyuan_video_parts, video_vae
from burnish.families.hunyuan_first_frame import FIRST_FRAME
from burnish.families.hunyuan_names import (
    ATTENTION,
    FEED_FORWARD,
    NAMES,
    ONE_STREAM,
    TWO_STREAMS,
)
from burnish.families.llava import llava_or_llama_slot
from burnish.families.masked import trimmed
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config
from burnish.families.text_slots import clip_slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import Capabilities, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

LLAMA_TOKENS = 256
READ_STATE = -3  # of Llama: two layers are left out
# As released, missing blanks included (diffusers: DEFAULT_PROMPT_TEMPLATE); so many tokens stand before the caption.
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
INSTRUCTION_TOKENS = 95


class HunyuanVideo(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, up to 256, 4096), `mask_BS`, `pooled_BD` (B, 768), and `guidance_B`; of image to
    video up to 288 tokens of the picture before the caption's, and `first_frame_BC1HW` (B, 16, 1, H, W), without
    which nothing is known of the first frame."""

    name: ClassVar[str] = "hunyuan_video"
    title: ClassVar[str] = "HunyuanVideo"
    pipelines = ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline")
    slots = (
        hunyuan_video_parts.transformer_slot(),
        hunyuan_video_parts.vae_slot(),
        llava_or_llama_slot("text_encoder", "tokenizer"),
        clip_slot("text_encoder_2", "tokenizer_2", projection=False),
    )
    capabilities = Capabilities(guidance_embedding=True, video=True)
    variants: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "HunyuanVideo-I2V": {"transformer": {"image_condition_type": "token_replace"}},
    }
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*ATTENTION, *FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            (f"{TWO_STREAMS}.*", f"{ONE_STREAM}.*", "proj_out"),
            "Every layer of the blocks, modulations included, and the last layer; not the refiner of the captions, "
            "which diffusers would read wrongly from ComfyUI's format.",
        ),
    }
    # Diffusers knows the format by a fused attention layer of a two-stream block.
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec="hunyuan-video",
        base_model_version="hunyuan_video",
        prefix={"comfy": "transformer.", "diffusers": "transformer."},
        native=NAMES.native_module,
        tensors=NAMES.tensors,
        words={"text_encoder": "llama", "text_encoder_2": "clip_l"},
        unreadable={"comfy": ("context_embedder.*",)},
        complete=(f"{TWO_STREAMS}.0.attn.to_[qkv]",),
    )
    latents = LatentShape(channels=16, compression=8, patch=2, frame_compression=4)
    defaults = SamplerDefaults(
        steps=50, guidance=6.0, size=(720, 1280), negative_prompt=False, frames=129, fps=24.0
    )
    prompt_limit = LLAMA_TOKENS

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        channels = {None: 16, "token_replace": 16, "latent_concat": 33}
        condition = config.get("image_condition_type")
        goes_on = index.get("_class_name") == "HunyuanVideoImageToVideoPipeline"
        return goes_on == (condition is not None) and config.get("in_channels", 16) == channels.get(condition)

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        patch = denoiser["x_embedder.proj.weight"].shape
        return len(patch) == 5 and patch[1] == 16

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        refiners = config["num_refiner_layers"]
        return {**super().with_depth(config, depth), "num_refiner_layers": refiners}

    def configure(self) -> None:
        config = self.configs["transformer"]
        self.condition: str | None = config.get("image_condition_type")
        guided = bool(config.get("guidance_embeds", True))
        self.capabilities = replace(self.capabilities, guidance_embedding=guided)
        if not guided:
            self.defaults = replace(self.defaults, guidance=1.0)
        if self.condition is not None:
            self.capabilities = replace(
                self.capabilities, references=1, prompts_see_references=True, first_frame=True
            )
            self.defaults = replace(self.defaults, begin=hunyuan_first_frame.begin)
            self.export = replace(
                self.export, tensors=None
            )  # single files of these are not read (`accepts_file`)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        config = self.denoiser.config
        return Conditioning(
            {
                "tokens_BSD": torch.randn(batch, LLAMA_TOKENS, config.text_embed_dim, generator=generator),
                "mask_BS": torch.ones(batch, LLAMA_TOKENS, dtype=torch.bool),
                "pooled_BD": torch.randn(batch, config.pooled_projection_dim, generator=generator),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        """Of the caption and what closes it, as Llama reads them; the picture has no part in the limit."""
        template, before = TEMPLATE, INSTRUCTION_TOKENS
        if self.condition is not None:
            template, before = hunyuan_first_frame.TEMPLATE, hunyuan_first_frame.INSTRUCTION_TOKENS
        return clip.count_tokens(self.tokenizer("text_encoder"), template.format(prompt)) - before

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        tokenizer = self.tokenizer("text_encoder")
        if tokenizer.pad_token is None:  # Meta's own; what stands behind a caption is masked
            tokenizer.pad_token = tokenizer.eos_token
        states = self._seen(prompts, references) if self.condition else self._read(prompts)
        tokens_BSD, mask_BS = trimmed(*states)
        clip_l = self.module("text_encoder_2")
        ids = clip.token_ids(self.tokenizer("text_encoder_2"), prompts).to(clip_l.device)
        return Conditioning(
            {"tokens_BSD": tokens_BSD, "mask_BS": mask_BS, "pooled_BD": clip_l(ids).pooler_output}
        )

    def _read(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Llama's states of captions, (B, 256, 4096), and the mask of what is no padding."""
        encoder = self.module("text_encoder")
        tokenizer = self.tokenizer("text_encoder")
        encoded = tokenizer(
            [TEMPLATE.format(written_out(tokenizer, prompt)) for prompt in prompts],
            padding="max_length",
            max_length=INSTRUCTION_TOKENS + LLAMA_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        states_BSD = encoder(
            encoded.input_ids, attention_mask=encoded.attention_mask, output_hidden_states=True
        ).hidden_states[READ_STATE]
        return states_BSD[:, INSTRUCTION_TOKENS:], encoded.attention_mask[:, INSTRUCTION_TOKENS:]

    def _seen(self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """The same of captions beside a picture, as LLaVA sees them; the picture's patches come first."""
        shown = references or [()] * len(prompts)
        assert self.condition is not None
        return hunyuan_first_frame.prompt_states(
            self.module("text_encoder"),
            self.tokenizer("text_encoder"),
            prompts,
            [hunyuan_first_frame.picture_for(one, seen) for one, seen in zip(prompts, shown, strict=True)],
            length=LLAMA_TOKENS,
            layer=READ_STATE,
            every=hunyuan_first_frame.EVERY[self.condition],
        )

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        if self.condition is None or not references:
            return Conditioning({})
        (first_B3HW,) = references
        return Conditioning({FIRST_FRAME: self.encode_pixels(first_B3HW[:, :, None])})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        # A picture by itself is learned as one, not as the first frame that it would be told.
        first_BC1HW = conditioning.get(FIRST_FRAME) if noisy.shape[2] > 1 else None
        put_in_BC1HW = first_BC1HW if self.condition == "token_replace" else None
        given = noisy if put_in_BC1HW is None else first_frame.put_in(put_in_BC1HW, noisy)
        if self.condition == "latent_concat":
            given = torch.cat([noisy, hunyuan_first_frame.known_channels(first_BC1HW, noisy)], dim=1)
        if self.condition is not None:
            self.denoiser.time_text_embed.first_is_clean = put_in_BC1HW is not None
        guidance_B = conditioning.get("guidance_B")
        predicted: Tensor = self.denoiser(
            hidden_states=given.to(self.dtype),
            timestep=t_B * 1000,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            encoder_attention_mask=conditioning["mask_BS"],
            pooled_projections=conditioning["pooled_BD"].to(self.dtype),
            guidance=None if guidance_B is None else guidance_B * 1000,
            return_dict=False,
        )[0]
        if put_in_BC1HW is None:
            return predicted
        return first_frame.leading_to(put_in_BC1HW, predicted, noisy, t_B)

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.transformer_blocks, *self.denoiser.single_transformer_blocks]
