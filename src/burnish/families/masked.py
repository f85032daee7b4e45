"""Tokens of captions and their masks: without the padding that a mask drops anyway, and what it says on the host.

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

from torch import Tensor

from burnish.conditioning import Conditioning


def trimmed(tokens_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Both cut to the longest caption, with zeros where a shorter one is padded (as `Conditioning.collate` pads).

    Args:
        mask_BS: whether a token is no padding, which stands on the right.
    """
    mask_BS = mask_BS.bool()
    longest = int(mask_BS.sum(1).max())
    kept_BS = mask_BS[:, :longest]
    return tokens_BSD[:, :longest] * kept_BS[..., None].to(tokens_BSD.dtype), kept_BS


def is_whole(conditioning: Conditioning, name: str = "mask_BS") -> bool:
    """Whether the mask drops nothing, so that the faster kernels, which take none, can serve; not known without
    weights (meta device), where it is taken to drop something."""
    mask_BS = conditioning.on_host(name)
    return mask_BS is not None and bool(mask_BS.all())


def lengths(conditioning: Conditioning, name: str = "mask_BS") -> list[int]:
    """Tokens of each row that are no padding; without weights (meta device) all of them."""
    mask_BS = conditioning.on_host(name)
    if mask_BS is None:
        rows, longest = conditioning[name].shape
        return [longest] * rows
    counts: list[int] = mask_BS.sum(1).tolist()
    return counts
