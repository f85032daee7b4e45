"""The adapters of one denoiser: attached to it, trained or frozen, switched off, taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from burnish.adapters.kinds import layer_for, layer_of
from burnish.adapters.layer import (
    Adaptable,
    AdapterLayer,
    AdapterWeights,
    Dropout,
    ModuleChoice,
    adaptable_modules,
)
from burnish.config.method import Lora
from burnish.errors import AdapterError


class AdapterSet:
    """The adapters of one denoiser, attached to it in place. Several sets can sit on the same modules.

    Attach after the denoiser has its final number type: `.to(dtype)` later would cast the adapters as well.
    """

    def __init__(
        self, denoiser: nn.Module, layers: Mapping[str, AdapterLayer], choices: Mapping[str, ModuleChoice]
    ) -> None:
        self.layers = dict(layers)
        self.denoiser = denoiser
        self._choices = dict(choices)  # of those that train
        self._multiplier = 1.0

    @classmethod
    def attach(
        cls,
        denoiser: nn.Module,
        choices: Mapping[str, ModuleChoice],
        *,
        seed: int,
        dropout: float | None = None,
    ) -> Self:
        """Wrap each chosen module with a fresh adapter and freeze the module; `dropout` of inputs if not the method's.

        Raises:
            AdapterError: a name is not a linear or convolution layer of the denoiser.
        """
        weights, dropouts = {}, {}
        for name, base in _find(denoiser, choices).items():
            choice = choices[name]
            weights[name] = layer_of(choice.method).fresh(base, choice, seed, name)
            dropouts[name] = _dropout(choice, dropout)
        return cls(denoiser, _wrap(denoiser, weights, dropouts), choices)

    @classmethod
    def from_weights(
        cls, denoiser: nn.Module, weights: Mapping[str, AdapterWeights], *, trainable: bool = False
    ) -> Self:
        """Attach adapters that were read from a file; frozen unless `trainable`.

        Raises:
            AdapterError: a name is not a layer of the denoiser, or a shape does not fit it.
        """
        for name, base in _find(denoiser, weights).items():
            problem = weights[name].check(base)
            if problem is not None:
                raise AdapterError(
                    f"the adapter of {name} {problem}",
                    remedy="The adapter was trained on a model of another size or family.",
                )
        adapter = cls(denoiser, _wrap(denoiser, weights, dict.fromkeys(weights, Dropout())), {})
        for parameter in adapter.named_parameters().values():
            parameter.requires_grad_(trainable)
        return adapter

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`<module>.lora_A` and so on of every module, in module order."""
        return {
            f"{name}.{own}": parameter
            for name, layer in self.layers.items()
            for own, parameter in layer.named_parameters(recurse=False)
        }

    def constants(self) -> dict[str, Tensor]:
        """What never changes but belongs to a checkpoint, as it depends on what the adapters began with; by name."""
        return {
            f"{name}.{own}": tensor
            for name, layer in self.layers.items()
            for own, tensor in layer.constants().items()
        }

    def parameter_groups(self, default_lr: float) -> list[dict[str, Any]]:
        """Optimizer groups, one per learning rate: `params`, `lr` and the parameters' `names`."""
        groups: dict[float, dict[str, Any]] = {}
        for name, parameter in self.named_parameters().items():
            rate = self._rate(*name.rpartition(".")[::2], default_lr)
            group = groups.setdefault(rate, {"params": [], "lr": rate, "names": []})
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())

    def _rate(self, module: str, parameter: str, default_lr: float) -> float:
        choice = self._choices.get(module)
        if choice is None:
            return default_lr
        rate = default_lr if choice.learning_rate is None else choice.learning_rate
        if isinstance(choice.method, Lora) and parameter in self.layers[module].faster:
            rate *= choice.method.b_learning_rate_ratio
        return rate

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters by name, detached but not copied."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the adapters, which keep their alpha and learning rates.

        Raises:
            AdapterError: names or shapes differ; nothing was changed.
        """
        parameters = self.named_parameters()
        problems = [f"missing {name}" for name in parameters if name not in state]
        problems += [f"unknown {name}" for name in state if name not in parameters]
        problems += [
            f"{name} is {tuple(state[name].shape)}, not {tuple(parameter.shape)}"
            for name, parameter in parameters.items()
            if name in state and state[name].shape != parameter.shape
        ]
        if problems:
            raise AdapterError(
                f"the saved adapter differs from this run's in {len(problems)} places: {_some(problems)}",
                remedy="Keep rank, targets and groups as they were, or start a run of another name.",
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])

    def weights(self) -> dict[str, AdapterWeights]:
        """A copy of every adapter on the CPU, by module name."""
        return {name: layer.weights() for name, layer in self.layers.items()}

    @property
    def multiplier(self) -> float:
        """Strength of the whole set: 1 as trained, 0 without effect."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._multiplier = value
        for layer in self.layers.values():
            layer.multiplier = value

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Within it the whole set is of this strength, at 0 as if it were not attached."""
        if strength == 0:
            with self.disabled():
                yield
            return
        before = self.multiplier
        try:
            self.multiplier = strength
            yield
        finally:
            self.multiplier = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the denoiser computes as if this set were not attached; other sets stay on."""
        before = [(layer, layer.active) for layer in self.layers.values()]
        try:
            for layer, _ in before:
                layer.active = False
            yield
        finally:
            for layer, active in before:
                layer.active = active

    def detach(self) -> None:
        """Take this set off again; the base modules are in their places as before, other sets stay."""
        for name, layer in self.layers.items():
            parent, child = _place(self.denoiser, name)
            holder = parent.get_submodule(child)
            if holder is layer:
                parent.register_module(child, layer.base)
                continue
            while isinstance(holder, AdapterLayer) and holder.base is not layer:
                holder = holder.base
            if isinstance(holder, AdapterLayer):
                holder.base = layer.base


def all_disabled(adapters: Sequence[AdapterSet]) -> AbstractContextManager[None]:
    return all_at(adapters, 0.0)


@contextmanager
def all_at(adapters: Sequence[AdapterSet], strength: float) -> Iterator[None]:
    """Within it each set is of this strength, at 0 without effect."""
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(adapter.at(strength))
        yield


def _find(denoiser: nn.Module, names: Mapping[str, Any]) -> dict[str, Adaptable]:
    modules = adaptable_modules(denoiser)
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise AdapterError(
            f"{len(unknown)} names are not linear or convolution layers of this model: {_some(unknown)}",
            remedy="Check that the adapter was made for this model.",
        )
    return {name: modules[name] for name in names}


def _wrap(
    denoiser: nn.Module, weights: Mapping[str, AdapterWeights], dropouts: Mapping[str, Dropout]
) -> dict[str, AdapterLayer]:
    if not weights:
        raise AdapterError(
            "there is nothing to attach: no module was chosen", remedy="Check targets, include and exclude."
        )
    layers = {}
    for name, part in weights.items():
        parent, child = _place(denoiser, name)
        layer = layer_for(part).of(parent.get_submodule(child), part, dropouts[name])
        parent.register_module(child, layer)
        layers[name] = layer
    return layers


def _dropout(choice: ModuleChoice, inputs: float | None) -> Dropout:
    method = choice.method
    return Dropout(
        method.dropout if inputs is None else inputs,
        method.rank_dropout,
        method.module_dropout,
    )


def _place(denoiser: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return denoiser.get_submodule(parent), child


def _some(names: Sequence[str], count: int = 5) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
