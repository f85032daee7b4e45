"""What a training step costs besides what any loop must do, on the embedded model with cached data.

    python -m tools.benchmarks.step_overhead --steps 100 --batch-size 4 > overhead.json

Two loops take turns, a few steps each, on the same weights, adapters' sizes and batches: Burnish with all that a run
has beside its steps (drawing by seed, clipping, the check of the loss, status.json, metrics.sqlite), and a bare one
with adapters of three lines that draws noise, predicts, goes backward and updates. The processor's time is compared,
so that other programs count little; `overhead` is the median over the turns of (Burnish - bare) / bare, `spread` the
quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.adapters.lora import LoraLayer
from burnish.assembly import assemble
from burnish.config.load import load_config, to_yaml
from burnish.config.schema import RunConfig
from burnish.data.batch import Batch
from burnish.demo.command import ASSETS
from burnish.events import Events, Listener
from burnish.family import Family
from burnish.hardware import processor_name
from burnish.loop import Training, take, train_from
from burnish.preparation import Prepared, prepare
from burnish.run_folder import Recorder, RunFolder
from burnish.settling import UNPLANNED, with_memory
from burnish.signals import StopRequest

TURN = 5  # steps
CPU = torch.device("cpu")


class BareLora(nn.Module):
    """W x + B A x and nothing else: no dropout, no scale, no switch."""

    def __init__(self, layer: LoraLayer) -> None:
        super().__init__()
        self.base = layer.base
        self.a = nn.Parameter(layer.lora_A.detach().clone())
        self.b = nn.Parameter(layer.lora_B.detach() * layer.scale)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return output


@dataclass
class Bare:
    """The least that trains: a family whose adapters are bare, and an optimizer."""

    family: Family
    optimizer: torch.optim.Optimizer

    def step(self, batch: Batch) -> None:
        data = batch.latents_BCHW
        noise, t_B = torch.randn_like(data), torch.rand(len(data))
        column = t_B.view(-1, *(1,) * (data.dim() - 1))
        noisy = (1 - column) * data + column * noise
        loss = F.mse_loss(self.family.predict(noisy, t_B, batch.conditioning), noise - data)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def bared(run: Training, rate: float) -> Bare:
    """The same denoiser with a bare layer in the place of each adapter."""
    parameters: list[nn.Parameter] = []
    for denoiser in run.family.denoisers.values():
        for name, layer in list(denoiser.named_modules()):
            if isinstance(layer, LoraLayer):
                parent, _, child = name.rpartition(".")
                bare = BareLora(layer)
                denoiser.get_submodule(parent).register_module(child, bare)
                parameters += [bare.a, bare.b]
    return Bare(run.family, torch.optim.AdamW(parameters, lr=rate, fused=True))


def assembled_run(config: RunConfig, prepared: Prepared, folder: RunFolder, events: Events) -> Training:
    family = prepared.model.load("denoiser", dtype=torch.float32, device=CPU)
    resolved = to_yaml(config)
    return assemble(
        config, resolved, family, prepared, folder, CPU, torch.float32, events, StopRequest()
    ).training


def seconds(turn: Callable[[], None]) -> float:
    began = time.process_time()
    turn()
    return time.process_time() - began


def measure(config: RunConfig, folder: RunFolder, turns: int) -> list[tuple[float, float]]:
    """Processor seconds per step of Burnish and of the bare loop, turn by turn; the first turn is left out."""
    events = Events(Recorder(folder, config.train.steps), Listener())
    prepared = prepare(config, "benchmark", folder, CPU, torch.float32, Listener())
    real = assembled_run(config, prepared, folder, events)
    bare = bared(assembled_run(config, prepared, folder, events), config.train.optimizer.learning_rate)
    stream = take(real)
    batches = [next(stream) for _ in range(TURN)]  # what a data loader costs is not the loop's
    found = []
    for turn in range(turns + 1):

        def burnish(end: int = (turn + 1) * TURN) -> None:
            train_from(iter(batches), real, events, [], lambda: real.step >= end)

        def plain() -> None:
            for batch in batches:
                bare.step(batch)

        pair = [burnish, plain] if turn % 2 else [plain, burnish]
        taken = {one: seconds(one) / TURN for one in pair}
        found.append((taken[burnish], taken[plain]))
    return found[1:]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="of each loop")
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    turns = max(3, arguments.steps // TURN)
    with tempfile.TemporaryDirectory() as place:
        overrides = [
            f"save.folder={place}",
            f"train.steps={(turns + 1) * TURN}",
            f"train.batch_size={arguments.batch_size}",
            "sample.prompts=[]",
            "memory.compile=false",
        ]
        config = load_config(ASSETS / "demo.yaml", overrides=overrides).config
        config = with_memory(config, config.memory, UNPLANNED)
        config = config.model_copy(update={"data": config.data[:1]})
        taken = measure(config, RunFolder(Path(place) / "demo"), turns)
    ratios = [(burnish - bare) / bare for burnish, bare in taken]
    quartiles = statistics.quantiles(ratios, n=4)
    figures = {
        "burnish_ms": round(1e3 * statistics.median(burnish for burnish, _ in taken), 3),
        "bare_ms": round(1e3 * statistics.median(bare for _, bare in taken), 3),
        "overhead": round(statistics.median(ratios), 4),
        "spread": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "turns": turns,
        "steps_per_turn": TURN,
        "batch_size": arguments.batch_size,
        "torch": torch.__version__,
        "processor": processor_name(),
        "python": platform.python_version(),
    }
    json.dump(figures, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
