"""New words for a text encoder: vectors of their own beside those that it was released with.

A word of several vectors is several tokens, named as diffusers' `load_textual_inversion` names them: `<cat>`,
`<cat>_1`, `<cat>_2`. A prompt that holds the word is read as all of them in a row (`written_out`). CLIP and T5 pass
over the blanks between tokens. To the tokenizers of language models a blank is a token or a part of one: there the
word's tokens stand side by side, and the text before and behind is read by itself, as ComfyUI reads it
(`SDTokenizer.tokenize_with_weights` in `comfy/sd1_clip.py`).

Shape letters: B batch, S tokens, V words, N vectors of a word, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEGACY_END = (
    2  # of configs that give no number of the end mark: the encoder then takes the highest number for it
)


class GrownEmbedding(nn.Module):
    """The released vectors, frozen, and those of added words behind them."""

    def __init__(self, released: nn.Embedding, first: int) -> None:
        super().__init__()
        self.released = released
        self.first = first  # number of the first token that was added
        self.added = nn.ParameterList()

    def forward(self, ids_BS: Tensor) -> Tensor:
        known_BSD: Tensor = self.released(ids_BS.clamp(max=self.released.num_embeddings - 1))
        added_ND = torch.cat(list(self.added))
        new_BSD = nn.functional.embedding((ids_BS - self.first).clamp(min=0), added_ND).to(known_BSD.dtype)
        scale = getattr(self.released, "embed_scale", None)  # Gemma's embedding scales what it gives
        if isinstance(scale, Tensor):
            new_BSD = new_BSD * scale.to(known_BSD.dtype)
        return torch.where((ids_BS >= self.first).unsqueeze(-1), new_BSD, known_BSD)


@dataclass
class _Added:
    """The words that a tokenizer was taught."""

    apart: bool  # whether blanks between tokens say nothing
    names: dict[str, list[str]] = field(default_factory=dict)  # of each word all its tokens

    def replaced(self, prompt: str, tokens: Mapping[str, Sequence[str]]) -> str:
        """The prompt with `tokens` in place of each word."""
        words = "|".join(re.escape(word) for word in sorted(self.names, key=len, reverse=True))
        around, between = ("", " ") if self.apart else (" ?", "")

        def told(found: re.Match[str]) -> str:
            return between.join(tokens.get(found[1].lower(), [found[1]]))

        return re.sub(f"{around}({words}){around}", told, prompt, flags=re.IGNORECASE)


_ADDED: WeakKeyDictionary[PreTrainedTokenizerBase, _Added] = WeakKeyDictionary()


class TokenVocabulary:
    """A `Vocabulary` of a tokenizer and the text encoder that reads its tokens; both are changed in place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder

    @property
    def vectors(self) -> Tensor:
        embedding = self._encoder.get_input_embeddings()
        released = embedding.released if isinstance(embedding, GrownEmbedding) else embedding
        return cast(Tensor, released.weight.detach())

    def numbers(self, text: str) -> list[int]:
        """As within a sentence: the words that language models know best have a blank before them."""
        alone, within = self._read(text), self._read(f" {text}")
        return within if len(within) <= len(alone) else alone

    def knows(self, word: str) -> bool:
        known = self._tokenizer.get_vocab()
        spelled = (word, f"{word}</w>", f"\u2581{word}")  # CLIP's end, T5's begin
        within = self._read(f" {word}")  # one token of bytes or pieces, blank included
        return any(one in known for one in spelled) or (
            len(within) == 1 and within[0] != self._tokenizer.unk_token_id
        )

    def add(self, word: str, vectors_ND: nn.Parameter) -> None:
        names = [word, *(f"{word}_{number}" for number in range(1, len(vectors_ND)))]
        if any(self.knows(name) for name in names):
            raise ValueError(f"{word!r} is a word already")
        embedding = self._encoder.get_input_embeddings()
        self._tokenizer.add_tokens(names)
        if not isinstance(embedding, GrownEmbedding):
            embedding = GrownEmbedding(embedding, self._tokenizer.convert_tokens_to_ids(word))
            self._encoder.set_input_embeddings(embedding)
        embedding.added.append(vectors_ND)
        if self._tokenizer not in _ADDED:
            _ADDED[self._tokenizer] = _Added(apart=len(self._read(f"{word} {word}")) == 2)
        _ADDED[self._tokenizer].names[word] = names
        inner = getattr(self._encoder, "text_model", self._encoder)
        if (
            getattr(inner, "eos_token_id", None) == LEGACY_END
        ):  # the highest number is no longer the end mark's
            inner.eos_token_id = self._tokenizer.eos_token_id

    def _read(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def written_out(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt with all tokens of the words that the tokenizer was taught: `<cat> <cat>_1` for `<cat>`, as diffusers
    does, and where blanks are read `<cat><cat>_1`, without the blanks around it."""
    added = _ADDED.get(tokenizer)
    return prompt if added is None else added.replaced(prompt, added.names)


def left_blank(tokenizer: PreTrainedTokenizerBase, prompt: str, filler: str) -> str:
    """The prompt with `filler` for each vector of the words that `tokenizer` was taught, to be read by another."""
    added = _ADDED.get(tokenizer)
    if added is None:
        return prompt
    return added.replaced(prompt, {word: [filler] * len(names) for word, names in added.names.items()})
