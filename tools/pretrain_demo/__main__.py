"""`python -m tools.pretrain_demo train|tune|export|evaluate|dataset`; see README.md beside this file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from .checker import WEIGHTS
from .evaluate import Sampling, evaluate
from .export import export, write_dataset
from .train import DenoiserRecipe, Log, train, tune

_ASSETS = Path("src/burnish/demo/assets")


def main() -> None:
    """Run one command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = _parser().parse_args()
    options.run(options)


def _train(options: argparse.Namespace) -> None:
    train(
        options.out,
        recipe=_recipe(options),
        vae_steps=options.vae_steps,
        checker_steps=options.checker_steps,
        pictures=options.pictures,
        device=torch.device(options.device),
        log=_log_to(options.out),
    )


def _tune(options: argparse.Namespace) -> None:
    recipe, log = _recipe(options), _log_to(options.out)
    tune(options.source, options.out, recipe=recipe, device=torch.device(options.device), log=log)


def _export(options: argparse.Namespace) -> None:
    print(f"{options.out}: {export(options.source, options.out) / 1e6:.2f} MB")


def _evaluate(options: argparse.Namespace) -> None:
    sampling = Sampling(options.steps, options.true_cfg_scale, options.text_length)
    report = evaluate(
        options.model,
        single=options.single,
        two=options.two,
        sampling=sampling,
        checker_weights=options.checker,
    )
    print(json.dumps(report, indent=2, default=dataclasses.asdict))


def _dataset(options: argparse.Namespace) -> None:
    print(f"{options.out}: {write_dataset(options.out)} pictures")


def _recipe(options: argparse.Namespace) -> DenoiserRecipe:
    names = [field.name for field in dataclasses.fields(DenoiserRecipe)]
    return DenoiserRecipe(**{name: getattr(options, name) for name in names})


def _log_to(folder: Path) -> Log:
    """Print every line and keep it in `log.txt`, with the seconds since the start."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def log(line: str) -> None:
        stamped = f"[{time.monotonic() - start:7.1f} s] {line}"
        print(stamped, flush=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(stamped + "\n")

    return log


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_demo", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("train", help="everything from nothing, on settled scenes")
    command.add_argument("--out", type=Path, required=True, help="folder for the float32 pipeline")
    command.add_argument("--vae-steps", type=int, default=4540)
    command.add_argument("--checker-steps", type=int, default=1000)
    command.add_argument("--pictures", type=int, default=100_000, help="drawn for the VAE and the checker")
    _add_recipe(command, steps=12_000, batch=384, scenes=600_000, two_share=0.4, text_rate=1.0)
    command.set_defaults(run=_train)

    command = commands.add_parser("tune", help="go on from a pipeline folder")
    command.add_argument("--from", dest="source", type=Path, required=True, help="pipeline folder")
    command.add_argument("--out", type=Path, required=True, help="folder for the float32 pipeline")
    _add_recipe(command)
    command.set_defaults(run=_tune)

    command = commands.add_parser("export", help="write the float16 folder that ships")
    command.add_argument("--from", dest="source", type=Path, required=True, help="float32 pipeline folder")
    command.add_argument("--out", type=Path, default=_ASSETS / "model")
    command.set_defaults(run=_export)

    usual = Sampling()
    command = commands.add_parser("evaluate", help="print the figures as JSON")
    command.add_argument("--model", type=Path, default=_ASSETS / "model")
    command.add_argument("--checker", type=Path, default=WEIGHTS)
    command.add_argument("--single", type=int, default=200)
    command.add_argument("--two", type=int, default=100)
    command.add_argument("--steps", type=int, default=usual.steps)
    command.add_argument("--true-cfg-scale", type=float, default=usual.true_cfg_scale)
    command.add_argument("--text-length", type=int, default=usual.text_length)
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("dataset", help='draw the pictures of "a sks robot"')
    command.add_argument("--out", type=Path, default=_ASSETS / "dataset")
    command.set_defaults(run=_dataset)
    return parser


def _add_recipe(command: argparse.ArgumentParser, **changed: Any) -> None:
    """One option per field of the recipe, and the device."""
    for field in dataclasses.fields(DenoiserRecipe):
        default = changed.get(field.name, field.default)
        command.add_argument("--" + field.name.replace("_", "-"), type=type(default), default=default)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
