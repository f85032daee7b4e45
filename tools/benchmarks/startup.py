"""How long a run takes from the start of its process to the end of its first step, with nothing and with all cached.

    python -m tools.benchmarks.startup flux.yaml
    python -m tools.benchmarks.startup            # the embedded demo's own pictures

The run is made twice, each in a new process that is told to stop after its first step, without samples. The first
fills the caches (latents, captions, plans, smaller weights, kernels), the second finds them. `until` has seconds since
the process began at which each phase began and the step was done.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from burnish.config.load import load_config
from burnish.demo.command import ASSETS
from burnish.errors import Interrupted
from burnish.events import Listener, StepReport
from burnish.run import train_run
from tools.benchmarks import harness


class Timeline(Listener):
    """Seconds from the start of the process to the beginning of each phase."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.until: dict[str, float] = {}

    def note(self, name: str) -> None:
        self.until.setdefault(name, round(time.time() - self.began, 3))

    def phase(self, name: str, done: int, total: int) -> None:
        self.note(name)

    def started(self, step: int, steps: int) -> None:
        self.note("training")

    def stepped(self, report: StepReport) -> None:
        self.note("first step")
        signal.raise_signal(signal.SIGINT)  # the run saves and ends


def run_once(question: dict[str, Any]) -> dict[str, float]:
    """One run in this process."""
    timeline = Timeline(question["began"])
    timeline.note("imports")
    config = load_config(question["config"], overrides=question["overrides"]).config
    if question["real_data_only"]:
        config = config.model_copy(update={"data": config.data[:1]})
    with suppress(Interrupted):
        train_run(config, progress=timeline)
    return timeline.until


def started(question: dict[str, Any]) -> dict[str, float]:
    question = {**question, "began": time.time()}
    told = subprocess.run(
        [sys.executable, "-m", "tools.benchmarks.startup", "--once", json.dumps(question)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser_for(__doc__)
    parser.add_argument("config", nargs="?", help="of any run; the embedded demo if left out")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--once", help="a run in this process, for the benchmark itself")
    told = parser.parse_args(arguments)
    if told.once is not None:
        print(json.dumps(run_once(json.loads(told.once))))
        return
    with tempfile.TemporaryDirectory() as place:
        found = {}
        for name in ("first", "cached"):
            overrides = [f"name={name}", f"save.folder={place}/runs", f"memory.cache_folder={place}/cache"]
            overrides += ["memory.cache=disk", "sample.prompts=[]", *told.override]
            question = {"config": told.config or str(ASSETS / "demo.yaml"), "overrides": overrides}
            found[name] = started({**question, "real_data_only": told.config is None})
    seconds = {f"{name}_seconds": until["first step"] for name, until in found.items()}
    harness.tell(torch.device(told.device), {**seconds, "until": found, "config": told.config or "demo"})


if __name__ == "__main__":
    main()
