"""Where the parts of a FLUX.1 lie, and the settings that come with them.

A checkpoint is a diffusers folder, or a single file with the denoiser in native or diffusers' names, which may
also hold VAE and text encoders (ComfyUI's all-in-one files) or stand beside separate files of those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from burnish.errors import ModelError
from burnish.families import autoencoder, clip, t5
from burnish.families.fingerprints import fingerprint
from burnish.families.flux_embedding import TimeGuidanceText
from burnish.families.flux_layout import (
    diffusers_names,
    is_diffusers_flux,
    native_prefix,
    refuse_scaled,
    transformer_config,
)
from burnish.families.sources import (
    files_behind,
    locate,
    locate_parts,
    read_header,
    read_json,
    separate_file,
    weight_files,
)
from burnish.families.weights import Layout, below, layout_of, load_module
from burnish.family import ModelSource, Part

ENCODING_VERSION = 1  # raise when encoding gives other numbers for the same weights: caches then start anew
LONGEST_PROMPT = 512  # T5 tokens FLUX.1-dev was released with
LONGEST_PROMPT_DISTILLED = 256  # FLUX.1-schnell, which has no guidance embedding
FOLDERS: Mapping[Part, tuple[str, ...]] = {
    "denoiser": ("transformer",),
    "vae": ("vae",),
    "text_encoders": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
}
_VAE_PREFIXES = ("vae.", "first_stage_model.")
_CLIP_PREFIXES = ("text_encoders.clip_l.", "clip_l.")
_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")


@cache
def shipped_config() -> dict[str, Any]:
    """The released configs of every part; those of the scheduler by `dev` and `schnell`."""
    text = files("burnish.families").joinpath("configs", "flux.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def make_transformer(config: Mapping[str, Any]) -> FluxTransformer2DModel:
    """The denoiser, with a guidance embedding that can be bypassed where it has one."""
    transformer = FluxTransformer2DModel.from_config(dict(config))
    if transformer.config.guidance_embeds:
        transformer.time_text_embed = TimeGuidanceText(transformer.time_text_embed)
    return transformer


@dataclass
class TextEncoders:
    clip_tokenizer: CLIPTokenizer
    clip: CLIPTextModel
    t5_tokenizer: PreTrainedTokenizerBase
    t5: T5EncoderModel


class FluxSource:
    """The weights of one FLUX.1, on disk.

    Raises (any method):
        ModelError: files are missing, damaged or of another kind.
    """

    def __init__(self, source: ModelSource, parts: frozenset[Part] = frozenset()) -> None:
        self.source = source
        self.path = locate_parts(source, [folder for part in sorted(parts) for folder in FOLDERS[part]])

    @staticmethod
    def detect(source: ModelSource) -> bool:
        path = locate(source)
        if path.is_dir():
            index = path / "model_index.json"
            return index.is_file() and read_json(index).get("_class_name") in _PIPELINES
        header = read_header(path)
        return native_prefix(header) is not None or is_diffusers_flux(header)

    @cached_property
    def single_file(self) -> Layout:
        layout = layout_of([self.path])
        refuse_scaled(layout)
        return layout

    @cached_property
    def transformer_config(self) -> dict[str, Any]:
        if self.path.is_dir():
            config = read_json(self.path / "transformer" / "config.json")
        else:
            config = transformer_config(shipped_config()["transformer"], diffusers_names(self.single_file))
        taken, given = (
            config.get("in_channels", 64),
            config.get("out_channels") or config.get("in_channels", 64),
        )
        if taken != given:
            raise ModelError(
                f"This FLUX.1 takes {taken} channels and gives {given}: it fills, edits or follows another "
                "picture, which is not supported.",
                remedy="Use a text-to-image model, such as FLUX.1-dev or FLUX.1-schnell.",
            )
        return config

    @property
    def embeds_guidance(self) -> bool:
        return bool(self.transformer_config.get("guidance_embeds", False))

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        beside = self.path / "scheduler" / "scheduler_config.json"
        if beside.is_file():
            return read_json(beside)
        return dict(shipped_config()["scheduler"]["dev" if self.embeds_guidance else "schnell"])

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        beside = self.path / "vae" / "config.json"
        return read_json(beside) if beside.is_file() else shipped_config()["vae"]

    @cached_property
    def prompt_tokens(self) -> int:
        """T5 tokens that every prompt is cut or filled up to."""
        longest = LONGEST_PROMPT if self.embeds_guidance else LONGEST_PROMPT_DISTILLED
        beside = self.path / "tokenizer_2" / "tokenizer_config.json"
        stated = read_json(beside).get("model_max_length", longest) if beside.is_file() else longest
        return min(int(stated), longest)

    def load_transformer(self, dtype: torch.dtype, device: torch.device | str) -> FluxTransformer2DModel:
        if self.path.is_dir():
            layout = layout_of(weight_files(self.path / "transformer"))
        else:
            layout = diffusers_names(self.single_file)
        return load_module(
            lambda: make_transformer(self.transformer_config),
            layout,
            dtype=dtype,
            device=device,
            what="FLUX.1 denoiser",
        )

    def load_vae(self, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
        if self.source.vae is None and self.path.is_dir():
            return autoencoder.load_from_folder(self.path / "vae", dtype=dtype, device=device)
        whole = self.single_file if self.source.vae is None else layout_of([separate_file(self.source.vae)])
        inside = [below(whole, prefix) for prefix in _VAE_PREFIXES if below(whole, prefix)]
        if self.source.vae is None and not inside:
            raise ModelError(
                f"{self.path} holds no VAE.",
                remedy="Name its file (ae.safetensors) under `model.vae` in the config.",
            )
        layout = inside[0] if inside else whole
        return autoencoder.load_from_layout(layout, shipped_config()["vae"], dtype=dtype, device=device)

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device | str) -> TextEncoders:
        if self.path.is_dir() and not self.source.text_encoders:
            root = self.path
            return TextEncoders(
                clip_tokenizer=clip.tokenizer_in(root / "tokenizer"),
                clip=clip.load_from_folder(
                    root / "text_encoder", projection=False, dtype=dtype, device=device
                ),
                t5_tokenizer=t5.tokenizer_in(root / "tokenizer_2"),
                t5=t5.load_from_folder(root / "text_encoder_2", dtype=dtype, device=device),
            )
        clip_layout, t5_layout = self._text_layouts()
        shipped = shipped_config()
        return TextEncoders(
            clip_tokenizer=clip.shipped_tokenizer(),
            clip=clip.load_from_layout(
                clip_layout, shipped["text_encoder"], projection=False, dtype=dtype, device=device
            ),
            t5_tokenizer=t5.shipped_tokenizer(self.prompt_tokens),
            t5=t5.load_from_layout(t5_layout, shipped["text_encoder_2"], dtype=dtype, device=device),
        )

    def _text_layouts(self) -> tuple[Layout, Layout]:
        """CLIP and T5, told apart by their names, from the separate files or from within the single one."""
        named = self.source.text_encoders
        layouts = [layout_of([separate_file(file)]) for file in named] or [self.single_file]
        clip_layout: Layout | None = None
        t5_layout: Layout | None = None
        for layout in layouts:
            refuse_scaled(layout)
            t5_inside = t5.layout_in(layout)
            t5_layout = t5_inside or t5_layout
            clip_inside = [below(layout, prefix) for prefix in _CLIP_PREFIXES if below(layout, prefix)]
            if clip_inside or (named and t5_inside is None):
                clip_layout = clip_inside[0] if clip_inside else layout
        missing = [name for name, found in (("CLIP-L", clip_layout), ("T5", t5_layout)) if found is None]
        if clip_layout is None or t5_layout is None:
            place = ", ".join(file.name for file in named) if named else str(self.path)
            raise ModelError(
                f"{place} holds no {' and no '.join(missing)} text encoder.",
                remedy="Name both files (clip_l.safetensors and t5xxl_fp16.safetensors) under "
                "`model.text_encoders` in the config.",
            )
        return clip_layout, t5_layout

    def identity(self, part: Part, dtype: torch.dtype) -> str:
        """Hash of the bytes behind a part, its number type and length of prompt, and the version of this code."""
        settings = f"{ENCODING_VERSION} {part} {dtype}"
        if part == "text_encoders":
            settings += f" {self.prompt_tokens}"
        digest = hashlib.sha256(settings.encode())
        digest.update(fingerprint(self.files(part)).encode())
        return digest.hexdigest()

    def files(self, part: Part) -> list[Path]:
        return files_behind(self.source, self.path, part, FOLDERS[part])
