"""doctor: what the machine has, what is missing, what is wrong."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch
from typer.testing import CliRunner

from burnish import hardware
from burnish.cli.doctor import EXTRAS, REQUIRED, examine
from burnish.cli.main import app

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
GIB = 2**30


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def set_driver(
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    memory: tuple[int, int] | pynvml.NVMLError | None,
    capability: tuple[int, int] | None = (8, 9),
) -> None:
    """Answer for NVIDIA's driver: GPUs by name, each with (total, free) bytes or the error NVML raises."""

    def memory_info(handle: int) -> SimpleNamespace:
        if isinstance(memory, pynvml.NVMLError):
            raise memory
        assert memory is not None
        return SimpleNamespace(total=memory[0], free=memory[1])

    def compute_capability(handle: int) -> tuple[int, int]:
        if capability is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return capability

    for function, answer in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.95",
        "nvmlDeviceGetCount": lambda: len(names),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: names[handle],
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetMemoryInfo": memory_info,
        "nvmlDeviceGetCudaComputeCapability": compute_capability,
    }.items():
        monkeypatch.setattr(pynvml, function, answer)


def test_tables_are_those_of_the_package() -> None:
    def parts(requirement: str) -> tuple[str, str]:
        name, _, least = requirement.partition(">=")
        return name, least

    assert dict(parts(line) for line in PYPROJECT["dependencies"]) == REQUIRED
    extras = {
        name: tuple(parts(line)[0] for line in lines)
        for name, lines in PYPROJECT["optional-dependencies"].items()
        if name != "dev"
    }
    assert extras == EXTRAS


def test_gpus_of_a_desktop(monkeypatch: pytest.MonkeyPatch) -> None:
    set_driver(monkeypatch, ["RTX 4090", "RTX 3060"], (24 * GIB, 20 * GIB))
    found, trouble = hardware.gpus()
    assert trouble == ""
    assert [(gpu.index, gpu.name, gpu.uuid) for gpu in found] == [
        (0, "RTX 4090", "GPU-0"),
        (1, "RTX 3060", "GPU-1"),
    ]
    assert (found[0].total_gib, found[0].free_gib, found[0].is_unified) == (24.0, 20.0, False)


@pytest.mark.parametrize(
    "memory", [pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED), (0, 0)], ids=["error", "zero"]
)
def test_unified_memory_is_the_systems(
    memory: tuple[int, int] | pynvml.NVMLError, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_driver(monkeypatch, ["NVIDIA GB10"], memory)
    found, trouble = hardware.gpus()
    assert trouble == ""
    assert found[0].is_unified
    assert found[0].total_gib == pytest.approx(psutil.virtual_memory().total / GIB)


def test_shared_memory_is_known_by_name_where_the_driver_tells_a_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_driver(monkeypatch, ["NVIDIA GB10"], (100 * GIB, 1 * GIB), (12, 1))
    found, _ = hardware.gpus()
    assert (found[0].is_unified, found[0].is_coherent) == (True, False)
    assert found[0].free_gib == pytest.approx(psutil.virtual_memory().available / GIB, rel=0.2)


def test_grace_hopper_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    set_driver(monkeypatch, ["NVIDIA GH200 480GB"], (96 * GIB, 90 * GIB), (9, 0))
    found, _ = hardware.gpus()
    assert (found[0].is_unified, found[0].is_coherent, found[0].total_gib) == (False, True, 96.0)


def doctor_lines(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "300"})
    return [line.rstrip() for line in result.stdout.splitlines()]


def test_doctor_says_what_a_gpu_has_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    set_driver(monkeypatch, ["NVIDIA GB10"], (0, 0), (12, 1))
    text = "\n".join(doctor_lines())
    assert re.search(
        r"GPU 0 has +compute capability 12\.1: fp16, bf16, TF32, 8-bit integer products, flash attention, "
        r"cuDNN attention, fp8 products$",
        text,
        re.MULTILINE,
    )
    assert re.search(r"GPU 0 wants +train\.precision: bf16 \(no loss scale\)", text)
    assert "memory.weights: fp8 (half the memory of bf16, products in fp8)" in text
    assert "note: NVIDIA GB10 shares the system's memory: moving weights or activations" in text

    told = json.loads("\n".join(doctor_lines("--json")))
    assert told["recommended"]["GPU-0"]["memory.weights"] == "fp8"
    assert told["gpus"][0]["capability"] == [12, 1]


def test_nothing_is_recommended_for_an_unknown_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    set_driver(monkeypatch, ["RTX 4090"], (24 * GIB, 20 * GIB), None)
    assert not any(line.startswith(("GPU 0 has", "GPU 0 wants")) for line in doctor_lines())


def test_apple_silicon_shares_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "arm64")
    found, _ = hardware.gpus()
    assert [gpu.is_unified for gpu in found] == [True]
    assert found[0].total_gib == pytest.approx(psutil.virtual_memory().total / GIB)


def test_driver_that_does_not_answer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 3
    assert "wrong: the NVIDIA driver does not answer: Driver Not Loaded" in result.stdout


def test_gpu_with_a_torch_that_cannot_use_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    set_driver(monkeypatch, ["RTX 4090"], (24 * GIB, 20 * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert any("build for the processor alone" in line for line in examine(folder).wrong)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert any("update the driver" in line for line in examine(folder).wrong)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert examine(folder).wrong == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert examine(folder).wrong == []


def test_disk_space_of_a_folder_to_come(folder: Path) -> None:
    space = hardware.disk_space(folder / "not" / "yet")
    assert space.free_gib == pytest.approx(psutil.disk_usage(str(folder)).free / GIB, rel=0.05)
    assert space.is_writable


def test_full_disk_and_missing_and_old_packages_are_wrong(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    from burnish.cli import doctor

    monkeypatch.setitem(doctor.REQUIRED, "no-such-package-here", "1.0")
    monkeypatch.setitem(doctor.REQUIRED, "typer", "99.1")
    monkeypatch.setattr(doctor, "LEAST_FREE_GIB", 1e9)
    text = "\n".join(examine(folder / "runs").wrong)
    assert "no-such-package-here is missing: pip install 'no-such-package-here>=1.0'" in text
    assert re.search(r"typer \S+ is too old: pip install --upgrade 'typer>=99.1'", text)
    assert f"the runs folder {folder / 'runs'} has" in text
    assert f"the cache folder {folder / 'cache'} has" in text


def test_json_for_programs() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == (3 if found["wrong"] else 0)
    assert found["packages"]["torch"] == torch.__version__
    assert found["memory"]["total_gib"] == pytest.approx(psutil.virtual_memory().total / GIB)
    assert found["processors"] >= 1
    assert set(found["disks"]) == {"runs", "cache"}


def test_missing_extras_come_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.cli import doctor

    monkeypatch.setitem(doctor.EXTRAS, "quant", ("no-such-package-here",))
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert "no-such-package-here missing; to have it: pip install 'burnish[quant]'" in result.stdout
