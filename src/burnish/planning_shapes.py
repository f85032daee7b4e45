"""The sizes that a run trains and draws at, as its config tells them: what the plan counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil, prod
from pathlib import Path

from safetensors import safe_open

from burnish.config.contrasts import PictureSlider, TextSlider
from burnish.config.data import DataSource, Folder, Generated
from burnish.config.method import Vae
from burnish.config.schema import RunConfig, SamplePrompt
from burnish.data.buckets import buckets_for
from burnish.family import Family
from burnish.planner.lesson import PICTURES, Lesson
from burnish.planner.recipe import Shape


def shapes_of(config: RunConfig, family: Family) -> list[Shape]:
    """The largest bucket of every size that is trained, the most tokens first."""
    multiple = family.latents.pixel_multiple
    found: set[Shape] = set()
    for source in config.data:
        # Both pictures of a preference are seen at once, those of a slider one after the other.
        batch = config.train.batch_size * (2 if getattr(source, "preference", None) is not None else 1)
        step = ceil(max(source.bucket_step, multiple) / multiple) * multiple
        for side in source.resolutions:
            bucket = max(buckets_for(side, step, source.max_aspect), key=lambda one: one.area)
            for frames in _frames(source, family):
                size = (bucket.height, bucket.width, frames)
                found.add(
                    Shape(*size, batch, *_references(source, frames, family), lesson_of(config, source))
                )
    return sorted(found, key=partial(weight_of, family), reverse=True)


def parts_of(config: RunConfig, shapes: Sequence[Shape]) -> list[int]:
    """Into how many parts batches may be taken, fewest first; one where none can be, or where weights move in backward.

    Of these the last is one picture after the other.
    """
    wanted, whole = config.memory.batch_parts, max(shape.batch for shape in shapes)
    if config.memory.gradient_release:
        return [1]
    if wanted != "auto":
        return [wanted]
    if any(shape.lesson.teaches for shape in shapes):
        return [1]
    return [*(2**power for power in range(whole.bit_length()) if 2**power < whole), whole]


def in_parts(shape: Shape, parts: int) -> Shape:
    """One of so many parts; pairs and sliders stay whole, as `Batch.parts` has it."""
    if shape.lesson.teaches:
        return shape
    batch = ceil(shape.batch / parts)
    return replace(shape, batch=batch, parts=ceil(shape.batch / batch))


def pictures_of(config: RunConfig, method: Vae, family: Family) -> list[Shape]:
    """The same of what a VAE learns: pictures, or the squares that are cut from them; those of most pixels first."""
    whole = [replace(one, lesson=PICTURES) for one in shapes_of(config, family)]
    if method.crop is not None:
        cut = method.crop
        whole = [replace(one, height=min(cut, one.height), width=min(cut, one.width)) for one in whole]
    return sorted(dict.fromkeys(whole), key=lambda one: one.height * one.width, reverse=True)


def weight_of(family: Family, shape: Shape) -> tuple[int, int, bool, bool, str]:
    """What a step takes, roughly; ends of a slider add their gradients up."""
    lesson = shape.lesson
    both = lesson.teaches in ("direction", "opposites")
    return shape.batch * tokens_of(shape, family), shape.references, both, lesson.kept, lesson.teaches


def lesson_of(config: RunConfig, source: DataSource) -> Lesson:
    """What a batch of a source teaches beside its pictures; sources that share batches are counted each alone."""
    kept, counted = source.target == "model", False
    if isinstance(source, Folder):
        masks = source.loss_masks
        kept = kept or source.preserve is not None or (masks is not None and masks.prior > 0)
        counted = masks is not None
    lesson = Lesson("", counted or kept, kept, config.train.objective.guided_target is not None)
    if isinstance(source.slider, TextSlider):
        return replace(lesson, teaches="direction")
    if isinstance(source.slider, PictureSlider):
        return replace(lesson, teaches="opposites")
    if getattr(source, "preference", None) is not None:
        return replace(lesson, teaches="preference")
    return lesson


def _frames(source: DataSource, family: Family) -> list[int]:
    if not family.capabilities.video:
        return [1]
    return list(getattr(source, "frames", None) or [family.defaults.frames])


def _references(source: DataSource, frames: int, family: Family) -> tuple[int, bool]:
    """How many a sample has, those that are named and those that it is itself, and whether the first has a hole."""
    can = family.capabilities
    named = len(getattr(source, "references", ()))
    masked = can.masks and (getattr(source, "masks", None) is not None or can.references == 1)
    own = can.own_references if masked or (can.first_frame and frames > 1) else 0
    return min(named + own, can.references), masked


def drawn_shape(config: RunConfig, family: Family) -> Shape | None:
    """The largest that is drawn, as a sample or for a source of generated pictures; None where nothing is.

    Samples count as the section says, without what single prompts say otherwise.
    """
    shapes = [_drawn_for(source, family) for source in config.data if isinstance(source, Generated)]
    if config.sample.prompts:
        shapes.append(_sample_shape(config, family))
    return max(shapes, key=lambda one: one.batch * tokens_of(one, family), default=None)


def _drawn_for(source: Generated, family: Family) -> Shape:
    multiple = family.latents.pixel_multiple
    side = max(source.resolutions) // multiple * multiple
    return Shape(side, side, 1, source.batch_size)


def _sample_shape(config: RunConfig, family: Family) -> Shape:
    sample = config.sample
    height, width = family.defaults.size
    if sample.size is not None:
        height, width = (sample.size, sample.size) if isinstance(sample.size, int) else sample.size
    multiple = family.latents.pixel_multiple
    told = [one for one in sample.prompts if isinstance(one, SamplePrompt)]
    return Shape(
        height // multiple * multiple,
        width // multiple * multiple,
        (sample.frames or family.defaults.frames) if family.capabilities.video else 1,
        sample.batch_size,
        max((len(one.references) for one in told), default=0),
        any(one.mask is not None for one in told),
    )


def tokens_of(shape: Shape, family: Family) -> int:
    return family.latents.tokens(family.latents.of(shape.height, shape.width, shape.frames))


def numbers_in(path: Path) -> int:
    """How many numbers the tensors of a safetensors file have in all, from its header."""
    with safe_open(path, framework="pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
