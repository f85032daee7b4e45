"""Samples that teach a difference: the direction of a slider from prompts, or the other picture of a pair."""

from __future__ import annotations

from dataclasses import replace

from burnish.config.contrasts import TextSlider
from burnish.config.data import Folder
from burnish.data.caption_rules import CaptionRules
from burnish.data.companion_folders import Beside
from burnish.data.samples import Direction, Opposed, Sample


def fixed_caption(source: Folder) -> str | None:
    """What stands in for every caption of the source, which are then not read; None where they are."""
    return source.slider.target if isinstance(source.slider, TextSlider) else None


def contrasted(sample: Sample, source: Folder, beside: Beside | None) -> Sample:
    """The sample with what the source teaches by it; itself where that is the picture."""
    if isinstance(source.slider, TextSlider):
        slider = source.slider
        direction = Direction(slider.positive, slider.negative, tuple(slider.preserve), slider.guidance)
        return replace(sample, caption=slider.target, rules=CaptionRules(), direction=direction)
    other = beside.other_side(sample.fit) if beside is not None else None
    if other is None:
        return sample
    opposite = replace(sample, path=other.path, sha256=other.sha256, fit=other.fit)
    preference = source.preference
    if preference is None:
        return replace(sample, opposed=Opposed(opposite))
    return replace(sample, opposed=Opposed(opposite, preference.beta, preference.decay == "squared"))
