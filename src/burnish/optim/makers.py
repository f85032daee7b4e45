"""One function per kind of optimizer: its section's options in the words of the library that has it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from burnish.config.optimizers import (
    Adafactor,
    AdamW,
    AdamW8bit,
    AdamWScheduleFree,
    AdEMAMix,
    AnyOptimizer,
    Came,
    CustomOptimizer,
    Lion,
    Muon,
    Prodigy,
    ProdigyScheduleFree,
    Soap,
)
from burnish.errors import MissingPackage
from burnish.optim.custom import custom
from burnish.optim.muon import MuonAndAdamW

Groups = list[dict[str, Any]]
"""`params` and `lr` of each."""


def make(section: AnyOptimizer, groups: Groups) -> torch.optim.Optimizer:
    """The optimizer of a section, over groups that have parameters and a peak rate each.

    Raises:
        ConfigError: a class by path that is none, or does not take the arguments given.
        MissingPackage: a library is not here, or not for this device.
    """
    match section:
        case AdamW():
            return _adamw(section, groups)
        case AdamW8bit():
            return _adamw8bit(section, groups)
        case Adafactor():
            return _adafactor(section, groups)
        case Lion():
            return _lion(section, groups)
        case Came():
            return _came(section, groups)
        case Prodigy():
            return _prodigy(section, groups)
        case ProdigyScheduleFree():
            return _prodigy_schedule_free(section, groups)
        case AdamWScheduleFree():
            return _adamw_schedule_free(section, groups)
        case Muon():
            return MuonAndAdamW(groups, section)
        case Soap():
            return _soap(section, groups)
        case AdEMAMix():
            return _ademamix(section, groups)
        case CustomOptimizer():
            return custom(section, groups)


def library(section: AnyOptimizer) -> Any:
    """The package that has the optimizer.

    Raises:
        MissingPackage: it is not installed.
    """
    assert section.package is not None
    try:
        return import_module(section.package)
    except ImportError as error:
        name = {"prodigyplus": "prodigy-plus-schedule-free"}.get(section.package, section.package)
        raise MissingPackage(
            f"train.optimizer.kind: {section.kind} needs the package {name.replace('_', '-')}, which is not installed",
            remedy=f'Install it with `pip install "burnish[{section.extra}]"`, or use kind: adamw.',
        ) from error


def _adamw(section: AdamW, groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        # One call for an adapter's hundreds of small tensors, one pass over a large one. On a CPU it wants gradients
        # laid out as their parameters are, which autograd sees to.
        fused=True,
    )


def _adamw8bit(section: AdamW8bit, groups: Groups) -> torch.optim.Optimizer:
    library(section)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if not devices <= {"cuda", "cpu", "xpu"}:
        raise MissingPackage(
            f"train.optimizer.kind: adamw8bit is not there for {', '.join(sorted(devices))}",
            remedy="Use train.optimizer.kind: adamw, or adafactor, which also takes little memory.",
        )
    from burnish.optim.eight_bit import SharedTables

    optimizer: torch.optim.Optimizer = SharedTables(
        groups,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        is_paged=section.paged and devices == {"cuda"},
    )
    return optimizer


def _adafactor(section: Adafactor, groups: Groups) -> torch.optim.Optimizer:
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


def _lion(section: Lion, groups: Groups) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = library(section).Lion(
        groups, lr=section.learning_rate, betas=section.betas, weight_decay=section.weight_decay
    )
    return optimizer


def _came(section: Came, groups: Groups) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = library(section).CAME(
        groups,
        lr=section.learning_rate,
        betas=section.betas,
        weight_decay=section.weight_decay,
        clip_threshold=section.clip_threshold,
    )
    return optimizer


def _adamw_schedule_free(section: AdamWScheduleFree, groups: Groups) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = library(section).ScheduleFreeAdamW(
        groups,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
    return optimizer


def _soap(section: Soap, groups: Groups) -> torch.optim.Optimizer:
    """Its first step only looks at the gradients: there are no directions to go in before."""
    optimizer: torch.optim.Optimizer = library(section).SOAP(
        groups,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        precondition_frequency=section.every,
        max_precondition_dim=section.largest_side,
    )
    return optimizer


def _ademamix(section: AdEMAMix, groups: Groups) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = library(section).AdEMAMix(
        groups,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        weight_decouple=True,
        alpha=section.alpha,
        t_alpha_beta3=section.rise_steps,
    )
    return optimizer


def _prodigy(section: Prodigy, groups: Groups) -> torch.optim.Optimizer:
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


def _prodigy_schedule_free(section: ProdigyScheduleFree, groups: Groups) -> torch.optim.Optimizer:
    """One estimate over all groups, whose own rates multiply it; rounding is done around it, not in it."""
    optimizer: torch.optim.Optimizer = library(section).ProdigyPlusScheduleFree(
        groups,
        lr=section.learning_rate,
        betas=section.betas,
        weight_decay=section.weight_decay,
        d0=section.d0,
        d_coef=section.d_coef,
        factored=section.factored,
        split_groups=False,
        stochastic_rounding=False,
    )
    return optimizer
