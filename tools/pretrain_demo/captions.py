"""What is said about a scene: a small grammar for training, and one complete sentence for judging."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from .world import BACKGROUNDS, COLORS, GRADIENT, PLACES, RELATIONS, SHAPES, Scenes

SIZE_WORDS: Final[tuple[tuple[str, ...], ...]] = (
    ("small", "tiny", "little"),
    (),
    ("large", "big", "huge"),
)
PREFIXES: Final = ("a picture of", "a drawing of", "a photo of", "an image of", "a painting of")

_NOUNS: Final = """
object thing shape figure item toy dog cat house car tree boat cup chair table bird fish horse bear
apple banana hat shoe book phone clock key lamp ball box bag bottle plate spoon person man woman child
boy girl king queen robot dragon castle mountain river sea sun cloud rain snow fire light night day city
street garden forest field road bridge tower door window wall floor kitchen room bed sofa train plane
bike truck bus ship rocket planet world music guitar piano drum game doll puppet mask crown ring-box
sword shield coin gem bell flag kite balloon candle basket ladder wheel engine machine tool hammer nail
rope knife fork bread cake cheese egg milk tea coffee juice fruit lemon cherry grape pear carrot potato
leaf grass rose tulip bush stone rock sand wood metal glass paper cloth wool silk bee ant fly butterfly
spider frog snake turtle rabbit mouse fox wolf lion tiger elephant monkey panda penguin owl duck goose
chicken cow pig sheep goat
"""
UNKNOWN_NOUNS: Final = tuple(_NOUNS.split())
"""Nouns the world cannot draw: they stand for "some shape", so that unknown words leave the rest intact."""

_GROUND_WORDS: Final[tuple[tuple[str, ...], ...]] = (
    (
        "on {a} {c} background",
        "on {a} {c} background",
        "on {c}",
        "on a plain {c} background",
        ", {c} background",
    ),
    ("on {a} {c} to {c2} gradient", "on a gradient from {c} to {c2}", "on {a} {c} to {c2} background"),
    ("on a striped {c} background", "on {c} stripes", ", striped {c} background"),
    ("on a dotted {c} background", "on {a} {c} background with dots", ", dotted {c} background"),
    ("on a checkered {c} background", "on a checkered {c} background", ", checkered {c} background"),
)
_CANONICAL_GROUND: Final = (
    "on {a} {c} background",
    "on a gradient from {c} to {c2}",
    *(f"on a {kind} {{c}} background" for kind in BACKGROUNDS[2:]),
)
T = TypeVar("T")


def grammar_caption(scenes: Scenes, index: int) -> str:
    """The free caption of a scene: synonyms, left-out attributes, now and then a noun nobody can draw."""
    dice = iter(scenes.words[index].tolist())
    words = []
    opening = next(dice)
    if opening < 0.4:
        words.append(PREFIXES[int(opening / 0.4 * len(PREFIXES))])
    words.append(_loose_thing(scenes, index, 0, dice))
    if scenes.two[index]:
        words += [RELATIONS[scenes.relation[index]], _loose_thing(scenes, index, 1, dice)]
    elif scenes.place[index]:
        words.append(PLACES[scenes.place[index]])
    ground = _pick(_GROUND_WORDS[scenes.background[index]], next(dice))
    if next(dice) > 0.06:
        words.append(_fill_ground(ground, scenes, index))
    return _join(words)


def complete_caption(scenes: Scenes, index: int, dice: random.Random) -> str:
    """A caption that names every attribute; only the wording is drawn."""
    words = [dice.choice(PREFIXES)] if dice.random() < 0.2 else []
    words += _objects(scenes, index, dice)
    canonical = _CANONICAL_GROUND[scenes.background[index]]
    ground = canonical if dice.random() < 0.5 else dice.choice(_GROUND_WORDS[scenes.background[index]])
    return _join([*words, _fill_ground(ground, scenes, index)])


def training_captions(scenes: Scenes, seed: int, *, complete_share: float) -> list[str]:
    """One caption per scene; `complete_share` of them complete, the rest from the free grammar."""
    dice = random.Random(seed)
    return [
        complete_caption(scenes, index, dice)
        if dice.random() < complete_share
        else grammar_caption(scenes, index)
        for index in range(len(scenes))
    ]


def judged_caption(scenes: Scenes, index: int) -> str:
    """The plainest complete caption, always worded the same: what the figures are measured with."""
    ground = _CANONICAL_GROUND[scenes.background[index]]
    return _join([*_objects(scenes, index, None), _fill_ground(ground, scenes, index)])


def _objects(scenes: Scenes, index: int, dice: random.Random | None) -> list[str]:
    words = [_exact_thing(scenes, index, 0, dice)]
    if scenes.two[index]:
        words += [RELATIONS[scenes.relation[index]], _exact_thing(scenes, index, 1, dice)]
    elif scenes.place[index]:
        words.append(PLACES[scenes.place[index]])
    return words


def _exact_thing(scenes: Scenes, index: int, which: int, dice: random.Random | None) -> str:
    """An object with its size (if not medium), colour and shape; without dice, the first size word."""
    words = [COLORS[scenes.color[index, which]], SHAPES[scenes.shape[index, which]]]
    sizes = SIZE_WORDS[scenes.size[index, which]]
    if sizes:
        words.insert(0, dice.choice(sizes) if dice else sizes[0])
    return _with_article(words)


def _loose_thing(scenes: Scenes, index: int, which: int, dice: Iterator[float]) -> str:
    """An object with any of its attributes left out, or its noun replaced."""
    fate, words = next(dice), []
    sizes = SIZE_WORDS[scenes.size[index, which]]
    if sizes and next(dice) > 0.15:
        words.append(_pick(sizes, next(dice)))
    if fate * 7 % 1 > 0.08:
        words.append(COLORS[scenes.color[index, which]])
    if fate * 13 % 1 > 0.07:
        words.append(SHAPES[scenes.shape[index, which]])
    else:
        letters = random.Random(int(fate * 1e9))
        if letters.random() < 0.5:  # a made-up word, as the trigger of a LoRA is
            words.append("".join(letters.choices(string.ascii_lowercase, k=letters.randint(2, 4))))
        words.append(letters.choice(UNKNOWN_NOUNS))
    return _with_article(words)


def _fill_ground(words: str, scenes: Scenes, index: int) -> str:
    color, second = COLORS[scenes.color[index, 2]], COLORS[scenes.color[index, 3]]
    return words.format(a=_article(color), c=color, c2=second if scenes.background[index] == GRADIENT else "")


def _pick(choices: Sequence[T], die: float) -> T:
    return choices[min(int(die * len(choices)), len(choices) - 1)]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _with_article(words: list[str]) -> str:
    return " ".join([_article(words[0]), *words])


def _join(words: list[str]) -> str:
    return " ".join(words).replace(" ,", ",")
