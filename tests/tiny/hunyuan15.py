"""HunyuanVideo 1.5: two-stream blocks, Qwen2.5-VL's language model in a chat, ByT5 for words in quotation marks."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tiny_pipelines import drawn
from tiny_qwen import qwen25_vl, qwen_tokenizer
from transformers import ByT5Tokenizer, Qwen2Tokenizer, T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from tiny import Case

LAYERS = 3


class Guided(HunyuanVideo15Pipeline):
    """Takes the guidance scale with the call instead of with its guider, and decodes clips one at a time.

    The VAE's attention has a mask of one clip in diffusers 0.42, which does not fit several.
    """

    def __call__(self, *arguments: Any, guidance_scale: float, **named: Any) -> Any:
        self.vae.use_slicing = True
        self.tokenizer_max_length, self.vision_num_semantic_tokens = (
            300,
            3,
        )  # less padding, which nothing reads
        self.guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
        return super().__call__(*arguments, **named)


def _qwen(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLTextModel:
    return Qwen2_5_VLTextModel(qwen25_vl(tokenizer, layers=4).config.text_config)


def _byt5(tokenizer: ByT5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=24,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
        )
    )


def _hunyuan_video15(seed: int) -> HunyuanVideo15Pipeline:
    tokenizer, tokenizer_2 = qwen_tokenizer(), ByT5Tokenizer()
    return HunyuanVideo15Pipeline(
        transformer=drawn(
            seed,
            lambda: HunyuanVideo15Transformer3DModel(
                num_attention_heads=2,
                attention_head_dim=32,
                num_layers=LAYERS,
                num_refiner_layers=2,
                text_embed_dim=256,
                text_embed_2_dim=24,
                image_embed_dim=8,
                rope_axes_dim=(8, 12, 12),
                task_type="t2v",
            ),
        ),
        vae=drawn(
            seed + 1,
            lambda: AutoencoderKLHunyuanVideo15(block_out_channels=(32, 32, 32, 64, 64), layers_per_block=1),
        ),
        text_encoder=drawn(seed + 2, lambda: _qwen(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=drawn(seed + 3, lambda: _byt5(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


_LAST = f"transformer_blocks.{LAYERS - 1}"
COMMON: dict[str, Any] = {
    "pipeline": Guided,
    "loads_adapters": False,  # the pipeline has no loader; its transformer has one
    "on_meta": False,
    "full_size": ("context_embedder_2.",),
    # Captions leave after the last block; without quoted words their tokens are not read.
    "idle": (
        f"{_LAST}.attn.add_q_proj",
        f"{_LAST}.attn.to_add_out",
        f"{_LAST}.ff_context.*",
    ),
}
CASES = {
    "hunyuan_video15": Case("hunyuan_video15", _hunyuan_video15, size=(64, 96), frames=9, **COMMON),
    "hunyuan_video15_still": Case(
        "hunyuan_video15", _hunyuan_video15, size=(96, 64), call={"num_frames": 1}, learns=False, **COMMON
    ),
}
