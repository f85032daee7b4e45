"""HunyuanVideo: two-stream, one-stream and refiner blocks, Llama with the released template and CLIP; and both ways of
going on from a first frame, with LLaVA."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.hunyuan_video.pipeline_output import HunyuanVideoPipelineOutput
from tiny_llama import SPECIAL, llama, llama_tokenizer, llava
from tiny_pipelines import clip_l, clip_tokenizer, drawn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from burnish.families.hunyuan_names import NAMES
from tiny import Case

WIDTH = 32


def _transformer(**changed: Any) -> HunyuanVideoTransformer3DModel:
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": WIDTH // 2,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_refiner_layers": 2,
        "text_embed_dim": 64,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (4, 6, 6),
    }
    return HunyuanVideoTransformer3DModel(**{**settings, **changed})


def _rest(seed: int) -> dict[str, Any]:
    tokenizer_2 = clip_tokenizer()
    return {
        "vae": drawn(
            seed + 1,
            lambda: AutoencoderKLHunyuanVideo(
                block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=2
            ),
        ),
        "text_encoder_2": drawn(seed + 3, lambda: clip_l(tokenizer_2)),
        "tokenizer_2": tokenizer_2,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def _hunyuan_video(seed: int) -> HunyuanVideoPipeline:
    # Knows so much of the template that a little more than the released 95 tokens stand before the caption.
    instruction = str(DEFAULT_PROMPT_TEMPLATE["template"]).split("4.")[0]
    tokenizer = llama_tokenizer(words=(instruction,))
    return HunyuanVideoPipeline(
        transformer=drawn(seed, _transformer),
        text_encoder=drawn(seed + 2, lambda: llama(tokenizer)),
        tokenizer=tokenizer,
        **_rest(seed),
    )


class WholeClips(HunyuanVideoImageToVideoPipeline):
    """Gives the frames, too, that diffusers leaves out of what it drew with the first frame beside the noise."""

    def __call__(self, *arguments: Any, output_type: str = "pil", **named: Any) -> HunyuanVideoPipelineOutput:
        kept: list[torch.Tensor] = []

        def keep(pipeline: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
            kept[:] = [state["latents"]]
            return state

        super().__call__(*arguments, output_type="latent", callback_on_step_end=keep, **named)
        if output_type == "latent":
            return HunyuanVideoPipelineOutput(frames=kept[0])
        decoded = self.vae.decode(kept[0] / self.vae_scaling_factor, return_dict=False)[0]
        frames = self.video_processor.postprocess_video(decoded, output_type=output_type)
        return HunyuanVideoPipelineOutput(frames=frames)


def _image_to_video(seed: int, **changed: Any) -> HunyuanVideoImageToVideoPipeline:
    # Of the template so much is known that a little more than the released 103 tokens stand before the caption.
    template = str(pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE["template"])
    tokenizer = llama_tokenizer(
        words=(template.split("4.")[0].split("<image>")[1],),
        marks=(*SPECIAL, "<image>", "system", "assistant", "\n\n"),
    )
    return HunyuanVideoImageToVideoPipeline(
        transformer=drawn(seed, lambda: _transformer(**changed)),
        text_encoder=drawn(seed + 2, lambda: llava(tokenizer)),
        tokenizer=tokenizer,
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        **_rest(seed),
    )


_FIRST_FRAME: dict[str, Any] = {
    "size": (32, 48),
    "frames": 9,
    "negatives": False,
    "compared_in": "test_hunyuan_video_first_frame.py",
    "learns": False,
    "pipeline": WholeClips,
    "loader_widths": {"_convert_hunyuan_video_lora_to_diffusers": {3072: WIDTH}},
}

CASES = {
    "hunyuan_video": Case(
        "hunyuan_video",
        _hunyuan_video,
        size=(32, 48),
        frames=9,
        guidance=(1.0, 6.0),
        negatives=False,
        native=NAMES,
        upstream="convert_hunyuan_video_transformer_to_diffusers",
        upstream_widths={3072: WIDTH},
        loader_widths={"_convert_hunyuan_video_lora_to_diffusers": {3072: WIDTH}},
    ),
    "hunyuan_video_still": Case(
        "hunyuan_video",
        _hunyuan_video,
        size=(48, 32),
        call={"num_frames": 1},
        guidance=(6.0,),
        negatives=False,
        loader_widths={"_convert_hunyuan_video_lora_to_diffusers": {3072: WIDTH}},
        learns=False,
    ),
    "hunyuan_video_i2v": Case(
        "hunyuan_video",
        partial(_image_to_video, image_condition_type="token_replace"),
        guidance=(6.0,),
        **_FIRST_FRAME,
    ),
    "hunyuan_video_i2v_concat": Case(
        "hunyuan_video",
        partial(
            _image_to_video,
            image_condition_type="latent_concat",
            in_channels=33,
            out_channels=16,
            guidance_embeds=False,
        ),
        guidance=(1.0, 4.0),
        guidance_argument="true_cfg_scale",
        **_FIRST_FRAME,
    ),
}
