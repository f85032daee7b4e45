"""How fast a machine is: what turns counted work into seconds.

For a card that is not here, from a table of data sheets; for one that is, from a probe of two seconds. Units: FLOP per
second, bytes per second, bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from burnish.errors import UserError
from burnish.planner.live_bytes import Work

GIB = 2**30
TERA = 1e12
GIGA = 1e9
# Share of a data sheet's dense rate that matrix products of a transformer's sizes reach, and flash attention forward
# and backward of it; measured on an H200: 804 of 989 TFLOP/s, and 300 (flash) or 570 (cuDNN) of those.
MATMUL_REACHED = 0.8
FLASH_REACHED = 0.5
BANDWIDTH_REACHED = 0.8
# What Python, autograd and the driver take for each kernel when blocks are not compiled: 348 ms for the 21030 kernels
# of an SDXL step that an H200 would compute in a tenth of that.
SECONDS_PER_KERNEL = 16e-6
# Compiled blocks fuse what is not a matrix product: measured on FLUX.1 at 1024 pixels, 0.28 of 0.62 TB stay.
TRAFFIC_LEFT_BY_COMPILE = 0.47
KERNELS_LEFT_BY_COMPILE = 0.3


@dataclass(frozen=True, slots=True)
class Rates:
    """What a card reaches on a model's own shapes."""

    matmul: float  # bf16
    fp8: float | None  # None: the card has no fp8 matrix product
    int8: float | None
    attention: float  # forward and backward together
    memory: float  # reads and writes
    from_host: float  # pinned host memory to the card
    unified: bool = False  # one memory for both: nothing is gained by moving
    seconds_per_kernel: float = SECONDS_PER_KERNEL

    def seconds(self, work: Work, *, compiled: bool, eight_bit: str = "fp8") -> float:
        """Of a step's work; kernels are launched while others run, so the slower of the two counts."""
        fast = (self.fp8 if eight_bit == "fp8" else self.int8) or self.matmul
        traffic = work.traffic * (TRAFFIC_LEFT_BY_COMPILE if compiled else 1.0)
        kernels = work.kernels * (KERNELS_LEFT_BY_COMPILE if compiled else 1.0)
        computing = (
            work.matmul_flop / self.matmul
            + work.eight_bit_flop / fast
            + work.attention_flop / self.attention
            + traffic / self.memory
        )
        return max(computing, kernels * self.seconds_per_kernel)


@dataclass(frozen=True, slots=True)
class Card:
    """A card as its data sheet has it; TFLOP/s dense with float32 accumulation, GB/s."""

    title: str
    gib: float
    bf16: float
    fp8: float | None
    int8: float | None
    bandwidth: float
    from_host: float = 22.0  # PCIe 4.0 x16, pinned
    attention: float | None = None  # where it was measured
    unified: bool = False
    measured: Rates | None = None  # in place of all the others
    host_gib: float | None = None  # free host memory, where it is known

    @property
    def rates(self) -> Rates:
        if self.measured is not None:
            return self.measured

        def reached(rate: float | None) -> float | None:
            return None if rate is None else rate * MATMUL_REACHED * TERA

        return Rates(
            matmul=self.bf16 * MATMUL_REACHED * TERA,
            fp8=reached(self.fp8),
            int8=reached(self.int8),
            attention=(self.attention or self.bf16 * FLASH_REACHED) * TERA,
            memory=self.bandwidth * BANDWIDTH_REACHED * GIGA,
            from_host=self.from_host * GIGA,
            unified=self.unified,
        )


# NVIDIA's data sheets and architecture papers; dense, not sparse, float32 accumulation.
CARDS = {
    "3060": Card("GeForce RTX 3060 12 GB", 12, 25.5, None, 102, 360),
    "3090": Card("GeForce RTX 3090", 24, 71, None, 284, 936),
    "4060ti": Card("GeForce RTX 4060 Ti 16 GB", 16, 44, 88, 176, 288, from_host=12),
    "4070tisuper": Card("GeForce RTX 4070 Ti SUPER", 16, 88, 176, 353, 672),
    "4080": Card("GeForce RTX 4080", 16, 97.5, 195, 390, 717),
    "4090": Card("GeForce RTX 4090", 24, 165, 330, 661, 1008),
    "5070ti": Card("GeForce RTX 5070 Ti", 16, 88, 176, 352, 896, from_host=44),
    "5080": Card("GeForce RTX 5080", 16, 112.5, 225, 450, 960, from_host=44),
    "5090": Card("GeForce RTX 5090", 32, 209.5, 419, 838, 1792, from_host=44),
    "a6000": Card("RTX A6000", 48, 155, None, 310, 768),
    "l40s": Card("L40S", 48, 362, 733, 733, 864),
    "a100": Card("A100 80 GB", 80, 312, None, 624, 2039),
    "h100": Card("H100 SXM", 80, 989, 1979, 1979, 3350, from_host=50, attention=500),
    "h200": Card("H200", 141, 989, 1979, 1179, 4800, from_host=50, attention=570),
    "b200": Card("B200", 180, 2250, 4500, 4500, 8000, from_host=50, attention=1200),
    "gb10": Card("GB10 (DGX Spark)", 119, 125, 250, 250, 273, from_host=273, unified=True),
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gib|gb|g)?", re.IGNORECASE)


def card_named(name: str) -> Card:
    """A card of the table, or one of that much memory with the rates of an RTX 3090 (`24GiB`).

    Raises:
        UserError: no such card, and not a size.
    """
    key = re.sub(r"[\s_-]|geforce|nvidia|rtx", "", name.lower())
    if key in CARDS:
        return CARDS[key]
    size = _SIZE.fullmatch(name.strip())
    if size is not None and 1 <= float(size[1]) <= 1024:
        like = CARDS["3090"]
        return Card(
            f"a card of {float(size[1]):g} GiB", float(size[1]), like.bf16, None, like.int8, like.bandwidth
        )
    raise UserError(
        f"no card is called {name!r}",
        remedy=f"Known: {', '.join(CARDS)}; or a size such as 24GiB, taken to be as fast as an RTX 3090.",
    )


def card_called(title: str) -> Card | None:
    """The table's card by the name that a driver tells, such as `NVIDIA GeForce RTX 4090`."""
    key = re.sub(r"[\s_-]|geforce|nvidia|rtx", "", title.lower())
    near = [card for name, card in CARDS.items() if name in key]
    return max(near, key=lambda card: len(card.title)) if near else None
