"""`burnish families`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from burnish.cli.edge import guarded

if TYPE_CHECKING:
    from burnish.family import Family


@guarded
def show_families() -> None:
    """List the model families, with what each is made for."""
    from rich.console import Console
    from rich.table import Table

    from burnish.families.registry import families

    table = Table(box=None)
    for heading in ("family", "model", "sampling", "targets", "adapter file"):
        table.add_column(heading, no_wrap=True)
    for name, family in families().items():
        table.add_row(name, *_row(family.skeleton(depth=1)))
    console = Console(highlight=False)
    console.print(table)
    console.print("* is the default", style="dim")


def _row(family: Family) -> tuple[str, ...]:
    height, width = family.defaults.size
    targets = [f"{name} *" if name == family.default_targets else name for name in family.targets]
    formats = [f"{name} *" if name == family.export.default else name for name in family.export.formats]
    abilities = {
        "guidance embedding": family.capabilities.guidance_embedding,
        "references": bool(family.capabilities.references),
        "masks": family.capabilities.masks,
        "video": family.capabilities.video,
    }
    return (
        "\n".join([family.title, *(f"with {ability}" for ability, has in abilities.items() if has)]),
        f"{height}x{width}\n{family.defaults.steps} steps\nguidance {family.defaults.guidance:g}",
        "\n".join(targets),
        "\n".join(formats),
    )
