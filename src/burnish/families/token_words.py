"""New words for a CLIP or T5 text encoder: vectors of their own beside those that it was released with.

A word of several vectors is several tokens, named as diffusers' `load_textual_inversion` names them: `<cat>`,
`<cat>_1`, `<cat>_2`. A prompt that holds the word is read as all of them in a row (`written_out`).

Shape letters: B batch, S tokens, V words, N vectors of a word, D width.
"""

from __future__ import annotations

import re
from typing import cast

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
        return torch.where((ids_BS >= self.first).unsqueeze(-1), new_BSD, known_BSD)


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
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def knows(self, word: str) -> bool:
        known = self._tokenizer.get_vocab()
        return any(
            spelled in known for spelled in (word, f"{word}</w>", f"\u2581{word}")
        )  # CLIP's end, T5's begin

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
        inner = getattr(self._encoder, "text_model", self._encoder)
        if (
            getattr(inner, "eos_token_id", None) == LEGACY_END
        ):  # the highest number is no longer the end mark's
            inner.eos_token_id = self._tokenizer.eos_token_id


def written_out(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt with all tokens of added words that have several: `<cat> <cat>_1` for `<cat>`, as diffusers does."""
    added = tokenizer.added_tokens_encoder
    for word in added:
        names = [word]
        while f"{word}_{len(names)}" in added:
            names.append(f"{word}_{len(names)}")
        if len(names) > 1:
            whole = " ".join(names)
            prompt = re.sub(re.escape(word), lambda _, whole=whole: whole, prompt, flags=re.IGNORECASE)  # type: ignore[misc]
    return prompt
