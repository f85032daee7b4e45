"""What a config's run computes, traced on tensors without data; what an earlier plan traced is read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from burnish.conditioning import Conditioning
from burnish.config.method import Full, TextualInversion, Vae, trains_text, word_of
from burnish.config.schema import RunConfig
from burnish.family import Family
from burnish.memory.activations import Mode, activation_modes, set_activations
from burnish.model import DTYPES, known_model
from burnish.objective import Denoising
from burnish.optim.build import build_optimizer
from burnish.placement import DENOISER, Part
from burnish.planner.lesson import PICTURES
from burnish.planner.measure import Measure
from burnish.planner.phases import VAE, Phase
from burnish.planner.profile import Profile
from burnish.planner.recipe import Recipe, Shape
from burnish.planner.references import shown
from burnish.planner.store import ProfileStore
from burnish.planner.vae_step import trace_vae_step
from burnish.reconstruction import Reconstruction, autoencoder_of
from burnish.refusals import refuse_unreadable
from burnish.run_plan import cache_of
from burnish.trained import chosen, chosen_of_vae, chosen_texts

WITH_TEXTS: frozenset[Part] = DENOISER | {"text_encoders"}


class RunTraces:
    """Args:
        cuda: the device is a GPU, whose kernels keep other tensors than those of a CPU.

    Raises:
        ModelError: no such weights, and the config names no family whose released sizes could stand in.
        AdapterError, UserError: the family cannot do what the method asks.
    """

    def __init__(self, config: RunConfig, *, cuda: bool) -> None:
        self.config, self.cuda = config, cuda
        # A VAE's weights are float32 whatever it computes in.
        self.dtype = torch.float32 if isinstance(config.method, Vae) else DTYPES[config.train.precision]
        self.kind, self.of, self.is_here = known_model(config.model, self.dtype)
        refuse_unreadable(config, self.of)
        self.in_step = trains_text(config.method)
        self.parts: frozenset[Part] = WITH_TEXTS if self.in_step else DENOISER  # that a step holds
        if isinstance(config.method, Vae):
            self.parts = VAE
        self.known = self.skeleton(parts=self.parts)
        self._measure = Measure(partial(self.skeleton, parts=self.parts), self._choose)
        self._store = ProfileStore(cache_of(config.memory))
        self._shown: dict[Shape, Conditioning] = {}

    def skeleton(self, depth: int | None = None, parts: frozenset[Part] = DENOISER) -> Family:
        return self.kind.skeleton(depth, of=self.of, dtype=self.dtype, parts=parts)

    def stands_in(self) -> list[str]:
        """Whose sizes are counted where the weights are not here, in words."""
        if self.is_here:
            return []
        parts = self.known.denoisers or self.known.loaded
        count = sum(one.numel() for part in parts.values() for one in part.parameters())
        size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.0f} million"
        released = f"those of a released {self.known.title} of {size} parameters"
        return [f"{self.config.model.path} is not here: sizes are {released}"]

    def told(self, shape: Shape) -> Conditioning:
        if shape not in self._shown:
            seeing = self.skeleton(parts=VAE) if shape.references else self.known
            self._shown[shape] = shown(seeing, shape, cuda=self.cuda)
        return self._shown[shape]

    def _choose(self, family: Family) -> Mapping[str, Mapping[str, Any]]:
        method = self.config.method
        assert not isinstance(method, Vae), "which has no denoiser"
        if isinstance(method, TextualInversion):
            return {}
        choices = {part: chosen(method, family, one) for part, one in family.denoisers.items()}
        return {**choices, **chosen_texts(method, family)}

    def profile(self, shape: Shape, kept_as: str, mode: str | float, texts: str = "native") -> Profile:
        """A step, with frozen layers in the format `kept_as`, those of text encoders that it holds in `texts`."""
        train, method, memory = self.config.train, self.config.method, self.config.memory

        def keep(family: Family) -> None:
            blocks = family.blocks()
            set_activations(blocks, activation_modes(mode, len(blocks)))  # type: ignore[arg-type]

        recipe = Recipe(
            choices={},
            objective=Denoising.of(train.objective, self.known),
            optimizer=partial(build_optimizer, train.optimizer, one_by_one=memory.steps_singly),
            kept_as=None if kept_as == "native" else kept_as,
            keep_activations=keep,
            accumulates=train.accumulate > 1 or shape.parts > 1,
            averages=train.ema is not None,
            dropout=0.0 if isinstance(method, Full | TextualInversion | Vae) else method.dropout,
            own_weights=isinstance(method, Full),
            word=word_of(method),
            caption=self._caption() if self.in_step else None,
            texts_kept_as=None if texts == "native" or not self.in_step else texts,
            releases=memory.gradient_release,
            offloads=memory.offload_optimizer,
            shown=self.told,
        )
        facts = {
            "family": self.kind.name,
            "configs": getattr(self.of, "configs", None),
            "identity": self.of.identity("denoiser")
            if self.is_here and not hasattr(self.of, "configs")
            else None,
            "method": method.model_dump(mode="json"),
            "optimizer": train.optimizer.model_dump(mode="json"),
            "objective": train.objective.model_dump(mode="json"),
            "recipe": [self.cuda, kept_as, mode, recipe.accumulates, recipe.averages, str(self.dtype)],
            "shape": [shape.height, shape.width, shape.frames, shape.batch],
        }
        if memory.steps_singly:
            facts["singly"] = [memory.gradient_release, memory.offload_optimizer]
        if shape.parts > 1:
            facts["parts"] = shape.parts
        if shape.references:
            facts["references"] = [shape.references, shape.masked]
        if shape.lesson != PICTURES:
            facts["lesson"] = asdict(shape.lesson)
        if self.of.audio is not None:
            facts["audio"] = True
        if self.config.model.denoisers:
            facts["denoisers"] = list(self.config.model.denoisers)
        if self.in_step:
            encoders = {
                name: one for name, one in self.known.loaded.items() if name not in self.known.denoisers
            }
            facts["texts"] = [texts, tensors_of(encoders)]
        return self._store.profile(facts, lambda: self._measure.profile(shape, recipe, cuda=self.cuda))

    def vae_profile(self, shape: Shape, mode: Mode) -> Profile:
        """A step that trains the VAE, of one block."""
        train, method = self.config.train, self.config.method
        assert isinstance(method, Vae)
        objective = Reconstruction.of(method, DTYPES[train.precision])
        accumulates = train.accumulate > 1 or shape.parts > 1
        facts = {
            "vae": tensors_of(self.known.loaded),
            "method": method.model_dump(mode="json"),
            "optimizer": train.optimizer.model_dump(mode="json"),
            "recipe": [self.cuda, mode, accumulates, train.ema is not None, train.precision],
            "shape": [shape.height, shape.width, shape.batch, shape.parts],
        }

        def trace() -> Profile:
            family = self.skeleton(parts=VAE)
            return trace_vae_step(
                family,
                shape,
                chosen_of_vae(method, autoencoder_of(family)),
                objective,
                partial(build_optimizer, train.optimizer),
                mode,
                accumulates=accumulates,
                averages=train.ema is not None,
                cuda=self.cuda,
            )

        return self._store.profile(facts, trace)

    def _caption(self) -> str:
        """As long as any that is read."""
        word = word_of(self.config.method)
        return " ".join(["word" if word is None else word.token] * self.known.prompt_limit)

    def phase(self, what: str, family: Family, shape: Shape, trace: Callable[[], Phase]) -> Phase:
        """What is kept of an earlier plan, of modules with the same tensors."""
        tensors = tensors_of(family.loaded)
        facts = {"phase": what, "family": self.kind.name, "tensors": tensors, "cuda": self.cuda}
        shape = replace(shape, lesson=PICTURES)
        return self._store.phase({**facts, "shape": asdict(shape), "audio": family.audio is not None}, trace)


def tensors_of(modules: Mapping[str, nn.Module]) -> list[tuple[str, str, str]]:
    return [
        (name, str(tuple(one.shape)), str(one.dtype))
        for module in modules.values()
        for name, one in module.named_parameters()
    ]
