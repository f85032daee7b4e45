"""A checkpoint's denoiser by diffusers' names, read one tensor at a time: a diffusers folder or a single file."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from burnish.errors import AdapterError, ModelError
from burnish.export_keys import NativeModule
from burnish.families.native import HalvesSwapped
from burnish.families.places import denoiser_layout
from burnish.families.reading import Piece
from burnish.families.registry import detect_family
from burnish.families.scales import spread
from burnish.family import Family, ModelSource
from burnish.toolbox.stream import TensorFile

_NUMBERS_AT_ONCE = 1 << 22  # of a large tensor


class Base:
    """The weights of a denoiser on disk; a context manager.

    Raises:
        ModelError: they are missing, damaged, of no known family or not of `family`.
    """

    def __init__(self, path: Path, family: type[Family] | None = None, denoiser: str | None = None) -> None:
        if path.suffix.lower() == ".gguf":
            raise ModelError(
                f"{path} holds quantized blocks, which are not changed.", remedy="Use .safetensors."
            )
        self.path = path
        self.family = family or detect_family(ModelSource(str(path)))
        self.layout = denoiser_layout(self.family, path, denoiser)
        self._scope = ExitStack()
        self._files: dict[Path, TensorFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.close()

    def file(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = self._scope.enter_context(TensorFile(path))
        return self._files[path]

    def nbytes(self, name: str) -> int:
        piece = self.layout[name]
        whole = self.file(piece.file).tensors[piece.name]
        part = piece.rows[1] - piece.rows[0] if piece.rows else whole.shape[0] if whole.shape else 1
        return whole.nbytes * part // max(whole.shape[0] if whole.shape else 1, 1)

    def shape(self, module: str) -> tuple[int, ...]:
        """Of a module's weight.

        Raises:
            AdapterError: there is no such module.
        """
        piece = self.layout.get(f"{module}.weight")
        if piece is None:
            raise AdapterError(
                f"{self.path} has no module {module}",
                remedy="The adapter is of another model than this base.",
            )
        return piece.shape

    def read(self, name: str) -> Tensor:
        """A tensor in float32, as diffusers has it."""
        piece = self.layout[name]
        file = self.file(piece.file)
        if piece.rows is not None and piece.scale is None:
            return piece.turned_from(file.rows(piece.name, *piece.rows)).float()
        stored = file.read(piece.name)
        if piece.scale is not None:
            stored = stored.float() * spread(file.read(piece.scale), tuple(stored.shape))
        return piece.turned_from(piece.cut_from(stored)).float()

    def add_to(self, total: Tensor, name: str, factor: float) -> None:
        """Add a tensor times `factor` to a float32 `total` of its shape, by rows, so that little of it is in memory."""
        piece = self.layout[name]
        if type(piece) is not Piece or piece.scale is not None or piece.transposed or not piece.shape:
            total += factor * self.read(name)
            return
        begin, end = piece.rows or (0, piece.shape[0])
        step = max(1, _NUMBERS_AT_ONCE * (end - begin) // total.numel())
        for first in range(begin, end, step):
            rows = self.file(piece.file).rows(piece.name, first, min(first + step, end)).float()
            own = total[first - begin : first - begin + len(rows)]
            own.add_(rows.reshape(own.shape), alpha=factor)

    def weight(self, target: NativeModule) -> Tensor:
        """The weight of a module, or of several stacked as a native one has them, in float32."""
        parts = [self.read(f"{part}.weight") for part in target.holds if self.shape(part)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.cat(whole.chunk(2)[::-1]) if target.halves_swapped else whole

    def target_shape(self, target: NativeModule) -> tuple[int, ...]:
        shapes = [self.shape(part) for part in target.holds]
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def close(self) -> None:
        self._scope.close()


def put_back(piece: Piece, part: Tensor, stored: Tensor) -> None:
    """Add to the whole tensor of a file, float32, what is to be added to the part that a module takes of it.

    Raises:
        ModelError: how the file keeps it cannot be turned round.
    """
    if type(piece) not in (Piece, HalvesSwapped):
        raise ModelError(f"{piece.file} keeps {piece.name} in a way that is not written.")
    if isinstance(piece, HalvesSwapped):
        part = torch.cat(part.chunk(2)[::-1])
    own = stored if piece.rows is None else stored[slice(*piece.rows)]
    own += (part.T if piece.transposed else part).reshape(own.shape)


def by_stored(layout: dict[str, Piece], names: Iterable[str]) -> dict[tuple[Path, str], list[str]]:
    """Of each tensor in the files, the named tensors of the module that it holds."""
    found: dict[tuple[Path, str], list[str]] = {}
    for name in names:
        piece = layout[name]
        found.setdefault((piece.file, piece.name), []).append(name)
    return found
