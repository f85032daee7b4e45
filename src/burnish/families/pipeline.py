"""What every family that is a diffusers pipeline does alike: its parts found, loaded one by one, named and let go.

A family is a subclass, one level deep, that lists its `slots` (the modules of the pipeline) and answers what is its
own: prompts, prediction, blocks, schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.export_keys import ExportKeys
from burnish.families import autoencoder
from burnish.families.slots import Config, PipelineSource, Slot, layout_of_file, shipped_configs
from burnish.families.sources import index_file, locate, read_json
from burnish.families.token_words import TokenVocabulary, written_out
from burnish.families.weights import Layout, read_tensor
from burnish.family import (
    Audio,
    Capabilities,
    ModelSource,
    TargetSet,
    Vocabulary,
)
from burnish.latent_shape import LatentShape, PictureInfo
from burnish.noise_schedule import (
    Prediction,
    ResolutionShift,
    SamplerDefaults,
    Schedule,
)
from burnish.placement import (
    DENOISER,
    Part,
    Places,
    Shrink,
    place_of,
)
from burnish.randomness import torch_generator

Spacing = Literal["linear", "thousandths", "scheduler"]


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


class PipelineFamily(ABC):
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
    # Releases that take other data than the shipped configs say, by title: what theirs say instead, by folder.
    variants: ClassVar[Mapping[str, Mapping[str, Config]]] = {}
    # Releases of other sizes than the shipped configs say, by Hub id: what theirs say instead, by folder.
    sizes: ClassVar[Mapping[str, Mapping[str, Config]]] = {}
    audio: Audio | None = None

    def __init__(
        self,
        configs: Mapping[str, Config],
        dtype: torch.dtype,
        source: PipelineSource | None,
        asked: ModelSource | None = None,
    ) -> None:
        self.configs = configs  # by folder of a slot, and `scheduler`
        self.dtype = dtype
        self.source = source
        # What the user asks for, whether its weights are here or not.
        self.asked = source.source if source is not None else asked or ModelSource("")
        self.modules: dict[str, nn.Module] = {}
        self.shrink: Mapping[Part, Shrink] = {}
        self.tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._unread: dict[str, Callable[[], PreTrainedTokenizerBase]] = {}  # tokenizers of a skeleton
        self.schedule = self.make_schedule(configs["scheduler"])
        self.configure()

    def configure(self) -> None:
        """Set what depends on `self.configs`; the schedule is known. By default nothing does."""
        return

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
        found = slot.find(layout_of_file(path))
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
        device: Places,
        prediction: Prediction | None = None,
        shrink: Mapping[Part, Shrink] | None = None,
    ) -> Self:
        if not cls.fits(source):
            raise ModelError(
                f"{source.path} is not {cls.title}.",
                remedy="Leave `model.family` out to have the family detected from the weights.",
            )
        cls._refuse_unknown_denoisers(source)
        found = PipelineSource(source, cls.slots, shipped_configs(cls.name), cls.title, parts)
        found.refuse_strangers()
        known = [
            s
            for s in cls.slots
            if s.part != "text_encoders" and (s.part == "denoiser" or found.index or s.part in parts)
        ]
        configs: dict[str, Config] = {s.folder: found.config(s) for s in known if found.has(s)}
        configs = {**found.shipped, **configs, "scheduler": found.scheduler, "model_index": found.index}
        family = cls(configs, dtype, found)
        family.shrink = shrink or {}
        if prediction not in (None, family.schedule.prediction):
            raise ModelError(
                f"`model.prediction: {prediction}` does not fit {cls.title}, which predicts "
                f"{family.schedule.prediction}.",
                remedy="Leave `model.prediction` out.",
            )
        for slot in cls.slots:
            if slot.part in parts and found.has(slot):
                blocks = partial(family._blocks_with, slot.folder) if slot.part == "denoiser" else None
                shrunk = family.shrink.get(slot.part) if slot.part != "vae" else None
                family.modules[slot.folder] = found.load(
                    slot, dtype, place_of(slot.part, device), shrunk, blocks
                )
                if slot.tokenizer is not None:
                    family.tokenizers[slot.folder] = found.tokenizer(slot)
        return family

    def _blocks_with(self, folder: str, module: nn.Module) -> list[nn.Module]:
        """A denoiser's blocks as soon as it is made, before it has weights; another may be there already."""
        self.modules[folder] = module
        inside = set(module.modules())
        return [block for block in self.blocks() if block in inside]

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
    def skeleton(
        cls,
        depth: int | None = None,
        *,
        parts: frozenset[Part] = DENOISER,
        of: Self | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        of = of or cls.released(ModelSource(""))
        family = cls(of.configs, dtype, None, of.asked)
        for slot in cls.slots:
            found = of.source
            if slot.part not in parts or slot.folder in family.modules:
                continue
            if not (found.has(slot) if found else of._is_released_with(slot)):
                continue
            config = found.config(slot) if found else dict(of.configs[slot.shipped or slot.folder])
            if depth is not None and slot.part == "denoiser":
                config = cls.with_depth(config, depth)
            with torch.device("meta"):
                module = slot.make(config)
            # nn.Module's own `to`: a model's may warn about float32 modules, of which there are none.
            nn.Module.to(module, dtype)
            for name, parameter in module.named_parameters():
                if any(fnmatch(name, rule) for rule in slot.keep_float32(dtype)):
                    parameter.data = parameter.data.float()
            family.modules[slot.folder] = module.requires_grad_(False).eval()
            if found is not None and slot.tokenizer is not None:
                family._unread[slot.folder] = partial(found.tokenizer, slot)
            elif slot.ship_tokenizer is not None:
                family._unread[slot.folder] = slot.ship_tokenizer
        return family

    def _is_released_with(self, slot: Slot) -> bool:
        """Modules that are never missing, and text encoders, the first of alternatives; all as they are asked for."""
        if slot.part == "denoiser" and self.asked.denoisers:
            return slot.folder in self.asked.denoisers
        kind = (*self.configs["model_index"].get(slot.folder, ()), None, None)[1]
        if kind is not None and slot.kinds and kind not in slot.kinds:
            return False
        return (self.asked.audio or not slot.audio) and (slot.part == "text_encoders" or not slot.optional)

    @classmethod
    def released(cls, source: ModelSource) -> Self:
        shipped: dict[str, Config] = {**shipped_configs(cls.name), "model_index": {}}
        own = {folder: {**shipped[folder], **said} for folder, said in cls.sizes.get(source.path, {}).items()}
        return cls({**shipped, **own}, torch.bfloat16, None, source)

    @classmethod
    def releases(cls) -> Mapping[str, Self]:
        shipped: dict[str, Config] = {**shipped_configs(cls.name), "model_index": {}}
        configs = {
            title: {folder: {**shipped[folder], **said} for folder, said in variant.items()}
            for title, variant in cls.variants.items()
        }
        return {title: cls({**shipped, **own}, torch.bfloat16, None) for title, own in configs.items()}

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

    @abstractmethod
    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        """Random conditioning of the shapes that the denoiser takes, for latents of this shape (B, C, ...)."""

    @abstractmethod
    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning: ...

    @abstractmethod
    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor: ...

    @abstractmethod
    def blocks(self) -> list[nn.Module]: ...

    @property
    def denoisers(self) -> Mapping[str, nn.Module]:
        return {s.folder: self.modules[s.folder] for s in self.denoiser_slots() if s.folder in self.modules}

    @property
    def vocabularies(self) -> Mapping[str, Vocabulary]:
        return {
            name: TokenVocabulary(self.tokenizer(part), self.modules[part])
            for part, name in self.export.vocabularies.items()
            if part in self.modules
        }

    @property
    def loaded(self) -> Mapping[str, nn.Module]:
        return dict(self.modules)

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
        if folder in self._unread:
            self.tokenizers[folder] = self._unread.pop(folder)()
        if folder not in self.tokenizers:
            raise ModelError(
                f"The tokenizer of {self.title}'s {folder} does not come with Burnish, and the model is not here.",
                remedy="Download the model, and name its folder.",
            )
        return self.tokenizers[folder]

    def config(self, part: str) -> Mapping[str, Any]:
        return {"_class_name": type(self.module(part)).__name__, **self.configs[part]}

    @classmethod
    def stored(cls, source: ModelSource) -> Mapping[str, Callable[[], Tensor]]:
        if not cls.fits(source):
            raise ModelError(f"{source.path} is not {cls.title}.")
        found = PipelineSource(source, cls.slots, shipped_configs(cls.name), cls.title)
        slot = next(slot for slot in cls.denoiser_slots() if found.has(slot))
        return {name: partial(read_tensor, piece) for name, piece in found.layout(slot).items()}

    def identity(self, part: Part) -> str:
        if self.source is None:
            raise RuntimeError("a skeleton has no weights to identify")
        settings = f"{self.dtype}"
        if part != "denoiser":
            # Families, and releases of one, put the same encoder's captions into templates of their own, read other
            # layers of it, or scale the same latents otherwise.
            can = self.capabilities
            settings += f" {self.name} {can.references} {can.masks} {can.first_frame}"
            settings += " audio" if self.audio is not None else ""
        if part == "text_encoders":
            settings += f" {self.prompt_limit}"
            settings += f" {self.shrink[part].name}" if part in self.shrink else ""
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
        tokenizer = self.tokenizer(slot.folder)
        return len(tokenizer(written_out(tokenizer, prompt)).input_ids)

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
