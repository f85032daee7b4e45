"""One attention kernel on one call of a run: is it right, and how fast, forward and backward.

`python -m burnish.compute.attention_probe` measures in a process of its own: a kernel that crashes at some shape takes
that process with it and not the run.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from burnish.compute.attention import Call, Kind
from burnish.compute.attention_kernels import FOR_SAMPLING, BackEnd, flash_replaced_by, kernel

_COMPARED_TOKENS, _COMPARED_HEADS = (
    1024,
    4,
)  # the reference is computed in double the precision, scores and all
_SAMPLING_ERROR = 0.1  # 8-bit scores: relative, in the Frobenius norm
_SECONDS, _REPEATS = 0.3, 20  # a measurement ends with whichever comes first


@dataclass(frozen=True, slots=True)
class Measured:
    """One kernel on one kind of call; `trouble` says why it cannot be used, or ""."""

    kind: Kind
    back_end: BackEnd
    seconds: float = 0.0  # forward and backward; forward alone of kernels for sampling
    error: float = 0.0  # relative, Frobenius norm, the worst of output and gradients
    trouble: str = ""


def measure_one(call: Call, name: BackEnd, device: torch.device) -> Measured:
    """Right first, on a piece of the call, then how fast, on the whole of it."""
    backward = name not in FOR_SAMPLING
    with ExitStack() as scope:
        scope.enter_context(warnings.catch_warnings())
        warnings.simplefilter(
            "ignore"
        )  # torch warns once per reason why a kernel cannot; the error is enough
        try:
            scope.enter_context(flash_replaced_by(name))
            attend = kernel(name, strict=True)
            error, allowed = _error(_piece(call), attend, backward, device)
            if not error <= allowed:  # not a number is wrong as well
                return Measured(call.kind, name, trouble=f"wrong: error {error:.1e}")
            return Measured(call.kind, name, _seconds(call, attend, backward, device), error)
        except (RuntimeError, ValueError, NotImplementedError, AssertionError, ImportError) as refused:
            reason = str(refused).strip().splitlines() or [type(refused).__name__]
            return Measured(call.kind, name, trouble=f"refused: {reason[0][:200]}")


def _piece(call: Call) -> Call:
    """The same call with fewer tokens and heads."""

    def cut(shape: tuple[int, ...]) -> tuple[int, ...]:
        heads = shape[1] if call.kind.grouped else min(shape[1], _COMPARED_HEADS)
        return (min(shape[0], 2), heads, min(shape[2], _COMPARED_TOKENS), shape[3])

    query, key = cut(call.query_BHSD), cut(call.key_BHKD)
    if call.mask is None:
        return replace(call, query_BHSD=query, key_BHKD=key)
    limits = (query[0], query[1], query[2], key[2])[-len(call.mask) :]
    mask = tuple(min(size, limit) for size, limit in zip(call.mask, limits, strict=True))
    return replace(call, query_BHSD=query, key_BHKD=key, mask=mask)


@dataclass(frozen=True, slots=True)
class _Inputs:
    tensors: tuple[Tensor, Tensor, Tensor]
    mask: Tensor | None
    gradient: Tensor

    def to(self, dtype: torch.dtype) -> _Inputs:
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.to(dtype)
        query, key, value = (one.detach().to(dtype).requires_grad_() for one in self.tensors)
        return _Inputs((query, key, value), mask, self.gradient.to(dtype))


def _inputs(call: Call, device: torch.device) -> _Inputs:
    """Random tensors in the call's own layout; the gradient is a slice of a wider one, the hardest case seen."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: tuple[int, ...], width: int = 1) -> Tensor:
        batch, heads, tokens, dim = shape
        laid = (
            (batch, tokens, width * heads, dim) if call.tokens_first else (batch, width * heads, tokens, dim)
        )
        numbers = torch.randn(laid, generator=generator, device=device, dtype=call.kind.dtype)
        return numbers.transpose(1, 2) if call.tokens_first else numbers

    query, key, value = drawn(call.query_BHSD), drawn(call.key_BHKD), drawn(call.key_BHKD)
    gradient = drawn(call.query_BHSD, width=2)[:, : call.query_BHSD[1]]
    mask = None
    if call.mask is not None:
        keys = torch.arange(call.mask[-1], device=device)
        seen = (keys < max(1, call.mask[-1] * 3 // 4)).expand(call.mask)
        mask = (
            seen
            if call.kind.mask == "boolean"
            else torch.zeros(call.mask, device=device).masked_fill(~seen, -1e4)
        )
        mask = mask.contiguous() if mask.dtype == torch.bool else mask.to(call.kind.dtype)
    return _Inputs((query.requires_grad_(), key.requires_grad_(), value.requires_grad_()), mask, gradient)


def _attend(attend: Callable[..., Tensor], call: Call, inputs: _Inputs) -> Tensor:
    return attend(
        *inputs.tensors, inputs.mask, 0.0, call.kind.causal, scale=None, enable_gqa=call.kind.grouped
    )


def _computed(attend: Callable[..., Tensor], call: Call, inputs: _Inputs, backward: bool) -> list[Tensor]:
    with torch.set_grad_enabled(backward):
        answer = _attend(attend, call, inputs)
    gradients = torch.autograd.grad(answer, inputs.tensors, inputs.gradient) if backward else ()
    return [answer.detach(), *gradients]


def _error(
    call: Call, attend: Callable[..., Tensor], backward: bool, device: torch.device
) -> tuple[float, float]:
    """Relative error against math in double precision, and what is allowed: four times that of math itself."""
    inputs = _inputs(call, device)
    wide = torch.float64 if call.kind.dtype == torch.float32 else torch.float32
    math = kernel("math", strict=True)
    reference = _computed(math, call, inputs.to(wide), backward)

    def error(found: Sequence[Tensor]) -> float:
        pairs = zip(found, reference, strict=True)
        return max(float((one.to(wide) - right).norm() / right.norm()) for one, right in pairs)

    if not backward:
        return error(_computed(attend, call, inputs, backward)), _SAMPLING_ERROR
    usual = error(_computed(math, call, inputs, backward))
    return error(_computed(attend, call, inputs, backward)), max(4 * usual, torch.finfo(call.kind.dtype).eps)


def _seconds(call: Call, attend: Callable[..., Tensor], backward: bool, device: torch.device) -> float:
    inputs = _inputs(call, device)
    taken: list[float] = []
    for _ in range(2):  # kernels are built and chosen now
        _computed(attend, call, inputs, backward)
    _wait(device)
    began = time.perf_counter()
    while len(taken) < 3 or (len(taken) < _REPEATS and time.perf_counter() - began < _SECONDS):
        start = time.perf_counter()
        _computed(attend, call, inputs, backward)
        _wait(device)
        taken.append(time.perf_counter() - start)
    return median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_json(call: Call) -> dict[str, Any]:
    return {
        **asdict(call),
        "kind": {**asdict(call.kind), "dtype": str(call.kind.dtype).removeprefix("torch.")},
    }


def from_json(row: dict[str, Any]) -> Call:
    kind = Kind(**{**row["kind"], "dtype": getattr(torch, row["kind"]["dtype"])})
    mask = None if row["mask"] is None else tuple(row["mask"])
    return Call(kind, tuple(row["query_BHSD"]), tuple(row["key_BHKD"]), mask, row["tokens_first"])


def main() -> None:
    """Answer one line of JSON per pair asked for on standard input, at once."""
    question = json.loads(sys.stdin.read())
    device = torch.device(question["device"])
    for row, name in question["pairs"]:
        one = measure_one(from_json(row), name, device)
        print(json.dumps({"seconds": one.seconds, "error": one.error, "trouble": one.trouble}), flush=True)


if __name__ == "__main__":
    main()
