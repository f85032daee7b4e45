"""FLUX.2 by Black Forest Labs (https://github.com/black-forest-labs/flux2): dev, and klein of 4B and 9B.

A transformer of double-stream, then single-stream blocks over 128-channel latents, one token each, that predicts
velocity. dev reads hidden states of Mistral 3 and the guidance scale that it imitates; klein reads those of Qwen3 and
is run with classifier-free guidance, or was distilled to do without. Reference pictures follow the picture as further
tokens, told apart by the first of four position numbers (picture, row, column, word).

Shape letters: B batch, C channels, H W height and width of latents, S tokens of text, N tokens of references, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.export_keys import ExportKeys
from burnish.families import flux2_references, flux2_vae, mistral
from burnish.families.flux2_names import NAMES, TARGETS, find_transformer, transformer_config
from burnish.families.pipeline import PipelineFamily, flow_schedule
from burnish.families.qwen import qwen3_slot
from burnish.families.reference_sizes import shrunk
from burnish.families.rows import by_kind
from burnish.families.shifts import EmpiricalShift
from burnish.families.slots import Config, Slot
from burnish.families.text_slots import first_layers
from burnish.families.token_words import written_out
from burnish.family import Capabilities, ModelSource, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import Prediction, SamplerDefaults, Schedule
from burnish.placement import Part, Places, Shrink

PROMPT_TOKENS = 512  # always so many: padding is part of what the model was trained on
LAYERS_OF_MISTRAL, LAYERS_OF_QWEN = (10, 20, 30), (9, 18, 27)  # whose states are read; 0 is the embedding
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
WIDTH_OF_4B = 3 * 2560  # that klein 4B is told of a token: three states of Qwen3 4B
REFERENCES = 10
REFERENCE_AREA = 1024 * 1024  # pixels; larger references are scaled down to it

_KLEIN_4B: Mapping[str, Config] = {
    "transformer": {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": WIDTH_OF_4B,
        "guidance_embeds": False,
    },
    "model_index": {"text_encoder": ["transformers", "Qwen3ForCausalLM"]},
}


class Flux2(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 512, three times the text encoder's width); `guidance_B` (B,) of dev; and with
    references `tokens_reference_BND` (B, N, 128) and `tokens_reference_at_BN4`, their whole-numbered positions.
    """

    name: ClassVar[str] = "flux2"
    title: ClassVar[str] = "FLUX.2"
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
    slots = (
        Slot(
            "transformer",
            "denoiser",
            Flux2Transformer2DModel.from_config,
            find_transformer,
            transformer_config,
        ),
        flux2_vae.flux2_vae_slot(),
        replace(
            first_layers(mistral.mistral_slot("text_encoder", "tokenizer"), LAYERS_OF_MISTRAL[-1]),
            optional=True,
            kinds=("Mistral3ForConditionalGeneration",),
            shipped="mistral",
        ),
        replace(
            first_layers(
                qwen3_slot(file_hint="qwen_3_4b.safetensors or qwen_3_8b.safetensors"), LAYERS_OF_QWEN[-1]
            ),
            optional=True,
            kinds=("Qwen3ForCausalLM",),
            shipped="qwen3",
        ),
    )
    sizes: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
        "black-forest-labs/FLUX.2-klein-4B": {
            **_KLEIN_4B,
            "model_index": {**_KLEIN_4B["model_index"], "is_distilled": True},
        },
    }
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers", "kohya"),
        modelspec="flux-2-dev",
        base_model_version="flux2",
        prefix={"comfy": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_"},
        native=NAMES.native_module,
        native_kohya=("ComfyUI", "diffusers"),
        tensors=NAMES.tensors,
        # diffusers 0.42 does not trade the halves of the last modulation in native names, and does not know what makes
        # the others in sd-scripts' spelling (`_convert_kohya_flux2_lora_to_diffusers`).
        unreadable={
            "comfy": ("norm_out.linear",),
            "kohya": ("norm_out.linear", "*_stream_modulation*", "time_guidance_embed.*"),
        },
        words={"text_encoder": "mistral3_24b"},
        lokr="lycoris_",
    )
    latents = LatentShape(channels=flux2_vae.CHANNELS, compression=flux2_vae.COMPRESSION)
    capabilities = Capabilities(guidance_embedding=True, references=REFERENCES)
    defaults = SamplerDefaults(steps=50, guidance=4.0, size=(1024, 1024), negative_prompt=False)
    prompt_limit = PROMPT_TOKENS

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
        family = super().load(source, parts, dtype=dtype, device=device, prediction=prediction, shrink=shrink)
        if "text_encoders" in parts and "text_encoder" not in family.modules:
            files = ", ".join(str(file) for file in source.text_encoders) or source.path
            raise ModelError(
                f"{files} holds no text encoder of {cls.title}: Mistral 3 for dev, Qwen3 for klein.",
                remedy="Name its file (mistral_3_small_flux2_bf16, qwen_3_4b, qwen_3_8b) under `model.text_encoders`.",
            )
        return family

    def configure(self) -> None:
        """A single file of klein does not tell whether it was distilled; it is taken for the base model."""
        if self.configs["transformer"].get("guidance_embeds", True):
            return
        self.capabilities = replace(self.capabilities, guidance_embedding=False)
        qwen = "qwen3_8b" if self.configs["transformer"]["joint_attention_dim"] > WIDTH_OF_4B else "qwen3_4b"
        self.export = replace(self.export, modelspec="flux-2-klein", words={"text_encoder": qwen})
        if self.configs["model_index"].get("is_distilled"):
            self.defaults = replace(self.defaults, steps=4, guidance=1.0)
        else:
            self.defaults = replace(self.defaults, negative_prompt=True)

    def make_schedule(self, config: Config) -> Schedule:
        schedule = flow_schedule(config, self.title)
        return replace(schedule, shift=EmpiricalShift()) if config.get("use_dynamic_shifting") else schedule

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        width = self.denoiser.config.joint_attention_dim
        return Conditioning({"tokens_BSD": torch.randn(batch, PROMPT_TOKENS, width, generator=generator)})

    @property
    def _reads_qwen(self) -> bool:
        return bool(self.module("text_encoder").config.model_type == "qwen3")

    def _qwen_text(self, prompt: str) -> str:
        tokenizer = self.tokenizer("text_encoder")
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": written_out(tokenizer, prompt)}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return text

    def count_tokens(self, prompt: str) -> int:
        tokenizer = self.tokenizer("text_encoder")
        if self._reads_qwen:
            return len(tokenizer(self._qwen_text(prompt)).input_ids)
        chat = mistral.conversation(written_out(tokenizer, prompt), SYSTEM)
        return len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        if self._reads_qwen:
            encoded = tokenizer(
                [self._qwen_text(prompt) for prompt in prompts],
                return_tensors="pt",
                padding="max_length",
                truncation=True,
                max_length=PROMPT_TOKENS,
            )
            ids_BS, mask_BS, layers = encoded.input_ids, encoded.attention_mask, LAYERS_OF_QWEN
        else:
            texts = [written_out(tokenizer, prompt) for prompt in prompts]
            ids_BS, mask_BS = mistral.chat_ids(tokenizer, texts, SYSTEM, PROMPT_TOKENS)
            layers = LAYERS_OF_MISTRAL
        tokens_BSD = mistral.stacked_states(
            encoder, ids_BS.to(encoder.device), mask_BS.to(encoder.device), layers
        )
        return Conditioning({"tokens_BSD": tokens_BSD})

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        """Its own size, but of a megapixel at most, in whole tokens."""
        return shrunk(height, width, area=REFERENCE_AREA, multiple=self.latents.pixel_multiple)

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        return flux2_references.described([self.encode_pixels(pixels) for pixels in references])

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return flux2_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return flux2_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        # The denoiser takes one set of positions: rows whose references differ in size do not go together.
        return by_kind(
            flux2_references.places(conditioning, len(noisy)), noisy, t_B, conditioning, self._predict
        )

    def _predict(
        self, places: flux2_references.Places, noisy: Tensor, t_B: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Of rows whose references are at the same places."""
        height, width = noisy.shape[2:]
        tokens_BND = noisy.flatten(2).transpose(1, 2)
        at_N4 = flux2_references.positions(height, width, noisy.device)
        if places.tokens:
            reference_BND = conditioning[flux2_references.TOKENS][:, : places.tokens]
            tokens_BND = torch.cat([tokens_BND, reference_BND.to(tokens_BND.dtype)], dim=1)
            at_N4 = torch.cat([at_N4, conditioning[flux2_references.POSITIONS][0, : places.tokens]])
        text_BSD = conditioning["tokens_BSD"].to(self.dtype)
        text_S4 = torch.zeros(text_BSD.shape[1], 4, dtype=torch.int64, device=noisy.device)
        text_S4[:, 3] = torch.arange(text_BSD.shape[1], device=noisy.device)
        predicted_BND = self.denoiser(
            hidden_states=tokens_BND.to(self.dtype),
            encoder_hidden_states=text_BSD,
            timestep=t_B,
            img_ids=at_N4,
            txt_ids=text_S4,
            guidance=conditioning.get("guidance_B") if self.capabilities.guidance_embedding else None,
            return_dict=False,
        )[0]
        predicted_BCHW: Tensor = (
            predicted_BND[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        )
        return predicted_BCHW

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.transformer_blocks, *self.denoiser.single_transformer_blocks]
