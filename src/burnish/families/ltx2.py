"""LTX-2 and 2.3 by Lightricks (2026), 19 billion parameters and more: clips, with their sound or without, and pictures.

The transformer has two streams, video and audio, that look at each other in every block. Without sound the video stream
runs by itself, as the release's trainer does: the layers between the streams are left out and audio is a single
token that nothing reads. Latents are those of LTX-Video's kind (32 x 32 pixels and 8 frames into one of 128 channels);
of sound 25 per second.
Every layer's states of Gemma 3 go through connectors, which put learned registers where there is padding: the
denoiser sees all 1024 places of a caption.

Shape letters: B batch, C channels, T frames, H W height and width of latents, N = T * H * W, S tokens, D width;
of sound L moments and F bands of frequency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import video_vae
from burnish.families.gemma3 import gemma3_slot
from burnish.families.ltx2_audio import AUDIO_SLOTS, LTX2Audio
from burnish.families.ltx2_names import find_connectors, find_vae
from burnish.families.native import NativeNames
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config, Slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import Capabilities, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

GEMMA_TOKENS = 1024

_ATTENTION = ("*.attn[12].to_[qkv]", "*.attn[12].to_out.0")
_FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")
# With sound: its own stream, and the layers between the two.
_AUDIO_ATTENTION = (
    "*.audio_attn[12].to_[qkv]",
    "*.audio_attn[12].to_out.0",
    "*.audio_to_video_attn.to_[qkv]",
    "*.audio_to_video_attn.to_out.0",
    "*.video_to_audio_attn.to_[qkv]",
    "*.video_to_audio_attn.to_out.0",
)
_AUDIO_FEED_FORWARD = ("*.audio_ff.net.0.proj", "*.audio_ff.net.2")
_BLOCK = "transformer_blocks.#"
_ATTENTIONS = tuple(f"{who}attn{n}" for who in ("", "audio_") for n in (1, 2))
_EMBEDDINGS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
NAMES = NativeNames(
    table={
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        **{f"{theirs}.linear": f"{ours}.linear" for theirs, ours in _EMBEDDINGS.items()},
        **{
            f"{theirs}.emb.timestep_embedder.linear_{n}": f"{ours}.emb.timestep_embedder.linear_{n}"
            for theirs, ours in _EMBEDDINGS.items()
            for n in (1, 2)
        },
        **{
            f"{_BLOCK}.{attention}.{x}_norm": f"{_BLOCK}.{attention}.norm_{x}"
            for attention in (*_ATTENTIONS, "audio_to_video_attn", "video_to_audio_attn")
            for x in "qk"
        },
        **{
            f"{_BLOCK}.scale_shift_table_a2v_ca_{of}": f"{_BLOCK}.{of}_a2v_cross_attn_scale_shift_table"
            for of in ("video", "audio")
        },
    },
    signs=("patchify_proj.weight", "audio_patchify_proj.weight", "transformer_blocks.0.attn1.q_norm.weight"),
)


def _find_transformer(layout: Layout) -> Layout | None:
    if {"proj_in.weight", "audio_proj_in.weight", "transformer_blocks.0.attn1.norm_q.weight"} <= set(layout):
        return layout
    found = NAMES.denoiser(layout)
    # Files of the release hold the connectors beside the transformer.
    return None if found is None else {k: v for k, v in found.items() if "embeddings_connector" not in k}


def _transformer_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    if "caption_projection.linear_1.weight" not in layout:
        raise ValueError("LTX-2's projection of captions; 2.3 is read from its diffusers folder")
    return dict(shipped)


class LTX2(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 1024, 3840), what the connectors make of a caption for the video stream, and with
    sound `tokens_audio_BSD`, for the audio stream."""

    name: ClassVar[str] = "ltx2"
    title: ClassVar[str] = "LTX-2"
    pipelines = ("LTX2Pipeline",)
    slots = (
        Slot(
            "transformer",
            "denoiser",
            LTX2VideoTransformer3DModel.from_config,
            _find_transformer,
            _transformer_config,
        ),
        Slot(
            "vae",
            "vae",
            AutoencoderKLLTX2Video.from_config,
            find_vae,
            unused=("per_channel_statistics.*",),
            file_hint="LTX2_video_vae_bf16.safetensors",
        ),
        gemma3_slot("text_encoder", "tokenizer"),
        Slot("connectors", "text_encoders", LTX2TextConnectors.from_config, find_connectors),
        *AUDIO_SLOTS,
    )
    capabilities = Capabilities(video=True, audio=True)
    targets: ClassVar = {
        "attention": TargetSet(
            _ATTENTION,
            "Query, key, value and output of the attentions, of the audio stream too where sound is trained.",
            _AUDIO_ATTENTION,
        ),
        "attention+mlp": TargetSet(
            (*_ATTENTION, *_FEED_FORWARD),
            "Attention and feed-forward layers, of the audio stream too where sound is trained.",
            (*_AUDIO_ATTENTION, *_AUDIO_FEED_FORWARD),
        ),
        "all": TargetSet(
            (*_ATTENTION, *_FEED_FORWARD, "caption_projection.linear_[12]", "proj_in", "proj_out"),
            "Every linear layer but the embeddings of time, of the audio stream too where sound is trained.",
            (
                *_AUDIO_ATTENTION,
                *_AUDIO_FEED_FORWARD,
                "audio_caption_projection.linear_[12]",
                "audio_proj_in",
                "audio_proj_out",
            ),
        ),
    }
    # diffusers does not know ComfyUI's name for the embedding of time.
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec="ltx-2",
        base_model_version="ltx2",
        prefix={"comfy": "diffusion_model.", "diffusers": "transformer."},
        native=NAMES.native_module,
        tensors=NAMES.tensors,
        words={"text_encoder": "gemma3_12b"},
        unreadable={"comfy": ("time_embed.*", "audio_time_embed.*")},
    )
    latents = LatentShape(channels=128, compression=32, frame_compression=8)
    defaults = SamplerDefaults(
        steps=40, guidance=4.0, size=(512, 768), negative_prompt=True, frames=121, fps=24.0
    )
    prompt_limit = GEMMA_TOKENS

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        """Later releases read captions with another Gemma."""
        return str((*index.get("text_encoder", ()), "", "")[1]).startswith("Gemma3")

    def configure(self) -> None:
        if self.asked.audio:
            self.audio = LTX2Audio(self.configs, self.module, self.streams)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        names = ("tokens_BSD", "tokens_audio_BSD")[: 1 if self.audio is None else 2]
        return Conditioning(
            {
                name: torch.randn(batch, GEMMA_TOKENS, width, generator=generator)
                for name, width in zip(names, self._caption_widths(), strict=False)
            }
        )

    def _caption_widths(self) -> tuple[int, int]:
        """Of captions for the video and the audio stream; since 2.3 the connectors give what each stream attends to."""
        config = self.denoiser.config
        if config.use_prompt_embeddings:
            return config.caption_channels, config.caption_channels
        return config.cross_attention_dim, config.audio_cross_attention_dim

    def count_tokens(self, prompt: str) -> int:
        tokenizer = self.tokenizer("text_encoder")
        return len(tokenizer(written_out(tokenizer, prompt.strip())).input_ids)

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """Padding stands on the left, as in the release."""
        encoder, connectors = self.module("text_encoder"), self.module("connectors")
        tokenizer = self.tokenizer("text_encoder")
        encoded = tokenizer(
            [written_out(tokenizer, prompt.strip()) for prompt in prompts],
            padding="max_length",
            padding_side="left",
            max_length=GEMMA_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        states = encoder(
            encoded.input_ids, attention_mask=encoded.attention_mask, output_hidden_states=True
        ).hidden_states
        tokens_BSD, tokens_audio_BSD, _ = connectors(
            torch.stack(states, dim=-1).flatten(2), encoded.attention_mask, padding_side="left"
        )
        told = Conditioning({"tokens_BSD": tokens_BSD})
        return told if self.audio is None else told.merged({"tokens_audio_BSD": tokens_audio_BSD})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The audio stream gets one silent token and one of text, and the video stream does not look at it."""
        tokens_BSD = conditioning["tokens_BSD"]
        _, audio_width = self._caption_widths()
        silent_B1C = tokens_BSD.new_zeros(len(noisy), 1, self.denoiser.config.audio_in_channels)
        unread_B1D = tokens_BSD.new_zeros(len(noisy), 1, audio_width)
        velocity, _ = self.streams(noisy, silent_B1C, t_B, tokens_BSD, unread_B1D, apart=True)
        return velocity

    def streams(
        self,
        noisy: Tensor,
        audio_BLC: Tensor,
        t_B: Tensor,
        tokens_BSD: Tensor,
        tokens_audio_BSD: Tensor,
        apart: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Velocities of the latents and of the tokens of sound, shaped as both; `apart`, neither sees the other."""
        _, _, frames, height, width = noisy.shape
        time_B = t_B * 1000
        velocity_BND, audio_velocity_BLC = self.denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(self.dtype),
            audio_hidden_states=audio_BLC.to(self.dtype),
            encoder_hidden_states=tokens_BSD.to(self.dtype),
            audio_encoder_hidden_states=tokens_audio_BSD.to(self.dtype),
            timestep=time_B,
            sigma=time_B,
            num_frames=frames,
            height=height,
            width=width,
            fps=self.defaults.fps,
            audio_num_frames=audio_BLC.shape[1],
            isolate_modalities=apart,
            return_dict=False,
        )
        velocity: Tensor = velocity_BND.transpose(1, 2).unflatten(2, (frames, height, width))
        return velocity, audio_velocity_BLC

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
