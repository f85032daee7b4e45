"""Tiny pipelines of the families, one module per group; each says how diffusers' own pipeline is called beside ours.

A module lists its `CASES`. Everything that is checked for every family runs over all of them: `tests/family`,
`tests/parity/test_families_equal_pipelines.py` and `tests/train/test_families_learn.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.families.native import NativeNames
from burnish.family import Family


def as_it_is(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    return latents


@dataclass(frozen=True)
class Case:
    """One tiny pipeline and how to compare with it. Sizes in pixels as (height, width)."""

    family: str  # key of the registry
    build: Callable[[int], DiffusionPipeline]  # seed -> pipeline, fp32, CPU
    call: Mapping[str, Any] = field(
        default_factory=dict
    )  # arguments of the pipeline's call besides the common ones
    told: Callable[[Family], Conditioning] | None = (
        None  # the pictures of `call`, as our side is told of them
    )
    unpack: Callable[[DiffusionPipeline, Tensor], Tensor] = as_it_is  # its latents -> those of our sampler
    size: tuple[int, int] = (64, 96)
    frames: int = 1
    guidance: tuple[float, ...] = (1.0, 4.0)
    guidance_argument: str = "guidance_scale"
    compared_in: str = ""  # the file in tests/parity that compares it, where a prompt alone draws nothing
    negatives: bool = True  # the pipeline takes `negative_prompt`
    loads_adapters: bool = True  # diffusers loads the family's default adapter file
    side: int = 64  # of the square pictures it is trained on
    batched: bool = True  # the pipeline gives each prompt of a batch what it gives it alone
    learns: bool = True  # is trained in `test_families_learn.py`
    native: NativeNames | None = None  # its single file is written by this table
    swapped: tuple[
        str, ...
    ] = ()  # modules whose halves the release stores the other way round, besides the table's
    upstream: str | None = (
        None  # diffusers' function that reads such a file, in `loaders/single_file_utils.py`
    )
    upstream_widths: Mapping[int, int] = field(
        default_factory=dict
    )  # released widths in its code, and our own
    loader_widths: Mapping[str, Mapping[int, int]] = field(
        default_factory=dict
    )  # released widths in the code of diffusers' adapter converters (by name), and those of this pipeline
    vae_epsilon: float | None = None  # under the root of FLUX.2's variance, where it is not the VAE's own
    vae_places_first: bool = False  # FLUX.2's folded channels with the place in the fold outermost
    on_meta: bool = True  # the denoiser computes without weights (its code asks for no real device)
    full_size: tuple[str, ...] = ()  # modules as large as released, whatever the config says
    idle: tuple[str, ...] = ()  # targets that cannot change the output, as released (patterns)
    pipeline: Any = DiffusionPipeline  # the class by which the folder is loaded


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(__path__):
        listed: Mapping[str, Case] = importlib.import_module(f"{__name__}.{module.name}").CASES
        assert not found.keys() & listed.keys()
        found.update(listed)
    return found
