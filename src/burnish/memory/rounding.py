"""Numbers in fewer bits: 8-bit rows with a scale each, 4-bit groups with a scale each, and the rotation before int8.

Shape letters: M rows (tokens), N K the output and input features of a linear layer, whose weight is (N, K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

INT8_LIMIT = 127.0
FP8 = torch.float8_e4m3fn
FP8_LIMIT = 448.0  # the largest e4m3 number (arXiv 2209.05433, table 1)
SMALLEST_SCALE = 1e-30  # of rows of zeros, which stay zeros
ROTATED = 128  # channels that are mixed with each other before int8
GROUP = 64  # numbers of a row that share a scale in 4 bits; bitsandbytes' default block

# QLoRA (arXiv 2305.14314), section 3: quantiles of a normal distribution with an exact zero, as bitsandbytes tabulates
# them in `functional.get_4bit_type("nf4")`.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
INT4 = tuple(float(number) for number in range(-8, 8))


def rounded_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K) as int8 and their scales (M, 1), float32: the largest number of a row becomes 127.

    A row that is not finite has a scale that is not, so that it is not mistaken for numbers later (law L5).
    """
    scales = _largest(rows) / INT8_LIMIT
    return (rows / scales).round_().to(torch.int8), scales


def rounded_to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K) as e4m3 and their scales (M, 1), float32: the largest number of a row becomes 448."""
    scales = _largest(rows) / FP8_LIMIT
    # The division may end a hair above the limit; up to 464 that is rounded to it, and only then to NaN.
    return (rows / scales).to(FP8), scales


def _largest(rows: Tensor) -> Tensor:
    """Largest magnitude of each row, (M, 1), float32."""
    largest: Tensor = torch.linalg.vector_norm(rows, ord=math.inf, dim=-1, keepdim=True, dtype=torch.float32)
    return largest.clamp_(min=SMALLEST_SCALE)


def rotation_block(features: int) -> int:
    """Channels that a rotation mixes: the largest power of two up to 128 that divides `features`."""
    return min(features & -features, ROTATED)


def mixing(features: int, device: torch.device | str) -> Tensor:
    """The matrix (block, block) that mixes the channels of activations before int8; see `rotated`.

    Sylvester's signs times a power of two, so that it is exact in any number type; symmetric, orthonormal or, for an
    odd power, shorter by the square root of two: sums of float16 activations do not overflow. bfloat16.
    """
    block = rotation_block(features)
    numbers = torch.arange(block, device=device)
    shared = (
        numbers.unsqueeze(1) & numbers
    )  # the sign at (i, j) is that of the number of ones they share in binary
    for shift in (4, 2, 1):
        shared = shared ^ (shared >> shift)
    return ((1 - 2 * (shared & 1)) * 0.5 ** (block.bit_length() // 2)).bfloat16()


def rotated(rows: Tensor, mixing_CC: Tensor) -> Tensor:
    """Rows (M, K), each block of C channels mixed with each other.

    Int8 has evenly spaced numbers: a channel 50 times larger than the others leaves those with three of its 127
    steps. Mixing 128 channels spreads it, and the product with a weight that is mixed back is the same (QuaRot, arXiv
    2404.00456, section 4). Measured for 1024 x 3072 by 3072 x 3072 normal numbers with 8 such channels, by block:
    without 7.7 %, 64: 1.4 % (3.0 % where the eight are neighbours), 128: 1.3 (2.2) %, 256: 1.2 (1.8) %. As one
    matrix product a block of 128 takes 64 operations per byte read and written, which GPUs with matrix units do in
    about the time that one pass over the activations takes; 256 no longer everywhere. Scales per group of channels
    would cut the product in pieces instead; e4m3 keeps its relative precision over a range of 2^15 and needs neither.
    """
    block = len(mixing_CC)
    return (rows.reshape(-1, block) @ mixing_CC.to(rows.dtype)).reshape(rows.shape)


def rotated_back(rows: Tensor, mixing_CC: Tensor) -> Tensor:
    """Undoes `rotated`; of a weight's rows (N, K) it is what meets rotated activations."""
    odd = len(mixing_CC).bit_length() % 2 == 0
    return rotated(rows, mixing_CC) * (2.0 if odd else 1.0)


def group_size(features: int) -> int:
    """Numbers that share a scale in 4 bits: the largest power of two up to 64 that divides `features`."""
    return min(features & -features, GROUP)


def packed_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, K) as nf4: bytes (N, K / 2), the first of two in the high half, and scales (N, K / group), bfloat16.

    Scales are rounded before they are used, which costs nothing; bitsandbytes keeps them in float32.
    """
    groups = rows.reshape(len(rows), -1, group_size(rows.shape[-1])).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST_SCALE).bfloat16()
    table = torch.tensor(NF4, device=rows.device)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(groups / scales, middles, out_int32=True)
    return _halves(codes.flatten(-2)), scales.squeeze(-1)


def packed_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, K) in whole numbers from -8 to 7: bytes and scales as those of `packed_nf4`.

    The number of largest magnitude becomes -8, so that all sixteen are used (llama.cpp's Q4_0); scales may be negative.
    """
    groups = rows.reshape(len(rows), -1, group_size(rows.shape[-1])).float()
    lowest, highest = groups.aminmax(dim=-1, keepdim=True)
    largest = torch.where(-lowest > highest, lowest, highest)
    scales = (largest / -8).bfloat16()
    scales = torch.where(scales == 0, SMALLEST_SCALE, scales)
    codes = (groups / scales).round_().clamp_(-8, 7).to(torch.int32) + 8
    return _halves(codes.flatten(-2)), scales.squeeze(-1)


def _halves(codes: Tensor) -> Tensor:
    """Numbers from 0 to 15, (N, K), two in a byte."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)


def unpacked(codes: Tensor, scales: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (N, K) from 4 bits: what each half of a byte stands for in `pairs`, times its group's scale."""
    numbers: Tensor = torch.nn.functional.embedding(codes.int(), pairs.to(dtype))
    groups = numbers.reshape(*scales.shape, -1)
    return (groups * scales.unsqueeze(-1).to(dtype)).flatten(-2)


def pairs_of(table: Sequence[float], device: torch.device | str) -> Tensor:
    """What the two halves of each byte stand for, (256, 2), float32."""
    return torch.tensor([(high, low) for high in table for low in table], device=device)
