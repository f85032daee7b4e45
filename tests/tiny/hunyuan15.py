"""HunyuanVideo 1.5: two-stream blocks, Qwen2.5-VL's language model in a chat, ByT5 for words in quotation marks; image
to video with SigLIP's view of the first frame."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from numpy.random import default_rng
from PIL import Image
from tiny_pipelines import drawn
from tiny_qwen import qwen25_vl, qwen_tokenizer
from transformers import (
    ByT5Tokenizer,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from burnish.conditioning import Conditioning
from burnish.data.prepare import pixels_of
from burnish.family import Family
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


class GuidedOnwards(HunyuanVideo15ImageToVideoPipeline):
    """The same of image to video, which takes its size from the picture."""

    def __call__(self, *arguments: Any, guidance_scale: float, height: int, width: int, **named: Any) -> Any:
        self.vae.use_slicing = True
        self.tokenizer_max_length = 300
        self.guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
        assert named["image"].size == (width, height)
        return super().__call__(*arguments, **named)


def _parts(seed: int, task: str) -> dict[str, Any]:
    tokenizer, tokenizer_2 = qwen_tokenizer(), ByT5Tokenizer()
    return {
        "transformer": drawn(
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
                target_size=64,
                task_type=task,
            ),
        ),
        "vae": drawn(
            seed + 1,
            lambda: AutoencoderKLHunyuanVideo15(block_out_channels=(32, 32, 32, 64, 64), layers_per_block=1),
        ),
        "text_encoder": drawn(seed + 2, lambda: _qwen(tokenizer)),
        "tokenizer": tokenizer,
        "text_encoder_2": drawn(seed + 3, lambda: _byt5(tokenizer_2)),
        "tokenizer_2": tokenizer_2,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def _hunyuan_video15(seed: int) -> HunyuanVideo15Pipeline:
    return HunyuanVideo15Pipeline(**_parts(seed, "t2v"))


def _siglip() -> SiglipVisionModel:
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
    )


def _image_to_video(seed: int) -> HunyuanVideo15ImageToVideoPipeline:
    return HunyuanVideo15ImageToVideoPipeline(
        **_parts(seed, "i2v"),
        image_encoder=drawn(seed + 4, _siglip),
        feature_extractor=SiglipImageProcessorPil(size={"height": 56, "width": 56}),
    )


SIZE = (48, 80)  # one that the pipeline keeps


def first_frame() -> Image.Image:
    blobs = Image.fromarray(default_rng(3).integers(0, 256, (4, 4, 3), dtype="uint8"))
    return blobs.resize(SIZE[::-1], Image.Resampling.BICUBIC)


def _told(family: Family) -> Conditioning:
    return family.encode_references([pixels_of(first_frame())[None]], frames=9)


_LAST = f"transformer_blocks.{LAYERS - 1}"
COMMON: dict[str, Any] = {
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
    "hunyuan_video15": Case(
        "hunyuan_video15", _hunyuan_video15, size=(64, 96), frames=9, pipeline=Guided, **COMMON
    ),
    "hunyuan_video15_still": Case(
        "hunyuan_video15",
        _hunyuan_video15,
        size=(96, 64),
        call={"num_frames": 1},
        learns=False,
        pipeline=Guided,
        **COMMON,
    ),
    "hunyuan_video15_i2v": Case(
        "hunyuan_video15",
        _image_to_video,
        size=SIZE,
        frames=9,
        call={"image": first_frame()},
        told=_told,
        pipeline=GuidedOnwards,
        **COMMON,
    ),
}
