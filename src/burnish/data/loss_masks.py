"""Which part of a sample the loss counts: masks brought to the latents' size, cached, and weights made of them.

Shape letters: H W height and width of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from burnish.config.data import AlphaMasks, Folder
from burnish.data.buckets import Fit
from burnish.data.cache import Cache, CacheKeys
from burnish.data.companion_folders import Beside
from burnish.data.pictures import BadPicture, decode_picture, opacity
from burnish.data.prepare import flips, unchanged_bytes
from burnish.data.probe import Facts
from burnish.data.samples import Counts, Sample
from burnish.latent_shape import LatentShape

MASK = "mask"  # its name in an entry


def counts_of(source: Folder, beside: Beside | None, fit: Fit) -> Counts | None:
    """What the source says of a sample; None where all of it counts alike."""
    section = source.loss_masks
    if section is None:
        return Counts(model=True) if source.target == "model" else None
    mask = beside.loss_mask(fit) if beside is not None else None
    return Counts(
        mask=mask,
        alpha=section.kind == "alpha",
        outside=section.outside,
        prior=section.prior,
        normalize=section.normalize,
        model=source.target == "model",
    )


def refuse_without_alpha(source: Folder, facts: Facts) -> None:
    """Raises:
    BadPicture: the mask is to be a clip's transparency, which is not read.
    """
    if isinstance(source.loss_masks, AlphaMasks) and facts.duration is not None:
        raise BadPicture(
            "a clip, whose transparency is not read as a mask",
            remedy="Put clips into a source of their own, with loss_masks.path: a folder of masks.",
        )


def preserved(samples: Sequence[Sample], source: Folder, trigger: str | None) -> list[Sample]:
    """Each sample once more, with the class word in place of the trigger and the model itself as target; none of those
    that do not say the trigger, as the same caption would have two targets."""
    if source.preserve is None or not trigger:
        return []
    word, twins = source.preserve.word, []
    for sample in samples:
        rules = replace(sample.rules, prefix=sample.rules.prefix.replace(trigger, word))
        caption = sample.caption.replace(trigger, word)
        if (caption, rules) == (sample.caption, sample.rules):
            continue
        twins.append(
            replace(
                sample,
                picture_id=f"{sample.picture_id}={word}",
                role="regularization",
                caption=caption,
                rules=rules,
                weight=sample.weight * source.preserve.weight,
                counts=Counts(model=True),
            )
        )
    return twins


def grid_of(latents: LatentShape, sample: Sample) -> tuple[int, int]:
    _, height, width = replace(latents, frame_compression=None).of(sample.bucket.height, sample.bucket.width)
    return height, width


def encode_masks(samples: Sequence[Sample], latents: LatentShape, cache: Cache, keys: CacheKeys) -> int:
    """Make every mask of the loss that the cache lacks, and say how many those were.

    Raises:
        DataError: a file changed since it was checked.
        DiskFull: the cache cannot be written.
    """
    made = 0
    for sample in samples:
        if sample.counts is None or not sample.counts.masked:
            continue
        grid = grid_of(latents, sample)
        for flip in flips(sample):
            key = keys.mask(sample, grid, flip=flip)
            if cache.get("masks", key) is None:
                cache.put("masks", key, {MASK: reduced(load_loss_mask(sample, flip=flip), grid)})
                made += 1
    return made


def load_loss_mask(sample: Sample, *, flip: bool) -> Image.Image:
    """At the bucket's size, mode L: 255 where it counts; resized, cut and mirrored as the sample is.

    Raises:
        DataError: the file changed or went away since it was checked.
    """
    assert sample.counts is not None, "one that has a mask"
    own = sample.counts.mask
    if own is not None:
        with unchanged_bytes(own.path, own.sha256) as data:
            picture = decode_picture(data, background="#000000", max_megapixels=float("inf")).picture
        return own.apply(picture, flipped=flip).convert("L")
    with unchanged_bytes(sample.path, sample.sha256) as data:
        alpha = opacity(data)
    return sample.fit.apply(alpha, flipped=flip)


def reduced(mask: Image.Image, grid: tuple[int, int]) -> Tensor:
    """(1, H, W) in [0, 1], float32: of each latent the mean over the pixels that it stands for."""
    values_HW = torch.from_numpy(np.array(mask, dtype=np.float32)) / 255
    height, width = grid
    rows, columns = values_HW.shape[0] // height, values_HW.shape[1] // width
    blocks = values_HW.reshape(height, rows, width, columns)
    return blocks.mean((1, 3))[None]


def loss_weights(
    samples: Sequence[Sample], latents: Sequence[Tensor], mask_of: Callable[[int], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """`counted` and `kept` of a batch: weights of the error against the sample, and against the model as it was.

    Args:
        latents: of each sample, (C, H, W) or (C, T, H, W).
        mask_of: number of a sample that has a mask -> that, (1, H, W).
    """
    if all(sample.counts is None for sample in samples):
        return None, None
    shape = (1,) * (latents[0].dim() - 2) + tuple(latents[0].shape[-2:])
    counted, kept = [], []
    for number, sample in enumerate(samples):
        counts = sample.counts or Counts()
        mask_1HW = mask_of(number) if counts.masked else torch.ones(1, *shape[-2:])
        inside_1HW = counts.outside + (1 - counts.outside) * mask_1HW
        if counts.normalize:
            inside_1HW = inside_1HW / inside_1HW.mean().clamp(min=1e-3)
        none_1HW = torch.zeros_like(inside_1HW)
        counted.append((none_1HW if counts.model else inside_1HW).reshape(shape))
        kept.append((inside_1HW if counts.model else counts.prior * (1 - mask_1HW)).reshape(shape))
    asks = any(sample.counts is not None and sample.counts.asks_model for sample in samples)
    return torch.stack(counted), torch.stack(kept) if asks else None
