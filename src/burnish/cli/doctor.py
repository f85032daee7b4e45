"""`burnish doctor`: what the machine has, what is installed, what is wrong."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from burnish import __version__
from burnish.cli.edge import guarded
from burnish.errors import MachineError

if TYPE_CHECKING:
    from burnish import hardware

# Distribution and lowest version, as pyproject.toml says; a test compares the two.
REQUIRED = {
    "torch": "2.10",
    "diffusers": "0.42",
    "transformers": "5.0",
    "tokenizers": "0.22",
    "safetensors": "0.7",
    "huggingface_hub": "1.0",
    "accelerate": "1.10",
    "sentencepiece": "0.2",
    "protobuf": "5.0",
    "numpy": "2.0",
    "pillow": "11.0",
    "pydantic": "2.11",
    "ruamel.yaml": "0.18.10",
    "python-dotenv": "1.0",
    "typer": "0.16",
    "rich": "13.9",
    "psutil": "6.0",
    "nvidia-ml-py": "12.560",
    "jinja2": "3.1",
    "prodigyopt": "1.1.2",
    "matplotlib": "3.9",
    "av": "18.0",
    "ftfy": "6.3",
}
EXTRAS = {
    "ui": ("fastapi", "uvicorn", "nicegui", "sqlalchemy", "alembic"),
    "quant": ("torchao", "bitsandbytes", "gguf"),
    "optim": ("pytorch-optimizer", "prodigy-plus-schedule-free"),
    "fast": ("fastsafetensors",),
    "track": ("tensorboard", "wandb", "trackio"),
    "cloud": ("skypilot",),
}
LEAST_FREE_GIB = 2.0  # below it not even a small run with its checkpoints fits
OLDEST_PYTHON = (3, 11)


@dataclass
class Findings:
    """What doctor found; `wrong` is what keeps Burnish from working, `notes` is good to know."""

    burnish: str
    python: str
    system: str
    processor: str
    processors: int
    memory: hardware.HostMemory
    gpus: list[hardware.Gpu]
    torch: hardware.TorchDevices | None
    disks: dict[str, hardware.DiskSpace]
    packages: dict[str, str | None]
    missing_extras: dict[str, list[str]]
    recommended: dict[str, dict[str, str]] = field(default_factory=dict)  # by GPU: option and value
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@guarded
def doctor(
    runs: Annotated[Path, typer.Option("--runs", help="Where runs are to be written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what this machine has, what is missing and what is wrong. Exit code 3 when something is wrong."""
    found = examine(runs)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, default=str))
    else:
        _show(found)
    if found.wrong:
        raise typer.Exit(MachineError.exit_code)


def examine(runs: Path) -> Findings:
    """Look at everything; imports torch to ask it what it can use."""
    from burnish import hardware
    from burnish.compute import capabilities

    gpus, gpu_trouble = hardware.gpus()
    torch, torch_trouble = _torch()
    packages = {name: _installed(name) for name in REQUIRED}
    found = Findings(
        burnish=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=hardware.processor_name(),
        processors=hardware.usable_processors(),
        memory=hardware.host_memory(),
        gpus=gpus,
        torch=torch,
        disks={"runs": hardware.disk_space(runs), "cache": hardware.disk_space(_cache_folder())},
        packages=packages,
        missing_extras={
            extra: missing
            for extra, names in EXTRAS.items()
            if (missing := [name for name in names if _installed(name) is None])
        },
    )
    found.recommended = {
        gpu.uuid: {one.option: one.value for one in capabilities.recommendations(gpu)} for gpu in gpus
    }
    found.wrong += [trouble for trouble in (gpu_trouble, torch_trouble) if trouble]
    found.wrong += _package_troubles(packages) + _disk_troubles(found.disks)
    if sys.version_info < OLDEST_PYTHON:
        found.wrong.append(f"Python {found.python} is too old; install 3.11 or newer")
    _judge_gpus(found)
    return found


def _torch() -> tuple[hardware.TorchDevices | None, str]:
    from burnish import hardware

    try:
        return hardware.torch_devices(), ""
    except (ImportError, OSError) as error:
        return (
            None,
            f"torch cannot be imported: {error}; see https://pytorch.org for the build of your system",
        )


def _judge_gpus(found: Findings) -> None:
    from burnish.compute import capabilities

    found.notes += [note for gpu in found.gpus for note in capabilities.notes(gpu)]
    nvidia = [gpu for gpu in found.gpus if gpu.uuid != "apple"]
    if not found.gpus:
        found.notes.append("no GPU: the demo trains on the processor, larger models would take days")
    if found.torch is None or not nvidia or found.torch.is_cuda_ready:
        return
    if found.torch.cuda is None:
        found.wrong.append(
            f"{nvidia[0].name} is here, but torch {found.torch.version} is a build for the processor alone; "
            "install the CUDA build: see https://pytorch.org/get-started/locally"
        )
    elif os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        found.notes.append(
            f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides the GPU from torch"
        )
    else:
        found.wrong.append(
            f"torch {found.torch.version} for CUDA {found.torch.cuda} cannot use {nvidia[0].name} with driver "
            f"{nvidia[0].driver}; update the driver"
        )


def _package_troubles(packages: dict[str, str | None]) -> list[str]:
    troubles = []
    for name, found in packages.items():
        least = REQUIRED[name]
        if found is None:
            troubles.append(f"{name} is missing: pip install '{name}>={least}'")
        elif _release(found) < _release(least):
            troubles.append(f"{name} {found} is too old: pip install --upgrade '{name}>={least}'")
    return troubles


def _disk_troubles(disks: dict[str, hardware.DiskSpace]) -> list[str]:
    troubles = []
    for use, disk in disks.items():
        if not disk.is_writable:
            troubles.append(f"the {use} folder {disk.path} cannot be written")
        elif disk.free_gib < LEAST_FREE_GIB:
            troubles.append(f"the {use} folder {disk.path} has {disk.free_gib:.1f} GiB left; make space")
    return troubles


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    """The numbers before any suffix: `2.10.0a1+cu128` -> (2, 10, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _cache_folder() -> Path:
    return Path(os.environ.get("BURNISH_CACHE") or Path.home() / ".cache" / "burnish")


def _show(found: Findings) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    for key, value in _rows(found):
        table.add_row(key, escape(value))
    console.print(table)
    for text in found.notes:
        console.print(f"note: {text}", style="yellow", markup=False, soft_wrap=True)
    for text in found.wrong:
        console.print(f"wrong: {text}", style="bold red", markup=False, soft_wrap=True)
    if not found.wrong:
        console.print("nothing is wrong", style="green")


def _rows(found: Findings) -> list[tuple[str, str]]:
    from burnish.compute import capabilities

    rows = [
        ("burnish", f"{found.burnish} on Python {found.python}, {found.system}"),
        ("processor", f"{found.processor}, {found.processors} usable"),
        ("memory", f"{found.memory.total_gib:.1f} GiB, {found.memory.available_gib:.1f} GiB available"),
    ]
    for gpu in found.gpus:
        kind = "shared with the processor" if gpu.is_unified else f"{gpu.free_gib:.1f} GiB free"
        rows.append(
            (f"GPU {gpu.index}", f"{gpu.name}, {gpu.total_gib:.1f} GiB ({kind}), {gpu.driver}, {gpu.uuid}")
        )
    rows += capabilities.table(found.gpus)
    if found.torch:
        uses = (
            "CUDA" if found.torch.is_cuda_ready else "Metal" if found.torch.is_mps_ready else "the processor"
        )
        rows.append(("torch uses", uses))
    for use, disk in found.disks.items():
        rows.append((f"{use} folder", f"{disk.path}, {disk.free_gib:.1f} GiB free"))
    rows.append(
        ("packages", ", ".join(f"{name} {found or 'missing'}" for name, found in found.packages.items()))
    )
    for extra, names in found.missing_extras.items():
        rows.append(
            (f"extra {extra}", f"{', '.join(names)} missing; to have it: pip install 'burnish[{extra}]'")
        )
    return rows
