"""What every kind of adapter shares: a layer that stands in for another, and what can be adapted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.config.method import AdapterMethod, Lora

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Adaptable = nn.Linear | Convolution


@dataclass(frozen=True, slots=True)
class ModuleChoice:
    """What one module gets; `learning_rate` None means the optimizer's own.

    `rank` is a block's size where the kind has blocks. A scale is `alpha / rank`, whatever the method's rule for it.
    """

    rank: int
    alpha: float
    learning_rate: float | None = None
    method: AdapterMethod = field(default=Lora(), hash=False)


@dataclass(frozen=True, slots=True)
class Dropout:
    """Shares that are dropped while training: of the inputs, of the ranks (outputs or blocks of kinds that have no sum
    over ranks, as in LyCORIS), of the adapters as a whole."""

    inputs: float = 0.0
    ranks: float = 0.0
    modules: float = 0.0


class AdapterWeights(Protocol):
    """The adapter of one module, apart from the model: float32, on the CPU."""

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the base weight, in its shape; `weight` is that weight, for kinds that depend on it."""
        ...

    def check(self, base: Adaptable) -> str | None:
        """What does not fit the layer, in words."""
        ...


class AdapterLayer(nn.Module):
    """Stands in for a linear or convolution layer: its output plus the adapter's.

    The adapter's weights are float32 whatever the base is stored in. They are cast to the type of the input, once
    per call or together for all layers (`casting.cast_once`), so that gradients arrive in float32. `base` may be an
    AdapterLayer itself: adapters stack.
    Dropout acts in training mode while gradients are recorded: never under `torch.no_grad()`, so that samples
    and held-out losses see the whole adapter although the frozen model stays in eval mode throughout.
    """

    faster: ClassVar[frozenset[str]] = frozenset()  # parameters that `b_learning_rate_ratio` speeds up

    def __init__(self, base: nn.Module, dropout: Dropout) -> None:
        super().__init__()
        self.base = base
        self.dropout = dropout
        self.multiplier = 1.0
        self.active = True
        self.cast: tuple[Tensor, ...] | None = None  # `factors` in the type of the run, with gradients
        layer = innermost(base)
        layer.requires_grad_(False)
        self._takes_rows = isinstance(layer, nn.Linear)

    @classmethod
    def fresh(cls, base: Adaptable, choice: ModuleChoice, seed: int, name: str) -> AdapterWeights:
        """Weights to begin with, drawn on the CPU from (seed, module name): neither the other modules nor the device
        make a difference (law L1)."""
        raise NotImplementedError

    @classmethod
    def of(cls, base: nn.Module, weights: AdapterWeights, dropout: Dropout) -> Self:
        """A layer over `base`, where `base` is, with a copy of `weights`."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, ...]:
        """What is cast to the number type of the input: the parameters, or what is made of them in float32."""
        return tuple(self.parameters(recurse=False))

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        """What the adapter adds at full strength to the base's `output` for `x`."""
        raise NotImplementedError

    def weights(self) -> AdapterWeights:
        """A float32 copy of the adapter on the CPU."""
        raise NotImplementedError

    def constants(self) -> dict[str, Tensor]:
        """Tensors that never change but that a checkpoint needs, by name."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        if not self._takes_rows or x.dim() <= 2 or not x.is_contiguous():
            return self._adapted(x)
        # Torch makes rows of tokens for each product, and tokens of its rows, forward and backward: once is enough.
        output = self._adapted(x.reshape(-1, x.shape[-1]))
        return output.reshape(*x.shape[:-1], output.shape[-1])

    def _adapted(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x)
        if not self.active:
            return output
        dropping = self.is_dropping
        if dropping and self.dropout.inputs:
            x = F.dropout(x, self.dropout.inputs)
        added = self.added(x, output)
        if self.multiplier != 1.0:
            added = added * self.multiplier
        if dropping and self.dropout.modules:
            # A product and no branch: the host need not wait for the draw, and it compiles.
            added = added * (torch.rand((), device=x.device) >= self.dropout.modules)
        return output + added

    @property
    def is_dropping(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def kept(self, count: int, like: Tensor) -> Tensor:
        """(count,) of 1 and 0, the share `dropout.ranks` being 0: one draw for all rows of a call."""
        return (torch.rand(count, device=like.device) >= self.dropout.ranks).to(like.dtype)

    def kept_outputs(self, product: Tensor) -> Tensor:
        """The product with some outputs left out while training; what is left is scaled up, as in any dropout."""
        if not (self.dropout.ranks and self.is_dropping):
            return product
        kept = self.kept(weight_shape(innermost(self.base))[0], product)  # type: ignore[arg-type]
        return product * self.by_row(kept / (1 - self.dropout.ranks))

    def in_type(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`factors` in the type of the input."""
        if self.cast is not None and self.cast[0].dtype == dtype and torch.is_grad_enabled():
            return self.cast
        factors = self.factors()
        return factors if factors[0].dtype == dtype else tuple(one.to(dtype) for one in factors)

    def without_bias(self, output: Tensor) -> Tensor:
        """The base's output less its bias."""
        bias = innermost(self.base).bias
        return output - self.by_row(bias.to(output.dtype)) if isinstance(bias, Tensor) else output

    def by_row(self, values: Tensor) -> Tensor:
        """One value for each output, in the shape that multiplies an output."""
        layer = innermost(self.base)
        return values if isinstance(layer, nn.Linear) else values.reshape(-1, *(1 for _ in layer.kernel_size))  # type: ignore[union-attr]

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


def innermost(module: nn.Module) -> nn.Module:
    """The layer under any adapters."""
    while isinstance(module, AdapterLayer):
        module = module.base
    return module


def adaptable_modules(denoiser: nn.Module) -> dict[str, Adaptable]:
    """Linear and ungrouped, zero-padded convolution layers by name, in module order.

    Names are those of the denoiser without adapters, also when some are attached.
    """
    found: dict[str, Adaptable] = {}
    _collect(denoiser, "", found)
    return found


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


def largest_rank(module: Adaptable) -> int:
    """More rank than this adds numbers but nothing that could be learned with them."""
    rows, *rest = weight_shape(module)
    return min(rows, math.prod(rest))


def weight_shape(module: Adaptable) -> tuple[int, ...]:
    """(out, in, *kernel), without asking for the weight: one that is kept in fewer bits would be widened."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def kernel_of(module: Adaptable) -> tuple[int, ...]:
    """Sizes of the kernel; none for a linear layer."""
    return () if isinstance(module, nn.Linear) else tuple(module.kernel_size)


def kernel_volume(module: Adaptable) -> int:
    """1 for a linear layer and a 1x1 convolution, 9 for 3x3."""
    return math.prod(kernel_of(module))


def shape_problem(found: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> str | None:
    """How tensors differ from the shapes that are needed, in words."""
    shapes = {name: tuple(one.shape) for name, one in found.items()}
    if shapes == {name: tuple(shape) for name, shape in wanted.items()}:
        return None
    names = sorted({*found, *wanted})
    told = ", ".join(f"{one} {shapes.get(one, 'absent')}" for one in names)
    needed = ", ".join(f"{one} {wanted.get(one, 'absent')}" for one in names)
    return f"has shapes {told}; this model needs {needed}"


def placed(base: nn.Module, tensor: Tensor) -> Tensor:
    """A float32 copy where the innermost layer is."""
    layer = innermost(base)
    where = next(iter((*layer.parameters(), *layer.buffers()))).device
    return tensor.to(where, torch.float32, copy=True)


def plain_product(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """An input with a weight of one entry per position: what follows a layer's own geometry, or goes before it."""
    return F.linear if isinstance(layer, nn.Linear) else _convolution(layer)


def own_product(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """An input with a weight of the layer's kernel, in the layer's geometry; without bias."""
    if isinstance(layer, nn.Linear):
        return F.linear
    assert isinstance(layer, Convolution)
    return partial(_convolution(layer), stride=layer.stride, padding=layer.padding, dilation=layer.dilation)


def _convolution(layer: nn.Module) -> Callable[..., Tensor]:
    assert isinstance(layer, Convolution)
    convolve: Callable[..., Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    return convolve
