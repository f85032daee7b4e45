"""FLUX.1 by Black Forest Labs: dev, schnell, and what was made from them.

A transformer over 2x2 patches of 16-channel latents that predicts velocity; it reads T5 tokens and CLIP's pooled
embedding. FLUX.1-dev besides embeds a guidance scale; without `guidance_B` that embedding is bypassed. T5's padding
is part of what the transformer was trained on, so there is no mask.

Shape letters: B batch, C channels, H W height and width of latents, S prompt tokens, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.families import autoencoder, clip, t5
from burnish.families.flux_layout import native_module
from burnish.families.flux_source import (
    LONGEST_PROMPT,
    FluxSource,
    TextEncoders,
    make_transformer,
    shipped_config,
)
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

_ATTENTION = (
    "*.attn.to_[qkv]",
    "*.attn.to_out.0",
    "*.attn.add_[qkv]_proj",
    "*.attn.to_add_out",
)
_FEED_FORWARD = (
    "*.ff.net.0.proj",
    "*.ff.net.2",
    "*.ff_context.net.0.proj",
    "*.ff_context.net.2",
    "single_transformer_blocks.*.proj_mlp",
    "single_transformer_blocks.*.proj_out",
)


class Flux:
    """Conditioning, with the released widths:

    `tokens_BSD` (B, 512, 4096; schnell 256): T5's last hidden state, padding included;
    `pooled_BD` (B, 768): CLIP's pooled embedding;
    `guidance_B` (B,), optional: the scale that FLUX.1-dev imitates; given by objective and sampler.
    """

    name: ClassVar[str] = "flux"
    title: ClassVar[str] = "FLUX.1"
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet(
            (*_ATTENTION, *_FEED_FORWARD),
            "Attention, feed-forward layers, and the single-stream blocks' shared input and output.",
        ),
        "all": TargetSet(
            (
                "transformer_blocks.*",
                "single_transformer_blocks.*",
                "x_embedder",
                "context_embedder",
                "proj_out",
            ),
            "Every layer of the blocks, modulations included, and the first and last layer; not the embeddings "
            "of time, guidance and caption, nor the last modulation.",
        ),
    }
    default_targets: ClassVar[str] = "attention+mlp"
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers", "comfy"),
        modelspec="flux-1-dev",
        base_model_version="flux1",
        prefix={"diffusers": "transformer."},
        native=native_module,
    )
    latents = LatentShape(channels=16, compression=8, patch=2)

    def __init__(
        self,
        schedule: Schedule,
        dtype: torch.dtype,
        *,
        embeds_guidance: bool,
        size: int,
        prompt_tokens: int,
        source: FluxSource | None,
    ) -> None:
        self.schedule = schedule
        self.prompt_tokens = prompt_tokens
        self.capabilities = Capabilities(guidance_embedding=embeds_guidance)
        self.defaults = SamplerDefaults(
            steps=28 if embeds_guidance else 4,
            guidance=3.5 if embeds_guidance else 0.0,
            size=(size, size),
            negative_prompt=False,
        )
        if not embeds_guidance:
            self.export = replace(self.export, modelspec="flux-1-schnell")
        self._dtype = dtype
        self._source = source
        self._transformer: FluxTransformer2DModel | None = None
        self._vae: AutoencoderKL | None = None
        self._text_encoders: TextEncoders | None = None

    @classmethod
    def detect(cls, source: ModelSource) -> bool:
        return FluxSource.detect(source)

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
        if prediction not in (None, "velocity"):
            raise ModelError(
                f"`model.prediction: {prediction}` does not fit FLUX.1, which predicts velocity.",
                remedy="Leave `model.prediction` out.",
            )
        found = FluxSource(source, parts)
        family = cls(
            schedule_of(found.scheduler_config),
            dtype,
            embeds_guidance=found.embeds_guidance,
            size=int(found.vae_config.get("sample_size", 1024)),
            prompt_tokens=found.prompt_tokens,
            source=found,
        )
        if "denoiser" in parts:
            family._transformer = found.load_transformer(dtype, device)
        if "vae" in parts:
            family._vae = found.load_vae(dtype, device)
        if "text_encoders" in parts:
            family._text_encoders = found.load_text_encoders(dtype, device)
        return family

    @classmethod
    def skeleton(cls, depth: int | None = None) -> Self:
        shipped = shipped_config()
        config = dict(shipped["transformer"])
        if depth is not None:
            config["num_layers"] = min(depth, config["num_layers"])
            config["num_single_layers"] = min(depth, config["num_single_layers"])
        family = cls(
            schedule_of(shipped["scheduler"]["dev"]),
            torch.bfloat16,
            embeds_guidance=True,
            size=shipped["vae"]["sample_size"],
            prompt_tokens=LONGEST_PROMPT,
            source=None,
        )
        with torch.device("meta"):
            transformer = make_transformer(config)
        # nn.Module's own `to`: the model's warns about float32 modules, of which there are none.
        family._transformer = nn.Module.to(transformer, torch.bfloat16).requires_grad_(False).eval()
        return family

    def example(
        self, height: int, width: int, batch: int, frames: int = 1
    ) -> tuple[Tensor, Tensor, Conditioning]:
        transformer = self._loaded_transformer()
        config, device = transformer.config, transformer.device
        generator = torch_generator(0, "example")
        noisy_BCHW = torch.randn(batch, *self.latents.of(height, width, frames), generator=generator)
        tokens_BSD = torch.randn(batch, self.prompt_tokens, config.joint_attention_dim, generator=generator)
        pooled_BD = torch.randn(batch, config.pooled_projection_dim, generator=generator)
        conditioning = Conditioning({"tokens_BSD": tokens_BSD, "pooled_BD": pooled_BD}).to(
            device, self._dtype
        )
        if self.capabilities.guidance_embedding:
            conditioning = conditioning.merged({"guidance_B": torch.ones(batch, device=device)})
        return noisy_BCHW.to(device, self._dtype), torch.full((batch,), 0.5, device=device), conditioning

    @property
    def denoisers(self) -> Mapping[str, nn.Module]:
        return {} if self._transformer is None else {"transformer": self._transformer}

    def identity(self, part: Part) -> str:
        if self._source is None:
            raise RuntimeError("a skeleton has no weights to identify")
        return self._source.identity(part, self._dtype)

    def release(self, part: Part) -> None:
        match part:
            case "denoiser":
                self._transformer = None
            case "vae":
                self._vae = None
            case "text_encoders":
                self._text_encoders = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def prompt_limit(self) -> int:
        return self.prompt_tokens

    def count_tokens(self, prompt: str) -> int:
        """Of T5, which reads the whole caption; CLIP's pooled embedding is of its beginning in any case."""
        if self._text_encoders is None:
            raise RuntimeError("the part 'text_encoders' is not loaded")
        return clip.count_tokens(self._text_encoders.t5_tokenizer, prompt)

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """CLIP reads the first 75 tokens of a caption, T5 the first `prompt_tokens` - 1."""
        if self._text_encoders is None:
            raise RuntimeError("the part 'text_encoders' is not loaded")
        loaded = self._text_encoders
        clip_ids = clip.token_ids(loaded.clip_tokenizer, prompts).to(loaded.clip.device)
        t5_ids = t5.token_ids(loaded.t5_tokenizer, prompts, self.prompt_tokens).to(loaded.t5.device)
        return Conditioning(
            {
                "tokens_BSD": loaded.t5(t5_ids).last_hidden_state.to(self._dtype),
                "pooled_BD": loaded.clip(clip_ids).pooler_output,
            }
        )

    def describe_pictures(self, pictures: Sequence[PictureInfo]) -> Conditioning:
        return Conditioning({})

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        return target

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        return Conditioning({})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return autoencoder.encode(self._loaded_vae(), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self._loaded_vae(), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens_BSD = conditioning["tokens_BSD"].to(self._dtype)
        guidance_B = conditioning.get("guidance_B") if self.capabilities.guidance_embedding else None
        patches_BND = self._loaded_transformer()(
            hidden_states=pack(noisy).to(self._dtype),
            timestep=t_B,
            guidance=guidance_B,
            pooled_projections=conditioning["pooled_BD"].to(self._dtype),
            encoder_hidden_states=tokens_BSD,
            txt_ids=torch.zeros(tokens_BSD.shape[1], 3, device=noisy.device),
            img_ids=patch_positions(height // 2, width // 2, noisy.device),
            return_dict=False,
        )[0]
        return unpack(patches_BND, height, width)

    def blocks(self) -> list[nn.Module]:
        transformer = self._loaded_transformer()
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def _loaded_transformer(self) -> FluxTransformer2DModel:
        if self._transformer is None:
            raise RuntimeError("the part 'denoiser' is not loaded")
        return self._transformer

    def _loaded_vae(self) -> AutoencoderKL:
        if self._vae is None:
            raise RuntimeError("the part 'vae' is not loaded")
        return self._vae


def schedule_of(config: Mapping[str, object]) -> Schedule:
    """The schedule of a FlowMatchEulerDiscreteScheduler config.

    Raises:
        ModelError: it is the config of another scheduler.
    """
    kind = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(
            f"The scheduler beside this FLUX.1 is {kind}; FLUX.1 flows.",
            remedy="Restore scheduler/scheduler_config.json of the release.",
        )
    shift: float | ResolutionShift = float(str(config.get("shift", 1.0)))
    if config.get("use_dynamic_shifting"):
        shift = ResolutionShift(
            base_tokens=int(str(config.get("base_image_seq_len", 256))),
            max_tokens=int(str(config.get("max_image_seq_len", 4096))),
            base_shift=float(str(config.get("base_shift", 0.5))),
            max_shift=float(str(config.get("max_shift", 1.15))),
        )
    return Schedule(prediction="velocity", scheduler=dict(config), shift=shift)


def pack(latents_BCHW: Tensor) -> Tensor:
    """Patches of 2x2 latents in reading order, (B, H/2 * W/2, 4C), channels outermost within a patch."""
    batch, channels, height, width = latents_BCHW.shape
    patches = latents_BCHW.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(patches_BND: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of `height` x `width`."""
    batch, _, depth = patches_BND.shape
    patches = patches_BND.reshape(batch, height // 2, width // 2, depth // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, depth // 4, height, width)


def patch_positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of each patch in reading order, (N, 3) float32."""
    row = torch.arange(rows, device=device, dtype=torch.float32)
    column = torch.arange(columns, device=device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(torch.zeros(1, device=device), row, column, indexing="ij"), -1)
    return grid.reshape(-1, 3)
