"""HunyuanVideo 1.5 by Tencent (arXiv 2511.18870), 8.3 billion parameters: clips from text or a first frame; pictures.

A transformer of two-stream blocks over 32-channel latents (the VAE takes 16 x 16 pixels and 4 frames into one), beside
which stand the latents of a first frame and a mask of where it is; without one both are zero. The image-to-video
releases also attend to what SigLIP sees in that frame. It reads Qwen2.5-VL's
third last hidden state of the caption in a chat, whose instruction is dropped, and what a ByT5 makes of the words in
quotation marks, letter by letter. Of both, padding is masked.

Shape letters: B batch, C channels, T frames, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import hunyuan_video15_parts, siglip, video_vae
from burnish.families.hunyuan_first_frame import FIRST_FRAME, known_channels
from burnish.families.masked import trimmed
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config
from burnish.families.text_slots import t5_slot
from burnish.families.token_words import written_out
from burnish.family import Capabilities, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

QWEN_TOKENS = 1000
GLYPH_TOKENS = 256
LAYERS_SKIPPED = 2
# As released with its runs of blanks (diffusers: HunyuanVideo15Pipeline); so many tokens stand before the caption.
INSTRUCTION = (
    "You are a helpful assistant. Describe the video by detailing the following aspects:         "
    "1. The main content and theme of the video.         "
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.         "
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.         "
    "4. background environment, light, style and atmosphere.         "
    "5. camera angles, movements, and transitions used in the video."
)
INSTRUCTION_TOKENS = 108
IMAGE_TO_VIDEO = "HunyuanVideo15ImageToVideoPipeline"
SEEN = "seen_BSD"  # the first frame, by SigLIP
_QUOTED = re.compile(r"\"(.*?)\"|“(.*?)”")

_BLOCKS = "transformer_blocks"
_ATTENTION = (
    f"{_BLOCKS}.*.attn.to_[qkv]",
    f"{_BLOCKS}.*.attn.to_out.0",
    f"{_BLOCKS}.*.attn.add_[qkv]_proj",
    f"{_BLOCKS}.*.attn.to_add_out",
)
_FEED_FORWARD = (
    f"{_BLOCKS}.*.ff.net.0.proj",
    f"{_BLOCKS}.*.ff.net.2",
    f"{_BLOCKS}.*.ff_context.net.0.proj",
    f"{_BLOCKS}.*.ff_context.net.2",
)


def conversation(prompt: str) -> list[dict[str, str]]:
    """A caption in the conversation that Qwen reads; what is empty is a blank."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt or " "}]


def quoted(prompt: str) -> str | None:
    """What the glyph encoder reads of a caption: the words in quotation marks, each once; None if there are none."""
    found = [straight or curly for straight, curly in _QUOTED.findall(prompt)]
    return "".join(f'Text "{text}". ' for text in dict.fromkeys(found)) or None


class HunyuanVideo15(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, up to 1000, 3584) with `mask_BS`, and of quoted words `tokens_glyph_BSD` (B, up to
    256, 1472) with `mask_glyph_BS`."""

    name: ClassVar[str] = "hunyuan_video15"
    title: ClassVar[str] = "HunyuanVideo 1.5"
    pipelines = ("HunyuanVideo15Pipeline", IMAGE_TO_VIDEO)
    slots = (
        hunyuan_video15_parts.transformer_slot(),
        hunyuan_video15_parts.vae_slot(),
        hunyuan_video15_parts.text_slot(),
        t5_slot("text_encoder_2", "tokenizer_2"),
        siglip.vision_slot(),
    )
    capabilities = Capabilities(video=True)
    variants: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "HunyuanVideo 1.5, image to video": {"model_index": {"_class_name": IMAGE_TO_VIDEO}},
    }
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            (f"{_BLOCKS}.*", "proj_out"),
            "Every layer of the blocks, modulations included, and the last layer.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers",),
        modelspec="hunyuan-video-1.5",
        base_model_version="hunyuan_video_1_5",
        prefix={"diffusers": "transformer."},
        comfyui=False,
        readers={"diffusers": ("transformer.load_lora_adapter of diffusers",)},
        words={"text_encoder": "qwen25_7b"},
    )
    latents = LatentShape(channels=32, compression=16, frame_compression=4)
    defaults = SamplerDefaults(
        steps=50, guidance=6.0, size=(480, 848), negative_prompt=True, frames=121, fps=24.0
    )
    prompt_limit = QWEN_TOKENS

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        """Not the distilled releases of few steps, which are told a second time."""
        return not config.get("use_meanflow")

    def configure(self) -> None:
        self.goes_on = self.configs["model_index"].get("_class_name") == IMAGE_TO_VIDEO
        if self.goes_on:
            self.capabilities = Capabilities(references=1, first_frame=True, video=True)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        config = self.denoiser.config
        lengths = {
            "": (QWEN_TOKENS, config.text_embed_dim),
            "glyph_": (GLYPH_TOKENS, config.text_embed_2_dim),
        }
        tokens = {
            f"tokens_{kind}BSD": torch.randn(batch, *size, generator=generator)
            for kind, size in lengths.items()
        }
        masks = {
            f"mask_{kind}BS": torch.ones(batch, size[0], dtype=torch.bool) for kind, size in lengths.items()
        }
        return Conditioning({**tokens, **masks})

    def count_tokens(self, prompt: str) -> int:
        """Of the caption and what closes it, as Qwen reads them."""
        tokenizer = self.tokenizer("text_encoder")
        chat = tokenizer.apply_chat_template(
            conversation(written_out(tokenizer, prompt)),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        return len(chat["input_ids"]) - INSTRUCTION_TOKENS

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        encoded = tokenizer.apply_chat_template(
            [conversation(written_out(tokenizer, prompt)) for prompt in prompts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            padding="max_length",
            max_length=INSTRUCTION_TOKENS + QWEN_TOKENS,
            truncation=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": "right"},
        )
        ids, mask_BS = (encoded[key].to(encoder.device) for key in ("input_ids", "attention_mask"))
        states_BSD = encoder(ids, attention_mask=mask_BS, output_hidden_states=True).hidden_states
        tokens_BSD, mask_BS = trimmed(
            states_BSD[-(LAYERS_SKIPPED + 1)][:, INSTRUCTION_TOKENS:], mask_BS[:, INSTRUCTION_TOKENS:]
        )
        glyphs = Conditioning.collate([self._glyphs(quoted(prompt)) for prompt in prompts])
        return Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS, **glyphs})

    def _glyphs(self, text: str | None) -> Conditioning:
        """Of one caption; without words in quotation marks one place that is masked."""
        encoder = self.module("text_encoder_2")
        if text is None:
            tokens_1SD = torch.zeros(1, 1, encoder.config.d_model, device=encoder.device, dtype=encoder.dtype)
            mask_1S = torch.zeros(1, 1, dtype=torch.bool, device=encoder.device)
        else:
            encoded = self.tokenizer("text_encoder_2")(
                text, max_length=GLYPH_TOKENS, truncation=True, return_tensors="pt"
            ).to(encoder.device)
            mask_1S = encoded.attention_mask.bool()
            tokens_1SD = encoder(encoded.input_ids, attention_mask=mask_1S.float()).last_hidden_state
        return Conditioning({"tokens_glyph_BSD": tokens_1SD, "mask_glyph_BS": mask_1S})

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        if not self.goes_on or not references:
            return Conditioning({})
        (first_B3HW,) = references
        return Conditioning(
            {
                FIRST_FRAME: self.encode_pixels(first_B3HW[:, :, None]),
                SEEN: siglip.last_states(self.module("image_encoder"), first_B3HW),
            }
        )

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Without a first frame its latents and mask are zero, and of its picture there is not one token.

        A picture by itself is learned as one, not as the first frame that it would be told.
        """
        told = conditioning if noisy.shape[2] > 1 else {}
        known = known_channels(told.get(FIRST_FRAME), noisy)
        seen_BSD = told.get(SEEN)
        if seen_BSD is None:
            width = self.denoiser.config.image_embed_dim
            seen_BSD = torch.zeros(len(noisy), 0, width, dtype=noisy.dtype, device=noisy.device)
        predicted: Tensor = self.denoiser(
            hidden_states=torch.cat([noisy, known], dim=1).to(self.dtype),
            timestep=t_B * 1000,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            encoder_attention_mask=conditioning["mask_BS"],
            encoder_hidden_states_2=conditioning["tokens_glyph_BSD"].to(self.dtype),
            encoder_attention_mask_2=conditioning["mask_glyph_BS"],
            image_embeds=seen_BSD.to(self.dtype),
            return_dict=False,
        )[0]
        return predicted

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
