"""How fast weights come from disk: megabytes per second and the process' peak memory, each time in a new process.

    python -m tools.benchmarks.loader --gib 4 --repeats 3
    python -m tools.benchmarks.loader --gib 4 --shrink int8 --device cuda

`burnish` is `load_module` on a checkpoint of bfloat16 blocks in four files; `one by one` copies the same tensors in one
thread. `cold`: the page cache was told to forget the files (Linux); the disk may still remember them.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from burnish.families.weights import layout_of, load_module
from burnish.memory.shrinking import shrink_of
from tools.benchmarks import harness

FILES = 4
READERS = ("one by one", "burnish")


class Checkpoint(nn.Module):
    """Blocks of the sizes of FLUX.1's: two square layers, and one that is four times as wide."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4 * width))
            for _ in range(depth)
        )


def written(folder: Path, width: int, depth: int) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in Checkpoint(width, depth).state_dict().items()}
    drawn = torch.randn(4 * width * width, generator=generator).bfloat16()
    files = []
    for number in range(FILES):
        inside = [name for name in shapes if int(name.split(".")[1]) % FILES == number]
        tensors = {name: drawn[: shapes[name].numel()].reshape(shapes[name]).clone() for name in inside}
        files.append(folder / f"model-{number}.safetensors")
        save_file(tensors, files[-1])
    return files


def forget(files: Sequence[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def peak_rss() -> int:
    """Bytes that this process held at most, mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # `getrusage` would count the parent's memory, too
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load_once(question: dict[str, Any]) -> dict[str, Any]:
    """One load in this process."""
    files, device = [Path(name) for name in question["files"]], torch.device(question["device"])
    dtype = getattr(torch, question["dtype"])
    if device.type == "cuda":
        torch.zeros(1, device=device)
    before = peak_rss()
    began = time.perf_counter()
    if question["reader"] == "burnish":
        module = load_module(
            lambda: Checkpoint(question["width"], question["depth"]),
            layout_of(files),
            dtype=dtype,
            device=device,
            what="checkpoint",
            shrink=shrink_of(question["shrink"], None),
            blocks=lambda one: list(one.get_submodule("blocks").children()),
        )
        kept = list(module.state_dict().values())
    else:
        kept = []
        for file in files:
            with safe_open(file, framework="pt", device="cpu") as stored:
                kept += [stored.get_tensor(name).to(device, dtype, copy=True) for name in stored.keys()]  # noqa: SIM118
    harness.wait(device)
    taken = time.perf_counter() - began
    size = sum(file.stat().st_size for file in files)
    held = sum(one.nbytes for one in kept)
    return {"mb_per_s": size / taken / 1e6, "peak_bytes": peak_rss() - before, "kept_bytes": held}


def measured(question: dict[str, Any], *, cold: bool, repeats: int) -> dict[str, Any]:
    """Medians over processes of their own."""
    found = []
    for _ in range(repeats):
        if cold:
            forget([Path(name) for name in question["files"]])
        told = subprocess.run(
            [sys.executable, "-m", "tools.benchmarks.loader", "--once", json.dumps(question)],
            check=True,
            capture_output=True,
            text=True,
        )
        found.append(json.loads(told.stdout))
    medians = {name: round(statistics.median(one[name] for one in found)) for name in found[0]}
    return {"reader": question["reader"], "cache": "cold" if cold else "warm", **medians}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser_for(__doc__)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--shrink", default="native", choices=("native", "fp8", "int8", "nf4", "int4"))
    parser.add_argument(
        "--folder", type=Path, help="where the files are written for the time, on the disk to measure"
    )
    parser.add_argument("--once", help="a load in this process, for the benchmark itself")
    told = parser.parse_args(arguments)
    if told.once is not None:
        print(json.dumps(load_once(json.loads(told.once))))
        return
    depth = max(FILES, round(told.gib * 2**30 / (12 * told.width**2)))  # 6 w^2 numbers of 2 bytes
    with tempfile.TemporaryDirectory(dir=told.folder) as place:
        files = written(Path(place), told.width, depth)
        rows = []
        for cold in (True, False) if hasattr(os, "posix_fadvise") else (False,):
            for reader in READERS if told.shrink == "native" else READERS[1:]:
                question = {"files": [str(file) for file in files], "reader": reader, "device": told.device}
                question |= {"dtype": told.dtype, "shrink": told.shrink, "width": told.width, "depth": depth}
                rows.append(measured(question, cold=cold, repeats=told.repeats))
        size = sum(file.stat().st_size for file in files)
    options = {"dtype": told.dtype, "weights": told.shrink}
    harness.tell(torch.device(told.device), {"file_bytes": size, "rows": rows, **options})


if __name__ == "__main__":
    main()
