"""New words for a CLIP text encoder: vectors of their own beside those that it was released with.

A word of several vectors is several tokens, named as diffusers' `load_textual_inversion` names them: `<cat>`,
`<cat>_1`, `<cat>_2`. A prompt that holds the word is read as all of them in a row (`clip.written_out`).

Shape letters: B batch, S tokens, V words, N vectors of a word, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

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


class ClipVocabulary:
    """A `Vocabulary` of a tokenizer and the text encoder that reads its tokens; both are changed in place."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
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
        return word in known or f"{word}</w>" in known

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
        if inner.eos_token_id == LEGACY_END:  # the highest number is no longer the end mark's
            inner.eos_token_id = self._tokenizer.eos_token_id
