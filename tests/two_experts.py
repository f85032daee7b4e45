"""A family with two denoisers, as Wan 2.2 has one for high and one for low noise, out of two of Stable Diffusion 3."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.families.sd3 import NAMES, StableDiffusion3

LABELS: Mapping[str, str] = {"transformer": "high_noise", "transformer_2": "low_noise"}
BOUNDARY = 0.5
(_FIRST,) = StableDiffusion3.denoiser_slots()


class TwoExperts(StableDiffusion3):
    slots = (*StableDiffusion3.slots, replace(_FIRST, folder="transformer_2"))
    export = replace(
        StableDiffusion3.export,
        formats=("diffusers", "comfy"),
        native=NAMES.native_module,
        labels=LABELS,
    )
    chosen = "transformer"

    @property
    def denoiser(self) -> Any:
        return self.module(self.chosen)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        rows = []
        for row in range(len(noisy)):
            self.chosen = "transformer" if float(t_B[row]) >= BOUNDARY else "transformer_2"
            one = slice(row, row + 1)
            rows.append(super().predict(noisy[one], t_B[one], conditioning.rows(one)))
        return torch.cat(rows)


def second_transformer(sd3: Path, folder: Path) -> Path:
    """A copy of a Stable Diffusion 3 pipeline's folder with its transformer twice."""
    shutil.copytree(sd3, folder)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    return folder
