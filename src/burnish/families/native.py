"""Names of a denoiser in its original release, and where diffusers keeps the same weights.

One table per family serves both ways: single files are read through it, and adapters are written in the names that
ComfyUI knows. A native module can stack several of diffusers' modules along its rows, as a fused query, key, value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from itertools import pairwise

import torch
from torch import Tensor

from burnish.errors import ModelError
from burnish.export_keys import NativeModule, NativeName, NativeTensor
from burnish.families.reading import Piece
from burnish.families.weights import Layout, below

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
_SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|comfy_quant)$")
_OTHER_PARTS = ("vae.", "first_stage_model.", "text_encoders.", "conditioner.", "cond_stage_model.")


@dataclass(frozen=True, slots=True)
class HalvesSwapped(Piece):
    """A tensor whose first and second half of rows trade places: shift and scale stand the other way round."""

    def turned_from(self, rows: Tensor) -> Tensor:
        first, second = rows.chunk(2)
        return torch.cat([second, first]).reshape(self.shape)


@dataclass(frozen=True)
class NativeNames:
    """How the release names what diffusers has renamed.

    `table` maps a native module to diffusers' module, or to the several it stacks, in the order of its rows; `#`
    stands for a number that both sides share, in order. Names that no line fits are the same on both sides.
    `kinds` renames the last word of a tensor's name (`scale` -> `weight`). `swapped` names diffusers modules whose
    halves trade places. `signs` are native tensors by which a file is known to be of this family, `absent` those of
    a relative that has the same signs.
    """

    table: Mapping[str, tuple[str, ...] | str]
    signs: tuple[str, ...]
    kinds: Mapping[str, str] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @cached_property
    def _lines(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(k, (v,) if isinstance(v, str) else v) for k, v in self.table.items()]

    def prefix(self, names: Iterable[str]) -> str | None:
        """What stands before the native names in a file; None if these are of another model."""
        known = set(names)
        for prefix in PREFIXES:
            if all(prefix + sign in known for sign in self.signs) and not any(
                prefix + name in known for name in self.absent
            ):
                return prefix
        return None

    def held_by(self, native: str) -> tuple[str, ...]:
        """Diffusers' modules that a native module holds, in the order of its rows."""
        for pattern, held in self._lines:
            numbers = _numbers(pattern, native)
            if numbers is not None:
                return tuple(_numbered(ours, numbers) for ours in held)
        return (native,)

    def is_swapped(self, ours: str) -> bool:
        return any(fnmatchcase(ours, pattern) for pattern in self.swapped)

    def native_module(self, ours: str) -> NativeModule:
        """The native module that holds one of diffusers'."""
        for pattern, held in self._lines:
            for one in held:
                numbers = _numbers(one, ours)
                if numbers is not None:
                    parts = tuple(_numbered(part, numbers) for part in held)
                    return NativeModule(_numbered(pattern, numbers), parts, self.is_swapped(ours))
        return NativeModule(ours, (ours,), self.is_swapped(ours))

    def tensors(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, NativeTensor]:
        """The tensors of a file in the release's names, by name, of diffusers' tensors with these shapes."""
        kinds = {ours: native for native, ours in self.kinds.items()}
        return native_tensors(shapes, self.native_module, kinds)

    def layout(self, layout: Layout, rows: Mapping[str, int] | None = None) -> Layout:
        """A native layout (its prefix taken off) under diffusers' names.

        Args:
            rows: rows of those of diffusers' modules (patterns) that share a native one unequally.

        Raises:
            ModelError: 8-bit weights with scales beside them, which would load as noise.
        """
        refuse_scaled(layout)
        renamed: Layout = {}
        for name, piece in layout.items():
            module, _, kind = name.rpartition(".")
            if self.held_by(name) != (name,):  # a parameter that the table names itself
                module = ""
            held = self.held_by(module) if module else self.held_by(name)
            for ours, part in zip(held, _parts(piece, held, rows or {}), strict=True):
                if self.is_swapped(ours):
                    part = HalvesSwapped(part.file, part.name, part.shape, scale=part.scale)
                renamed[f"{ours}.{self.kinds.get(kind, kind)}" if module else ours] = part
        return renamed

    def denoiser(
        self, layout: Layout, rows: Callable[[Layout], Mapping[str, int]] | None = None
    ) -> Layout | None:
        """The denoiser of a single file under diffusers' names; None if the file holds no native one."""
        prefix = self.prefix(layout)
        if prefix is None:
            return None
        native = below(layout, prefix)
        if not prefix:
            native = {k: v for k, v in native.items() if not k.startswith(_OTHER_PARTS)}
        return self.layout(native, rows(native) if rows else None)


def native_tensors(
    shapes: Mapping[str, Sequence[int]], native: NativeName, kinds: Mapping[str, str] | None = None
) -> dict[str, NativeTensor]:
    """As `NativeNames.tensors`, of whoever knows the names of modules.

    Args:
        native: one of diffusers' modules, or a parameter of its own -> where the release keeps it.
        kinds: how the release calls the tensors of norms: diffusers' last word -> its own.

    Raises:
        ModelError: a stack of the release's holds a tensor that is not there.
    """
    found: dict[str, NativeTensor] = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        own = native(name)
        if (
            own.name != name or not module
        ):  # a parameter that has a line of its own, such as a table of positions
            found[own.name] = NativeTensor((name,), own.halves_swapped)
            continue
        whole = native(module)
        spelled = (kinds or {}).get(kind, kind) if len(shape) == 1 else kind
        holds = tuple(f"{one}.{kind}" for one in whole.holds)
        missing = [one for one in holds if one not in shapes]
        if missing:
            raise ModelError(f"{whole.name} of the original release holds {missing[0]}, which is not there.")
        found[f"{whole.name}.{spelled}"] = NativeTensor(holds, whole.halves_swapped)
    return found


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(re.escape(literal) for literal in text.split("#")))


def _numbers(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the `#` of a pattern stand for in a name; None where the name is not of this pattern."""
    match = _pattern(pattern).fullmatch(name)
    return None if match is None else match.groups()


def _numbered(name: str, numbers: tuple[str, ...]) -> str:
    remaining = iter(numbers)
    return re.sub("#", lambda _: next(remaining), name)


def _parts(piece: Piece, held: tuple[str, ...], rows: Mapping[str, int]) -> list[Piece]:
    """The rows of a stacked tensor that belong to each module it holds."""
    if len(held) == 1:
        return [piece]
    stated = [next((n for pattern, n in rows.items() if fnmatchcase(ours, pattern)), None) for ours in held]
    left = piece.shape[0] - sum(size for size in stated if size is not None)
    open_parts = stated.count(None)
    sizes = [left // open_parts if size is None else size for size in stated]
    edges = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    return [
        replace(piece, rows=(begin, end), shape=(end - begin, *piece.shape[1:]))
        for begin, end in pairwise(edges)
    ]


def with_halves_swapped(layout: Layout, modules: Iterable[str]) -> Layout:
    """A layout in which the tensors of these modules have their halves traded (scale and shift)."""
    chosen = tuple(modules)
    return {
        name: HalvesSwapped(piece.file, piece.name, piece.shape, scale=piece.scale)
        if name.rpartition(".")[0] in chosen
        else piece
        for name, piece in layout.items()
    }


def refuse_scaled(layout: Layout) -> None:
    """Files with scales of other kinds than `scales.py` reads would load as noise.

    Raises:
        ModelError: it is such a file.
    """
    scaled = [name for name in layout if _SCALED.search(name)]
    if scaled:
        raise ModelError(
            f"{layout[scaled[0]].file} holds quantized weights with scales of a kind that is not read ({scaled[0]}).",
            remedy="Use the bfloat16, float16, fp8_scaled or plain fp8_e4m3fn file of the same model.",
        )


def depth(layout: Iterable[str], stem: str) -> int:
    """How many blocks a layout has under `stem`, such as `transformer_blocks.`."""
    return 1 + max(
        (int(name[len(stem) :].split(".")[0]) for name in layout if name.startswith(stem)), default=-1
    )
