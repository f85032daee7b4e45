"""Config of sources that teach a difference rather than pictures: sliders and preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from burnish.config.section import Section, default_kind

Prompt = Annotated[str, Field(min_length=1)]


class TextSlider(Section):
    """A concept slider from prompts (arXiv 2311.12092): at strength 1 the adapter moves what the model says of `target`
    from `negative` towards `positive`, at strength -1 the other way."""

    kind: Literal["text"] = "text"
    target: str = Field(
        description="What the slider is for, such as `a person`; an empty text is everything."
    )
    positive: Prompt = Field(description="Where strength 1 goes: `a very old person`.")
    negative: str = Field(description="Where strength -1 goes: `a very young person`.")
    preserve: list[Prompt] = Field(
        [],
        max_length=64,
        description="What the slider is not to change, each put behind both prompts in turn: `male`, `female`.",
    )
    guidance: float = Field(
        3.0, gt=0, le=50, description="How far strength 1 goes: this many times the difference of the two."
    )


class PictureSlider(Section):
    """A slider from pairs of pictures (same paper, visual sliders): the pictures here at strength 1, those of the same
    name in `opposite` at strength -1."""

    kind: Literal["pictures"]
    opposite: Path = Field(
        description="Folder with a picture of the same name for each picture here: the slider's other end."
    )


AnySlider = Annotated[TextSlider | PictureSlider, Field(discriminator="kind"), default_kind("text")]


class Preference(Section):
    """Direct preference optimization (arXiv 2311.12908; of flows 2501.13918): the pictures here are preferred to those
    of the same name in `rejected`."""

    rejected: Path = Field(
        description="Folder with a picture of the same name for each picture here: what is not wanted."
    )
    beta: float = Field(
        2000.0,
        gt=0,
        le=1e6,
        description="How strongly the model is held to what it was; above it learns less and keeps more.",
    )
    decay: Literal["none", "squared"] = Field(
        "none", description="`squared`: beta falls with the time as (1 - t)^2, from clean to noise."
    )
