"""Noise schedules of older models, from the configs of diffusers' schedulers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import Tensor

from burnish.errors import ModelError, UserError
from burnish.noise_schedule import Prediction, Schedule

_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}


def schedule_of(config: Mapping[str, Any], prediction: Prediction | None) -> Schedule:
    """A schedule from a diffusers scheduler config.

    Raises:
        ModelError: the config is of a kind that is not supported.
        UserError: `prediction` is not one that such a denoiser can make.
    """
    if prediction == "velocity":
        raise UserError(
            "`model.prediction: velocity` does not fit this family, which predicts epsilon or v.",
            remedy="Leave `model.prediction` out, or set epsilon or v.",
        )
    if prediction is not None:
        name = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
        config = {**config, "prediction_type": name}
    stated = config.get("prediction_type", "epsilon")
    if stated not in _PREDICTIONS:
        raise ModelError(
            f"The scheduler's prediction_type is {stated!r}; this family predicts epsilon or v.",
            remedy="Set `model.prediction` to what the model was trained for.",
        )
    return Schedule(
        prediction=_PREDICTIONS[stated], scheduler=dict(config), alphas_cumprod=alphas_cumprod(config)
    )


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """Share of the data's variance left after each of the steps (1000, as a rule), float64, shape (steps,).

    Betas as in diffusers' schedulers; `rescale_betas_zero_snr` is algorithm 1 of arXiv 2305.08891.
    """
    alphas = torch.cumprod(1 - _betas(config), 0)
    return zero_terminal(alphas) if config.get("rescale_betas_zero_snr") else alphas


def zero_terminal(alphas: Tensor) -> Tensor:
    """Shares of the data's variance moved and stretched so that nothing is left after the last step and the first is as
    it was: algorithm 1 of arXiv 2305.08891."""
    root = alphas.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


def with_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule that ends in pure noise, for training and for sampling, which then begins there.

    Schedulers that cannot begin in pure noise give way to DDIM.

    Raises:
        UserError: the model is a flow, which ends so anyway, or predicts epsilon, of which pure noise says nothing.
    """
    if schedule.alphas_cumprod is None:
        raise UserError(
            "model.zero_terminal_snr is set, and this model is a flow, which begins in pure noise anyway.",
            remedy="Take model.zero_terminal_snr out.",
        )
    if schedule.prediction != "v":
        raise UserError(
            "model.zero_terminal_snr is set, and this model predicts epsilon, which pure noise says nothing about.",
            remedy="Set model.prediction: v as well, or take model.zero_terminal_snr out.",
        )
    if schedule.scheduler.get("rescale_betas_zero_snr"):
        return schedule
    scheduler = {**schedule.scheduler, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    made = getattr(diffusers, str(scheduler.get("_class_name")), None)
    if made is None or "rescale_betas_zero_snr" not in inspect.signature(made).parameters:
        scheduler |= {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
    return replace(schedule, scheduler=scheduler, alphas_cumprod=zero_terminal(schedule.alphas_cumprod))


def _betas(config: Mapping[str, Any]) -> Tensor:
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    # Where a config leaves them out, diffusers' defaults hold.
    steps = int(config.get("num_train_timesteps", 1000))
    low, high = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    match config.get("beta_schedule", "linear"):
        case "linear":
            return torch.linspace(low, high, steps, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(math.sqrt(low), math.sqrt(high), steps, dtype=torch.float64) ** 2
        case "squaredcos_cap_v2":  # arXiv 2102.09672, equation 17
            times = torch.arange(steps + 1, dtype=torch.float64) / steps
            remaining = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999)
        case other:
            raise ModelError(
                f"The scheduler's beta_schedule is {other!r}; "
                "known: linear, scaled_linear, squaredcos_cap_v2."
            )
