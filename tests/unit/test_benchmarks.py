"""The benchmarks at tiny size: they run, their JSON makes sense, and what must hold on any machine holds here.

Times of a shared machine are not judged; memory is counted and is the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.planner.recipe import Shape
from tools.benchmarks import attention, harness, loader, planner, products, startup, step, step_overhead
from tools.benchmarks.harness import Model, Settings

TinyFolder = Callable[[str], Path]
CPU = torch.device("cpu")
SIZE = 128  # pixels; kernels have room of their own, which shrinks beside activations


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(main: Callable[[Sequence[str]], None], *arguments: object) -> dict[str, Any]:
        main([str(one) for one in arguments])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert found["torch"] == torch.__version__
        return found

    return run


Told = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("activations", ["recompute", "keep", 0.5])
def test_the_plan_is_within_a_hundredth(tiny_folder: TinyFolder, activations: harness.Activations) -> None:
    model = Model("sd3", torch.float32, path=tiny_folder("sd3"), rank=4)
    settings = Settings(activations=activations, attention="torch")
    found = planner.row(model, Shape(SIZE, SIZE, batch=4), settings, CPU)
    assert abs(found["off"]) < 0.01, found


def test_a_step_beside_the_peers_path(tiny_folder: TinyFolder, told: Told) -> None:
    tiny = ("--model", tiny_folder("sd3"), "--size", SIZE, "--batch", 4, "--rank", 4)
    found = told(step.main, "--device", "cpu", "--family", "sd3", "--steps", 2, *tiny)
    assert 0.99 < found["real_over_predicted"] < 1.01
    # The peers compute every block again: what Burnish keeps here they do not.
    assert found["peers"]["peak_bytes"] < 0.8 * found["burnish"]["peak_bytes"]
    assert found["times_as_fast"] == pytest.approx(found["peers"]["ms"] / found["burnish"]["ms"], rel=0.01)
    assert found["options"]["batch"] == "4"


def test_a_step_that_recomputes_takes_no_more_than_the_peers(tiny_folder: TinyFolder) -> None:
    model = Model("sd3", torch.float32, path=tiny_folder("sd3"), rank=4)
    settings = Settings(activations="recompute")
    found = step.compared(model, Shape(SIZE, SIZE, batch=4), settings, CPU, 1)
    assert found["burnish"]["peak_bytes"] < 1.05 * found["peers"]["peak_bytes"]


def test_the_loop_is_not_slower_than_a_bare_one(told: Told) -> None:
    """Of 2 % in the mean on a quiet machine; what is caught here is a wait or a copy too many in each step."""
    found = told(step_overhead.main, "--steps", 30, "--batch-size", 4)
    assert found["overhead"] < 0.12
    assert found["turns"] == 6


def test_both_paths_train_the_same_modules_of_the_same_weights(tiny_folder: TinyFolder) -> None:
    model = Model("sd3", torch.float32, path=tiny_folder("sd3"), rank=4)
    ours, again = (harness.with_random_weights(model, CPU) for _ in range(2))
    weights = dict(ours.denoisers["transformer"].named_parameters())
    for name, weight in again.denoisers["transformer"].named_parameters():
        assert torch.equal(weight, weights[name])
    noisy, times_B, conditioning = ours.example(64, 64, 1)
    predicted = ours.predict(noisy, times_B, conditioning)
    assert 0.01 < predicted.std() < 100


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_weights_in_fewer_bits_and_streamed(tiny_folder: TinyFolder, weights: str, tmp_path: Path) -> None:
    model = Model("pixart", torch.bfloat16, depth=1)
    settings = Settings(weights=weights, stream=1.0, activations="recompute")
    one, chosen = harness.burnish_step(model, Shape(64, 64), settings, CPU, tmp_path)
    with chosen.installed():
        one()
    peak, resident = harness.predicted_bytes(model, Shape(64, 64), settings, cuda=True)
    whole, _ = harness.predicted_bytes(model, Shape(64, 64), Settings(activations="recompute"), cuda=True)
    assert 0 < resident < peak < whole


def test_attention(told: Told) -> None:
    sizes = ("--device", "cpu", "--depth", 1, "--size", 64)
    found = told(attention.main, "--families", "pixart", "--back-ends", "torch", "math", "cudnn", *sizes)
    assert {row["call"] for row in found["rows"]} == {
        "head dimension 72, float32, self",
        "head dimension 72, float32, cross, additive mask",
    }
    for row in found["rows"]:
        assert ("trouble" in row) == (row["back_end"] == "cudnn"), row
        assert "trouble" in row or (row["error"] < 1e-5 and row["tflops"] > 0)


def test_products_are_as_exact_as_their_formats(told: Told) -> None:
    small = ("--rows", 128, "--shapes", "512x256", "--repeats", 1)
    found = told(products.main, "--device", "cpu", *small)["products"]
    limits = {"bfloat16": 0.004, "fp8": 0.04, "int8": 0.015, "nf4": 0.12, "int4": 0.12}
    assert len(found) == 2 * len(limits)
    for row in found:
        limit = 0.025 if row["format"] == "int8" and row["outliers"] else limits[row["format"]]
        assert 0 < row["forward"]["error"] < limit, row
        assert 0 < row["grad_input"]["error"] < limit, row


def test_loading(tmp_path: Path) -> None:
    files = loader.written(tmp_path, 64, 8)
    question = {
        "files": [str(file) for file in files],
        "device": "cpu",
        "dtype": "float32",
        "shrink": "native",
    }
    question |= {"width": 64, "depth": 8}
    rows = [loader.load_once({**question, "reader": reader}) for reader in loader.READERS]
    assert {row["kept_bytes"] for row in rows} == {8 * 4 * (6 * 64 * 64 + 6 * 64)}
    assert all(row["mb_per_s"] > 0 for row in rows)
    loader.forget(files)
    smaller = loader.load_once({**question, "reader": "burnish", "shrink": "int8"})
    assert smaller["kept_bytes"] == rows[0]["kept_bytes"]  # layers so small stay as they are


def test_start_up_stops_after_the_first_step(tmp_path: Path) -> None:
    overrides = [f"save.folder={tmp_path}", f"memory.cache_folder={tmp_path}", "sample.prompts=[]"]
    question = {"config": str(startup.ASSETS / "demo.yaml"), "overrides": overrides, "real_data_only": True}
    until = startup.run_once({**question, "began": 0.0})
    times = list(until.values())
    assert times == sorted(times)
    assert next(iter(until)) == "imports"
    assert list(until)[-1] == "first step"
    assert [path.name for path in tmp_path.rglob("step-*") if path.is_dir()] == ["step-00000001"]
