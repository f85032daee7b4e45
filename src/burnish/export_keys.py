"""How the modules and tensors of a family are called in the files of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

AdapterFormat = Literal["kohya", "diffusers", "comfy"]


@dataclass(frozen=True, slots=True)
class NativeModule:
    """A module of the original release that holds one of diffusers' modules, or several stacked along its rows."""

    name: str
    holds: tuple[str, ...]  # diffusers' names in the order of the rows
    halves_swapped: bool = False  # shift, then scale, where diffusers keeps scale, then shift


NativeName = Callable[[str], NativeModule]


@dataclass(frozen=True, slots=True)
class NativeTensor:
    """A tensor of the original release that holds one of diffusers' tensors, or several stacked along its rows."""

    holds: tuple[str, ...]  # diffusers' names in the order of the rows
    halves_swapped: bool = False


NativeTensors = Callable[[Mapping[str, Sequence[int]]], Mapping[str, NativeTensor]]


@dataclass(frozen=True, slots=True)
class ExportKeys:
    """How this family's adapter keys read in the files of others (the table of docs/interop.md).

    `diffusers` writes diffusers' module names, `comfy` those of the original release (`native`), `kohya` diffusers'
    where that is the default and the release's elsewhere.

    `default` loads both in ComfyUI and in diffusers. `modelspec` and `ss_base_model_version` go to the metadata.
    Modules are named by `fnmatch` patterns over diffusers' names: `unreadable` those that some reader would not find,
    or find otherwise than trained, in a format; `complete` those without which a reader refuses a `comfy` file, which
    are written without effect where they were not trained.

    `comfyui` tells whether ComfyUI has the family at all. `lokr` stands before names of diffusers in a LoKr that it
    reads as ComfyUI does: `lycoris_` (with underscores) or `diffusion_model.`; None where it reads none.
    """

    default: AdapterFormat
    formats: tuple[AdapterFormat, ...]
    modelspec: str
    base_model_version: str
    prefix: Mapping[AdapterFormat, str] = field(default_factory=dict)  # e.g. {"kohya": "lora_unet_"}
    native: NativeName | None = None  # where the `comfy` format has other names than diffusers
    unreadable: Mapping[AdapterFormat, tuple[str, ...]] = field(default_factory=dict)
    complete: tuple[str, ...] = ()
    # Shapes of a denoiser's tensors by name -> those of a single file of it; None where none is written.
    tensors: NativeTensors | None = None
    labels: Mapping[str, str] = field(default_factory=dict)  # of several denoisers, by part, in file names
    comfyui: bool = True
    lokr: str | None = None
    # Who loads a format, where that is not ComfyUI and diffusers for the default one and one of them for another.
    readers: Mapping[AdapterFormat, tuple[str, ...]] = field(default_factory=dict)
    # Who loads sd-scripts' spelling of the release's names, `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`.
    native_kohya: tuple[str, ...] = ("ComfyUI",)
    # Of CLIP text encoders that adapters and words can be trained of: by part, as diffusers spells it, ComfyUI's name.
    text_encoders: Mapping[str, str] = field(default_factory=dict)
    # The same of further text encoders that can be taught words, and no more.
    words: Mapping[str, str] = field(default_factory=dict)
    # Further names in files of others -> diffusers' modules, stacked by rows; `#` is the block's number.
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def vocabularies(self) -> Mapping[str, str]:
        """Text encoders that can be taught words."""
        return {**self.text_encoders, **self.words}

    def by_release(self, format: AdapterFormat) -> bool:
        """Whether a format has the release's module names, which may hold several of diffusers' modules each."""
        return format == "comfy" or (format == "kohya" and self.default != "kohya")
