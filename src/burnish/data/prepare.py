"""Filling the cache: whatever training will draw is encoded beforehand, and only what is not there yet.

Shape letters: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from burnish.data.cache import Cache, CacheKeys, Entry
from burnish.data.pictures import BadPicture, content_hash, decode_picture, read_regular
from burnish.data.samples import Sample
from burnish.errors import DataError, ModelError
from burnish.family import Conditioning, Family

Progress = Callable[[int, int], None]  # done, of

LATENTS = "latents"  # the one tensor's name in an entry of latents


@dataclass(frozen=True, slots=True)
class EncodeCounts:
    """How many entries were there, were made, and of those made, replaced a damaged one."""

    hits: int
    encoded: int
    repaired: int


@dataclass(frozen=True, slots=True)
class _Picture:
    """One picture to encode."""

    key: str
    sample: Sample
    flip: bool


@torch.no_grad()
def encode_latents(
    samples: Sequence[Sample],
    family: Family,
    cache: Cache,
    keys: CacheKeys,
    *,
    device: torch.device | str,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> EncodeCounts:
    """Make the latents of every sample that the cache lacks; mirrored ones too where a sample flips.

    Stored as `keys.dtype`. With `batch_size` 1 what is stored does not depend on what else was missing.

    Raises:
        DataError: a file changed since the preflight.
        ModelError: the VAE gave NaN or infinity.
        DiskFull: the cache cannot be written.
    """
    wanted: dict[str, _Picture] = {}
    for sample in sorted(samples, key=lambda sample: (sample.bucket, sample.id)):
        for flip in (False, True) if sample.flip else (False,):
            key = keys.latents(sample, flip=flip)
            wanted.setdefault(key, _Picture(key, sample, flip))
    repaired = cache.repaired
    missing = [picture for key, picture in wanted.items() if cache.get("latents", key) is None]
    repaired, hits, done = cache.repaired - repaired, len(wanted) - len(missing), 0
    for batch, pixels_B3HW in _decoded(_batches(missing, batch_size)):
        latents_BCHW = family.encode_pixels(pixels_B3HW.to(device))
        for picture, latents_CHW in zip(batch, latents_BCHW, strict=True):
            _refuse_nonfinite(latents_CHW, f"latents of {picture.sample.path}")
            cache.put("latents", picture.key, {LATENTS: latents_CHW.to("cpu", keys.dtype)})
        done += len(batch)
        if progress is not None:
            progress(done, len(missing))
    return EncodeCounts(hits, done, repaired)


@torch.no_grad()
def encode_captions(
    captions: Sequence[str],
    family: Family,
    cache: Cache,
    keys: CacheKeys,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> EncodeCounts:
    """Make the conditioning of every caption that the cache lacks; floating tensors stored as `keys.dtype`.

    With `batch_size` 1 no entry holds the padding of a longer neighbour.

    Raises:
        ModelError: a text encoder gave NaN or infinity.
        DiskFull: the cache cannot be written.
    """
    wanted = {keys.caption(text): text for text in captions}
    repaired = cache.repaired
    missing = [(key, text) for key, text in wanted.items() if cache.get("captions", key) is None]
    repaired, done = cache.repaired - repaired, 0
    for at in range(0, len(missing), batch_size):
        batch = missing[at : at + batch_size]
        encoded = family.encode_prompts([text for _, text in batch]).to("cpu", keys.dtype)
        for row, (key, text) in enumerate(batch):
            entry = dict(encoded.rows(slice(row, row + 1)))
            for tensor in entry.values():
                _refuse_nonfinite(tensor, f"the encoding of {text!r}")
            cache.put("captions", key, entry)
        done += len(batch)
        if progress is not None:
            progress(done, len(missing))
    return EncodeCounts(len(wanted) - len(missing), done, repaired)


def load_pixels(sample: Sample, *, flip: bool) -> Tensor:
    """What the VAE sees of a sample: (3, H, W) in [-1, 1], float32.

    Raises:
        DataError: the file changed or went away since the preflight.
    """
    try:
        data = read_regular(sample.path)
        if content_hash(data) != sample.sha256:
            raise DataError(f"{sample.path} changed since it was checked", remedy="Start again.")
        decoded = decode_picture(data, background=sample.background, max_megapixels=float("inf"))
    except BadPicture as error:
        raise DataError(
            f"{sample.path}: {error.message} since it was checked", remedy="Start again."
        ) from error
    return pixels_of(sample.fit.apply(decoded.picture, flipped=flip))


def pixels_of(picture: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1], float32, of a picture in mode RGB; 0 becomes -1 and 255 becomes 1."""
    values_HW3 = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return values_HW3.permute(2, 0, 1).float() / 127.5 - 1


def conditioning_of(entry: Entry) -> Conditioning:
    return Conditioning(entry)


def _batches(pictures: Sequence[_Picture], batch_size: int) -> Iterator[list[_Picture]]:
    """Up to `batch_size` neighbours of one bucket."""
    batch: list[_Picture] = []
    for picture in pictures:
        if batch and (len(batch) == batch_size or batch[0].sample.bucket != picture.sample.bucket):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def _decoded(batches: Iterator[list[_Picture]]) -> Iterator[tuple[list[_Picture], Tensor]]:
    """Each batch with its pixels (B, 3, H, W); the next few are decoded while the VAE is busy."""

    def decode(batch: list[_Picture]) -> tuple[list[_Picture], Tensor]:
        return batch, torch.stack([load_pixels(p.sample, flip=p.flip) for p in batch])

    threads = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "pixels") as pool:
        ahead = [pool.submit(decode, batch) for batch in islice(batches, 2 * threads)]
        while ahead:
            ready = ahead.pop(0).result()
            ahead += [pool.submit(decode, batch) for batch in islice(batches, 1)]
            yield ready


def _refuse_nonfinite(tensor: Tensor, what: str) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ModelError(
            f"{what}: the encoder gave NaN or infinity in {tensor.dtype}",
            remedy="Set train.precision: bf16 or fp32, or use a VAE that is mended for half precision.",
        )
