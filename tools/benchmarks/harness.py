"""What the benchmarks share: a family with random weights, a training step as a run takes it, its time and memory.

Random weights take as long as trained ones and as much room, so nothing has to be fetched.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from burnish.adapters.attached import AdapterSet
from burnish.adapters.casting import cast_once
from burnish.adapters.layer import ModuleChoice
from burnish.adapters.targeting import choose_modules
from burnish.compute.attention import Attention, Call, Kind, recorded
from burnish.compute.attention_choice import choose
from burnish.compute.compile import compile_blocks
from burnish.config.method import Lora
from burnish.config.train import AdamW
from burnish.data.batch import Batch
from burnish.events import Events, Listener
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.hardware import processor_name
from burnish.loop import Training, train_from
from burnish.memory.activations import Mode, activation_modes, set_activations
from burnish.memory.quantized import QuantizedLinear, choose_products
from burnish.memory.streaming import stream_weights, streamed_blocks
from burnish.memory.transfer import transfer_to
from burnish.objective import Denoising
from burnish.optim.build import build_optimizer
from burnish.planner.choose import evaluate
from burnish.planner.measure import Measure
from burnish.planner.rates import card_named
from burnish.planner.recipe import Recipe, Shape
from burnish.planner.skeletons import keep_weights

Activations = Mode | float
ACTIVATIONS: tuple[Mode, ...] = ("recompute", "keep-attention", "keep-matmul", "keep")


@dataclass(frozen=True, slots=True)
class Model:
    """A family in the sizes of its release, or of the folder `path`; at most `depth` repeats of each block."""

    name: str
    dtype: torch.dtype
    depth: int | None = None
    path: Path | None = None
    rank: int = 16

    def skeleton(self, depth: int | None = None) -> Family:
        kind = family_named(self.name)
        depths = [one for one in (depth, self.depth) if one is not None]
        of = None
        if self.path is not None:
            of = kind.load(ModelSource(str(self.path)), frozenset(), dtype=self.dtype, device="cpu")
        return kind.skeleton(min(depths, default=None), of=of, dtype=self.dtype)

    def choices(self, family: Family) -> dict[str, dict[str, ModuleChoice]]:
        method = Lora(rank=self.rank)
        return {
            part: choose_modules(denoiser, family.targets, family.default_targets, method)
            for part, denoiser in family.denoisers.items()
        }


@dataclass(frozen=True, slots=True)
class Settings:
    """Of Burnish's step."""

    weights: str = "native"
    activations: Activations = "keep"
    stream: float = 0.0
    compile: bool = False
    attention: str = "auto"


def objective_of(family: Family) -> Denoising:
    return Denoising(family.schedule, shift=family.schedule.shift, sampler_steps=family.defaults.steps)


def with_random_weights(model: Model, device: torch.device, settings: Settings | None = None) -> Family:
    """The denoiser on a device; layers in fewer bits are made one by one, blocks to be streamed on the host."""
    settings = settings or Settings()
    family = model.skeleton()
    if settings.weights != "native":
        keep_weights(family, settings.weights)
    blocks = family.blocks()
    sizes = [sum(one.numel() * one.element_size() for one in [*b.parameters(), *b.buffers()]) for b in blocks]
    chosen = streamed_blocks(sizes, settings.stream) if settings.stream else []
    away = {module for number in chosen for module in blocks[number].modules()}
    drawn = torch.Generator(device).manual_seed(0)
    on_host = torch.Generator("cpu").manual_seed(0)
    for denoiser in family.denoisers.values():
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in denoiser.modules():
            _fill(module, on_host if module in away else drawn, made)
        choose_products(denoiser, device)
    return family


def _fill(module: nn.Module, generator: torch.Generator, made: dict[nn.Parameter, nn.Parameter]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if parameter not in made:
                made[parameter] = nn.Parameter(_drawn(name, parameter, generator), requires_grad=False)
            module._parameters[name] = made[parameter]
    if isinstance(module, QuantizedLinear):
        shape = (module.out_features, module.in_features)
        weight = _drawn("weight", torch.empty(shape, dtype=module.dtype, device="meta"), generator)
        module.take(*module.kept.pack(weight))
        return
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = _constant(buffer, generator.device)
    for name, value in vars(module).items():  # rotary tables that are no buffers
        if isinstance(value, Tensor):
            setattr(module, name, _constant(value, generator.device))
        elif isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
            kept = [_constant(one, generator.device) if isinstance(one, Tensor) else one for one in value]
            setattr(module, name, type(value)(kept))


def _drawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Weights that keep the size of what passes through them."""
    if like.dim() < 2:
        fill = torch.ones if name.endswith("weight") else torch.zeros
        return fill(like.shape, dtype=like.dtype, device=generator.device)
    tensor = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    return tensor.normal_(std=(like.numel() / like.shape[0]) ** -0.5, generator=generator)


def _constant(tensor: Tensor, device: torch.device) -> Tensor:
    if not tensor.is_meta:
        return tensor.to(device)
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return (torch.zeros if whole else torch.ones)(tensor.shape, dtype=tensor.dtype, device=device)


def batch_of(family: Family, shape: Shape) -> Batch:
    noisy, _, conditioning = family.example(shape.height, shape.width, shape.batch, shape.frames)
    ids = tuple(str(row) for row in range(shape.batch))
    return Batch(noisy, conditioning, torch.ones(shape.batch, device=noisy.device), ids, ids, 0)


def burnish_step(
    model: Model, shape: Shape, settings: Settings, device: torch.device, cache: Path
) -> tuple[Callable[[], None], Attention]:
    """A step of the real loop, put together as `burnish.assembly` does, and the attention to be installed around it."""
    family = with_random_weights(model, device, settings)
    choices = model.choices(family)
    adapters = {
        part: AdapterSet.attach(denoiser, choices[part], dropout=0.0, seed=0)
        for part, denoiser in family.denoisers.items()
    }
    for part, denoiser in family.denoisers.items():
        cast_once(denoiser, list(adapters[part].layers.values()), model.dtype)
    blocks = family.blocks()
    set_activations(blocks, activation_modes(settings.activations, len(blocks)))
    if settings.stream:
        stream_weights(family.denoisers.values(), blocks, settings.stream, transfer_to(device), device)
    batch, objective = batch_of(family, shape), objective_of(family)

    def calls() -> list[Call]:
        found: dict[Kind, Call] = {}
        with torch.no_grad(), recorded(found):
            objective.losses(family, batch, 0)
        return list(found.values())

    attention = choose(settings.attention, calls, device, cache)
    if settings.compile:
        compile_blocks(blocks, lambda text: print(text, file=sys.stderr), cache)
    groups = [group for one in adapters.values() for group in one.parameter_groups(1e-4)]
    parameters = {
        f"{part}.{name}": value
        for part, one in adapters.items()
        for name, value in one.named_parameters().items()
    }
    run = Training(
        family=family,
        objective=objective,
        parameters=parameters,
        optimizer=build_optimizer(AdamW(), groups),
        learning_rate_factor=lambda step: 1.0,
        batches=lambda position: repeat(batch),
        batches_per_epoch=1,
        device=device,
        dtype=model.dtype,
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        seed=0,
        steps=sys.maxsize,
    )
    stream: Iterator[Batch] = repeat(batch)
    events = Events(Listener())

    def step() -> None:
        end = run.step + 1
        train_from(stream, run, events, [], lambda: run.step >= end)

    return step, attention


def predicted_bytes(model: Model, shape: Shape, settings: Settings, *, cuda: bool) -> tuple[int, int]:
    """The planner's peak of the same step on the device, and of it what is there before the step begins."""
    family = model.skeleton()
    modes = activation_modes(settings.activations, len(family.blocks()))
    measure = Measure(model.skeleton, model.choices)

    def keep(mode: Mode, traced: Family) -> None:
        set_activations(traced.blocks(), [mode] * len(traced.blocks()))

    profiles = {
        mode: measure.profile(
            shape,
            Recipe(
                choices={},
                objective=objective_of(family),
                optimizer=partial(build_optimizer, AdamW()),
                kept_as=None if settings.weights == "native" else settings.weights,
                keep_activations=partial(keep, mode),
            ),
            cuda=cuda,
        )
        for mode in set(modes)
    }
    sizes = profiles[modes[0]].weights
    chosen = set(streamed_blocks(sizes, settings.stream)) if settings.stream else set()
    streamed = [number in chosen for number in range(len(modes))]
    choice = evaluate(profiles, settings.weights, modes, streamed, card_named("h200").rates, compiled=False)
    return choice.peak, profiles[modes[0]].resident


def seconds(step: Callable[[], object], steps: int, device: torch.device, *, warm_up: int = 2) -> list[float]:
    """Of each of `steps` steps, after some that build kernels and the optimizer's state."""
    for _ in range(warm_up):
        step()
    taken = []
    for _ in range(steps):
        wait(device)
        began = time.perf_counter()
        step()
        wait(device)
        taken.append(time.perf_counter() - began)
    return taken


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """What a step holds at most: on CUDA all of the device's tensors; on a CPU above what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    level = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back() -> None:
    """Free what the last measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary(taken: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, _, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else (taken[0],) * 3
    return {
        "ms": round(1e3 * statistics.median(taken), 3),
        "ms_low": round(1e3 * low, 3),
        "ms_high": round(1e3 * high, 3),
    }


def parser_for(description: str | None, *, of_a_model: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if of_a_model:
        parser.add_argument("--size", type=int, default=1024, help="pixels, each way")
        parser.add_argument("--frames", type=int, default=1)
        parser.add_argument("--batch", type=int, default=1)
        parser.add_argument("--depth", type=int, help="at most so many repeats of each block")
        parser.add_argument("--rank", type=int, default=16)
        parser.add_argument(
            "--model", type=Path, help="a diffusers folder whose sizes to take, not the release's"
        )
        parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    return parser


def model_of(arguments: argparse.Namespace, family: str) -> Model:
    on_cpu = torch.device(arguments.device).type == "cpu"
    dtype = getattr(torch, arguments.dtype or ("float32" if on_cpu else "bfloat16"))
    return Model(family, dtype, arguments.depth, arguments.model, arguments.rank)


def shape_of(arguments: argparse.Namespace) -> Shape:
    return Shape(arguments.size, arguments.size, arguments.frames, arguments.batch)


def activations_of(text: str) -> Activations:
    return next((mode for mode in ACTIVATIONS if mode == text), None) or float(text)


def tell(device: torch.device, figures: Mapping[str, Any]) -> None:
    """JSON on standard output, with what the figures depend on."""
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    json.dump({**figures, **where}, sys.stdout, indent=1)
    print()
