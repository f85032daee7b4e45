"""What happens to a caption when its picture is drawn: pure functions of seed, sample and epoch (law L1)."""

from __future__ import annotations

from dataclasses import dataclass

from burnish.config.data import Captions
from burnish.randomness import python_random

TRIGGER = "[trigger]"


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """The rules of one source, the trigger word already in place."""

    prefix: str = ""
    dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0
    separator: str = ","
    variants: int = 1

    @classmethod
    def of(cls, captions: Captions, *, trigger: str | None, regularization: bool) -> CaptionRules:
        """A regularization source never says the trigger word: a prefix that holds it is left out."""
        prefix = captions.prefix
        says_trigger = TRIGGER in prefix or (trigger is not None and trigger in prefix)
        if regularization and says_trigger:
            prefix = ""
        return cls(
            prefix=prefix.replace(TRIGGER, trigger or "").strip(),
            dropout=captions.dropout,
            shuffle_tags=captions.shuffle_tags,
            keep_tags=captions.keep_tags,
            separator=captions.separator,
            variants=captions.variants if captions.shuffle_tags else 1,
        )

    def draw(self, text: str, *, picture_id: str, draw_id: str, epoch: int, seed: int) -> str:
        """The caption of one draw; always one of `possible(text, picture_id, seed)`."""
        if self.dropout and python_random(seed, "caption dropout", draw_id, epoch).random() < self.dropout:
            return ""
        variant = 0
        if self.variants > 1:
            variant = python_random(seed, "caption variant", draw_id, epoch).randrange(self.variants)
        return self._variant(text, picture_id, variant, seed)

    def possible(self, text: str, *, picture_id: str, seed: int) -> tuple[str, ...]:
        """Every caption that can ever be drawn, each once, so that all can be encoded beforehand."""
        found = {self._variant(text, picture_id, variant, seed): None for variant in range(self.variants)}
        if self.dropout:
            found[""] = None
        return tuple(found)

    def _variant(self, text: str, picture_id: str, variant: int, seed: int) -> str:
        if self.shuffle_tags:
            tags = [tag for tag in (part.strip() for part in text.split(self.separator)) if tag]
            kept, moved = tags[: self.keep_tags], tags[self.keep_tags :]
            python_random(seed, "tag order", picture_id, variant).shuffle(moved)
            text = f"{self.separator.rstrip()} ".join(kept + moved)
        return " ".join(part for part in (self.prefix, text) if part)
