"""The formats a frozen weight can be kept in, and the products of each with activations and with gradients.

Every format is two tensors, `codes` and `scales`, and a small constant `table`. Products never see a float32 copy of a
weight, and save nothing of the activations: a frozen weight has no gradient.

Shape letters: M rows (tokens), N K output and input features; a weight is (N, K).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from burnish.memory.rounding import (
    FP8,
    INT4,
    NF4,
    group_size,
    mixing,
    packed_int4,
    packed_nf4,
    pairs_of,
    rotated,
    rotated_back,
    rounded_to_fp8,
    rounded_to_int8,
    unpacked,
)

FormatName = Literal["fp8", "int8", "nf4", "int4"]
FORMAT_VERSION = 1  # raise when the same weights would be kept otherwise: stored ones are then made anew
FEW_ROWS = 32  # below them an 8-bit product saves nothing; cuBLAS's int8 takes more than 16
NUMBERS_AT_ONCE = 1 << 26  # of activations and of a product that are in float32 at one time
_ROUNDED_AT_ONCE = 1 << 24  # the same of a weight that is packed

Shape = tuple[tuple[int, ...], torch.dtype]


class Format(ABC):
    """One way to keep a weight."""

    name: FormatName
    multiple: int  # of features, in and out, that the format and its kernels take

    @abstractmethod
    def shapes(self, rows: int, features: int) -> tuple[Shape, Shape]:
        """Shape and number type of `codes` and of `scales`, of a weight (rows, features)."""

    def table(self, features: int, device: torch.device | str) -> Tensor | None:
        """The constant that the products need beside codes and scales."""
        return None

    @abstractmethod
    def packed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of some rows of a weight, (N, K)."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a weight (N, K), a portion at a time: all of a layer in float32 would be too much."""
        codes, scales = (
            torch.empty(shape, dtype=dtype, device=weight.device)
            for shape, dtype in self.shapes(*weight.shape)
        )
        step = max(1, _ROUNDED_AT_ONCE // weight.shape[1])
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            codes[rows], scales[rows] = self.packed(weight[rows])
        return codes, scales

    @abstractmethod
    def widened(self, codes: Tensor, scales: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) as its products see it; rotated, where activations are."""

    def unpack(self, codes: Tensor, scales: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) as it was, but for its rounding."""
        return self.widened(codes, scales, table, dtype)

    def product(
        self, x: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None, eight_bit: bool
    ) -> Tensor:
        """x (M, K) times the weight's transpose, (M, N) in the type of `x`; in 8 bits if so, and if that pays."""
        return F.linear(x, self.widened(codes, scales, table, x.dtype))

    def product_back(
        self, grad: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None, eight_bit: bool
    ) -> Tensor:
        """Gradient (M, N) times the weight, (M, K): the gradient of the input."""
        return grad @ self.widened(codes, scales, table, grad.dtype)


class Int8(Format):
    """A scale for each row, rotated; products of int8 by int8, summed in int32."""

    name: FormatName = "int8"
    multiple = 8

    def shapes(self, rows: int, features: int) -> tuple[Shape, Shape]:
        return ((rows, features), torch.int8), ((rows, 1), torch.float32)

    def table(self, features: int, device: torch.device | str) -> Tensor:
        return mixing(features, device)

    def packed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rounded_to_int8(rotated_back(rows.float(), self.table(rows.shape[1], rows.device)))

    def widened(self, codes: Tensor, scales: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _scaled(codes, scales, dtype)

    def unpack(self, codes: Tensor, scales: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        return rotated(codes * scales, _there(table)).to(dtype)

    def product(
        self, x: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None, eight_bit: bool
    ) -> Tensor:
        mixing_CC = _there(table)
        if not eight_bit or len(x) < FEW_ROWS:
            return super().product(rotated(x, mixing_CC), codes, scales, table, False)

        def product(rows: Tensor) -> Tensor:
            row_codes, row_scales = rounded_to_int8(rotated(rows, mixing_CC))
            return (torch._int_mm(row_codes, codes.t()) * row_scales).mul_(scales.t())

        return _in_portions(product, x, len(codes))

    def product_back(
        self, grad: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None, eight_bit: bool
    ) -> Tensor:
        mixing_CC = _there(table)
        if not eight_bit or len(grad) < FEW_ROWS:
            return rotated(super().product_back(grad, codes, scales, table, False), mixing_CC)
        columns = _by_columns(codes)

        def product(rows: Tensor) -> Tensor:
            # The weight's scales lie along the sum: they go into the gradient, whose rows are rounded after.
            row_codes, row_scales = rounded_to_int8(rows * scales.t())
            return rotated((torch._int_mm(row_codes, columns) * row_scales).to(grad.dtype), mixing_CC)

        return _in_portions(product, grad, codes.shape[1])


class Fp8(Format):
    """e4m3 with a scale for each row; products of e4m3 by e4m3 with row-wise scales, summed in float32."""

    name: FormatName = "fp8"
    multiple = 16

    def shapes(self, rows: int, features: int) -> tuple[Shape, Shape]:
        return ((rows, features), FP8), ((rows, 1), torch.float32)

    def packed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rounded_to_fp8(rows.float())

    def widened(self, codes: Tensor, scales: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _scaled(codes, scales, dtype)

    def unpack(self, codes: Tensor, scales: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        return (codes.float() * scales).to(dtype)

    def product(
        self, x: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None, eight_bit: bool
    ) -> Tensor:
        if not eight_bit or len(x) < FEW_ROWS:
            return super().product(x, codes, scales, table, False)

        def product(rows: Tensor) -> Tensor:
            row_codes, row_scales = rounded_to_fp8(rows)
            return _fp8_product(row_codes, codes.t(), row_scales, scales.t(), x.dtype, fast=True)

        return _in_portions(product, x, len(codes))

    def product_back(
        self, grad: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None, eight_bit: bool
    ) -> Tensor:
        if not eight_bit or len(grad) < FEW_ROWS:
            return super().product_back(grad, codes, scales, table, False)
        columns, ones = _by_columns(codes), scales.new_ones(1, codes.shape[1])

        def product(rows: Tensor) -> Tensor:
            # e4m3 rather than e5m2: with a scale per row it is precision that lacks, not range.
            row_codes, row_scales = rounded_to_fp8(rows * scales.t())
            return _fp8_product(row_codes, columns, row_scales, ones, grad.dtype, fast=False)

        return _in_portions(product, grad, codes.shape[1])


@dataclass(frozen=True)
class FourBit(Format):
    """Groups of up to 64 numbers with a scale each; widened for each product."""

    name: FormatName
    numbers: tuple[float, ...]
    multiple = 16

    def shapes(self, rows: int, features: int) -> tuple[Shape, Shape]:
        groups = features // group_size(features)
        return ((rows, features // 2), torch.uint8), ((rows, groups), torch.bfloat16)

    def table(self, features: int, device: torch.device | str) -> Tensor:
        return pairs_of(self.numbers, device)

    def packed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return packed_nf4(rows) if self.numbers == NF4 else packed_int4(rows)

    def widened(self, codes: Tensor, scales: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        return unpacked(codes, scales, _there(table), dtype)


FORMATS: dict[str, Format] = {
    "fp8": Fp8(),
    "int8": Int8(),
    "nf4": FourBit("nf4", NF4),
    "int4": FourBit("int4", INT4),
}


def _in_portions(product: Callable[[Tensor], Tensor], rows: Tensor, width: int) -> Tensor:
    """`product` of rows (M, ...), (M, width) in their type, so many at a time that its float32 stays small.

    Compiled code has no such tensors and takes all rows at once.
    """
    rows = rows.contiguous()  # cuBLAS takes the first factor of 8-bit products by rows alone
    parts = 1
    if not torch.compiler.is_compiling():
        parts = -(-len(rows) * max(width, rows.shape[1]) // NUMBERS_AT_ONCE)
    if parts <= 1:
        return product(rows).to(rows.dtype)
    output = rows.new_empty(len(rows), width)
    # Of equal length: the last must not be one of few rows.
    for part, place in zip(torch.tensor_split(rows, parts), torch.tensor_split(output, parts), strict=True):
        place.copy_(product(part))
    return output


def _scaled(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes times their rows' scales; not in float16, in which scales of small weights are subnormal."""
    if dtype == torch.float16:
        return (codes.float() * scales).to(dtype)
    return codes.to(dtype).mul_(scales.to(dtype))


def _there(table: Tensor | None) -> Tensor:
    assert table is not None
    return table


def _by_columns(codes: Tensor) -> Tensor:
    """The same matrix (N, K), its columns contiguous: what 8-bit kernels want of the second factor.

    Kept so it would take a second byte per weight; the copy is small beside the product that follows.
    """
    return codes.t().contiguous().t()


def _fp8_product(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """(M, K) by (K, N) with scales (M, 1) and (1, N). On CUDA row-wise scales come with bfloat16 outputs only.

    `fast` sums in fewer bits on Hopper, as torchao does it in forward and not in backward.
    """
    given = torch.bfloat16 if a.is_cuda else dtype
    product = torch._scaled_mm(a, b, a_scales, b_scales.contiguous(), out_dtype=given, use_fast_accum=fast)
    return product.to(dtype)


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether 8-bit products of a format run on this device; they are tried once."""
    if name not in ("int8", "fp8") or device.type not in ("cpu", "cuda"):
        return False
    with unset_fake_temporarily():  # it computes, also while a step is traced without weights
        return _runs(name, device.type, device.index or 0)


def slow_because(name: str, device: torch.device) -> str | None:
    """Why a format's products are slower on this device than those of plain weights; None where they are not."""
    if name not in FORMATS or has_kernel(name, device):
        return None
    if name in ("nf4", "int4"):
        return f"{name} weights are widened for each product, which takes longer than with plain ones"
    needs = "compute capability 8.9 (Ada, Hopper and later)" if name == "fp8" else "compute capability 7.5"
    return f"{name} products need {needs}; here weights are widened for each, which takes longer than with plain ones"


@cache
def _runs(name: str, kind: str, index: int) -> bool:
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, index)
    if kind == "cuda" and torch.cuda.get_device_capability(index) < ((8, 9) if name == "fp8" else (7, 5)):
        return False
    kept = FORMATS[name]
    ones = torch.ones(FEW_ROWS, 64, device=device, dtype=torch.bfloat16)
    try:
        codes, scales = kept.pack(ones)
        table = kept.table(64, device)
        back = kept.product_back(ones[:, :FEW_ROWS], codes, scales, table, True)
        return bool(torch.isfinite(kept.product(ones, codes, scales, table, True).sum() + back.sum()))
    except (RuntimeError, ValueError, NotImplementedError):
        return False
