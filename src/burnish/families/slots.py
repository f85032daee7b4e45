"""The modules of a pipeline as slots: where each lies on disk, how it is made, and how it is found in single files.

The shipped configs in `configs/NAME.json` map the folder of each slot, and `scheduler`, to its released config;
single files take theirs from there, adjusted by the shapes of the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import PreTrainedTokenizerBase

from burnish.errors import ModelError
from burnish.families import autoencoder
from burnish.families.apart import files_behind, separate_file, separate_weights, tokenizer_in
from burnish.families.fingerprints import fingerprint
from burnish.families.reading import Piece
from burnish.families.scales import scales_in
from burnish.families.sources import (
    index_file,
    locate,
    locate_parts,
    read_header,
    read_json,
    weight_files,
)
from burnish.families.weights import Layout, layout_of, load_module
from burnish.family import ModelSource
from burnish.placement import Part, Place, Shrink

ENCODING_VERSION = 1  # raise when encoding gives other numbers for the same weights: caches then start anew

Config = Mapping[str, Any]


def same_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    """For modules whose released config holds for every single file."""
    return dict(shipped)


def not_in_files(layout: Layout) -> Layout | None:
    """For modules that no single file holds."""
    return None


def as_named(layout: Layout) -> Layout:
    return layout


@dataclass(frozen=True, slots=True)
class Slot:
    """One module of a pipeline: its folder, how it is made, and how it is found in single files.

    `find` gives the module's layout under its own names out of a file's, or None where the file does not hold it.
    `tidy` brings the names in a diffusers folder to those of the installed library, where releases are older.
    """

    folder: str
    part: Part
    make: Callable[[dict[str, Any]], nn.Module]
    find: Callable[[Layout], Layout | None] = not_in_files
    config_of: Callable[[Config, Layout], dict[str, Any]] = same_config
    tidy: Callable[[Layout], Layout] = as_named
    tokenizer: str | None = None  # its folder
    load_tokenizer: Callable[[Path], PreTrainedTokenizerBase] | None = None
    ship_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
    tokenizer_in_file: Callable[[Layout], PreTrainedTokenizerBase | None] = lambda layout: None
    unused: tuple[str, ...] = ()
    keep_float32: Callable[[torch.dtype], tuple[str, ...]] = lambda dtype: ()
    optional: bool = False  # a pipeline may come without it
    audio: bool = False  # for the sound alone: left where it is unless the source asks for sound
    kinds: tuple[str, ...] = ()  # its classes in model_index.json, where several slots share a folder
    shipped: str = ""  # its key in the shipped configs, where that is not its folder
    listed_under: Part | None = None  # where the config names its separate file, where not under its part
    file_hint: str = ""  # what the separate file is called in the wild, for messages


@cache
def shipped_configs(family: str) -> dict[str, Any]:
    """The released configs of every module of a family, and of its scheduler."""
    text = files("burnish.families").joinpath("configs", f"{family}.json").read_text(encoding="utf-8")
    configs: dict[str, Any] = json.loads(text)
    return configs


@dataclass
class PipelineSource:
    """The weights of one model on disk: a diffusers folder, or a single file with others beside it.

    Raises (any method):
        ModelError: files are missing, damaged or of another kind.
    """

    source: ModelSource
    slots: Sequence[Slot]
    shipped: Config
    title: str
    parts: frozenset[Part] = frozenset()
    _layouts: dict[str, Layout] = field(default_factory=dict)

    def folders(self, part: Part) -> tuple[str, ...]:
        """Of a diffusers folder, those that hold a part, as far as the config names nothing in their place."""
        slots = [slot for slot in self.slots if slot.part == part and self.has(slot)]
        return tuple(folder for slot in slots for folder in self._folders(slot))

    def _folders(self, slot: Slot) -> list[str]:
        own = [] if self.is_apart(slot) else [slot.folder]
        named = slot.tokenizer is None or self._named_tokenizer(slot) is not None
        return own if named else [*own, str(slot.tokenizer)]

    @cached_property
    def path(self) -> Path:
        if not self.index:
            return locate(self.source)
        slots = [s for s in self.slots if s.part != "denoiser" or self._is_chosen(s)]
        slots = [s for s in slots if self.source.audio or not s.audio]
        return locate_parts(self.source, [f for s in slots if s.part in self.parts for f in self._folders(s)])

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json of a diffusers folder, or what a modular pipeline has in its place; empty for a file."""
        path = locate(self.source)
        return read_json(index_file(path)) if path.is_dir() else {}

    def has(self, slot: Slot) -> bool:
        """Whether the model comes with this module, and it is asked for."""
        if slot.audio and not self.source.audio:
            return False
        if slot.part == "denoiser" and not self._is_chosen(slot):
            return False
        if slot.part == "denoiser" and self.source.denoisers:
            return True
        if not slot.optional:
            return True
        if self.index:
            library, kind = (*self.index.get(slot.folder, ()), None, None)[:2]
            return library is not None and (not slot.kinds or kind in slot.kinds)
        return any(slot.find(layout) is not None for layout in self._candidates(slot))

    def _is_chosen(self, slot: Slot) -> bool:
        return not self.source.denoisers or slot.folder in self.source.denoisers

    def is_apart(self, slot: Slot) -> bool:
        """Whether the module comes from what the config names beside the path."""
        if slot.listed_under is not None and self.index:
            return False
        if slot.part == "text_encoders":
            named = self._named_encoders.values()
            return any(slot.find(layout) is not None for layout in named) if self.index else any(named)
        return slot.part == "vae" and self.source.vae is not None

    @cached_property
    def _named_encoders(self) -> dict[Path, Layout]:
        """What the config names under `model.text_encoders`; empty layouts are tokenizers alone."""
        return {path: _layout_of_files(separate_weights(path)) for path in self.source.text_encoders}

    def refuse_strangers(self) -> None:
        """Everything that the config names must be of use.

        Raises:
            ModelError: `model.vae`, or an entry of `model.text_encoders`, holds nothing that this model reads.
        """
        vae = layout_of_file(separate_file(self.source.vae)) if self.source.vae is not None else {}
        slots = [slot for slot in self.slots if slot.part == "vae"]
        if vae and not any(slot.find(vae) for slot in slots):
            hint = f" ({slots[0].file_hint})" if slots[0].file_hint else ""
            raise ModelError(
                f"{self.source.vae} holds no vae of {self.title}.",
                remedy=f"Name its file{hint} under `model.vae` in the config, or leave that out.",
            )
        readers = [slot for slot in self.slots if "text_encoders" in (slot.part, slot.listed_under)]
        for path, layout in self._named_encoders.items():
            if layout and not any(slot.find(layout) is not None for slot in readers):
                names = ", ".join(slot.folder.replace("_", " ") for slot in readers)
                raise ModelError(
                    f"{path} holds no text encoder of {self.title} ({names}).",
                    remedy="Correct `model.text_encoders`, or leave that entry out.",
                )
            if not layout and not any(slot.tokenizer and slot.ship_tokenizer is None for slot in readers):
                raise ModelError(
                    f"{path} holds a tokenizer, and {self.title}'s ships with Burnish.",
                    remedy="Leave that entry of `model.text_encoders` out.",
                )

    def _in_folder(self, slot: Slot) -> bool:
        return bool(self.index) and not self.is_apart(slot)

    def _candidates(self, slot: Slot) -> list[Layout]:
        """Where to look for a module. What no named file holds can lie in the model's own, as connectors do."""
        part, named = slot.listed_under or slot.part, list[Layout]()
        if part == "vae" and self.source.vae is not None:
            named = [layout_of_file(separate_file(self.source.vae))]
        if part == "text_encoders":
            named = [layout for layout in self._named_encoders.values() if layout]
        return named if self.index and named else [*named, layout_of_file(self.path)]

    def _lies_in_path(self, slot: Slot) -> bool:
        """Of a single file: whether it holds a module that nothing named beside it does."""
        *named, own = self._candidates(slot)
        return all(slot.find(layout) is None for layout in named) and slot.find(own) is not None

    def layout(self, slot: Slot) -> Layout:
        """Where the weights of a module lie, under the module's own names."""
        if slot.folder not in self._layouts:
            self._layouts[slot.folder] = self._find(slot)
        return self._layouts[slot.folder]

    def _find(self, slot: Slot) -> Layout:
        if self._in_folder(slot):
            return slot.tidy(layout_of(weight_files(self.path / slot.folder)))
        # A single file holds one denoiser; of several that are built alike, the first slot knows its names.
        find = (
            next(s.find for s in self.slots if s.part == "denoiser") if slot.part == "denoiser" else slot.find
        )
        for layout in self._candidates(slot):
            found = find(layout)
            if found is not None:
                return found
        what = slot.folder.replace("_", " ")
        where = {"denoiser": "model.path", "vae": "model.vae", "text_encoders": "model.text_encoders"}[
            slot.listed_under or slot.part
        ]
        hint = f" ({slot.file_hint})" if slot.file_hint else ""
        searched = sorted({str(p.file) for layout in self._candidates(slot) for p in layout.values()})
        raise ModelError(
            f"{', '.join(searched) or self.path} holds no {what} of {self.title}.",
            remedy=f"Name its file{hint} under `{where}` in the config.",
        )

    def config(self, slot: Slot) -> dict[str, Any]:
        """The module's config: beside the weights in a folder, else the released one adjusted by shapes."""
        if self._in_folder(slot):
            return read_json(self.path / slot.folder / "config.json")
        shipped = self.shipped[slot.shipped or slot.folder]
        try:
            return slot.config_of(shipped, self.layout(slot))
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"The {slot.folder} of {self.path} is not that of {self.title}: it lacks {error}.",
                remedy="Is the file complete, and of this family? Fetch it again, or leave `model.family` out.",
            ) from error

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        beside = locate(self.source) / "scheduler" / "scheduler_config.json"
        return read_json(beside) if beside.is_file() else dict(self.shipped["scheduler"])

    def load(
        self,
        slot: Slot,
        dtype: torch.dtype,
        device: Place,
        shrink: Shrink | None = None,
        blocks: Callable[[nn.Module], Sequence[nn.Module]] | None = None,
    ) -> nn.Module:
        """A module with its weights, as `load_module` makes it."""
        config = self.config(slot)
        return load_module(
            lambda: slot.make(config),
            self.layout(slot),
            dtype=autoencoder.safe_dtype(config, dtype) if slot.part == "vae" else dtype,
            device=device,
            what=f"{slot.folder.replace('_', ' ')} of {self.title}",
            unused=slot.unused,
            keep_float32=slot.keep_float32(dtype),
            shrink=shrink,
            blocks=blocks,
        )

    def tokenizer(self, slot: Slot) -> PreTrainedTokenizerBase:
        if slot.tokenizer is None:
            raise RuntimeError(f"{slot.folder} has no tokenizer")
        named = self._named_tokenizer(slot)
        if named is not None and slot.load_tokenizer is not None:
            return _loaded(slot.load_tokenizer, named)
        if self.index and slot.load_tokenizer is not None:
            folder = self.path / slot.tokenizer
            if not folder.is_dir():
                raise ModelError(f"The model lacks {folder}.", remedy="Fetch the model again.")
            return slot.load_tokenizer(folder)
        inside = (slot.tokenizer_in_file(layout) for layout in self._candidates(slot))
        found = next((tokenizer for tokenizer in inside if tokenizer is not None), None)
        if found is not None:
            return found
        if slot.ship_tokenizer is None:
            what = slot.folder.replace("_", " ")
            raise ModelError(
                f"The tokenizer of {self.title}'s {what} does not ship with Burnish, and these files hold none.",
                remedy=f"Fetch the folder `{slot.tokenizer}` of the model's diffusers release (tokenizer.json, "
                "tokenizer_config.json), and add it to `model.text_encoders`.",
            )
        return slot.ship_tokenizer()

    def _named_tokenizer(self, slot: Slot) -> Path | None:
        """The tokenizer's folder that the config names: that of the weights, or one by itself if none ships."""
        for path, layout in self._named_encoders.items():
            is_of_slot = slot.find(layout) is not None if layout else slot.ship_tokenizer is None
            folder = tokenizer_in(path) if is_of_slot else None
            if folder is not None:
                return folder
        return None

    def identity(self, part: Part, settings: str) -> str:
        """Hash of the bytes behind a part, what else its numbers depend on, and the version of this code."""
        digest = hashlib.sha256(f"{ENCODING_VERSION} {part} {settings}".encode())
        files = files_behind(self.source, self.path, part, self.folders(part))
        slots = [slot for slot in self.slots if slot.part == part and self.has(slot)]
        if not self.index and self.path not in files and any(self._lies_in_path(slot) for slot in slots):
            files.append(self.path)
        digest.update(fingerprint(files).encode())
        return digest.hexdigest()


def _loaded(load: Callable[[Path], PreTrainedTokenizerBase], folder: Path) -> PreTrainedTokenizerBase:
    try:
        return load(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"The tokenizer in {folder} cannot be read: {error}.",
            remedy="Fetch all files of the model's tokenizer folder again.",
        ) from error


def _layout_of_files(paths: Sequence[Path]) -> Layout:
    return layout_of_file(paths[0]) if len(paths) == 1 else layout_of(paths)


def layout_of_file(path: Path) -> Layout:
    status = path.stat()
    return _cached_layout(path, status.st_mtime_ns, status.st_size)


@cache
def _cached_layout(path: Path, modified: int, size: int) -> Layout:
    """Headers of the same file are asked for by every family that might know it."""
    header = read_header(path)
    return {
        name: Piece(path, name, header[name].shape, scale=scale) for name, scale in scales_in(header).items()
    }


def vae_slot(hint: str = "ae.safetensors", prefixes: Sequence[str] = ("vae.", "first_stage_model.")) -> Slot:
    """The KL autoencoder of still pictures, as most families have it."""

    def find(layout: Layout) -> Layout | None:
        return autoencoder.layout_in(layout, prefixes)

    return Slot(
        folder="vae",
        part="vae",
        make=AutoencoderKL.from_config,
        find=find,
        config_of=autoencoder.config_from_shapes,
        tidy=autoencoder.diffusers_names,
        unused=autoencoder.UNUSED,
        file_hint=hint,
    )
