"""How fast an adapter is made of two checkpoints: megabytes per second and the process' peak memory, in a new process.

    python -m tools.benchmarks.extract --depth 2 --rank 32
    python -m tools.benchmarks.extract --depth 2 --energy 0.95

The pair has the names and sizes of FLUX.1's layers in bfloat16, as many blocks of each kind as `--depth` says (2: two
files of 2.1 GB), and differs by a product of rank 16 and by noise in every matrix. `--narrow` divides all widths.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.families.registry import family_named
from burnish.randomness import torch_generator
from burnish.toolbox.extract import Extraction, extract
from burnish.toolbox.low_rank import RankChoice
from burnish.toolbox.stream import Planned, write_stream
from tools.benchmarks import harness
from tools.benchmarks.loader import peak_rss

FAMILY = "flux"
TRUE_RANK = 16
SHORTEST = 128  # sizes below this are channels, not widths


def write_pair(folder: Path, depth: int, narrow: int) -> tuple[Path, Path]:
    """A base and a tuned checkpoint, one tensor in memory at a time."""
    (denoiser,) = family_named(FAMILY).skeleton(depth).denoisers.values()
    shapes = {
        name: tuple(size // narrow if size > SHORTEST else size for size in one.shape)
        for name, one in denoiser.state_dict().items()
    }
    plan = [Planned(name, torch.bfloat16, shape) for name, shape in shapes.items()]

    def before(name: str) -> Tensor:
        return 0.02 * torch.randn(shapes[name], generator=torch_generator(0, name))

    def after(name: str) -> Tensor:
        weight, shape = before(name), shapes[name]
        if len(shape) > 1:
            generator = torch_generator(1, name)
            up = torch.randn(shape[0], TRUE_RANK, generator=generator)
            weight += 0.002 * up @ torch.randn(TRUE_RANK, shape[1], generator=generator)
        return weight

    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, make in zip(paths, (before, after), strict=True):
        write_stream(path, plan, {}, lambda name, make=make: make(name).bfloat16())  # type: ignore[misc]
    return paths


def measured(base: Path, tuned: Path, to: Path, rank: int | None, energy: float | None) -> dict[str, Any]:
    """In this process: seconds, rate, error and peak memory."""
    before, begun = peak_rss(), time.monotonic()
    outcome = extract(
        base, tuned, to, Extraction("lora", RankChoice(rank, energy)), family=FAMILY, force=True
    )
    seconds = time.monotonic() - begun
    read = base.stat().st_size + tuned.stat().st_size
    return {
        "modules": outcome.modules,
        "relative_error": outcome.losses.relative,
        "read_mb": read / 1e6,
        "seconds": seconds,
        "mb_per_s": read / 1e6 / seconds,
        "adapter_mb": to.stat().st_size / 1e6,
        "peak_rss_gb": peak_rss() / 1e9,
        "rss_before_gb": before / 1e9,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser_for(__doc__)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--narrow", type=int, default=1)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--energy", type=float)
    parser.add_argument("--here", type=Path, help="where a pair is already; for the process that is measured")
    options = parser.parse_args(arguments)
    rank = 32 if options.rank is None and options.energy is None else options.rank
    if options.here is not None:
        pair = options.here / "base.safetensors", options.here / "tuned.safetensors"
        print(json.dumps(measured(*pair, options.here / "out.safetensors", rank, options.energy)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder), options.depth, options.narrow)
        chosen = [f"--{key}={value}" for key, value in (("rank", rank), ("energy", options.energy)) if value]
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tools.benchmarks.extract",
            "--here",
            folder,
            *chosen,
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = json.loads(output.splitlines()[-1])
    harness.tell(
        torch.device("cpu"), {"depth": options.depth, "rank": rank, "energy": options.energy, **figures}
    )


if __name__ == "__main__":
    main()
