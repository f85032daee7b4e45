"""Which sample is drawn when: a pure function of seed and position."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from burnish.data.buckets import Bucket, Fit
from burnish.data.caption_rules import CaptionRules
from burnish.data.plan import BatchPlan, Draw
from burnish.data.samples import Sample, all_captions, hold_out
from burnish.errors import DataError

SHAPES = (Bucket(64, 64), Bucket(48, 80), Bucket(80, 48))


def sample(number: int, *, repeats: int = 1, content: str = "", role: str = "train", size: int = 0) -> Sample:
    bucket = SHAPES[number % 3] if not size else Bucket(size, size)
    return Sample(
        picture_id=f"0/{number:03d}.png",
        path=Path(f"{number:03d}.png"),
        source=0,
        role="regularization" if role == "regularization" else "train",
        sha256=content or f"{number:064x}",
        fit=Fit(bucket, (100, 100), (100, 100), 0, 0),
        resolution=64,
        caption=f"one, two, three, {number}",
        rules=CaptionRules(dropout=0.2, shuffle_tags=True, variants=3),
        flip=True,
        repeats=repeats,
    )


SAMPLES = [sample(n, repeats=1 + n % 4) for n in range(23)]


def test_an_epoch_draws_each_sample_as_often_as_it_repeats():
    plan = BatchPlan(SAMPLES, 4, seed=5)
    for epoch in range(3):
        start = plan.position_of_epoch(epoch)
        batches = [plan.draws(start + at) for at in range(plan.batches_per_epoch)]
        counted = Counter(draw.sample.id for batch in batches for draw in batch)
        assert counted == {s.id: s.repeats for s in SAMPLES}
        for batch in batches:
            assert len({draw.sample.bucket for draw in batch}) == 1
            assert len({draw.id for draw in batch}) == len(batch)
            assert {draw.epoch for draw in batch} == {epoch} == {plan.epoch_of(start)}
        assert len({draw.id for batch in batches for draw in batch}) == plan.draws_per_epoch
        # A bucket has one smaller batch at most.
        small = [batch[0].sample.bucket for batch in batches if len(batch) < 4]
        assert len(small) == len(set(small))


def test_samples_with_holes_and_without_are_in_different_batches():
    mixed = [replace(sample(n, size=64), sees_itself=n % 2 == 0, fills_holes=n % 2 == 0) for n in range(12)]
    plan = BatchPlan(mixed, 4, seed=5)
    for position in range(plan.batches_per_epoch):
        assert len({draw.sample.sees_itself for draw in plan.draws(position)}) == 1


def test_any_position_is_the_same_in_any_order_from_any_plan():
    plan = BatchPlan(SAMPLES, 4, seed=5)
    straight = [plan.draws(position) for position in range(60)]
    positions = list(range(60))
    random.Random(1).shuffle(positions)
    shuffled = list(SAMPLES)
    random.Random(2).shuffle(shuffled)
    for other in (BatchPlan(SAMPLES, 4, seed=5), BatchPlan(shuffled, 4, 5), pickle.loads(pickle.dumps(plan))):  # noqa: S301
        assert {at: other.draws(at) for at in positions} == dict(enumerate(straight))


def test_seed_epoch_and_position_all_matter():
    plan, other = BatchPlan(SAMPLES, 4, seed=5), BatchPlan(SAMPLES, 4, seed=6)
    count = plan.batches_per_epoch

    def ids(plan: BatchPlan, epoch: int) -> list[str]:
        return [d.id for at in range(count) for d in plan.draws(epoch * count + at)]

    assert ids(plan, 0) != ids(plan, 1)
    assert ids(plan, 0) != ids(other, 0)
    together = [{frozenset(d.id for d in plan.draws(e * count + at)) for at in range(count)} for e in (0, 1)]
    assert together[0] != together[1]  # not the same batches in another order
    draws: list[Draw] = [d for at in range(60 * count) for d in plan.draws(at)]
    assert sum(d.flip for d in draws) / len(draws) == pytest.approx(0.5, abs=0.05)
    assert sum(not d.caption for d in draws) / len(draws) == pytest.approx(0.2, abs=0.05)
    assert {d.caption for d in draws} == set(all_captions(SAMPLES, 5))
    # Repeats of one sample in one epoch are drawn apart.
    together = [d for d in draws if d.sample.repeats == 4 and d.epoch < 40]
    pairs = Counter((d.epoch, d.sample.id) for d in together if d.flip)
    assert set(pairs.values()) > {1, 2, 3}


def test_positions_far_out_cost_no_more_than_near_ones():
    plan = BatchPlan(SAMPLES, 4, seed=5)
    assert len(plan.draws(10**12)) > 0


def test_the_fingerprint_tells_what_would_change_the_order():
    plan = BatchPlan(SAMPLES, 4, 5)
    assert plan.fingerprint == BatchPlan(SAMPLES[::-1], 4, 5).fingerprint
    changed = [
        BatchPlan(SAMPLES, 2, 5),
        BatchPlan(SAMPLES, 4, 6),
        BatchPlan(SAMPLES[1:], 4, 5),
        BatchPlan([sample(0, repeats=2), *SAMPLES[1:]], 4, 5),
        BatchPlan([sample(0, content="f" * 64), *SAMPLES[1:]], 4, 5),
    ]
    assert len({plan.fingerprint, *(other.fingerprint for other in changed)}) == 6


def test_no_samples_is_an_error():
    with pytest.raises(DataError):
        BatchPlan([], 4, 5)


def test_held_out_pictures_are_never_trained_on():
    samples = [sample(n, repeats=3) for n in range(12)]
    samples += [sample(n, size=128) for n in range(12)]  # the same pictures at another size
    samples += [sample(50, content=f"{3:064x}")]  # a copy of number 3
    prior = [sample(100 + n, role="regularization") for n in range(5)]
    for seed in range(20):
        train, held = hold_out([*samples, *prior], 4, seed)
        assert len({s.sha256 for s in held}) == 4
        assert not {s.sha256 for s in held} & {s.sha256 for s in train}
        assert set(prior) <= set(train)
        assert set(train) | set(held) == {*samples, *prior}
        assert (train, held) == hold_out([*samples, *prior], 4, seed)
    assert len({hold_out(samples, 4, seed)[1] for seed in range(20)}) > 10
    with pytest.raises(DataError, match="12"):
        hold_out([*samples, *prior], 12, 0)
