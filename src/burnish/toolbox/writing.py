"""Adapters written in a format of the family's export table, one module after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import torch
from torch import Tensor

from burnish.adapters.lora import LoraWeights
from burnish.errors import AdapterError
from burnish.export.formats import key_prefix, key_start, spelled_name
from burnish.export.kinds import SPOKEN, Kind
from burnish.export.stacking import stacked
from burnish.export_keys import AdapterFormat, NativeModule
from burnish.placement import DENOISER
from burnish.toolbox.models import Model, TextModule
from burnish.toolbox.pieces import ModuleAdapter
from burnish.toolbox.regroup import Targeted, is_plain, put_together, taken_apart
from burnish.toolbox.stream import HASH, Spool

_RAW_ENDINGS = {
    "up": ".lora_up.weight",
    "down": ".lora_down.weight",
    "mid": ".lora_mid.weight",
    **{f"glora_{name}": f".{name}.weight" for name in ("a1", "a2", "b1", "b2")},
    "magnitude": ".lora_magnitude_vector",
}
LENGTHS = (".lora_magnitude_vector", ".lokr_magnitude_vector", ".dora_scale")
STALE = ("sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def number_type(name: str | None) -> torch.dtype | None:
    """Of the command line.

    Raises:
        AdapterError: matrices of adapters are not kept in that.
    """
    if name is None:
        return None
    if name not in _DTYPES:
        raise AdapterError(f"there is no number type {name!r}", remedy=f"Give --dtype {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def chosen_format(requested: str, model: Model, modules: Iterable[str]) -> AdapterFormat:
    """`auto` or one of the family's formats, able to hold the modules.

    Raises:
        AdapterError: the family has no such format, or it would lose modules.
    """
    keys = model.keys
    format = keys.default if requested == "auto" else requested
    if format not in keys.formats:
        known = format in get_args(AdapterFormat)
        raise AdapterError(
            f"{model.title} adapters have no {format} format" if known else f"there is no format {format!r}",
            remedy=f"Give --format auto, {', '.join(keys.formats)}; docs/interop.md tells what loads where.",
        )
    unreadable = keys.unreadable.get(format, ())
    lost = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in unreadable)]
    if lost:
        others = [other for other in keys.formats if other != format]
        raise AdapterError(
            f"{len(lost)} modules would not load from a file in the {format} format: {', '.join(lost[:4])}",
            remedy=f"Give --format {others[0]}." if others else "No format of this family holds them.",
        )
    return format


class AdapterWriter:
    """Collects the tensors of a file; a context manager. Nothing appears at `path` before `finish`.

    Args:
        alpha: that every module of a kohya file gets, since diffusers mixes up different ones.
    """

    def __init__(
        self, path: Path, model: Model, format: AdapterFormat, *, dtype: torch.dtype, alpha: float = 1.0
    ) -> None:
        self.model = model
        self.format = format
        self.dtype = dtype
        self.alpha = alpha
        self.names: set[str] = set()
        self.kinds: set[str] = set()
        self.peft_lengths = False  # whether some lengths are there as peft keeps them alone
        self._prefix = key_prefix(format, model.part, model.keys)
        self._spool = Spool(path)
        self._encoders = 0
        self._ranks: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.__exit__(kind, error, trace)

    def group(self, native: NativeModule, adapters: list[Targeted]) -> dict[str, LoraWeights]:
        """Adapters of one native module, by the names that the format has for what they change."""
        if self.model.keys.by_release(self.format):
            return {native.name: put_together(self.model, native, adapters)}
        return taken_apart(self.model, adapters)

    def lora(
        self,
        name: str,
        weights: LoraWeights,
        *,
        magnitude: Tensor | None = None,
        dora_scale: Tensor | None = None,
    ) -> None:
        """A LoRA of a module, as the format names it; DoRA's lengths (out,) as ComfyUI or diffusers knows them."""
        self.names.add(name)
        self.kinds.add("lora" if magnitude is None and dora_scale is None else "dora")
        self.peft_lengths |= magnitude is not None and dora_scale is None
        stem = self._prefix + spelled_name(self.format, name)
        self._matrices(stem, weights, folded=self.format != "kohya")
        if magnitude is not None:
            self._add(f"{stem}.lora_magnitude_vector", magnitude)
        if dora_scale is not None:
            self._add(f"{stem}.dora_scale", dora_scale)

    def raw(self, name: str, adapter: ModuleAdapter) -> None:
        """An adapter of any kind as it is, under another name."""
        self.names.add(name)
        self.kinds.add(adapter.told)
        known: list[Kind] = [one for one in SPOKEN if one == adapter.told]
        kind: Kind = known[0] if known else "lora"  # a LoKr has names of its own for some readers
        stem = key_start(self.format, kind, self.model.part, self.model.keys, name)
        endings = _RAW_ENDINGS | ({"magnitude": ".lokr_magnitude_vector"} if kind == "dokr" else {})
        for piece, tensor in adapter.pieces.items():
            self._add(stem + endings.get(piece, f".{piece}"), tensor)
        if adapter.alpha is not None:
            self._spool.add(f"{stem}.alpha", torch.tensor(adapter.alpha, dtype=torch.float32))
        if adapter.rank is not None:
            self._ranks.add(adapter.rank)

    def piece(self, name: str, piece: str, tensor: Tensor) -> None:
        """One piece of a module that may have others, such as the difference of its bias."""
        self.names.add(name)
        self.kinds.add("full")
        self._add(f"{self._prefix}{spelled_name(self.format, name)}.{piece}", tensor)

    def text(self, module: TextModule, weights: LoraWeights) -> None:
        """A LoRA of a text encoder's module.

        Raises:
            AdapterError: of one that is no CLIP, which goes by other names in every program.
        """
        if not module.is_clip:
            raise AdapterError(
                f"{module.module} of text encoder {module.encoder} has no name that several programs share",
                remedy="Add --drop-text-encoders to leave the text encoders' part out.",
            )
        number = module.encoder
        if self.format == "kohya":
            alone = self._encoder_count() == 1
            stem = f"lora_te{'' if alone else number}_{module.module.replace('.', '_')}"
        else:
            stem = f"text_encoder{'' if number == 1 else f'_{number}'}.{module.module}"
        self._matrices(stem, weights, folded=self.format != "kohya")

    def complete(self, widths_are_released: bool) -> int:
        """Add what readers of the format cannot do without, without effect; how many modules."""
        keys = self.model.keys
        if self.format != "comfy" or not keys.complete:
            return 0
        needed = stacked({}, keys, self.model.shapes)
        missing = [name for name in needed if name not in self.names]
        if missing and not widths_are_released:
            raise AdapterError(
                f"readers of a {self.format} file need {len(missing)} further modules, whose sizes are not known: "
                f"{missing[0]}",
                remedy="Give --format diffusers.",
            )
        for name in missing:
            self.lora(name, needed[name])
        return len(missing)

    def finish(self, metadata: Mapping[str, str], network: str | None = "networks.lora") -> int:
        """Write the file with the source's metadata brought up to date; how many tensors it has."""
        told = {key: value for key, value in metadata.items() if key not in STALE}
        if network is not None:
            told["ss_network_module"] = network
            rank = str(next(iter(self._ranks))) if len(self._ranks) == 1 else "Dynamic"
            told["ss_network_dim"] = rank
            told["ss_network_alpha"] = f"{self.alpha:g}" if self.format == "kohya" else rank
            told.pop("ss_network_args", None)
        told.setdefault("format", "pt")
        told.setdefault("modelspec.architecture", f"{self.model.keys.modelspec}/lora")
        told.setdefault("ss_base_model_version", self.model.keys.base_model_version)
        self._spool.finish(told | {HASH: ""})
        return len(self._spool)

    def _matrices(self, stem: str, weights: LoraWeights, *, folded: bool) -> None:
        self._ranks.add(weights.rank)
        if folded:
            self._add(f"{stem}.lora_A.weight", weights.down)
            self._add(f"{stem}.lora_B.weight", weights.up * weights.scale)
            return
        self._add(f"{stem}.lora_down.weight", weights.down)
        self._add(f"{stem}.lora_up.weight", weights.up * (weights.alpha / self.alpha))
        self._spool.add(f"{stem}.alpha", torch.tensor(self.alpha, dtype=torch.float32))

    def _add(self, key: str, tensor: Tensor) -> None:
        # Lengths scale the whole weight: rounded to bfloat16 they would change it by more than most adapters do.
        dtype = torch.float32 if key.endswith(LENGTHS) else self.dtype
        self._spool.add(key, tensor.to(dtype).contiguous())

    def _encoder_count(self) -> int:
        if not self._encoders:
            loaded = self.model.family.skeleton(1, parts=DENOISER | {"text_encoders"}).loaded
            self._encoders = sum(name.startswith("text_encoder") for name in loaded) or 1
        return self._encoders


def same_name(model: Model, target: NativeModule, format: AdapterFormat) -> str | None:
    """What the format calls exactly what a target means; None where it has no such module."""
    if not model.keys.by_release(format):
        return target.holds[0] if is_plain(target) else None
    native = model.native(target.holds[0])
    same = native.holds == target.holds and native.halves_swapped == target.halves_swapped
    return native.name if same else None
