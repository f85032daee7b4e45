"""Did you mean: measured over every key of the schema."""

from __future__ import annotations

import random
import string

import pytest

from burnish.config.schema import RunConfig
from burnish.config.shape import all_sections
from burnish.config.suggest import nearest, unknown_key_hint

PLACES = all_sections(RunConfig)


def typos(key: str, draw: random.Random) -> list[str]:
    """One letter left out, doubled, swapped with its neighbour, replaced; and the separator of another habit."""
    at = draw.randrange(len(key))
    swap = draw.randrange(len(key) - 1)
    return [
        key[:at] + key[at + 1 :],
        key[: at + 1] + key[at] + key[at + 1 :],
        key[:swap] + key[swap + 1] + key[swap] + key[swap + 2 :],
        key[:at] + draw.choice(string.ascii_lowercase) + key[at + 1 :],
        key.replace("_", "-") if "_" in key else key.upper(),
        key + "s" if key[-1] != "s" else key[:-1],
    ]


def test_a_near_typo_is_recognised_in_nine_of_ten_cases() -> None:
    draw = random.Random("typos")
    right, wrong = 0, []
    for place in PLACES:
        keys = tuple(place.section.model_fields)
        for key in keys:
            for typo in typos(key, draw):
                if typo in keys:
                    continue
                hint = unknown_key_hint(typo, keys, RunConfig, place.prefix)
                if hint == f"no such option; did you mean {key}?":
                    right += 1
                else:
                    wrong.append((place.prefix, typo, key, hint))
    assert right + len(wrong) > 600, "the schema has more keys than that"
    assert right / (right + len(wrong)) >= 0.9, wrong


def test_every_key_in_a_wrong_section_is_sent_to_its_own() -> None:
    checked = 0
    for place in PLACES:
        for key in place.section.model_fields:
            if key in RunConfig.model_fields or key == "kind":
                continue
            hint = unknown_key_hint(key, tuple(RunConfig.model_fields), RunConfig, "")
            if "did you mean" in hint:  # so near to a key of this section that it is more likely a typo
                continue
            assert f"`{place.prefix}`" in hint, (key, hint)
            checked += 1
    assert checked > 60


def test_a_slip_in_this_section_is_likelier_than_a_wrong_section() -> None:
    """`prompt` is an option of a single prompt too, but in `sample` it is `prompts` without its last letter."""
    place = next(place for place in PLACES if place.prefix == "sample.")
    hint = unknown_key_hint("prompt", tuple(place.section.model_fields), RunConfig, "sample")
    assert hint == "no such option; did you mean prompts?"


@pytest.mark.parametrize(
    ("word", "choices", "expected"),
    [
        ("adam", ["adamw", "adamw8bit", "prodigy"], "adamw"),
        ("esp", ["eps", "betas"], "eps"),
        ("Learning-Rate", ["learning_rate", "end_factor"], "learning_rate"),
        ("xyzzy", ["rank", "alpha"], None),
        ("", ["rank"], None),
        ("rank", [], None),
    ],
)
def test_nearest(word: str, choices: list[str], expected: str | None) -> None:
    assert nearest(word, choices) == expected
