"""The two vocabularies: every word of the world is one token, anything else can be spelled."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from .captions import PREFIXES, SIZE_WORDS, UNKNOWN_NOUNS, grammar_caption
from .world import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, sample_scenes

CLIP_LENGTH: Final = 32
T5_LENGTH: Final = 32
"""Prompt tokens in training; call the pipeline with `max_sequence_length=32`."""

_LONGEST_CLIP = 77  # what the pipeline pads to
_CORPUS_SCENES: Final = 6000
_WORD_START: Final = "\u2581"
_SMALL_WORDS: Final = frozenset(("a", "an", "on", "from", "with", "dots", "stripes", "background"))
_GENERAL_ENGLISH: Final = (
    "the quick brown fox jumps over the lazy dog",
    "a beautiful portrait of a person with long hair, soft light, high quality",
    "anime style, watercolor, oil painting, sketch, cartoon, pixel art, minimalist, logo, icon, sticker",
    "low quality, blurry, worst quality, bad, ugly, distorted, watermark, text",
    "in front of, behind, inside, under, over, between, with, without",
    "three four five many few, very, bright dark light pale deep, glowing wooden metallic shiny matte",
)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Prompts as both text encoders read them."""

    clip_NS: NDArray[np.int64]
    t5_NS: NDArray[np.int64]


def train_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Both tokenizers, trained on the world's captions and a little general English; the same every time."""
    scenes = sample_scenes(0, _CORPUS_SCENES)
    captions = [grammar_caption(scenes, index) for index in range(len(scenes))]
    corpus = captions + [*_GENERAL_ENGLISH, *UNKNOWN_NOUNS] * 20
    vocabulary, merges = _clip_vocabulary(corpus)
    clip = CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", model_max_length=_LONGEST_CLIP
    )
    return clip, T5TokenizerFast(vocab=_t5_vocabulary(corpus), model_max_length=T5_LENGTH)


def tokenize(clip: CLIPTokenizer, t5: T5TokenizerFast, prompts: list[str]) -> TokenIds:
    """Prompts as token numbers, padded to the training lengths."""

    def ids(tokenizer: Any, length: int) -> NDArray[np.int64]:
        padded = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
        )
        return np.asarray(padded.input_ids, np.int64)

    return TokenIds(ids(clip, CLIP_LENGTH), ids(t5, T5_LENGTH))


def _clip_vocabulary(corpus: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE as CLIP's, about 1300 tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1100,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = dict(model["vocab"])
    for token in model["vocab"]:
        if len(token) == 1:  # every byte also ends a word, as in the real CLIP vocabulary
            vocabulary.setdefault(token + "</w>", len(vocabulary))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return vocabulary, [(left, right) for left, right in merges]


def _t5_vocabulary(corpus: list[str]) -> list[tuple[str, float]]:
    """A Unigram vocabulary as T5's, about 850 tokens: the world's words whole, pieces for the rest."""
    letters = list(string.printable.strip())
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=900,
        unk_token="<unk>",
        special_tokens=["<pad>", "</s>", "<unk>"],
        show_progress=False,
        initial_alphabet=[*letters, _WORD_START],
    )
    tokenizer.train_from_iterator(corpus, trainer)
    trained = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    known = _world_words()
    words = set()
    for line in corpus:
        for word in (raw.strip(",") for raw in line.split()):
            if word.isalpha() and (len(word) > 4 or word in known):
                words.add(_WORD_START + word)
    pieces = [(piece, score) for piece, score in trained if piece not in words]
    have = {piece for piece, _ in pieces} | words
    spelled = [(letter, -12.0) for letter in letters if letter not in have]
    extra = [(f"<extra_id_{number}>", 0.0) for number in range(99, -1, -1)]
    return pieces + [(word, -2.0) for word in sorted(words)] + spelled + extra


def _world_words() -> set[str]:
    phrases = [*SHAPES, *COLORS, *BACKGROUNDS, *RELATIONS, *PLACES, *PREFIXES, *UNKNOWN_NOUNS]
    phrases += [word for words in SIZE_WORDS for word in words]
    return set(" ".join(phrases).split()) | _SMALL_WORDS
