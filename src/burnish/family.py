"""What a model family answers. The types at its border that say more than one line have modules of their own.

A family answers questions. It never draws noise, never computes a loss, never writes a file of the user's.

Shape letters: B batch, C channels, T frames, H W height and width (of pixels or of latents, as said), S tokens,
D width. A video family works on pixels (B, 3, T, H, W) and latents (B, C, T, H, W); a picture is a clip of one frame.
Conventions: data at t = 0, noise at t = 1; pixels in [-1, 1]; sizes in pixels as (height, width).
A flow family mixes x_t = (1 - t) * data + t * noise and predicts velocity = noise - data. An older family mixes
x_t = sqrt(alpha_bar) * data + sqrt(1 - alpha_bar) * noise at index t * steps (1000, as a rule) and predicts epsilon
or v.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.latent_shape import AudioShape, LatentShape, PictureInfo
from burnish.noise_schedule import Prediction, SamplerDefaults, Schedule
from burnish.placement import DENOISER, Part, Places, Shrink


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
