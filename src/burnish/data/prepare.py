"""Filling the cache: whatever training will draw is encoded beforehand, and only what is not there yet.

Shape letters: B batch, C channels, T frames, H W height and width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.data.audio import sound_at
from burnish.data.cache import Cache, CacheKeys, Entry
from burnish.data.clips import frames_at
from burnish.data.companions import drawn_holes, mask_values
from burnish.data.pictures import BadPicture, content_hash, decode_picture, open_regular, read_regular
from burnish.data.samples import Sample
from burnish.errors import DataError, ModelError
from burnish.family import Family

Progress = Callable[[int, int], None]  # done, of

# Names in an entry of latents; other tensors there are conditioning, batch first.
LATENTS = "latents"
AUDIO = "audio"  # of a clip's sound


@dataclass(frozen=True, slots=True)
class EncodeCounts:
    """How many entries were there, were made, and of those made, replaced a damaged one."""

    hits: int
    encoded: int
    repaired: int


@dataclass(frozen=True, slots=True)
class _Picture:
    """One picture or part of a clip to encode."""

    key: str
    sample: Sample
    flip: bool


@dataclass(frozen=True, slots=True)
class _Pixels:
    """A batch on its way to the VAE, values in [-1, 1]."""

    target: Tensor  # (B, 3, H, W), or (B, 3, T, H, W)
    references: tuple[Tensor, ...]  # each (B, 3, H, W)
    mask_B1HW: Tensor | None
    waveform_B2N: Tensor | None = None  # the sound of clips


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

    What the denoiser is told about references lies in the same entry. Stored as `keys.dtype`. With `batch_size` 1
    what is stored does not depend on what else was missing.

    Raises:
        DataError: a file changed since the preflight.
        ModelError: the VAE gave NaN or infinity.
        DiskFull: the cache cannot be written.
    """
    wanted: dict[str, _Picture] = {}
    for sample in sorted(samples, key=lambda sample: (sample.shape, sample.id)):
        for flip in flips(sample):
            key = keys.latents(sample, flip=flip)
            wanted.setdefault(key, _Picture(key, sample, flip))
    repaired = cache.repaired
    missing = [picture for key, picture in wanted.items() if cache.get("latents", key) is None]
    repaired, hits, done = cache.repaired - repaired, len(wanted) - len(missing), 0
    for batch, pixels in _decoded(_batches(missing, batch_size), family):
        latents = family.encode_pixels(pixels.target.to(device))
        audio = _encoded_audio(family, pixels, device)
        shown = _shown(family, batch[0].sample, pixels, device)
        for row, picture in enumerate(batch):
            rows = shown.rows(slice(row, row + 1)) if shown else {}
            entry = {LATENTS: latents[row], **rows, **({} if audio is None else {AUDIO: audio[row]})}
            for name, tensor in entry.items():
                _refuse_nonfinite(tensor, f"{name} of {picture.sample.path}")
            cache.put("latents", picture.key, {name: _stored(t, keys) for name, t in entry.items()})
        done += len(batch)
        if progress is not None:
            progress(done, len(missing))
    return EncodeCounts(hits, done, repaired)


def flips(sample: Sample) -> tuple[bool, ...]:
    return (False, True) if sample.flip else (False,)


def _shown(
    family: Family, sample: Sample, pixels: _Pixels, device: torch.device | str
) -> Conditioning | None:
    """What the denoiser is told about the references of a batch of which `sample` is one; None without any."""
    if not pixels.references:
        return None
    mask_B1HW = pixels.mask_B1HW.to(device) if pixels.mask_B1HW is not None else None
    references = [reference.to(device) for reference in pixels.references]
    return family.encode_references(references, mask_B1HW=mask_B1HW, frames=sample.frames)


def _encoded_audio(family: Family, pixels: _Pixels, device: torch.device | str) -> Tensor | None:
    if family.audio is None or pixels.waveform_B2N is None:
        return None
    return family.audio.encode(pixels.waveform_B2N.to(device))


def _stored(tensor: Tensor, keys: CacheKeys) -> Tensor:
    return tensor.to("cpu", keys.dtype if tensor.is_floating_point() else None)


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


@torch.no_grad()
def encode_seen_captions(
    samples: Sequence[Sample],
    seed: int,
    family: Family,
    cache: Cache,
    keys: CacheKeys,
    *,
    progress: Progress | None = None,
) -> EncodeCounts:
    """As `encode_captions`, for every caption of samples whose captions are encoded with their references.

    Raises:
        DataError: a file changed since the preflight.
        ModelError: a text encoder gave NaN or infinity.
        DiskFull: the cache cannot be written.
    """
    wanted = {
        keys.caption(text, sample, flip=flip): (text, sample, flip)
        for sample in samples
        if keys.sees(sample)
        for flip in flips(sample)
        for text in sample.captions(seed)
    }
    repaired = cache.repaired
    missing = [(key, *what) for key, what in wanted.items() if cache.get("captions", key) is None]
    repaired = cache.repaired - repaired
    for done, (key, text, sample, flip) in enumerate(missing, 1):
        seen = load_references(sample, flip=flip)
        entry = dict(family.encode_prompts([text], [seen]).to("cpu", keys.dtype))
        for tensor in entry.values():
            _refuse_nonfinite(tensor, f"the encoding of {text!r} with {sample.path}")
        cache.put("captions", key, entry)
        if progress is not None:
            progress(done, len(missing))
    return EncodeCounts(len(wanted) - len(missing), len(missing), repaired)


def load_pixels(sample: Sample, *, flip: bool) -> Tensor:
    """What the VAE sees of a sample in [-1, 1], float32: (3, H, W), of a clip (3, T, H, W).

    Raises:
        DataError: the file changed or went away since the preflight.
    """
    if not sample.is_clip:
        picture = _read(sample.path, sample.sha256, sample.background)
        return pixels_of(sample.fit.apply(picture, flipped=flip))
    with _unchanged(sample.path), open_regular(sample.path) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sample.sha256:
            raise BadPicture("changed")
        pictures = frames_at(file, sample.times, background=sample.background)
    return torch.stack([pixels_of(sample.fit.apply(one, flipped=flip)) for one in pictures], dim=1)


def load_audio(sample: Sample, rate: int, *, flip: bool) -> Tensor:
    """What is heard while a clip's frames are on screen, (2, N) in [-1, 1] at `rate`; mirrored, sides change places.

    Raises:
        DataError: the file changed or went away since the preflight.
    """
    with _unchanged(sample.path), open_regular(sample.path) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sample.sha256:
            raise BadPicture("changed")
        heard_2N = sound_at(file, sample.start, sample.seconds, rate)
    return heard_2N.flip(0) if flip else heard_2N


def load_references(sample: Sample, *, flip: bool, pixels: Tensor | None = None) -> list[Tensor]:
    """The pictures that are shown beside a sample's caption, each (3, H, W) in [-1, 1].

    Args:
        pixels: of the sample itself, where they are there already.

    Raises:
        DataError: a file changed or went away since the preflight.
    """
    shown = []
    if sample.sees_itself:
        own = load_pixels(sample, flip=flip) if pixels is None else pixels
        shown.append(own[:, 0] if sample.is_clip else own)
        if sample.sees_end:
            shown.append(own[:, -1] if sample.is_clip else own)
    for one in sample.references:
        picture = _read(one.path, one.sha256, sample.background)
        shown.append(pixels_of(one.apply(picture, flipped=flip)))
    return shown


def load_mask(sample: Sample, *, flip: bool) -> Tensor | None:
    """(1, H, W), 1 where the sample is to be filled; None where it is not that kind of sample.

    Raises:
        DataError: the file changed or went away since the preflight.
    """
    if not sample.fills_holes:
        return None
    if sample.mask is not None:
        picture = _read(sample.mask.path, sample.mask.sha256, "#000000")
        return mask_values(sample.mask.apply(picture, flipped=flip))
    holes = drawn_holes(sample.sha256, sample.bucket.height, sample.bucket.width)
    return mask_values(holes.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else holes)


def _read(path: Path, sha256: str, background: str) -> Image.Image:
    with unchanged_bytes(path, sha256) as data:
        return decode_picture(data, background=background, max_megapixels=float("inf")).picture


@contextmanager
def unchanged_bytes(path: Path, sha256: str) -> Iterator[bytes]:
    """The bytes of a file; what is bad of them now was good when it was checked.

    Raises:
        DataError: the file changed or went away since.
    """
    with _unchanged(path):
        data = read_regular(path)
        if content_hash(data) != sha256:
            raise BadPicture("changed")
        yield data


@contextmanager
def _unchanged(path: Path) -> Iterator[None]:
    """What is bad now was good at the preflight."""
    try:
        yield
    except BadPicture as error:
        said = f"{path} changed" if error.message == "changed" else f"{path}: {error.message}"
        raise DataError(f"{said} since it was checked", remedy="Start again.") from error


def pixels_of(picture: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1], float32, of a picture in mode RGB; 0 becomes -1 and 255 becomes 1."""
    values_HW3 = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return values_HW3.permute(2, 0, 1).float() / 127.5 - 1


def conditioning_of(captions: Entry, latents: Entry) -> Conditioning:
    """What the caption's entry and that of the latents tell the denoiser about one sample."""
    shown = {name: tensor for name, tensor in latents.items() if name not in (LATENTS, AUDIO)}
    return Conditioning(captions).merged(shown)


def _batches(pictures: Sequence[_Picture], batch_size: int) -> Iterator[list[_Picture]]:
    """Up to `batch_size` neighbours of one shape."""
    batch: list[_Picture] = []
    for picture in pictures:
        if batch and (len(batch) == batch_size or batch[0].sample.shape != picture.sample.shape):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def _decoded(batches: Iterator[list[_Picture]], family: Family) -> Iterator[tuple[list[_Picture], _Pixels]]:
    """Each batch with its pixels; the next few are decoded while the VAE is busy, of clips only the next one."""

    video = family.capabilities.video
    rate = family.audio.shape.sample_rate if family.audio is not None else 0

    def decode(batch: list[_Picture]) -> tuple[list[_Picture], _Pixels]:
        return batch, _pixels(batch, video, rate)

    threads = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "pixels") as pool:
        ahead = [pool.submit(decode, batch) for batch in islice(batches, 1 if video else 2 * threads)]
        while ahead:
            ahead += [pool.submit(decode, batch) for batch in islice(batches, 1)]
            yield ahead.pop(0).result()


def _pixels(batch: Sequence[_Picture], video: bool, rate: int) -> _Pixels:
    """Args:
    rate: of the sound of those samples that have some.
    """
    targets, shown, masks = [], [], []
    for picture in batch:
        sample, flip = picture.sample, picture.flip
        target = load_pixels(sample, flip=flip)
        shown.append(load_references(sample, flip=flip, pixels=target))
        masks.append(load_mask(sample, flip=flip))
        targets.append(target[:, None] if video and not sample.is_clip else target)
    holes = [mask for mask in masks if mask is not None]
    return _Pixels(
        torch.stack(targets),
        tuple(torch.stack(column) for column in zip(*shown, strict=True)),
        torch.stack(holes) if holes else None,
        torch.stack([load_audio(one.sample, rate, flip=one.flip) for one in batch])
        if batch[0].sample.audio
        else None,
    )


def _refuse_nonfinite(tensor: Tensor, what: str) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ModelError(
            f"{what}: the encoder gave NaN or infinity in {tensor.dtype}",
            remedy="Set train.precision: bf16 or fp32, or use a VAE that is mended for half precision.",
        )
