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

    table = Table("family", "model", "size", "sampling", "targets", "adapter files", "reads", box=None)
    for name, family in families().items():
        table.add_row(name, *_row(family))
    Console(highlight=False).print(table)


def _row(family: type[Family]) -> tuple[str, ...]:
    height, width = family.defaults.size
    targets = [f"{name} (default)" if name == family.default_targets else name for name in family.targets]
    formats = [
        f"{name} (default)" if name == family.export.default else name for name in family.export.formats
    ]
    abilities = {
        "guidance embedding": family.capabilities.guidance_embedding,
        "references": family.capabilities.references,
        "masks": family.capabilities.masks,
        "video": family.capabilities.video,
    }
    return (
        family.title,
        f"{height}x{width}",
        f"{family.defaults.steps} steps, guidance {family.defaults.guidance:g}",
        ", ".join(targets),
        ", ".join(formats),
        ", ".join(ability for ability, has in abilities.items() if has) or "captions",
    )
