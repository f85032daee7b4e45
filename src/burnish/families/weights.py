"""From names in weight files to a module with weights.

A `Layout` says for each name of a module where its tensor lies and how it must be turned; it is made from
headers alone, so that shapes are known, and mistakes found, before a weight is read.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from burnish.errors import ModelError
from burnish.families.fingerprints import fingerprint
from burnish.families.gguf_files import is_gguf, open_gguf
from burnish.families.scales import scales_in, spread, widened
from burnish.families.sources import read_header
from burnish.family import Place, Shrink, Split, device_of

_log = logging.getLogger(__name__)
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Piece:
    """A module's tensor inside a file: `rows` of tensor `name`, transposed if so, in `shape`.

    `scale` names the tensor that an 8-bit one is to be multiplied with (`scales.py`).
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False
    scale: str | None = None

    def third(self, index: int) -> Piece:
        """Query, key or value (0, 1, 2) of a tensor that stacks the three."""
        size = self.shape[0] // 3
        return replace(self, rows=(index * size, (index + 1) * size), shape=(size, *self.shape[1:]))

    def turned(self) -> Piece:
        return replace(self, transposed=True, shape=self.shape[::-1])

    def as_linear(self) -> Piece:
        """A 1x1 convolution as the linear layer it is."""
        return replace(self, shape=self.shape[:2])

    def taken_from(self, stored: Tensor) -> Tensor:
        if self.rows is not None:
            stored = stored[slice(*self.rows)]
        return (stored.T.contiguous() if self.transposed else stored).reshape(self.shape)


Layout = dict[str, Piece]


def layout_of(files: Iterable[Path]) -> Layout:
    """Every tensor of `files` under its own name.

    Raises:
        ModelError: a file is damaged, or two files hold a tensor of the same name.
    """
    layout: Layout = {}
    for file in files:
        header = read_header(file)
        for name, scale in scales_in(header).items():
            if name in layout:
                raise ModelError(
                    f"Both {layout[name].file} and {file} hold {name!r}.",
                    remedy="Remove the file that is too many.",
                )
            layout[name] = Piece(file, name, header[name].shape, scale=scale)
    return layout


def below(layout: Layout, prefix: str) -> Layout:
    """The part of a layout whose names begin with `prefix`, which is taken off."""
    return {name[len(prefix) :]: piece for name, piece in layout.items() if name.startswith(prefix)}


def load_module(
    make: Callable[[], Module],
    layout: Layout,
    *,
    dtype: torch.dtype,
    device: Place,
    what: str,
    unused: Sequence[str] = (),
    keep_float32: Sequence[str] = (),
    shrink: Shrink | None = None,
    blocks: Callable[[nn.Module], Sequence[nn.Module]] | None = None,
) -> Module:
    """A module with the weights of `layout`, frozen, in eval mode; each tensor is read once, onto `device`.

    Args:
        make: builds the module; its parameters are not allocated.
        layout: names as the module spells them.
        what: the part's name in messages, such as `UNet`.
        unused: patterns of names that a module rightly does without.
        keep_float32: patterns of parameters that stay in float32 whatever `dtype` is.
        shrink: how large layers are kept in fewer bits, where they are.
        blocks: the module -> where those layers are, of a denoiser; needed for a `Split` place, too.

    Raises:
        ModelError: tensors are missing or have other shapes than the module wants.
    """
    with init_empty_weights():
        module = make()
    wanted = module.state_dict()
    _check_shapes(wanted, layout, what)
    leftover = sorted(
        name for name in layout if name not in wanted and not any(fnmatch(name, rule) for rule in unused)
    )
    if leftover:
        _log.warning("%s: %d tensors are not used, such as %s", what, len(leftover), ", ".join(leftover[:3]))

    place, device = device, device_of(device)
    away = _away(module, place, blocks)
    shrinking = None
    names = wanted.keys() & layout.keys()
    if shrink is not None:
        shrinking = shrink.begin(
            module,
            None if blocks is None else blocks(module),
            partial(_content, layout),
            spared=keep_float32,
            dtype=dtype,
            device=device,
            away=away,
        )
        names -= set(shrinking.weights) - set(shrinking.waiting)
    tensors: dict[str, Tensor] = {}
    for name, tensor, scales in _read(layout, names, device):
        if shrinking is not None and name in shrinking.weights:
            shrinking.take(name, tensor, scales)
            continue
        tensor = tensor if scales is None else widened(tensor, scales)
        keeps = any(fnmatch(name, rule) for rule in keep_float32)
        floating = wanted[name].is_floating_point()
        tensors[name] = (
            tensor.to(torch.float32 if keeps else dtype, copy=True) if floating else tensor.clone()
        )
        if name.startswith(away):
            tensors[name] = tensors[name].cpu()
    module.load_state_dict(tensors, strict=False, assign=True)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()  # T5 saves one of its two names for the embedding
    missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    missing += sorted(shrinking.waiting) if shrinking is not None else []
    if missing:
        raise ModelError(
            f"The {what} lacks {len(missing)} of {len(wanted)} tensors, such as {', '.join(missing[:3])}.",
            remedy="The weights are incomplete or of another family; fetch them again or set `model.family`.",
        )
    if not away:  # else whoever splits a module brings together what belongs together
        module.to(device)
    return module.requires_grad_(False).eval()


def _away(
    module: nn.Module, place: Place, blocks: Callable[[nn.Module], Sequence[nn.Module]] | None
) -> tuple[str, ...]:
    """Beginnings of the names of what stays in host memory."""
    if not isinstance(place, Split) or blocks is None:
        return ()
    parts = blocks(module)
    sizes = [sum(one.numel() * one.element_size() for one in part.parameters()) for part in parts]
    names = {part: name for name, part in module.named_modules()}
    return tuple(f"{names[parts[number]]}." for number in place.away(sizes))


def _content(layout: Layout, names: Collection[str]) -> str:
    """Hash of what the named tensors are made from: their places in files, and the bytes of those."""
    places = {name: layout[name] for name in sorted(names) if name in layout}
    files = {file: fingerprint([file]) for file in sorted({piece.file for piece in places.values()})}
    digest = hashlib.sha256()
    for name, piece in places.items():
        digest.update(f"{name} {files[piece.file]} {replace(piece, file=Path())}\n".encode())
    return digest.hexdigest()


def read_tensor(piece: Piece) -> Tensor:
    """One tensor of a layout, on the CPU."""
    (found,) = [
        tensor if scales is None else widened(tensor, scales)
        for _, tensor, scales in _read({"": piece}, [""], "cpu")
    ]
    return found


def _check_shapes(wanted: Mapping[str, Tensor], layout: Layout, what: str) -> None:
    differing = [
        name for name in wanted if name in layout and layout[name].shape != tuple(wanted[name].shape)
    ]
    if differing:
        name = differing[0]
        raise ModelError(
            f"{len(differing)} tensors of the {what} have another shape than its config says: {name} is "
            f"{layout[name].shape} in {layout[name].file.name}, expected {tuple(wanted[name].shape)}.",
            remedy="The weights are of another family, or the config beside them belongs to another model.",
        )


def _opened(file: Path, device: torch.device | str) -> AbstractContextManager[Any]:
    """Something with `get_tensor`."""
    if is_gguf(file):
        return nullcontext(open_gguf(file))
    opened: AbstractContextManager[Any] = safe_open(file, framework="pt", device=str(device))
    return opened


def _read(
    layout: Layout, names: Iterable[str], device: torch.device | str
) -> Iterable[tuple[str, Tensor, Tensor | None]]:
    """Tensors of a layout as they are stored, each with what its numbers are to be multiplied with, if anything.

    Each file is opened once.
    """
    by_file: dict[Path, list[str]] = {}
    for name in sorted(names):
        by_file.setdefault(layout[name].file, []).append(name)
    for file, names_in_file in by_file.items():
        try:
            with _opened(file, device) as stored:
                for name in names_in_file:
                    piece = layout[name]
                    whole, scales = stored.get_tensor(piece.name).to(device), None
                    if piece.scale is not None:
                        scales = piece.taken_from(spread(stored.get_tensor(piece.scale), whole.shape))
                    yield name, piece.taken_from(whole), scales
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read: {error}.", remedy="Fetch the file again.") from error
