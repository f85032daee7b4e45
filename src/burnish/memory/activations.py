"""Activation checkpointing: recompute a block's activations in backward instead of keeping them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Keep only each block's inputs; its forward runs again in backward, dropout included (arXiv 1604.06174)."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
