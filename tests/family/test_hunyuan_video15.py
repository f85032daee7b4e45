"""HunyuanVideo 1.5: words in quotation marks are read letter by letter, as in its pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny.hunyuan15 import SIZE, Guided, first_frame
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from burnish.data.prepare import pixels_of
from burnish.families import siglip
from burnish.families.hunyuan_video15 import GLYPH_TOKENS, HunyuanVideo15, quoted
from burnish.family import ModelSource

PROMPTS = ['a red chair with a sign that says "open" and “closed”, "open"', "a sks dog"]


def test_quoted_words_come_each_once() -> None:
    assert quoted(PROMPTS[0]) == 'Text "open". Text "closed". '
    assert quoted(PROMPTS[1]) is None


@torch.no_grad()
def test_the_denoiser_reads_quoted_words_as_in_the_pipeline(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("hunyuan_video15")
    family = HunyuanVideo15.load(
        ModelSource(str(folder)),
        frozenset(("denoiser", "text_encoders")),
        dtype=torch.float32,
        device="cpu",
    )
    found = family.encode_prompts(PROMPTS)
    pipeline = Guided.from_pretrained(folder)
    tokens, mask, glyphs, glyph_mask = pipeline.encode_prompt(PROMPTS, device="cpu", batch_size=2)
    assert glyphs.shape[1] == GLYPH_TOKENS
    assert found["mask_glyph_BS"].sum(1).tolist() == glyph_mask.sum(1).tolist()
    assert glyph_mask[0].sum() > 20
    noisy, t_B, _ = family.example(64, 64, batch=2, frames=5)
    expected = pipeline.transformer(
        torch.cat([noisy, torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])], dim=1),
        t_B * 1000,
        tokens,
        mask,
        encoder_hidden_states_2=glyphs,
        encoder_attention_mask_2=glyph_mask,
        image_embeds=torch.zeros(2, 3, 8),
        return_dict=False,
    )[0]
    predicted = family.predict(noisy, t_B, found)
    torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=0)
    silent = found.merged({"mask_glyph_BS": torch.zeros_like(found["mask_glyph_BS"])})
    changed = (family.predict(noisy, t_B, silent) - predicted).abs().amax(dim=(1, 2, 3, 4))
    assert changed[0] > 1e-4
    assert changed[1] == pytest.approx(0, abs=1e-6)


def test_the_first_frame_is_seen_as_by_transformers() -> None:
    processor = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    expected = processor(first_frame(), return_tensors="pt").pixel_values
    found = siglip.prepared(pixels_of(first_frame())[None], 56)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_image_to_video_learns_stills_without_being_told_them(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("hunyuan_video15_i2v")
    family = HunyuanVideo15.load(
        ModelSource(str(folder)), frozenset(("denoiser", "vae")), dtype=torch.float32, device="cpu"
    )
    assert family.capabilities.first_frame
    shown = family.encode_references([pixels_of(first_frame())[None]])
    for frames, is_told in ((1, False), (5, True)):
        noisy, t_B, told = family.example(*SIZE, batch=1, frames=frames)
        alike = torch.allclose(
            family.predict(noisy, t_B, told.merged(shown)), family.predict(noisy, t_B, told), atol=1e-5
        )
        assert alike != is_told
