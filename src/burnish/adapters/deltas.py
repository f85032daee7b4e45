"""What each kind of adapter makes of a layer's weight: functions of tensors alone, shared by layers, files and tools.

Shapes are those of LyCORIS' files (github.com/KohakuBlueleaf/LyCORIS, `lycoris/functional`), which ComfyUI reads as
well (`comfy/weight_adapter`). A weight is (out, in, *kernel); `*kernel` is empty for a linear layer. Everything is
computed in the number type that comes in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def lora_delta(up: Tensor, down: Tensor, mid: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """LoRA (arXiv 2106.09685), and LoCon with its Tucker form (arXiv 2309.14859).

    Args:
        up: (out, rank) or (out, rank, 1, ...).
        down: (rank, in) or (rank, in, *kernel); (rank, in, 1, ...) with `mid`.
        mid: (rank, rank, *kernel), the core of a Tucker form: its first axis meets `up`, its second `down`.

    Returns:
        (out, in, *kernel)
    """
    if mid is None:
        product = up.flatten(1) @ down.flatten(1)
        return (scale * product).reshape(up.shape[0], *down.shape[1:])
    return tucker(mid, up.flatten(1).T, down.flatten(1)) * scale


def tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A core (r, r, *kernel) with `rows` (r, out) on its first axis and `columns` (r, in) on its second."""
    return torch.einsum("ij...,io,jc->oc...", core, rows, columns)


def without_core(core: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """`tucker` as a plain product of the same rank: (out, r) and (r, in * kernel volume)."""
    return rows.T.contiguous(), torch.einsum("ij...,jc->ic...", core, columns).flatten(1).contiguous()


def loha_delta(
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    t1: Tensor | None = None,
    t2: Tensor | None = None,
    *,
    scale: float = 1.0,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """LoHa (FedPara, arXiv 2108.06098): the product, entry by entry, of two matrices of low rank.

    Args:
        w1_a, w2_a: (out, rank); with cores (rank, out).
        w1_b, w2_b: (rank, in * kernel volume); with cores (rank, in).
        t1, t2: cores (rank, rank, *kernel), or neither.
        shape: of the weight; (out, in) if absent.
    """
    if t1 is not None and t2 is not None:
        product = tucker(t1, w1_a, w1_b) * tucker(t2, w2_a, w2_b)
    else:
        product = (w1_a @ w1_b) * (w2_a @ w2_b)
    return scale * (product if shape is None else product.reshape(tuple(shape)))


def lokr_factor(
    whole: Tensor | None, a: Tensor | None = None, b: Tensor | None = None, core: Tensor | None = None
) -> Tensor:
    """One factor of a LoKr as a matrix (rows, columns * kernel volume), whole or from its own factors.

    Args:
        whole: (rows, columns, *kernel).
        a, b: (rows, rank) and (rank, columns * kernel volume); with `core` (rank, rows) and (rank, columns).

    Raises:
        ValueError: neither is given.
    """
    if whole is not None:
        return whole.flatten(1)
    if a is None or b is None:
        raise ValueError("a factor is either whole or a product of two")
    return a @ b if core is None else tucker(core, a, b).flatten(1)


def lokr_delta(
    first: Tensor, second: Tensor, *, scale: float = 1.0, shape: Sequence[int] | None = None
) -> Tensor:
    """LoKr (KronA, arXiv 2212.10650): the Kronecker product of a small matrix and a larger one.

    Args:
        first: (o1, i1).
        second: (o2, i2 * kernel volume), as `lokr_factor` gives it.
        shape: of the weight, (o1 * o2, i1 * i2, *kernel); a matrix if absent.
    """
    product = scale * torch.kron(first.contiguous(), second.contiguous())
    return product if shape is None else product.reshape(tuple(shape))


def split_width(width: int, factor: int) -> tuple[int, int]:
    """A width as a product of two, the smaller first: the one next to `factor`, or next to the root for -1.

    As `factorization` of LyCORIS, whose files rely on it: a factor that divides the width is taken as it is, otherwise
    the largest divisor below it that makes the two more alike.
    """
    if factor > 0 and width % factor == 0:
        return min(factor, width // factor), max(factor, width // factor)
    limit = width if factor < 0 else factor
    divisors = [one for one in range(1, math.isqrt(width) + 1) if width % one == 0 and one <= max(limit, 1)]
    return divisors[-1], width // divisors[-1]


def turns_less_one(blocks: Tensor) -> Tensor:
    """R - I of turns by Cayley's transform, R = (I + Q)(I - Q)^-1 with Q = blocks - blocks^T; all (..., b, b).

    That difference is (I - Q)^-1 2 Q, which keeps its digits where a turn is small. I - Q can always be inverted: the
    eigenvalues of Q are imaginary. So nobody need ask the device whether that worked.
    """
    skew = blocks - blocks.transpose(-1, -2)
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    moved: Tensor = torch.linalg.solve_ex(one - skew, 2 * skew).result
    return moved


def oft_turned(rows: Tensor, moves: Tensor) -> Tensor:
    """What OFT (arXiv 2306.07280) adds to a tensor whose last axis is a layer's outputs.

    Args:
        rows: (..., out).
        moves: (n, out / n, out / n), turns R less the identity: each turns its part of the outputs, y -> R^T y as
            LyCORIS' diag-OFT has it.
    """
    parts = rows.reshape(*rows.shape[:-1], *moves.shape[:2])
    return torch.einsum("knm,...kn->...km", moves, parts).flatten(-2)


def boft_turned(rows: Tensor, moves: Tensor) -> Tensor:
    """What BOFT (arXiv 2311.06243) adds to a tensor (..., out): a butterfly of block rotations.

    Args:
        moves: (m, n, out / n, out / n), turns R less the identity; n a power of two and at least 2^(m-1), out / n even.
            Stage i turns entries that lie 2^i half blocks apart, y -> R y.
    """
    shape, (_, count, size, _) = rows.shape, moves.shape
    added = torch.zeros_like(rows)
    for stage, move in enumerate(moves):
        apart = 2**stage * (size // 2)
        pairs = (rows + added).reshape(*shape[:-1], -1, 2, apart).transpose(-1, -2)
        parts = pairs.reshape(*shape[:-1], count, size)
        moved = torch.einsum("kij,...kj->...ki", move, parts)
        added = added + moved.reshape(*shape[:-1], -1, apart, 2).transpose(-1, -2).reshape(shape)
    return added


def turned_delta(weight: Tensor, blocks: Tensor) -> Tensor:
    """What OFT (3 axes of `blocks`) or BOFT (4 axes) adds to a weight."""
    turned = oft_turned if blocks.dim() == 3 else boft_turned
    added = turned(torch.movedim(weight, 0, -1), turns_less_one(blocks))
    delta: Tensor = torch.movedim(added, -1, 0)
    return delta


def row_norms(weight: Tensor) -> Tensor:
    """(out,) lengths of a weight's rows, over all inputs and the kernel."""
    lengths: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return lengths


def dora_weight(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (arXiv 2402.09353): the changed weight with each row of the length that `magnitude` (out,) says."""
    changed = weight + delta
    lengths = magnitude / row_norms(changed)
    return changed * lengths.reshape(-1, *(1 for _ in changed.shape[1:]))
