"""Batches from the cache, in the order of a plan, from any position on.

Shape letters: B batch, C channels, H W height and width of the latents; those of video families also have T frames.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from burnish.conditioning import Conditioning
from burnish.data.batch import Batch, Direction, Opposites, Preference
from burnish.data.cache import Cache, CacheKeys, Entry, Kind, RamCache
from burnish.data.loss_masks import MASK, loss_weights
from burnish.data.plan import BatchPlan, Draw
from burnish.data.prepare import AUDIO, LATENTS, conditioning_of, load_pixels
from burnish.errors import DataError, MachineError
from burnish.family import Family
from burnish.latent_shape import PictureInfo
from burnish.randomness import python_random

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A batch before the family described its pictures; `problem` instead where the cache failed."""

    position: int
    latents_BCHW: Tensor
    conditioning: dict[str, Tensor]
    weight_B: Tensor
    sample_ids: tuple[str, ...]
    paths: tuple[str, ...]
    pictures: tuple[PictureInfo, ...]
    captions: tuple[str, ...]
    audio_BCLF: Tensor | None
    counted: Tensor | None
    kept: Tensor | None
    contrast: Direction | Opposites | Preference | None
    unprompted: Conditioning | None


@dataclass(frozen=True, slots=True)
class _Problem:
    """Travels from a loader process as a value: an exception would arrive with the traceback as its message."""

    message: str
    remedy: str


class _CachedBatches(Dataset["_Loaded | _Problem"]):
    """Micro-step position -> batch."""

    def __init__(self, plan: BatchPlan, cache: Cache, keys: CacheKeys, encoded: bool) -> None:
        self.plan, self.cache, self.keys, self.encoded = plan, cache, keys, encoded

    def __getitem__(self, position: int) -> _Loaded | _Problem:
        try:
            return self.load(position)
        except DataError as error:
            return _Problem(error.message, error.remedy)

    def load(self, position: int) -> _Loaded:
        draws = with_other_sides(self.plan.draws(position))
        latents, conditioning, audio = [], [], []
        entries = []
        for draw in draws:
            key = self.keys.latents(draw.sample, flip=draw.flip)
            picture = self._entry("latents", key, str(draw.sample.path))
            entries.append(picture)
            latents.append(picture[LATENTS])
            if draw.sample.audio:
                audio.append(picture[AUDIO])
            conditioning.append(self._told(draw, draw.caption, picture))

        def mask_of(number: int) -> Tensor:
            sample, grid = draws[number].sample, latents[number].shape[-2:]
            key = self.keys.mask(sample, (grid[0], grid[1]), flip=draws[number].flip)
            return self._entry("masks", key, str(sample.path))[MASK]

        counted, kept = loss_weights([draw.sample for draw in draws], latents, mask_of)
        return _Loaded(
            position=position,
            latents_BCHW=torch.stack(latents),
            conditioning=dict(Conditioning.collate(conditioning)),
            weight_B=torch.tensor([draw.sample.weight for draw in draws], dtype=torch.float32),
            sample_ids=tuple(draw.id for draw in draws),
            paths=tuple(str(draw.sample.path) for draw in draws),
            pictures=tuple(draw.sample.fit.describe(flipped=draw.flip) for draw in draws),
            captions=tuple(draw.caption for draw in draws),
            audio_BCLF=torch.stack(audio) if audio else None,
            counted=counted,
            kept=kept,
            contrast=self._contrast(draws, entries),
            unprompted=self._unprompted(draws, entries),
        )

    def _told(self, draw: Draw, text: str, picture: Entry) -> Conditioning:
        caption: Entry = {}
        if self.encoded:
            key = self.keys.caption(text, draw.sample, flip=draw.flip)
            caption = self._entry("captions", key, repr(text))
        return conditioning_of(caption, picture)

    def _unprompted(self, draws: Sequence[Draw], pictures: Sequence[Entry]) -> Conditioning | None:
        if not any(draw.sample.unprompted for draw in draws):
            return None
        return Conditioning.collate(
            [self._told(draw, "", picture) for draw, picture in zip(draws, pictures, strict=True)]
        )

    def _contrast(
        self, draws: Sequence[Draw], pictures: Sequence[Entry]
    ) -> Direction | Opposites | Preference | None:
        """What the samples of one batch teach; all of them the same."""
        first = draws[0].sample
        if first.opposed is not None:
            pairs = [draw.sample.opposed for draw in draws if draw.sample.opposed is not None]
            if first.opposed.beta is None:
                return Opposites()
            betas = torch.tensor([one.beta for one in pairs], dtype=torch.float32)
            return Preference(betas, torch.tensor([float(one.decays) for one in pairs]))
        if first.direction is None:
            return None
        both = []
        for side in (0, 1):
            told = [
                self._told(draw, draw.prompts[side], picture)
                for draw, picture in zip(draws, pictures, strict=True)
                if draw.prompts is not None
            ]
            both.append(Conditioning.collate(told))
        guidance = [draw.sample.direction.guidance for draw in draws if draw.sample.direction is not None]
        return Direction(both[0], both[1], torch.tensor(guidance, dtype=torch.float32))

    def _entry(self, kind: Kind, key: str, what: str) -> Entry:
        entry = self.cache.get(kind, key)
        if entry is None:
            raise DataError(
                f"the cached {kind} of {what} went away or are damaged since training began",
                remedy="Start the run again: it goes on from its checkpoint and encodes what is missing.",
            )
        return entry


class _PixelBatches(Dataset["_Loaded | _Problem"]):
    """Micro-step position -> batch of pixels; a square is cut from each picture where `crop` says so."""

    def __init__(self, plan: BatchPlan, crop: int | None) -> None:
        self.plan, self.crop = plan, crop

    def __getitem__(self, position: int) -> _Loaded | _Problem:
        try:
            return self.load(position)
        except DataError as error:
            return _Problem(error.message, error.remedy)

    def load(self, position: int) -> _Loaded:
        draws = self.plan.draws(position)
        return _Loaded(
            position=position,
            latents_BCHW=torch.stack([self._cut(draw) for draw in draws]),
            conditioning={},
            weight_B=torch.tensor([draw.sample.weight for draw in draws], dtype=torch.float32),
            sample_ids=tuple(draw.id for draw in draws),
            paths=tuple(str(draw.sample.path) for draw in draws),
            pictures=tuple(draw.sample.fit.describe(flipped=draw.flip) for draw in draws),
            captions=tuple(draw.caption for draw in draws),
            audio_BCLF=None,
            counted=None,
            kept=None,
            contrast=None,
            unprompted=None,
        )

    def _cut(self, draw: Draw) -> Tensor:
        pixels_3HW = load_pixels(draw.sample, flip=draw.flip)
        if self.crop is None:
            return pixels_3HW
        chance = python_random(self.plan.seed, "crop", draw.id, draw.epoch)
        height, width = (min(self.crop, side) for side in pixels_3HW.shape[-2:])
        top, left = (
            chance.randrange(side - cut + 1)
            for side, cut in zip(pixels_3HW.shape[-2:], (height, width), strict=True)
        )
        return pixels_3HW[:, top : top + height, left : left + width]


def with_other_sides(draws: tuple[Draw, ...]) -> tuple[Draw, ...]:
    """All draws, and then the other picture of each where they are pairs: mirrored and captioned alike."""
    opposed = [(draw, draw.sample.opposed) for draw in draws]
    return draws + tuple(replace(draw, sample=one.sample) for draw, one in opposed if one is not None)


class _Positions(Sampler[int]):
    """start, start + 1, and so on without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def batches(
    plan: BatchPlan,
    cache: Cache,
    keys: CacheKeys,
    family: Family,
    *,
    start: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    encoded: bool = True,
) -> Iterator[Batch]:
    """Batches of micro-step `start` and all that follow, without end; the same with any number of workers.

    Close the iterator to end its processes. A cache in memory is read in the loop whatever `workers` says:
    other processes would each need a copy of it.

    Args:
        workers: processes that read the cache, at most one per CPU; 0 reads in the loop.
        prefetch: batches each worker is ahead.
        encoded: captions come encoded, from the cache; otherwise as text alone.

    Raises:
        DataError: an entry is missing or damaged.
        MachineError: a worker died.
    """
    in_loop = isinstance(cache, RamCache)
    return _read(
        _CachedBatches(plan, cache, keys, encoded), family, start, 0 if in_loop else workers, prefetch
    )


def pixel_batches(
    plan: BatchPlan, family: Family, *, crop: int | None, start: int = 0, workers: int = 0, prefetch: int = 2
) -> Iterator[Batch]:
    """As `batches`, of pixels in [-1, 1] in place of latents, read from the files themselves.

    Args:
        crop: side of the square that is cut from each picture, at a place that depends on seed, picture and epoch.
    """
    return _read(_PixelBatches(plan, crop), family, start, workers, prefetch)


def _read(
    dataset: _CachedBatches | _PixelBatches, family: Family, start: int, workers: int, prefetch: int
) -> Iterator[Batch]:
    workers = min(workers, _cpus())
    if workers == 0:
        loaded: Iterator[_Loaded | _Problem] = (dataset[position] for position in itertools.count(start))
    else:
        loaded = _from_workers(dataset, start, workers, prefetch)
    try:
        for item in loaded:
            if isinstance(item, _Problem):
                raise DataError(item.message, remedy=item.remedy)
            yield _described(item, family)
    finally:
        loaded.close()  # type: ignore[attr-defined]  # both are generators


def _described(loaded: _Loaded, family: Family) -> Batch:
    conditioning = Conditioning(loaded.conditioning)
    described = family.describe_pictures(loaded.pictures)
    contrast = loaded.contrast
    if isinstance(contrast, Direction):
        contrast = replace(
            contrast,
            positive=contrast.positive.merged(described),
            negative=contrast.negative.merged(described),
        )
    return Batch(
        latents_BCHW=loaded.latents_BCHW,
        conditioning=conditioning.merged(described),
        weight_B=loaded.weight_B,
        sample_ids=loaded.sample_ids,
        paths=loaded.paths,
        position=loaded.position,
        captions=loaded.captions,
        audio_BCLF=loaded.audio_BCLF,
        counted=loaded.counted,
        kept=loaded.kept,
        contrast=contrast,
        unprompted=None if loaded.unprompted is None else loaded.unprompted.merged(described),
    )


def _from_workers(
    dataset: _CachedBatches | _PixelBatches, start: int, workers: int, prefetch: int
) -> Iterator[_Loaded | _Problem]:
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Positions(start),
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_run,
        multiprocessing_context=_context(),
    )
    with _signals_held_back():
        stream = iter(loader)
    assert isinstance(stream, _MultiProcessingDataLoaderIter)
    try:
        while True:
            try:
                item = next(stream)
            except (RuntimeError, EOFError, ConnectionError) as error:
                # A dead process shows as torch's own message, or as an end of the pipe that tensors come by.
                if isinstance(error, RuntimeError) and "worker" not in str(error):
                    raise
                said = str(error).partition("\n")[0] or "it closed its end of the pipe"
                raise MachineError(
                    f"a loader process died: {said}",
                    remedy="Memory may have run out; lower train.loader_workers, or set it to 0.",
                ) from error
            yield item
    finally:
        # Not left to `del`: a traceback that is still held would keep the processes alive.
        stream._shutdown_workers()


def _context() -> BaseContext:
    """How loader processes start. A forked copy of a process with threads or CUDA may hang.

    Where there is one, a server that has imported torch and nothing else is forked: it starts a worker in
    milliseconds, and the second run of a process finds it there. Windows starts each anew.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _as_it_is(item: T) -> T:
    return item


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; only the run itself decides what it means (law L6)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started inside never see SIGINT or SIGTERM, not even before they get to ignore them.

    torch's loader also sets a SIGCHLD handler that raises wherever the main thread happens to be, in the middle
    of an optimizer step too. It is taken off again: `next` notices a dead worker within seconds by itself.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # starting it would let the signals through again
    on_child = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if threading.current_thread() is threading.main_thread() and on_child is not None:
            signal.signal(signal.SIGCHLD, on_child)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
