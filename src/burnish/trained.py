"""What a run trains, as its method says, and what it leaves: adapters, or the denoisers' own weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.casting import cast_once
from burnish.adapters.layer import adaptable_modules
from burnish.adapters.own_weights import OwnWeights, Rates, choose_weights
from burnish.adapters.targeting import choose_modules
from burnish.adapters.words import NewWord, teach
from burnish.config.method import (
    AdapterMethod,
    AnyMethod,
    Full,
    TextualInversion,
    Vae,
    WholeTextEncoders,
    word_of,
)
from burnish.config.schema import RunConfig
from burnish.errors import ConfigError
from burnish.export.formats import refuse_unstackable, resolve_format
from burnish.export.metadata import (
    AVERAGE,
    Provenance,
    adapter_metadata,
    model_metadata,
    vae_metadata,
    word_metadata,
)
from burnish.export.text_encoders import TARGETS
from burnish.families.autoencoder import shapes_tell
from burnish.family import Family, TargetSet
from burnish.generate import part_labels
from burnish.loop import Training
from burnish.memory.quantized import choose_products
from burnish.preparation import Prepared
from burnish.reconstruction import autoencoder_of
from burnish.results import (
    AdapterResult,
    DenoiserFile,
    DenoiserFolder,
    Result,
    TextEncoderFolder,
    VaeFile,
    VaeFolder,
    WordResult,
)
from burnish.run_folder import RunFolder

EXPORT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Trained = AdapterSet | OwnWeights | NewWord


def trained_parts(
    config: RunConfig, family: Family, device: torch.device, dtype: torch.dtype
) -> dict[str, Trained]:
    """What trains of each loaded denoiser, or of each text encoder, made ready to.

    Raises:
        AdapterError: targets that match nothing, or that the export format cannot hold.
        ConfigError: patterns that match no weight, or a format of whole models that the family has not.
    """
    for denoiser in family.denoisers.values():
        choose_products(denoiser, device)
    if isinstance(config.method, TextualInversion):
        return {**teach(family, config.method, config.seed)}
    if isinstance(config.method, Vae):
        vae = autoencoder_of(family)
        if config.save.format == "comfy" and not shapes_tell(vae.config):
            raise ConfigError(
                "save.format: comfy, and no single file can tell this VAE's groups of channels, which are not 32",
                remedy="Set save.format: auto or diffusers.",
            )
        return {"vae": OwnWeights.unfreeze(vae, chosen_of_vae(config.method, vae))}
    if isinstance(config.method, Full):
        if config.save.format == "comfy" and family.export.tensors is None:
            raise ConfigError(
                f"save.format: comfy, and the release's names of {family.title} are not known for a single file",
                remedy="Set save.format: auto or diffusers.",
            )
        return {
            part: OwnWeights.unfreeze(denoiser, chosen(config.method, family, denoiser))
            for part, denoiser in family.denoisers.items()
        } | whole_text_encoders(config.method, family)
    adapters: dict[str, Trained] = {}
    for part, denoiser in family.denoisers.items():
        choices = chosen(config.method, family, denoiser)
        format = resolve_format(config.save.format, family.export, choices)  # now, and not at the first save
        adapter = AdapterSet.attach(denoiser, choices, seed=config.seed)
        refuse_unstackable(adapter.weights(), format, family.export, adaptable_modules(denoiser))
        cast_once(denoiser, list(adapter.layers.values()), dtype)
        adapters[part] = adapter
    adapters |= text_adapters(config.method, family, device, dtype, config.seed)
    return (
        adapters if config.method.word is None else adapters | teach(family, config.method.word, config.seed)
    )


def whole_text_encoders(method: Full, family: Family) -> dict[str, Trained]:
    """The text encoders whose own weights train, by part."""
    return {
        part: OwnWeights.unfreeze(family.loaded[part], rates)
        for part, rates in chosen_texts(method, family).items()
    }


def text_adapters(
    method: AdapterMethod, family: Family, device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, Trained]:
    """Those of text encoders, attached, by part.

    Raises:
        AdapterError: the rank is larger than a module can use.
    """
    adapters: dict[str, Trained] = {}
    for part, choices in chosen_texts(method, family).items():
        encoder = family.loaded[part]
        choose_products(encoder, device)
        adapters[part] = adapter = AdapterSet.attach(encoder, choices, seed=seed)
        cast_once(encoder, list(adapter.layers.values()), dtype)
    return adapters


def chosen_texts(method: AdapterMethod | Full, family: Family) -> dict[str, Mapping[str, Any]]:
    """What trains of text encoders, by part, as `chosen` says it of a denoiser: adapters of the method's kind and rank,
    or every weight. The method's patterns are for the denoiser."""
    section = method.text_encoders
    if section is None:
        return {}
    parts = [
        part
        for part, name in family.export.text_encoders.items()
        if not section.which or name in section.which
    ]
    if isinstance(section, WholeTextEncoders):
        names = {part: [name for name, _ in family.loaded[part].named_parameters()] for part in parts}
        return {part: dict.fromkeys(names[part], section.learning_rate) for part in parts}
    assert not isinstance(method, Full), "which trains text encoders as a whole"
    plain: dict[str, Any] = {"include": [], "exclude": [], "groups": [], "targets": section.targets}
    told = method.model_copy(update=plain)
    return {
        part: {
            name: replace(one, learning_rate=section.learning_rate)
            for name, one in choose_modules(family.loaded[part], TARGETS, section.targets, told).items()
        }
        for part in parts
    }


def chosen_of_vae(method: Vae, vae: nn.Module) -> Rates:
    sides = ("",) if method.encoder else ("decoder.", "post_quant_conv.")
    return dict.fromkeys(name for name, _ in vae.named_parameters() if name.startswith(sides))


def chosen(method: AdapterMethod | Full, family: Family, denoiser: nn.Module) -> Mapping[str, Any]:
    """What trains of a denoiser: by module what its adapter is, or by weight its learning rate.

    Raises:
        AdapterError, ConfigError: patterns that match nothing.
    """
    targets = targets_of(family)
    if isinstance(method, Full):
        return choose_weights(denoiser, targets, method)
    return choose_modules(denoiser, targets, family.default_targets, method)


def own_weights(method: AnyMethod, family: Family) -> int:
    """How many numbers of the denoisers, and of text encoders, train themselves."""
    if not isinstance(method, Full):
        return 0
    rates = {part: chosen(method, family, one) for part, one in family.denoisers.items()}
    rates |= chosen_texts(method, family)
    return sum(
        one.numel()
        for part, own in rates.items()
        for one in OwnWeights(family.loaded[part], own).named_parameters().values()
    )


def targets_of(family: Family) -> Mapping[str, TargetSet]:
    """The named sets, with those of sound where it is trained."""
    if family.audio is None:
        return family.targets
    return {name: target.with_audio() for name, target in family.targets.items()}


@dataclass(frozen=True, slots=True)
class Told:
    """What the files of a run say about themselves."""

    config: RunConfig
    resolved: str  # the config as YAML text
    prepared: Prepared
    trained: Mapping[str, Trained]

    def metadata(self, run: Training, part: str) -> dict[str, str]:
        one = self.trained[part]
        about = self._provenance(run, part)
        if isinstance(one, NewWord):
            asked = word_of(self.config.method)
            assert asked is not None
            return word_metadata(run.family.export, about, asked.token)
        if isinstance(self.config.method, Vae):
            return {**vae_metadata(run.family.export, about), **average_metadata(run)}
        if isinstance(one, OwnWeights):
            return {**model_metadata(run.family.export, about), **average_metadata(run)}
        return {**adapter_metadata(run.family.export, one.weights(), about), **average_metadata(run)}

    def _provenance(self, run: Training, part: str) -> Provenance:
        config = self.config
        side = max(side for source in config.data for side in source.resolutions)
        return Provenance(
            name=config.name,
            base_model=config.model.path,
            resolution=(side, side),
            step=run.step,
            epoch=run.position // run.batches_per_epoch,
            seed=config.seed,
            config=self.resolved,
            part=part,
            tag_frequency=self.prepared.tag_frequency,
            trigger=config.trigger,
        )


def average_metadata(run: Training) -> dict[str, str]:
    """Which average a save is, where others can be made of several (`burnish adapter average --width`)."""
    if run.ema is None or run.ema.width is None:
        return {}
    told = {"width": run.ema.width, "updates": run.ema.updates, "step": run.step}
    return {AVERAGE: json.dumps(told)}


def results_of(told: Told, family: Family, folder: RunFolder) -> Sequence[Result]:
    """The files of every save."""
    return list(_results(told, family, folder))


def _results(told: Told, family: Family, folder: RunFolder) -> Iterator[Result]:
    config = told.config
    dtype, format = EXPORT_DTYPES[config.save.dtype], config.save.format
    labels = part_labels(family)
    words = {part: one for part, one in told.trained.items() if isinstance(one, NewWord)}
    if words:
        alone = len(words) == len(told.trained)
        yield WordResult(
            words, folder.adapters, config.name if alone else f"{config.name}-word", dtype, told.metadata
        )
    texts = {
        part: one
        for part, one in told.trained.items()
        if part in family.export.text_encoders and isinstance(one, AdapterSet)
    }
    for part, one in told.trained.items():
        if isinstance(one, NewWord) or part in texts:
            continue
        if isinstance(config.method, Vae):
            assert isinstance(one, OwnWeights)
            if format in ("auto", "diffusers"):
                yield VaeFolder(one, folder.models, config.name, dtype)
            if format in ("auto", "comfy") and shapes_tell(autoencoder_of(family).config):
                yield VaeFile(one, folder.models, f"{config.name}-vae", dtype, told.metadata)
            continue
        if isinstance(one, OwnWeights) and part in family.export.text_encoders:
            yield TextEncoderFolder(part, one, folder.models, config.name, dtype)
            continue
        stem = f"{config.name}-{labels[part]}" if part in labels else config.name
        if isinstance(one, AdapterSet):
            yield AdapterResult(part, one, folder.adapters, stem, format, dtype, told.metadata, texts)
            continue
        if format in ("auto", "diffusers"):
            yield DenoiserFolder(part, one, folder.models, config.name, dtype)
        if format == "comfy" or (format == "auto" and family.export.tensors is not None):
            yield DenoiserFile(part, one, folder.models, stem, dtype, told.metadata)


def keeps_all(config: RunConfig) -> bool:
    """Whether the results of every save are kept."""
    if config.save.adapters == "auto":
        return not isinstance(config.method, Full | Vae)
    return config.save.adapters == "all"
