"""Train one run in children that are killed while they save, until one of them finishes; prints a line per child.

    python kill_often.py MODEL PICTURES OUTPUT KILLS SEED

A child is forked from this process, which has everything imported and no thread, so that forty starts take
seconds. Each is killed a random time after the first save it begins.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from runs import digest, last_checkpoint, run_config

import burnish.families.flux
from burnish.checkpoint.store import CheckpointStore
from burnish.config.schema import RunConfig
from burnish.events import Listener
from burnish.run import train_run

STEPS = 60


def config_for(model: Path, pictures: Path, output: Path) -> RunConfig:
    overrides = {
        "train.steps": STEPS,
        "train.ema": {"decay": 0.9},
        "method": {"rank": 8, "alpha": 4, "dropout": 0.1, "targets": "all"},
        "save": {"folder": str(output), "every": 1, "keep": 2, "dtype": "float32"},
        "memory": {"device": "cpu", "cache": "disk", "cache_folder": str(output / "cache")},
    }
    return run_config(model, pictures, output, overrides)


def child(config: RunConfig) -> None:
    train_run(config, progress=Listener())
    os._exit(0)


def kill_while_saving(pid: int, checkpoints: Path, delay_s: float) -> bool:
    """Kill `pid` so long after a save of its own shows; False if it ended before."""
    before = set(checkpoints.glob("*")) if checkpoints.exists() else set()
    while not (checkpoints.exists() and set(checkpoints.glob("*")) - before):
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.0005)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def main() -> None:
    model, pictures, output = (Path(argument) for argument in sys.argv[1:4])
    kills, seed = int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(1)
    config, chance = config_for(model, pictures, output), random.Random(seed)
    store = CheckpointStore(output / "tiny" / "checkpoints")
    for number in range(kills):
        pid = os.fork()
        if pid == 0:
            child(config)
        if not kill_while_saving(pid, store.folder, chance.uniform(0, 0.03)):
            print(f"ended before kill {number}")
            break
        loaded = store.load_newest(verify="full")
        print(f"killed: step {loaded.step if loaded else 0}", flush=True)
    if store.steps() == [] or store.steps()[-1] < STEPS:
        train_run(config, progress=Listener())
    print(f"finished: {digest(last_checkpoint(output))}")


if __name__ == "__main__":
    assert burnish.families.flux
    main()
