"""`burnish train` and `burnish generate` from the outside, on the model inside the package."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import burnish.demo
import burnish.run
from burnish.cli.main import app
from burnish.config.schema import RunConfig
from burnish.errors import CheckpointError, Interrupted
from burnish.events import Listener, RunResult

DATASET = Path(burnish.demo.__file__).parent / "assets" / "dataset"
CONFIG = """\
name: {name}
trigger: sks robot
model: {{path: demo}}
method: {{rank: 2}}
data: [{{path: {pictures}, resolutions: [128]}}]
train: {{steps: 2, precision: fp32}}
sample: {{every: 0, at_start: false, size: 128, steps: 1, prompts: ["[trigger] in rain", {{prompt: a star, seed: 9}}]}}
memory: {{device: cpu, cache_folder: cache}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for file in sorted(DATASET.iterdir())[:4]:  # two pictures and their captions
        shutil.copyfile(file, tmp_path / "pictures" / file.name)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(CONFIG.format(name=name, pictures="pictures"))
    (tmp_path / "lost.yaml").write_text(CONFIG.format(name="lost", pictures="nowhere"))
    (tmp_path / "typo.yaml").write_text(CONFIG.format(name="typo", pictures="pictures") + "sed: 1\n")
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_trains_logs_and_can_be_inspected(folder: Path) -> None:
    result = invoke("train", "one", "--log", "logs/one.log", "-n", "mine", "--set", "train.steps=3")
    assert result.exit_code == 0, result.stderr
    assert (folder / "runs" / "mine" / "adapters" / "mine.safetensors").is_file()
    assert re.search(r"^step 3/3  loss \d\.\d{4}  lr 1\.00e-04  .* left$", result.stdout, re.MULTILINE)
    assert "done at step 3" in result.stdout.splitlines()
    assert (folder / "logs" / "one.log").read_text() == result.stdout
    found = json.loads(invoke("run", "inspect", "mine", "--json").stdout)
    assert (found["state"], found["step"], found["data"]["pictures"]) == ("done", 3, 2)
    assert all(adapter["verification"] for adapter in found["adapters"])


def test_check_trains_nothing(folder: Path) -> None:
    result = invoke("train", "one.yaml", "two.yaml", "--check")
    assert result.exit_code == 0, result.stderr
    assert "one: config, weights, pictures and captions are in order" in result.stdout
    assert "two: config, weights, pictures and captions are in order" in result.stdout
    assert not list(folder.rglob("*.safetensors"))


def test_failure_ends_the_command_unless_recover(folder: Path) -> None:
    result = invoke("train", "lost", "two", "--check")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert "two:" not in result.stdout

    result = invoke("train", "lost", "two", "--check", "--recover", "-l", "log.txt")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert "two: config, weights, pictures and captions are in order" in result.stdout
    assert "1 of 2 runs failed" in result.stdout
    assert "nowhere" in (folder / "log.txt").read_text()


class Weights:
    """Stands for a model in the frame of a run that fails."""


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [
        (RuntimeError, 1, "unexpected RuntimeError: shapes differ"),
        (torch.OutOfMemoryError, 3, "memory ran out: shapes differ"),
        (CheckpointError, 1, "shapes differ"),
    ],
)
def test_recover_goes_on_after_any_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], code: int, says: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    really_train = burnish.run.train_run
    held: list[weakref.ref[Weights]] = []

    def train_run(config: RunConfig, *, progress: Listener) -> RunResult:
        if config.name == "one":
            weights = Weights()
            weights.itself = weights  # type: ignore[attr-defined]  # a cycle, as in every module tree
            held.append(weakref.ref(weights))
            raise kind("shapes differ")
        assert held[0]() is None, "the failed run still holds its memory"
        return really_train(config, progress=progress)

    monkeypatch.setattr(burnish.run, "train_run", train_run)
    result = invoke("train", "one", "two", "--recover", "--log", "log.txt")
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith(says)
    assert says in (folder / "log.txt").read_text()
    assert "done at step 2" in result.stdout
    assert "1 of 2 runs failed" in result.stdout
    assert (folder / "runs" / "two" / "adapters" / "two.safetensors").is_file()

    held.clear()
    result = invoke("train", "one", "two")
    assert result.exit_code == code
    assert "two" not in result.stdout


@pytest.mark.parametrize(
    ("stop", "code"), [(Interrupted("stopped", signal_number=15), 143), (KeyboardInterrupt(), 130)]
)
def test_a_signal_stops_all_runs(monkeypatch: pytest.MonkeyPatch, stop: BaseException, code: int) -> None:
    started: list[str] = []

    def train_run(config: RunConfig, *, progress: Listener) -> NoReturn:
        started.append(config.name)
        raise stop

    monkeypatch.setattr(burnish.run, "train_run", train_run)
    assert invoke("train", "one", "two", "--recover").exit_code == code
    assert started == ["one"]


def test_mistake_in_the_last_config_shows_before_the_first_run(folder: Path) -> None:
    result = invoke("train", "one", "typo", "not-there")
    assert result.exit_code == 2
    assert "did you mean seed?" in result.stderr
    assert "'not-there' not found" in result.stderr
    assert not (folder / "runs").exists()

    result = invoke("train", "typo", "one", "-r", "--check")
    assert result.exit_code == 2
    assert "did you mean seed?" in result.stderr
    assert "one: config, weights, pictures and captions are in order" in result.stdout


def test_two_runs_cannot_share_a_folder(folder: Path) -> None:
    assert "would write to the same folder" in invoke("train", "one", "one").stderr
    result = invoke("train", "one", "two", "--name", "both")
    assert (result.exit_code, "--name names one run" in result.stderr) == (2, True)
    assert not (folder / "runs").exists()


# generate


def drawn(folder: Path) -> list[dict[str, object]]:
    found = []
    for file in sorted((folder / "pictures-out").glob("*.json")):
        with Image.open(file.with_suffix(".png")) as picture:
            facts = json.loads(file.read_text())
            assert picture.size == (facts["width"], facts["height"])
        assert file.with_suffix(".txt").read_text().strip() == facts["prompt"]
        found.append(facts)
    return found


OUT = ("--output", "pictures-out", "--batch-size", "8")


def test_generates_from_prompts_and_a_file(folder: Path) -> None:
    (folder / "prompts.txt").write_text(
        '# two more\na red heart --d 5 --h 64\n{"prompt": "a star", "seed": 7}\n'
    )
    options = ("--size", "64x128", "--steps", "1", "--precision", "fp32", "--device", "cpu", "--count", "2")
    result = invoke(
        "generate", "--model", "demo", "-p", "a circle", "--prompt-file", "prompts.txt", *options, *OUT
    )
    assert result.exit_code == 0, result.stderr
    facts = drawn(folder)
    assert [(f["prompt"], f["seed"]) for f in facts] == [
        ("a circle", 0),
        ("a circle", 1),
        ("a red heart", 5),
        ("a red heart", 6),
        ("a star", 7),
        ("a star", 8),
    ]
    assert {(f["height"], f["width"], f["steps"]) for f in facts} == {(64, 128, 1)}


def test_config_gives_model_prompts_and_settings(folder: Path) -> None:
    result = invoke("generate", "one", *OUT)
    assert result.exit_code == 0, result.stderr
    assert [(f["prompt"], f["seed"], f["height"]) for f in drawn(folder)] == [
        ("sks robot in rain", 0, 128),
        ("a star", 9, 128),
    ]


def test_command_line_wins_over_the_config(folder: Path) -> None:
    result = invoke("generate", "one", "-p", "[trigger] of [name]", "--seed", "4", "--size", "64", *OUT)
    assert result.exit_code == 0, result.stderr
    assert [(f["prompt"], f["seed"], f["height"]) for f in drawn(folder)] == [("sks robot of one", 4, 64)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "x"], "Give a CONFIG, or --model"),
        (["--model", "demo"], "no prompt"),
        (["--model", "demo", "-p", "x", "--size", "big"], "HEIGHTxWIDTH"),
        (["--model", "demo", "-p", "x", "--size", "8x64"], "from 16 to 8192"),
        (["--model", "demo", "-p", "x", "--adapter", "none.safetensors"], "no adapter file none.safetensors"),
        (["--model", "demo", "-p", "x", "--adapter", "one.yaml:1e9"], "from -100 to 100"),
        (["--model", "demo", "-p", "x", "--adapter", "one.yaml:nan"], "from -100 to 100"),
        (["--model", "demo", "-p", "x", "--device", "tpu"], "auto, cpu, cuda, mps"),
        (["--model", "demo", "-p", "x", "--reference-guidance", "2"], "Guidance by references is asked for"),
        (["--model", "demo", "-p", "x", "--set", "seed=1"], "--set changes a config"),
        (["--model", "demo", "--prompt-file", "none.txt"], "none.txt"),
        (["typo"], "did you mean seed?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_when_generating(arguments: list[str], says: str) -> None:
    result = invoke("generate", *arguments)
    assert result.exit_code == 2, result.stderr
    assert says in result.stderr
    assert "unexpected" not in result.stderr


def test_adapter_of_a_run_changes_the_picture(folder: Path) -> None:
    assert invoke("train", "one", "--set", "train.optimizer.learning_rate=0.05").exit_code == 0
    result = invoke("generate", "one", "-p", "a star", *OUT)
    assert "add --adapter runs/one/adapters/one.safetensors" in result.stdout
    for adapter in ("runs/one/adapters/one.safetensors:0", "runs/one/adapters/one.safetensors"):
        result = invoke("generate", "one", "-p", "a star", "--adapter", adapter, *OUT)
        assert result.exit_code == 0, result.stderr
    plain, at_zero, adapted = ((folder / "pictures-out" / f"{n:06d}.png").read_bytes() for n in (1, 2, 3))
    assert plain == at_zero
    assert plain != adapted


# demo


def test_demo_leaves_its_config_and_pictures(folder: Path) -> None:
    result = invoke("demo", "--export-config", "mine")
    assert result.exit_code == 0, result.stderr
    assert (folder / "mine" / "demo.yaml").is_file()
    assert len(list((folder / "mine").rglob("*.png"))) == 16
    assert invoke("config", "show", "mine/demo.yaml").exit_code == 0
    assert invoke("demo", "--export-config", "mine").exit_code == 2


def test_families_are_listed() -> None:
    from burnish.families.registry import families

    result = CliRunner().invoke(app, ["families"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    for name, family in families().items():
        assert any(line.split()[:1] == [name] and family.title in line for line in lines)
        for title, release in family.releases().items():
            (shown,) = [line for line in lines if line.strip().startswith(title)]
            can = release.capabilities
            assert [word in shown for word in (" frames", "last frames", "masks")] == [
                can.first_frame,
                can.last_frame,
                can.masks,
            ]
