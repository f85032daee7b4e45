"""Whatever a command raises ends in a few readable lines and the documented exit code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from burnish import errors
from burnish.cli.edge import guarded


def run(error: BaseException) -> Result:
    app = typer.Typer()

    @app.command()
    @guarded
    def command() -> NoReturn:
        raise error

    return CliRunner().invoke(app, [])


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ConfigError, 2),
        (errors.DataError, 2),
        (errors.ModelError, 2),
        (errors.AdapterError, 2),
        (errors.OutOfMemory, 3),
        (errors.DiskFull, 3),
        (errors.MissingPackage, 3),
        (errors.NonFiniteLoss, 1),
        (errors.CheckpointError, 1),
        (errors.ExportError, 1),
    ],
)
def test_exit_code_of_each_error(kind: type[errors.BurnishError], code: int) -> None:
    result = run(kind("it [did] not work: 3 < 5", remedy="Try again."))
    assert result.exit_code == code
    assert result.stderr == "it [did] not work: 3 < 5\n  Try again.\n"
    assert result.stdout == ""


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_exit_code_of_a_signal(number: int, code: int) -> None:
    result = run(errors.Interrupted("stopped by a signal", signal_number=number))
    assert (result.exit_code, result.stderr) == (code, "stopped by a signal\n")


def test_keyboard_interrupt_before_a_run() -> None:
    result = run(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def too_much() -> BaseException:
    """What the allocator of the CPU says: 4 EiB are more than any machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "2.00 GiB."),
        (MemoryError(), "MemoryError"),
        (too_much(), "4611686018427387904 bytes"),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_memory_that_ran_out_is_no_defect(error: BaseException, says: str) -> None:
    result = run(error)
    assert result.exit_code == 3
    first, second = result.stderr.splitlines()
    assert first.startswith("memory ran out: ")
    assert says in first
    assert "memory.activations: recompute" in second
    assert "--batch-size 1" in second


def test_other_runtime_errors_are_defects() -> None:
    result = run(RuntimeError("the size of tensor a must match"))
    assert result.exit_code == 1
    assert result.stderr.startswith("unexpected RuntimeError: the size of tensor a must match\n")
    found = re.search(r"The traceback is in (\S+)", result.stderr)
    assert found
    Path(found[1]).unlink()


def test_telling_an_error_imports_no_torch() -> None:
    program = (
        "import sys\nfrom burnish.cli.edge import as_failure\n"
        "print([as_failure(error).exit_code for error in (MemoryError(), RuntimeError('x'))], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[3, 1] False"


def test_defect_names_the_file_with_its_traceback() -> None:
    result = run(ZeroDivisionError("division of [x] by zero"))
    assert result.exit_code == 1
    assert result.stderr.startswith("unexpected ZeroDivisionError: division of [x] by zero\n")
    assert "Traceback" not in result.stderr
    found = re.search(r"The traceback is in (\S+)", result.stderr)
    assert found
    file = Path(found[1])
    assert "Traceback (most recent call last)" in file.read_text()
    assert "raise error" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0, "it may hold paths and settings: for this user alone"
    file.unlink()


@pytest.mark.parametrize("leave", [lambda: typer.Exit(5), lambda: typer.Abort()], ids=["exit", "abort"])
def test_typers_own_ways_out_are_left_alone(leave: Callable[[], BaseException]) -> None:
    result = run(leave())
    assert result.exit_code in (5, 1)
    assert "unexpected" not in result.stderr
