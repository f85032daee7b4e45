"""From names in weight files to a module with weights.

A `Layout` says for each name of a module where its tensor lies and how it must be turned; it is made from
headers alone, so that shapes are known, and mistakes found, before a weight is read.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from burnish.errors import ModelError
from burnish.families.fingerprints import fingerprint
from burnish.families.reading import Piece, fetched, read_each
from burnish.families.scales import moved, scales_in, widened
from burnish.families.sources import read_header
from burnish.placement import (
    Place,
    Shrink,
    Shrinking,
    Split,
    device_of,
)

_log = logging.getLogger(__name__)
Module = TypeVar("Module", bound=nn.Module)
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
    if shrinking is not None:
        shrunk = names & set(shrinking.weights)
        _shrink(layout, shrunk, shrinking, torch.device(device))
        names -= shrunk
    tensors = read_each(
        layout,
        names,
        torch.device(device),
        partial(_kept, dtypes={name: _dtype(name, wanted[name], dtype, keep_float32) for name in names}),
        on_host=lambda name: name.startswith(away),
        whole=shrinking is None and not away,
    )
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


def _dtype(name: str, wanted: Tensor, dtype: torch.dtype, keep_float32: Sequence[str]) -> torch.dtype | None:
    """The number type in which a tensor is kept; None: as it is stored."""
    if not wanted.is_floating_point():
        return None
    return torch.float32 if any(fnmatch(name, rule) for rule in keep_float32) else dtype


def _kept(
    name: str, stored: Tensor, scales: Tensor | None, dtypes: Mapping[str, torch.dtype | None] | None = None
) -> Tensor:
    """A tensor of the module's own, where `stored` is."""
    wide = stored if scales is None else widened(stored, scales)
    dtype = None if dtypes is None else dtypes[name]
    is_view = wide is stored and stored.device.type == "cpu"
    return wide.to(wide.dtype if dtype is None else dtype, copy=is_view)


def _shrink(layout: Layout, names: Collection[str], shrinking: Shrinking, device: torch.device) -> None:
    """Give the layers that are to be smaller their weights.

    On a GPU one after the other, since several in both forms might not fit; the others are fetched from the disk
    meanwhile.
    """
    turns = nullcontext() if device.type == "cpu" else Lock()

    def take(name: str, stored: Tensor, scales: Tensor | None) -> None:
        fetched(stored)
        with turns:
            shrinking.take(name, stored.to(device), None if scales is None else moved(scales, device))

    read_each(layout, names, device, take, on_host=lambda name: True)


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
    return read_each({"": piece}, [""], torch.device("cpu"), _kept)[""]


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
