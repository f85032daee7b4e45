"""What Stable Diffusion 1, 2 and XL do alike: a UNet over 4-channel latents that reads CLIP's tokens.

Padding tokens are part of what these were trained on, so there is no mask. An inpainting model takes five channels
more: the mask, and the latents of the picture with grey in its hole.

Shape letters: B batch, C channels, H W height and width, S tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.export_keys import ExportKeys
from burnish.families import autoencoder, clip
from burnish.families.latent_diffusion import (
    INPAINTING,
    Checkpoint,
    Layouts,
    Parts,
    is_unet_of,
    without_weights,
)
from burnish.families.noise_schedule import schedule_of
from burnish.families.token_words import TokenVocabulary
from burnish.families.unet import TARGETS, repeated_blocks
from burnish.families.weights import read_tensor
from burnish.family import (
    Audio,
    Capabilities,
    ModelSource,
    TargetSet,
    Vocabulary,
)
from burnish.latent_shape import LatentShape, PictureInfo
from burnish.noise_schedule import Prediction, SamplerDefaults, Schedule
from burnish.placement import (
    DENOISER,
    Part,
    Places,
    Shrink,
)
from burnish.randomness import torch_generator


class UNetFamily(ABC):
    """Conditioning: `tokens_BSD` (B, 77, D), CLIP's; of an inpainting model `hole_B5HW`, the mask (1 where the
    picture is to be filled) and the latents of the rest; without it everything is the hole.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    layouts: ClassVar[Layouts]
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    default_targets: ClassVar[str] = "attention+mlp"
    export: ExportKeys
    capabilities = Capabilities()
    defaults: SamplerDefaults
    latents = LatentShape(channels=4, compression=8)
    audio: Audio | None = None

    def __init__(
        self, parts: Parts, schedule: Schedule, dtype: torch.dtype, checkpoint: Checkpoint | None
    ) -> None:
        self._parts = parts
        self._dtype = dtype
        self._checkpoint = checkpoint
        self.schedule = schedule
        self.shrink: Mapping[Part, Shrink] = {}
        self.fills = False
        if checkpoint is not None and checkpoint.unet_channels == INPAINTING:
            self._fill_holes()

    def _fill_holes(self) -> None:
        self.fills, self.capabilities = True, Capabilities(references=1, masks=True)

    @classmethod
    @abstractmethod
    def fits_config(cls, config: Mapping[str, Any]) -> bool:
        """Whether the config of a diffusers UNet is of this family."""

    @classmethod
    @abstractmethod
    def fits_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the shapes of a single file's UNet, by diffusers' names, are of this family."""

    @classmethod
    def schedule_in(cls, checkpoint: Checkpoint, prediction: Prediction | None) -> Schedule:
        return checkpoint.schedule(prediction)

    @classmethod
    def detect(cls, source: ModelSource) -> bool:
        return is_unet_of(source, cls.fits_config, cls.fits_shapes)

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
        if not cls.detect(source):
            raise ModelError(
                f"{source.path} is not {cls.title}.",
                remedy="Leave `model.family` out to have the family detected from the weights.",
            )
        checkpoint = Checkpoint(source, cls.layouts, parts)
        schedule = cls.schedule_in(checkpoint, prediction)
        family = cls(checkpoint.load(parts, dtype, device, shrink or {}), schedule, dtype, checkpoint)
        family.shrink = shrink or {}
        return family

    @classmethod
    def skeleton(
        cls,
        depth: int | None = None,
        *,
        parts: frozenset[Part] = DENOISER,
        of: Self | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        checkpoint = of._checkpoint if of else None
        made = without_weights(cls.layouts, checkpoint, parts, depth, dtype)
        schedule = of.schedule if of else schedule_of(cls.layouts.config["scheduler"], None)
        return cls(made, schedule, dtype, checkpoint)

    @classmethod
    def released(cls, source: ModelSource) -> Self:
        return cls(Parts(), schedule_of(cls.layouts.config["scheduler"], None), torch.bfloat16, None)

    @classmethod
    def releases(cls) -> Mapping[str, Self]:
        family = cls.released(ModelSource(""))
        family._fill_holes()
        return {f"{cls.title}, inpainting": family}

    def example(
        self, height: int, width: int, batch: int, frames: int = 1
    ) -> tuple[Tensor, Tensor, Conditioning]:
        unet = self._parts.loaded_unet()
        generator = torch_generator(0, "example")
        noisy_BCHW = torch.randn(batch, *self.latents.of(height, width, frames), generator=generator)
        tokens_BSD = torch.randn(batch, clip.TOKENS, unet.config.cross_attention_dim, generator=generator)
        conditioning = Conditioning({"tokens_BSD": tokens_BSD.to(self._dtype)})
        t_B = torch.full((batch,), 0.5, device=unet.device)
        return noisy_BCHW.to(unet.device, self._dtype), t_B, conditioning.to(unet.device)

    @property
    def denoisers(self) -> Mapping[str, nn.Module]:
        return {} if self._parts.unet is None else {"unet": self._parts.unet}

    @property
    def loaded(self) -> Mapping[str, nn.Module]:
        vae = {} if self._parts.vae is None else {"vae": self._parts.vae}
        places = zip(self.layouts.text_encoders, self._parts.text_encoders, strict=False)
        return {**self.denoisers, **vae, **{place.folder: encoder for place, (_, encoder) in places}}

    def config(self, part: str) -> Mapping[str, Any]:
        return {"_class_name": "UNet2DConditionModel", **self._parts.loaded_unet().config}

    @classmethod
    def stored(cls, source: ModelSource) -> Mapping[str, Callable[[], Tensor]]:
        if not cls.detect(source):
            raise ModelError(f"{source.path} is not {cls.title}.")
        layout = Checkpoint(source, cls.layouts).unet_layout
        return {name: partial(read_tensor, piece) for name, piece in layout.items()}

    def identity(self, part: Part) -> str:
        if self._checkpoint is None:
            raise RuntimeError("a skeleton has no weights to identify")
        settings = f"{self._dtype}"
        if part != "denoiser":
            # Families scale the same VAE's latents otherwise, and read other layers of the same text encoder.
            settings += f" {self.name}"
        if part == "text_encoders" and part in self.shrink:
            settings += f" {self.shrink[part].name}"
        return self._checkpoint.identity(part, settings)

    def release(self, part: Part) -> None:
        self._parts.release(part)

    @property
    def prompt_limit(self) -> int:
        return clip.TOKENS

    def count_tokens(self, prompt: str) -> int:
        return clip.count_tokens(self._parts.loaded_text_encoders()[0][0], prompt)

    @property
    def vocabularies(self) -> Mapping[str, Vocabulary]:
        places = zip(self.layouts.text_encoders, self._parts.text_encoders, strict=False)
        return {self.export.text_encoders[place.folder]: TokenVocabulary(*loaded) for place, loaded in places}

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """CLIP's last hidden state after its final norm; captions beyond 75 tokens are cut."""
        ((tokenizer, encoder),) = self._parts.loaded_text_encoders()
        ids_BS = clip.token_ids(tokenizer, prompts).to(encoder.device)
        return Conditioning({"tokens_BSD": encoder(ids_BS).last_hidden_state})

    def describe_pictures(self, pictures: Sequence[PictureInfo]) -> Conditioning:
        return Conditioning({})

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        return target

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        """The hole is where the mask is at least one half; latents take the mask of the pixel at their corner, as
        in diffusers' StableDiffusionInpaintPipeline.
        """
        if not self.fills or not references or mask_B1HW is None:
            return Conditioning({})
        mask_B1HW = (mask_B1HW >= 0.5).to(references[0].dtype)
        latents_BCHW = self.encode_pixels(references[0] * (1 - mask_B1HW))
        small_B1HW = nn.functional.interpolate(mask_B1HW, size=latents_BCHW.shape[2:]).to(latents_BCHW)
        return Conditioning({"hole_B5HW": torch.cat([small_B1HW, latents_BCHW], dim=1)})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return autoencoder.encode(self._parts.loaded_vae(), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self._parts.loaded_vae(), latents)

    def told_besides(self, conditioning: Conditioning) -> dict[str, Any]:
        """What the UNet is given besides latents, time and tokens."""
        return {}

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        # Scaled in the precision given: a sampler passes float64, so that whole steps stay whole.
        index_B = (t_B * self.schedule.steps).float()
        predicted_BCHW: Tensor = self._parts.loaded_unet()(
            self._with_hole(noisy, conditioning).to(self._dtype),
            index_B,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self._dtype),
            return_dict=False,
            **self.told_besides(conditioning),
        )[0]
        return predicted_BCHW

    def _with_hole(self, noisy_BCHW: Tensor, conditioning: Conditioning) -> Tensor:
        if not self.fills:
            return noisy_BCHW
        if "hole_B5HW" in conditioning:
            return torch.cat([noisy_BCHW, conditioning["hole_B5HW"].to(noisy_BCHW)], dim=1)
        mask_B1HW = torch.ones_like(noisy_BCHW[:, :1])
        return torch.cat([noisy_BCHW, mask_B1HW, torch.zeros_like(noisy_BCHW)], dim=1)

    def blocks(self) -> list[nn.Module]:
        return repeated_blocks(self._parts.loaded_unet())
