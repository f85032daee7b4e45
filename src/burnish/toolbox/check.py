"""A file that was written is read back, key by key, and its effect compared with that of what it was made from.

A file that does not pass is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from burnish.adapters.lora import LoraWeights
from burnish.atomic import remove
from burnish.errors import ExportError
from burnish.export_keys import NativeModule
from burnish.toolbox.loading import groups, load
from burnish.toolbox.models import Model
from burnish.toolbox.regroup import taken_apart
from burnish.toolbox.source import AdapterSource, Entry

_ROUNDINGS = 4  # of each matrix, in steps of its number type, that a product may be off by


def reads_back(path: Path, model: Model) -> AdapterSource:
    """Open a file that was just written; every key must be known.

    Raises:
        ExportError: one is not.
    """
    source = AdapterSource(path, model.name)
    if source.unknown:
        source.file.close()
        remove(path)
        raise ExportError(
            f"{path} does not read back: {len(source.unknown)} keys belong to nothing, such as {source.unknown[0]}",
            remedy="The file was removed. Please report it.",
        )
    return source


def same_effect(source: AdapterSource, path: Path, model: Model) -> float:
    """The largest difference between what plain LoRAs of two files do, beside the change itself.

    Raises:
        ExportError: it is more than the rounding of the written file's number type explains.
    """
    largest = 0.0
    with reads_back(path, model) as written:
        steps = max(torch.finfo(one.dtype).eps for one in written.file.tensors.values() if one.shape)
        allowed = _ROUNDINGS * steps + 1e-5
        before = {native.name: entries for native, entries in groups(model, source.modules)}
        after = {native.name: entries for native, entries in groups(model, written.modules)}
        for name, entries in before.items():
            expected = _parts(source, model, entries)
            found = _parts(written, model, after.get(name, []))
            for part, weights in expected.items():
                off = _difference(weights, found.get(part))
                if not off <= allowed:
                    remove(path)
                    raise ExportError(
                        f"{path} does not read back: its effect on {part} is off by {off:.2g} of it",
                        remedy="The file was removed. Please report it.",
                    )
                largest = max(largest, off)
    return largest


def _parts(
    source: AdapterSource, model: Model, entries: Sequence[tuple[NativeModule, Entry]]
) -> dict[str, LoraWeights]:
    plain = [(target, load(source, target, entry).as_lora()) for target, entry in entries]
    return taken_apart(model, [(target, one) for target, one in plain if one is not None])


def _difference(expected: LoraWeights, found: LoraWeights | None) -> float:
    """Norm of the difference of two products beside the norm of the first, without either of them."""
    up, down = (expected.scale * expected.up).double().flatten(1), expected.down.double().flatten(1)
    norm = _norm(up, down)
    if found is None or norm == 0.0:
        return 0.0 if norm == 0.0 else 1.0
    other_up, other_down = (found.scale * found.up).double().flatten(1), found.down.double().flatten(1)
    return _norm(torch.cat([up, -other_up], dim=1), torch.cat([down, other_down])) / norm


def _norm(left: Tensor, right: Tensor) -> float:
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
