"""Stable Diffusion XL and its fine-tunes (arXiv 2307.01952).

A UNet over 4-channel latents that predicts epsilon (some fine-tunes: v) and reads two CLIPs of 77 tokens, the
pooled embedding of the second, and the picture's size, crop and target. Padding tokens are part of what the
UNet was trained on, so there is no mask.

Shape letters: B batch, C channels, H W height and width, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.families import autoencoder, clip
from burnish.families.latent_diffusion import (
    Checkpoint,
    Layouts,
    Parts,
    TextEncoderPlace,
    is_unet_of,
    plain_text_to_image,
    schedule_of,
    stage_count,
)
from burnish.families.unet import TARGETS, repeated_blocks, with_depth, without_weights
from burnish.family import (
    Capabilities,
    Conditioning,
    ExportKeys,
    LatentShape,
    ModelSource,
    Part,
    PictureInfo,
    Prediction,
    SamplerDefaults,
    Schedule,
    TargetSet,
)
from burnish.randomness import torch_generator

LAYOUTS = Layouts(
    config_file="sdxl.json",
    text_encoders=(
        TextEncoderPlace(
            "text_encoder", "tokenizer", "conditioner.embedders.0.", projection=False, padding=clip.END
        ),
        TextEncoderPlace(
            "text_encoder_2", "tokenizer_2", "conditioner.embedders.1.", projection=True, padding="!"
        ),
    ),
)


class StableDiffusionXL:
    """Conditioning, with the released widths:

    `tokens_BSD` (B, 77, 2048): the last but one hidden state of both CLIPs side by side;
    `pooled_BD` (B, 1280): the second CLIP's projected embedding of the end mark;
    `time_ids_B6` (B, 6), whole numbers of pixels: original size, crop's top and left, target size.
    """

    name: ClassVar[str] = "sdxl"
    title: ClassVar[str] = "Stable Diffusion XL"
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    default_targets: ClassVar[str] = "attention+mlp"
    export = ExportKeys(
        default="kohya",
        formats=("kohya", "diffusers"),
        modelspec="stable-diffusion-xl-v1-base",
        base_model_version="sdxl_base_v1-0",
        prefix={"kohya": "lora_unet_", "diffusers": "unet."},
        # diffusers 0.42 takes `lora_unet_add_embedding_linear_1` for `add.embedding.linear` (`_convert_unet_lora_key`).
        unreadable={"kohya": ("add_embedding.*",)},
    )
    capabilities = Capabilities()
    defaults = SamplerDefaults(steps=30, guidance=5.0, size=(1024, 1024), negative_prompt=True)
    latents = LatentShape(channels=4, compression=8)

    def __init__(
        self, parts: Parts, schedule: Schedule, dtype: torch.dtype, checkpoint: Checkpoint | None
    ) -> None:
        self._parts = parts
        self._dtype = dtype
        self._checkpoint = checkpoint
        self.schedule = schedule

    @classmethod
    def detect(cls, source: ModelSource) -> bool:
        return is_unet_of(
            source,
            lambda config: (
                # The refiner has four stages and reads another size embedding.
                plain_text_to_image(config, stages=3) and config.get("addition_embed_type") == "text_time"
            ),
            lambda shapes: stage_count(shapes) == 3 and "add_embedding.linear_1.weight" in shapes,
        )

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
        if not cls.detect(source):
            raise ModelError(
                f"{source.path} is not {cls.title}.",
                remedy="Leave `model.family` out to have the family detected from the weights.",
            )
        checkpoint = Checkpoint(source, LAYOUTS, parts)
        schedule = checkpoint.schedule(prediction)
        return cls(checkpoint.load(parts, dtype, device), schedule, dtype, checkpoint)

    @classmethod
    def skeleton(cls, depth: int | None = None) -> Self:
        unet = without_weights(with_depth(LAYOUTS.config["unet"], depth), torch.bfloat16)
        return cls(Parts(unet=unet), schedule_of(LAYOUTS.config["scheduler"], None), torch.bfloat16, None)

    def example(
        self, height: int, width: int, batch: int, frames: int = 1
    ) -> tuple[Tensor, Tensor, Conditioning]:
        unet = self._parts.loaded_unet()
        generator = torch_generator(0, "example")
        noisy_BCHW = torch.randn(batch, *self.latents.of(height, width, frames), generator=generator)
        tokens_BSD = torch.randn(batch, clip.TOKENS, unet.config.cross_attention_dim, generator=generator)
        pooled_size = (
            unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        )
        pooled_BD = torch.randn(batch, pooled_size, generator=generator)
        conditioning = Conditioning(
            {"tokens_BSD": tokens_BSD.to(self._dtype), "pooled_BD": pooled_BD.to(self._dtype)}
        ).merged(self.describe_pictures([PictureInfo.whole(height, width)] * batch))
        t_B = torch.full((batch,), 0.5, device=unet.device)
        return noisy_BCHW.to(unet.device, self._dtype), t_B, conditioning.to(unet.device)

    @property
    def denoisers(self) -> Mapping[str, nn.Module]:
        return {} if self._parts.unet is None else {"unet": self._parts.unet}

    def identity(self, part: Part) -> str:
        if self._checkpoint is None:
            raise RuntimeError("a skeleton has no weights to identify")
        return self._checkpoint.identity(part, self._dtype)

    def release(self, part: Part) -> None:
        self._parts.release(part)

    @property
    def prompt_limit(self) -> int:
        return clip.TOKENS

    def count_tokens(self, prompt: str) -> int:
        return clip.count_tokens(self._parts.loaded_text_encoders()[0][0], prompt)

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """Captions beyond 75 tokens are cut.

        The empty caption is encoded like any other, as ComfyUI, A1111 and kohya's trainer do, and diffusers
        for `negative_prompt=""`. (For `negative_prompt=None` diffusers takes zeros instead.)
        """
        hidden_states = []
        for tokenizer, encoder in self._parts.loaded_text_encoders():
            ids_BS = clip.token_ids(tokenizer, prompts).to(encoder.device)
            encoded = encoder(ids_BS, output_hidden_states=True)
            hidden_states.append(encoded.hidden_states[-2])
        # `encoded` is now the second encoder's, the only one with a projection.
        return Conditioning({"tokens_BSD": torch.cat(hidden_states, -1), "pooled_BD": encoded.text_embeds})

    def describe_pictures(self, pictures: Sequence[PictureInfo]) -> Conditioning:
        """Section 2.2 of the paper. Integers, so that casting the conditioning to bfloat16 rounds none."""
        rows = [(*picture.original, *picture.crop, *picture.target) for picture in pictures]
        return Conditioning({"time_ids_B6": torch.tensor(rows, dtype=torch.int64)})

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        return target

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        return Conditioning({})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return autoencoder.encode(self._parts.loaded_vae(), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self._parts.loaded_vae(), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        # Scaled in the precision given: a sampler passes float64, so that whole steps stay whole.
        index_B = (t_B * 1000).float()
        predicted_BCHW: Tensor = self._parts.loaded_unet()(
            noisy.to(self._dtype),
            index_B,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self._dtype),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_BD"].to(self._dtype),
                "time_ids": conditioning["time_ids_B6"].float(),
            },
            return_dict=False,
        )[0]
        return predicted_BCHW

    def blocks(self) -> list[nn.Module]:
        return repeated_blocks(self._parts.loaded_unet())
