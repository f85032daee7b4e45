"""What every family that is a diffusers pipeline does alike: its parts found, loaded one by one, named and let go.

A family is a subclass, one level deep, that lists its `slots` (the modules of the pipeline) and answers what is its
own: prompts, prediction, blocks, schedule. The shipped configs in `configs/NAME.json` map the folder of each slot,
and `scheduler`, to its released config; single files take theirs from there, adjusted by the shapes of the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from burnish.errors import ModelError
from burnish.families import autoencoder
from burnish.families.fingerprints import fingerprint
from burnish.families.sources import (
    files_behind,
    index_file,
    locate,
    locate_parts,
    read_header,
    read_json,
    separate_file,
    weight_files,
)
from burnish.families.weights import Layout, Piece, layout_of, load_module
from burnish.family import (
    Capabilities,
    Conditioning,
    ExportKeys,
    LatentShape,
    ModelSource,
    Part,
    PictureInfo,
    Prediction,
    ResolutionShift,
    SamplerDefaults,
    Schedule,
    TargetSet,
)
from burnish.randomness import torch_generator

ENCODING_VERSION = 1  # raise when encoding gives other numbers for the same weights: caches then start anew
PARTS: tuple[Part, ...] = ("denoiser", "vae", "text_encoders")

Config = Mapping[str, Any]
Module = TypeVar("Module", bound=nn.Module)
Spacing = Literal["linear", "thousandths", "scheduler"]


def same_config(shipped: Config, layout: Layout) -> dict[str, Any]:
    """For modules whose released config holds for every single file."""
    return dict(shipped)


def not_in_files(layout: Layout) -> Layout | None:
    """For modules that no single file holds."""
    return None


def as_named(layout: Layout) -> Layout:
    return layout


@dataclass(frozen=True, slots=True)
class Slot:
    """One module of a pipeline: its folder, how it is made, and how it is found in single files.

    `find` gives the module's layout under its own names out of a file's, or None where the file does not hold it.
    `tidy` brings the names in a diffusers folder to those of the installed library, where releases are older.
    """

    folder: str
    part: Part
    make: Callable[[dict[str, Any]], nn.Module]
    find: Callable[[Layout], Layout | None] = not_in_files
    config_of: Callable[[Config, Layout], dict[str, Any]] = same_config
    tidy: Callable[[Layout], Layout] = as_named
    tokenizer: str | None = None  # its folder
    load_tokenizer: Callable[[Path], PreTrainedTokenizerBase] | None = None
    ship_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
    tokenizer_in_file: Callable[[Layout], PreTrainedTokenizerBase | None] = lambda layout: None
    unused: tuple[str, ...] = ()
    keep_float32: Callable[[torch.dtype], tuple[str, ...]] = lambda dtype: ()
    optional: bool = False  # a pipeline may come without it
    kinds: tuple[str, ...] = ()  # its classes in model_index.json, where several slots share a folder
    shipped: str = ""  # its key in the shipped configs, where that is not its folder
    listed_under: Part | None = None  # where the config names its separate file, where not under its part
    file_hint: str = ""  # what the separate file is called in the wild, for messages


@cache
def shipped_configs(family: str) -> dict[str, Any]:
    """The released configs of every module of a family, and of its scheduler."""
    text = files("burnish.families").joinpath("configs", f"{family}.json").read_text(encoding="utf-8")
    configs: dict[str, Any] = json.loads(text)
    return configs


@dataclass
class PipelineSource:
    """The weights of one model on disk: a diffusers folder, or a single file with others beside it.

    Raises (any method):
        ModelError: files are missing, damaged or of another kind.
    """

    source: ModelSource
    slots: Sequence[Slot]
    shipped: Config
    title: str
    parts: frozenset[Part] = frozenset()
    _layouts: dict[str, Layout] = field(default_factory=dict)

    def folders(self, part: Part) -> tuple[str, ...]:
        slots = [slot for slot in self.slots if slot.part == part]
        return tuple(f for slot in slots for f in (slot.folder, slot.tokenizer) if f and self.has(slot))

    @cached_property
    def path(self) -> Path:
        slots = [s for s in self.slots if s.part != "denoiser" or self._is_chosen(s)]
        wanted = [f for s in slots if s.part in self.parts for f in (s.folder, s.tokenizer) if f]
        return locate_parts(self.source, wanted)

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json of a diffusers folder, or what a modular pipeline has in its place; empty for a file."""
        path = locate(self.source)
        return read_json(index_file(path)) if path.is_dir() else {}

    def has(self, slot: Slot) -> bool:
        """Whether the model comes with this module."""
        if slot.part == "denoiser" and not self._is_chosen(slot):
            return False
        if slot.part == "denoiser" and self.source.denoisers:
            return True
        if not slot.optional:
            return True
        if self.index:
            library, kind = (*self.index.get(slot.folder, ()), None, None)[:2]
            return library is not None and (not slot.kinds or kind in slot.kinds)
        return any(slot.find(layout) is not None for layout in self._candidates(slot))

    def _is_chosen(self, slot: Slot) -> bool:
        return not self.source.denoisers or slot.folder in self.source.denoisers

    def is_apart(self, slot: Slot) -> bool:
        """Whether the module comes from a separate file that the config names."""
        if slot.listed_under is not None and self.index:
            return False
        return (slot.part == "vae" and self.source.vae is not None) or (
            slot.part == "text_encoders" and bool(self.source.text_encoders)
        )

    def _in_folder(self, slot: Slot) -> bool:
        return bool(self.index) and not self.is_apart(slot)

    def _candidates(self, slot: Slot) -> list[Layout]:
        part = slot.listed_under or slot.part
        if part == "vae" and self.source.vae is not None:
            return [_layout_of_file(separate_file(self.source.vae))]
        if part == "text_encoders" and self.source.text_encoders:
            return [_layout_of_file(separate_file(file)) for file in self.source.text_encoders]
        return [_layout_of_file(self.path)]

    def layout(self, slot: Slot) -> Layout:
        """Where the weights of a module lie, under the module's own names."""
        if slot.folder not in self._layouts:
            self._layouts[slot.folder] = self._find(slot)
        return self._layouts[slot.folder]

    def _find(self, slot: Slot) -> Layout:
        if self._in_folder(slot):
            return slot.tidy(layout_of(weight_files(self.path / slot.folder)))
        # A single file holds one denoiser; of several that are built alike, the first slot knows its names.
        find = (
            next(s.find for s in self.slots if s.part == "denoiser") if slot.part == "denoiser" else slot.find
        )
        for layout in self._candidates(slot):
            found = find(layout)
            if found is not None:
                return found
        what = slot.folder.replace("_", " ")
        where = {"denoiser": "model.path", "vae": "model.vae", "text_encoders": "model.text_encoders"}[
            slot.listed_under or slot.part
        ]
        hint = f" ({slot.file_hint})" if slot.file_hint else ""
        searched = sorted({str(p.file) for layout in self._candidates(slot) for p in layout.values()})
        raise ModelError(
            f"{', '.join(searched) or self.path} holds no {what} of {self.title}.",
            remedy=f"Name its file{hint} under `{where}` in the config.",
        )

    def config(self, slot: Slot) -> dict[str, Any]:
        """The module's config: beside the weights in a folder, else the released one adjusted by shapes."""
        if self._in_folder(slot):
            return read_json(self.path / slot.folder / "config.json")
        shipped = self.shipped[slot.shipped or slot.folder]
        try:
            return slot.config_of(shipped, self.layout(slot))
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"The {slot.folder} of {self.path} is not that of {self.title}: it lacks {error}.",
                remedy="Is the file complete, and of this family? Fetch it again, or leave `model.family` out.",
            ) from error

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        beside = locate(self.source) / "scheduler" / "scheduler_config.json"
        return read_json(beside) if beside.is_file() else dict(self.shipped["scheduler"])

    def load(self, slot: Slot, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        config = self.config(slot)
        return load_module(
            lambda: slot.make(config),
            self.layout(slot),
            dtype=autoencoder.safe_dtype(config, dtype) if slot.part == "vae" else dtype,
            device=device,
            what=f"{slot.folder.replace('_', ' ')} of {self.title}",
            unused=slot.unused,
            keep_float32=slot.keep_float32(dtype),
        )

    def tokenizer(self, slot: Slot) -> PreTrainedTokenizerBase:
        if slot.tokenizer is None:
            raise RuntimeError(f"{slot.folder} has no tokenizer")
        if self.index and slot.load_tokenizer is not None:
            folder = self.path / slot.tokenizer
            if not folder.is_dir():
                raise ModelError(f"The model lacks {folder}.", remedy="Fetch the model again.")
            return slot.load_tokenizer(folder)
        inside = (slot.tokenizer_in_file(layout) for layout in self._candidates(slot))
        found = next((tokenizer for tokenizer in inside if tokenizer is not None), None)
        if found is not None:
            return found
        if slot.ship_tokenizer is None:
            raise ModelError(
                f"{self.title}'s tokenizer does not ship with Burnish, and a single file has none.",
                remedy="Use the diffusers folder or Hub id of the model as `model.path`.",
            )
        return slot.ship_tokenizer()

    def identity(self, part: Part, settings: str) -> str:
        """Hash of the bytes behind a part, what else its numbers depend on, and the version of this code."""
        digest = hashlib.sha256(f"{ENCODING_VERSION} {part} {settings}".encode())
        digest.update(fingerprint(files_behind(self.source, self.path, part, self.folders(part))).encode())
        return digest.hexdigest()


def _layout_of_file(path: Path) -> Layout:
    status = path.stat()
    return _cached_layout(path, status.st_mtime_ns, status.st_size)


@cache
def _cached_layout(path: Path, modified: int, size: int) -> Layout:
    """Headers of the same file are asked for by every family that might know it."""
    return {name: Piece(path, name, info.shape) for name, info in read_header(path).items()}


def flow_schedule(
    config: Config, family: str, *, spacing: Spacing = "linear", prediction: Prediction = "velocity"
) -> Schedule:
    """The schedule of a flow-matching scheduler's config.

    Raises:
        ModelError: it is the config of a scheduler that does not flow.
    """
    kind = str(config.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    flows = (
        "FlowMatch" in kind
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    )
    if not flows:
        raise ModelError(
            f"The scheduler beside this {family} is {kind}; {family} flows.",
            remedy="Restore scheduler/scheduler_config.json of the release.",
        )
    shift: float | ResolutionShift = float(config.get("flow_shift") or config.get("shift") or 1.0)
    if config.get("use_dynamic_shifting"):
        shift = ResolutionShift(
            base_tokens=int(config.get("base_image_seq_len") or 256),
            max_tokens=int(config.get("max_image_seq_len") or 4096),
            base_shift=float(config.get("base_shift") or 0.5),
            max_shift=float(config.get("max_shift") or 1.15),
            exponential=config.get("time_shift_type", "exponential") == "exponential",
        )
    return Schedule(
        prediction=prediction,
        scheduler=dict(config),
        shift=shift,
        spacing=spacing,
    )


class PipelineFamily:
    """A family whose modules are those of a diffusers pipeline; see the module's docstring.

    A subclass gives the class attributes, `configure`, `encode_prompts`, `example_conditioning`, `predict` and
    `blocks`, and replaces what differs.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # class names in model_index.json that are of this family
    slots: ClassVar[tuple[Slot, ...]]
    targets: ClassVar[Mapping[str, TargetSet]]
    default_targets: ClassVar[str] = "attention+mlp"
    prompt_limit: int = 512  # tokens of a prompt that are read, special ones included
    spacing: ClassVar[Spacing] = "linear"
    capabilities: Capabilities = Capabilities()
    export: ExportKeys
    defaults: SamplerDefaults
    latents: LatentShape

    def __init__(
        self, configs: Mapping[str, Config], dtype: torch.dtype, source: PipelineSource | None
    ) -> None:
        self.configs = configs  # by folder of a slot, and `scheduler`
        self.dtype = dtype
        self.source = source
        self.modules: dict[str, nn.Module] = {}
        self.tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self.schedule = self.make_schedule(configs["scheduler"])
        self.configure()

    def configure(self) -> None:
        """Set what depends on `self.configs`; the schedule is known."""

    def make_schedule(self, config: Config) -> Schedule:
        return flow_schedule(config, self.title, spacing=self.spacing)

    @classmethod
    def denoiser_slots(cls) -> list[Slot]:
        return [slot for slot in cls.slots if slot.part == "denoiser"]

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        """Of a diffusers folder of a pipeline named in `pipelines`: whether its denoiser's config is of this family."""
        return True

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        """Of a single file in which the denoiser's slot was found: whether its shapes are of this family."""
        return True

    @classmethod
    def detect(cls, source: ModelSource) -> bool:
        path = locate(source)
        slot = cls.denoiser_slots()[0]
        if path.is_dir():
            index = index_file(path)
            if not index.is_file() or read_json(index).get("_class_name") not in cls.pipelines:
                return False
            config = path / slot.folder / "config.json"
            return config.is_file() and cls.accepts(read_json(index), read_json(config))
        found = slot.find(_layout_of_file(path))
        return found is not None and cls.accepts_file(found)

    @classmethod
    def fits(cls, source: ModelSource) -> bool:
        """Whether these weights can be of this family where the config says so, though `detect` cannot know."""
        return cls.detect(source)

    @classmethod
    def load(
        cls,
        source: ModelSource,
        parts: frozenset[Part],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        prediction: Prediction | None = None,
    ) -> Self:
        if not cls.fits(source):
            raise ModelError(
                f"{source.path} is not {cls.title}.",
                remedy="Leave `model.family` out to have the family detected from the weights.",
            )
        cls._refuse_unknown_denoisers(source)
        found = PipelineSource(source, cls.slots, shipped_configs(cls.name), cls.title, parts)
        known = [
            s
            for s in cls.slots
            if s.part != "text_encoders" and (s.part == "denoiser" or found.index or s.part in parts)
        ]
        configs: dict[str, Config] = {s.folder: found.config(s) for s in known if found.has(s)}
        configs = {**found.shipped, **configs, "scheduler": found.scheduler, "model_index": found.index}
        family = cls(configs, dtype, found)
        if prediction not in (None, family.schedule.prediction):
            raise ModelError(
                f"`model.prediction: {prediction}` does not fit {cls.title}, which predicts "
                f"{family.schedule.prediction}.",
                remedy="Leave `model.prediction` out.",
            )
        for slot in cls.slots:
            if slot.part in parts and found.has(slot):
                family.modules[slot.folder] = found.load(slot, dtype, device)
                if slot.tokenizer is not None:
                    family.tokenizers[slot.folder] = found.tokenizer(slot)
        return family

    @classmethod
    def _refuse_unknown_denoisers(cls, source: ModelSource) -> None:
        known = [slot.folder for slot in cls.denoiser_slots()]
        unknown = [folder for folder in source.denoisers if folder not in known]
        if unknown:
            raise ModelError(
                f"{cls.title} has no denoiser {unknown[0]!r}; it has {', '.join(known)}.",
                remedy="Correct `model.denoisers`, or leave it out to train all of them.",
            )

    @classmethod
    def skeleton(cls, depth: int | None = None) -> Self:
        shipped = shipped_configs(cls.name)
        family = cls({**shipped, "model_index": {}}, torch.bfloat16, None)
        for slot in cls.denoiser_slots():
            if slot.optional:
                continue
            config = dict(shipped[slot.folder])
            if depth is not None:
                config = cls.with_depth(config, depth)
            with torch.device("meta"):
                module = slot.make(config)
            # nn.Module's own `to`: a model's may warn about float32 modules, of which there are none.
            nn.Module.to(module, torch.bfloat16)
            for name, parameter in module.named_parameters():
                if any(fnmatch(name, rule) for rule in slot.keep_float32(torch.bfloat16)):
                    parameter.data = parameter.data.float()
            family.modules[slot.folder] = module.requires_grad_(False).eval()
        return family

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        """A denoiser's config with at most `depth` repeats of each kind of block."""
        counts = [
            k for k in config if k in ("num_layers", "num_single_layers", "num_refiner_layers", "n_layers")
        ]
        return {**config, **{k: min(depth, int(config[k])) for k in counts}}

    def example(
        self, height: int, width: int, batch: int, frames: int = 1
    ) -> tuple[Tensor, Tensor, Conditioning]:
        device = next(self.denoiser.parameters()).device
        generator = torch_generator(0, "example")
        noisy = torch.randn(batch, *self.latents.of(height, width, frames), generator=generator)
        conditioning = self.example_conditioning(batch, noisy.shape, generator).to(device, self.dtype)
        if self.capabilities.guidance_embedding:
            conditioning = conditioning.merged({"guidance_B": torch.ones(batch, device=device)})
        return noisy.to(device, self.dtype), torch.full((batch,), 0.5, device=device), conditioning

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        """Random conditioning of the shapes that the denoiser takes, for latents of this shape (B, C, ...)."""
        raise NotImplementedError

    @property
    def denoisers(self) -> Mapping[str, nn.Module]:
        return {s.folder: self.modules[s.folder] for s in self.denoiser_slots() if s.folder in self.modules}

    @property
    def denoiser(self) -> Any:
        """The first denoiser; of most families the only one."""
        return self.module(self.denoiser_slots()[0].folder)

    def module(self, folder: str) -> Any:
        """A loaded module by its folder; of the type that the slot makes."""
        if folder not in self.modules:
            part = next(slot.part for slot in self.slots if slot.folder == folder)
            raise RuntimeError(f"the part {part!r} is not loaded")
        return self.modules[folder]

    def tokenizer(self, folder: str) -> Any:
        """The tokenizer of the text encoder in `folder`."""
        self.module(folder)
        return self.tokenizers[folder]

    def identity(self, part: Part) -> str:
        if self.source is None:
            raise RuntimeError("a skeleton has no weights to identify")
        settings = f"{self.dtype}"
        if part != "denoiser":
            # Families, and releases of one, put the same encoder's captions into templates of their own, read other
            # layers of it, or scale the same latents otherwise.
            can = self.capabilities
            settings += f" {self.name} {can.references} {can.masks} {can.first_frame}"
        if part == "text_encoders":
            settings += f" {self.prompt_limit}"
        return self.source.identity(part, settings)

    def release(self, part: Part) -> None:
        for slot in self.slots:
            if slot.part == part:
                self.modules.pop(slot.folder, None)
                self.tokenizers.pop(slot.folder, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def count_tokens(self, prompt: str) -> int:
        slot = [slot for slot in self.slots if slot.tokenizer is not None][-1]
        return len(self.tokenizer(slot.folder)(prompt).input_ids)

    def describe_pictures(self, pictures: Sequence[PictureInfo]) -> Conditioning:
        return Conditioning({})

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        return target

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        return Conditioning({})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return autoencoder.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self.module("vae"), latents)


def vae_slot(hint: str = "ae.safetensors", prefixes: Sequence[str] = ("vae.", "first_stage_model.")) -> Slot:
    """The KL autoencoder of still pictures, as most families have it."""

    def find(layout: Layout) -> Layout | None:
        return autoencoder.layout_in(layout, prefixes)

    return Slot(
        folder="vae",
        part="vae",
        make=AutoencoderKL.from_config,
        find=find,
        config_of=autoencoder.config_from_shapes,
        tidy=autoencoder.diffusers_names,
        unused=autoencoder.UNUSED,
        file_hint=hint,
    )
