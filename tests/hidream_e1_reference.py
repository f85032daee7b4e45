"""How HiDream-E1 is sampled, which diffusers lacks: its published equations, one picture and one pass at a time.

Encoders, transformer and scheduler are diffusers' own. Nothing here is shared with the family under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from diffusers import HiDreamImagePipeline
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor]  # of T5, of Llama's layers, pooled


class Drawn:
    def __init__(self, images: Tensor) -> None:
        self.images = images


def per_place(x: Tensor) -> Tensor:
    """Length over the channels (1, C, H, W) -> (1, 1, H, W)."""
    return (x * x).sum(dim=1, keepdim=True).sqrt()


def guided(full: Tensor, against: Tensor, blind: Tensor, by_words: float, by_picture: float) -> Tensor:
    """Velocities with prompt and picture, with the negative prompt and the picture, with the prompt alone."""
    by_text = against + by_words * (full - against)
    shrunk = by_text * torch.minimum(per_place(full) / (per_place(by_text) + 1e-8), torch.ones(1))
    return blind + by_picture * (shrunk - blind)


class HiDreamImageEditingPipeline(HiDreamImagePipeline):
    """The folder of the release; `image` (3, H, W) in [-1, 1] is of the size that is drawn. Without refinement."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str],
        image: Tensor,
        height: int,
        width: int,
        num_inference_steps: int,
        generator: Sequence[torch.Generator],
        output_type: str,
        guidance_scale: float = 5.0,
        image_guidance_scale: float = 2.0,
        negative_prompt: Sequence[str] | None = None,
    ) -> Drawn:
        assert image.shape == (3, height, width)
        seen = self.encoded(image)
        drawn = []
        for one, against, dice in zip(prompt, negative_prompt or [""] * len(prompt), generator, strict=True):
            scheduler = deepcopy(self.scheduler)
            scheduler.set_timesteps(num_inference_steps)
            words, others = self.words(one), self.words(against)
            x = torch.randn(seen.shape, generator=dice)
            for time in scheduler.timesteps:
                v = self.velocity(x, seen, time, words)
                if guidance_scale > 1:
                    negative = self.velocity(x, seen, time, others)
                    blind = self.velocity(x, torch.zeros_like(seen), time, words)
                    v = guided(v, negative, blind, guidance_scale, image_guidance_scale)
                x = scheduler.step(v, time, x, return_dict=False)[0]
            drawn.append(x)
        latents = torch.cat(drawn)
        if output_type == "latent":
            return Drawn(latents)
        config = self.vae.config
        pixels = self.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        return Drawn((pixels / 2 + 0.5).clamp(0, 1))

    def words(self, prompt: str) -> Words:
        of_t5, _, of_llama, _, pooled, _ = self.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=torch.device("cpu")
        )
        return of_t5, of_llama, pooled

    def encoded(self, pixels: Tensor) -> Tensor:
        mode: Tensor = self.vae.encode(pixels[None]).latent_dist.mode()
        return (mode - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def velocity(self, x: Tensor, seen: Tensor, time: Tensor, words: Words) -> Tensor:
        """noise - data of x, to whose right the picture lies that was given."""
        answer: Tensor = self.transformer(
            torch.cat([x, seen], dim=3),
            time.expand(len(x)),
            encoder_hidden_states_t5=words[0],
            encoder_hidden_states_llama3=words[1],
            pooled_embeds=words[2],
        ).sample
        return -answer[:, :, :, : x.shape[3]]
