"""What a model family answers, and the types at its border.

A family answers questions. It never draws noise, never computes a loss, never writes a file of the user's.

Shape letters: B batch, C channels, T frames, H W height and width (of pixels or of latents, as said), S tokens,
D width. A video family works on pixels (B, 3, T, H, W) and latents (B, C, T, H, W); a picture is a clip of one frame.
Conventions: data at t = 0, noise at t = 1; pixels in [-1, 1]; sizes in pixels as (height, width).
A flow family mixes x_t = (1 - t) * data + t * noise and predicts velocity = noise - data. An older family mixes
x_t = sqrt(alpha_bar) * data + sqrt(1 - alpha_bar) * noise at index t * steps (1000, as a rule) and predicts epsilon
or v.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys

Prediction = Literal["velocity", "epsilon", "v"]
Part = Literal["denoiser", "vae", "text_encoders"]
DENOISER: frozenset[Part] = frozenset({"denoiser"})
Device = torch.device | str


@dataclass(frozen=True, slots=True)
class Split:
    """A denoiser on a device but for some of its blocks, which stay in host memory as soon as they are read."""

    device: Device
    away: Callable[[Sequence[int]], Sequence[int]]  # bytes of each block -> numbers of those that stay


Place = Device | Split
Places = Place | Mapping[Part, Place]  # one for all parts, or one for each that is loaded


def place_of(part: Part, places: Places) -> Place:
    return places[part] if isinstance(places, Mapping) else places


def device_of(place: Place) -> Device:
    return place.device if isinstance(place, Split) else place


@dataclass(frozen=True, slots=True)
class PictureInfo:
    """How a training picture came about, in pixels as (height, width); SDXL is told these."""

    original: tuple[int, int]
    crop: tuple[int, int]  # top and left of the crop, in the resized picture
    target: tuple[int, int]  # what the VAE saw

    @classmethod
    def whole(cls, height: int, width: int) -> PictureInfo:
        """For generation: as if the picture had this size from the start."""
        return cls((height, width), (0, 0), (height, width))


@dataclass(frozen=True, slots=True)
class LatentShape:
    """How pixels become latents."""

    channels: int
    compression: int  # pixels per latent, each way
    patch: int = 1  # latents per token, each way
    frame_compression: int | None = None  # frames per latent frame after the first; None: no time axis
    noise_last: bool = False  # the released sampler draws noise place by place, channels innermost
    token_multiple: int = 1  # a height and a width must be so many tokens, or a multiple

    @property
    def pixel_multiple(self) -> int:
        """Heights and widths must be multiples of this."""
        return self.compression * self.patch * self.token_multiple

    def of(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(C, H, W) of the latents of a picture, (C, T, H, W) where the family has a time axis.

        Raises:
            ValueError: so many frames are not wholly encoded, or there is no time axis for them.
        """
        size = (height // self.compression, width // self.compression)
        if self.frame_compression is None:
            if frames != 1:
                raise ValueError(f"{frames} frames for a family of still pictures")
            return self.channels, *size
        if frames < 1 or (frames - 1) % self.frame_compression:
            raise ValueError(
                f"{frames} frames; the VAE takes 1 and then multiples of {self.frame_compression}"
            )
        return self.channels, (frames - 1) // self.frame_compression + 1, *size

    def tokens(self, latents: Sequence[int]) -> int:
        """Tokens that the denoiser makes of latents of this shape, (..., H, W) or (..., T, H, W)."""
        *_, height, width = latents
        frames = 1 if self.frame_compression is None else latents[-3]
        return frames * (height // self.patch) * (width // self.patch)


@dataclass(frozen=True, slots=True)
class AudioShape:
    """How the sound of a clip, a stereo waveform, becomes latents (C, L, F): channels, moments, bands of frequency."""

    channels: int
    bands: int
    per_second: float  # moments
    sample_rate: int  # of the waveform that is encoded, per second
    decoded_rate: int  # of the waveform that comes back

    def of(self, seconds: float) -> tuple[int, int, int]:
        """(C, L, F) of a clip that is shown for so long."""
        return self.channels, round(seconds * self.per_second), self.bands


class TokenShift(Protocol):
    """A timestep shift that depends on the number of tokens, and for some models on the number of steps."""

    def mu(self, tokens: int, steps: int) -> float:
        """What diffusers' scheduler calls mu."""
        ...

    def factor(self, tokens: int, steps: int) -> float:
        """The shift s of t -> s t / (1 + (s - 1) t) that this comes to."""
        ...


@dataclass(frozen=True, slots=True)
class ResolutionShift:
    """Timestep shift that grows with the number of tokens: mu linear in tokens, the shift exp(mu) or mu itself.

    Stable Diffusion 3 paper (arXiv 2403.03206), section 5.3.2; constants as released with each model.
    """

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    exponential: bool = True

    def mu(self, tokens: int, steps: int = 0) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (tokens - self.base_tokens)

    def factor(self, tokens: int, steps: int = 0) -> float:
        mu = self.mu(tokens, steps)
        return exp(mu) if self.exponential else mu


@dataclass(frozen=True, slots=True)
class Schedule:
    """How noise is mixed in, what the denoiser predicts, and how the released model samples."""

    prediction: Prediction
    scheduler: Mapping[str, Any]  # diffusers scheduler config, `_class_name` included
    alphas_cumprod: Tensor | None = None  # (steps,) float64 for epsilon and v; None for a flow
    shift: float | TokenShift = 1.0  # timestep shift of a flow, as released
    # Sigmas of a flow before the shift: 1 to 1/steps; 1 to 1/1000 in whole thousandths; or the scheduler's own.
    spacing: Literal["linear", "thousandths", "scheduler"] = "linear"
    # In place of both in sampling: tokens and steps -> sigmas as they come after the shift.
    sigmas: Callable[[int, int], Sequence[float]] | None = None
    times: tuple[float, float] = (0.0, 1.0)  # those that the loaded denoisers are for; training keeps to them

    @property
    def is_flow(self) -> bool:
        return self.alphas_cumprod is None

    @property
    def steps(self) -> int:
        """Steps of the noise schedule: what a scheduler's timestep is divided by to give t."""
        return 1000 if self.alphas_cumprod is None else len(self.alphas_cumprod)


Guide = Callable[[Tensor, Tensor, Tensor], Tensor]


def classifier_free_guidance(with_prompt: Tensor, without: Tensor, scale: Tensor) -> Tensor:
    """arXiv 2207.12598, as diffusers writes it: a scale of 1 is no guidance. `scale` broadcasts over the batch."""
    return without + scale * (with_prompt - without)


@dataclass(frozen=True, slots=True)
class SamplerDefaults:
    steps: int
    guidance: float  # classifier-free guidance, or the embedded guidance where the model has one
    size: tuple[int, int]
    negative_prompt: bool  # classifier-free guidance is how this model is meant to run
    frames: int = 1
    fps: float = 0.0  # of clips; 0 for still pictures
    guide: Guide = classifier_free_guidance
    guides_above: float = 1.0  # scales up to this one take no second pass
    # In place of `guide`: what the prompts say -> the rule of one run, which may remember its steps.
    guide_of: Callable[[Conditioning], Guide] | None = None
    # In place of plain noise: noise (B, C, ...) and what the denoiser is told -> the latents that drawing begins with.
    begin: Callable[[Tensor, Conditioning], Tensor] | None = None
    # With guidance and references: by how much these guide, too, counted by the usual rule from a third pass with the
    # prompt and without them. None: there is no such pass.
    reference_guidance: float | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    guidance_embedding: bool = False  # reads conditioning["guidance_B"]; absent means: bypass the embedding
    references: int = 0  # pictures beside the prompt that it can follow, at most; 0 for none
    prompts_see_references: bool = False  # `encode_prompts` must be given the references
    masks: bool = False  # fills holes: the first reference is the picture, a mask says where
    first_frame: bool = False  # the first reference is the clip's first frame
    last_frame: bool = False  # the second reference is its last frame, without which it does not draw
    video: bool = False
    audio: bool = False  # can be loaded with the sound of clips (`ModelSource.audio`)
    mean_flow: bool = (
        False  # reads conditioning["until_B"], the time a step goes to; absent means: the velocity here
    )
    picks_by_time: bool = (
        False  # of several denoisers, by conditioning["time_B"] on the CPU; absent means: by t_B
    )

    @property
    def own_references(self) -> int:
        """So many of the first references are the sample itself while training, and of its size: what is to be filled,
        or its first and last frames."""
        return int(self.masks or self.first_frame) + int(self.last_frame)


@dataclass(frozen=True, slots=True)
class TargetSet:
    """Names a set of linear and conv modules by `fnmatch` patterns over module names of the denoiser."""

    patterns: tuple[str, ...]
    description: str
    audio: tuple[str, ...] = ()  # those that belong to it, too, where sound is trained with the frames

    def with_audio(self) -> TargetSet:
        return replace(self, patterns=self.patterns + self.audio, audio=())


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the weights are. `path` is a diffusers folder, a .safetensors file, or a Hub id `owner/name`.

    `vae` and `text_encoders` name separate files for checkpoints that hold the denoiser alone (ComfyUI). `denoisers`
    names those to load of a model with several, all if empty; of a single file, the one that it holds. `audio` asks
    for the sound beside the frames, `first_frame` for clips that go on from one, of families that can do either.
    """

    path: str
    vae: Path | None = None
    text_encoders: tuple[Path, ...] = ()
    revision: str | None = None
    offline: bool = False
    denoisers: tuple[str, ...] = ()
    audio: bool = False
    first_frame: bool = False


class NegativePrompt(str):
    """A prompt of what to keep away from.

    Families that put an instruction in front of captions are released without it there, and for the empty caption.
    """

    __slots__ = ()


class Audio(Protocol):
    """What a family answers about the sound of clips, where it was loaded to draw it with the frames.

    Latents are (B, C, L, F), in the scale that the denoiser sees; waveforms (B, 2, samples) in [-1, 1].
    """

    @property
    def shape(self) -> AudioShape: ...

    def encode(self, waveform_B2N: Tensor) -> Tensor:
        """A waveform at `shape.sample_rate` -> latents, the posterior's mode, of `shape.of` its duration."""
        ...

    def decode(self, latents_BCLF: Tensor) -> Tensor:
        """Latents -> a waveform at `shape.decoded_rate`, not clamped."""
        ...

    def predict(
        self, noisy: Tensor, noisy_audio: Tensor, t_B: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """As the family's `predict`, of frames and sound that see each other; both are at the same times."""
        ...


class Vocabulary(Protocol):
    """The words of a loaded text encoder, to which others can be added."""

    @property
    def vectors(self) -> Tensor:
        """(V, D): those of the words it was released with, which stay as they are."""
        ...

    def numbers(self, text: str) -> list[int]:
        """The rows of `vectors` that a text is read as, without marks of begin and end."""
        ...

    def knows(self, word: str) -> bool:
        """Whether it is one of the words already."""
        ...

    def add(self, word: str, vectors_ND: nn.Parameter) -> None:
        """From now on `word` in a prompt is read as these vectors in a row, and gradients reach them.

        Raises:
            ValueError: it is a word already.
        """
        ...


class Shrinking(Protocol):
    """One module while it loads, some of its layers in a smaller format."""

    @property
    def weights(self) -> Collection[str]:
        """Names of the weights that it took over, as in the module's state before."""
        ...

    @property
    def waiting(self) -> Collection[str]:
        """Those that are to be given to `take`; the others are there already."""
        ...

    def take(self, weight_name: str, weight: Tensor, scales: Tensor | None = None) -> None:
        """Keep a weight, which is on the device, in the smaller format. Several threads may do so at a time.

        `scales` are what the numbers of one in 8 bits are to be multiplied with, in its shape.
        """
        ...


class Shrink(Protocol):
    """How the large linear layers of a part are kept in fewer bits (`memory/shrinking.py`)."""

    @property
    def name(self) -> str:
        """Changes with the numbers that come out."""
        ...

    def begin(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module] | None,
        content: Callable[[Collection[str]], str],
        *,
        spared: Sequence[str],
        dtype: torch.dtype,
        device: Device,
        away: tuple[str, ...],
    ) -> Shrinking:
        """Replace layers of a module that has no weights yet (meta device).

        Args:
            blocks: where the layers are; None of a module whose blocks no family names.
            content: names of weights -> hash of what they are made from.
            spared: patterns of weights that are to stay as they are.
            dtype: the number type of the run.
            device: where weights arrive.
            away: beginnings of the names of those that then stay in host memory.
        """
        ...


class Family(Protocol):
    """One model architecture, its parts loaded or not. See docs/add-a-family.md."""

    name: ClassVar[str]  # key in YAML: `model.family: sdxl`
    title: ClassVar[str]
    capabilities: Capabilities
    targets: ClassVar[Mapping[str, TargetSet]]  # always `attention`, `attention+mlp`, `all`
    default_targets: ClassVar[str]
    export: ExportKeys
    defaults: SamplerDefaults
    latents: LatentShape
    schedule: Schedule
    audio: Audio | None  # None: the family draws frames alone, or was not asked for more

    @classmethod
    def detect(cls, source: ModelSource) -> bool:
        """Whether these weights are of this family, from names and shapes alone; loads no weights."""
        ...

    @classmethod
    def load(
        cls,
        source: ModelSource,
        parts: frozenset[Part],
        *,
        dtype: torch.dtype,
        device: Places,
        prediction: Prediction | None = None,
        shrink: Mapping[Part, Shrink] | None = None,
    ) -> Self:
        """Load the named parts, frozen and in eval mode; schedule and shapes are known whatever the parts.

        `shrink` says of denoiser and text encoders how they are kept in fewer bits, where they are; the identity of
        the text encoders depends on it, that of the denoiser does not.

        Raises:
            ModelError: files are missing, damaged or of another family.
        """
        ...

    @classmethod
    def skeleton(
        cls,
        depth: int | None = None,
        *,
        parts: frozenset[Part] = DENOISER,
        of: Self | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """Modules without weights (meta device): what can be asked, traced and measured without loading anything.

        Args:
            depth: at most so many repeats of each of the denoiser's blocks; all if None.
            of: a family from weights on disk, whose widths and depths these are; the released ones if None.
        """
        ...

    @classmethod
    def released(cls, source: ModelSource) -> Self:
        """The model as released where the weights of `source` are not here, no part of it loaded: of the size that the
        source's Hub id tells, and for what the source asks of it."""
        ...

    @classmethod
    def releases(cls) -> Mapping[str, Self]:
        """By title, releases that take other data than the one of `skeleton`; no part of them is loaded."""
        ...

    def example(
        self, height: int, width: int, batch: int, frames: int = 1
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """Noisy latents, times and conditioning of the right shapes and dtypes for the loaded denoiser."""
        ...

    @property
    def denoisers(self) -> Mapping[str, nn.Module]:
        """By part name, as diffusers spells it (`unet`, `transformer`); empty where not loaded."""
        ...

    @property
    def loaded(self) -> Mapping[str, nn.Module]:
        """Every module of the parts that are there, by name."""
        ...

    def config(self, part: str) -> Mapping[str, Any]:
        """The denoiser's config as diffusers' config.json has it."""
        ...

    @classmethod
    def stored(cls, source: ModelSource) -> Mapping[str, Callable[[], Tensor]]:
        """The first denoiser's tensors as they lie in weights on disk, by the module's names, each read when asked for.

        Raises:
            ModelError: the weights are damaged or of another family.
        """
        ...

    def identity(self, part: Part) -> str:
        """Hash of the weights and settings behind a part; the cache's key depends on it (law L3)."""
        ...

    def release(self, part: Part) -> None:
        """Drop a part so that its memory can be used."""
        ...

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """What the denoiser is told about captions; text beyond `prompt_limit` tokens is cut off.

        A prompt can be a `NegativePrompt`, to which few families answer otherwise than to a caption.
        `references`, one list per prompt of pictures (3, H, W) in [-1, 1], are given where the capabilities say
        that prompts see them; other families ignore them.
        """
        ...

    @property
    def vocabularies(self) -> Mapping[str, Vocabulary]:
        """Of the loaded text encoders that can be taught words, by the names that embedding files give them (`clip_l`);
        `encode_prompts` then passes gradients through. Empty for a family that takes no words.
        """
        ...

    @property
    def prompt_limit(self) -> int:
        """Tokens of a prompt that are read, special ones included."""
        ...

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, special ones included, as if nothing were cut off; needs the text encoders."""
        ...

    def describe_pictures(self, pictures: Sequence[PictureInfo]) -> Conditioning:
        """Conditioning that depends on the picture rather than the caption; empty for most families."""
        ...

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        """The size in pixels at which a reference of `height` x `width` is taken, for a target of that size."""
        ...

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        """What the denoiser is told about pictures besides latents; needs the VAE. Empty for most families.

        Args:
            references: each (B, 3, H, W) in [-1, 1], of `reference_size`. Where the family fills holes the first is
                the picture with the hole, where it goes on from a first frame that frame, and where it goes to a last
                one that behind it; all of the target's size.
            mask_B1HW: 1 where the picture is to be filled, of the target's size.
            frames: of the target.
        """
        ...

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), with a time axis (B, 3, T, H, W) for video, in [-1, 1] -> latents in the scale that
        the denoiser sees: the posterior's mode, not a sample."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents in the scale the denoiser sees -> pixels, shaped as those of `encode_pixels`, not clamped."""
        ...

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """What `schedule.prediction` names, in the shape of `noisy`, at times `t_B` in [0, 1].

        A family with several denoisers picks by time, row by row.
        """
        ...

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in forward order: what is compiled, checkpointed and offloaded."""
        ...
