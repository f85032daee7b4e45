"""What a save leaves for use elsewhere, read back and verified: an adapter per denoiser, or whole denoisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules
from burnish.adapters.own_weights import OwnWeights
from burnish.adapters.words import NewWord
from burnish.export.adapter_file import write_adapter
from burnish.export.denoiser_file import write_folder, write_single_file
from burnish.export.text_encoders import config_of, text_adapter, whole_name
from burnish.export.vae_file import write_vae_file
from burnish.export.verify import verify_adapter
from burnish.export.word_file import write_word
from burnish.loop import Training
from burnish.optim.schedule_free import averaged_point, is_schedule_free
from burnish.reconstruction import autoencoder_of

Facts = Mapping[str, object]
Metadata = Callable[[Training, str], Mapping[str, str]]
"""Of the file of one denoiser."""


class Result(Protocol):
    """One file or folder of every save."""

    def path(self, label: str) -> Path:
        """Where it goes; `label` tells the saves of a run apart."""
        ...

    def write(self, run: Training, path: Path) -> Facts:
        """Write and verify it; what is told of it.

        Raises:
            ExportError: it does not read back as trained.
            NonFiniteLoss: what was trained is not finite.
            DiskFull: it does not fit; what was there before is as it was.
        """
        ...


def averaged(run: Training) -> AbstractContextManager[None]:
    """The average in place of the live weights, where there is one: the moving one, or a schedule-free optimizer's."""
    if run.ema is not None:
        return run.ema.swapped()
    return averaged_point(run.optimizer) if is_schedule_free(run.optimizer) else nullcontext()


@dataclass(frozen=True, slots=True)
class AdapterResult:
    """The adapter of one denoiser, and of the text encoders that train with it: `<stem><label>.safetensors`."""

    part: str
    adapter: AdapterSet
    folder: Path
    stem: str
    format: str
    dtype: torch.dtype
    metadata: Metadata
    texts: Mapping[str, AdapterSet] = field(default_factory=dict)  # by part

    def path(self, label: str) -> Path:
        return self.folder / f"{self.stem}{label}.safetensors"

    def write(self, run: Training, path: Path) -> Facts:
        keys = run.family.export
        with averaged(run):
            weights = self.adapter.weights()
            texts = {part: (one.weights(), one.denoiser) for part, one in self.texts.items()}
            write_adapter(
                path,
                weights,
                part=self.part,
                keys=keys,
                modules=adaptable_modules(self.adapter.denoiser),
                format=self.format,
                dtype=self.dtype,
                metadata=self.metadata(run, self.part),
                texts={part: text_adapter(own, encoder) for part, (own, encoder) in texts.items()},
            )
        return verify_adapter(
            path, weights, run.family.denoisers[self.part], part=self.part, keys=keys, texts=texts
        ).facts()


@dataclass(frozen=True, slots=True)
class DenoiserFolder:
    """A denoiser as the part of a diffusers model: `<name><label>/<part>`."""

    part: str
    weights: OwnWeights
    folder: Path
    name: str
    dtype: torch.dtype

    def path(self, label: str) -> Path:
        return self.folder / f"{self.name}{label}" / self.part

    def write(self, run: Training, path: Path) -> Facts:
        with _own_average(run):
            values = _state(run, self.part, self.weights)
            return write_folder(path, run.family.config(self.part), values, self.dtype).facts()


@dataclass(frozen=True, slots=True)
class DenoiserFile:
    """A denoiser as a single file in the names of the original release: `<stem><label>.safetensors`."""

    part: str
    weights: OwnWeights
    folder: Path
    stem: str
    dtype: torch.dtype
    metadata: Metadata

    def path(self, label: str) -> Path:
        return self.folder / f"{self.stem}{label}.safetensors"

    def write(self, run: Training, path: Path) -> Facts:
        with _own_average(run):
            values = _state(run, self.part, self.weights)
            told = self.metadata(run, self.part)
            return write_single_file(path, run.family, self.part, values, self.dtype, told).facts()


@dataclass(frozen=True, slots=True)
class TextEncoderFolder:
    """A text encoder as the part of a diffusers model, as transformers reads it: `<name><label>/<part>`."""

    part: str
    weights: OwnWeights
    folder: Path
    name: str
    dtype: torch.dtype

    def path(self, label: str) -> Path:
        return self.folder / f"{self.name}{label}" / self.part

    def write(self, run: Training, path: Path) -> Facts:
        encoder = run.family.loaded[self.part]
        config = {**config_of(encoder), "architectures": [type(encoder).__name__]}
        with _own_average(run):
            state = _state(run, self.part, self.weights)
            named = {whole_name(name): tensor for name, tensor in state.items()}
            return write_folder(path, config, named, self.dtype, weights="model").facts()


@dataclass(frozen=True, slots=True)
class VaeFolder:
    """The VAE as the part of a diffusers model: `<name><label>/vae`."""

    weights: OwnWeights
    folder: Path
    name: str
    dtype: torch.dtype

    def path(self, label: str) -> Path:
        return self.folder / f"{self.name}{label}" / "vae"

    def write(self, run: Training, path: Path) -> Facts:
        vae = autoencoder_of(run.family)
        config = {**vae.config, "_class_name": type(vae).__name__}
        with _own_average(run):
            return write_folder(path, config, _state(run, "vae", self.weights), self.dtype).facts()


@dataclass(frozen=True, slots=True)
class VaeFile:
    """The VAE as a single file in the names of latent diffusion: `<stem><label>.safetensors`."""

    weights: OwnWeights
    folder: Path
    stem: str
    dtype: torch.dtype
    metadata: Metadata

    def path(self, label: str) -> Path:
        return self.folder / f"{self.stem}{label}.safetensors"

    def write(self, run: Training, path: Path) -> Facts:
        with _own_average(run):
            values = _state(run, "vae", self.weights)
            return write_vae_file(path, values, self.dtype, self.metadata(run, "vae")).facts()


@dataclass(frozen=True, slots=True)
class WordResult:
    """A new word in all text encoders: `<stem><label>.safetensors`."""

    words: Mapping[str, NewWord]
    folder: Path
    stem: str
    dtype: torch.dtype
    metadata: Metadata

    def path(self, label: str) -> Path:
        return self.folder / f"{self.stem}{label}.safetensors"

    def write(self, run: Training, path: Path) -> Facts:
        first = next(iter(self.words))
        with averaged(run):
            vectors = {name: one.vectors_ND for name, one in self.words.items()}
            return write_word(path, vectors, self.dtype, self.metadata(run, first)).facts()


def _own_average(run: Training) -> AbstractContextManager[None]:
    """As `averaged`, but a moving average is read where it is: a model need not be in memory once more for it."""
    return nullcontext() if run.ema is not None else averaged(run)


def _state(run: Training, part: str, weights: OwnWeights) -> dict[str, Tensor]:
    """The denoiser's state, its trained weights as their moving average where there is one."""
    state: dict[str, Tensor] = weights.denoiser.state_dict()
    if run.ema is None:
        return state
    averages, _ = run.ema.state_dict()
    return {name: averages.get(f"{part}.{name}", tensor) for name, tensor in state.items()}
