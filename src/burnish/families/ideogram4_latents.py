"""FLUX.2's folded latents as Ideogram 4 keeps them: the place in the fold outermost, the channel innermost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from burnish.families import flux2_vae
from burnish.families.reading import Piece
from burnish.families.weights import Layout


@dataclass(frozen=True, slots=True)
class PlacesFirst(Piece):
    """Statistics of folded channels as this release keeps them, the place in the fold outermost; FLUX.2 innermost."""

    def turned_from(self, rows: Tensor) -> Tensor:
        return rows.reshape(flux2_vae.FOLD**2, -1).T.reshape(self.shape)


def tidy_vae(layout: Layout) -> Layout:
    """With the statistics of folded channels in FLUX.2's order."""
    statistics = ("bn.running_mean", "bn.running_var")
    moved = {n: PlacesFirst(p.file, p.name, p.shape) for n, p in layout.items() if n in statistics}
    return {**layout, **moved}


def places_first(folded_BCHW: Tensor) -> Tensor:
    """FLUX.2's folded channels with the place in the fold outermost."""
    return _transposed(folded_BCHW, folded_BCHW.shape[1] // flux2_vae.FOLD**2)


def places_last(latents_BCHW: Tensor) -> Tensor:
    """The inverse of `places_first`."""
    return _transposed(latents_BCHW, flux2_vae.FOLD**2)


def _transposed(latents_BCHW: Tensor, rows: int) -> Tensor:
    """The channels read as a matrix of so many rows, transposed."""
    batch, channels, height, width = latents_BCHW.shape
    split = latents_BCHW.reshape(batch, rows, channels // rows, height, width)
    return split.transpose(1, 2).reshape(latents_BCHW.shape)
