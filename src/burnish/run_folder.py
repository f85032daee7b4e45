"""The run folder: everything a run leaves, and all that a page or `burnish run inspect` reads.

runs/NAME/
  config.yaml        the resolved config
  plan.json          memory settings of the last start, predicted and measured peaks
  status.json        state, step, pid and its create time, heartbeat; replaced atomically
  metrics.sqlite     metrics(step, key, value)
  data_report.json   every picture skipped or fixed, buckets, captions
  checkpoints/       what a resume reads
  adapters/          NAME-00000250.safetensors per save, NAME.safetensors at the end
  models/            in their place the denoisers themselves, where these are trained
  samples/           pictures drawn on the way, and a grid
  logs/              one file per start
"""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from pydantic import Field, TypeAdapter, ValidationError

from burnish.atomic import atomic_write_text, cannot_write, sweep
from burnish.errors import DiskFull
from burnish.events import Listener, RunResult, StepReport

_log = logging.getLogger(__name__)

State = Literal["preparing", "running", "done", "stopped", "failed"]
HEARTBEAT_S = 5.0
ROWS_KEPT = 10_000  # of metrics that the disk does not take; the oldest go first


@dataclass(frozen=True, slots=True)
class Status:
    """The content of status.json."""

    state: State
    phase: str
    step: int
    steps: int
    pid: Annotated[int, Field(gt=0)]
    pid_created: float  # with the pid, tells this process from a later one with the same number
    heartbeat: float  # seconds since 1970
    started: float
    loss: float | None = None
    seconds_per_step: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    message: str = ""
    adapters: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # file name -> verification

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote this is still there."""
        try:
            created = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            return False
        return abs(created - self.pid_created) < 1.0

    @property
    def shown_state(self) -> str:
        """The state to believe: `lost` where the process is gone without having said so."""
        if self.state in ("preparing", "running") and not self.is_alive:
            return "lost"
        return self.state


_STATUS = TypeAdapter(Status)


def read_status(file: Path) -> Status:
    """The content of a status.json.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or a newer Burnish wrote it.
    """
    content = file.read_bytes()
    try:
        status = _STATUS.validate_json(content)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip() for one in error.errors()]
        raise ValueError("; ".join(wrong[:3])) from error
    unknown = json.loads(content).keys() - {one.name for one in fields(Status)}
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    return status


class RunFolder:
    """Names of the files in a run folder, and readers for them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.sqlite"

    @property
    def data_report(self) -> Path:
        return self.path / "data_report.json"

    @property
    def plan(self) -> Path:
        """What the last start chose for memory, and what it foresaw."""
        return self.path / "plan.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def models(self) -> Path:
        """Trained denoisers: NAME/transformer as a part of a diffusers model, NAME.safetensors as a single file."""
        return self.path / "models"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def make(self) -> None:
        """Raises:
        DiskFull: a folder cannot be made.
        """
        for folder in (self.checkpoints, self.adapters, self.samples, self.logs):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(error, folder) from error

    def status(self) -> Status | None:
        """What status.json says; None where no run has begun, or, with a warning, where it says nothing readable.

        A run can go on without it: what it trains from is in the checkpoints.
        """
        try:
            return read_status(self.status_file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("%s is passed over, as damaged or of a newer Burnish: %s", self.status_file, error)
            return None

    def metrics(self, key: str, since_step: int = 0) -> list[tuple[int, float]]:
        """(step, value) of one key, by step; empty where nothing was written."""
        if not self.metrics_file.exists():
            return []
        with closing(sqlite3.connect(f"file:{self.metrics_file}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "SELECT step, value FROM metrics WHERE key = ? AND step >= ? ORDER BY step", (key, since_step)
            )
            return [(int(step), float(value)) for step, value in rows]


class Metrics:
    """Writer of metrics.sqlite: one row per step and key; a resumed step replaces its row."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=30, check_same_thread=False)
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS metrics (step INTEGER NOT NULL, key TEXT NOT NULL, "
                "value REAL NOT NULL, PRIMARY KEY (key, step)) WITHOUT ROWID"
            )
            self._database.commit()
        except sqlite3.Error:
            self._database.close()
            raise

    def write(self, rows: Sequence[tuple[int, str, float]], forget_after: int | None = None) -> None:
        """All of it or, where this raises, nothing.

        Args:
            forget_after: drop first what is there beyond this step, the checkpoint that a run resumes from.

        Raises:
            sqlite3.Error: the disk did not take it.
        """
        with self._database:
            if forget_after is not None:
                self._database.execute("DELETE FROM metrics WHERE step > ?", (forget_after,))
            self._database.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()


class Recorder(Listener):
    """Writes a run's events into its folder: status.json about once in five seconds, metrics in groups.

    Once a run has begun, a disk that takes neither does not end it: that is told once, and tried again at the
    next write.

    Raises:
        DiskFull: at the very start, the folder or its status.json cannot be written.
    """

    def __init__(self, folder: RunFolder, steps: int) -> None:
        folder.make()
        for place in (folder.path, folder.adapters, folder.samples, *_below(folder.models)):
            sweep(place)  # what a killed process was writing
        self._folder = folder
        self._metrics: Metrics | None = None
        self._rows: list[tuple[int, str, float]] = []
        self._forget_after: int | None = None
        self._failing: set[Path] = set()
        self._status = _beginning(folder.status(), steps)
        self._written = time.time()
        self._write_status()
        self._attempt(folder.metrics_file, self._write_metrics)

    def phase(self, name: str, done: int, total: int) -> None:
        self._update(urgent=name != self._status.phase, phase=name)

    def started(self, step: int, steps: int) -> None:
        self._rows = [row for row in self._rows if row[0] <= step]
        self._forget_after = step if self._forget_after is None else min(step, self._forget_after)
        status = self._status
        if status.best_step is not None and status.best_step > step:
            self._status = replace(status, best_step=None, best_loss=None)  # it is trained again
        self._update(urgent=True, state="running", phase="training", step=step, steps=steps)

    def stepped(self, report: StepReport) -> None:
        values = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "seconds": report.seconds,
            "memory_gib": report.memory_gib,
            "accuracy": report.accuracy,
        }
        for key, value in values.items():
            self._add(report.step, key, value)
        loss = report.loss if math.isfinite(report.loss) else None
        self._update(step=report.step, loss=loss, seconds_per_step=report.seconds)

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        self._add(step, "validation_loss", loss)
        if is_best and math.isfinite(loss):
            self._update(urgent=True, best_step=step, best_loss=loss)

    def saved(self, step: int, checkpoint: Path, adapter: Path, facts: Mapping[str, object]) -> None:
        folder = self._folder
        name = adapter.name if adapter.parent == folder.adapters else str(adapter.relative_to(folder.path))
        self._update(urgent=True, adapters={**self._status.adapters, name: dict(facts)})

    def finished(self, result: RunResult) -> None:
        state: State = (
            "done" if result.state == "done" else "stopped" if result.state == "stopped" else "failed"
        )
        if result.best_step is not None:
            self._status = replace(self._status, best_step=result.best_step, best_loss=result.best_loss)
        self._update(urgent=True, state=state, phase="", step=result.step, message="; ".join(result.notes))
        self._close_metrics()

    def _add(self, step: int, key: str, value: float | None) -> None:
        if value is not None and math.isfinite(value):  # SQLite has no NaN
            self._rows.append((step, key, value))

    def _update(self, *, urgent: bool = False, **changes: Any) -> None:
        self._status = replace(self._status, **changes)
        if urgent or time.time() - self._written > HEARTBEAT_S:
            self._write()

    def _write(self) -> None:
        self._written = time.time()
        self._status = replace(self._status, heartbeat=self._written)
        self._attempt(self._folder.metrics_file, self._write_metrics)
        self._attempt(self._folder.status_file, self._write_status)

    def _attempt(self, file: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except (sqlite3.Error, DiskFull) as error:
            if file not in self._failing:
                _log.warning("%s is not up to date; the run goes on, and it is tried again: %s", file, error)
            self._failing.add(file)
        else:
            self._failing.discard(file)

    def _write_status(self) -> None:
        atomic_write_text(self._folder.status_file, json.dumps(asdict(self._status), indent=1))

    def _write_metrics(self) -> None:
        try:
            if self._metrics is None:
                self._metrics = Metrics(self._folder.metrics_file)
            if self._rows or self._forget_after is not None:
                self._metrics.write(self._rows, self._forget_after)
        except sqlite3.Error:
            self._close_metrics()  # after an I/O error only a new connection is sure to work
            del self._rows[:-ROWS_KEPT]
            raise
        self._rows.clear()
        self._forget_after = None

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            with suppress(sqlite3.Error):  # what is written is in the file or in its journal
                self._metrics.close()
            self._metrics = None


def _below(models: Path) -> list[Path]:
    return [models, *(one for one in models.iterdir() if one.is_dir())] if models.is_dir() else []


def _beginning(before: Status | None, steps: int) -> Status:
    """The status of this process's run, which goes on from what an earlier start in the same folder reached."""
    now = time.time()
    process = psutil.Process(os.getpid())
    return Status(
        state="preparing",
        phase="starting",
        step=before.step if before else 0,
        steps=steps,
        pid=process.pid,
        pid_created=process.create_time(),
        heartbeat=now,
        started=now,
        best_step=before.best_step if before else None,
        best_loss=before.best_loss if before else None,
        adapters=before.adapters if before else {},
    )
