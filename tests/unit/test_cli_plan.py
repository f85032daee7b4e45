"""`burnish plan`: what it prints, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import DataDependentOutputException
from typer.testing import CliRunner

from burnish import planning
from burnish.cli.main import app

TinyFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def config(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    path = folder / "run.yaml"
    path.write_text(
        f"name: tiny\nmodel: {{path: {tiny_folder('sd3')}}}\nmethod: {{rank: 4}}\n"
        f"data: [{{path: {folder}, resolutions: [256, 128], bucket_step: 16}}]\ntrain: {{steps: 10}}\n"
        f"sample: {{prompts: [a cat], size: 64}}\nmemory: {{cache_folder: {folder / 'cache'}}}\n"
    )
    return path


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "140"})
    return result.exit_code, result.output


def test_phases_sizes_and_settings_are_shown(config: Path) -> None:
    code, text = invoke(str(config), "--gpu", "4090")
    assert code == 0, text
    first = text.splitlines()[0]
    assert first.startswith("Stable Diffusion 3 on GeForce RTX 4090: weights native, keep")
    for what in ("captions", "pictures", "weights", "trained", "activations", "training", "samples", "peak"):
        assert any(line.split()[:1] == [what] for line in text.splitlines()), what
    sizes = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert {"256x256", "128x128"} <= sizes
    assert "10 steps: about" in text


def test_batch_sizes_side_by_side(config: Path) -> None:
    whole = ("--gpu", "1.2GiB", "--set", "memory.batch_parts=1", "--batch")
    code, text = invoke(str(config), *whole, "4,1,400", "--json")
    assert code == 0, text
    one, four, many = json.loads(text)
    assert (one["batch"], four["batch"], many["batch"]) == (1, 4, 400)
    assert four["peak_gib"] > one["peak_gib"]
    assert four["pictures_per_second"] > one["pictures_per_second"]
    assert "nothing fits into 1.2 GiB" in many["trouble"]
    code, text = invoke(str(config), "--gpu", "1.2GiB", "--batch", "400", "--json")
    (parted,) = json.loads(text)
    assert parted["settings"]["batch_parts"] > 1
    code, text = invoke(str(config), "--gpu", "1.2GiB", "--batch", "400")
    assert f"batches in {parted['settings']['batch_parts']} parts" in " ".join(text.split())
    code, text = invoke(str(config), *whole, "1,4")
    assert code == 0
    rows = [line.split()[:2] for line in text.splitlines()[2:]]
    assert rows == [["1", f"{one['peak_gib']:.2f}"], ["4", f"{four['peak_gib']:.2f}"]]
    code, text = invoke(str(config), "--gpu", "4090", "--batch", "1,x")
    assert code == 2
    assert "'1,x' is not a list of batch sizes" in text


def test_a_training_adapter_is_counted(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "assistant.safetensors"
    save_file({"x.lora_A.weight": torch.zeros(1024, 1024, dtype=torch.bfloat16)}, path)
    _, plain = invoke(str(config), "--gpu", "4090", "--json")
    _, beside = invoke(str(config), "--set", f"model.training_adapter={path}", "--gpu", "4090", "--json")
    peaks = [
        next(row["gib"] for row in json.loads(text)["rows"] if row["what"] == "training")
        for text in (plain, beside)
    ]
    assert peaks[1] - peaks[0] == pytest.approx(4 / 1024)  # float32, as it is attached


def test_text_encoders_that_train_are_counted(config: Path, tiny_folder: TinyFolder) -> None:
    _, plain = invoke(str(config), "--gpu", "4090", "--json")
    code, beside = invoke(str(config), "--set", "method.text_encoders.which=[]", "--gpu", "4090", "--json")
    assert code == 0, beside
    plain_rows, rows = ({row["what"]: row for row in json.loads(text)["rows"]} for text in (plain, beside))
    folders = tiny_folder("sd3").glob("text_encoder*/*.safetensors")
    weights = sum(one.numel() * 2 for path in folders for one in load_file(path).values())
    grown = (rows["weights"]["gib"] - plain_rows["weights"]["gib"]) * 2**30
    assert grown == pytest.approx(weights, rel=1e-2)
    assert rows["weights"]["why"] == "frozen, native, and text encoders, native"
    assert rows["trained"]["gib"] > plain_rows["trained"]["gib"]
    assert "captions" in plain_rows
    assert "captions" not in rows  # encoded in each step


def test_the_answer_for_a_named_card_is_kept_and_given_without_torch(config: Path) -> None:
    _, first = invoke(str(config), "--gpu", "12GiB", "--json")
    code = (
        "import sys; from typer.testing import CliRunner; from burnish.cli.main import app; "
        f"print(CliRunner().invoke(app, ['plan', {str(config)!r}, '--gpu', '12GiB', '--json']).output); "
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stderr.strip() == "False"
    assert json.loads(again.stdout) == json.loads(first)


def test_other_weights_are_planned_anew(config: Path, tiny_folder: TinyFolder) -> None:
    invoke(str(config), "--gpu", "16GiB")
    answers = config.parent / "cache" / "plans" / "answers"
    before = set(answers.iterdir())
    file = next(tiny_folder("sd3").rglob("*.safetensors"))
    file.touch()
    invoke(str(config), "--gpu", "16GiB")
    assert len(set(answers.iterdir()) - before) == 1


def test_a_model_that_cannot_be_traced_is_said_so(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks_for_numbers(*_: object, **__: object) -> None:
        raise DataDependentOutputException("aten._local_scalar_dense.default")  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "plan_run", asks_for_numbers)
    code, text = invoke(str(config), "--gpu", "20GiB")
    assert code == 2
    assert "cannot be planned" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "gtx"), "no card is called 'gtx'"),
        (("--gpu", "24GiB", "--set", "memory.budget=0.9GiB"), "nothing fits into 0.9 GiB"),
        (("--gpu", "24GiB", "--set", "memory.budget=lots"), "memory.budget"),
    ],
)
def test_what_cannot_be_planned_is_refused(config: Path, arguments: tuple[str, ...], said: str) -> None:
    code, text = invoke(str(config), *arguments)
    assert code == 2
    assert said in text
