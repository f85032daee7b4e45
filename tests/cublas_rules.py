"""What CUDA asks of 8-bit products and a CPU does not (ATen/native/cuda, `_int_mm_out_cuda`, `_scaled_mm_out_cuda`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

MORE_ROWS_THAN = {"_int_mm": 16, "_scaled_mm": 0}
MULTIPLE = {"_int_mm": 8, "_scaled_mm": 16}


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products made from here on, each held against the rules: the first factor lies by rows, the second by
    columns, sizes are multiples, scales of rows are contiguous float32 and then outputs bfloat16."""
    made: list[str] = []
    for name in MORE_ROWS_THAN:
        _watch(name, made, monkeypatch)
    return made


def _watch(name: str, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(torch, name)

    def product(a: Tensor, b: Tensor, *scales: Tensor, **options: object) -> Tensor:
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert len(a) > MORE_ROWS_THAN[name]
        assert a.shape[1] % MULTIPLE[name] == 0
        assert b.shape[1] % MULTIPLE[name] == 0
        if scales:
            assert [tuple(one.shape) for one in scales] == [(len(a), 1), (1, b.shape[1])]
            assert all(one.is_contiguous() and one.dtype == torch.float32 for one in scales)
        made.append(name)
        result: Tensor = original(a, b, *scales, **options)
        return result

    monkeypatch.setattr(torch, name, product)
