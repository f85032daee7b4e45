"""From the config's `model` section to a family that can be loaded, on a device that is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from burnish.config.schema import Memory, Model
from burnish.errors import MachineError, ModelError, UserError
from burnish.families.noise_schedule import with_zero_terminal_snr
from burnish.families.registry import detect_family, family_named
from burnish.families.sources import user_cache_folder
from burnish.family import Family, ModelSource
from burnish.memory.shrinking import shrink_of
from burnish.memory.streaming import streamed_blocks
from burnish.noise_schedule import Prediction
from burnish.placement import (
    Part,
    Places,
    Shrink,
    Split,
)

EMBEDDED = "demo"  # `model.path` of the model inside the package
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """A family and the weights it is to load."""

    family: type[Family]
    source: ModelSource
    prediction: Prediction | None
    zero_terminal_snr: bool = False
    shrink: Mapping[Part, Shrink] = field(default_factory=dict)  # parts that are kept in fewer bits

    def load(self, *parts: Part, dtype: torch.dtype, device: Places) -> Family:
        """Load the named parts; without any, schedule, shapes and identities are known all the same.

        Raises:
            ModelError: files are missing, damaged or of another family.
            UserError: sound, going on from a first frame, or a schedule down to pure noise is asked of a family
                without.
        """
        family = self.family.load(
            self.source,
            frozenset(parts),
            dtype=dtype,
            device=device,
            prediction=self.prediction,
            shrink=self.shrink,
        )
        if self.source.audio and family.audio is None:
            raise UserError(
                f"model.audio is set, and {self.family.title} makes no sound.", remedy="Take model.audio out."
            )
        if self.source.first_frame and not family.capabilities.first_frame:
            raise UserError(
                f"model.first_frame is set, and this {self.family.title} does not go on from one.",
                remedy="Take model.first_frame out, or use the image-to-video release.",
            )
        if self.zero_terminal_snr:
            family.schedule = with_zero_terminal_snr(family.schedule)
        return family


def choose_model(model: Model, memory: Memory | None = None) -> ChosenModel:
    """Resolve the path, and detect the family where none is named; `memory` says how weights are kept.

    Raises:
        ModelError: no such weights, or of no known family.
        UserError: no such family.
    """
    source = source_of(model)
    family = family_named(model.family) if model.family else detect_family(source)
    shrink = shrink_by_part(memory or Memory())
    return ChosenModel(family, source, model.prediction, model.zero_terminal_snr, shrink)


def known_model(model: Model, dtype: torch.dtype) -> tuple[type[Family], Family, bool]:
    """The family, what is known of the weights without loading any, and whether they are here.

    Raises:
        ModelError: no such weights, and no family is named whose released sizes could stand in.
        UserError: no such family.
    """
    try:
        chosen = choose_model(model)
        return chosen.family, chosen.load(dtype=dtype, device="cpu"), True
    except ModelError:
        if model.family is None or Path(model.path).exists():
            raise
        kind = family_named(model.family)
        return kind, kind.released(source_of(model)), False


def source_of(model: Model) -> ModelSource:
    """What the section asks for, whether it is there or not."""
    path = str(Path(__file__).parent / "demo" / "assets" / "model") if model.path == EMBEDDED else model.path
    return ModelSource(
        path=path,
        vae=model.vae,
        text_encoders=tuple(model.text_encoders),
        revision=model.revision,
        offline=model.offline,
        denoisers=tuple(model.denoisers),
        audio=model.audio,
        first_frame=model.first_frame,
    )


def shrink_by_part(memory: Memory) -> dict[Part, Shrink]:
    """Of the parts whose large layers are kept in fewer bits; what is `auto` and was not planned stays as it is."""
    words: dict[Part, str] = {"denoiser": memory.weights, "text_encoders": memory.text_encoder_weights}
    folder = memory.cache_folder or user_cache_folder()
    chosen = {part: shrink_of(word, folder) for part, word in words.items() if word != "auto"}
    return {part: shrink for part, shrink in chosen.items() if shrink is not None}


def choose_device(wanted: str, precision: str) -> torch.device:
    """The device to work on; `auto` takes a GPU where there is one.

    Raises:
        MachineError: the wanted device is not there.
        UserError: it does not do the wanted precision.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there[wanted]:
        raise MachineError(
            f"memory.device is {wanted}, which torch {torch.__version__} does not find here",
            remedy="`burnish doctor` says what is there; `memory.device: auto` takes the best.",
        )
    if (
        precision == "bf16"
        and wanted == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(
            f"{torch.cuda.get_device_name()} does not compute in bf16",
            remedy="Set train.precision: fp16.",
        )
    return torch.device(wanted)


def places(memory: Memory, device: torch.device) -> Places:
    """Where denoiser and VAE are loaded to: streamed blocks are never on the device together."""
    if memory.stream == "auto" or not memory.stream:
        return device
    return {
        "denoiser": Split(device, partial(streamed_blocks, share=memory.stream)),
        "vae": device,
        "text_encoders": device,
    }
