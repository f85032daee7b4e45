"""Batches: the same from any number of processes and from any position on."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from corpus import caption, scene

from burnish.config.data import Captions, Folder
from burnish.data.batch import Batch
from burnish.data.cache import CacheKeys, DiskCache, RamCache
from burnish.data.loader import batches
from burnish.data.plan import BatchPlan
from burnish.data.preflight import prepare_samples
from burnish.data.prepare import LATENTS, encode_captions, encode_latents
from burnish.data.samples import all_captions
from burnish.errors import DataError, MachineError
from burnish.families.sdxl import StableDiffusionXL
from burnish.family import Family, ModelSource


class Stage:
    """A full cache and a plan over it."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family = family
        for number in range(7):
            height, width = ((64, 64), (48, 96), (120, 80))[number % 3]
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            scene(number, height, width).save(folder / "pictures" / f"{number}.png")
            caption(folder / "pictures" / f"{number}.png", f"one, two, number {number}")
        rules = Captions(dropout=0.3, shuffle_tags=True, variants=3)
        source = Folder(
            path=folder / "pictures",
            resolutions=[64],
            bucket_step=16,
            flip=True,
            captions=rules,
            repeats=2,
            weight=0.5,
        )
        samples = prepare_samples([source], pixel_multiple=8).samples
        self.plan = BatchPlan(samples, 3, seed=9)
        self.cache, self.ram = DiskCache(folder / "cache"), RamCache()
        self.keys = CacheKeys(family.identity("vae"), family.identity("text_encoders"), torch.float32)
        for cache in (self.cache, self.ram):
            encode_latents(samples, family, cache, self.keys, device="cpu")
            encode_captions(all_captions(samples, 9), family, cache, self.keys)

    def take(self, count: int, *, start: int = 0, workers: int = 0, ram: bool = False) -> list[Batch]:
        cache = self.ram if ram else self.cache
        stream = batches(self.plan, cache, self.keys, self.family, start=start, workers=workers)
        with closing(stream):  # type: ignore[type-var]
            return list(itertools.islice(stream, count))


@pytest.fixture(scope="module")
def stage(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    parts = frozenset({"vae", "text_encoders"})
    family = StableDiffusionXL.load(ModelSource(str(tiny_sdxl)), parts, dtype=torch.float32, device="cpu")
    return Stage(family, tmp_path_factory.mktemp("loader"))


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.latents_BCHW, other.latents_BCHW)
        assert torch.equal(one.weight_B, other.weight_B)
        assert dict(one.conditioning).keys() == dict(other.conditioning).keys()
        for name in one.conditioning:
            assert torch.equal(one.conditioning[name], other.conditioning[name])
        assert (one.sample_ids, one.paths, one.position) == (other.sample_ids, other.paths, other.position)


def test_batches_are_what_the_plan_says(stage: Stage):
    for position, batch in enumerate(stage.take(2 * stage.plan.batches_per_epoch)):
        draws = stage.plan.draws(position)
        assert batch.position == position
        assert batch.sample_ids == tuple(draw.id for draw in draws)
        assert len(set(batch.sample_ids)) == len(draws)
        assert batch.paths == tuple(str(draw.sample.path) for draw in draws)
        assert batch.weight_B.tolist() == [0.5] * len(draws)
        pictures = [draw.sample.fit.describe(flipped=draw.flip) for draw in draws]
        expected = dict(stage.family.encode_prompts([draw.caption for draw in draws]))
        expected |= dict(stage.family.describe_pictures(pictures))
        assert set(batch.conditioning) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(batch.conditioning[name], tensor, atol=1e-5, rtol=1e-4)
        for row, draw in enumerate(draws):
            entry = stage.cache.get("latents", stage.keys.latents(draw.sample, flip=draw.flip))
            assert entry is not None
            assert torch.equal(batch.latents_BCHW[row], entry[LATENTS])


def test_starting_anywhere_goes_on_as_if_never_stopped(stage: Stage):
    count = 3 * stage.plan.batches_per_epoch
    straight = stage.take(count)
    for start in range(count):
        assert_equal(stage.take(count - start, start=start), straight[start:])
    assert_equal(stage.take(count, ram=True), straight)


@pytest.mark.slow
def test_processes_change_nothing_and_end_with_the_iterator(stage: Stage):
    straight = stage.take(25)
    assert_equal(stage.take(25, workers=2), straight)
    assert multiprocessing.active_children() == []
    assert_equal(stage.take(18, start=7, workers=1), straight[7:])
    assert multiprocessing.active_children() == []


def test_a_cache_in_memory_starts_no_processes(stage: Stage):
    stream = batches(stage.plan, stage.ram, stage.keys, stage.family, workers=2)
    with closing(stream):  # type: ignore[type-var]
        next(stream)
        assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_signals_are_left_to_the_run_and_a_dead_process_is_told(stage: Stage):
    stream = batches(stage.plan, stage.cache, stage.keys, stage.family, workers=1, prefetch=1)
    with closing(stream):  # type: ignore[type-var]
        next(stream)
        (child,) = multiprocessing.active_children()
        assert child.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(child.pid, number)
        time.sleep(0.2)
        assert [next(stream).position for _ in range(5)] == [1, 2, 3, 4, 5]
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(MachineError, match="loader process died") as raised:
            list(itertools.islice(stream, 5))
        assert "loader_workers" in raised.value.remedy
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_entry_is_named(stage: Stage, workers: int):
    draw = stage.plan.draws(0)[0]
    path = stage.cache.path("latents", stage.keys.latents(draw.sample, flip=draw.flip))
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    cache = DiskCache(stage.cache.folder)
    try:
        stream = batches(stage.plan, cache, stage.keys, stage.family, workers=workers)
        with closing(stream), pytest.raises(DataError) as raised:  # type: ignore[type-var]
            next(stream)
    finally:
        path.write_bytes(sound)
    assert str(draw.sample.path) in raised.value.message
    assert "Traceback" not in raised.value.message
