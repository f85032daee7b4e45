"""One training step of a family at full size with random weights: Burnish beside the peers' usual path, in one process.

    python -m tools.benchmarks.step --family flux --weights fp8 --activations keep --compile
    python -m tools.benchmarks.step --family flux --cap 24GiB --weights fp8 --activations keep-attention --stream 0.4
    python -m tools.benchmarks.step --family pixart --depth 1 --size 64        # on a CPU

The peers' path is eager, under autocast, with PEFT's LoRA of the same rank on the same modules and every block's
activations computed again. `peak_bytes` is `torch.cuda.max_memory_allocated`, on a CPU what the allocator held above
what was there before; `predicted_bytes` is what the planner says of Burnish's.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from burnish.planner.recipe import Shape
from burnish.run_plan import budget_of
from tools.benchmarks import harness
from tools.benchmarks.harness import Model, Settings


def peers_step(model: Model, shape: Shape, device: torch.device) -> Callable[[], None]:
    """A step as the scripts of diffusers and most trainers run it."""
    from peft import LoraConfig, inject_adapter_in_model

    family = harness.with_random_weights(model, device)
    choices = model.choices(family)
    for part, denoiser in family.denoisers.items():
        names = "|".join(re.escape(name) for name in choices[part])
        config = LoraConfig(r=model.rank, lora_alpha=model.rank, target_modules=f"({names})")
        inject_adapter_in_model(config, denoiser)
        _recompute_all(denoiser, family.blocks())
        denoiser.train()
    parameters = [
        one for denoiser in family.denoisers.values() for one in denoiser.parameters() if one.requires_grad
    ]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    batch, objective = harness.batch_of(family, shape), harness.objective_of(family)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype != torch.float32):
            losses_B, _ = objective.losses(family, batch, 0)
        torch.autograd.backward(losses_B.mean())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _recompute_all(denoiser: Any, blocks: Sequence[nn.Module]) -> None:
    """The model's own checkpointing where it has one, else that of each block."""
    if getattr(denoiser, "_supports_gradient_checkpointing", False):
        denoiser.enable_gradient_checkpointing()
        return
    for block in blocks:
        plain = block.forward
        block.forward = lambda *args, plain=plain, **kwargs: checkpoint(
            plain, *args, use_reentrant=False, **kwargs
        )


def measured(step: Callable[[], None], steps: int, device: torch.device) -> dict[str, Any]:
    harness.wait(device)
    figures: dict[str, Any] = dict(harness.summary(harness.seconds(step, steps, device)))
    figures["peak_bytes"] = harness.peak_bytes(step, device)
    return figures


def compared(
    model: Model, shape: Shape, settings: Settings, device: torch.device, steps: int, *, peers: bool = True
) -> dict[str, Any]:
    """Both paths one after the other, and their ratios."""
    figures: dict[str, Any] = {}
    if peers:
        figures["peers"] = _attempt(lambda: measured(peers_step(model, shape, device), steps, device))
        harness.give_back()
    with tempfile.TemporaryDirectory() as cache:

        def ours() -> dict[str, Any]:
            step, attention = harness.burnish_step(model, shape, settings, device, Path(cache))
            with attention.installed():
                found = measured(step, steps, device)
            rules = {str(rule.kind): rule.back_end for rule in attention.rules}
            return {**found, "attention": rules}

        figures["burnish"] = _attempt(ours)
    harness.give_back()
    on_cuda = device.type == "cuda"
    peak, resident = harness.predicted_bytes(model, shape, settings, cuda=on_cuda)
    predicted = peak if on_cuda else peak - resident
    figures["burnish"]["predicted_bytes"] = predicted
    if "ms" in figures["burnish"]:
        figures["real_over_predicted"] = round(figures["burnish"]["peak_bytes"] / predicted, 4)
        if "ms" in figures.get("peers", {}):
            figures["times_as_fast"] = round(figures["peers"]["ms"] / figures["burnish"]["ms"], 3)
    return figures


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a path gives, or that it does not fit."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return {"trouble": str(error).splitlines()[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser_for(__doc__, of_a_model=True)
    parser.add_argument("--family", default="flux")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--weights", default="native", choices=("native", "fp8", "int8", "nf4", "int4"))
    parser.add_argument("--activations", default="keep", type=harness.activations_of)
    parser.add_argument("--stream", type=float, default=0.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--cap", help="as much of the GPU as a smaller one has, such as 24GiB")
    parser.add_argument("--without-peers", action="store_true")
    told = parser.parse_args(arguments)
    device = torch.device(told.device)
    if told.cap is not None:
        if device.type != "cuda":
            sys.exit("--cap is for a GPU")
        share = (budget_of(told.cap) or 0) / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    settings = Settings(told.weights, told.activations, told.stream, told.compile, told.attention)
    model, shape = harness.model_of(told, told.family), harness.shape_of(told)
    figures = compared(model, shape, settings, device, told.steps, peers=not told.without_peers)
    options = {name: str(value) for name, value in vars(told).items() if value is not None}
    harness.tell(device, {**figures, "options": options})


if __name__ == "__main__":
    main()
