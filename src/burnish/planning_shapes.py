"""The sizes that a run trains and draws at, as its config tells them: what the plan counts."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, prod
from pathlib import Path

from safetensors import safe_open

from burnish.config.contrasts import PictureSlider, TextSlider
from burnish.config.data import DataSource, Folder, Generated
from burnish.config.schema import RunConfig, SamplePrompt
from burnish.data.buckets import buckets_for
from burnish.family import Family
from burnish.planner.trace import Shape


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
                found.add(Shape(*size, batch, *_references(source, frames, family)))
    return sorted(found, key=lambda one: (one.batch * tokens_of(one, family), one.references), reverse=True)


def passes_besides(config: RunConfig) -> Iterator[str]:
    """What steps of some sources take beside the one that is planned, in words.

    A pass without gradients is a half of a step whose activations are kept, and a third of one that computes again.
    """
    if config.train.objective.guided_target is not None:
        yield "train.objective.guided_target: a pass without gradients, a third to a half of the seconds said, on top"
    for index, source in enumerate(config.data):
        if isinstance(source.slider, TextSlider):
            yield (
                f"data.{index}.slider: a step is two such steps, one after the other, and three passes without "
                "gradients: 3 to 3.5 times the seconds said; memory as said"
            )
        elif isinstance(source.slider, PictureSlider):
            yield f"data.{index}.slider: a step is two such steps, one after the other: twice the seconds said"
        elif isinstance(source, Folder) and source.preference is not None:
            yield (
                f"data.{index}.preference: pairs are counted as two pictures each; a pass of them without gradients, a "
                "third to a half of the seconds said, comes on top"
            )


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
