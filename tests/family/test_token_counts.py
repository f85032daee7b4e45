"""`count_tokens` against what the text encoder is given: data reports warn of captions that are cut off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import cases

from burnish.conditioning import Conditioning
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource

TinyFolder = Callable[[str], Path]
# Releases of one family that differ in what they are told read captions alike.
NAMES = ["sd15", "sdxl", *(name for name in cases() if not name.endswith("_still"))]
MULTIPLE = {"cogview4": 16}  # captions are filled up to whole 16s
MORE = {"chroma": 1}  # the first place of the padding is read, too


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest, tiny_folder: TinyFolder) -> Family:
    known = cases().get(request.param)
    kind = family_named(known.family if known else request.param)
    source, parts = ModelSource(str(tiny_folder(request.param))), frozenset(("text_encoders",))
    return kind.load(source, parts, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("prompt", ["", "a red chair", "a photo of a sks dog, soft light", "  a\n\nb  "])
def test_so_many_tokens_are_read(family: Family, prompt: str) -> None:
    told = family.encode_prompts([prompt])
    can = family.capabilities
    if "mask_BS" not in told or (can.prompts_see_references and can.first_frame):
        return  # padding is read as well, or a picture
    multiple = MULTIPLE.get(family.name, 1)
    counted = family.count_tokens(prompt) + MORE.get(family.name, 0)
    assert int(told["mask_BS"].sum()) == -(-counted // multiple) * multiple


def test_captions_are_cut_beyond_the_limit_and_not_before(family: Family) -> None:
    words = longest(family)
    assert alike(family, words + 40)
    assert not alike(family, words)


def longest(family: Family) -> int:
    """The most words that are within the limit, as the family counts."""
    low, high = 1, 2 * family.prompt_limit
    while high - low > 1:
        middle = (low + high) // 2
        within = family.count_tokens(caption(middle)) <= family.prompt_limit
        low, high = (middle, high) if within else (low, middle)
    return low


def caption(words: int, last: str = "dog") -> str:
    return " ".join(["dog"] * (words - 1) + [last])


def alike(family: Family, words: int) -> bool:
    """Whether captions of so many words are the same to the model when they differ in the last word."""
    one, other = (family.encode_prompts([caption(words, last)]) for last in ("dog", "cat"))
    return one.keys() == other.keys() and all(same(one, other, name) for name in one)


def same(one: Conditioning, other: Conditioning, name: str) -> bool:
    return one[name].shape == other[name].shape and torch.equal(one[name], other[name])
