"""The plan of full fine-tuning against what a real step takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_planner import allocated, kept, peak_of

from burnish.adapters.own_weights import OwnWeights, choose_weights
from burnish.config.method import Full
from burnish.config.optimizers import AdamW
from burnish.config.schema import Memory
from burnish.data.batch import Batch
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.memory.activations import Mode
from burnish.memory.gradient_release import GradientRelease
from burnish.objective import Denoising
from burnish.optim.build import build_optimizer
from burnish.optim.one_by_one import OneByOne
from burnish.planner.measure import Measure
from burnish.planner.profile import Profile
from burnish.planner.recipe import Recipe, Shape
from burnish.planner.trace import trace_step

TinyFolder = Callable[[str], Path]


def all_weights(family: Family) -> dict[str, dict[str, float | None]]:
    return {
        part: choose_weights(denoiser, family.targets, Full(kind="full"))
        for part, denoiser in family.denoisers.items()
    }


def step_of_all_weights(family: Family, shape: Shape, mode: Mode, steps: Memory) -> Callable[[], None]:
    """A step that moves every weight, as a run makes it."""
    groups = [
        group
        for part, rates in all_weights(family).items()
        for group in OwnWeights.unfreeze(family.denoisers[part], rates).parameter_groups(1e-4)
    ]
    kept(mode)(family)
    parameters = [one for group in groups for one in group["params"]]
    optimizer = build_optimizer(AdamW(), groups, one_by_one=steps.steps_singly)
    release = None
    if steps.steps_singly:
        assert isinstance(optimizer, OneByOne)
        release = GradientRelease(parameters, optimizer.step_one, 1.0) if steps.gradient_release else None
    noisy, times_B, conditioning = family.example(shape.height, shape.width, shape.batch, shape.frames)
    batch = Batch(noisy, conditioning, torch.ones(shape.batch), ("0",) * shape.batch, ("0",) * shape.batch, 0)
    objective = Denoising(family.schedule)

    def step() -> None:
        loss_B = objective.losses_at(family, batch, torch.randn_like(noisy, dtype=torch.float32), times_B)
        with nullcontext() if release is None else release.moving():
            torch.autograd.backward(loss_B.sum())
        if release is None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


# Small pictures, so that weights, gradients and states are what counts; and large ones, so that activations do.
@pytest.mark.parametrize(
    ("name", "side", "mode", "released"),
    [("sd3", 64, "keep", False), ("sd3", 64, "keep", True), ("sd3", 256, "recompute", True)],
)
def test_a_traced_step_of_a_models_own_weights_takes_what_the_allocator_says(
    tiny_folder: TinyFolder, name: str, side: int, mode: Mode, released: bool
) -> None:
    kind = family_named(name)
    load = partial(kind.load, ModelSource(str(tiny_folder(name))), dtype=torch.float32, device="cpu")
    shape, steps = Shape(side, side, batch=2), Memory(gradient_release=released)
    real = allocated(step_of_all_weights(load(frozenset({"denoiser"})), shape, mode, steps))
    known = load(frozenset())
    recipe = replace(whole(known, mode, steps), choices=all_weights(kind.skeleton(of=known)))
    traced = trace_step(lambda: kind.skeleton(of=known, dtype=torch.float32), shape, recipe, cuda=False)
    assert peak_of(traced) - traced.resident == pytest.approx(real, rel=0.01)


def whole(known: Family, mode: Mode, steps: Memory) -> Recipe:
    return Recipe(
        {},
        Denoising(known.schedule),
        partial(build_optimizer, AdamW(rounding="nearest"), one_by_one=steps.steps_singly),
        keep_activations=kept(mode),
        own_weights=True,
        releases=steps.gradient_release,
        offloads=steps.offload_optimizer,
    )


def test_steps_in_backward_and_states_on_the_host_leave_the_device_what_they_should() -> None:
    """Of FLUX.1, 11.9 billion weights in bfloat16: the gradients' 22 GiB, and the moments' 44 GiB."""
    kind = family_named("flux")
    known, shape = kind.released(ModelSource("")), Shape(512, 512)

    measure = Measure(kind.skeleton, all_weights)

    def traced(**steps: bool) -> Profile:
        return measure.profile(shape, whole(known, "recompute", Memory(**steps)))

    gib = 2**30
    weights = sum(one.numel() * 2 for one in kind.skeleton().denoisers["transformer"].parameters()) / gib
    plain, released = traced(), traced(gradient_release=True)
    both = traced(gradient_release=True, offload_optimizer=True)
    assert plain.resident / gib == pytest.approx(3 * weights, rel=0.001)
    assert peak_of(plain) / gib == pytest.approx(4 * weights, rel=0.03)
    assert (peak_of(plain) - peak_of(released)) / gib == pytest.approx(weights, rel=0.05)
    assert both.resident / gib == pytest.approx(weights, rel=0.04)
    assert (peak_of(released) - peak_of(both)) / gib == pytest.approx(2 * weights, rel=0.04)
