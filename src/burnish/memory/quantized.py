"""Frozen linear layers whose weights are kept in fewer bits, and where they take the place of plain ones.

An adapter takes a `QuantizedLinear` for the linear layer that it is. Its forward and the gradient of its input are
8-bit products where the format and the device have them; there is no gradient of the weight, so nothing is saved but
the weight itself. Products of few rows (modulation) are made in the number type of the run, and everything outside
the repeated blocks (projections in and out, norms, embeddings of time and text) keeps to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.memory.formats import FORMATS, Format, has_kernel

# Numbers in a weight below which fewer bits save nothing worth their error, and their products no time.
SMALLEST = 1 << 18


class _FrozenProduct(torch.autograd.Function):
    """x (M, K) times a kept weight's transpose; backward gives the gradient of `x` alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        table: Tensor | None,
        kept_as: str,
        eight_bit: bool,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, table)
        ctx.kept_as, ctx.eight_bit = kept_as, eight_bit
        return FORMATS[kept_as].product(x, codes, scales, table, eight_bit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        codes, scales, table = ctx.saved_tensors
        kept = FORMATS[ctx.kept_as]
        return kept.product_back(grad, codes, scales, table, ctx.eight_bit), None, None, None, None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with its weight (N, K) as `codes` and `scales`; the bias stays as it was.

    Made without weights on `device`; `take` gives it some. `weight` is a widened copy, made when asked for.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        kept_as: str,
        device: torch.device | str,
        *,
        eight_bit: bool | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.kept_as = kept_as
        self.dtype = torch.float32 if bias is None else bias.dtype  # of `weight`
        self.eight_bit = has_kernel(kept_as, torch.device(device)) if eight_bit is None else eight_bit
        self.register_parameter("bias", bias)
        codes, scales = self.kept.shapes(out_features, in_features)
        self.register_buffer("codes", torch.empty(codes[0], dtype=codes[1], device=device))
        self.register_buffer("scales", torch.empty(scales[0], dtype=scales[1], device=device))
        self.register_buffer("table", self.kept.table(in_features, device), persistent=False)

    codes: Tensor
    scales: Tensor
    table: Tensor | None

    @classmethod
    def like(cls, layer: nn.Linear, kept_as: str, *, eight_bit: bool | None = None) -> Self:
        """In place of `layer`, where its weight is (the meta device included), without its numbers."""
        made = cls(
            layer.in_features,
            layer.out_features,
            layer.bias,
            kept_as,
            layer.weight.device,
            eight_bit=eight_bit,
        )
        made.dtype = layer.weight.dtype
        made.requires_grad_(False)
        return made.train(layer.training)

    @classmethod
    def of(cls, layer: nn.Linear, kept_as: str, *, eight_bit: bool | None = None) -> Self:
        """In place of `layer`, with its numbers rounded."""
        made = cls.like(layer, kept_as, eight_bit=eight_bit)
        made.take(*made.kept.pack(layer.weight.detach()))
        return made

    @property
    def kept(self) -> Format:
        return FORMATS[self.kept_as]

    def take(self, codes: Tensor, scales: Tensor, *, dtype: torch.dtype | None = None) -> None:
        """Hold these from now on, on their device; `dtype` is that of the run.

        Raises:
            ValueError: they are not of this layer's shape or format.
        """
        given = ((tuple(codes.shape), codes.dtype), (tuple(scales.shape), scales.dtype))
        if given != self.kept.shapes(self.out_features, self.in_features):
            raise ValueError(f"{given} are no {self.kept_as} weights of {self.extra_repr()}")
        if codes.device != self.codes.device:
            self.eight_bit = has_kernel(self.kept_as, codes.device)
            self.table = self.kept.table(self.in_features, codes.device)
        self.codes, self.scales = codes, scales
        self.dtype = self.dtype if dtype is None else dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        product: Tensor = _FrozenProduct.apply(  # type: ignore[no-untyped-call]
            rows, self.codes, self.scales, self.table, self.kept_as, self.eight_bit
        )
        product = product.reshape(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias.to(x.dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # made on demand here, stored in a plain layer
        return self.kept.unpack(self.codes, self.scales, self.table, self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept_as={self.kept_as}"


def large_linears(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    kept_as: str,
    *,
    smallest: int | None = None,
) -> dict[str, nn.Linear]:
    """The layers inside `blocks`, parts of `module`, that a format is for, by name and in module order."""
    smallest = SMALLEST if smallest is None else smallest
    multiple = FORMATS[kept_as].multiple
    inside = {layer for block in blocks for layer in block.modules()}
    shared = _shared_weights(module)
    return {
        name: layer
        for name, layer in module.named_modules()
        # No subclass: it may compute otherwise.
        if type(layer) is nn.Linear
        and layer in inside
        and layer.weight not in shared
        and layer.weight.numel() >= smallest
        and not (layer.in_features % multiple or layer.out_features % multiple)
    }


def repeated_parts(module: nn.Module) -> list[nn.Module]:
    """What a text encoder, whose layers no family names, has in lists."""
    return [part for parts in module.modules() if isinstance(parts, nn.ModuleList) for part in parts]


def replace_linears(
    module: nn.Module, layers: Mapping[str, nn.Linear], kept_as: str, *, eight_bit: bool | None = None
) -> dict[str, QuantizedLinear]:
    """Put layers without numbers in the places of `layers`; for a step that is traced, or weights that are to come."""
    made = {}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        made[name] = QuantizedLinear.like(layer, kept_as, eight_bit=eight_bit)
        module.get_submodule(parent).register_module(child, made[name])
    return made


def choose_products(module: nn.Module, device: torch.device) -> None:
    """Let layers that were loaded elsewhere, such as on the host for streaming, multiply as `device` can."""
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            layer.eight_bit = has_kernel(layer.kept_as, device)


def _shared_weights(module: nn.Module) -> Collection[Tensor]:
    """Weights that several layers hold."""
    seen: set[Tensor] = set()
    shared: set[Tensor] = set()
    for layer in module.modules():
        own: Sequence[Tensor] = list(layer._parameters.values())  # type: ignore[arg-type]
        for parameter in own:
            (shared if parameter in seen else seen).add(parameter)
    return shared
