"""Where the parts of a model are put, and in how many bits: what a family is told when it loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Part = Literal["denoiser", "vae", "text_encoders"]
DENOISER: frozenset[Part] = frozenset({"denoiser"})
Device = torch.device | str


@dataclass(frozen=True, slots=True)
class Split:
    """A denoiser on a device but for some of its blocks, which stay in host memory as soon as they are read."""

    device: Device
    away: Callable[[Sequence[int]], Sequence[int]]  # bytes of each block -> numbers of those that stay


Place = Device | Split
Places = Place | Mapping[Part, Place]  # one for all parts, or one for each that is loaded


def place_of(part: Part, places: Places) -> Place:
    return places[part] if isinstance(places, Mapping) else places


def device_of(place: Place) -> Device:
    return place.device if isinstance(place, Split) else place


class Shrinking(Protocol):
    """One module while it loads, some of its layers in a smaller format."""

    @property
    def weights(self) -> Collection[str]:
        """Names of the weights that it took over, as in the module's state before."""
        ...

    @property
    def waiting(self) -> Collection[str]:
        """Those that are to be given to `take`; the others are there already."""
        ...

    def take(self, weight_name: str, weight: Tensor, scales: Tensor | None = None) -> None:
        """Keep a weight, which is on the device, in the smaller format. Several threads may do so at a time.

        `scales` are what the numbers of one in 8 bits are to be multiplied with, in its shape.
        """
        ...


class Shrink(Protocol):
    """How the large linear layers of a part are kept in fewer bits (`memory/shrinking.py`)."""

    @property
    def name(self) -> str:
        """Changes with the numbers that come out."""
        ...

    def begin(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module] | None,
        content: Callable[[Collection[str]], str],
        *,
        spared: Sequence[str],
        dtype: torch.dtype,
        device: Device,
        away: tuple[str, ...],
    ) -> Shrinking:
        """Replace layers of a module that has no weights yet (meta device).

        Args:
            blocks: where the layers are; None of a module whose blocks no family names.
            content: names of weights -> hash of what they are made from.
            spared: patterns of weights that are to stay as they are.
            dtype: the number type of the run.
            device: where weights arrive.
            away: beginnings of the names of those that then stay in host memory.
        """
        ...
