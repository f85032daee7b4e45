"""Adapters on text encoders: they learn, resume to the bit, and do in diffusers what they do here."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released_widths import flux_loader
from runs import digest, last_checkpoint, run_config
from safetensors.torch import load_file, save_file
from test_families_learn import load, ours, pictures, theirs
from test_textual_inversion import Losses, hold_still
from tiny import Case, cases
from tiny_pipelines import PIPELINES

from burnish.adapters.layer import adaptable_modules
from burnish.config.checks import contradictions
from burnish.errors import ExportError, Interrupted, UserError
from burnish.events import Listener, StepReport
from burnish.export.adapter_file import read_adapter, read_text_adapters
from burnish.export.text_encoders import file_modules, own_names
from burnish.export.verify import verify_adapter
from burnish.family import Family
from burnish.generate import attach_adapter, attach_texts
from burnish.run import train_run
from burnish.toolbox.inspect import inspect
from burnish.toolbox.source import AdapterSource

TinyFolder = Callable[[str], Path]
CASES = {name: Case(name, PIPELINES[name]) for name in ("sd15", "sdxl")}
CASES |= {name: cases()[name] for name in ("flux", "sd3")}
LAYER = "text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
DOTTED = "text_model.encoder.layers.0.mlp.fc2.lora_A.weight"
# As ComfyUI's `model_lora_keys_clip` has them, for the first CLIP and the second.
KEYS = {
    "sd15": [f"lora_te_{LAYER}"],
    "sdxl": [f"lora_te1_{LAYER}", f"lora_te2_{LAYER}"],
    "flux": [f"text_encoder.{DOTTED}"],
    "flux, kohya": [f"lora_te1_{LAYER}"],
    "sd3": [f"text_encoder.{DOTTED}", f"text_encoder_2.{DOTTED}"],
}


def text_config(model: Path, folder: Path, case: Case, **changes: Any) -> Any:
    values = {
        "model.family": case.family,
        # The denoiser hardly moves: what is learned, the text encoders learn.
        "method": {"rank": 4, "alpha": 10, "text_encoders": {"learning_rate": 2e-2}},
        "train.optimizer": {"kind": "adamw", "learning_rate": 1e-9},
        "train.schedule": {"kind": "constant"},
        "data": [{"kind": "folder", "path": str(folder / "pictures"), "resolutions": [case.side]}],
        **changes,
    }
    return run_config(model, folder / "pictures", folder / "runs", values)


@pytest.mark.parametrize("told", KEYS)
def test_text_encoders_learn_and_diffusers_draws_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, format = told.partition(", ")
    case, model = CASES[name], tiny_folder(name)
    pictures(tmp_path / "pictures", case.side)
    hold_still(monkeypatch)
    config = text_config(model, tmp_path, case, **{"train.steps": 12, "save.format": format or "auto"})
    path = train_run(config, progress=(losses := Losses())).adapter
    assert path is not None
    assert losses.seen[-1] < 0.99 * losses.seen[0]
    file = load_file(path)
    for key in KEYS[told]:
        assert key in file, sorted(key for key in file if "text" in key)
    encoders = {key.split("text_model")[0] for key in file if "text_model" in key}
    assert len(encoders) == len(KEYS[told])
    assert not any("text_projection" in key for key in file)
    with AdapterSource(path, case.family) as source:
        seen = inspect(source)
    assert seen.text_encoder_modules == sum(
        "text_model" in k and ("down" in k or "lora_A" in k) for k in file
    )
    assert not seen.unknown_keys
    assert {one.name for one in seen.readers if one.loads} >= {"ComfyUI", "diffusers"}

    family = load(model, case)
    plain = ours(family, case)
    texts = attach_texts(family, path, 1.0, pytest.fail)
    assert len(texts) == len(KEYS[told])
    attach_adapter(family, path, pytest.fail, texts_apart=True)
    with_adapter = ours(family, case)
    assert (with_adapter - plain).abs().max() > 0.01, "there is no effect to compare"
    widths = flux_loader(family.denoisers["transformer"]) if format == "kohya" else {}
    drawn = theirs(model, path, replace(case, loader_widths={**case.loader_widths, **widths}))
    torch.testing.assert_close(with_adapter, drawn, atol=1e-4, rtol=0)
    broken_files_are_caught(family, path, tmp_path)


def broken_files_are_caught(family: Family, path: Path, folder: Path) -> None:
    """A file without `text_model.`, one with a module less, and one of another strength."""
    tensors = load_file(path)
    part, denoiser = next(iter(family.denoisers.items()))
    keys = family.export
    trained = read_adapter(path, adaptable_modules(denoiser), part=part, keys=keys, texts_apart=True).weights
    encoders = {name: family.loaded[name] for name in keys.text_encoders}
    files = read_text_adapters(path, {name: file_modules(one) for name, one in encoders.items()}, keys)
    texts = {name: (own_names(one.weights, encoders[name]), encoders[name]) for name, one in files.items()}
    verify_adapter(path, trained, denoiser, part=part, keys=keys, texts=texts)
    mine = [key for key in tensors if "text_model" in key]
    ups = [key for key in mine if "lora_up" in key or "lora_B" in key]
    module = ups[0].rpartition(".lora")[0]
    absent = "trained but not in the file"
    ways: list[tuple[str, dict[str, torch.Tensor]]] = [
        (absent, {re.sub(r"text_model[._]", "", key): one for key, one in tensors.items()}),
        (absent, {key: one for key, one in tensors.items() if not key.startswith(module + ".")}),
        ("another effect", {key: one * 1.05 if key == ups[0] else one for key, one in tensors.items()}),
    ]
    for said, wrong in ways:
        save_file(wrong, folder / "broken.safetensors")
        with pytest.raises(ExportError, match=said):
            verify_adapter(
                folder / "broken.safetensors", trained, denoiser, part=part, keys=keys, texts=texts
            )
    with pytest.raises(ExportError, match="were not trained"):
        verify_adapter(path, trained, denoiser, part=part, keys=keys)


class Stop(Listener):
    def stepped(self, report: StepReport) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_resume_is_exact_and_one_encoder_can_be_chosen(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    case = CASES["sdxl"]
    for place in ("through", "stopped"):
        (tmp_path / place).mkdir()
        pictures(tmp_path / place / "pictures", case.side)
    changes = {
        "method": {"kind": "lokr", "factor": 2, "dropout": 0.1, "text_encoders": {"which": ["clip_g"]}},
        "train.optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        "train.steps": 6,
        "train.ema": {"decay": 0.9},
        "train.batch_size": 1,
        "train.validation": {"pictures": 1, "every": 2, "times": [0.3, 0.7]},
    }
    through = text_config(tiny_folder("sdxl"), tmp_path / "through", case, **changes)
    stopped = text_config(tiny_folder("sdxl"), tmp_path / "stopped", case, **changes)
    whole = train_run(through, progress=Listener())
    with pytest.raises(Interrupted):
        train_run(stopped, progress=Stop())
    assert last_checkpoint(stopped.save.folder).step == 3
    result = train_run(stopped, progress=Listener())
    assert digest(last_checkpoint(through.save.folder)) == digest(last_checkpoint(stopped.save.folder))
    assert (result.best_step, result.best_loss) == (whole.best_step, whole.best_loss)
    assert whole.adapter is not None
    found = {key.split("_text_model")[0] for key in load_file(whole.adapter) if "text_model" in key}
    assert found == {"lora_te2"}


def test_what_has_no_clip_and_what_asks_the_model_of_before_is_refused(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    pictures(tmp_path / "pictures", 64)
    case = Case("chroma", cases()["chroma"].build)
    with pytest.raises(UserError, match="has no CLIP"):
        train_run(text_config(tiny_folder("chroma"), tmp_path, case), progress=Listener())
    missing = text_config(
        tiny_folder("sd15"), tmp_path, CASES["sd15"], **{"method.text_encoders": {"which": ["clip_g"]}}
    )
    with pytest.raises(UserError, match=r"has no clip_g\n.*clip_l"):
        train_run(missing, progress=Listener())
    preserved = text_config(
        tiny_folder("sd15"), tmp_path, CASES["sd15"], **{"data.0.target": "model", "trigger": "sks"}
    )
    ((path, why),) = contradictions(preserved)
    assert path == ("data", 0, "target")
    assert "text encoders that train" in why
