"""Randomness as a pure function (law L1): the same key gives the same draw on any rank, worker or resume.

A key is a tuple of plain values, such as (seed, "noise", micro_step, sample_id). Nothing here keeps state.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Key = int | str


def stable_seed(*key: Key) -> int:
    """A 63-bit seed that depends on every part of `key`, the same on every machine and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def python_random(*key: Key) -> random.Random:
    return random.Random(stable_seed(*key))


def torch_generator(*key: Key) -> torch.Generator:
    """A CPU generator: noise drawn on the CPU is the same whatever device trains on it."""
    import torch

    return torch.Generator().manual_seed(stable_seed(*key))
