"""What Stable Diffusion 1, 2 and XL share: where the parts of a checkpoint lie, and the noise schedule.

A checkpoint is a diffusers folder, or a single file in the original layout (UNet, VAE and text encoders under
prefixes), or one that holds the UNet alone beside separate files, as ComfyUI has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from burnish.errors import ModelError
from burnish.families import autoencoder, clip, unet
from burnish.families.apart import files_behind, files_named, separate_file, separate_weights
from burnish.families.fingerprints import fingerprint
from burnish.families.noise_schedule import schedule_of
from burnish.families.sources import locate, locate_parts, read_header, read_json, weight_files
from burnish.families.weights import Layout, below, layout_of
from burnish.family import ModelSource
from burnish.noise_schedule import Prediction, Schedule
from burnish.placement import (
    Part,
    Place,
    Places,
    Shrink,
    device_of,
    place_of,
)

UNET_PREFIX, VAE_PREFIX = unet.PREFIX, "first_stage_model."
PLAIN, INPAINTING = (
    4,
    9,
)  # channels that a UNet takes: latents; with a mask, and the latents of what is not to change
ENCODING_VERSION = 1  # raise when encoding gives other numbers for the same weights: caches then start anew

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class TextEncoderPlace:
    """Where one CLIP of a checkpoint lies."""

    folder: str
    tokenizer_folder: str
    prefix: str  # in a single file
    projection: bool  # whether it gives the pooled embedding
    padding: str
    layers: int | None = None  # that are read, where files have more


@dataclass(frozen=True)
class Layouts:
    """The constant facts of a family: its released configs and where its parts lie."""

    config_file: str
    text_encoders: tuple[TextEncoderPlace, ...]

    @cached_property
    def config(self) -> dict[str, Any]:
        text = files("burnish.families").joinpath("configs", self.config_file).read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
        return config

    def folders(self, part: Part) -> tuple[str, ...]:
        """Sub-folders of a diffusers folder behind a part."""
        if part == "text_encoders":
            return tuple(f for place in self.text_encoders for f in (place.folder, place.tokenizer_folder))
        return ("unet",) if part == "denoiser" else ("vae",)


@dataclass
class Parts:
    """What is loaded; a part that is not is None or empty."""

    unet: UNet2DConditionModel | None = None
    vae: AutoencoderKL | None = None
    text_encoders: list[tuple[CLIPTokenizer, CLIPTextModel]] = field(default_factory=list)

    def loaded_unet(self) -> UNet2DConditionModel:
        return _loaded(self.unet, "denoiser")

    def loaded_vae(self) -> AutoencoderKL:
        return _loaded(self.vae, "vae")

    def loaded_text_encoders(self) -> list[tuple[CLIPTokenizer, CLIPTextModel]]:
        return _loaded(self.text_encoders or None, "text_encoders")

    def release(self, part: Part) -> None:
        match part:
            case "denoiser":
                self.unet = None
            case "vae":
                self.vae = None
            case "text_encoders":
                self.text_encoders = []
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _loaded(value: Loaded | None, part: Part) -> Loaded:
    if value is None:
        raise RuntimeError(f"the part {part!r} is not loaded")
    return value


class Checkpoint:
    """The weights of one model, on disk.

    Raises (any method):
        ModelError: files are missing, damaged or of another kind.
    """

    def __init__(self, source: ModelSource, layouts: Layouts, parts: frozenset[Part] = frozenset()) -> None:
        self.source = source
        self.layouts = layouts
        self.path = locate_parts(
            source, [folder for part in sorted(parts) for folder in layouts.folders(part)]
        )

    @cached_property
    def single_file(self) -> Layout:
        return layout_of([self.path])

    @cached_property
    def unet_layout(self) -> Layout:
        """Where the UNet's tensors lie, under diffusers' names."""
        if self.path.is_dir():
            return layout_of(weight_files(self.path / "unet"))
        return unet.diffusers_names(below(self.single_file, UNET_PREFIX) or self.single_file)

    @cached_property
    def unet_channels(self) -> int:
        """Channels that the UNet takes."""
        path = locate(self.source)
        if path.is_dir():
            return int(read_json(path / "unet" / "config.json").get("in_channels", PLAIN))
        return self.unet_layout["conv_in.weight"].shape[1]

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's config: beside the weights in a folder, else the released one adjusted by shapes."""
        path = locate(self.source)
        if path.is_dir():
            return read_json(path / "unet" / "config.json")
        return unet.config_from_shapes(self.layouts.config["unet"], self.unet_layout)

    def config_beside(self, folder: str, shipped: Mapping[str, Any]) -> dict[str, Any]:
        """Of VAE or text encoder: the one that lies in a diffusers folder, as far as it is there; else the released."""
        named = self.source.vae is not None if folder == "vae" else bool(self.source.text_encoders)
        path = locate(self.source) / folder / "config.json"
        return read_json(path) if path.is_file() and not named else dict(shipped)

    def load(
        self,
        parts: frozenset[Part],
        dtype: torch.dtype,
        device: Places,
        shrink: Mapping[Part, Shrink],
    ) -> Parts:
        loaded = Parts()
        if "denoiser" in parts:
            loaded.unet = self._unet(dtype, place_of("denoiser", device), shrink.get("denoiser"))
        if "vae" in parts:
            loaded.vae = self._vae(dtype, device_of(place_of("vae", device)))
        if "text_encoders" in parts:
            where = device_of(place_of("text_encoders", device))
            loaded.text_encoders = self._text_encoders(dtype, where, shrink.get("text_encoders"))
        return loaded

    def _unet(self, dtype: torch.dtype, device: Place, shrink: Shrink | None) -> UNet2DConditionModel:
        if self.path.is_dir():
            return unet.load_from_folder(self.path / "unet", dtype=dtype, device=device, shrink=shrink)
        layout = below(self.single_file, UNET_PREFIX) or self.single_file
        shipped = self.layouts.config["unet"]
        return unet.load_from_layout(layout, shipped, dtype=dtype, device=device, shrink=shrink)

    def _vae(self, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
        if self.source.vae is None and self.path.is_dir():
            return autoencoder.load_from_folder(self.path / "vae", dtype=dtype, device=device)
        if self.source.vae is not None:
            whole = layout_of([separate_file(self.source.vae)])
            layout = below(whole, VAE_PREFIX) or whole
        else:
            layout = below(self.single_file, VAE_PREFIX)
        if not layout:
            raise ModelError(
                f"{self.path} holds no VAE.", remedy="Name a file that does under `model.vae` in the config."
            )
        return autoencoder.load_from_layout(layout, self.layouts.config["vae"], dtype=dtype, device=device)

    def _text_encoders(
        self, dtype: torch.dtype, device: torch.device | str, shrink: Shrink | None
    ) -> list[tuple[CLIPTokenizer, CLIPTextModel]]:
        places = self.layouts.text_encoders
        if self.path.is_dir() and not self.source.text_encoders:
            return [
                (
                    clip.tokenizer_in(self.path / place.tokenizer_folder),
                    clip.load_from_folder(
                        self.path / place.folder,
                        projection=place.projection,
                        dtype=dtype,
                        device=device,
                        shrink=shrink,
                    ),
                )
                for place in places
            ]
        shipped = self.layouts.config["text_encoders"]
        return [
            (
                clip.shipped_tokenizer(place.padding),
                clip.load_from_layout(
                    clip.first_layers(clip.transformers_names(layout), place.layers),
                    config,
                    projection=place.projection,
                    dtype=dtype,
                    device=device,
                    shrink=shrink,
                ),
            )
            for place, config, layout in zip(places, shipped, self._text_layouts(), strict=True)
        ]

    def _text_layouts(self) -> list[Layout]:
        """The text encoders of single files in the order of the family: the narrower CLIP first."""
        places = self.layouts.text_encoders
        if not self.source.text_encoders:
            inside = [below(self.single_file, place.prefix) for place in places]
            if not all(inside):
                prefixes = " or ".join(place.prefix for place in places)
                raise ModelError(
                    f"{self.path} holds no text encoder under {prefixes}.",
                    remedy="Name the text encoders' files under `model.text_encoders` in the config.",
                )
            return inside
        if len(self.source.text_encoders) != len(places):
            raise ModelError(
                f"This family has {len(places)} text encoder(s); `model.text_encoders` names "
                f"{len(self.source.text_encoders)} file(s).",
                remedy="Name one file per text encoder.",
            )
        layouts = [
            clip.transformers_names(layout_of(separate_weights(entry))) for entry in self.source.text_encoders
        ]
        embedding = "embeddings.token_embedding.weight"
        for entry, layout in zip(self.source.text_encoders, layouts, strict=True):
            if embedding not in layout:
                raise ModelError(
                    f"{entry} holds no CLIP text encoder.",
                    remedy="Correct `model.text_encoders`; CLIP's tokenizer ships with Burnish.",
                )
        return sorted(layouts, key=lambda layout: layout[embedding].shape[1])

    def identity(self, part: Part, settings: str) -> str:
        """Hash of the bytes behind a part, what else its numbers depend on and the version of this code."""
        digest = hashlib.sha256(f"{ENCODING_VERSION} {part} {settings}".encode())
        digest.update(fingerprint(self.files(part)).encode())
        return digest.hexdigest()

    def files(self, part: Part) -> list[Path]:
        folders = () if files_named(self.source, part) else self.layouts.folders(part)
        return files_behind(self.source, self.path, part, folders)

    def schedule(self, prediction: Prediction | None) -> Schedule:
        """The schedule that came with the weights, or the released one; `prediction` overrides it."""
        config = dict(self.layouts.config["scheduler"])
        if self.path.is_dir():
            beside = self.path / "scheduler" / "scheduler_config.json"
            config = read_json(beside) if beside.is_file() else config
        elif "v_pred" in self.single_file:
            # Fine-tunes that predict v mark a single file so; ComfyUI and A1111 look for it, too.
            config["prediction_type"] = "v_prediction"
            config["rescale_betas_zero_snr"] = "ztsnr" in self.single_file
        return schedule_of(config, prediction)


def without_weights(
    layouts: Layouts, of: Checkpoint | None, parts: frozenset[Part], depth: int | None, dtype: torch.dtype
) -> Parts:
    """The modules on the meta device, frozen and in eval mode, with the configs of `of` or the released ones."""
    made = Parts()
    with torch.device("meta"):
        if "denoiser" in parts:
            config = unet.with_depth(layouts.config["unet"] if of is None else of.unet_config, depth)
            made.unet = UNet2DConditionModel.from_config(config)
        if "vae" in parts:
            config = layouts.config["vae"] if of is None else of.config_beside("vae", layouts.config["vae"])
            made.vae = AutoencoderKL.from_config(config)
        if "text_encoders" in parts:
            for place, config in zip(layouts.text_encoders, layouts.config["text_encoders"], strict=True):
                told = config if of is None else of.config_beside(place.folder, config)
                encoder = clip.make(told, projection=place.projection)
                made.text_encoders.append((clip.shipped_tokenizer(place.padding), encoder))
    for module in (made.unet, made.vae, *(encoder for _, encoder in made.text_encoders)):
        if module is not None:
            nn.Module.to(module, dtype).requires_grad_(False).eval()
    return made


def is_unet_of(
    source: ModelSource,
    by_config: Callable[[Mapping[str, Any]], bool],
    by_shapes: Callable[[Mapping[str, tuple[int, ...]]], bool],
) -> bool:
    """Whether a source holds a UNet that fits: by its config in a diffusers folder, by shapes in a file."""
    path = locate(source)
    if path.is_dir():
        config = path / "unet" / "config.json"
        return config.is_file() and by_config(read_json(config))
    header = read_header(path)
    inside = {k.removeprefix(UNET_PREFIX): v for k, v in header.items() if k.startswith(UNET_PREFIX)}
    return by_shapes(unet.diffusers_shapes(inside or header))


def plain_text_to_image(config: Mapping[str, Any], stages: int) -> bool:
    """A UNet that takes latents, time and CLIP tokens, with or without a hole to fill; no other encoder."""
    return (
        config.get("_class_name") == "UNet2DConditionModel"
        and config.get("in_channels") in (PLAIN, INPAINTING)
        and len(config.get("block_out_channels", ())) == stages
        and config.get("encoder_hid_dim") is None
        and config.get("class_embed_type") is None
    )


def stage_count(shapes: Mapping[str, Sequence[int]]) -> int:
    """Down stages of a UNet by diffusers' names; 0 where this is no such UNet for four latent channels."""
    first = shapes.get("conv_in.weight", ())
    if len(first) != 4 or first[1] not in (PLAIN, INPAINTING) or "encoder_hid_proj.weight" in shapes:
        return 0
    stages = 0
    while f"down_blocks.{stages}.resnets.0.conv1.weight" in shapes:
        stages += 1
    return stages
