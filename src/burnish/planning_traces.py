"""What a config's run computes, traced on tensors without data; what an earlier plan traced is read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from burnish.conditioning import Conditioning
from burnish.config.method import Full, TextualInversion, Vae
from burnish.config.schema import RunConfig
from burnish.family import Family, Part
from burnish.memory.activations import activation_modes, set_activations
from burnish.model import DTYPES, known_model
from burnish.objective import Denoising
from burnish.optim.build import build_optimizer
from burnish.planner.measure import Measure
from burnish.planner.phases import VAE, Phase
from burnish.planner.profile import Profile
from burnish.planner.references import shown
from burnish.planner.store import ProfileStore
from burnish.planner.trace import Recipe, Shape
from burnish.run_plan import cache_of
from burnish.trained import chosen


class RunTraces:
    """Args:
        cuda: the device is a GPU, whose kernels keep other tensors than those of a CPU.

    Raises:
        ModelError: no such weights, and the config names no family whose released sizes could stand in.
    """

    def __init__(self, config: RunConfig, *, cuda: bool) -> None:
        self.config, self.cuda = config, cuda
        self.dtype = DTYPES[config.train.precision]
        self.kind, self.of, self.is_here = known_model(config.model, self.dtype)
        self.known = self.skeleton()
        self._measure = Measure(self.skeleton, self._choose)
        self._store = ProfileStore(cache_of(config.memory))
        self._shown: dict[Shape, Conditioning] = {}

    def skeleton(self, depth: int | None = None, parts: frozenset[Part] | None = None) -> Family:
        told = {} if parts is None else {"parts": parts}
        return self.kind.skeleton(depth, of=self.of, dtype=self.dtype, **told)

    def told(self, shape: Shape) -> Conditioning:
        if shape not in self._shown:
            seeing = self.skeleton(parts=VAE) if shape.references else self.known
            self._shown[shape] = shown(seeing, shape, cuda=self.cuda)
        return self._shown[shape]

    def _choose(self, family: Family) -> Mapping[str, Mapping[str, Any]]:
        assert not isinstance(self.config.method, TextualInversion | Vae), "what is not planned"
        return {part: chosen(self.config.method, family, one) for part, one in family.denoisers.items()}

    def profile(self, shape: Shape, kept_as: str, mode: str | float) -> Profile:
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
            accumulates=train.accumulate > 1,
            averages=train.ema is not None,
            dropout=0.0 if isinstance(method, Full | TextualInversion | Vae) else method.dropout,
            own_weights=isinstance(method, Full),
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
        if shape.references:
            facts["references"] = [shape.references, shape.masked]
        if self.of.audio is not None:
            facts["audio"] = True
        if self.config.model.denoisers:
            facts["denoisers"] = list(self.config.model.denoisers)
        return self._store.profile(facts, lambda: self._measure.profile(shape, recipe, cuda=self.cuda))

    def phase(self, what: str, family: Family, shape: Shape, trace: Callable[[], Phase]) -> Phase:
        """What is kept of an earlier plan, of modules with the same tensors."""
        tensors = [
            (name, str(tuple(one.shape)), str(one.dtype))
            for module in family.loaded.values()
            for name, one in module.named_parameters()
        ]
        facts = {"phase": what, "family": self.kind.name, "tensors": tensors, "cuda": self.cuda}
        return self._store.phase({**facts, "shape": asdict(shape), "audio": family.audio is not None}, trace)
