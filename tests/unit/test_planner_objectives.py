"""The plan of objectives that ask the model more than once in a step, against what a real step takes and computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_planner import PROFILES, RATES, adam, allocated, everything, kept, peak_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from burnish.adapters.attached import AdapterSet, all_at, all_disabled
from burnish.conditioning import Conditioning
from burnish.config.schema import RunConfig
from burnish.data.batch import Batch, Direction, Opposites, Preference
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.objective import Denoising
from burnish.planner.choose import evaluate
from burnish.planner.lesson import Lesson
from burnish.planner.live_bytes import Work
from burnish.planner.profile import Profile, step_of
from burnish.planner.rates import card_named
from burnish.planner.recipe import Recipe, Shape
from burnish.planner.trace import trace_step
from burnish.planning import plan_run

TinyFolder = Callable[[str], Path]
NAME, ROWS = "flux", 4
# By name: the lesson, and how often a step asks the model without gradients and with them.
LESSONS = {
    "direction": (Lesson("direction"), 3, 2),
    "opposites": (Lesson("opposites"), 0, 2),
    "preference": (Lesson("preference"), 1, 1),
    "kept and unprompted": (Lesson(counted=True, kept=True, unprompted=True), 2, 1),
}


def real_step(family: Family, shape: Shape, asked: list[bool]) -> Callable[[], None]:
    """A step as a run makes it; `asked` hears of each prediction whether it records gradients."""
    adapters = [
        AdapterSet.attach(family.denoisers[part], chosen, dropout=0.0, seed=0)
        for part, chosen in everything(family).items()
    ]
    groups = [group for adapter in adapters for group in adapter.parameter_groups(1e-4)]
    parameters = [one for group in groups for one in group["params"]]
    optimizer, lesson = adam([{"params": parameters}]), shape.lesson
    rows = 2 * ROWS if lesson.teaches == "opposites" else ROWS
    latents, times_B, told = family.example(shape.height, shape.width, rows)
    places, ids = (rows, 1, *latents.shape[-2:]), tuple(map(str, range(rows)))
    other, another = (Conditioning({k: v.clone() for k, v in told.items()}) for _ in range(2))
    contrasts = {
        "": None,
        "direction": Direction(other, another, torch.ones(rows)),
        "opposites": Opposites(),
        "preference": Preference(torch.ones(rows // 2), torch.ones(rows // 2)),
    }
    batch = Batch(
        latents,
        told,
        torch.ones(rows),
        ids,
        ids,
        0,
        counted=torch.rand(places) if lesson.counted else None,
        kept=torch.rand(places) if lesson.kept else None,
        contrast=contrasts[lesson.teaches],
        unprompted=other if lesson.unprompted else None,
    )
    objective = replace(
        guiding(family), frozen=partial(all_disabled, adapters), strength=partial(all_at, adapters)
    )

    def predict(noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return family.predict(noisy, t_B, conditioning)

    def step() -> None:
        asked.clear()
        for turn in objective.turns_at(family, batch, torch.randn_like(latents), times_B, predict):
            torch.autograd.backward((turn.loss_B * turn.weight_B).sum())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def guiding(family: Family) -> Denoising:
    return Denoising(family.schedule, guided_target=3.0)


def planned(known: Family, shape: Shape, depth: int | None = None) -> Profile:
    kind = family_named(NAME)
    choices = everything(kind.skeleton(depth, of=known))
    recipe = Recipe(choices, guiding(known), adam, keep_activations=kept("keep"))
    return trace_step(lambda: kind.skeleton(depth, of=known, dtype=torch.float32), shape, recipe, cuda=False)


@pytest.mark.parametrize("name", LESSONS)
def test_a_step_that_asks_more_than_once_takes_and_computes_what_a_real_one_does(
    tiny_folder: TinyFolder, name: str
) -> None:
    lesson, passes, turns = LESSONS[name]
    kind, source = family_named(NAME), ModelSource(str(tiny_folder(NAME)))
    load = partial(kind.load, source, dtype=torch.float32, device="cpu")
    shape, asked = Shape(256, 256, batch=ROWS, lesson=lesson), list[bool]()
    family = load(frozenset({"denoiser"}))
    step = real_step(family, shape, asked)
    taken = allocated(step)
    with FlopCounterMode(display=False) as computed:
        step()
    assert asked.count(False) == passes
    assert asked.count(True) == turns

    traced = planned(load(frozenset()), shape)
    assert (traced.passes, traced.turns) == (passes, turns)
    # Adapters and two moments; where there are two turns gradients, too, as if they were there before the first.
    own = sum(one.nbytes for one in family.denoisers["transformer"].parameters() if one.requires_grad)
    trained = sum(traced.trained) + traced.trained_outside
    assert trained == pytest.approx((4 if turns > 1 else 3) * own, rel=0.01)
    before = traced.resident - (own if turns > 1 else 0)
    # Torch adds up the gradients of one tensor in place, but those of fake ones into a third: one tensor too many where
    # adapters are at a strength other than 1.
    assert peak_of(traced) - before == pytest.approx(taken, rel=0.014 if turns > 1 else 0.001)
    work = step_of([traced] * len(traced.blocks)).work
    flop = work.matmul_flop + work.attention_flop
    assert flop == pytest.approx(computed.get_total_flops(), rel=0.01)


def test_streamed_weights_come_to_every_pass() -> None:
    plain = PROFILES["native"]["keep"]
    blocks = tuple(replace(one, ahead=Work(3e12)) for one in plain.blocks)
    slow = replace(RATES, from_host=1.0)
    asking = replace(plain, blocks=blocks, passes=3, turns=2)

    def seconds(profile: Profile, streamed: bool) -> float:
        count = len(profile.blocks)
        modes, away = ("keep",) * count, (streamed,) * count
        return evaluate({"keep": profile}, "native", modes, away, slow, compiled=False).seconds

    computed = sum(one.forward.matmul_flop + one.backward.matmul_flop for one in plain.blocks) / 1e12
    assert seconds(asking, False) == pytest.approx(2 * computed + 3 * len(blocks))
    # 2000 bytes, one a second: forward and backward of two turns, and three passes.
    assert seconds(asking, True) == pytest.approx((2 * 2 + 3) * 2000, rel=1e-6)


def test_the_plan_of_a_slider_names_its_passes_and_counts_their_seconds(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    def plan(**source: Any) -> Any:
        config = RunConfig.model_validate(
            {
                "name": "tiny",
                "model": {"path": str(tiny_folder(NAME))},
                "method": {"kind": "lora"},
                "data": [{"path": str(tmp_path), "resolutions": [256], **source}],
                "train": {"steps": 10},
                "memory": {"cache_folder": tmp_path, "weights": "native", "activations": "keep"},
            }
        )
        rates = replace(card_named("4090").rates, seconds_per_kernel=0.0)
        return plan_run(config, replace(card_named("4090"), measured=rates))

    slider = {"target": "a person", "positive": "old", "negative": "young"}
    plain, taught = plan(), plan(slider=slider)
    said = "three more passes without gradients and two passes with gradients, one after the other"
    assert taught.times[0].besides == said
    assert any(said in row.why for row in taught.rows)
    assert plain.times[0].besides == ""
    assert 2.7 < taught.seconds / plain.seconds < 3.6
