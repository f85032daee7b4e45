"""What no single section can judge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from burnish.config.contrasts import TextSlider
from burnish.config.data import Captions, DataSource, Folder
from burnish.config.document import Document
from burnish.config.method import (
    Adapter,
    Full,
    Lokr,
    Lora,
    TextualInversion,
    Turning,
    Vae,
    Word,
    trains_text,
    word_of,
)
from burnish.config.objective import Objective
from burnish.config.problems import KeyPath, Problem
from burnish.config.schema import RunConfig, SamplePrompt


def cross_checks(config: RunConfig, document: Document) -> list[Problem]:
    """Problems between sections; `config` has its full paths."""
    run_folder = Path(os.path.realpath(config.save.folder / config.name))
    problems = []
    for index, source in enumerate(config.data):
        if source.path is None:
            continue
        pictures = Path(os.path.realpath(source.path))
        if run_folder.is_relative_to(pictures):
            path = ("data", index, "path")
            text = (
                f"the run would write to {run_folder}, inside this folder of pictures {pictures}, "
                "and find its own samples there; set save.folder to a folder elsewhere"
            )
            problems.append(Problem(document.place(path), path, text))
    return [*problems, *(Problem(document.place(path), path, text) for path, text in contradictions(config))]


def contradictions(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    """Options that do not go together: the path of the one to change, and why."""
    if isinstance(config.method, Full):
        yield from _of_full(config, config.method)
    if isinstance(config.method, TextualInversion):
        yield from _of_words_alone(config)
    if isinstance(config.method, Vae):
        yield from _of_vae(config)
    asked = word_of(config.method)
    if asked is not None:
        yield from _of_words(config, asked)
    yield from _of_single_steps(config)
    yield from _of_strengths(config)
    if config.train.objective.guided_target is not None and trains_text(config.method):
        text = "asks for the empty caption as it was encoded before training; train an adapter of the denoiser alone"
        yield ("train", "objective", "guided_target"), text
    for index, source in enumerate(config.data):
        yield from _of_targets(config, index, source)
        yield from _of_sliders(config, index, source)


def _of_full(config: RunConfig, method: Full) -> Iterator[tuple[KeyPath, str]]:
    full = "method.kind: full trains the denoiser's own weights"
    memory = config.memory
    if memory.weights not in ("auto", "native"):
        yield (
            ("memory", "weights"),
            f"{full}, which cannot be {memory.weights}; leave it out, or train an adapter",
        )
    if config.train.precision == "fp16":
        yield ("train", "precision"), f"{full}, which fp16 is too narrow for; use bf16 or fp32"
    if config.model.training_adapter is not None:
        yield ("model", "training_adapter"), f"{full}; a training adapter goes with adapters"
    if method.text_encoders is not None and memory.text_encoder_weights not in ("auto", "native"):
        text = (
            f"{full} and those of text encoders, which cannot be {memory.text_encoder_weights}; leave it out"
        )
        yield ("memory", "text_encoder_weights"), text
    everything = method.targets is None and not method.include and not method.exclude
    if everything and isinstance(memory.stream, float) and memory.stream > 0:
        yield (
            ("memory", "stream"),
            f"{full}, and with all of them none is frozen, which is what can be streamed",
        )
    if config.save.format == "kohya":
        yield (
            ("save", "format"),
            "kohya is a spelling of adapters; whole models are diffusers, comfy, or both: auto",
        )


def _of_words_alone(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    word = "method.kind: textual_inversion trains a few vectors"
    if config.memory.offload_optimizer:
        yield ("memory", "offload_optimizer"), f"{word}: there is nothing to save; take it out"
    if config.save.format != "auto":
        yield (
            ("save", "format"),
            f"{word}, which have one file for all programs; leave it out instead of {config.save.format}",
        )


def _of_words(config: RunConfig, asked: Word) -> Iterator[tuple[KeyPath, str]]:
    if config.memory.gradient_release:
        text = "a word's vectors are kept in length after whole steps, and are too few to save anything; take it out"
        yield ("memory", "gradient_release"), text
    if asked.lengths == "vocabulary" and config.train.optimizer.schedule_free:
        text = (
            f"{config.train.optimizer.kind} keeps an average of the weights of all steps, which lengths cannot be held "
            "of; set lengths: free, or use adamw"
        )
        place = (
            ("method", "lengths") if isinstance(asked, TextualInversion) else ("method", "word", "lengths")
        )
        yield place, text


def _of_vae(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    vae = "method.kind: vae trains the VAE alone"
    memory, model = config.memory, config.model
    if config.train.precision == "fp16":
        yield ("train", "precision"), f"{vae}, which overflows in fp16; use bf16 or fp32"
    if config.train.objective != Objective():
        yield ("train", "objective"), f"{vae}, by the weights of the method section; take it out"
    if config.sample.prompts:
        text = f"{vae}, and no denoiser is loaded to draw with; take them out, and draw with model.vae afterwards"
        yield ("sample", "prompts"), text
    for option, value in (("training_adapter", model.training_adapter), ("base_adapter", model.base_adapter)):
        if value is not None:
            yield ("model", option), f"{vae}; an adapter is of the denoiser, take it out"
    if config.save.format == "kohya":
        yield ("save", "format"), "kohya is a spelling of adapters; a VAE is diffusers, comfy, or both: auto"
    if memory.activations not in ("auto", "keep", "recompute"):
        yield ("memory", "activations"), f"{vae}, which has no blocks to choose among; use keep or recompute"
    for name, usual in (
        ("weights", ("auto", "native")),
        ("stream", ("auto", 0.0)),
        ("offload_activations", ("auto", False)),
        ("compile", ("auto", False)),
        ("attention", ("auto", "torch")),
        ("gradient_release", (False,)),
        ("offload_optimizer", (False,)),
    ):
        if getattr(memory, name) not in usual:
            yield (
                ("memory", name),
                f"{vae}, and this is for denoisers; take it out",
            )
    for index, source in enumerate(config.data):
        if not isinstance(source, Folder):
            yield ("data", index), f"{vae}, which would learn what it drew itself; give folders of pictures"
            continue
        for name in ("references", "masks", "loss_masks", "preserve", "slider", "preference"):
            if getattr(source, name):
                yield ("data", index, name), f"{vae}, on whole pictures; take it out"
        if source.target == "model":
            yield ("data", index, "target"), f"{vae}, on the pictures themselves; take it out"


def _of_targets(config: RunConfig, index: int, source: DataSource) -> Iterator[tuple[KeyPath, str]]:
    """What asks the model as it was before training."""
    asking: list[tuple[str, ...]] = [("target",)] if source.target == "model" else []
    if isinstance(source, Folder):
        if source.loss_masks is not None and source.loss_masks.prior:
            asking.append(("loss_masks", "prior"))
        if source.preserve is not None:
            asking.append(("preserve",))
            if config.trigger is None:
                yield (
                    ("data", index, "preserve"),
                    "takes the trigger's place, and there is no trigger; set trigger",
                )
        if source.preference is not None:
            asking.append(("preference",))
    if source.slider is not None:
        asking.append(("slider",))
    if isinstance(config.method, Full) or trains_text(config.method):
        what = "reads captions otherwise than with text encoders that train"
        if isinstance(config.method, Full):
            what = "full fine-tuning does not keep"
        for place in asking:
            text = f"asks the model as it was before training, which {what}; train an adapter of the denoiser alone"
            yield ("data", index, *place), text


def _of_strengths(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    """Of samples: what trains must have one."""
    if not isinstance(config.method, Full) and not trains_text(config.method):
        return
    for index, prompt in enumerate(config.sample.prompts):
        if isinstance(prompt, SamplePrompt) and prompt.strength != 1:
            text = "is that of an adapter of the denoiser alone, and this run trains something else; leave it out"
            yield ("sample", "prompts", index, "strength"), text


def _of_sliders(config: RunConfig, index: int, source: DataSource) -> Iterator[tuple[KeyPath, str]]:
    """What is used at strengths other than 1 must mean the same at each of them."""
    if source.slider is None:
        return
    place, method = ("data", index, "slider"), config.method
    lengths = isinstance(method, Lora | Lokr) and method.dora
    if isinstance(method, Turning) or lengths:
        what = "dora" if lengths else method.kind
        yield (
            place,
            f"is used at many strengths, which programs count otherwise for {what}; train lora, loha or lokr",
        )
    if config.memory.gradient_release and isinstance(method, Adapter):
        yield place, "learns two directions in one step; leave memory.gradient_release out"
    if isinstance(source, Folder) and isinstance(source.slider, TextSlider) and source.captions != Captions():
        yield (
            ("data", index, "captions"),
            "are not read with a slider from prompts: its target is the caption",
        )


def _of_single_steps(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    """What steps weight by weight, and what asks for the gradients of all."""
    memory, train, optimizer = config.memory, config.train, config.train.optimizer
    for option, is_on in (
        ("gradient_release", memory.gradient_release),
        ("offload_optimizer", memory.offload_optimizer),
    ):
        if is_on and optimizer.together:
            text = f"steps weight by weight, and {optimizer.kind} steps all together; use adamw, adafactor or came"
            yield ("memory", option), text
    if memory.offload_optimizer and optimizer.schedule_free:
        text = (
            f"{optimizer.kind} draws and saves with all of its state at once, which is then not on the device"
        )
        yield ("memory", "offload_optimizer"), text
    if memory.gradient_release and train.accumulate > 1:
        text = (
            f"gradients are gone as soon as a weight has moved, and train.accumulate: {train.accumulate} adds them up; "
            "use a larger train.batch_size"
        )
        yield ("memory", "gradient_release"), text
    if memory.gradient_release and memory.batch_parts not in ("auto", 1):
        text = "each weight moves as soon as its gradient is there, and parts of a batch add theirs up; leave it out"
        yield ("memory", "batch_parts"), text
    if memory.gradient_release and train.precision == "fp16":
        yield (
            ("memory", "gradient_release"),
            "fp16 looks at all gradients before a step; use train.precision: bf16",
        )
