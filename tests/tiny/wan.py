"""Wan 2.1: text to video and stills, image to video with CLIP's view of the first frame. Wan 2.2: two denoisers by
time, and the one of 5B over latents of 48 channels. VACE: a second row of blocks that reads a control."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from numpy.random import default_rng
from PIL import Image
from tiny_pipelines import drawn, t5_tokenizer
from tiny_umt5 import umt5
from tiny_video_vae import wan22_vae, wan_vae
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from burnish.conditioning import Conditioning
from burnish.data.prepare import pixels_of
from burnish.families.wan_names import NAMES, VACE_NAMES
from burnish.family import Family
from tiny import Case

SIZE = (64, 96)


def transformer(**changed: Any) -> WanTransformer3DModel:
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 32,
        "ffn_dim": 96,
        "num_layers": 3,
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**{**settings, **changed})


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def rest(seed: int) -> dict[str, Any]:
    """What every pipeline of Wan 2.1's has besides the denoiser."""
    tokenizer = t5_tokenizer()
    return {
        "vae": drawn(seed + 1, wan_vae),
        "text_encoder": drawn(seed + 2, lambda: umt5(tokenizer)),
        "tokenizer": tokenizer,
        "scheduler": scheduler(),
    }


def _text_to_video(seed: int) -> WanPipeline:
    return WanPipeline(transformer=drawn(seed, transformer), transformer_2=None, **rest(seed))


def clip_vision() -> CLIPVisionModel:
    """As ViT-H: 257 tokens of 224 x 224 pixels."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=224,
            patch_size=14,
            hidden_act="gelu",
        )
    )


def _image_to_video(seed: int, **changed: Any) -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(
        transformer=drawn(
            seed,
            lambda: transformer(
                in_channels=36, out_channels=16, image_dim=16, added_kv_proj_dim=24, **changed
            ),
        ),
        transformer_2=None,
        image_encoder=drawn(seed + 3, clip_vision),
        image_processor=CLIPImageProcessorPil(),
        **rest(seed),
    )


def first_frame(seed: int = 3) -> Image.Image:
    blobs = Image.fromarray(default_rng(seed).integers(0, 256, (4, 4, 3), dtype="uint8"))
    return blobs.resize(SIZE[::-1], Image.Resampling.BICUBIC)


def told(family: Family, frames: int) -> Conditioning:
    return family.encode_references([pixels_of(first_frame())[None]], frames=frames)


def last_frame() -> Image.Image:
    return first_frame(5)


def _told_both(family: Family) -> Conditioning:
    shown = [pixels_of(picture)[None] for picture in (first_frame(), last_frame())]
    return family.encode_references(shown, frames=9)


def _two_experts(seed: int) -> WanPipeline:
    return WanPipeline(
        transformer=drawn(seed, transformer),
        transformer_2=drawn(seed + 4, transformer),
        boundary_ratio=0.875,
        **rest(seed),
    )


def _two_experts_image(seed: int) -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(
        transformer=drawn(seed, lambda: transformer(in_channels=36, out_channels=16)),
        transformer_2=drawn(seed + 4, lambda: transformer(in_channels=36, out_channels=16)),
        boundary_ratio=0.9,
        image_encoder=None,
        image_processor=None,
        **rest(seed),
    )


def _wide(seed: int) -> WanPipeline:
    return WanPipeline(
        transformer=drawn(seed, lambda: transformer(in_channels=48, out_channels=48)),
        transformer_2=None,
        expand_timesteps=True,
        **{**rest(seed), "vae": drawn(seed + 1, wan22_vae)},
    )


def wide_image(seed: int) -> WanImageToVideoPipeline:
    """5B as the pipeline that goes on from a first frame."""
    return WanImageToVideoPipeline(
        transformer=drawn(seed, lambda: transformer(in_channels=48, out_channels=48)),
        transformer_2=None,
        image_encoder=None,
        image_processor=None,
        expand_timesteps=True,
        **{**rest(seed), "vae": drawn(seed + 1, wan22_vae)},
    )


class OneByOne(WanVACEPipeline):
    """The pipeline takes one prompt at a time; this calls it for each of several."""

    def __call__(  # type: ignore[override]
        self, prompt: list[str], negative_prompt: list[str], generator: list[torch.Generator], **options: Any
    ) -> WanPipelineOutput:
        drawn = [
            super(OneByOne, self).__call__(one, negative, generator=seeded, **options).frames
            for one, negative, seeded in zip(prompt, negative_prompt, generator, strict=True)
        ]
        return WanPipelineOutput(frames=torch.cat(drawn))


def _vace(seed: int) -> WanVACEPipeline:
    return WanVACEPipeline(
        transformer=drawn(
            seed,
            lambda: WanVACETransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                text_dim=32,
                ffn_dim=96,
                num_layers=3,
                rope_max_seq_len=64,
                vace_layers=[0, 2],
                vace_in_channels=96,
            ),
        ),
        transformer_2=None,
        **rest(seed),
    )


def _grey(family: Family, frames: int) -> Conditioning:
    """What the pipeline takes where no clip is given."""
    return family.encode_references([torch.zeros(1, 3, *SIZE)], frames=frames)


def control_clip() -> list[Image.Image]:
    blobs = default_rng(4).integers(0, 256, (5, 4, 4, 3), dtype="uint8")
    return [Image.fromarray(one).resize(SIZE[::-1], Image.Resampling.BICUBIC) for one in blobs]


def hole() -> Image.Image:
    """White where it is to be drawn, with edges that cut through latents."""
    picture = Image.new("RGB", SIZE[::-1])
    picture.paste((255, 255, 255), (0, 0, SIZE[1] // 2 + 3, SIZE[0] - 6))
    return picture


def _controlled(family: Family) -> Conditioning:
    clip = torch.stack([pixels_of(picture) for picture in control_clip()], dim=1)
    mask = (pixels_of(hole())[:1] + 1) / 2
    return family.encode_references([clip[None]], mask_B1HW=mask[None], frames=5)


_FILE: dict[str, Any] = {"native": NAMES, "upstream": "convert_wan_transformer_to_diffusers"}
CASES = {
    "wan21": Case("wan21", _text_to_video, frames=5, **_FILE),
    "wan21_still": Case("wan21", _text_to_video, call={"num_frames": 1}, learns=False),
    "wan21_i2v": Case(
        "wan21",
        _image_to_video,
        call={"image": first_frame()},
        told=partial(told, frames=5),
        frames=5,
        pipeline=WanImageToVideoPipeline,
        **_FILE,
    ),
    "wan21_flf2v": Case(
        "wan21",
        partial(_image_to_video, pos_embed_seq_len=514),
        call={"image": first_frame(), "last_image": last_frame()},
        told=_told_both,
        frames=9,
        pipeline=WanImageToVideoPipeline,
        native=NAMES,  # diffusers' reader of single files knows no `img_emb.emb_pos`
    ),
    "wan21_i2v_still": Case(
        "wan21",
        _image_to_video,
        call={"image": first_frame(), "num_frames": 1},
        told=partial(told, frames=1),
        pipeline=WanImageToVideoPipeline,
        learns=False,
    ),
    "wan22": Case("wan22", _two_experts, frames=5, learns=False),
    "wan22_i2v": Case(
        "wan22",
        _two_experts_image,
        call={"image": first_frame()},
        told=partial(told, frames=5),
        frames=5,
        pipeline=WanImageToVideoPipeline,
        learns=False,
    ),
    "wan22_5b": Case("wan22", _wide, frames=5, **_FILE),
    "wan22_5b_still": Case("wan22", _wide, call={"num_frames": 1}, learns=False),
    "wan_vace": Case(
        "wan_vace",
        _vace,
        told=partial(_grey, frames=5),
        frames=5,
        pipeline=OneByOne,
        native=VACE_NAMES,
        upstream="convert_wan_transformer_to_diffusers",
    ),
    "wan_vace_still": Case(
        "wan_vace",
        _vace,
        call={"num_frames": 1},
        told=partial(_grey, frames=1),
        pipeline=OneByOne,
        learns=False,
    ),
    "wan_vace_control": Case(
        "wan_vace",
        _vace,
        call={"video": control_clip(), "mask": [hole()] * 5},
        told=_controlled,
        frames=5,
        pipeline=OneByOne,
        learns=False,
    ),
}
