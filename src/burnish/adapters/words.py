"""A new word as what is trained: vectors in the vocabulary of a frozen text encoder (arXiv 2208.01618).

Shape letters: V words, N vectors of the new one, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from burnish.config.method import PivotalWord, TextualInversion, Word
from burnish.errors import ConfigError
from burnish.family import Family, Vocabulary
from burnish.randomness import torch_generator

COLUMNS = 256  # of a vocabulary that are in float32 at one time
INNER = (0.01, 0.99)  # between these shares of the vocabulary by length lies what a vector may be long


class NewWord:
    """The vectors of a word in one vocabulary; they train in float32 whatever the text encoder computes in."""

    def __init__(
        self, vectors_ND: nn.Parameter, lengths: tuple[float, float], learning_rate: float | None = None
    ) -> None:
        self.vectors_ND = vectors_ND
        self.lengths = lengths
        self.learning_rate = learning_rate  # the optimizer's if None

    @classmethod
    def teach(cls, vocabulary: Vocabulary, asked: Word, name: str, seed: int) -> Self:
        """Add the word that is asked for to `vocabulary`, called `name` in messages.

        Raises:
            ConfigError: the word is one already, or the initial text has no words.
        """
        refuse_known(vocabulary, asked, name)
        start_ND = first_vectors(vocabulary, asked, name, seed)
        # A language model's vocabulary in float32 would be gigabytes: it is summed in it and no more.
        lengths_V = torch.linalg.vector_norm(vocabulary.vectors, dim=1, dtype=torch.float32).cpu()
        shortest, longest = lengths_V.quantile(torch.tensor(INNER)).tolist()
        rate = asked.learning_rate if isinstance(asked, PivotalWord) else None
        word = cls(nn.Parameter(start_ND), (shortest, longest), rate)
        vocabulary.add(asked.token, word.vectors_ND)
        return word

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {"vectors": self.vectors_ND}

    def parameter_groups(self, default_lr: float) -> list[dict[str, Any]]:
        rate = default_lr if self.learning_rate is None else self.learning_rate
        return [{"params": [self.vectors_ND], "lr": rate, "names": ["vectors"]}]

    @torch.no_grad()
    def keep_length(self) -> None:
        """Each vector as long as the vocabulary's are: one that grows without bound drowns the rest of the prompt."""
        shortest, longest = self.lengths
        length_N1 = self.vectors_ND.norm(dim=1, keepdim=True)
        wanted_N1 = length_N1.clamp(shortest, longest)
        self.vectors_ND.copy_(
            torch.where(wanted_N1 == length_N1, self.vectors_ND, self.vectors_ND * (wanted_N1 / length_N1))
        )


def refuse_known(vocabulary: Vocabulary, asked: Word, name: str) -> None:
    """Raises:
    ConfigError: the word is one already.
    """
    words = [asked.token, *(f"{asked.token}_{number}" for number in range(1, asked.vectors))]
    known = next((word for word in words if vocabulary.knows(word)), None)
    if known is not None:
        raise ConfigError(
            f"{place_of_word(asked)}.token: {known!r} is in the vocabulary of {name} already, as another word",
            remedy=f"Take a word that the model does not know, such as <{asked.token.strip('<>')}-1>.",
        )


def place_of_word(asked: Word) -> str:
    """Where in the config a word is asked for."""
    return "method" if isinstance(asked, TextualInversion) else "method.word"


def first_vectors(vocabulary: Vocabulary, asked: Word, name: str, seed: int) -> Tensor:
    """(N, D), float32: those of the initial text, spread over the vectors; without a text, drawn as the vocabulary's
    are distributed.

    More words than vectors are averaged in groups; of fewer, the first ones come again.

    Raises:
        ConfigError: the text has no words.
    """
    known_VD = vocabulary.vectors
    if asked.initial is None:
        drawn_ND = torch.randn(
            asked.vectors, known_VD.shape[1], generator=torch_generator(seed, "new word", name)
        )
        told = [torch.std_mean(some_V.float(), dim=0) for some_V in torch.split(known_VD, COLUMNS, dim=1)]
        spread_D, mean_D = (torch.cat(parts) for parts in zip(*told, strict=True))
        return drawn_ND.to(known_VD.device) * spread_D + mean_D
    numbers = vocabulary.numbers(asked.initial)
    if not numbers:
        raise ConfigError(
            f"{place_of_word(asked)}.initial: {asked.initial!r} has no words",
            remedy="Name what the pictures show, such as `cat`.",
        )
    start_MD = known_VD[torch.tensor(numbers, device=known_VD.device)].float()
    if len(numbers) <= asked.vectors:
        return torch.stack([start_MD[index % len(numbers)] for index in range(asked.vectors)])
    return torch.stack([group.mean(dim=0) for group in start_MD.tensor_split(asked.vectors)])


def teach(family: Family, asked: Word, seed: int) -> dict[str, NewWord]:
    """The word that is asked for in every vocabulary of a family, by the vocabulary's name.

    Raises:
        ConfigError: as `NewWord.teach`.
    """
    return {
        name: NewWord.teach(vocabulary, asked, name, seed) for name, vocabulary in family.vocabularies.items()
    }


def keeps_lengths(words: Mapping[str, NewWord]) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
    """A hook to be called after each step of an optimizer."""

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for word in words.values():
            word.keep_length()

    return after_step
