"""No family waits for its device on the way through the denoiser and back: what it has to know is known on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from pretend_device import DEVICE, pretended, reading
from test_devices import FAMILY_OF, PROMPTS, SIDE, on_the_device

from burnish.conditioning import Conditioning
from burnish.config.objective import MinSnr
from burnish.data.batch import Batch
from burnish.events import Events
from burnish.family import Family
from burnish.latent_shape import PictureInfo
from burnish.loop import Training, train
from burnish.objective import Denoising

TinyFolder = Callable[[str], Path]
# What upstream code reads back in each step, by family: there is no way around it but code of our own.
KNOWN = {
    # How many tokens an expert is called for is known when the layer before it is done.
    "hidream": {"hidream_transformer.py:_shares"},
    "hidream_e1": {"hidream_transformer.py:_shares"},
    # diffusers asks whether the first frame's picture is empty, and joins captions by their masks (and backward, too).
    "hunyuan_video15": {"transformer_hunyuan_video15.py:forward", "elsewhere"},
    # diffusers joins captions and picture by the lengths that the mask tells it (and backward, too).
    "lumina2": {"transformer_lumina2.py:forward", "elsewhere"},
}


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "bool": lambda far: bool((far > 0).all()),
    "int": lambda far: int(far.sum()),
    "item": lambda far: far[0].item(),
    "tolist": lambda far: far.tolist(),
    "equal": lambda far: torch.equal(far, far),
    "mask": lambda far: far[far > 0],
    "mask_assigned": lambda far: far.index_put((far > 0,), far[0]),
    "where": lambda far: torch.where(far > 0),
    "nonzero": lambda far: far.nonzero(),
    "masked_select": lambda far: far.masked_select(far > 0),
    "unique": lambda far: far.unique(),
    "repeats": lambda far: far.repeat_interleave(far),
    "cpu": lambda far: far.cpu(),
    "to": lambda far: far.to("cpu"),
}


@pytest.mark.parametrize("read", READS)
def test_every_way_to_read_back_is_noticed(read: str) -> None:
    with pretended(), reading() as places:
        READS[read](torch.arange(1, 4, device=DEVICE))
    assert places


def test_what_reads_nothing_is_let_pass() -> None:
    with pretended(), reading() as places:
        far = torch.arange(4, device=DEVICE)
        far[1:].sum() + far[torch.zeros(2, dtype=torch.int64, device=DEVICE)] + far.to(DEVICE)[0]
    assert not places


def told(family: Family, frames: int) -> Conditioning:
    """What the cache holds of two samples with captions of different length, and references of different size."""
    can = family.capabilities
    own = can.masks or can.first_frame
    rows = []
    for number, prompt in enumerate(PROMPTS):
        sides = [(SIDE, SIDE)] * min(2 if can.last_frame or not own else 1, can.references)
        if not own:
            sides = [family.reference_size(SIDE, SIDE * (1 + number), (SIDE, SIDE)) for _ in sides]
        pictures = [torch.zeros(3, *side, device=DEVICE) for side in sides]
        row = family.encode_prompts([prompt], [pictures] if can.prompts_see_references else ())
        row = row.merged(family.describe_pictures([PictureInfo.whole(SIDE, SIDE)]))
        if pictures:
            mask = torch.ones(1, 1, SIDE, SIDE, device=DEVICE) if can.masks else None
            shown = [picture[None] for picture in pictures]
            row = row.merged(family.encode_references(shown, mask_B1HW=mask, frames=frames))
        rows.append(row.to("cpu"))
    return Conditioning.collate(rows)


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_training_step_reads_nothing_back(tiny_folder: TinyFolder, name: str) -> None:
    family, batch = on_the_device_with_batch(tiny_folder(name), name)
    with pretended(), torch.enable_grad(), reading() as places:
        loss_B, _ = Denoising(family.schedule).losses(family, batch.to(DEVICE), seed=0)
        loss_B.sum().backward()
    assert set(places) == KNOWN.get(FAMILY_OF[name], set())


def on_the_device_with_batch(folder: Path, name: str) -> tuple[Family, Batch]:
    """A family whose denoisers are trained, and two samples as the loader gives them."""
    family = on_the_device(folder, name)
    compression = family.latents.frame_compression
    frames = 1 + (compression or 0) if family.capabilities.video else 1
    with pretended(), torch.no_grad():
        conditioning = Conditioning(dict(told(family, frames)))
    latents = torch.zeros(2, *family.latents.of(SIDE, SIDE, frames))
    batch = Batch(latents, conditioning, torch.ones(2), ("a", "b"), ("a.png", "b.png"), 0)
    for denoiser in family.denoisers.values():
        denoiser.requires_grad_()
    return family, batch


@pytest.mark.parametrize("name", ["sd15", "flux_kontext"])
def test_the_loop_reads_once_per_step(tiny_folder: TinyFolder, name: str) -> None:
    family, batch = on_the_device_with_batch(tiny_folder(name), name)
    parameters = {
        f"{folder}.{key}": parameter
        for folder, denoiser in family.denoisers.items()
        for key, parameter in denoiser.named_parameters()
    }
    run = Training(
        family=family,
        objective=Denoising(family.schedule, weighting=MinSnr(gamma=5.0)),
        parameters=parameters,
        optimizer=torch.optim.AdamW(
            [{"params": list(parameters.values()), "initial_lr": 1e-4}], foreach=False
        ),
        learning_rate_factor=lambda step: 1.0,
        batches=lambda position: (replace(batch, position=position + n) for n in count()),
        batches_per_epoch=2,
        device=DEVICE,
        dtype=torch.float32,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        seed=0,
        steps=3,
        accumulate=2,
    )
    with pretended(), torch.enable_grad(), reading() as places:
        train(run, Events(), [], lambda: False)
    assert places == ["loop.py:train_from"] * run.steps
