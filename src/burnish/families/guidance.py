"""Rules of guidance besides the usual one (`family.classifier_free_guidance`), shared by families.

Shape letters: B batch; the rest is the shape of latents.
"""

from __future__ import annotations

from torch import Tensor


def beyond_the_prompt(with_prompt: Tensor, without: Tensor, scale: Tensor) -> Tensor:
    """The usual rule counted from the prediction with prompt: a scale of 0 is no guidance (Z-Image, Krea 2)."""
    return with_prompt + scale * (with_prompt - without)
