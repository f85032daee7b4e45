"""Tokens of captions without the padding that a mask drops anyway.

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

from torch import Tensor


def trimmed(tokens_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Both cut to the longest caption, with zeros where a shorter one is padded (as `Conditioning.collate` pads).

    Args:
        mask_BS: whether a token is no padding, which stands on the right.
    """
    mask_BS = mask_BS.bool()
    longest = int(mask_BS.sum(1).max())
    kept_BS = mask_BS[:, :longest]
    return tokens_BSD[:, :longest] * kept_BS[..., None].to(tokens_BSD.dtype), kept_BS
