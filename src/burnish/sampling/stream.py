"""Latents on their way from noise, by the scheduler that the model came with.

Shape letters: B batch, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from burnish.errors import ModelError
from burnish.noise_schedule import Schedule


class Stream:
    """The latents of a batch, of their frames or of their sound, and a scheduler, which counts its steps.

    Args:
        noise: (B, C, ...), where drawing begins.
        steps: of denoising.
        tokens: that the denoiser makes of a clip's frames, for shifts that depend on them.
        generators: of each row; stochastic schedulers (Euler ancestral, LCM) draw from them, on the CPU.
    """

    def __init__(
        self,
        schedule: Schedule,
        noise: Tensor,
        steps: int,
        tokens: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._flows = schedule.is_flow
        self.scheduler = make_scheduler(schedule)
        _set_timesteps(self.scheduler, schedule, steps, tokens)
        # Float32 whatever the denoiser computes in: small steps would be lost in bfloat16.
        self.latents = noise.float()
        if not self._flows:
            self.latents = self.latents * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        self._options: dict[str, Any] = {"generator": list(generators)} if takes_generator else {}

    def model_input(self, timestep: Tensor, copies: int) -> Tensor:
        """What the denoiser is given, `copies` of the batch one after the other."""
        latents = torch.cat([self.latents] * copies) if copies > 1 else self.latents
        return latents if self._flows else self.scheduler.scale_model_input(latents, timestep)

    def step(self, predicted: Tensor, timestep: Tensor) -> None:
        self.latents = self.scheduler.step(
            predicted, timestep, self.latents, return_dict=False, **self._options
        )[0]

    def of_rows(self, values: Sequence[float]) -> Tensor:
        """A number for each row, to be multiplied with its latents."""
        return torch.tensor(values, device=self.latents.device).view(-1, *(1 for _ in self.latents.shape[1:]))


def make_scheduler(schedule: Schedule) -> Any:
    """The diffusers scheduler that the model came with.

    Raises:
        ModelError: the installed diffusers has no such scheduler.
    """
    name = str(schedule.scheduler.get("_class_name", ""))
    if not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ModelError(
            f"The model asks for the scheduler {name!r}, which diffusers {diffusers.__version__} does not have.",
            remedy="Correct `_class_name` in scheduler/scheduler_config.json, or update diffusers.",
        )
    return getattr(diffusers, name).from_config(dict(schedule.scheduler))


def _set_timesteps(scheduler: Any, schedule: Schedule, steps: int, tokens: int) -> None:
    """Prepare a scheduler for `steps` steps; most flows get the sigmas that FluxPipeline passes."""
    if not schedule.is_flow:
        scheduler.set_timesteps(steps)
        return
    options: dict[str, Any] = {}
    if schedule.sigmas is not None:
        scheduler.set_timesteps(sigmas=list(schedule.sigmas(tokens, steps)))
        scheduler.set_begin_index(0)
        return
    if not isinstance(schedule.shift, float | int):
        options["mu"] = schedule.shift.mu(tokens, steps)
    if schedule.spacing == "linear":
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    elif schedule.spacing == "thousandths":
        options["sigmas"] = np.linspace(1000, 1, steps).astype(np.int64) / 1000
    else:
        options["num_inference_steps"] = steps
    scheduler.set_timesteps(**options)
    scheduler.set_begin_index(0)
