"""bitsandbytes' AdamW with 8-bit states. To be imported only where bitsandbytes is installed."""

from __future__ import annotations

from functools import cache

from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim import AdamW8bit
from torch import Tensor


@cache
def tables() -> dict[str, Tensor]:
    """The 256 numbers that 8 bits stand for, with a sign and without."""
    return {"dynamic": create_dynamic_map(signed=True), "udynamic": create_dynamic_map(signed=False)}


class SharedTables(AdamW8bit):  # type: ignore[misc]
    """One table for all of them: each takes milliseconds, and there may be an optimizer for every weight."""

    kind = "AdamW8bit"

    def fill_qmap(self) -> None:
        """bitsandbytes calls this once for each optimizer."""
        self.name2qmap = dict(tables())
