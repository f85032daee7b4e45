"""`burnish families`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from burnish.cli.edge import guarded

if TYPE_CHECKING:
    from burnish.family import Capabilities, Family

WIDE = 120  # columns; narrower ones cut the table's cells to pieces


@guarded
def show_families() -> None:
    """List the model families, with what each is made for."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    from burnish.families.registry import families

    rows = []
    for name, family in families().items():
        rows.append((name, *_row(family.title, family.skeleton(depth=1))))
        rows += [("", *_row(f"  {title}", release)) for title, release in family.releases().items()]
    console = Console(highlight=False)
    if console.width < WIDE:
        for name, title, *facts in rows:
            console.print(f"{name:16} [bold]{title}[/]", no_wrap=True)
            console.print(Padding(_in_a_line(*facts), (0, 0, 0, 17 + len(title) - len(title.lstrip()))))
    else:
        table = Table(box=None)
        for heading in ("family", "model", "trains on", "size", "steps", "guidance", "adapter file"):
            table.add_column(heading, no_wrap=heading not in ("model", "trains on"))
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(
        "Size, steps and guidance are the sampler's defaults; of adapter files the first is the default."
    )


def _in_a_line(kinds: str, size: str, steps: str, guidance: str, formats: str) -> str:
    return f"{kinds}; {size}, {steps} steps, guidance {guidance}; {formats}"


def _row(title: str, family: Family) -> tuple[str, ...]:
    defaults, formats = family.defaults, dict.fromkeys([family.export.default, *family.export.formats])
    height, width = defaults.size
    return (
        title,
        ", ".join(_trains_on(family.capabilities)),
        f"{height}x{width}" + (f" x{defaults.frames}" if defaults.frames > 1 else ""),
        str(defaults.steps),
        f"{defaults.guidance:g}" + (" embedded" if family.capabilities.guidance_embedding else ""),
        ", ".join(formats),
    )


def _trains_on(capabilities: Capabilities) -> list[str]:
    """What a dataset for this family can hold."""
    alone = capabilities.references == 1 and not (capabilities.masks or capabilities.first_frame)
    kinds = {
        "pictures": True,
        "clips": capabilities.video,
        "sound": capabilities.audio,
        f"references (up to {capabilities.references})": capabilities.references
        > max(1, capabilities.own_references),
        "a reference": alone,
        "masks": capabilities.masks,
        "first frames": capabilities.first_frame and not capabilities.last_frame,
        "first and last frames": capabilities.last_frame,
    }
    return [kind for kind, has in kinds.items() if has]
