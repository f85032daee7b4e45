"""The run folder: everything a run leaves, and all that a page or `burnish run inspect` reads.

runs/NAME/
  config.yaml        the resolved config
  status.json        state, step, pid and its create time, heartbeat; replaced atomically
  metrics.sqlite     metrics(step, key, value)
  data_report.json   every picture skipped or fixed, buckets, captions
  checkpoints/       what a resume reads
  adapters/          NAME-00000250.safetensors per save, NAME.safetensors at the end
  samples/           pictures drawn on the way, and a grid
  logs/              one file per start
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from burnish.atomic import atomic_write_text, sweep
from burnish.events import Listener, RunResult, StepReport

State = Literal["preparing", "running", "done", "stopped", "failed"]
HEARTBEAT_S = 5.0


@dataclass(frozen=True, slots=True)
class Status:
    """The content of status.json."""

    state: State
    phase: str
    step: int
    steps: int
    pid: int
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
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def make(self) -> None:
        for folder in (self.checkpoints, self.adapters, self.samples, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def status(self) -> Status | None:
        """What status.json says, or None where no run has begun."""
        try:
            values = json.loads(self.status_file.read_text())
        except FileNotFoundError:
            return None
        return Status(**values)

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
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS metrics "
            "(step INTEGER NOT NULL, key TEXT NOT NULL, value REAL NOT NULL, PRIMARY KEY (key, step)) WITHOUT ROWID"
        )
        self._database.commit()

    def write(self, rows: Sequence[tuple[int, str, float]]) -> None:
        self._database.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)", rows)
        self._database.commit()

    def forget_after(self, step: int) -> None:
        """Drop what a run wrote beyond the checkpoint it now resumes from."""
        self._database.execute("DELETE FROM metrics WHERE step > ?", (step,))
        self._database.commit()

    def close(self) -> None:
        self._database.close()


class Recorder(Listener):
    """Writes a run's events into its folder: status.json about once in five seconds, metrics in groups."""

    def __init__(self, folder: RunFolder, steps: int) -> None:
        folder.make()
        for place in (folder.path, folder.adapters, folder.samples):
            sweep(place)  # what a killed process was writing
        self._folder = folder
        self._metrics = Metrics(folder.metrics_file)
        self._rows: list[tuple[int, str, float]] = []
        now = time.time()
        process = psutil.Process(os.getpid())
        self._status = Status(
            state="preparing",
            phase="starting",
            step=0,
            steps=steps,
            pid=process.pid,
            pid_created=process.create_time(),
            heartbeat=now,
            started=now,
        )
        self._written = 0.0
        self._write()

    def phase(self, name: str, done: int, total: int) -> None:
        self._update(urgent=name != self._status.phase, phase=name)

    def started(self, step: int, steps: int) -> None:
        self._metrics.forget_after(step)
        self._update(urgent=True, state="running", phase="training", step=step, steps=steps)

    def stepped(self, report: StepReport) -> None:
        step = report.step
        self._rows += [
            (step, "loss", report.loss),
            (step, "grad_norm", report.grad_norm),
            (step, "learning_rate", report.learning_rate),
            (step, "seconds", report.seconds),
        ]
        if report.memory_gib is not None:
            self._rows.append((step, "memory_gib", report.memory_gib))
        self._update(step=step, loss=report.loss, seconds_per_step=report.seconds)

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        self._rows.append((step, "validation_loss", loss))
        if is_best:
            self._update(urgent=True, best_step=step, best_loss=loss)

    def saved(self, step: int, checkpoint: Path, adapter: Path, facts: Mapping[str, object]) -> None:
        self._update(urgent=True, adapters={**self._status.adapters, adapter.name: dict(facts)})

    def finished(self, result: RunResult) -> None:
        state: State = (
            "done" if result.state == "done" else "stopped" if result.state == "stopped" else "failed"
        )
        self._update(urgent=True, state=state, phase="", step=result.step, message="; ".join(result.notes))
        self._metrics.close()

    def _update(self, *, urgent: bool = False, **changes: Any) -> None:
        self._status = replace(self._status, **changes)
        if urgent or time.time() - self._written > HEARTBEAT_S:
            self._write()

    def _write(self) -> None:
        if self._rows:
            self._metrics.write(self._rows)
            self._rows.clear()
        self._written = time.time()
        self._status = replace(self._status, heartbeat=self._written)
        atomic_write_text(self._folder.status_file, json.dumps(asdict(self._status), indent=1))
