"""Masked loss and what is to stay as it was, on the embedded demo model: seen in what it says afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import run_config
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.config.schema import Model
from burnish.data.batch import Batch
from burnish.data.prepare import pixels_of
from burnish.diffusion.mixing import noisy_and_target
from burnish.events import Listener, StepReport
from burnish.family import Family
from burnish.generate import attach_adapter
from burnish.model import choose_model
from burnish.objective import Denoising
from burnish.run import train_run

SIDE, CAPTION, CLASS = 128, "a sks star on a white background", "a blue star on a white background"
Part = tuple[slice, ...]
INSIDE: Part = (slice(None), slice(None), slice(None), slice(0, 6))  # of 16 latents: off the edge of the mask
OUTSIDE: Part = (slice(None), slice(None), slice(None), slice(10, 16))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture, stripes at the left and squares at the right; a mask of the left half, and as transparency."""
    folder = tmp_path_factory.mktemp("masked")
    values = np.zeros((SIDE, SIDE, 3), np.uint8)
    values[:, ::16, 0] = 255
    values[:, 8 : SIDE // 2 : 16, 1] = 200
    values[:, SIDE // 2 :, :] = 230
    values[32:96, 80:112, 2] = 0
    (folder / "pictures" / "masks").mkdir(parents=True)
    Image.fromarray(values).save(folder / "pictures" / "a.png")
    (folder / "pictures" / "a.txt").write_text(CAPTION)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, : SIDE // 2] = 255
    Image.fromarray(mask).save(folder / "pictures" / "masks" / "a.png")
    return folder / "pictures"


class Losses(Listener):
    def __init__(self) -> None:
        self.found: list[float] = []

    def stepped(self, report: StepReport) -> None:
        self.found.append(report.loss)


def trained(
    pictures: Path, output: Path, name: str, more: Mapping[str, Any] | None = None, **source: Any
) -> tuple[Path, list[float]]:
    data = [{"path": str(pictures), "resolutions": [SIDE], **source}]
    values = {
        "data": data,
        "model.path": "demo",
        "method": {"rank": 8, "targets": "all"},
        "train.steps": 50,
        "train.batch_size": 1,
        "train.optimizer.learning_rate": 3e-3,
        "train.schedule": {"kind": "constant"},
        **(more or {}),
    }
    heard = Losses()
    result = train_run(run_config(Path("demo"), pictures, output, values, name), progress=heard)
    assert result.adapter is not None
    return result.adapter, heard.found


def said(family: Family, latents: Tensor, caption: str) -> tuple[Tensor, Tensor]:
    """Predictions at a few times and fixed noise, and their targets."""
    times = torch.tensor([0.3, 0.5, 0.7, 0.9]).repeat(2)
    noise = torch.randn(len(times), *latents.shape[1:], generator=torch.Generator().manual_seed(1))
    noisy, target = noisy_and_target(family.schedule, latents.expand_as(noise), noise, times)
    conditioning = family.encode_prompts([caption]).rows([0] * len(times))
    return family.predict(noisy, times, conditioning), target


class Said:
    """What the model said before and says after, of the picture at its own caption and at the class word's."""

    @torch.no_grad()
    def __init__(self, adapter: Path, picture: Path, captions: tuple[str, ...] = (CAPTION, CLASS)) -> None:
        family = choose_model(Model(path="demo")).load(
            "denoiser", "vae", "text_encoders", dtype=torch.float32, device="cpu"
        )
        latents = family.encode_pixels(pixels_of(Image.open(picture).convert("RGB"))[None])
        self.before, (self.target, _) = zip(*(said(family, latents, one) for one in captions), strict=True)
        attach_adapter(family, adapter, print)
        self.after = tuple(said(family, latents, one)[0] for one in captions)

    def error(self, part: Part) -> float:
        """What is left of the error at the picture's caption in this part, as a share."""
        return distance(self.after[0], self.target, part) / distance(self.before[0], self.target, part)

    def change(self, part: Part, caption: int = 0) -> float:
        return distance(self.after[caption], self.before[caption], part)


def distance(one: Tensor, other: Tensor, part: Part) -> float:
    return float((one - other)[part].square().mean())


def test_what_is_masked_out_is_not_learned_and_with_a_prior_stays(pictures: Path, tmp_path: Path) -> None:
    masks = {"path": str(pictures / "masks")}
    masked, _ = trained(pictures, tmp_path, "masked", loss_masks=masks)
    kept, losses = trained(pictures, tmp_path, "kept", loss_masks={**masks, "prior": 1.0})
    assert np.isfinite(losses).all()
    alone, with_prior = Said(masked, pictures / "a.png"), Said(kept, pictures / "a.png")
    assert alone.error(INSIDE) < 0.1
    assert alone.error(OUTSIDE) > 0.5  # with the whole picture trained it is 0.17
    assert with_prior.error(INSIDE) < 0.15
    assert with_prior.error(OUTSIDE) > 0.9
    assert with_prior.change(OUTSIDE) < 0.1 * with_prior.change(INSIDE)
    assert with_prior.change(OUTSIDE) < 0.2 * alone.change(OUTSIDE)
    # The class word goes the trigger's way, unless its output is preserved: the test below.
    assert alone.change(INSIDE, 1) > 0.5 * alone.change(INSIDE)


def test_what_is_masked_out_reaches_no_weight(pictures: Path) -> None:
    """Two pictures that differ where the mask is black alone move every weight alike, to the bit: the model is shown
    that part as one and the same here, so that what is left of it is its part in the loss."""
    family = choose_model(Model(path="demo")).load(
        "denoiser", "vae", "text_encoders", dtype=torch.float32, device="cpu"
    )
    (denoiser,) = family.denoisers.values()
    one = family.encode_pixels(pixels_of(Image.open(pictures / "a.png").convert("RGB"))[None])
    other = one.clone()
    other[..., 8:] += 3
    mask = torch.ones(1, 1, *one.shape[-2:])
    mask[..., 8:] = 0
    told, noise = family.encode_prompts([CAPTION]), torch.randn_like(one)
    weights = [part.requires_grad_() for name, part in denoiser.named_parameters() if "attn.to_" in name]

    def gradients(latents: Tensor, counted: Tensor | None) -> list[Tensor]:
        batch = Batch(latents, told, torch.ones(1), ("a",), ("a",), 0, counted=counted)

        def predict(noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
            return family.predict(noisy * mask, t_B, conditioning)

        loss_B = Denoising(family.schedule).losses_at(family, batch, noise, torch.tensor([0.5]), predict)
        return list(torch.autograd.grad(loss_B.sum(), weights, allow_unused=True))

    pairs = list(zip(gradients(one, mask), gradients(other, mask), strict=True))
    assert any(found is not None and found.any() for found, _ in pairs)
    assert all(torch.equal(found, also) for found, also in pairs if found is not None)
    without = zip(gradients(one, None), gradients(other, None), strict=True)
    assert all(not torch.equal(found, also) for found, also in without if found is not None)


def test_the_class_word_says_what_it_said_while_the_trigger_is_learned(
    pictures: Path, tmp_path: Path
) -> None:
    adapter, losses = trained(
        pictures, tmp_path, "preserved", {"trigger": "sks", "train.batch_size": 2}, preserve={"word": "blue"}
    )
    assert np.isfinite(losses).all()
    heard = Said(adapter, pictures / "a.png")
    assert heard.error(INSIDE) < 0.25
    assert heard.change(INSIDE, 1) < 0.2 * heard.change(INSIDE)
    assert heard.change(OUTSIDE, 1) < 0.2 * heard.change(OUTSIDE)
