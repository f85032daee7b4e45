"""LoRA (arXiv 2106.09685): a frozen layer plus a trained product of two thin matrices, W + alpha/rank B A.

Shapes: A is (rank, in) for a linear layer and (rank, in, *kernel) for a convolution; B is (out, rank) or
(out, rank, 1, ...). A starts random and B at zero, so that an adapter changes nothing before its first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.errors import AdapterError
from burnish.randomness import torch_generator

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Adaptable = nn.Linear | Convolution


@dataclass(frozen=True, slots=True)
class ModuleChoice:
    """What one module gets; `learning_rate` None means the optimizer's own."""

    rank: int
    alpha: float
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The adapter of one module, apart from the model: `down` is A, `up` is B, on the CPU."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """What is added to the base weight: float32, in the shape of that weight."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.up.shape[0], *self.down.shape[1:])


class LoraLayer(nn.Module):
    """Stands in for a linear or convolution layer: its output plus the adapter's.

    The adapter's weights are float32 whatever the base is stored in. They are cast to the type of the input, once
    per call or together for all layers (`casting.cast_once`), so that gradients arrive in float32. `base` may be a
    LoraLayer itself: adapters stack.
    Dropout acts in training mode while gradients are recorded: never under `torch.no_grad()`, so that samples
    and held-out losses see the whole adapter although the frozen model stays in eval mode throughout.
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(down)
        self.lora_B = nn.Parameter(up)
        self.alpha = alpha
        self.dropout = dropout
        self.multiplier = 1.0
        self.active = True
        self.rank = down.shape[0]
        self.cast: tuple[Tensor, Tensor] | None = (
            None  # A and B in the type of the run, for forwards with gradients
        )
        self._down, self._up = _products(innermost(base))
        innermost(base).requires_grad_(False)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x)
        if not self.active:
            return output
        down, up = self._matrices(x.dtype)
        if self.dropout and self.training and torch.is_grad_enabled():
            x = F.dropout(x, self.dropout)
        middle, factor = self._down(x, down), self.scale * self.multiplier
        if factor != 1.0:
            # Scaling the thin middle touches `rank` numbers per token instead of the output's whole width.
            middle = middle * factor
        return output + self._up(middle, up)

    def _matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in the type of the input."""
        if self.cast is not None and self.cast[0].dtype == dtype and torch.is_grad_enabled():
            return self.cast
        return self.lora_A.to(dtype), self.lora_B.to(dtype)

    def weights(self) -> LoraWeights:
        """A float32 copy of the adapter on the CPU."""
        down, up = (tensor.detach().float().cpu().clone() for tensor in (self.lora_A, self.lora_B))
        return LoraWeights(down, up, self.alpha)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"

    # Below: what model code reads from a layer that it does not know to be wrapped.

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.base.out_features  # type: ignore[return-value]

    @property
    def in_channels(self) -> int:
        return self.base.in_channels  # type: ignore[return-value]

    @property
    def out_channels(self) -> int:
        return self.base.out_channels  # type: ignore[return-value]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.base.kernel_size  # type: ignore[return-value]

    @property
    def stride(self) -> tuple[int, ...]:
        return self.base.stride  # type: ignore[return-value]

    @property
    def padding(self) -> tuple[int, ...] | str:
        return self.base.padding  # type: ignore[return-value]


class AdapterSet:
    """The adapters of one denoiser, attached to it in place. Several sets can sit on the same modules.

    Attach after the denoiser has its final number type: `.to(dtype)` later would cast the adapters as well.
    """

    def __init__(
        self, denoiser: nn.Module, layers: Mapping[str, LoraLayer], rates: Mapping[str, float | None]
    ) -> None:
        self.layers = dict(layers)
        self.denoiser = denoiser
        self._rates = dict(rates)
        self._multiplier = 1.0

    @classmethod
    def attach(
        cls, denoiser: nn.Module, choices: Mapping[str, ModuleChoice], *, dropout: float, seed: int
    ) -> Self:
        """Wrap each chosen module with a fresh adapter and freeze the module.

        A is Kaiming-uniform as in the reference code of the paper, drawn on the CPU from (seed, module name):
        it depends neither on the other modules nor on the device (law L1).

        Raises:
            AdapterError: a name is not a linear or convolution layer of the denoiser.
        """
        weights = {
            name: _initial(base, choices[name], seed, name) for name, base in _find(denoiser, choices).items()
        }
        layers = _wrap(denoiser, weights, dropout)
        return cls(denoiser, layers, {name: choice.learning_rate for name, choice in choices.items()})

    @classmethod
    def from_weights(
        cls, denoiser: nn.Module, weights: Mapping[str, LoraWeights], *, trainable: bool = False
    ) -> Self:
        """Attach adapters that were read from a file; frozen unless `trainable`.

        Raises:
            AdapterError: a name is not a layer of the denoiser, or a shape does not fit it.
        """
        for name, base in _find(denoiser, weights).items():
            _check_fit(name, base, weights[name])
        layers = _wrap(denoiser, weights, dropout=0.0)
        adapter = cls(denoiser, layers, dict.fromkeys(weights))
        for parameter in adapter.named_parameters().values():
            parameter.requires_grad_(trainable)
        return adapter

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`<module>.lora_A` and `<module>.lora_B` of every module, in module order."""
        return {
            f"{name}.{matrix}": parameter
            for name, layer in self.layers.items()
            for matrix, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
        }

    def parameter_groups(self, default_lr: float) -> list[dict[str, Any]]:
        """Optimizer groups, one per learning rate: `params`, `lr` and the parameters' `names`."""
        groups: dict[float, dict[str, Any]] = {}
        for name, parameter in self.named_parameters().items():
            chosen = self._rates[name.rpartition(".")[0]]
            rate = default_lr if chosen is None else chosen
            group = groups.setdefault(rate, {"params": [], "lr": rate, "names": []})
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())

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

    def weights(self) -> dict[str, LoraWeights]:
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
            while isinstance(holder, LoraLayer) and holder.base is not layer:
                holder = holder.base
            if isinstance(holder, LoraLayer):
                holder.base = layer.base


def innermost(module: nn.Module) -> nn.Module:
    """The layer under any adapters."""
    while isinstance(module, LoraLayer):
        module = module.base
    return module


def adaptable_modules(denoiser: nn.Module) -> dict[str, Adaptable]:
    """Linear and ungrouped, zero-padded convolution layers by name, in module order.

    Names are those of the denoiser without adapters, also when some are attached.
    """
    found: dict[str, Adaptable] = {}
    _collect(denoiser, "", found)
    return found


def largest_rank(module: Adaptable) -> int:
    """More rank than this adds numbers but nothing that could be learned with them."""
    rows, *rest = weight_shape(module)
    return min(rows, math.prod(rest))


def weight_shape(module: Adaptable) -> tuple[int, ...]:
    """(out, in, *kernel), without asking for the weight: one that is kept in fewer bits would be widened."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def kernel_volume(module: Adaptable) -> int:
    """1 for a linear layer and a 1x1 convolution, 9 for 3x3."""
    return 1 if isinstance(module, nn.Linear) else math.prod(module.kernel_size)


def _collect(module: nn.Module, path: str, found: dict[str, Adaptable]) -> None:
    layer = innermost(module)
    if isinstance(layer, nn.Linear):
        found[path] = layer
    elif isinstance(layer, Convolution):
        if layer.groups == 1 and layer.padding_mode == "zeros":
            found[path] = layer
    else:
        for name, child in layer.named_children():
            _collect(child, f"{path}.{name}" if path else name, found)


def _find(denoiser: nn.Module, names: Mapping[str, Any]) -> dict[str, Adaptable]:
    modules = adaptable_modules(denoiser)
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise AdapterError(
            f"{len(unknown)} names are not linear or convolution layers of this model: {_some(unknown)}",
            remedy="Check that the adapter was made for this model.",
        )
    return {name: modules[name] for name in names}


def _wrap(denoiser: nn.Module, weights: Mapping[str, LoraWeights], dropout: float) -> dict[str, LoraLayer]:
    if not weights:
        raise AdapterError(
            "there is nothing to attach: no module was chosen", remedy="Check targets, include and exclude."
        )
    layers = {}
    for name, part in weights.items():
        parent, child = _place(denoiser, name)
        base = parent.get_submodule(child)
        device = next(chain(innermost(base).parameters(), innermost(base).buffers())).device
        down, up = (tensor.to(device, torch.float32, copy=True) for tensor in (part.down, part.up))
        layer = LoraLayer(base, down, up, part.alpha, dropout)
        parent.register_module(child, layer)
        layers[name] = layer
    return layers


def _place(denoiser: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return denoiser.get_submodule(parent), child


def _initial(base: Adaptable, choice: ModuleChoice, seed: int, name: str) -> LoraWeights:
    kernel = () if isinstance(base, nn.Linear) else base.kernel_size
    width_in = base.in_features if isinstance(base, nn.Linear) else base.in_channels
    down = torch.empty(choice.rank, width_in, *kernel)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=torch_generator(seed, "lora_A", name))
    up = torch.zeros(weight_shape(base)[0], choice.rank, *(1 for _ in kernel))
    return LoraWeights(down, up, choice.alpha)


def _check_fit(name: str, base: Adaptable, weights: LoraWeights) -> None:
    kernel = () if isinstance(base, nn.Linear) else base.kernel_size
    width_in = base.in_features if isinstance(base, nn.Linear) else base.in_channels
    width_out = base.out_features if isinstance(base, nn.Linear) else base.out_channels
    down = (weights.rank, width_in, *kernel)
    up = (width_out, weights.rank, *(1 for _ in kernel))
    if (tuple(weights.down.shape), tuple(weights.up.shape)) != (down, up):
        raise AdapterError(
            f"the adapter of {name} has shapes {tuple(weights.down.shape)} and {tuple(weights.up.shape)}; "
            f"this model needs {down} and {up}",
            remedy="The adapter was trained on a model of another size or family.",
        )


def _products(
    layer: nn.Module,
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """How an input meets A, and how what comes out meets B."""
    if isinstance(layer, nn.Linear):
        return F.linear, F.linear
    assert isinstance(layer, Convolution)
    convolve: Callable[..., Tensor]
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return partial(convolve, **geometry), convolve


def _some(names: Sequence[str], count: int = 5) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
