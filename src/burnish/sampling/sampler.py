"""Pictures and clips from a family: one sampler for all, over diffusers' schedulers.

Three phases, each of which needs one part of the family in memory: prompts are encoded, latents drawn, pictures
decoded. Where a request shows pictures to the model, `with_references` comes after the first and needs the VAE.
With the same weights, seed and settings the latents are those of the family's diffusers pipeline called with
`generator=torch.Generator("cpu").manual_seed(seed)` for each picture.

Shape letters: B batch, C channels, H W height and width of latents.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from burnish.errors import ModelError, UserError
from burnish.family import (
    Conditioning,
    Family,
    NegativePrompt,
    PictureInfo,
    Schedule,
    classifier_free_guidance,
)
from burnish.sampling.references import check_references, mask_pixels, reference_pixels

_log = logging.getLogger(__name__)

WARNING = "warning"  # key of `Image.info` where a picture says what went wrong with it
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Clip:
    """More than one frame, and how many play per second."""

    frames: tuple[Image.Image, ...]
    fps: float


Drawn = Image.Image | Clip


@dataclass(frozen=True)
class PictureRequest:
    """One picture or clip to draw; None leaves a setting to the family's default.

    `guidance` is classifier-free guidance (arXiv 2207.12598) where the family is meant to run with it, else the
    scale that the denoiser embeds. `true_guidance` above 1 adds classifier-free guidance to the latter kind.
    `reference_guidance` is for families whose references guide by themselves; 1 is none.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    true_guidance: float = 1.0
    references: tuple[Path, ...] = ()  # pictures beside the prompt, in the order the model sees them
    mask: Path | None = None  # white where the first reference is to be filled
    reference_guidance: float | None = None


@dataclass(frozen=True)
class EncodedRequest:
    """A request with every setting decided, and its prompts as the denoiser reads them, on the CPU."""

    request: PictureRequest
    size: tuple[int, int]  # height and width in pixels
    frames: int
    steps: int
    scale: float  # of classifier-free guidance; used where `negative` is there
    conditioning: Conditioning
    negative: Conditioning | None
    reference_scale: float = 1.0  # of guidance by references; used where `unseeing` is there
    unseeing: Conditioning | None = None  # the prompt without the references


@torch.no_grad()
def encode_requests(family: Family, requests: Sequence[PictureRequest]) -> list[EncodedRequest]:
    """Decide what requests leave open and encode their prompts; needs the text encoders.

    Each text is encoded once and alone, so that a picture does not depend on what is drawn beside it.

    Raises:
        UserError: a size, a number of frames, or references that the family cannot draw with.
    """
    known: dict[tuple[object, ...], Conditioning] = {}

    def encoded(text: str, request: PictureRequest) -> Conditioning:
        seen = request.references if family.capabilities.prompts_see_references else ()
        key = (type(text), str(text), *((seen, request.height, request.width) if seen else ()))
        if key not in known:
            shown = [reference_pixels(family, seen, _size(request))] if seen else []
            known[key] = family.encode_prompts([text], shown).to("cpu")
        return known[key]

    return [_encoded_request(family, _settled(request, family), encoded) for request in requests]


def _settled(request: PictureRequest, family: Family) -> PictureRequest:
    """Fill what a request leaves open with what the family is meant to run at."""
    height, width = family.defaults.size
    settled = replace(
        request,
        height=height if request.height is None else request.height,
        width=width if request.width is None else request.width,
        steps=family.defaults.steps if request.steps is None else request.steps,
        guidance=family.defaults.guidance if request.guidance is None else request.guidance,
        frames=family.defaults.frames if request.frames is None else request.frames,
        reference_guidance=_reference_guidance(request, family),
    )
    multiple = family.latents.pixel_multiple
    for name, length in (("height", settled.height), ("width", settled.width)):
        if length is None or length < multiple or length % multiple:
            nearest = max(multiple, round((length or 0) / multiple) * multiple)
            raise UserError(
                f"A picture's {name} of {length} is no multiple of {multiple} pixels, as {family.title} needs.",
                remedy=f"Take {nearest}.",
            )
    if settled.steps is None or settled.steps < 1:
        raise UserError(f"A picture takes at least one step; got {settled.steps}.")
    _check_frames(settled.frames, family)
    check_references(family, settled.references, settled.mask)
    return settled


def _reference_guidance(request: PictureRequest, family: Family) -> float | None:
    known = family.defaults.reference_guidance
    if request.reference_guidance is not None and known is None:
        raise UserError(
            f"Guidance by references is asked for, and {family.title} has none.",
            remedy="Take `reference_guidance` out.",
        )
    return known if request.reference_guidance is None else request.reference_guidance


def _check_frames(frames: int | None, family: Family) -> None:
    compression = family.latents.frame_compression
    if frames is None or compression is None:
        if frames not in (None, 1):
            raise UserError(
                f"{frames} frames are asked for, and {family.title} draws still pictures.",
                remedy="Take out frames, or take a video model.",
            )
        return
    if frames < 1 or (frames - 1) % compression:
        lower = max(1, frames - (frames - 1) % compression)
        raise UserError(
            f"{family.title} draws 1 frame and then multiples of {compression}; got {frames}.",
            remedy=f"Take {lower} or {lower + compression}.",
        )


def _encoded_request(
    family: Family, request: PictureRequest, encoded: Callable[[str, PictureRequest], Conditioning]
) -> EncodedRequest:
    steps, frames = request.steps, request.frames
    height, width = _size(request)
    assert steps is not None
    assert frames is not None
    assert request.guidance is not None
    about_picture = family.describe_pictures([PictureInfo.whole(height, width)]).to("cpu")
    if family.capabilities.guidance_embedding:
        about_picture = about_picture.merged({"guidance_B": torch.tensor([request.guidance])})
    scale = request.guidance if family.defaults.negative_prompt else request.true_guidance
    return EncodedRequest(
        request=request,
        size=(height, width),
        frames=frames,
        steps=steps,
        scale=scale,
        conditioning=encoded(request.prompt, request).merged(about_picture),
        negative=encoded(NegativePrompt(request.negative), request).merged(about_picture)
        if scale > family.defaults.guides_above
        else None,
        reference_scale=1.0 if request.reference_guidance is None else request.reference_guidance,
    )


def _size(request: PictureRequest) -> tuple[int, int]:
    """Height and width of a settled request."""
    assert request.height is not None
    assert request.width is not None
    return request.height, request.width


@torch.no_grad()
def with_references(
    family: Family, encoded: Sequence[EncodedRequest], *, device: torch.device | str
) -> list[EncodedRequest]:
    """Add what the denoiser is told about each request's references; needs the VAE where there are any.

    Raises:
        UserError: a picture cannot be read.
    """
    return [_with_references(family, one, device) if one.request.references else one for one in encoded]


def _with_references(family: Family, one: EncodedRequest, device: torch.device | str) -> EncodedRequest:
    pixels = reference_pixels(family, one.request.references, one.size)
    mask = one.request.mask
    shown = family.encode_references(
        [reference[None].to(device) for reference in pixels],
        mask_B1HW=mask_pixels(mask, one.size)[None].to(device) if mask is not None else None,
        frames=one.frames,
    ).to("cpu")
    return replace(
        one,
        conditioning=one.conditioning.merged(shown),
        negative=one.negative.merged(shown) if one.negative is not None else None,
        unseeing=one.conditioning if one.negative is not None and one.reference_scale != 1 else None,
    )


@torch.no_grad()
def draw_latents(
    family: Family,
    encoded: Sequence[EncodedRequest],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Latents (C, H, W), or (C, T, H, W), of each request in order, float32 on the CPU; needs the denoiser.

    Requests of the same size, frames, steps and sizes of references are drawn as one batch, whatever their prompts.

    Args:
        dtype: of the denoiser; the noise is drawn in it, as diffusers does.
        progress: told the steps done and the steps in all; may raise to stop.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, one in enumerate(encoded):
        passes = (one.negative is not None, one.unseeing is not None)
        alike = (one.size, one.frames, one.steps, passes, _fixed_shapes(one.conditioning))
        groups.setdefault(alike, []).append(index)
    total, done = sum(encoded[indices[0]].steps for indices in groups.values()), 0

    drawn: dict[int, Tensor] = {}
    for indices in groups.values():
        steps = encoded[indices[0]].steps

        def step_done(step: int, before: int = done) -> None:
            if progress is not None:
                progress(before + step, total)

        latents_BCHW = _draw_batch(family, [encoded[i] for i in indices], device, dtype, step_done)
        drawn.update(zip(indices, latents_BCHW.float().cpu(), strict=True))
        done += steps
    return [drawn[index] for index in range(len(encoded))]


def _fixed_shapes(conditioning: Conditioning) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes that must agree in a batch: all but those that are padded."""
    names = sorted(name for name in conditioning if not name.startswith(("tokens", "mask")))
    return tuple((name, tuple(conditioning[name].shape[1:])) for name in names)


def _draw_batch(
    family: Family,
    encoded: Sequence[EncodedRequest],
    device: torch.device | str,
    dtype: torch.dtype,
    step_done: Callable[[int], None],
) -> Tensor:
    first = encoded[0]
    generators = [torch.Generator("cpu").manual_seed(one.request.seed) for one in encoded]
    scheduler = make_scheduler(family.schedule)
    shape = family.latents.of(*first.size, first.frames)
    noise = [_noise(family, shape, generator, dtype) for generator in generators]
    # The latents stay in float32 whatever the denoiser computes in: small steps would be lost in bfloat16.
    latents_BCHW = torch.cat(noise).to(device).float()
    _set_timesteps(scheduler, family.schedule, first.steps, family.latents.tokens(shape))
    if not family.schedule.is_flow:
        latents_BCHW = latents_BCHW * scheduler.init_noise_sigma

    negatives = [one.negative for one in encoded if one.negative is not None]
    conditioning = _joined([*negatives, *(one.conditioning for one in encoded)], device, dtype)
    blind = [one.unseeing for one in encoded if one.unseeing is not None]
    unseeing = _joined(blind, device, dtype) if blind else None
    guide, guide_of = family.defaults.guide, family.defaults.guide_of
    if guide_of is not None:
        guide = guide_of(conditioning.rows(slice(-len(encoded), None)))
    scale = _of_rows([one.scale for one in encoded], latents_BCHW)
    reference_scale = _of_rows([one.reference_scale for one in encoded], latents_BCHW)
    # Stochastic schedulers (Euler ancestral, LCM) draw on the CPU from each picture's own generator.
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": generators} if takes_generator else {}

    # Whole steps stay whole in float64, which Apple's GPUs lack.
    time_type = torch.float32 if torch.device(device).type == "mps" else torch.float64
    timesteps = scheduler.timesteps
    for number, timestep in enumerate(timesteps):
        guided = first.negative is not None
        model_input = torch.cat([latents_BCHW] * 2) if guided else latents_BCHW
        if not family.schedule.is_flow:
            model_input = scheduler.scale_model_input(model_input, timestep)
        t_B = torch.full(
            (len(model_input),), float(timestep) / family.schedule.steps, dtype=time_type, device=device
        )
        if family.capabilities.mean_flow:
            until = float(timesteps[number + 1]) if number + 1 < len(timesteps) else 0.0
            until_B = torch.full_like(t_B, until / 1000)
            conditioning = conditioning.merged({"until_B": until_B})
        predicted = family.predict(model_input, t_B, conditioning).float()
        if guided:
            without, with_prompt = predicted.chunk(2)
            predicted = guide(with_prompt, without, scale)
        if unseeing is not None:
            one_each = slice(len(encoded))
            alone = family.predict(model_input[one_each], t_B[one_each], unseeing).float()
            predicted = classifier_free_guidance(predicted, alone, reference_scale)
        latents_BCHW = scheduler.step(predicted, timestep, latents_BCHW, return_dict=False, **options)[0]
        # A second-order scheduler takes several turns per step.
        step_done(first.steps * (number + 1) // len(timesteps))
    return latents_BCHW


def _noise(family: Family, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Of one picture, (1, C, ...), in the order in which the released sampler draws it."""
    if not family.latents.noise_last:
        return torch.randn((1, *shape), generator=generator, dtype=dtype)
    return torch.randn((1, *shape[1:], shape[0]), generator=generator, dtype=dtype).movedim(-1, 1)


def _of_rows(values: Sequence[float], latents: Tensor) -> Tensor:
    """A number for each row of latents (B, ...), to be multiplied with them."""
    return torch.tensor(values, device=latents.device).view(-1, *(1 for _ in latents.shape[1:]))


def _joined(rows: Sequence[Conditioning], device: torch.device | str, dtype: torch.dtype) -> Conditioning:
    """Conditioning of a batch."""
    joined = Conditioning.collate(rows)
    cast = joined.to(device, dtype)
    # A guidance scale such as 3.3 is not to be rounded.
    return cast.merged({"guidance_B": joined["guidance_B"].to(device)}) if "guidance_B" in joined else cast


def make_scheduler(schedule: Schedule) -> Any:
    """The diffusers scheduler that the model came with.

    Raises:
        ModelError: the installed diffusers has no such scheduler.
    """
    name = str(schedule.scheduler.get("_class_name", ""))
    if not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ModelError(
            f"The model asks for the scheduler {name!r}, which diffusers {diffusers.__version__} does not have.",
            remedy="Correct `_class_name` in scheduler/scheduler_config.json, or update diffusers.",
        )
    return getattr(diffusers, name).from_config(dict(schedule.scheduler))


def _set_timesteps(scheduler: Any, schedule: Schedule, steps: int, tokens: int) -> None:
    """Prepare a scheduler for `steps` steps; most flows get the sigmas that FluxPipeline passes."""
    if not schedule.is_flow:
        scheduler.set_timesteps(steps)
        return
    options: dict[str, Any] = {}
    if schedule.sigmas is not None:
        scheduler.set_timesteps(sigmas=list(schedule.sigmas(tokens, steps)))
        scheduler.set_begin_index(0)
        return
    if not isinstance(schedule.shift, float | int):
        options["mu"] = schedule.shift.mu(tokens, steps)
    if schedule.spacing == "linear":
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    elif schedule.spacing == "thousandths":
        options["sigmas"] = np.linspace(1000, 1, steps).astype(np.int64) / 1000
    else:
        options["num_inference_steps"] = steps
    scheduler.set_timesteps(**options)
    scheduler.set_begin_index(0)


@torch.no_grad()
def decode_pictures(family: Family, latents: Sequence[Tensor]) -> list[Drawn]:
    """RGB pictures of latents (C, H, W), or (C, T, H, W), one at a time to bound memory; needs the VAE.

    Latents of more than one frame become a clip. A picture with values that are no numbers is drawn grey there
    and says so in `info["warning"]`.
    """
    return [_drawn(family.decode_latents(one[None])[0], family.defaults.fps) for one in latents]


def _drawn(pixels: Tensor, fps: float) -> Drawn:
    if pixels.dim() == 3:
        return _picture(pixels)
    frames = tuple(_picture(pixels[:, index]) for index in range(pixels.shape[1]))
    return frames[0] if len(frames) == 1 else Clip(frames, fps)


def _picture(pixels_3HW: Tensor) -> Image.Image:
    pixels_3HW = pixels_3HW.float()
    broken = int((~torch.isfinite(pixels_3HW)).any(0).sum())
    share = ((pixels_3HW.nan_to_num(0.0, 0.0, 0.0) + 1) / 2).clamp(0, 1)
    picture = Image.fromarray((share * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    if broken:
        warning = (
            f"{broken} of {pixels_3HW[0].numel()} pixels are not finite; the weights or the adapter are broken, "
            "or the number type is too small for the model (float16 often is: take bf16 or fp32)"
        )
        _log.warning("%s", warning)
        picture.info[WARNING] = warning
    return picture


def draw_pictures(
    family: Family,
    requests: Sequence[PictureRequest],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> list[Drawn]:
    """All phases at once, for a family that has every part loaded."""
    encoded = with_references(family, encode_requests(family, requests), device=device)
    return decode_pictures(
        family, draw_latents(family, encoded, device=device, dtype=dtype, progress=progress)
    )
