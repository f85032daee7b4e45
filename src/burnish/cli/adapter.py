"""`burnish adapter`: look at adapter files, and make others of them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from burnish.cli.adapter_output import progress_line, report, show, show_word
from burnish.cli.edge import EXIT_CODES, guarded
from burnish.errors import UserError

if TYPE_CHECKING:
    from burnish.toolbox.convert import Carry
    from burnish.toolbox.low_rank import RankChoice
    from burnish.toolbox.models import Model

app = typer.Typer(help="Look at adapter files, and make others of them.", no_args_is_help=True)

AdapterArgument = Annotated[
    Path, typer.Argument(help="A LoRA or LyCORIS file (.safetensors) of any program.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write (.safetensors).")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]
FamilyName = Annotated[
    str | None, typer.Option("--family", help="Model family, where the names of modules fit several.")
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto (loads in ComfyUI and diffusers where one format does), comfy, diffusers or kohya.",
    ),
]
Rank = Annotated[int | None, typer.Option("--rank", help="Keep at most so many directions of each module.")]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy", help="Keep as few directions as hold this share of the squared norm, such as 0.95."
    ),
]
Threshold = Annotated[
    float | None, typer.Option("--threshold", help="Keep directions whose singular value is above this.")
]
NumberType = Annotated[
    str | None, typer.Option("--dtype", help="float16, bfloat16 or float32; as in the source if absent.")
]
BaseModel = Annotated[
    Path | None,
    typer.Option(
        "--base", help="The base model (folder or file), for kinds whose effect depends on it: DoRA, OFT."
    ),
]
DropUnknown = Annotated[
    bool, typer.Option("--drop-unknown", help="Leave out keys that belong to no module that is known.")
]
DropTexts = Annotated[
    bool, typer.Option("--drop-text-encoders", help="Leave out what changes the text encoders.")
]


@app.callback()
def group() -> None:
    """Look at adapter files, and make others of them. Nothing is loaded as a whole, and nothing is overwritten."""


@app.command("inspect", epilog=EXIT_CODES)
@guarded
def inspect(
    adapter: AdapterArgument,
    family: FamilyName = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what an adapter file is: kind, rank, strength, its change by block, the model it is for, who loads it.

    Of a new word (textual inversion): its vectors, and what to write in a prompt.
    """
    from dataclasses import asdict

    from burnish.export.word_file import is_word
    from burnish.toolbox.inspect import inspect as look
    from burnish.toolbox.inspect_word import inspect_word
    from burnish.toolbox.source import AdapterSource

    if is_word(adapter):
        word = inspect_word(adapter)
        typer.echo(json.dumps(asdict(word), indent=1)) if as_json else show_word(word)
        return
    with AdapterSource(adapter, family) as source:
        found = look(source)
    typer.echo(json.dumps(asdict(found), indent=1)) if as_json else show(found)


@app.command("convert", epilog=EXIT_CODES)
@guarded
def convert(
    adapter: AdapterArgument,
    output: Output,
    format: Format = "auto",
    as_kind: Annotated[
        str | None,
        typer.Option("--as", help="lora: make LoRAs of other kinds, rounded off to --rank or --energy."),
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    threshold: Threshold = None,
    base: BaseModel = None,
    dtype: NumberType = None,
    family: FamilyName = None,
    drop_unknown: DropUnknown = False,
    drop_text_encoders: DropTexts = False,
    force: Force = False,
) -> None:
    """Write an adapter in another format, exactly; or refuse, with the reason, where something would be lost."""
    from burnish.toolbox import convert as tool
    from burnish.toolbox.source import AdapterSource
    from burnish.toolbox.writing import number_type

    if as_kind not in (None, "lora"):
        raise UserError(f"--as {as_kind} is not known", remedy="Only --as lora is.")
    if as_kind is None and (rank or energy or threshold):
        raise UserError("a rank was given, but nothing to round off", remedy="Add --as lora, or use resize.")
    with AdapterSource(adapter, family) as source, ExitStack() as scope:
        carry = _carry(scope, source.model, base, drop_unknown, drop_text_encoders)
        if as_kind is not None:
            carry = _with_rank(carry, _choice(rank, energy, threshold))
        report(tool.convert(source, output, carry, format=format, dtype=number_type(dtype), force=force))


@app.command("extract", epilog=EXIT_CODES)
@guarded
def extract(
    base: Annotated[
        Path, typer.Argument(help="The model that was trained from: a diffusers folder or a file.")
    ],
    tuned: Annotated[Path, typer.Argument(help="What came of it.")],
    output: Output,
    kind: Annotated[
        str, typer.Option("--kind", help="lora (linear layers and 1x1), locon (all convolutions), lokr.")
    ] = "lora",
    rank: Rank = None,
    conv_rank: Annotated[
        int | None, typer.Option("--conv-rank", help="Of larger convolutions, with --kind locon.")
    ] = None,
    energy: Energy = None,
    threshold: Threshold = None,
    factor: Annotated[int, typer.Option("--factor", help="With --kind lokr: size of the small matrix.")] = -1,
    least: Annotated[
        float,
        typer.Option(
            "--least", help="Leave out modules that changed by less than this, beside their weight."
        ),
    ] = 0.0,
    biases: Annotated[
        bool,
        typer.Option("--biases", help="Write differences of biases and norms too; ComfyUI alone reads them."),
    ] = False,
    format: Format = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float16, bfloat16 or float32.")] = "float16",
    family: FamilyName = None,
    denoiser: Annotated[
        str | None, typer.Option("--denoiser", help="Which, of a folder with several: transformer_2.")
    ] = None,
    force: Force = False,
) -> None:
    """Make an adapter of the difference between two checkpoints of one model, layer by layer."""
    from burnish.toolbox import extract as tool
    from burnish.toolbox.low_rank import RankChoice
    from burnish.toolbox.writing import number_type

    default = 32 if rank is None and energy is None and threshold is None else rank
    wanted = tool.Extraction(
        kind=kind,  # type: ignore[arg-type]  # checked there
        rank=RankChoice(default, energy, threshold),
        conv_rank=None if conv_rank is None else RankChoice(conv_rank),
        factor=factor,
        least=least,
        biases=biases,
    )
    with progress_line("read") as progress:
        outcome = tool.extract(
            base,
            tuned,
            output,
            wanted,
            family=family,
            denoiser=denoiser,
            format=format,
            dtype=number_type(dtype),
            force=force,
            progress=progress,
        )
    report(outcome)


@app.command("merge", epilog=EXIT_CODES)
@guarded
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Adapter files, each with its weight if it is not 1: style.safetensors=0.6"),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file (of a folder: the folder) to write.")
    ],
    into: Annotated[
        Path | None, typer.Option("--into", help="Add them to the weights of this model: a folder or a file.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="sum (exact for LoRAs), ties or dare, on whole matrices.")
    ] = "sum",
    density: Annotated[
        float, typer.Option("--density", help="Share of entries that ties and dare keep.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Of what dare leaves out.")] = 0,
    rank: Rank = None,
    energy: Energy = None,
    threshold: Threshold = None,
    base: BaseModel = None,
    format: Format = "auto",
    dtype: NumberType = None,
    family: FamilyName = None,
    denoiser: Annotated[
        str | None, typer.Option("--denoiser", help="Which, of a folder with several: transformer_2.")
    ] = None,
    drop_unknown: DropUnknown = False,
    drop_text_encoders: DropTexts = False,
    force: Force = False,
) -> None:
    """Make one adapter of several, or add adapters to the weights of a model."""
    from burnish.toolbox import merge as tool
    from burnish.toolbox.base import Base
    from burnish.toolbox.combine import Combination
    from burnish.toolbox.source import AdapterSource
    from burnish.toolbox.writing import number_type

    combination = Combination(method, density, seed)  # type: ignore[arg-type]  # checked there
    named = [_weighted(text) for text in adapters]
    with ExitStack() as scope:
        sources = [
            tool.Weighted(scope.enter_context(AdapterSource(path, family)), weight) for path, weight in named
        ]
        model = sources[0].source.model
        carry = _carry(scope, model, base, drop_unknown, drop_text_encoders)
        if rank or energy or threshold:
            carry = _with_rank(carry, _choice(rank, energy, threshold))
        if into is None:
            outcome = tool.merge_adapters(
                sources, output, combination, carry, format=format, dtype=number_type(dtype), force=force
            )
        else:
            if carry.rank is not None or dtype is not None:
                raise UserError("a model's weights take no --rank and keep their number type")
            weights = scope.enter_context(Base(into, None if model is None else model.family, denoiser))
            with progress_line("written") as progress:
                outcome = tool.merge_into(
                    weights, sources, output, combination, carry, force=force, progress=progress
                )
    report(outcome)


@app.command("resize", epilog=EXIT_CODES)
@guarded
def resize(
    adapter: AdapterArgument,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    threshold: Threshold = None,
    dtype: NumberType = None,
    family: FamilyName = None,
    force: Force = False,
) -> None:
    """Write a LoRA of lower rank under the same keys: the best there is of that rank, and how much it leaves out."""
    from burnish.toolbox import rewrite
    from burnish.toolbox.source import AdapterSource
    from burnish.toolbox.writing import number_type

    choice = _choice(rank, energy, threshold)
    with AdapterSource(adapter, family) as source:
        report(rewrite.resize(source, output, choice, dtype=number_type(dtype), force=force))


@app.command("scale", epilog=EXIT_CODES, context_settings={"ignore_unknown_options": True})
@guarded
def scale(
    adapter: AdapterArgument,
    factor: Annotated[float, typer.Argument(help="What the effect is multiplied with; may be negative.")],
    output: Output,
    family: FamilyName = None,
    force: Force = False,
) -> None:
    """Multiply the effect of an adapter, under the same keys."""
    from burnish.toolbox import rewrite
    from burnish.toolbox.source import AdapterSource

    with AdapterSource(adapter, family) as source:
        report(rewrite.scale(source, output, factor, force=force))


@app.command("average", epilog=EXIT_CODES)
@guarded
def average(
    files: Annotated[
        list[Path], typer.Argument(help="Saves of one run: adapters, or checkpoints (.safetensors).")
    ],
    output: Output,
    weights: Annotated[
        str | None, typer.Option("--weights", help="One number for each file, as 1,1,2; all alike if absent.")
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            "--width", help="Of saves of a run with train.ema.width: the average of this width instead."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write the mean of files with the same tensors."""
    from burnish.toolbox import average as tool

    shares = [] if weights is None else [_number(text) for text in weights.split(",")]
    with progress_line("read") as progress:
        outcome = tool.average(files, output, shares, width=width, force=force, progress=progress)
    report(outcome)


def _choice(rank: int | None, energy: float | None, threshold: float | None) -> RankChoice:
    from burnish.toolbox.low_rank import RankChoice

    return RankChoice(rank, energy, threshold)


def _carry(
    scope: ExitStack, model: Model | None, base: Path | None, drop_unknown: bool, drop_text_encoders: bool
) -> Carry:
    from burnish.toolbox.base import Base
    from burnish.toolbox.convert import Carry

    weights = None
    if base is not None:
        weights = scope.enter_context(Base(base, None if model is None else model.family))
    return Carry(base=weights, drop_unknown=drop_unknown, drop_text_encoders=drop_text_encoders)


def _with_rank(carry: Carry, choice: RankChoice) -> Carry:
    from dataclasses import replace

    return replace(carry, rank=choice)


def _weighted(text: str) -> tuple[Path, float]:
    """`path` or `path=weight`; a path may hold a `=` of its own."""
    path, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), 1.0
    return Path(path), _number(weight)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{text!r} is no number") from error
