"""What is known of a tensor before it is read."""

from __future__ import annotations

from typing import NamedTuple


class TensorInfo(NamedTuple):
    """What a header says of a tensor; `dtype` as safetensors spells it (F32, BF16)."""

    dtype: str
    shape: tuple[int, ...]
