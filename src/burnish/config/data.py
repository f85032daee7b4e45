"""Config of the data sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from burnish.config.contrasts import AnySlider, PictureSlider, Preference, TextSlider
from burnish.config.section import Section, default_kind


class Captions(Section):
    """Where captions are and what happens to them each time a picture is drawn."""

    extension: str = Field(
        ".txt", pattern=r"^\.[A-Za-z0-9_]+$", description="Caption file beside each picture."
    )
    jsonl: Path | None = Field(
        None,
        description='One file for all, a JSON object per line: {"file": "a.png", "caption": "..."}; '
        "used instead of caption files.",
    )
    default: str | None = Field(None, description="Caption of pictures that have none.")
    on_missing: Literal["skip", "error"] = Field(
        "skip", description="What to do with a picture without caption when there is no default."
    )
    prefix: str = Field("", description="Put before every caption; [trigger] is replaced.")
    encoding: Literal["auto", "utf-8"] = Field(
        "auto", description="`auto` also reads UTF-16 and Windows-1252, and notes it; `utf-8` refuses them."
    )
    dropout: float = Field(0.0, ge=0, le=1, description="Share of draws that train on the empty caption.")
    shuffle_tags: bool = Field(False, description="Shuffle the comma-separated tags.")
    keep_tags: int = Field(0, ge=0, description="First tags that stay in place when shuffling.")
    separator: str = Field(",", min_length=1, max_length=8, description="What separates tags.")
    variants: int = Field(
        8, ge=1, le=1000, description="Different shuffles per picture; each is encoded once and cached."
    )

    @model_validator(mode="after")
    def keep_needs_shuffle(self) -> Self:
        if self.keep_tags and not self.shuffle_tags:
            raise ValueError("keep_tags has no effect without shuffle_tags: true")
        return self

    @model_validator(mode="after")
    def options_must_not_exclude_each_other(self) -> Self:
        if self.jsonl is not None and self.extension != ".txt":
            raise ValueError(
                "jsonl and extension exclude each other: captions come from one file or from many"
            )
        if self.default is not None and self.on_missing == "error":
            raise ValueError(
                "default and `on_missing: error` exclude each other: with a default none is missing"
            )
        return self


class _LossMasks(Section):
    """Which part of a picture is learned."""

    outside: float = Field(
        0.0, ge=0, le=1, description="Weight of the loss where a mask is black; where it is white it is 1."
    )
    prior: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Weight of keeping what is black as the model would have drawn it before training; needs an "
        "adapter, and a second pass through the model.",
    )
    normalize: bool = Field(
        False,
        description="Divide by the share that counts, so that a small part is learned as fast as a whole.",
    )


class FolderMasks(_LossMasks):
    """Masks from a folder, of the same name as each picture or clip; grey counts in part."""

    kind: Literal["folder"] = "folder"
    path: Path = Field(description="Folder with the masks.")


class AlphaMasks(_LossMasks):
    """The pictures' own transparency: what is opaque is learned."""

    kind: Literal["alpha"]


AnyLossMasks = Annotated[FolderMasks | AlphaMasks, Field(discriminator="kind"), default_kind("folder")]


class Preserve(Section):
    """Differential output preservation: what the trigger teaches stays off the word for the whole class."""

    word: str = Field(
        min_length=1,
        description="Takes the trigger's place: what it is one of, such as `dog`, `woman`, `painting`.",
    )
    weight: float = Field(1.0, gt=0, le=100, description="Loss weight, as against that of this source.")


class Pictures(Section):
    """What all picture sources share."""

    role: Literal["train", "regularization"] = Field(
        "train", description="`regularization` pictures keep the model as it was; they take no trigger word."
    )
    repeats: int = Field(1, ge=1, le=10000, description="Times each picture is seen per epoch.")
    weight: float = Field(1.0, gt=0, le=100, description="Loss weight of this source.")
    resolutions: list[Annotated[int, Field(ge=64, le=8192)]] = Field(
        [1024], min_length=1, description="Side of a square of the same area; several train at each."
    )
    bucket_step: int = Field(64, ge=8, le=512, description="Bucket sides are multiples of this.")
    max_aspect: float = Field(
        3.0, ge=1, le=16, description="Longer side over shorter side of the widest bucket."
    )
    flip: bool = Field(False, description="Also train on the mirrored picture, half of the time.")
    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")] = Field(
        "#ffffff", description="Colour under transparent parts."
    )
    target: Literal["picture", "model"] = Field(
        "picture",
        description="`model`: at these pictures and captions learn what the model said before training, so that it "
        "stays as it was there; needs an adapter, and a second pass through the model.",
    )


class Folder(Pictures):
    """Pictures, and for video models clips, in a folder and its subfolders."""

    kind: Literal["folder"] = "folder"
    path: Path = Field(description="Folder with pictures or clips.")
    captions: Captions = Field(default_factory=Captions, description="Captions and what happens to them.")
    recursive: bool = Field(True, description="Also look in subfolders.")
    min_side: int = Field(32, ge=1, description="Pictures with a shorter side are skipped and reported.")
    max_megapixels: float = Field(
        150.0, gt=0, le=2000, description="Larger pictures are skipped and reported (decompression bombs)."
    )
    max_skip_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of pictures that may be skipped before the run refuses to start; "
        "one is always allowed.",
    )
    frames: list[Annotated[int, Field(ge=1, le=1025)]] | None = Field(
        None,
        min_length=1,
        description="Frames that are taken from clips; several numbers train at each. If absent as many as the model "
        "draws, or fewer of a shorter clip.",
    )
    fps: float | None = Field(
        None, gt=0, le=240, description="Frames per second that clips are taken at; the family's if absent."
    )
    clips: Literal["start", "middle", "spread", "every"] = Field(
        "start",
        description="Which part of a longer clip: its start, its middle, `spread` parts evenly over it, "
        "or every part, one after the other.",
    )
    spread: int | None = Field(
        None, ge=2, le=1000, description="Parts taken of each clip with `clips: spread`; they may overlap."
    )
    references: list[Path] = Field(
        [],
        max_length=16,
        description="Folders with a picture of the same name for each picture or clip here, which the model is shown "
        "beside the caption; in the order the model sees them.",
    )
    masks: Path | None = Field(
        None,
        description="Folder with a mask of the same name for each picture, white where a model that fills holes "
        "learns to fill. If absent, random holes, or none where the model works without.",
    )
    loss_masks: AnyLossMasks | None = Field(
        None, description="Learn a part of each picture only, of any model; all of it if absent."
    )
    preserve: Preserve | None = Field(
        None,
        description="Draw each picture a second time, its caption with the class word in place of the trigger, towards "
        "what the model said before training; needs `trigger`, an adapter, and a second pass through the model.",
    )
    slider: AnySlider | None = Field(
        None,
        description="Teach a slider, not the pictures: from prompts, at these pictures, whose captions are not read; "
        "or from pairs of pictures. Needs an adapter and further passes through the model.",
    )
    preference: Preference | None = Field(
        None,
        description="Teach that these pictures are preferred to others of the same names; needs an adapter, and a "
        "second pass through the model.",
    )

    @property
    def other_side(self) -> Path | None:
        """The folder with the other picture of each pair."""
        if isinstance(self.slider, PictureSlider):
            return self.slider.opposite
        return self.preference.rejected if self.preference is not None else None

    @property
    def folders_beside(self) -> list[Path]:
        """Of pictures that belong to those here and are none of them."""
        counted = [self.loss_masks.path] if isinstance(self.loss_masks, FolderMasks) else []
        others = [self.other_side] if self.other_side is not None else []
        return [*self.references, *([self.masks] if self.masks else []), *counted, *others]

    @model_validator(mode="after")
    def spread_says_how_often(self) -> Self:
        if self.clips == "spread" and self.spread is None:
            raise ValueError("`clips: spread` needs a number of parts, such as spread: 4")
        if self.clips != "spread" and self.spread is not None:
            raise ValueError("spread has no effect without `clips: spread`")
        return self

    @model_validator(mode="after")
    def preserving_needs_something_taught(self) -> Self:
        if self.preserve is not None and (self.role != "train" or self.target != "picture"):
            raise ValueError("preserve goes with what is taught: role: train and target: picture")
        return self

    @model_validator(mode="after")
    def one_thing_is_taught(self) -> Self:
        taught = [name for name in ("slider", "preference") if getattr(self, name) is not None]
        besides = [name for name in ("loss_masks", "preserve") if getattr(self, name) is not None]
        if taught and (len(taught) > 1 or besides):
            other = (taught[1:] + besides)[0]
            raise ValueError(f"{taught[0]} and {other} do not go together; give each a source of its own")
        if taught and (self.role != "train" or self.target != "picture"):
            raise ValueError(f"{taught[0]} goes with what is taught: role: train and target: picture")
        return self


class Generated(Pictures):
    """Pictures that the base model draws before training, to keep it as it was (prior preservation)."""

    kind: Literal["generated"]
    role: Literal["train", "regularization"] = Field(
        "regularization",
        description="`regularization` keeps the model as it was; `train` teaches them, as a slider always does.",
    )
    prompts: list[str] = Field(
        [],
        description="What to draw; used in turn. The prompts of the slider, if there is one and none are said.",
    )
    count: int = Field(48, ge=1, le=100000, description="How many pictures.")
    path: Path | None = Field(
        None,
        description="Folder with pictures of the class that are there already: they are used, only what they lack of "
        "`count` is drawn, and nothing is written there. Without captions of their own, the first prompt is theirs.",
    )
    steps: int | None = Field(
        None, ge=1, le=1000, description="Denoising steps; the family's default if absent."
    )
    guidance: float | None = Field(
        None, ge=0, le=50, description="Guidance scale; the family's default if absent."
    )
    batch_size: int = Field(4, ge=1, le=256, description="Pictures drawn at once.")
    seed: int = Field(0, ge=0, description="Seed of the first picture; each further picture takes the next.")
    slider: TextSlider | None = Field(
        None,
        description="Teach a slider from prompts at these pictures. Needs an adapter and further passes through the "
        "model.",
    )

    @model_validator(mode="before")
    @classmethod
    def a_slider_is_taught(cls, values: Any) -> Any:
        """Where it says neither, at pictures of its own prompts."""
        if not isinstance(values, dict) or values.get("slider") is None:
            return values
        slider = values["slider"]
        told = slider if isinstance(slider, dict) else dict(slider)
        prompts = [told[name] for name in ("target", "positive", "negative") if name in told]
        return {"role": "train", "prompts": prompts, **values}

    @model_validator(mode="after")
    def something_is_drawn(self) -> Self:
        if not self.prompts:
            raise ValueError("prompts must say what to draw")
        if self.slider is not None and (self.role != "train" or self.target != "picture"):
            raise ValueError("slider goes with what is taught: role: train and target: picture")
        return self


DataSource = Annotated[Folder | Generated, Field(discriminator="kind"), default_kind("folder")]
