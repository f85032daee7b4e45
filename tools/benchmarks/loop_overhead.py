"""What the loop costs besides forward, backward and optimizer, on the embedded model with cached data.

    python tools/benchmarks/loop_overhead.py --steps 200 --batch-size 4

Two runs take turns in blocks on the same weights, batches, noise and times: the real loop with its listeners
(status.json, metrics.sqlite), and a bare loop that only predicts, goes backward, clips and updates. The figure is
(loop - bare) / loop of the medians over all steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from burnish.assembly import Assembled, assemble
from burnish.config.load import load_config, to_yaml
from burnish.config.schema import RunConfig
from burnish.data.batch import Batch
from burnish.demo.command import ASSETS
from burnish.events import Events, Listener, StepReport
from burnish.loop import Training, train
from burnish.preparation import Prepared, prepare
from burnish.run_folder import Recorder, RunFolder
from burnish.signals import StopRequest

BLOCK = 20  # steps per turn


class Times(Listener):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = time.perf_counter()

    def started(self, step: int, steps: int) -> None:
        self.last = time.perf_counter()

    def stepped(self, report: StepReport) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def assembled_run(config: RunConfig, prepared: Prepared, folder: RunFolder, events: Events) -> Assembled:
    family = prepared.model.load("denoiser", dtype=torch.float32, device="cpu")
    return assemble(
        config,
        to_yaml(config),
        family,
        prepared,
        folder,
        torch.device("cpu"),
        torch.float32,
        events,
        StopRequest(),
    )


def bare_steps(run: Training, batches: Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]) -> list[float]:
    """Seconds of each step that only does what must be done."""
    parameters, seconds = list(run.parameters.values()), []
    for batch, noise, t_B in batches:
        began = time.perf_counter()
        loss = run.objective.losses_at(run.family, batch, noise, t_B).mean()
        loss.backward()
        clip_grad_norm_(parameters, run.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return seconds


def drawn(run: Training, first: int, count: int) -> list[tuple[Batch, torch.Tensor, torch.Tensor]]:
    stream, rows = run.batches(first), []
    for _ in range(count):
        batch = next(stream)
        tokens = run.family.latents.tokens(batch.latents_BCHW.shape)
        rows.append(
            (
                batch,
                run.objective.draw_noise(batch, run.seed),
                run.objective.draw_times(batch, run.seed, tokens),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        overrides = [
            f"save.folder={place}",
            f"train.steps={arguments.steps}",
            f"train.batch_size={arguments.batch_size}",
            "sample.prompts=[]",
        ]
        config = load_config(ASSETS / "demo.yaml", overrides=overrides).config
        config = config.model_copy(update={"data": config.data[:1]})
        folder = RunFolder(Path(place) / "demo")
        times = Times()
        events = Events(Recorder(folder, arguments.steps), times)
        prepared = prepare(config, "benchmark", folder, torch.device("cpu"), torch.float32, Listener())
        real = assembled_run(config, prepared, folder, events).training
        bare = assembled_run(config, prepared, folder, events).training

        bare_seconds: list[float] = []
        for end in range(BLOCK, arguments.steps + 1, BLOCK):
            train(real, events, [], lambda end=end: real.step >= end)  # type: ignore[misc]
            bare_seconds += bare_steps(bare, iter(drawn(bare, end - BLOCK, BLOCK)))

    loop, base = (statistics.median(seconds[BLOCK:]) for seconds in (times.seconds, bare_seconds))
    print(f"steps {arguments.steps}, batch {arguments.batch_size}, torch threads {torch.get_num_threads()}")
    print(
        f"loop {loop * 1e3:.2f} ms, bare {base * 1e3:.2f} ms, overhead {(loop - base) / loop:.1%} of a step"
    )


if __name__ == "__main__":
    main()
