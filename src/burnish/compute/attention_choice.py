"""Which attention kernel a run takes: by measurement at its own calls, or as it is told.

What was measured is kept on disk by machine, versions and calls.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from burnish.atomic import atomic_write_json
from burnish.compute.attention import Attention, Call, Kind, Rule
from burnish.compute.attention_kernels import FOR_SAMPLING, REGISTERED, BackEnd, back_ends, unavailable
from burnish.compute.attention_probe import Measured, measure_one, to_json
from burnish.errors import MachineError

_log = logging.getLogger(__name__)
_FORMAT = 1  # of what is kept on disk
_GAIN = 0.03  # what a kernel must be faster than torch's own to take its place
_NO_ROOM = "out of memory"  # in what CUDA says
_PATIENCE_S = 300.0  # for one process; cuDNN and Triton compile a kernel per shape


def choose(wanted: str, calls: Callable[[], Sequence[Call]], device: torch.device, folder: Path) -> Attention:
    """The kernels for these calls: those wanted, or the fastest right ones.

    Args:
        wanted: a back end, or `auto`: torch's own on a CPU, by measurement on a GPU.
        calls: gives the largest of each kind, as `attention.recorded` collects them; asked only if need be.
        folder: results are kept below it.

    Raises:
        MachineError: what is wanted is not there, or answers none of these calls rightly.
    """
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return Attention()
    there = {name: unavailable(name, device) for name in back_ends()}
    if wanted != "auto":
        trouble = there[_named(wanted)]
        if trouble:
            usable = ", ".join(name for name, why in there.items() if not why)
            raise MachineError(
                f"memory.attention is {wanted}, which cannot be used here: {trouble}",
                remedy=f"Install it, or choose one that is here: auto, {usable}.",
            )
    # Math holds all scores at once: a reference, and never the fastest.
    excluded = FOR_SAMPLING | {"math"}
    names = (
        [name for name, why in there.items() if not why and name not in excluded]
        if wanted == "auto"
        else [_named(wanted)]
    )
    measured = measure(calls(), names, device, folder)
    for one in measured:
        _log.info("attention, %s: %s", one.kind, _told(one, measured))
    return decide(wanted, measured)


def decide(wanted: str, measured: Sequence[Measured]) -> Attention:
    """Rules from measurements: the wanted kernel where it is right, or the fastest where it gains enough.

    Raises:
        MachineError: the wanted kernel answers no call.
    """
    good = [one for one in measured if not one.trouble]
    if wanted != "auto":
        rules = [Rule(one.kind, one.back_end) for one in good if one.back_end == wanted]
        if not rules:
            reasons = "; ".join(f"{one.kind}: {one.trouble}" for one in measured if one.back_end == wanted)
            raise MachineError(
                f"memory.attention is {wanted}, which answers no call of this model ({reasons})",
                remedy="Set memory.attention: auto.",
            )
        return Attention((), rules) if wanted in FOR_SAMPLING else Attention(rules)
    good = _with_one_flash(good)
    rules = []
    for kind in dict.fromkeys(one.kind for one in good):
        rivals = [one for one in good if one.kind == kind]
        own = next((one.seconds for one in rivals if one.back_end == "torch"), float("inf"))
        best = min(rivals, key=lambda one: one.seconds)
        if best.seconds < (1 - _GAIN) * own:
            rules.append(Rule(kind, best.back_end))
    return Attention(rules)


def _with_one_flash(measured: Sequence[Measured]) -> list[Measured]:
    """Flash kernels stand in one place in torch: only the one that is fastest on the first kind, the largest, stays."""
    flashes = [one for one in measured if one.back_end in (*REGISTERED, "flash")]
    if not flashes:
        return list(measured)
    first = [one for one in flashes if one.kind == flashes[0].kind]
    stays = min(first, key=lambda one: one.seconds).back_end
    dropped = {one.back_end for one in flashes} - {stays}
    if stays in REGISTERED:
        dropped.add("flash")
    return [one for one in measured if one.back_end not in dropped]


def _named(wanted: str) -> BackEnd:
    return next(name for name in back_ends() if name == wanted)


def _told(one: Measured, measured: Sequence[Measured]) -> str:
    if one.trouble:
        return f"{one.back_end} left out, {one.trouble}"
    own = [m.seconds for m in measured if m.kind == one.kind and m.back_end == "torch" and not m.trouble]
    ratio = f" ({own[0] / one.seconds:.2f}x torch's own)" if own and one.back_end != "torch" else ""
    return f"{one.back_end} {one.seconds * 1e3:.3f} ms{ratio}, error {one.error:.1e}"


def measure(
    calls: Sequence[Call], names: Sequence[BackEnd], device: torch.device, folder: Path
) -> list[Measured]:
    """Each kernel on each call, the largest call first; from disk where this machine has measured it before."""
    calls = sorted(calls, key=lambda call: -call.size)
    place = folder / "measured" / f"attention-{_fingerprint(calls, names, device)}.json"
    known = _read(place, calls)
    if known is not None:
        return known
    pairs = [(call, name) for call in calls for name in names]
    if device.type == "cuda":
        measured = list(measure_apart(pairs, device))
    else:
        measured = [measure_one(call, name, device) for call, name in pairs]
    if any(_NO_ROOM in one.trouble for one in measured):
        return measured  # another time there may be room: not to be remembered
    rows: Any = [{**asdict(one), "kind": calls_index(calls, one.kind)} for one in measured]
    place.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(place, rows)
    return measured


def calls_index(calls: Sequence[Call], kind: Kind) -> int:
    return next(index for index, call in enumerate(calls) if call.kind == kind)


def _read(place: Path, calls: Sequence[Call]) -> list[Measured] | None:
    try:
        rows = json.loads(place.read_text(encoding="utf-8"))
        return [Measured(**{**row, "kind": calls[row["kind"]].kind}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None  # not there, or written by something else: measured anew


def _fingerprint(calls: Sequence[Call], names: Sequence[str], device: torch.device) -> str:
    """Of all that a measurement depends on."""
    machine: list[object] = [_FORMAT, torch.__version__, device.type]
    if device.type == "cuda":
        machine += [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
        machine += [torch.version.cuda, torch.backends.cudnn.version()]  # type: ignore[no-untyped-call]
    packages = [
        _version(name) for name in ("triton", "flash-attn-3", "flash-attn-4", "flash_attn", "sageattention")
    ]
    text = repr((machine, packages, [asdict(call) for call in calls], list(names)))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def measure_apart(
    pairs: Sequence[tuple[Call, BackEnd]],
    device: torch.device,
    command: Sequence[str] = (sys.executable, "-m", "burnish.compute.attention_probe"),
) -> Iterator[Measured]:
    """Measure in other processes; one that dies or hangs is blamed on the pair it was at, the next goes on behind."""
    left = list(pairs)
    while left:
        answers, trouble = _ask(left, device, command)
        for (call, name), answer in zip(left, answers, strict=False):
            yield Measured(call.kind, name, **answer)
        left = left[len(answers) :]
        if left:
            call, name = left.pop(0)
            yield Measured(call.kind, name, trouble=trouble)


def _ask(
    pairs: Sequence[tuple[Call, BackEnd]], device: torch.device, command: Sequence[str]
) -> tuple[list[dict[str, Any]], str]:
    question = {"device": str(device), "pairs": [[to_json(call), name] for call, name in pairs]}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
        output, trouble = done.stdout, _ending(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        trouble = f"no answer in {_PATIENCE_S:.0f} s"
    lines = [line for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    return [json.loads(line) for line in lines], trouble


def _ending(code: int, errors: str) -> str:
    last = errors.strip().splitlines()[-1:] or [""]
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with code {code}: {last[0][:200]}"
