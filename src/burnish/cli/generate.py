"""`burnish generate`."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from burnish.cli.edge import guarded
from burnish.cli.train import Overrides
from burnish.errors import UserError

if TYPE_CHECKING:
    from burnish.config.schema import Model, RunConfig, SamplePrompt
    from burnish.sampling.prompts import PromptLine
    from burnish.sampling.sampler import PictureRequest

_Number = TypeVar("_Number", int, float)
_SIZE = re.compile(r"(\d+)(?:[xX](\d+))?")


@guarded
def generate(
    config: Annotated[
        str | None, typer.Argument(help="A config: its model, its sample prompts, steps, guidance and size.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Diffusers folder, file or Hub id.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="Detected when absent.")] = None,
    audio: Annotated[
        bool, typer.Option("--audio", help="Draw clips with sound, of a model that makes it.")
    ] = False,
    first_frame: Annotated[
        bool,
        typer.Option("--first-frame", help="Go on from --reference, of a model that also draws without."),
    ] = False,
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", metavar="FILE[:STRENGTH]", help="Strength 1 if absent; repeatable."),
    ] = [],  # noqa: B006  typer copies it
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; repeatable.")] = [],  # noqa: B006
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file", help="A prompt per line: text with options such as --d 7 --w 832, or JSON."
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="What to steer away from.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of the first picture; then one more each.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Pictures per prompt.")] = 1,
    size: Annotated[
        str | None, typer.Option("--size", metavar="HxW", help="Height x width in pixels.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, max=1025, help="Of a video model's clips.")
    ] = None,
    reference: Annotated[
        list[Path],
        typer.Option("--reference", help="Picture that the model is shown beside the prompts; repeatable."),
    ] = [],  # noqa: B006  typer copies it
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Where the first reference is to be filled: white.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", min=0, max=50, help="Guidance scale.")
    ] = None,
    reference_guidance: Annotated[
        float | None,
        typer.Option("--reference-guidance", min=0, max=50, help="How closely to keep to the references."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=256, help="Pictures drawn at once.")
    ] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path(
        "pictures"
    ),
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="bf16, fp16 or fp32.")] = None,
    overrides: Overrides = [],  # noqa: B006  typer copies it
) -> None:
    """Draw pictures or clips, numbered, each with its settings beside it in a .txt and a .json."""
    from burnish.cli.output import Output

    run = _config(config, overrides)
    chosen = _model(run, model, family, audio=audio, first_frame=first_frame)
    prompts = _prompts(run, prompt, prompt_file)
    adapters = [_adapter(text) for text in adapter]
    requests = _requests(
        prompts,
        run,
        negative=negative,
        seed=seed,
        count=count,
        size=_size(size),
        frames=frames,
        references=tuple(reference),
        mask=mask,
        steps=steps,
        guidance=guidance,
        reference_guidance=reference_guidance,
    )
    device = _one_of(
        device or (run.memory.device if run else "auto"), ("auto", "cpu", "cuda", "mps"), "--device"
    )
    precision = _one_of(
        precision or (run.train.precision if run else "bf16"), ("bf16", "fp16", "fp32"), "--precision"
    )

    from burnish.generate import generate_pictures

    with Output() as out:
        if run and not adapters and (found := _finished_adapters(run)):
            options = " ".join(f"--adapter {path}" for path in found)
            out.say(f"note: the model as it is; for what this run learned, add {options}")
        progress = out.progress()
        paths = generate_pictures(
            chosen,
            requests,
            output,
            adapters=adapters,
            memory=run.memory if run else None,
            device=device,
            precision=precision,
            batch_size=batch_size,
            progress=lambda done, total: progress.phase("drawing", done, total),
        )
        out.end_progress()
        out.say(
            f"{len(paths)} {'clip' if paths[0].suffix == '.mp4' else 'picture'}(s): {paths[0]} to {paths[-1].name}"
        )


def _config(reference: str | None, overrides: Sequence[str]) -> RunConfig | None:
    from burnish.config.load import load_config

    if reference is None:
        if overrides:
            raise UserError("--set changes a config, and none is given")
        return None
    return load_config(reference, overrides=overrides).config


def _model(
    run: RunConfig | None, path: str | None, family: str | None, *, audio: bool, first_frame: bool
) -> Model:
    from burnish.config.schema import Model

    if path is None and run is None:
        raise UserError(
            "nothing to draw with", remedy="Give a CONFIG, or --model with a folder, a file or a Hub id."
        )
    chosen = Model(path=path) if path is not None else run.model if run else None
    assert chosen is not None, "one of the two is given"
    update: dict[str, object] = {"family": family} if family else {}
    asked = {"audio": chosen.audio or audio, "first_frame": chosen.first_frame or first_frame}
    return chosen.model_copy(update={**update, **asked})


def _prompts(run: RunConfig | None, texts: Sequence[str], file: Path | None) -> list[PromptLine]:
    """Prompts of the command line and the file; those of the config where there are none.

    Raises:
        UserError: there are none at all, or the file has a line that is no prompt.
    """
    from burnish.sampling.prompts import PromptLine, read_prompts

    prompts = [PromptLine(text, line=0) for text in texts] + (read_prompts(file) if file else [])
    prompts = [replace(prompt, prompt=_filled(prompt.prompt, run)) for prompt in prompts]
    if not prompts and run:
        prompts = [_of_config(entry) for entry in run.sample.prompts]
    if not prompts:
        raise UserError(
            "no prompt", remedy="Give --prompt or --prompt-file, or a config with sample.prompts."
        )
    return prompts


def _of_config(entry: str | SamplePrompt) -> PromptLine:
    from burnish.sampling.prompts import PromptLine

    if isinstance(entry, str):
        return PromptLine(entry, line=0)
    height, width = _pair(entry.size)
    return PromptLine(
        entry.prompt,
        0,
        entry.negative,
        entry.seed,
        height,
        width,
        frames=entry.frames,
        references=tuple(entry.references),
        mask=entry.mask,
    )


def _filled(text: str, run: RunConfig | None) -> str:
    """`[name]` and `[trigger]` as in the config."""
    if run is None:
        return text
    if "[trigger]" in text and run.trigger is None:
        raise UserError(f"the prompt {text!r} uses [trigger], and the config sets no trigger")
    return text.replace("[name]", run.name).replace("[trigger]", run.trigger or "")


def _adapter(text: str) -> tuple[Path, float]:
    """`file.safetensors:0.8` -> (file, 0.8); a path with a drive letter keeps its colon."""
    file, colon, strength = text.rpartition(":")
    try:
        path, scale = (
            (Path(file), float(strength)) if colon and not Path(text).exists() else (Path(text), 1.0)
        )
    except ValueError:
        path, scale = Path(text), 1.0
    if not path.is_file():
        raise UserError(f"no adapter file {path}", remedy="Give --adapter FILE or --adapter FILE:STRENGTH.")
    if not abs(scale) <= 100:
        raise UserError(f"the strength of {path} should be from -100 to 100; got {strength}")
    return path, scale


def _size(text: str | None) -> tuple[int, int] | None:
    """`832x1216` -> (832, 1216), height first; `1024` -> (1024, 1024)."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UserError(f"--size should be HEIGHTxWIDTH such as 832x1216; got {text!r}")
    height, width = int(match[1]), int(match[2] or match[1])
    if not (16 <= height <= 8192 and 16 <= width <= 8192):
        raise UserError(f"--size should be from 16 to 8192 each way; got {height}x{width}")
    return height, width


def _requests(
    prompts: Sequence[PromptLine],
    run: RunConfig | None,
    *,
    negative: str | None,
    seed: int | None,
    count: int,
    size: tuple[int, int] | None,
    frames: int | None,
    references: tuple[Path, ...],
    mask: Path | None,
    steps: int | None,
    guidance: float | None,
    reference_guidance: float | None,
) -> list[PictureRequest]:
    """`count` requests per prompt. The command line wins over the prompt's own settings, those over the config."""
    from burnish.sampling.sampler import PictureRequest

    sample = run.sample if run else None
    first_seed = seed if seed is not None else sample.seed if sample else 0
    height, width = size or _pair(sample.size if sample else None)
    requests = []
    for index, prompt in enumerate(prompts):
        begin = first_seed + index * count if seed is not None or prompt.seed is None else prompt.seed
        request = PictureRequest(
            prompt=prompt.prompt,
            negative=prompt.negative if negative is None else negative,
            height=height if size else prompt.height or height,
            width=width if size else prompt.width or width,
            steps=steps or prompt.steps or (sample.steps if sample else None),
            guidance=_first(guidance, prompt.guidance, sample.guidance if sample else None),
            reference_guidance=_first(reference_guidance, sample.reference_guidance if sample else None),
            frames=frames or prompt.frames or (sample.frames if sample else None),
            references=references or prompt.references,
            mask=mask or prompt.mask,
        )
        requests += [replace(request, seed=begin + number) for number in range(count)]
    return requests


def _first(*values: _Number | None) -> _Number | None:
    """The first that is given; 0 is a value."""
    return next((value for value in values if value is not None), None)


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | tuple[None, None]:
    if size is None:
        return None, None
    return (size, size) if isinstance(size, int) else size


def _one_of(value: str, allowed: tuple[str, ...], option: str) -> str:
    if value not in allowed:
        raise UserError(f"{option} should be {', '.join(allowed)}; got {value!r}")
    return value


def _finished_adapters(run: RunConfig) -> list[Path]:
    """What the run wrote at its end: one file, or one for each of the model's denoisers."""
    folder = run.save.folder / run.name / "adapters"
    files = sorted(folder.glob(f"{glob.escape(run.name)}*.safetensors"))
    return [file for file in files if not re.search(r"-(\d{8}|best)$", file.stem)]
