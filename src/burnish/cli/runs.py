"""`burnish run inspect`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from burnish.cli.edge import guarded
from burnish.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from burnish.run_folder import RunFolder, Status

app = typer.Typer(help="Look at runs.", no_args_is_help=True)

RATE_OVER_STEPS = 50


@dataclass(frozen=True, slots=True)
class AdapterFile:
    name: str
    mib: float
    verification: (
        dict[str, object] | None
    )  # what was measured when it was saved; None where nothing was noted


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    step: int
    mib: float
    verified: str  # "" where it was not asked for


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a run folder says."""

    folder: str
    name: str
    state: str
    phase: str
    message: str
    step: int
    steps: int
    heartbeat_age_s: float
    pid: int
    seconds_per_step: float | None
    last_loss: float | None
    best_step: int | None
    best_loss: float | None
    adapters: list[AdapterFile]
    checkpoints: list[CheckpointFolder]
    samples: int
    data: dict[str, int]  # pictures used, skipped, fixed; buckets


@app.callback()
def group() -> None:
    """Look at runs."""


@app.command("inspect")
@guarded
def inspect(
    run: Annotated[str, typer.Argument(help="A run folder, or the name of one in --runs.")],
    runs: Annotated[Path, typer.Option("--runs", help="Where run folders are.")] = Path("runs"),
    verify: Annotated[bool, typer.Option("--verify", help="Check every file of every checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say how a run stands, from its folder alone."""
    found = inspected(run_folder(run, runs), verify)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    for key, value in _rows(found):
        table.add_row(key, _plain(value))
    console.print(table)


def run_folder(run: str, runs: Path) -> Path:
    """The folder that a path or a name means.

    Raises:
        UserError: no run folder is there; names those that are.
    """
    candidates = [Path(run), runs / run]
    for candidate in candidates:
        if (candidate / "status.json").is_file():
            return candidate
    present = sorted(path.parent.name for path in runs.glob("*/status.json"))
    looked = " and ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise UserError(
        f"no run in {looked}: there is no status.json",
        remedy=f"Runs in {runs}: {', '.join(present) or 'none'}.",
    )


def inspected(path: Path, verify: bool = False) -> Inspection:
    """Read a run folder; nothing in it is changed.

    Raises:
        UserError: status.json or metrics.sqlite is damaged.
    """
    from burnish.run_folder import RunFolder

    folder = RunFolder(path)
    status = _status(folder)
    return Inspection(
        folder=str(path),
        name=path.resolve().name,
        state=status.shown_state,
        phase=status.phase,
        message=status.message,
        step=status.step,
        steps=status.steps,
        heartbeat_age_s=max(0.0, time.time() - status.heartbeat),
        pid=status.pid,
        seconds_per_step=_pace(folder) or status.seconds_per_step,
        last_loss=_last_loss(folder, status.loss),
        best_step=status.best_step,
        best_loss=status.best_loss,
        adapters=_adapters(folder, status),
        checkpoints=_checkpoints(folder, verify),
        samples=sum(path.name != "grid.png" for path in folder.samples.rglob("*.png")),
        data=_data_counts(folder),
    )


def _status(folder: RunFolder) -> Status:
    from burnish.run_folder import read_status

    try:
        return read_status(folder.status_file)
    except FileNotFoundError as error:
        raise UserError(f"no run in {folder.path}: there is no status.json") from error
    except OSError as error:
        raise UserError(f"{folder.status_file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{folder.status_file} is damaged, or a newer Burnish wrote it: {error}",
            remedy="Start the run again: it goes on from its last checkpoint and writes a new one.",
        ) from error


def _last_loss(folder: RunFolder, told: float | None) -> float | None:
    losses = _metric(folder, "loss")
    return losses[-1][1] if losses else told


def _pace(folder: RunFolder) -> float | None:
    """Mean seconds of the last steps."""
    recent = [value for _, value in _metric(folder, "seconds")[-RATE_OVER_STEPS:]]
    return sum(recent) / len(recent) if recent else None


def _metric(folder: RunFolder, key: str) -> list[tuple[int, float]]:
    import sqlite3

    try:
        return folder.metrics(key)
    except sqlite3.Error as error:
        raise UserError(f"{folder.metrics_file} cannot be read: {error}") from error


def _adapters(folder: RunFolder, status: Status) -> list[AdapterFile]:
    """Adapters; and denoisers, as single files and as parts of diffusers folders."""
    named = {file.name: file for file in sorted(folder.adapters.glob("*.safetensors"))}
    models = [
        *folder.models.glob("*.safetensors"),
        *(one.parent for one in folder.models.glob("*/*/config.json")),
    ]
    named |= {str(one.relative_to(folder.path)): one for one in sorted(models)}
    return [
        AdapterFile(
            name, _size(one) / 2**20, dict(status.adapters[name]) if name in status.adapters else None
        )
        for name, one in named.items()
    ]


def _size(place: Path) -> int:
    return sum(one.stat().st_size for one in (place.iterdir() if place.is_dir() else [place]))


def _checkpoints(folder: RunFolder, verify: bool) -> list[CheckpointFolder]:
    found = []
    for path in sorted(folder.checkpoints.glob("step-*")):
        digits = path.name.removeprefix("step-")
        if path.is_dir() and digits.isdecimal():
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) / 2**20
            found.append(CheckpointFolder(int(digits), size, _verification(path) if verify else ""))
    return found


def _verification(path: Path) -> str:
    from burnish.checkpoint.manifest import verify_folder

    try:
        verify_folder(path, "full")
    except CheckpointError as error:
        return error.message
    return "verified"


def _data_counts(folder: RunFolder) -> dict[str, int]:
    """Pictures used, skipped and fixed, by the data report; empty where there is none yet.

    Raises:
        UserError: the report is damaged.
    """
    if not folder.data_report.is_file():
        return {}
    try:
        report = json.loads(folder.data_report.read_text(encoding="utf-8"))
        sources = report["sources"]
        counts = {"pictures": int(report["used"])}
        counts |= {key: sum(len(source[key]) for source in sources) for key in ("skipped", "fixed")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.data_report} is damaged: {error!r}") from error
    return {**counts, "buckets": len(report.get("buckets", []))}


def _rows(found: Inspection) -> list[tuple[str, str]]:
    age = timedelta(seconds=round(found.heartbeat_age_s))
    state = f"{found.state} ({found.phase})" if found.phase else found.state
    if found.state == "lost":
        state = (
            f"lost: process {found.pid} is gone without a word; last heard {age} ago; start it again to go on"
        )
    rows = [("run", found.folder), ("state", state), ("step", f"{found.step} of {found.steps}")]
    if found.message:
        rows.append(("message", found.message))
    if found.state in ("preparing", "running"):
        rows.append(("process", f"{found.pid}, last heard {age} ago"))
    if found.seconds_per_step:
        left = timedelta(seconds=round(found.seconds_per_step * (found.steps - found.step)))
        rows.append(("rate", f"{1 / found.seconds_per_step:.2f} steps/s; {left} for the steps left"))
    if found.last_loss is not None:
        rows.append(("last loss", f"{found.last_loss:.5f}"))
    if found.best_step is not None and found.best_loss is not None:
        rows.append(("best", f"held-out loss {found.best_loss:.5f} at step {found.best_step}"))
    rows += [
        (
            "model" if adapter.name.startswith("models/") else "adapter",
            f"{adapter.name}  {adapter.mib:.1f} MiB  {_verified(adapter)}",
        )
        for adapter in found.adapters
    ]
    rows += [
        ("checkpoint", f"step {checkpoint.step}  {checkpoint.mib:.1f} MiB  {checkpoint.verified}".rstrip())
        for checkpoint in found.checkpoints
    ]
    if found.samples:
        rows.append(("samples", f"{found.samples} pictures"))
    if found.data:
        rows.append(("data", ", ".join(f"{count} {key}" for key, count in found.data.items())))
    return rows


def _verified(adapter: AdapterFile) -> str:
    from burnish.cli.progress import facts_text

    if adapter.verification is None:
        return "no verification noted"
    facts = facts_text(adapter.verification)
    return f"verified ({facts})" if facts else "verified"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
