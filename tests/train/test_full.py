"""Full fine-tuning: a denoiser's own weights learn, resume to the bit, and are what diffusers and we read back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from runs import digest, last_checkpoint, picture_folder, run_config, short_prompts
from safetensors import safe_open
from test_families_learn import CASES, fixed_loss, load, ours, pictures, still_pixels, theirs
from tiny import Case
from tiny_pipelines import PIPELINES
from typer.testing import CliRunner

from burnish.checkpoint.space import Space, check_space
from burnish.cli.main import app
from burnish.config.schema import RunConfig
from burnish.data.batch import Batch
from burnish.errors import ConfigError, Interrupted, NonFiniteLoss
from burnish.events import Listener
from burnish.family import Family, ModelSource
from burnish.memory.gradient_release import GradientRelease
from burnish.objective import Denoising
from burnish.run import train_run
from burnish.run_folder import RunFolder

TinyFolder = Callable[[str], Path]
LEARNED = {
    "sd15": Case("sd15", PIPELINES["sd15"]),
    "sdxl": Case("sdxl", PIPELINES["sdxl"]),
    **{name: CASES[name] for name in ("flux", "wan21")},
}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "six")


@pytest.fixture(scope="module")
def model(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_prompts(tiny_flux, tmp_path_factory.mktemp("model") / "flux")


def full(model: Path, pictures: Path, output: Path, changes: Mapping[str, Any] | None = None) -> Any:
    return run_config(
        model,
        pictures,
        output,
        {"method": {"kind": "full"}, "train.max_grad_norm": 1e6, "save.format": "comfy", **(changes or {})},
    )


def trained(config: Any) -> str:
    train_run(config, progress=Listener())
    return digest(last_checkpoint(config.save.folder))


def put_in(family: Family, part: str, values: Mapping[str, torch.Tensor]) -> None:
    family.denoisers[part].load_state_dict(dict(values))


@pytest.mark.parametrize("name", LEARNED)
def test_a_model_learns_and_diffusers_draws_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, name: str
) -> None:
    case, model = LEARNED[name], tiny_folder(name)
    drawn = pictures(tmp_path / "pictures", case.side)
    changes = {
        "model.family": case.family,
        "train.steps": 5,
        "train.max_grad_norm": 1.0,
        "train.optimizer": {"kind": "adamw", "learning_rate": 3e-3},
        "train.schedule": {"kind": "constant"},
        "save.format": "auto",
        "data.0.resolutions": [case.side],
    }
    train_run(full(model, tmp_path / "pictures", tmp_path / "runs", changes), progress=Listener())
    models = RunFolder(tmp_path / "runs" / "tiny").models
    family = load(model, case)
    (part,) = family.denoisers
    pixels = still_pixels(family, drawn)
    before, plain = fixed_loss(family, pixels), ours(family, case)
    stored = type(family).stored(ModelSource(str(models / "tiny.safetensors")))
    put_in(family, part, {key: read() for key, read in stored.items()})
    assert fixed_loss(family, pixels) < 0.97 * before
    with_ours = ours(family, case)
    assert (with_ours - plain).abs().max() > 0.01, "there is no effect to compare"

    kind = getattr(diffusers, family.config(part)["_class_name"])
    read = kind.from_pretrained(models / "tiny" / part)
    assert_bits(read.state_dict(), {key: one() for key, one in stored.items()})
    with_theirs = theirs(model, None, case, **{part: read})
    torch.testing.assert_close(with_ours, with_theirs, atol=1e-4, rtol=0)


def assert_bits(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adamw kahan"])
def test_steps_in_backward_and_states_on_the_host_give_the_same_bits(
    model: Path, six: Path, tmp_path: Path, kind: str
) -> None:
    kind, _, rounding = kind.partition(" ")
    optimizer = {"kind": kind, "learning_rate": 1e-3, "rounding": rounding or "nearest"}
    changes = {
        "train.steps": 3,
        "train.optimizer": optimizer,
        "train.precision": "bf16" if rounding else "fp32",
    }
    plain = trained(full(model, six, tmp_path / "plain", changes))
    memory = {"memory.gradient_release": True, "memory.offload_optimizer": True}
    apart = [memory] if kind != "adamw" or rounding else [memory, *({key: True} for key in memory)]
    for number, one in enumerate(apart):
        assert trained(full(model, six, tmp_path / str(number), {**changes, **one})) == plain, one


@pytest.mark.parametrize(
    "changes",
    [
        {"train.ema": {"decay": 0.9}, "method": {"kind": "full", "targets": "attention"}},
        {
            "train.precision": "bf16",
            "train.optimizer": {"kind": "adamw", "learning_rate": 1e-4, "rounding": "stochastic"},
            "memory.gradient_release": True,
            "memory.offload_optimizer": True,
        },
    ],
    ids=["ema", "bf16 released offloaded"],
)
def test_an_interrupted_run_ends_in_the_same_bits(
    model: Path, six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    expected = trained(full(model, six, tmp_path / "straight", changes))
    draw = Denoising.draw_noise

    def draw_and_stop(objective: Denoising, batch: Batch, seed: int) -> torch.Tensor:
        if batch.position == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(objective, batch, seed)

    config = full(model, six, tmp_path / "stopped", changes)
    monkeypatch.setattr(Denoising, "draw_noise", draw_and_stop)
    with pytest.raises(Interrupted):
        train_run(config, progress=Listener())
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "stopped").step == 4
    assert trained(config) == expected


def test_the_average_is_what_is_saved_drawn_and_judged(model: Path, six: Path, tmp_path: Path) -> None:
    changes = {
        "train.ema": {"decay": 0.5},
        "train.validation": {"every": 4, "pictures": 2},
        "sample": {"every": 8, "at_start": False, "prompts": ["a cat"], "steps": 1, "size": 64},
        "save.every": 4,
        "save.format": "auto",
    }
    config = full(model, six, tmp_path, changes)
    result = train_run(config, progress=Listener())
    folder = RunFolder(result.folder)
    checkpoint = last_checkpoint(tmp_path)
    with safe_open(folder.models / "tiny.safetensors", framework="pt") as file:
        saved = file.get_tensor("img_in.weight")
        assert file.metadata()["burnish.step"] == "8"
    assert torch.equal(saved, checkpoint.tensors["ema"]["transformer.x_embedder.weight"])
    assert not torch.equal(saved, checkpoint.tensors["adapter"]["transformer.x_embedder.weight"])
    # Of whole models the last and the best; what is kept of adapters would fill a disk.
    assert {path.name for path in folder.models.iterdir()} == {
        "tiny", "tiny-best", "tiny.safetensors", "tiny-best.safetensors",
    }  # fmt: skip
    status = folder.status()
    assert status is not None
    assert {"models/tiny.safetensors", "models/tiny/transformer"} < status.adapters.keys()
    assert len(list(folder.samples.glob("step-*.png"))) == 1


def test_only_what_patterns_name_moves(model: Path, six: Path, tmp_path: Path) -> None:
    method = {"kind": "full", "targets": "attention", "include": ["norm_out"], "exclude": ["*.bias"]}
    method["groups"] = [{"match": ["norm_out"], "learning_rate": 1e-9}]
    train_run(full(model, six, tmp_path, {"method": method, "train.steps": 3}), progress=Listener())
    family = load(model, CASES["flux"])
    before = family.denoisers["transformer"].state_dict()
    stored = type(family).stored(ModelSource(str(tmp_path / "tiny" / "models" / "tiny.safetensors")))
    moved = {key for key, read in stored.items() if not torch.equal(read(), before[key])}
    attention = {key for key in before if "attn.to_" in key or "attn.add_" in key}
    assert {key for key in moved if "norm_out" not in key} == {
        key for key in attention if key.endswith("weight")
    }
    shifted = stored["norm_out.linear.weight"]() - before["norm_out.linear.weight"]
    assert 0 < shifted.abs().max() < 1e-7

    method["include"] = ["norm_uot"]
    with pytest.raises(ConfigError, match=r"method\.include: the pattern 'norm_uot' matches no weight"):
        train_run(full(model, six, tmp_path / "typo", {"method": method}), progress=Listener())


def test_a_step_that_goes_wrong_on_its_way_is_not_saved(
    model: Path, six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = full(model, six, tmp_path, {"memory.gradient_release": True, "save.every": 2, "train.steps": 6})
    norm, calls = GradientRelease.norm, [0]

    def broken_at(call: int) -> Callable[[GradientRelease], torch.Tensor]:
        def answer(release: GradientRelease) -> torch.Tensor:
            calls[0] += 1
            return norm(release) * float("nan" if calls[0] == call else "1")

        calls[0] = 0
        return answer

    monkeypatch.setattr(GradientRelease, "norm", broken_at(4))
    with pytest.raises(NonFiniteLoss, match="some weights have moved"):
        train_run(config, progress=Listener())
    assert last_checkpoint(tmp_path).step == 2
    monkeypatch.setattr(GradientRelease, "norm", broken_at(2))
    train_run(with_policy(config, "rollback"), progress=Listener())
    assert last_checkpoint(tmp_path).step == 6


def with_policy(config: RunConfig, kind: str) -> RunConfig:
    values = config.model_dump(mode="json")
    values["train"]["on_nonfinite"] = {"kind": kind}
    return RunConfig.model_validate(values)


def test_the_disk_is_asked_for_what_is_written(
    model: Path, six: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Weights, moments and averages per checkpoint; three times the folder and the file beside them."""
    asked: list[tuple[int, int]] = []

    def note(folder: Path, per_checkpoint: int, keep: int, beside: int = 0) -> Space:
        asked.append((per_checkpoint, beside))
        return check_space(folder, per_checkpoint, keep, beside)

    monkeypatch.setattr("burnish.run.check_space", note)
    changes = {"train.steps": 3, "train.ema": {"decay": 0.5}, "save.format": "auto"}
    result = train_run(full(model, six, tmp_path, changes), progress=Listener())
    folder = RunFolder(result.folder)
    checkpoint = sum(file.stat().st_size for file in folder.checkpoints.rglob("*.safetensors"))
    models = sum(file.stat().st_size for file in folder.models.rglob("*.safetensors"))
    assert asked[-1][0] == pytest.approx(
        checkpoint, rel=0.1
    )  # beside headers, which a small model's are not small
    assert asked[-1][1] == pytest.approx(3 * models, rel=0.05)
    told = CliRunner().invoke(app, ["run", "inspect", str(result.folder)])
    assert [line.split()[1] for line in told.stdout.splitlines() if line.split()[:1] == ["model"]] == [
        "models/tiny/transformer", "models/tiny.safetensors",
    ]  # fmt: skip
