"""A run that averages by width: saves tell of it, others are made of them, and a resume goes on in the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import digest, last_checkpoint, picture_folder, run_config, short_prompts
from safetensors import safe_open
from safetensors.torch import load_file

from burnish.errors import UserError
from burnish.events import Listener
from burnish.optim.power_average import Snapshot, combination
from burnish.run import train_run
from burnish.toolbox.average import average

OPTIONS = {
    "method": {"rank": 2, "targets": "attention"},
    "train.steps": 6,
    "train.ema": {"width": 0.1},
    "save.every": 2,
    "save.dtype": "float32",
}


def test_other_widths_are_made_of_the_saves(tiny_flux: Path, tmp_path: Path) -> None:
    model = short_prompts(tiny_flux, tmp_path / "flux")
    pictures = picture_folder(tmp_path / "six")
    result = train_run(run_config(model, pictures, tmp_path / "whole", OPTIONS), progress=Listener())
    assert result.adapter is not None
    saves = sorted((tmp_path / "whole" / "tiny" / "adapters").glob("*-*.safetensors"))
    assert len(saves) >= 2
    told = [json.loads(safe_open(one, "pt").metadata()["burnish.average"]) for one in saves]
    assert [one["width"] for one in told] == [0.1] * len(saves)
    assert [one["updates"] for one in told] == [one["step"] for one in told]

    outcome = average(saves, tmp_path / "b.safetensors", width=0.2)
    last = max(one["updates"] for one in told)
    shares, _ = combination([Snapshot(0.1, one["updates"]) for one in told], Snapshot(0.2, last))
    files = [load_file(one) for one in saves]
    for name, found in load_file(tmp_path / "b.safetensors").items():
        expected = sum(share * file[name] for share, file in zip(shares, files, strict=True))
        torch.testing.assert_close(found, expected)
    assert "off by" in outcome.notes[0]
    with pytest.raises(UserError, match="does not tell"):
        average([saves[0], tmp_path / "b.safetensors"], tmp_path / "c.safetensors", width=0.2)
    with pytest.raises(UserError, match="exclude each other"):
        average(saves, tmp_path / "c.safetensors", [1.0] * len(saves), width=0.2)

    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    shutil.rmtree(half / "tiny" / "checkpoints" / "step-00000006")
    train_run(run_config(model, pictures, half, OPTIONS), progress=Listener())
    assert digest(last_checkpoint(half)) == digest(last_checkpoint(tmp_path / "whole"))
