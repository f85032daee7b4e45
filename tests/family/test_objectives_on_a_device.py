"""Every objective on a pretended accelerator: what it computes of times is sent there, and nothing is read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_device import DEVICE, pretended, reading
from test_devices import SIDE, on_the_device
from test_host_reads import on_the_device_with_batch
from torch import Tensor

from burnish.adapters.attached import AdapterSet, all_at, all_disabled
from burnish.adapters.targeting import choose_modules
from burnish.adapters.words import NewWord
from burnish.assembly import with_prompts
from burnish.conditioning import Conditioning
from burnish.config.method import AdapterMethod, Boft, Loha, Lokr, Lora, Oft, TextualInversion, Vae
from burnish.config.objective import (
    P2,
    Absolute,
    Bell,
    Debiased,
    Emphasis,
    Huber,
    LogCosh,
    MinSnr,
    Multires,
    PseudoHuber,
    SmoothL1,
    SoftMinSnr,
)
from burnish.data.batch import Batch, Direction, Opposites, Preference
from burnish.diffusion.times import Timesteps
from burnish.family import Family
from burnish.latent_shape import PictureInfo
from burnish.objective import Denoising
from burnish.optim.ema import Ema
from burnish.reconstruction import Reconstruction, autoencoder_of

TinyFolder = Callable[[str], Path]
OBJECTIVES: Mapping[str, dict[str, Any]] = {
    "absolute, min_snr": {"loss": Absolute(kind="mae"), "weighting": MinSnr()},
    "log_cosh, soft": {"loss": LogCosh(kind="log_cosh"), "weighting": SoftMinSnr(kind="soft_min_snr")},
    "huber": {"loss": Huber(kind="huber"), "weighting": Debiased(kind="debiased")},
    "pseudo_huber": {"loss": PseudoHuber(kind="pseudo_huber", decay="snr"), "weighting": P2(kind="p2")},
    "smooth_l1": {"loss": SmoothL1(kind="smooth_l1"), "weighting": Bell(kind="bell")},
    "noises": {"noise_offset": 0.1, "multires": Multires(), "input_perturbation": 0.1},
    "emphasis": {"timesteps": Timesteps(emphasis=(Emphasis(times=(0.2, 0.8), drawn=2.0, weight=3.0),))},
}
METHODS: Mapping[str, AdapterMethod] = {
    "dora": Lora(rank=2, dora=True, rank_dropout=0.2, module_dropout=0.2, dropout=0.1),
    "pissa": Lora(rank=2, start="pissa"),
    "loha": Loha(kind="loha", rank=2, rank_dropout=0.2),
    "lokr": Lokr(kind="lokr", factor=4, full_rank=False, rank=2, dora=True, rank_dropout=0.2),
    "oft": Oft(kind="oft", block_size=4, rank_dropout=0.2),
    "boft": Boft(kind="boft", block_size=4),
}


def masked(batch: Batch) -> Batch:
    half = torch.ones(2, 1, *batch.latents_BCHW.shape[2:])
    half[:, :, : half.shape[2] // 2] = 0
    return replace(batch, counted=half, kept=1 - half)


BATCHES: Mapping[str, Callable[[Batch], Batch]] = {
    "masked": masked,
    "guided": lambda batch: replace(batch, unprompted=batch.conditioning),
    "opposites": lambda batch: replace(batch, contrast=Opposites()),
    "slider": lambda batch: replace(
        batch, contrast=Direction(batch.conditioning, batch.conditioning, torch.full((2,), 3.0))
    ),
    "preference": lambda batch: replace(
        batch, contrast=Preference(beta_B=torch.full((1,), 2000.0), decays_B=torch.ones(1))
    ),
}


def with_adapter(family: Family, method: AdapterMethod) -> tuple[Denoising, list[AdapterSet]]:
    adapters = []
    for denoiser in family.denoisers.values():
        denoiser.requires_grad_(False)
        chosen = choose_modules(denoiser, family.targets, "attention", method)
        adapters.append(AdapterSet.attach(denoiser, chosen, seed=0))
    objective = Denoising(family.schedule, guided_target=3.5)
    return (
        replace(objective, frozen=partial(all_disabled, adapters), strength=partial(all_at, adapters)),
        adapters,
    )


def learned(objective: Denoising, family: Family, batch: Batch) -> list[Tensor]:
    losses = []
    for turn in objective.turns(family, batch.to(DEVICE), seed=0):
        (turn.loss_B * turn.weight_B).sum().backward()
        losses.append(turn.loss_B.detach())
    return losses


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_weights_and_noise(tiny_folder: TinyFolder, kind: str) -> None:
    family, batch = on_the_device_with_batch(tiny_folder("sd15"), "sd15")
    with pretended(), torch.enable_grad(), reading() as places:
        learned(Denoising(family.schedule, **OBJECTIVES[kind]), family, batch)
    assert not places


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_masks_and_differences(tiny_folder: TinyFolder, name: str, kind: str) -> None:
    family, batch = on_the_device_with_batch(tiny_folder(name), name)
    with pretended():
        objective, adapters = with_adapter(family, Lora(rank=2))
        with torch.enable_grad(), reading() as places:
            learned(objective, family, BATCHES[kind](batch))
        assert not places
        assert any(one.grad is not None for one in adapters[0].named_parameters().values())


@pytest.mark.parametrize("kind", METHODS)
def test_kinds_of_adapters(tiny_folder: TinyFolder, kind: str) -> None:
    family, batch = on_the_device_with_batch(tiny_folder("sd15"), "sd15")
    with pretended():
        objective, (adapter,) = with_adapter(family, METHODS[kind])
        for denoiser in family.denoisers.values():
            denoiser.train()
        parameters = adapter.named_parameters()
        average = Ema(parameters, 0.9)
        with torch.enable_grad(), reading() as places:
            learned(objective, family, batch)
            average.update()
        # Backward of slices and transposes fills in zeros in C++, which the pretended device then has to meet.
        assert set(places) <= {"elsewhere"}
        assert all(one.is_cuda for one in parameters.values())


def test_a_word_is_encoded_where_its_text_encoder_is(tiny_folder: TinyFolder) -> None:
    family, batch = on_the_device_with_batch(tiny_folder("sdxl"), "sdxl")
    with pretended():
        told = family.describe_pictures([PictureInfo.whole(SIDE, SIDE)] * 2).to("cpu")
        batch = replace(batch, captions=("a photo of <it>", "<it>"), conditioning=told)
        asked = TextualInversion(kind="textual_inversion", token="<it>", vectors=2)
        words = [NewWord.teach(one, asked, name, seed=0) for name, one in family.vocabularies.items()]
        with torch.enable_grad(), reading() as places:
            learned(Denoising(family.schedule), family, with_prompts(family, batch.to(DEVICE)))
        assert set(places) <= {"elsewhere"}
        assert len(words) == 2
        assert all(one.vectors_ND.is_cuda and one.vectors_ND.grad is not None for one in words)


def test_a_vae_shows_pictures_where_it_is(tiny_folder: TinyFolder) -> None:
    family = on_the_device(tiny_folder("sd15"), "sd15")
    pixels = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    batch = Batch(pixels, Conditioning({}), torch.ones(2), ("a", "b"), ("a.png", "b.png"), 0)
    objective = Reconstruction.of(Vae(kind="vae", encoder=True), torch.float32)
    with pretended():
        vae = autoencoder_of(family).requires_grad_()
        with torch.enable_grad(), reading() as places:
            (turn,) = objective.turns(family, batch.to(DEVICE), seed=0)
            turn.loss_B.sum().backward()
        assert set(places) <= {"elsewhere"}
        assert all(one.grad is not None for one in vae.parameters())
