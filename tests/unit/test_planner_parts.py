"""Batches in parts: which rows they are, what the plan foresees for them, and when it chooses them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_planner import PROFILES, RATES, adam, allocated, everything, peak_of

from burnish.adapters.attached import AdapterSet
from burnish.conditioning import Conditioning
from burnish.config.schema import RunConfig
from burnish.data.batch import Batch, Opposites
from burnish.errors import UserError
from burnish.families.registry import family_named
from burnish.family import ModelSource
from burnish.objective import Denoising
from burnish.planner.choose import evaluate
from burnish.planner.live_bytes import Work
from burnish.planner.profile import Profile
from burnish.planner.rates import GIB, Card, card_named
from burnish.planner.recipe import Recipe, Shape
from burnish.planner.trace import trace_step
from burnish.planning import plan_run
from burnish.planning_traces import RunTraces
from burnish.run_plan import CONTEXT, FRAGMENTED, RunPlan

TinyFolder = Callable[[str], Path]
CARD = card_named("4090")
# So slow that a tiny model's kernels take longer to run than to start.
SLOW = {name: getattr(CARD.rates, name) / 1e5 for name in ("matmul", "attention", "memory", "from_host")}
EVEN = replace(CARD, measured=replace(CARD.rates, seconds_per_kernel=0.0, **SLOW))


@pytest.mark.parametrize(
    ("rows", "count", "sizes"),
    [(4, 1, [4]), (4, 2, [2, 2]), (5, 2, [3, 2]), (5, 4, [2, 2, 1]), (2, 4, [1, 1])],
)
def test_parts_are_of_one_size_and_hold_every_row_once(rows: int, count: int, sizes: list[int]) -> None:
    ids = tuple(str(row) for row in range(rows))
    latents, told = torch.randn(rows, 4, 2, 2), Conditioning({"tokens_BSD": torch.randn(rows, 3, 5)})
    batch = Batch(latents, told, torch.rand(rows), ids, ids, 7)
    parts = batch.parts(count)
    assert [len(one.sample_ids) for one in parts] == sizes
    assert tuple(name for one in parts for name in one.sample_ids) == ids
    assert torch.equal(torch.cat([one.latents_BCHW for one in parts]), latents)
    assert torch.equal(torch.cat([one.conditioning["tokens_BSD"] for one in parts]), told["tokens_BSD"])
    assert torch.equal(torch.cat([one.weight_B for one in parts]), batch.weight_B)
    assert {one.position for one in parts} == {7}


def test_rows_that_are_compared_with_each_other_stay_together() -> None:
    ids = ("a", "b", "c", "d")
    batch = Batch(torch.zeros(4, 4, 2, 2), Conditioning({}), torch.ones(4), ids, ids, 0, contrast=Opposites())
    assert batch.parts(2) == [batch]


def test_a_step_in_parts_takes_what_the_plan_foresees(tiny_folder: TinyFolder) -> None:
    kind, shape = family_named("sd3"), Shape(256, 256, batch=3, parts=2)
    load = partial(kind.load, ModelSource(str(tiny_folder("sd3"))), dtype=torch.float32, device="cpu")
    family = load(frozenset({"denoiser"}))
    ((part, chosen),) = everything(family).items()
    adapter = AdapterSet.attach(family.denoisers[part], chosen, dropout=0.0, seed=0)
    parameters = [one for group in adapter.parameter_groups(1e-4) for one in group["params"]]
    optimizer, objective = adam([{"params": parameters}]), Denoising(family.schedule)
    noisy, times_B, conditioning = family.example(256, 256, 6)
    ids = tuple(str(row) for row in range(6))
    batch = Batch(noisy, conditioning, torch.ones(6), ids, ids, 0)

    def step() -> None:
        for one in batch.parts(2):
            noise = torch.randn_like(one.latents_BCHW, dtype=torch.float32)
            torch.autograd.backward(objective.losses_at(family, one, noise, times_B[:3]).sum())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    known = load(frozenset())
    recipe = Recipe(everything(kind.skeleton(of=known)), Denoising(known.schedule), adam, accumulates=True)
    traced = trace_step(lambda: kind.skeleton(of=known, dtype=torch.float32), shape, recipe, cuda=False)
    gradients = sum(
        one.nbytes for one in parameters
    )  # of the first part, as if they were there before the step
    assert peak_of(traced) - (traced.resident - gradients) == pytest.approx(allocated(step), rel=0.01)


def plan_of(model: Path, folder: Path, card: Card = EVEN, **changes: Any) -> RunPlan:
    sections: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(model)},
        "data": changes.pop("sources", None)
        or [{"path": str(folder), "resolutions": [256], **changes.pop("data", {})}],
        "train": {"steps": 10, "batch_size": 4, **changes.pop("train", {})},
        "memory": {"cache_folder": folder, "weights": "native", **changes},
    }
    return plan_run(RunConfig.model_validate(sections), card)


def within(peak: int) -> Card:
    return replace(EVEN, gib=(peak + CONTEXT + FRAGMENTED) / GIB)


def test_batches_are_taken_apart_where_keeping_all_of_a_part_is_faster_than_computing_again(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    model = tiny_folder("flux")
    whole = plan_of(model, tmp_path)
    assert whole.choice.settings.parts == 1
    assert whole.choice.settings.keeps_all

    pinned = plan_of(model, tmp_path, batch_parts=2, activations="keep")
    assert pinned.choice.settings.parts == 2
    assert pinned.choice.peak < 0.7 * whole.choice.peak
    assert pinned.seconds == pytest.approx(whole.seconds, rel=0.05)
    (row,) = [one for one in pinned.rows if one.what.strip() == "activations"]
    assert "2 parts of a batch, 2 of 256x256" in row.why

    card = within(max(pinned.peak, *(row.bytes for row in whole.rows if row.what != "training")))
    chosen = plan_of(model, tmp_path, card)
    assert chosen.choice.settings == pinned.choice.settings
    again = plan_of(model, tmp_path, card, batch_parts=1)
    assert again.choice.settings.parts == 1
    assert again.choice.seconds > 1.03 * chosen.choice.seconds


def test_what_cannot_be_taken_apart_is_planned_whole(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    model = tiny_folder("flux")
    slider = {"slider": {"target": "a person", "positive": "old", "negative": "young"}}
    free = plan_of(model, tmp_path, data=slider)
    for changes in ({"data": slider}, {"gradient_release": True}):
        tight = plan_of(model, tmp_path, within(int(0.8 * free.peak)), **changes)
        assert tight.choice.settings.parts == 1
    # Asked for, other batches are; those of a slider are still whole.
    assert plan_of(model, tmp_path, data=slider, batch_parts=4).choice.settings.parts == 1


def test_a_batch_that_fits_in_no_other_way_is_learned_picture_by_picture(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    model, pins = tiny_folder("flux"), {"activations": "keep", "stream": 0.0}
    single = plan_of(model, tmp_path, train={"batch_size": 1, "accumulate": 2}, **pins)
    pinned = plan_of(model, tmp_path, batch_parts=4, **pins)
    # The other three wait on the device.
    assert single.choice.peak < pinned.choice.peak < single.choice.peak + 3 * 2**18
    others = max(row.bytes for row in pinned.rows if row.what != "training")
    tight = plan_of(model, tmp_path, within(max(pinned.peak, others)), **pins)
    assert tight.choice.settings.parts == 4
    assert tight.choice.peak == pinned.choice.peak


def test_parts_are_tried_to_the_last_since_the_first_may_gain_too_little(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Streaming and waiting on the host get in between: seconds of more and more parts rise before they fall."""
    model = tiny_folder("flux")

    def seconds(parts: int | str, card: Card) -> float:
        try:
            return plan_of(model, tmp_path, card, train={"batch_size": 8}, batch_parts=parts).choice.seconds
        except UserError:
            return float("inf")

    smallest = plan_of(model, tmp_path, train={"batch_size": 8}, batch_parts=8, activations="keep")
    others = max(row.bytes for row in smallest.rows if row.what != "training")
    for room in (1.0, 1.3, 1.7):
        card = within(int(room * max(smallest.choice.peak, others)))
        assert seconds("auto", card) <= 1.03 * min(seconds(parts, card) for parts in (1, 2, 4, 8))


@pytest.mark.parametrize(("room", "formats"), [(1.0, {"native", "fp8"}), (0.1, {"fp8", "nf4"})])
def test_formats_are_traced_where_they_can_gain(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float, formats: set[str]
) -> None:
    profile, seen = RunTraces.profile, set[str]()

    def watched(traced: RunTraces, shape: Shape, kept_as: str, mode: str, texts: str = "native") -> Profile:
        seen.add(kept_as)
        return profile(traced, shape, kept_as, mode, texts)

    monkeypatch.setattr(RunTraces, "profile", watched)
    model = tiny_folder("flux")
    peak = plan_of(model, tmp_path, train={"batch_size": 1}).choice.peak
    seen.clear()
    with suppress(UserError):
        plan_of(model, tmp_path, within(int(room * peak)), weights="auto", train={"batch_size": 1})
    assert seen == formats


def test_the_optimizer_steps_once_and_all_else_as_often_as_there_are_parts() -> None:
    rates = replace(RATES, matmul=1e12, from_host=1.0, seconds_per_kernel=1.0)
    keep = PROFILES["native"]["keep"]
    launched = replace(keep, outside=Work(kernels=7), optimizer=Work(kernels=5000))
    count = len(keep.blocks)

    def seconds(parts: int, streamed: bool) -> float:
        modes, away = ("keep",) * count, (streamed,) * count
        used = {"keep": launched}
        return evaluate(used, "native", modes, away, rates, compiled=False, parts=parts).seconds

    assert seconds(1, False) == 5007
    assert seconds(4, False) == 4 * 7 + 5000
    # 2000 bytes, one a second, in each part's forward; in its backward, too, where they hide behind the optimizer.
    assert seconds(4, True) - seconds(1, True) >= 3 * 2000


def test_what_is_learned_whole_is_timed_whole_beside_what_is_not(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    model, pins = tiny_folder("flux"), {"activations": "keep", "stream": 0.0}
    slider = {"slider": {"target": "a person", "positive": "old", "negative": "young"}}
    sources = [
        {"path": str(tmp_path), "resolutions": [256], **slider},
        {"path": str(tmp_path), "resolutions": [192]},
    ]
    mixed = plan_of(model, tmp_path, batch_parts=4, sources=sources, **pins)
    plain = plan_of(model, tmp_path, batch_parts=4, sources=sources[1:], **pins)
    assert mixed.choice.settings.parts == 1
    assert [one.seconds for one in mixed.times if not one.besides] == [one.seconds for one in plain.times]
