"""The mean of files with the same tensors: checkpoints or adapters of one run (arXiv 1803.05407, 2203.05482).

Adapters are averaged matrix by matrix. That is the mean of their effects only as far as they lie close together, as
saves of one run do; adapters of different runs are to be merged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from burnish.errors import UserError
from burnish.export.metadata import AVERAGE
from burnish.optim.power_average import LARGEST, Snapshot, combination
from burnish.toolbox.convert import Outcome
from burnish.toolbox.stream import HASH, Planned, TensorFile, refuse_existing, write_stream


def average(
    paths: Sequence[Path],
    path: Path,
    weights: Sequence[float] = (),
    *,
    width: float | None = None,
    force: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Write the weighted mean, computed in float32, in the number types and with the metadata of the last file.

    Args:
        weights: one for each file, of any sum but zero; all alike if empty.
        width: the average of this width over the training, as far as these saves of averages (`train.ema.width`) give
            it, in the place of weights (arXiv 2312.02696).

    Raises:
        UserError: the files differ in names or shapes, or in what is no floating number.
    """
    refuse_existing(path, force=force)
    if len(paths) < 2:
        raise UserError("one file has no mean", remedy="Name two files or more.")
    notes: list[str] = []
    if width is not None:
        if weights:
            raise UserError("a width and weights exclude each other", remedy="Give --width or --weights.")
        weights, note = _for_width(paths, width)
        notes.append(note)
    weights = weights or [1.0] * len(paths)
    if len(weights) != len(paths) or sum(weights) == 0:
        raise UserError(
            f"{len(weights)} weights, of the sum {sum(weights):g}, for {len(paths)} files",
            remedy="Give one --weights number for each file, separated by commas.",
        )
    shares = [weight / sum(weights) for weight in weights]
    with ExitStack() as scope:
        files = [scope.enter_context(TensorFile(one)) for one in paths]
        for file in files[:-1]:
            _refuse_other(file, files[-1])

        def mean(name: str) -> Tensor:
            kept = files[-1].tensors[name].dtype
            progress(sum(file.tensors[name].nbytes for file in files))
            if not kept.is_floating_point:
                return _alike(name, files)
            total = torch.zeros(files[-1].tensors[name].shape)
            for share, file in zip(shares, files, strict=True):
                total.add_(file.read(name).float(), alpha=share)
            return total.to(kept)

        plan = [Planned(name, one.dtype, one.shape) for name, one in files[-1].tensors.items()]
        metadata = {k: v for k, v in files[-1].metadata.items() if k not in ("sshs_legacy_hash", AVERAGE)}
        write_stream(path, plan, metadata | ({HASH: ""} if HASH in metadata else {}), mean)
    return Outcome(path, "as it was", len(paths), len(plan), notes=notes)


def _for_width(paths: Sequence[Path], width: float) -> tuple[list[float], str]:
    """The share of each file in the average of a width at the end of the last, and how near they come, in words.

    Raises:
        UserError: a file is no save of such an average, or they are of averages that began at different steps.
    """
    if not 0 < width <= LARGEST:
        raise UserError(f"there is no average of width {width:g}", remedy=f"Give one of 0.01 to {LARGEST}.")
    saved, begins = [], set()
    for path in paths:
        with TensorFile(path) as file:
            told = _told(file)
        saved.append(Snapshot(told["width"], int(told["updates"])))
        begins.add(told["step"] - told["updates"])
    if len(begins) > 1:
        raise UserError(
            f"the averages began at different steps ({', '.join(f'{one:g}' for one in sorted(begins))})",
            remedy="Name saves of one run whose train.ema.width never changed.",
        )
    shares, off = combination(saved, Snapshot(width, max(one.updates for one in saved)))
    listed = ", ".join(f"{share:.3g}" for share in shares)
    more = "" if off < 0.1 else "; more saves, or saves of two widths, come nearer"
    return shares, f"shares {listed}: the profile is off by {off:.1%} of that of width {width:g}{more}"


def _told(file: TensorFile) -> dict[str, float]:
    try:
        told = json.loads(file.metadata[AVERAGE])
        found = {name: float(told[name]) for name in ("width", "updates", "step")}
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{file.path} does not tell of which average it is",
            remedy="Saves of runs with train.ema.width do; for others give --weights.",
        ) from error
    if found["width"] <= 0 or found["updates"] < 1:
        raise UserError(f"{file.path} tells of an average of width {found['width']:g} without updates")
    return found


def _refuse_other(file: TensorFile, last: TensorFile) -> None:
    differing = sorted(file.tensors.keys() ^ last.tensors.keys())
    if differing:
        raise UserError(
            f"{len(differing)} tensors are in only one of {file.path} and {last.path}, such as {differing[0]}",
            remedy="Only saves of one run, or of runs of the same settings, have a mean.",
        )
    shapes = [name for name, one in file.tensors.items() if one.shape != last.tensors[name].shape]
    if shapes:
        name = shapes[0]
        raise UserError(
            f"{name} is {file.tensors[name].shape} in {file.path} and {last.tensors[name].shape} in {last.path}",
            remedy="Adapters of different ranks are merged: burnish adapter merge.",
        )
    alphas = [name for name in file.tensors if name.endswith(".alpha")]
    other = [name for name in alphas if not torch.equal(file.read(name).float(), last.read(name).float())]
    if other or file.metadata.get("lora_adapter_metadata") != last.metadata.get("lora_adapter_metadata"):
        raise UserError(
            f"{file.path} and {last.path} have different alphas{f', such as that of {other[0]}' if other else ''}",
            remedy="Merge them instead: burnish adapter merge.",
        )


def _alike(name: str, files: Sequence[TensorFile]) -> Tensor:
    first, *rest = (file.read(name) for file in files)
    if any(not torch.equal(first, one) for one in rest):
        raise UserError(f"{name} is no floating number, and differs between {files[0].path} and others")
    return first
