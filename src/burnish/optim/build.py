"""An optimizer from its section of the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.config.train import Adafactor, AdamW, AdamW8bit, Prodigy
from burnish.errors import ConfigError, MissingPackage

Group = Mapping[str, Any]
"""`params`: the parameters; `lr`, if present: their own peak learning rate instead of the section's."""


def build_optimizer(
    section: AdamW | AdamW8bit | Adafactor | Prodigy, groups: Sequence[Group]
) -> torch.optim.Optimizer:
    """Build what moves the weights.

    Every group of the result has `initial_lr`, the peak that `apply_learning_rate` multiplies.

    Args:
        section: which optimizer, and its options.
        groups: parameters, and their own learning rate where it differs; other keys are left out.

    Raises:
        ConfigError: there is nothing to train.
        MissingPackage: the 8-bit optimizer without bitsandbytes or without CUDA.
    """
    rated: list[dict[str, Any]] = []
    for group in groups:
        parameters, rate = list(group["params"]), group.get("lr")
        if parameters:
            rated.append({"params": parameters, "lr": section.learning_rate if rate is None else rate})
    if not rated:
        raise ConfigError(
            "there is nothing to train: no parameter was handed to the optimizer",
            remedy="Check `method.targets`, `method.include` and `method.exclude`.",
        )
    optimizer = _build(section, rated)
    for built in optimizer.param_groups:
        built["initial_lr"] = built["lr"]
    return optimizer


def _build(
    section: AdamW | AdamW8bit | Adafactor | Prodigy, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    match section:
        case AdamW():
            fused = _are_on_cuda(groups)
            return torch.optim.AdamW(
                groups,
                lr=section.learning_rate,
                betas=section.betas,
                eps=section.eps,
                weight_decay=section.weight_decay,
                # An adapter is hundreds of small tensors: one kernel for many of them, or one call.
                fused=fused,
                foreach=not fused,
            )
        case AdamW8bit():
            return _adamw8bit(section, groups)
        case Adafactor():
            return _adafactor(section, groups)
        case Prodigy():
            return _prodigy(section, groups)


def _are_on_cuda(groups: list[dict[str, Any]]) -> bool:
    return all(parameter.is_cuda for group in groups for parameter in group["params"])


def _adamw8bit(section: AdamW8bit, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingPackage(
            "train.optimizer.kind: adamw8bit needs the package bitsandbytes, which is not installed",
            remedy='Install it with `pip install "burnish[quant]"` (it needs CUDA), or use kind: adamw.',
        ) from error
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if devices != {"cuda"}:
        raise MissingPackage(
            f"train.optimizer.kind: adamw8bit needs CUDA; this run trains on {', '.join(sorted(devices))}",
            remedy="Use train.optimizer.kind: adamw, or a machine with an NVIDIA GPU.",
        )
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
    return optimizer


def _adafactor(section: Adafactor, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The one of transformers with relative steps and parameter scaling off: a fixed learning rate.

    `torch.optim.Adafactor` always multiplies a step by the parameter's own root mean square, at least 1e-3.
    The half of an adapter that starts at zero would learn a thousand times slower than the rate in the config
    says.
    """
    from transformers.optimization import Adafactor as FixedRateAdafactor

    optimizer: torch.optim.Optimizer = FixedRateAdafactor(
        groups,
        lr=section.learning_rate,
        clip_threshold=section.clip_threshold,
        decay_rate=section.beta2_decay,
        beta1=None,
        weight_decay=section.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )
    return optimizer


def _prodigy(section: Prodigy, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Prodigy with decoupled weight decay.

    It knows one learning rate for all groups. A group's own rate becomes a share of the section's: its
    parameters go that share of the way that Prodigy moved them, and the estimate of the rate sees all groups
    alike.
    """
    from prodigyopt import Prodigy as ProdigyOptimizer

    shares = [group["lr"] / section.learning_rate for group in groups]
    optimizer: torch.optim.Optimizer = ProdigyOptimizer(
        # The decay is given per group, because the constructor prints a line to stdout when given one itself.
        [{"params": group["params"], "weight_decay": section.weight_decay} for group in groups],
        lr=section.learning_rate,
        betas=section.betas,
        weight_decay=0.0,
        decouple=True,
        safeguard_warmup=section.safeguard_warmup,
        d0=section.d0,
        d_coef=section.d_coef,
    )
    for group, share in zip(optimizer.param_groups, shares, strict=True):
        if share != 1.0:
            _go_a_share_of_the_way(optimizer, group["params"], share)
    return optimizer


def _go_a_share_of_the_way(optimizer: torch.optim.Optimizer, parameters: list[Tensor], share: float) -> None:
    """After each step, put `parameters` at `before + share * (after - before)`."""
    before: list[Tensor] = []

    def remember(*_: object) -> None:
        before[:] = [parameter.detach().clone() for parameter in parameters]

    def shorten(*_: object) -> None:
        with torch.no_grad():
            for parameter, start in zip(parameters, before, strict=True):
                parameter.copy_(start.lerp_(parameter, share))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(shorten)
