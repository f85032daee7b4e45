"""Flex.1, FLUX.1 with 8 two-stream blocks; Flex.2, which takes 196 channels and has no pipeline in diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from torch import Tensor
from torch.nn.functional import interpolate

from burnish.conditioning import Conditioning
from burnish.family import Family
from tiny import Case
from tiny.flux import COMMON, HEIGHT, UPSTREAM, WIDTH, flux, mask, picture


class Flex2Pipeline(FluxPipeline):
    """How the release draws, from its description; pictures are (1, 3, H, W) in [-1, 1], a mask is 1 in the hole."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str],
        height: int,
        width: int,
        num_inference_steps: int,
        generator: Sequence[torch.Generator],
        output_type: str,
        guidance_scale: float = 3.5,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        control_image: Tensor | None = None,
    ) -> FluxPipelineOutput:
        count, rows, columns = len(prompt), height // 8, width // 8
        embeds, pooled, text_ids = self.encode_prompt(prompt=list(prompt), prompt_2=None)
        noise = [torch.randn(1, 16, rows, columns, generator=one) for one in generator]
        latents = self._pack_latents(torch.cat(noise), count, 16, rows, columns)
        hole = torch.ones(1, 1, rows, columns)
        if inpaint_mask is not None:
            hole = interpolate(inpaint_mask, size=(rows, columns), mode="bilinear", align_corners=False)
        kept = self._latents_of(inpaint_image, rows, columns) * (1 - hole)
        beside = torch.cat([kept, hole, self._latents_of(control_image, rows, columns)], dim=1)
        beside = self._pack_latents(beside.repeat(count, 1, 1, 1), count, 33, rows, columns)

        config = self.scheduler.config
        mu = calculate_shift(
            latents.shape[1],
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        for timestep in self.scheduler.timesteps:
            predicted = self.transformer(
                hidden_states=torch.cat([latents, beside], dim=2),
                timestep=timestep.expand(count) / 1000,
                guidance=torch.full((count,), guidance_scale),
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=self._prepare_latent_image_ids(
                    count, rows // 2, columns // 2, latents.device, latents.dtype
                ),
                return_dict=False,
            )[0]
            latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        if output_type == "latent":
            return FluxPipelineOutput(images=latents)
        latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)
        pixels = self.vae.decode(latents / 0.3611 + 0.1159, return_dict=False)[0]
        return FluxPipelineOutput(images=self.image_processor.postprocess(pixels, output_type=output_type))

    def _latents_of(self, shown: Tensor | None, rows: int, columns: int) -> Tensor:
        if shown is None:
            return torch.zeros(1, 16, rows, columns)
        found: Tensor = (self.vae.encode(shown).latent_dist.mode() - 0.1159) * 0.3611
        return found


SHOWN, CONTROL = picture(HEIGHT, WIDTH, 3) * 2 - 1, picture(HEIGHT, WIDTH, 4) * 2 - 1


def hole_and_control(family: Family) -> Conditioning:
    return family.encode_references([SHOWN, CONTROL], mask_B1HW=mask())


def hole(family: Family) -> Conditioning:
    return family.encode_references([SHOWN], mask_B1HW=mask())


def control(family: Family) -> Conditioning:
    return family.encode_references([CONTROL])


FLEX2: dict[str, Any] = {
    "family": "flex2",
    "build": partial(flux, kind=Flex2Pipeline, num_layers=3, in_channels=196, out_channels=64),
    "pipeline": Flex2Pipeline,
    "guidance": (3.5,),
    **COMMON,
}
INPAINT = {"inpaint_image": SHOWN, "inpaint_mask": mask()}
CASES = {
    "flex1": Case("flex1", partial(flux, num_layers=8, num_single_layers=1), **COMMON, **UPSTREAM),
    "flex2": Case(**FLEX2, **UPSTREAM),
    "flex2_hole": Case(call=INPAINT, told=hole, learns=False, **FLEX2),
    "flex2_control": Case(call={"control_image": CONTROL}, told=control, learns=False, **FLEX2),
    "flex2_both": Case(
        call={**INPAINT, "control_image": CONTROL}, told=hole_and_control, learns=False, **FLEX2
    ),
}
