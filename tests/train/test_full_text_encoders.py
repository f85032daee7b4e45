"""Full fine-tuning with text encoders: they learn, resume to the bit, and are what transformers and we read back."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import digest, last_checkpoint, run_config
from safetensors.torch import load_file
from test_families_learn import load, ours, pictures, theirs
from test_textual_inversion import Losses, hold_still
from tiny import Case
from tiny_pipelines import PIPELINES
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from burnish.config.checks import contradictions
from burnish.data.batch import Batch
from burnish.errors import Interrupted, UserError
from burnish.events import Listener
from burnish.objective import Denoising
from burnish.run import check_run, train_run
from burnish.run_folder import RunFolder

TinyFolder = Callable[[str], Path]
CASES = {name: Case(name, PIPELINES[name]) for name in ("sd15", "sdxl")}


def text_config(model: Path, folder: Path, case: Case, name: str = "tiny", **changes: Any) -> Any:
    values = {
        "model.family": case.family,
        # The denoiser hardly moves: what is learned, the text encoders learn.
        "method": {"kind": "full", "targets": "attention", "text_encoders": {"learning_rate": 1e-3}},
        "train.optimizer": {"kind": "adamw", "learning_rate": 1e-9, "weight_decay": 0},
        "train.schedule": {"kind": "constant"},
        "save.format": "diffusers",
        "data": [{"kind": "folder", "path": str(folder / "pictures"), "resolutions": [case.side]}],
        **changes,
    }
    return run_config(model, folder / "pictures", folder / "runs", values, name)


def test_text_encoders_learn_and_diffusers_draws_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = CASES["sdxl"], tiny_folder("sdxl")
    pictures(tmp_path / "pictures", case.side)
    hold_still(monkeypatch)
    result = train_run(
        text_config(model, tmp_path, case, **{"train.steps": 8}), progress=(losses := Losses())
    )
    assert losses.seen[-1] < 0.99 * losses.seen[0]
    folder = RunFolder(result.folder).models / "tiny"
    read = {
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
    }
    # As released, which ComfyUI and older versions of transformers want.
    names = load_file(folder / "text_encoder_2" / "model.safetensors").keys()
    assert {"text_projection.weight", "text_model.encoder.layers.0.mlp.fc1.weight"} <= names
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    trained = last_checkpoint(tmp_path / "runs").tensors["adapter"]
    for part, encoder in read.items():
        state = encoder.state_dict()
        mine = {
            key.removeprefix(f"{part}."): one for key, one in trained.items() if key.startswith(f"{part}.")
        }
        assert mine
        assert all(torch.equal(state[key], one) for key, one in mine.items())
    drawn = theirs(model, None, case, **read)
    plain = ours(load(model, case), case)
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(folder, tmp_path / "model", dirs_exist_ok=True)
    family = load(tmp_path / "model", case)
    found = ours(family, case)
    assert (found - plain).abs().max() > 0.01, "there is no effect to compare"
    torch.testing.assert_close(found, drawn, atol=1e-4, rtol=0)


def test_an_interrupted_run_ends_in_the_same_bits(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = CASES["sd15"], tiny_folder("sd15")
    pictures(tmp_path / "pictures", case.side)
    changes = {
        "method": {"kind": "full", "targets": "attention", "text_encoders": {"which": ["clip_l"]}},
        "train.optimizer": {"kind": "adamw", "learning_rate": 1e-4},
        "train.ema": {"decay": 0.9},
        "train.schedule": {"kind": "constant"},
        "train.steps": 3,
    }
    train_run(text_config(model, tmp_path, case, "straight", **changes), progress=Listener())
    expected = last_checkpoint(tmp_path / "runs", "straight")
    assert {key.split(".")[0] for key in expected.tensors["adapter"]} == {"unet", "text_encoder"}
    draw = Denoising.draw_noise

    def draw_and_stop(objective: Denoising, batch: Batch, seed: int) -> torch.Tensor:
        if batch.position == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(objective, batch, seed)

    stopped = text_config(model, tmp_path, case, "stopped", **changes)
    monkeypatch.setattr(Denoising, "draw_noise", draw_and_stop)
    with pytest.raises(Interrupted):
        train_run(stopped, progress=Listener())
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "runs", "stopped").step == 2
    train_run(stopped, progress=Listener())
    assert digest(last_checkpoint(tmp_path / "runs", "stopped")) == digest(expected)


def test_what_does_not_go_with_it_says_so(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    case, model = CASES["sd15"], tiny_folder("sd15")
    pictures(tmp_path / "pictures", case.side)
    unknown = {"method": {"kind": "full", "text_encoders": {"which": ["clip_g"]}}}
    with pytest.raises(UserError, match=r"has no clip_g"):
        check_run(text_config(model, tmp_path, case, **unknown), Listener())
    kept = text_config(model, tmp_path, case, **{"memory.text_encoder_weights": "int8"})
    assert {path for path, _ in contradictions(kept)} == {("memory", "text_encoder_weights")}
