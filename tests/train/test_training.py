"""Training does what it should: it learns, as fast as it did, keeps the best, and nothing beside it ends it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import last_checkpoint, picture_folder, run_config
from safetensors import safe_open
from safetensors.torch import load_file

from burnish import preparation, tasks
from burnish.checkpoint.store import CheckpointStore
from burnish.errors import DataError, Interrupted, NonFiniteLoss, OutOfMemory, UserError
from burnish.events import Listener, StepReport
from burnish.objective import Denoising
from burnish.run import check_run, train_run
from burnish.run_folder import RunFolder


class Notes(Listener):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.warnings: list[str] = []
        self.adapters: list[tuple[Path, Mapping[str, object]]] = []
        self.validations: list[tuple[int, float, bool]] = []
        self.sampled_at: list[int] = []

    def stepped(self, report: StepReport) -> None:
        self.losses.append(report.loss)

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def saved(self, step: int, checkpoint: Path, adapter: Path, facts: Mapping[str, object]) -> None:
        self.adapters.append((adapter, facts))

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        self.validations.append((step, loss, is_best))

    def sampled(self, step: int, pictures: Sequence[Path]) -> None:
        self.sampled_at.append(step)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "six")


@pytest.fixture(scope="module")
def one_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "one", count=1)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "flux_schnell"])
def test_one_picture_at_one_noise_is_overfitted(
    tiny_folder: Callable[[str], Path],
    one_picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """With noise and time held, the target is one fixed tensor: a working loop drives the loss far down."""
    monkeypatch.setattr(
        Denoising,
        "draw_noise",
        lambda self, batch, seed: torch.randn(
            batch.latents_BCHW.shape, generator=torch.Generator().manual_seed(1)
        ),
    )
    monkeypatch.setattr(Denoising, "draw_times", lambda self, batch, seed, tokens: torch.full((1,), 0.5))
    overrides = {
        "train.steps": 120,
        "train.batch_size": 1,
        "train.optimizer.learning_rate": 2e-2,
        "method": {"rank": 8, "targets": "all"},
        "data.0.flip": False,
        "data.0.captions": {},
    }
    notes = Notes()
    train_run(run_config(tiny_folder(family), one_picture, tmp_path, overrides), progress=notes)
    assert min(notes.losses[-10:]) < 0.6 * notes.losses[0], (notes.losses[0], notes.losses[-1])


def test_a_run_leaves_everything_in_its_folder(tiny_flux: Path, pictures: Path, tmp_path: Path) -> None:
    notes = Notes()
    overrides = {
        "trigger": "sks",
        "save.every": 4,
        "sample": {
            "every": 4,
            "at_start": True,
            "prompts": ["a sks red chair", "a cat"],
            "size": 64,
            "steps": 2,
        },
        "train.validation": {"every": 4, "pictures": 2},
    }
    result = train_run(run_config(tiny_flux, pictures, tmp_path, overrides), progress=notes)
    folder = RunFolder(tmp_path / "tiny")
    assert (result.state, result.step) == ("done", 8)
    status = folder.status()
    assert status is not None
    assert (status.state, status.step, status.steps) == ("done", 8, 8)
    assert [step for step, _ in folder.metrics("loss")] == list(range(1, 9))
    assert [value for _, value in folder.metrics("loss")] == pytest.approx(notes.losses)
    assert [step for step, _ in folder.metrics("validation_loss")] == [4, 8]
    assert notes.sampled_at == [0, 4, 8]
    assert sorted(path.name for path in folder.samples.glob("*.png"))[0] == "grid.png"
    assert len(list(folder.samples.glob("step-*.png"))) == 6
    assert json.loads(folder.data_report.read_text())
    assert {path.name for path in folder.adapters.glob("*.safetensors")} >= {
        "tiny-00000004.safetensors",
        "tiny-00000008.safetensors",
        "tiny.safetensors",
        "tiny-best.safetensors",
    }
    assert all(facts for _, facts in notes.adapters)
    with safe_open(folder.adapters / "tiny.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "2"
    assert "rank: 4" in metadata["burnish.config"]
    assert list(folder.logs.glob("*.log"))


def test_captions_beyond_the_token_limit_are_counted(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures", count=2)
    (folder / "0.txt").write_text("a red chair " * 60)
    notes = Notes()
    train_run(
        run_config(tiny_sd15, folder, tmp_path, {"train.steps": 3, "data.0.captions": {}}), progress=notes
    )
    assert any("1 caption(s) have more than 77 tokens" in text for text in notes.warnings), notes.warnings
    report = json.loads((tmp_path / "tiny" / "data_report.json").read_text())
    assert report["captions"]["over_token_limit"] == 1


GOLDEN = {
    # First losses of the run of runs.py, by family. They change only when the arithmetic of training does:
    # a change to them is shown and explained in the commit that makes it.
    "sd15": [1.09476, 0.90348, 0.96171, 1.08262, 1.03428, 1.08199, 1.23737, 0.99137],
    "sdxl": [1.20695, 1.01887, 1.05955, 1.12746, 1.09005, 1.16373, 1.2263, 1.07386],
    "flux": [1.44986, 1.46727, 1.39365, 1.43876, 1.51193, 1.36413, 1.45415, 1.46094],
}


@pytest.mark.parametrize("family", sorted(GOLDEN))
def test_losses_are_those_of_before(
    tiny_folder: Callable[[str], Path], pictures: Path, tmp_path: Path, family: str
) -> None:
    notes = Notes()
    # Empty captions: the tiny tokenizers come out a little differently each time they are trained.
    config = run_config(tiny_folder(family), pictures, tmp_path, {"data.0.captions": {"dropout": 1.0}})
    train_run(config, progress=notes)
    assert notes.losses == pytest.approx(GOLDEN[family], rel=3e-4)


def test_the_best_checkpoint_is_kept_and_a_run_can_stop_early(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0])
    monkeypatch.setattr(tasks.Validate, "loss", lambda self, run: next(losses))
    overrides = {
        "train.steps": 20,
        "train.validation": {"every": 1, "pictures": 2, "early_stop": {"patience": 3}},
        "save": {"folder": str(tmp_path), "every": 1, "keep": 2, "dtype": "float32"},
    }
    notes = Notes()
    result = train_run(run_config(tiny_flux, pictures, tmp_path, overrides), progress=notes)
    assert (result.state, result.step, result.best_step, result.best_loss) == ("done", 5, 2, 2.0)
    assert [best for _, _, best in notes.validations] == [True, True, False, False, False]
    assert CheckpointStore(tmp_path / "tiny" / "checkpoints").steps() == [2, 4, 5]
    assert any("stopped early" in note for note in result.notes)


def test_a_small_improvement_is_the_best_and_yet_no_progress(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 1.99, 1.98, 1.97])
    monkeypatch.setattr(tasks.Validate, "loss", lambda self, run: next(losses))
    stop = {"patience": 3, "min_improvement": 0.1}
    overrides = {"train.steps": 20, "train.validation": {"every": 1, "pictures": 2, "early_stop": stop}}
    result = train_run(run_config(tiny_flux, pictures, tmp_path, overrides), progress=Listener())
    assert (result.step, result.best_step, result.best_loss) == (4, 4, 1.97)


def test_a_held_out_loss_that_is_not_finite_stops_the_run(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.Validate, "loss", lambda self, run: float("nan"))
    overrides = {"train.validation": {"every": 2, "pictures": 2}}
    with pytest.raises(NonFiniteLoss, match="step 2: the held-out loss is nan"):
        train_run(run_config(tiny_flux, pictures, tmp_path, overrides), progress=Listener())


def test_held_out_loss_is_the_same_for_the_same_weights(
    tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    overrides = {"train.optimizer.learning_rate": 1e-12, "train.validation": {"every": 1, "pictures": 2}}
    notes = Notes()
    train_run(run_config(tiny_flux, pictures, tmp_path, overrides), progress=notes)
    values = [loss for _, loss, _ in notes.validations]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-5)


def test_running_out_of_memory_while_sampling_does_not_change_the_run(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = {"every": 2, "at_start": True, "prompts": ["a cat"], "size": 64, "steps": 1}
    train_run(run_config(tiny_flux, pictures, tmp_path / "without"), progress=Listener())

    def out_of_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tasks, "draw_latents", out_of_memory)
    notes = Notes()
    result = train_run(run_config(tiny_flux, pictures, tmp_path / "with", {"sample": sample}), progress=notes)
    assert result.state == "done"
    assert sum("not enough memory to draw samples" in text for text in notes.warnings) == 5
    expected, found = last_checkpoint(tmp_path / "without"), last_checkpoint(tmp_path / "with")
    assert all(torch.equal(found.tensors["adapter"][k], v) for k, v in expected.tensors["adapter"].items())


def test_running_out_of_memory_in_a_step_saves_the_last_whole_one(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Denoising.draw_noise

    def draw_noise(objective: Denoising, batch: object, seed: int) -> torch.Tensor:
        if batch.position == 3:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(objective, batch, seed)  # type: ignore[arg-type]

    monkeypatch.setattr(Denoising, "draw_noise", draw_noise)
    with pytest.raises(
        OutOfMemory, match=r"step 4 does not fit in memory on cpu; the state of step 3 is saved"
    ) as raised:
        train_run(run_config(tiny_flux, pictures, tmp_path), progress=Listener())
    assert raised.value.exit_code == 3
    assert "memory.activations" in raised.value.remedy
    assert last_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_sampling_saves_and_leaves_the_samples_out(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    original = tasks.draw_latents

    def signalled(*args: object, **kwargs: object) -> object:
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(tasks, "draw_latents", signalled)
    sample = {"every": 2, "at_start": False, "prompts": ["a cat"], "size": 64, "steps": 2}
    notes = Notes()
    with pytest.raises(Interrupted) as raised:
        train_run(run_config(tiny_flux, pictures, tmp_path, {"sample": sample}), progress=notes)
    assert raised.value.exit_code == 128 + number
    assert last_checkpoint(tmp_path).step == 2
    assert any("samples left out" in text for text in notes.warnings)
    status = RunFolder(tmp_path / "tiny").status()
    assert status is not None
    assert (status.state, status.step) == ("stopped", 2)


def test_a_signal_while_preparing_ends_the_run_at_once(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "encode_captions", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted) as raised:
        train_run(run_config(tiny_flux, pictures, tmp_path), progress=Listener())
    assert raised.value.exit_code == 130
    status = RunFolder(tmp_path / "tiny").status()
    assert status is not None
    assert (status.state, status.step) == ("stopped", 0)


@pytest.mark.parametrize("family", ["sd15", "flux"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_half_precision_and_recomputing_follow_the_same_curve(
    tiny_folder: Callable[[str], Path],
    pictures: Path,
    tmp_path: Path,
    family: str,
    precision: str,
    activations: str,
) -> None:
    notes = Notes()
    overrides = {
        "data.0.captions": {"dropout": 1.0},
        "train.precision": precision,
        "memory.activations": activations,
    }
    train_run(run_config(tiny_folder(family), pictures, tmp_path, overrides), progress=notes)
    assert notes.losses == pytest.approx(GOLDEN[family], rel=1.5e-2)
    adapter = last_checkpoint(tmp_path).tensors["adapter"]
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_a_changed_method_refuses_to_go_on(tiny_flux: Path, pictures: Path, tmp_path: Path) -> None:
    train_run(run_config(tiny_flux, pictures, tmp_path), progress=Listener())
    with pytest.raises(UserError, match=r"method.rank: 4 -> 8"):
        train_run(run_config(tiny_flux, pictures, tmp_path, {"method.rank": 8}), progress=Listener())


def test_with_an_average_the_adapter_is_the_average(tiny_flux: Path, pictures: Path, tmp_path: Path) -> None:
    result = train_run(
        run_config(tiny_flux, pictures, tmp_path, {"train.ema": {"decay": 0.9}}), progress=Listener()
    )
    assert result.adapter is not None
    saved, tensors = load_file(result.adapter), last_checkpoint(tmp_path).tensors
    downs = {name.removesuffix(".weight"): value for name, value in saved.items() if "lora_A" in name}
    assert len(downs) > 10
    for name, value in downs.items():
        assert torch.equal(value, tensors["ema"][name])
        assert not torch.equal(value, tensors["adapter"][name])


def test_every_picture_counts_the_same_in_a_step_with_a_partial_batch(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = picture_folder(tmp_path / "pictures", count=5)
    original, seen = Denoising.losses_at, []

    def losses_at(objective: Denoising, *arguments: object) -> torch.Tensor:
        loss_B = original(objective, *arguments)  # type: ignore[arg-type]
        loss_B.register_hook(lambda gradient_B: gradients.append(gradient_B.clone()))
        seen.append(loss_B.detach())
        return loss_B

    gradients: list[torch.Tensor] = []
    monkeypatch.setattr(Denoising, "losses_at", losses_at)
    notes = Notes()
    overrides = {"train.steps": 3, "train.accumulate": 3}  # batches of 2, 2 and 1, in some order
    train_run(run_config(tiny_flux, folder, tmp_path, overrides), progress=notes)
    assert sorted(len(loss_B) for loss_B in seen[:3]) == [1, 2, 2]
    assert notes.losses[0] == pytest.approx(float(torch.cat(seen[:3]).mean()))
    assert torch.cat(gradients[:3]).tolist() == pytest.approx([1 / 5] * 5)


def test_a_training_adapter_works_in_training_and_not_in_samples(
    tiny_flux_schnell: Path, pictures: Path, tmp_path: Path
) -> None:
    """An adapter trained first becomes the training adapter of a second run (FLUX.1-schnell's way)."""
    strong = {"train.optimizer.learning_rate": 5e-2, "method": {"rank": 8, "targets": "attention"}}
    helper = train_run(
        run_config(tiny_flux_schnell, pictures, tmp_path / "helper", strong), progress=Listener()
    )
    sample = {"every": 0, "at_start": True, "prompts": ["a cat"], "size": 64, "steps": 2}
    plain, helped = Notes(), Notes()
    train_run(run_config(tiny_flux_schnell, pictures, tmp_path / "plain", {"sample": sample}), progress=plain)
    overrides = {"sample": sample, "model.training_adapter": str(helper.adapter)}
    result = train_run(
        run_config(tiny_flux_schnell, pictures, tmp_path / "helped", overrides), progress=helped
    )
    assert helped.losses[0] != pytest.approx(plain.losses[0], rel=1e-3)
    first = [
        (tmp_path / run / "tiny" / "samples" / "step-00000000-01.png").read_bytes()
        for run in ("plain", "helped")
    ]
    assert first[0] == first[1]
    assert result.adapter is not None
    with safe_open(result.adapter, framework="pt") as opened:
        names = list(opened.keys())
        assert {opened.get_slice(name).get_shape()[0] for name in names if "lora_A" in name} == {4}
        assert opened.metadata()["modelspec.architecture"] == "flux-1-schnell/lora"


@pytest.mark.parametrize("weights", ["native", "int8"])
def test_what_is_trained_goes_on_from_a_base_adapter(
    tiny_flux: Path, pictures: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged first: samples show it, the file does not hold it."""
    monkeypatch.setattr("burnish.memory.quantized.SMALLEST", 1)
    strong = {"train.optimizer.learning_rate": 5e-2, "method": {"rank": 8, "targets": "attention"}}
    first = train_run(run_config(tiny_flux, pictures, tmp_path / "first", strong), progress=Listener())
    sample = {"every": 0, "at_start": True, "prompts": ["a cat"], "size": 64, "steps": 2}
    plain, second = Notes(), Notes()
    options = {"sample": sample, "memory.weights": weights}
    train_run(run_config(tiny_flux, pictures, tmp_path / "plain", options), progress=plain)
    options |= {"model.base_adapter": str(first.adapter), "model.base_adapter_strength": 0.5}
    result = train_run(run_config(tiny_flux, pictures, tmp_path / "second", options), progress=second)
    assert second.losses[0] != pytest.approx(plain.losses[0], rel=1e-3)
    shown = tmp_path / "second" / "tiny" / "samples" / "step-00000000-01.png"
    without = tmp_path / "plain" / "tiny" / "samples" / "step-00000000-01.png"
    assert shown.read_bytes() != without.read_bytes()
    assert result.adapter is not None
    with safe_open(result.adapter, framework="pt") as opened:
        ranks = {opened.get_slice(name).get_shape()[0] for name in opened.keys() if "lora_A" in name}  # noqa: SIM118
    assert ranks == {4}


def test_check_looks_without_loading_a_model(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors.torch, "load_file", no_weights)
    check_run(run_config(tiny_flux, pictures, tmp_path), Listener())
    assert (tmp_path / "tiny" / "data_report.json").exists()
    with pytest.raises(DataError):
        check_run(run_config(tiny_flux, tmp_path / "nowhere", tmp_path), Listener())


def test_generated_prior_pictures_are_drawn_once(tiny_flux: Path, pictures: Path, tmp_path: Path) -> None:
    generated = {
        "kind": "generated",
        "prompts": ["a cat", "blue sky"],
        "count": 3,
        "steps": 1,
        "resolutions": [64],
    }
    config = run_config(tiny_flux, pictures, tmp_path)
    values = config.model_dump(mode="json")
    values["data"].append(generated)
    config = type(config).model_validate(values)
    train_run(config, progress=Listener())
    drawn = sorted((tmp_path / "tiny" / "prior").rglob("*.png"))
    assert len(drawn) == 3
    with Image.open(drawn[0]) as picture:
        assert picture.size == (64, 64)
    kept = [path.read_bytes() for path in drawn]
    drawn[1].unlink()  # as if the drawing had been interrupted
    times = [path.stat().st_mtime_ns for path in (drawn[0], drawn[2])]
    train_run(
        config.model_copy(update={"train": config.train.model_copy(update={"steps": 10})}),
        progress=Listener(),
    )
    assert [path.stat().st_mtime_ns for path in (drawn[0], drawn[2])] == times
    assert [path.read_bytes() for path in drawn] == kept
