"""Ideogram 4: a transformer over one sequence of words and FLUX.2's latents that predicts data - noise.

It reads thirteen hidden states of Qwen3-VL 8B per token, side by side. Guidance is asymmetric: the pass without prompt
is a second transformer's that sees the picture alone. It is loaded where the release brings it, but never trained;
without it (`model.denoisers: [transformer]`, or a single file) the first one takes the pass without words. The released
sampler draws noise place by place and spaces its steps as a logit-normal law does, later for larger pictures.

Shape letters: B batch, C channels, H W height and width of latents, N latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log
from typing import Any, ClassVar

import torch
from diffusers import Ideogram4Transformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.export_keys import ExportKeys
from burnish.families import clip, flux2_vae
from burnish.families.ideogram4_latents import places_first, places_last, tidy_vae
from burnish.families.ideogram4_names import NAMES, TARGETS, find_transformer, transformer_config
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen3_vl_slot
from burnish.families.rows import by_kind
from burnish.families.slots import Config, Slot
from burnish.families.token_words import written_out
from burnish.family import NegativePrompt, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults, Schedule

TRANSFORMER, BLIND = "transformer", "unconditional_transformer"
LONGEST_PROMPT = 2048
READ_LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)  # of Qwen3-VL, as each gives its states
# The roles of a token, and where the picture's positions begin (diffusers: transformer_ideogram4.py).
_WORD, _PICTURE, _PICTURE_AT = 3, 2, 65536
_BASE_TOKENS = 32 * 32  # of 512 x 512 pixels, where steps are not shifted
_DEVIATION = 1.5  # of the law of the steps
_CLEANEST, _NOISIEST = 1 / (1 + exp(7.5)), 1 - 1 / (1 + exp(9.0))  # sigmas


def _text_slot() -> Slot:
    """Qwen3-VL without its last norm: the states of the last layer are read as it gives them."""
    slot = qwen3_vl_slot()

    def make(config: dict[str, Any]) -> nn.Module:
        module = slot.make(config)
        module.norm = nn.Identity()
        return module

    return replace(slot, make=make, unused=(*slot.unused, "norm.weight"), file_hint="qwen3vl_8b.safetensors")


class SideShift:
    """The release's: as many times later as the side is longer than 512 pixels (`_resolution_aware_mu`)."""

    def mu(self, tokens: int, steps: int = 0) -> float:
        return 0.5 * log(tokens / _BASE_TOKENS)

    def factor(self, tokens: int, steps: int = 0) -> float:
        return exp(self.mu(tokens, steps))


def logit_normal_sigmas(tokens: int, steps: int) -> list[float]:
    """From noise on: evenly spaced quantiles of a logit-normal law about the shift (`_logit_normal_sigmas`)."""
    places = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:].flip(0)
    logits = SideShift().mu(tokens) + _DEVIATION * torch.special.ndtri(places)
    sigmas: list[float] = torch.special.expit(logits).clamp(_CLEANEST, _NOISIEST).tolist()
    return sigmas


class Ideogram4(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 13 times 4096), as long as the prompt, and its `mask_BS`; `blind_B`, whether
    the pass is that without prompt.
    """

    name: ClassVar[str] = "ideogram4"
    title: ClassVar[str] = "Ideogram 4"
    pipelines = ("Ideogram4Pipeline",)
    slots = (
        Slot(
            TRANSFORMER,
            "denoiser",
            Ideogram4Transformer2DModel.from_config,
            find_transformer,
            transformer_config,
        ),
        Slot(BLIND, "denoiser", Ideogram4Transformer2DModel.from_config, optional=True),
        replace(flux2_vae.flux2_vae_slot(), tidy=tidy_vae),
        _text_slot(),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec="ideogram-4",
        base_model_version="ideogram4",
        prefix={"comfy": "diffusion_model.", "diffusers": "transformer."},
        native=NAMES.native_module,
        tensors=NAMES.tensors,
        words={"text_encoder": "qwen3vl_8b"},
        # diffusers refuses a file in native names with any layer outside the blocks.
        unreadable={"comfy": ("input_proj", "llm_cond_proj", "t_embedding.*", "adaln_proj", "final_layer.*")},
    )
    latents = LatentShape(channels=flux2_vae.CHANNELS, compression=flux2_vae.COMPRESSION, noise_last=True)
    defaults = SamplerDefaults(steps=48, guidance=7.0, size=(2048, 2048), negative_prompt=True)
    prompt_limit = LONGEST_PROMPT

    def configure(self) -> None:
        chosen = self.asked.denoisers
        if chosen and TRANSFORMER not in chosen:
            raise ModelError(
                f"{self.title}'s {BLIND} is not trained; `model.denoisers` names it alone.",
                remedy=f"Set `model.denoisers: [{TRANSFORMER}]`, or leave it out.",
            )

    def make_schedule(self, config: Config) -> Schedule:
        schedule = super().make_schedule(config)
        return replace(schedule, shift=SideShift(), sigmas=logit_normal_sigmas)

    @property
    def denoisers(self) -> Mapping[str, nn.Module]:
        """The one that is trained."""
        return {TRANSFORMER: self.modules[TRANSFORMER]} if TRANSFORMER in self.modules else {}

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        shape = (batch, 64, self.denoiser.config.llm_features_dim)
        return Conditioning(
            {
                "tokens_BSD": torch.randn(shape, generator=generator),
                "mask_BS": torch.ones(batch, 64, dtype=torch.bool),
                "blind_B": torch.zeros(batch, dtype=torch.bool),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        return clip.count_tokens(self.tokenizer("text_encoder"), _asked(prompt))

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """A negative prompt is no text to this model: it stands for the pass without words."""
        return Conditioning.collate([self._encoded(prompt) for prompt in prompts])

    def _encoded(self, prompt: str) -> Conditioning:
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        blind = isinstance(prompt, NegativePrompt)
        text = written_out(tokenizer, _asked(prompt))
        ids = tokenizer(text, truncation=True, max_length=LONGEST_PROMPT).input_ids
        ids_BS = torch.tensor([ids], device=encoder.device)
        states = encoder(input_ids=ids_BS, output_hidden_states=True).hidden_states
        tokens_BSD = torch.stack([states[layer + 1] for layer in READ_LAYERS], dim=-1).flatten(2)
        if blind:
            tokens_BSD = tokens_BSD[:, :0]
        return Conditioning(
            {
                "tokens_BSD": tokens_BSD,
                "mask_BS": tokens_BSD.new_ones(tokens_BSD.shape[:2], dtype=torch.bool),
                "blind_B": torch.tensor([blind], device=encoder.device),
            }
        )

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Each latent place by place, as the transformer takes it."""
        return places_first(flux2_vae.encode(self.module("vae"), pixels))

    def decode_latents(self, latents: Tensor) -> Tensor:
        return flux2_vae.decode(self.module("vae"), places_last(latents))

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        blind_B = conditioning.on_host("blind_B")
        kinds = [False] * len(noisy) if blind_B is None else blind_B.bool().tolist()
        return by_kind(kinds, noisy, t_B, conditioning, self._predict)

    def _predict(self, blind: bool, noisy: Tensor, t_B: Tensor, told: Conditioning) -> Tensor:
        if not blind:
            return self._predicted(self.denoiser, noisy, t_B, told)
        wordless = {name: told[name][:, :0] for name in ("tokens_BSD", "mask_BS")}
        return self._predicted(self.modules.get(BLIND, self.denoiser), noisy, t_B, told.merged(wordless))

    def _predicted(self, module: nn.Module, noisy: Tensor, t_B: Tensor, told: Conditioning) -> Tensor:
        batch, channels, height, width = noisy.shape
        tokens_BSD, mask_BS = told["tokens_BSD"].to(self.dtype), told["mask_BS"].bool()
        words, count = tokens_BSD.shape[1], height * width
        patches_BND = noisy.flatten(2).transpose(1, 2).to(self.dtype)
        whole_BS = torch.ones(batch, count, dtype=torch.bool, device=noisy.device)
        there_BS = torch.cat([mask_BS, whole_BS], dim=1)
        roles_BS = torch.cat([mask_BS * _WORD, whole_BS * _PICTURE], dim=1)
        at_S3 = torch.cat([_word_positions(words, noisy.device), _positions(height, width, noisy.device)])
        predicted_BND = module(
            hidden_states=torch.cat([patches_BND.new_zeros(batch, words, channels), patches_BND], dim=1),
            timestep=(1 - t_B).to(self.dtype),
            encoder_hidden_states=torch.cat(
                [tokens_BSD, tokens_BSD.new_zeros(batch, count, tokens_BSD.shape[2])], dim=1
            ),
            position_ids=at_S3.expand(batch, -1, -1),
            segment_ids=there_BS.long(),
            indicator=roles_BS.long(),
            return_dict=False,
        )[0]
        velocity_BND: Tensor = predicted_BND[:, words:]
        return -velocity_BND.transpose(1, 2).reshape(noisy.shape)

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.layers)


def _asked(prompt: str) -> str:
    """A prompt in the chat as released."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def _word_positions(words: int, device: torch.device) -> Tensor:
    return torch.arange(words, device=device)[:, None].expand(-1, 3)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """(0, row, column) of each latent in reading order, far from those of words, (N, 3)."""
    axes = (torch.arange(length, device=device) for length in (1, height, width))
    return torch.cartesian_prod(*axes) + _PICTURE_AT
