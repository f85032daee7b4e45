"""Sizes of pictures that a family takes, from its latents and tokens."""

from __future__ import annotations

import pytest

from burnish.latent_shape import LatentShape


@pytest.mark.parametrize(("token_multiple", "pixels"), [(1, 32), (2, 64)])
def test_pictures_are_whole_groups_of_tokens(token_multiple: int, pixels: int) -> None:
    shape = LatentShape(channels=4, compression=16, patch=2, token_multiple=token_multiple)
    assert shape.pixel_multiple == pixels
    assert shape.tokens(shape.of(128, 192)) == 4 * 6
