"""Pictures and clips from a family: one sampler for all, over diffusers' schedulers.

Three phases, each of which needs one part of the family in memory: prompts are encoded, latents drawn, pictures
decoded. Where a request shows pictures to the model, `with_references` comes after the first and needs the VAE.
With the same weights, seed and settings the latents are those of the family's diffusers pipeline called with
`generator=torch.Generator("cpu").manual_seed(seed)` for each picture.

Shape letters: B batch, C channels, H W height and width of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.errors import UserError
from burnish.family import Family, NegativePrompt
from burnish.latent_shape import PictureInfo
from burnish.noise_schedule import classifier_free_guidance
from burnish.sampling.decoding import Drawn, Latents, decode_pictures
from burnish.sampling.references import check_references, mask_pixels, reference_pixels
from burnish.sampling.stream import Stream

Progress = Callable[[int, int], None]


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
    strength: float = 1.0  # of what trains, while it does


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
) -> list[Latents]:
    """Latents (C, H, W), or (C, T, H, W), of each request in order, float32 on the CPU; needs the denoiser.

    With sound those of a clip and its sound.

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

    drawn: dict[int, Latents] = {}
    for indices in groups.values():
        steps = encoded[indices[0]].steps

        def step_done(step: int, before: int = done) -> None:
            if progress is not None:
                progress(before + step, total)

        streams = _draw_batch(family, [encoded[i] for i in indices], device, dtype, step_done)
        frames, *sound = (stream.cpu() for stream in streams)
        rows = zip(frames, sound[0], strict=True) if sound else frames
        drawn.update(zip(indices, rows, strict=True))
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
) -> list[Tensor]:
    """Latents of the frames, (B, C, ...), and with sound those of the sound."""
    first = encoded[0]
    streams = _streams(family, encoded, device, dtype)
    negatives = [one.negative for one in encoded if one.negative is not None]
    conditioning = _joined([*negatives, *(one.conditioning for one in encoded)], device, dtype)
    blind = [one.unseeing for one in encoded if one.unseeing is not None]
    unseeing = _joined(blind, device, dtype) if blind else None
    guides = [family.defaults.guide for _ in streams]
    if family.defaults.guide_of is not None:
        prompts = conditioning.rows(slice(-len(encoded), None))
        guides = [family.defaults.guide_of(prompts) for _ in streams]
    scales = [stream.of_rows([one.scale for one in encoded]) for stream in streams]
    reference_scales = [stream.of_rows([one.reference_scale for one in encoded]) for stream in streams]

    # Whole steps stay whole in float64, which Apple's GPUs lack.
    time_type = torch.float32 if torch.device(device).type == "mps" else torch.float64
    timesteps = streams[0].scheduler.timesteps
    copies = 1 if first.negative is None else 2
    for number, timestep in enumerate(timesteps):
        inputs = [stream.model_input(timestep, copies) for stream in streams]
        time_B = torch.full((len(inputs[0]),), float(timestep) / family.schedule.steps, dtype=time_type)
        t_B = torch.full_like(time_B, float(time_B[0]), device=device)
        if family.capabilities.mean_flow:
            until = float(timesteps[number + 1]) if number + 1 < len(timesteps) else 0.0
            until_B = torch.full_like(t_B, until / 1000)
            conditioning = conditioning.merged({"until_B": until_B})
        if family.capabilities.picks_by_time:
            conditioning = conditioning.merged({"time_B": time_B})
        predicted = _predicted(family, inputs, t_B, conditioning)
        if copies == 2:
            halves = [one.chunk(2) for one in predicted]
            predicted = [
                guide(with_prompt, without, scale)
                for guide, (without, with_prompt), scale in zip(guides, halves, scales, strict=True)
            ]
        if unseeing is not None:
            one_each = slice(len(encoded))
            alone = _predicted(family, [one[one_each] for one in inputs], t_B[one_each], unseeing)
            pairs = zip(predicted, alone, reference_scales, strict=True)
            predicted = [classifier_free_guidance(seeing, not_, scale) for seeing, not_, scale in pairs]
        for stream, velocity in zip(streams, predicted, strict=True):
            stream.step(velocity, timestep)
        # A second-order scheduler takes several turns per step.
        step_done(first.steps * (number + 1) // len(timesteps))
    return [stream.latents for stream in streams]


def _streams(
    family: Family, encoded: Sequence[EncodedRequest], device: torch.device | str, dtype: torch.dtype
) -> list[Stream]:
    """Noise of the frames, then of clips' sound, from each picture's own generator."""
    first = encoded[0]
    generators = [torch.Generator("cpu").manual_seed(one.request.seed) for one in encoded]
    shape = family.latents.of(*first.size, first.frames)
    noise = [torch.cat([_noise(family, shape, generator, dtype) for generator in generators])]
    if family.defaults.begin is not None:
        noise = [family.defaults.begin(noise[0], Conditioning.collate([one.conditioning for one in encoded]))]
    if family.audio is not None and first.frames > 1:
        sound = (1, *family.audio.shape.of(first.frames / family.defaults.fps))
        rows = [torch.randn(sound, generator=generator, dtype=dtype) for generator in generators]
        noise.append(torch.cat(rows))
    tokens = family.latents.tokens(shape)
    return [Stream(family.schedule, one.to(device), first.steps, tokens, generators) for one in noise]


def _noise(family: Family, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Of one picture, (1, C, ...), in the order in which the released sampler draws it."""
    if not family.latents.noise_last:
        return torch.randn((1, *shape), generator=generator, dtype=dtype)
    return torch.randn((1, *shape[1:], shape[0]), generator=generator, dtype=dtype).movedim(-1, 1)


def _predicted(
    family: Family, inputs: Sequence[Tensor], t_B: Tensor, conditioning: Conditioning
) -> list[Tensor]:
    """What the denoiser says of each stream, float32."""
    if len(inputs) == 1:
        return [family.predict(inputs[0], t_B, conditioning).float()]
    assert family.audio is not None, "only sound makes a second stream"
    return [one.float() for one in family.audio.predict(inputs[0], inputs[1], t_B, conditioning)]


def _joined(rows: Sequence[Conditioning], device: torch.device | str, dtype: torch.dtype) -> Conditioning:
    """Conditioning of a batch."""
    joined = Conditioning.collate(rows)
    cast = joined.to(device, dtype)
    # A guidance scale such as 3.3 is not to be rounded.
    return cast.merged({"guidance_B": joined["guidance_B"].to(device)}) if "guidance_B" in joined else cast


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
