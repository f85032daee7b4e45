"""Qwen-Image: what the release counts on, with its own tokenizer."""

from __future__ import annotations

import torch

from burnish.families import qwen_image
from burnish.families.guidance import renormalized_patches
from burnish.families.qwen import shipped_tokenizer


def test_the_instruction_has_as_many_tokens_as_are_left_out() -> None:
    before, after = qwen_image.TEMPLATE.split("{}")
    tokenizer = shipped_tokenizer()
    ids = tokenizer(qwen_image.TEMPLATE.format("a cat")).input_ids
    assert len(tokenizer(before).input_ids) == qwen_image.INSTRUCTION_TOKENS
    assert tokenizer.decode(ids[qwen_image.INSTRUCTION_TOKENS :]) == f"a cat{after}"


def test_guidance_keeps_the_length_of_each_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    with_prompt, without = (torch.randn(2, 16, 4, 6, generator=generator) for _ in range(2))
    guided = renormalized_patches(with_prompt, without, torch.tensor(4.0))
    plain = without + 4.0 * (with_prompt - without)
    for row, column in ((0, 0), (2, 4)):
        patch = (slice(None), slice(None), slice(row, row + 2), slice(column, column + 2))
        lengths = guided[patch].flatten(1).norm(dim=1), with_prompt[patch].flatten(1).norm(dim=1)
        torch.testing.assert_close(*lengths)
        along = torch.cosine_similarity(guided[patch].flatten(1), plain[patch].flatten(1))
        torch.testing.assert_close(along, torch.ones(2))
