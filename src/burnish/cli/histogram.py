"""Bars in the terminal: how often training times are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from burnish.timestep_density import Density

COLUMNS, ROWS = 64, 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_PLAIN = "     ####"  # of a terminal without such signs
_INDENT = " " * 8


def charts(densities: Sequence[Density], *, fine: bool) -> str:
    """One chart below the other, all at one scale, in at most 80 columns.

    Args:
        fine: the terminal can show signs outside ASCII.
    """
    most = max(max(one.shares) for one in densities) * COLUMNS
    top = 0.4 * ceil(most / 0.4 - 1e-9)  # a label at every second row, in whole tenths
    return "\n".join(_chart(one, top, fine) for one in densities)


def _chart(density: Density, top: float, fine: bool) -> str:
    heights = [share * COLUMNS / top * ROWS for share in density.shares]
    lines = [_title(density)]
    for row in reversed(range(ROWS)):
        label = f"{top * (row + 1) / ROWS:6.1f} " if row % 2 else " " * 7
        bars = "".join(_cell(height - row, fine) for height in heights).rstrip()
        lines.append(f"{label}{'┤' if fine else '|'}{bars}")
    lines.append(f"{0:6.1f} {'└' if fine else '+'}{('─' if fine else '-') * COLUMNS}")
    lines.append(_INDENT + _axis())
    quarter, half, most = density.quarters
    lines.append(
        f"{_INDENT}a quarter below {quarter:.2f}, half below {half:.2f}, three quarters below {most:.2f}"
    )
    return "\n".join(lines) + "\n"


def _title(density: Density) -> str:
    facts = [density.size]
    if density.tokens:
        facts.append(f"{density.tokens:,} tokens")
    if density.shift is not None:
        facts.append(f"shift {density.shift:.3g}")
    return f"{_INDENT}{', '.join(facts)}"


def _cell(height: float, fine: bool) -> str:
    return (_EIGHTHS if fine else _PLAIN)[min(8, max(0, round(height * 8)))]


def _axis() -> str:
    line = [" "] * COLUMNS
    for number, mark in enumerate(("0 clean", "0.25", "0.5", "0.75", "noise 1")):
        at = round(number * COLUMNS / 4)
        start = 0 if number == 0 else COLUMNS - len(mark) if number == 4 else at - len(mark) // 2
        line[start : start + len(mark)] = mark
    return "".join(line)
