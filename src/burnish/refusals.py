"""What a run cannot do with a family or its captions, said before hours of work."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.adapters.words import place_of_word
from burnish.config.method import (
    Full,
    TextEncoders,
    TextualInversion,
    Vae,
    WholeTextEncoders,
    trains_text,
    word_of,
)
from burnish.config.schema import RunConfig
from burnish.data.samples import Sample
from burnish.errors import DataError, UserError
from burnish.export.formats import format_of_kind
from burnish.export.kinds import kind_of_method
from burnish.family import Family
from burnish.reconstruction import autoencoder_of


def refuse_unreadable(config: RunConfig, family: Family) -> None:
    """What no program would load is known from the config alone, before hours of work on data.

    Raises:
        AdapterError: no program reads this kind of adapter of this family in `save.format`.
        UserError: the family cannot be taught words, has no text encoder that adapters go on, or a VAE of a kind that
            is not trained.
    """
    if word_of(config.method) is not None and not family.export.vocabularies:
        raise UserError(
            f"a new word (`method`): {family.title} cannot be taught words: its family names no text encoder for them",
            remedy="Train an adapter alone (method.kind: lora); every family that comes with Burnish can.",
        )
    if isinstance(config.method, Vae):
        autoencoder_of(type(family).skeleton(parts=frozenset({"vae"}), of=family))
        return
    if isinstance(config.method, TextualInversion):
        return
    if not isinstance(config.method, Full):
        format_of_kind(config.save.format, family.export, kind_of_method(config.method))
    if config.method.text_encoders is not None:
        _refuse_text_encoders(config.method.text_encoders, family)


def _refuse_text_encoders(section: TextEncoders | WholeTextEncoders, family: Family) -> None:
    has = list(family.export.text_encoders.values())
    if not has:
        raise UserError(
            f"method.text_encoders: {family.title} has no CLIP, and only CLIPs are trained here",
            remedy="Leave method.text_encoders out; sd15, sd2, sdxl, sd3 and flux have CLIPs.",
        )
    unknown = [name for name in section.which if name not in has]
    if unknown:
        raise UserError(
            f"method.text_encoders.which: {family.title} has no {unknown[0]}",
            remedy=f"Name some of {', '.join(has)}, or leave it out for all.",
        )


def refuse_unseen_references(config: RunConfig, family: Family, samples: Sequence[Sample]) -> None:
    """Raises:
    DataError: prompts that are encoded in each step would have to be read beside pictures, of which latents are kept.
    """
    if not (trains_text(config.method) and family.capabilities.prompts_see_references):
        return
    if any(sample.has_references for sample in samples):
        raise DataError(
            f"a new word (`method`): the text encoder of {family.title} sees references beside a prompt, and a word "
            "is trained on prompts alone",
            remedy="Train it on pictures without references, and say it beside references when you draw; "
            "or train an adapter without it.",
        )


def refuse_unsaid_word(config: RunConfig, samples: Sequence[Sample]) -> None:
    """Raises:
    DataError: the word to be learned stands in no caption.
    """
    asked = word_of(config.method)
    if asked is None:
        return
    word = asked.token
    if any(word in text.lower() for sample in samples for text in sample.captions(config.seed)):
        return
    raise DataError(
        f"{place_of_word(asked)}.token: no caption says {word!r}, so nothing would be learned",
        remedy=f'Set data: captions: prefix: "a photo of {word}, ", or write the word into the caption files.',
    )
