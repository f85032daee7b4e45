"""LTX-2.3, whose streams have captions of their own width and gated attention, draws as in its pipeline."""

from __future__ import annotations

from pathlib import Path

from test_families_equal_pipelines import assert_same, loaded, ours, theirs
from tiny.ltx2 import LTX_2_3

from burnish.families.ltx2 import LTX2


def test_latents(tmp_path: Path) -> None:
    LTX_2_3.build(0).save_pretrained(tmp_path)
    family = loaded(tmp_path)
    assert isinstance(family, LTX2)
    assert_same(ours(family, LTX_2_3, 1.0), theirs(tmp_path, LTX_2_3, 1.0, "latent"))
