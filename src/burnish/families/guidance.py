"""Rules of guidance besides the usual one (`family.classifier_free_guidance`), shared by families.

Shape letters: B batch; the rest is the shape of latents.
"""

from __future__ import annotations

from torch import Tensor

from burnish.families.packing import pack, unpack
from burnish.family import classifier_free_guidance


def beyond_the_prompt(with_prompt: Tensor, without: Tensor, scale: Tensor) -> Tensor:
    """The usual rule counted from the prediction with prompt: a scale of 0 is no guidance (Z-Image, Krea 2)."""
    return with_prompt + scale * (with_prompt - without)


def renormalized_patches(with_prompt_BCHW: Tensor, without_BCHW: Tensor, scale: Tensor) -> Tensor:
    """The usual rule, each 2x2 patch then as long as with the prompt alone (Qwen-Image, `QwenImagePipeline`)."""
    guided_BND = pack(classifier_free_guidance(with_prompt_BCHW, without_BCHW, scale))
    length_BN1 = pack(with_prompt_BCHW).norm(dim=-1, keepdim=True)
    height, width = with_prompt_BCHW.shape[2:]
    return unpack(guided_BND * (length_BN1 / guided_BND.norm(dim=-1, keepdim=True)), height, width)
