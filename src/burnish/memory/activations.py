"""What each block keeps of its forward for backward, and what backward computes again (arXiv 1604.06174).

`keep` keeps all, `keep-matmul` the outputs of attention, matrix products and convolutions, `keep-attention` those of
attention alone, `recompute` only the block's inputs. What is computed again draws the same dropout as before.
Outside of compiled code the two in the middle cost a Python call per operation and can be slower than `recompute`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from burnish.errors import UserError
from burnish.memory.block_forward import BlockForward, Mode, change_forward

__all__ = ["ORDER", "Mode", "activation_modes", "set_activations"]


# From the least memory to the most.
ORDER: tuple[Mode, ...] = ("recompute", "keep-attention", "keep-matmul", "keep")


def activation_modes(option: Mode | float | Mapping[Mode, int], blocks: int) -> list[Mode]:
    """One mode per block, from the value of the option: a mode for all, the share of blocks to recompute, or so many
    blocks of each mode, those that keep the least first.

    A share takes the first blocks. Backward goes from the last to the first, so by the time that it computes a block
    again, for which it needs that block's whole memory, all that the later ones kept is free. Were the last block
    among those computed again, its memory would come on top of all that is kept: one block more at the peak.

    Raises:
        UserError: counts that do not come to the number of blocks.
    """
    if isinstance(option, str):
        return [option] * blocks
    if isinstance(option, Mapping):
        if sum(option.values()) != blocks:
            raise UserError(
                f"memory.activations is for {sum(option.values())} blocks; this model has {blocks}",
                remedy="Give counts that come to as many, one mode for all, or `auto`.",
            )
        return [mode for mode in ORDER for _ in range(option.get(mode, 0))]
    again = round(option * blocks)
    return ["recompute" if number < again else "keep" for number in range(blocks)]


def set_activations(blocks: Sequence[nn.Module], modes: Sequence[Mode]) -> None:
    """Give each block its mode, in place of the one it had.

    Raises:
        ValueError: there is not one mode per block.
    """
    for block, mode in zip(blocks, modes, strict=True):
        change_forward(block, partial(_set_mode, mode))


def _set_mode(mode: Mode, forward: BlockForward) -> None:
    forward.mode = mode
