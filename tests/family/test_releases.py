"""What `releases` says against the tiny pipelines, each of which is loaded as its release is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import cases

from burnish.families.registry import family_named
from burnish.family import Capabilities, ModelSource

TinyFolder = Callable[[str], Path]


def data(can: Capabilities) -> tuple[object, ...]:
    return can.video, can.audio, can.references, can.masks, can.first_frame


@pytest.mark.parametrize("name", [name for name in cases() if not name.endswith("_still")])
def test_what_a_release_takes_is_said_of_the_family_or_one_of_its_releases(
    tiny_folder: TinyFolder, name: str
) -> None:
    kind = family_named(cases()[name].family)
    source = ModelSource(str(tiny_folder(name)))
    loaded = kind.load(source, frozenset(), dtype=torch.float32, device="cpu")
    known = [kind.skeleton(depth=1), *kind.releases().values()]
    assert data(loaded.capabilities) in [data(family.capabilities) for family in known]


@pytest.mark.parametrize("family", sorted({case.family for case in cases().values()} | {"sd15", "sdxl"}))
def test_every_release_that_is_named_takes_other_data_or_draws_otherwise(family: str) -> None:
    kind = family_named(family)
    shown = [kind.skeleton(depth=1), *kind.releases().values()]
    assert len({(data(one.capabilities), one.defaults.size, one.defaults.steps) for one in shown}) == len(
        shown
    )
