"""What `burnish adapter` says: progress, what was written, what a file is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from burnish.toolbox.convert import Outcome
    from burnish.toolbox.inspect import Inspection
    from burnish.toolbox.inspect_word import WordInspection


@contextmanager
def progress_line(what: str) -> Iterator[Callable[[int], None]]:
    """A line with how much was done and at what rate, on a terminal while it goes on, else once at the end."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    begun = last = time.monotonic()
    done = first = 0

    def line() -> str:
        rate = (done - first) / 1e6 / max(time.monotonic() - begun, 1e-6)
        return f"{done / 1e6:,.0f} MB {what}, {rate:,.0f} MB/s"

    def advance(count: int) -> None:
        nonlocal begun, done, first, last
        if not done:  # before that modules were imported and headers read
            begun, first = time.monotonic(), count
        done += count
        if console.is_terminal and time.monotonic() - last > 0.2:
            last = time.monotonic()
            console.print(f"\r{line()}   ", end="")

    yield advance
    console.print(f"\r{line()}   " if console.is_terminal else line())


def report(outcome: Outcome) -> None:
    """What was written, and what was rounded off."""
    size = sum(one.stat().st_size for one in _files(outcome.path)) / 2**20
    typer.echo(
        f"{outcome.path}: {outcome.modules} modules, {outcome.tensors} tensors, {size:,.1f} MiB, "
        f"format {outcome.format}"
    )
    if outcome.readers is not None:
        typer.echo(f"loads in: {', '.join(outcome.readers) or 'no program'}")
    losses = outcome.losses
    if losses.squared_norm:
        typer.echo(
            f"rounded off: {losses.relative:.3%} of the change as a whole"
            + (f"; most in {losses.worst_module}, {losses.worst:.3%}" if losses.worst_module else "")
        )
    for note in outcome.notes:
        typer.echo(note)


def _files(path: Path) -> list[Path]:
    return [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]


def show(found: Inspection) -> None:
    """What a file is, as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    _print_rows(console, _rows(found))
    if not found.norms:
        return
    blocks = Table(box=None, title="Change by block (Frobenius norm)", title_justify="left")
    blocks.add_column("block", no_wrap=True)
    blocks.add_column("norm", justify="right")
    blocks.add_column("")
    most = max(found.norms.values()) or 1.0
    for block, norm in found.norms.items():
        blocks.add_row(escape(block), f"{norm:.4g}", "#" * round(30 * norm / most))
    console.print(blocks)


def show_word(found: WordInspection) -> None:
    """What the file of a new word is, as a table."""
    from rich.console import Console

    rows = [
        ("file", f"{found.path}  {found.kib:.1f} KiB, {', '.join(found.dtypes)}"),
        ("kind", "a new word (textual inversion)"),
        ("word", found.word or "not told; programs call it by the file's name"),
    ]
    rows += [
        (one.encoder, f"{one.vectors} x {one.width}, lengths {one.shortest:.3g} to {one.longest:.3g}")
        for one in found.encoders
    ]
    rows += [(f"in {program}", f"write {said}") for program, said in found.spelled.items()]
    rows.append(
        ("in diffusers", "load_textual_inversion is told the word; docs/textual-inversion.md shows how")
    )
    rows += _told(
        found.metadata, ("modelspec.title", "modelspec.architecture", "burnish.step", "burnish.version")
    )
    _print_rows(Console(highlight=False), rows)


def _print_rows(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    for key, value in rows:
        table.add_row(key, escape(value))
    console.print(table)


def _told(metadata: Mapping[str, str], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Rows of those metadata that are there, without the prefixes of their names."""
    return [
        (key.partition(".")[2] or key.removeprefix("ss_"), metadata[key]) for key in keys if metadata.get(key)
    ]


def _rows(found: Inspection) -> list[tuple[str, str]]:
    also = f"; or {', '.join(found.also)}, whose adapters look the same" if found.also else ""
    family = f" ({found.family})" if found.family else ""
    rows = [
        ("file", f"{found.path}  {found.mib:.1f} MiB, {', '.join(found.dtypes)}"),
        ("for", f"{found.title}{family}{also}"),
        ("kind", _counted(found.kinds)),
        ("modules", f"{found.modules} of the denoiser, {found.text_encoder_modules} of text encoders"),
        ("rank", _counted(found.ranks)),
        ("alpha", _counted(found.alphas)),
        ("format", f"{found.format}; {found.example}"),
    ]
    if found.norm is not None:
        rows.append(("change", f"{found.norm:.4g} in the Frobenius norm"))
    rows += [("loads in", f"{one.name}: {'yes' if one.loads else 'no, ' + one.why}") for one in found.readers]
    rows += [("note", note) for note in found.notes]
    if found.unknown_keys:
        shown = ", ".join(found.unknown_keys[:3])
        rows.append(("unknown", f"{len(found.unknown_keys)} keys, such as {shown}"))
    told = (
        "modelspec.title",
        "modelspec.trigger_phrase",
        "ss_sd_model_name",
        "ss_steps",
        "burnish.version",
    )
    rows += _told(found.metadata, told)
    return rows


def _counted(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({number})" for value, number in counts.items())
