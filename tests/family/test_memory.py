"""Every family: what saves memory changes neither losses nor gradients.

Device and host are both the CPU here; copies between them come late and leave poison behind (`pretend_transfer`), so
that a weight or an activation that is read too early, too late or around the stream is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from pretend_transfer import PretendedTransfer
from tiny import cases
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import ModuleChoice, adaptable_modules
from burnish.conditioning import Conditioning
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.memory.activation_offload import offload_activations
from burnish.memory.activations import Mode, set_activations
from burnish.memory.streaming import stream_weights

TinyFolder = Callable[[str], Path]
# A clip's pipeline drawn as a still is the same pipeline.
FAMILY_OF = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    **{name: case.family for name, case in cases().items() if not name.endswith("_still")},
}
SIDE, STEPS = 64, 3
CPU = torch.device("cpu")


@dataclass
class Tuned:
    """A tiny denoiser with adapters, and three batches to learn from."""

    family: Family
    parameters: dict[str, nn.Parameter]
    first: dict[str, Tensor]  # the parameters' values at the start
    batches: list[tuple[Tensor, Tensor, Conditioning, Tensor]]

    def learn_with(self, modes: Sequence[Mode]) -> list[Tensor]:
        """The modes go round the blocks."""
        blocks = self.family.blocks()
        set_activations(blocks, list(islice(cycle(modes), len(blocks))))
        return self.learn()

    def learn(self) -> list[Tensor]:
        """Losses and gradients of three steps from the start, dropout included."""
        with torch.no_grad():
            for name, value in self.first.items():
                self.parameters[name].copy_(value)
        seen = []
        for step, (noisy, t_B, conditioning, target) in enumerate(self.batches):
            torch.manual_seed(step)
            loss = (self.family.predict(noisy, t_B, conditioning) - target).square().mean()
            loss.backward()
            seen += [loss.detach(), *(self.take(one) for one in self.parameters.values())]
        return seen

    @staticmethod
    def take(parameter: nn.Parameter) -> Tensor:
        """Its gradient, and a step against it."""
        if parameter.grad is None:
            return torch.zeros(())
        with torch.no_grad():
            gradient = parameter.grad / parameter.grad.norm().clamp(min=1e-12)
            parameter -= 0.1 * gradient
        parameter.grad = None
        return gradient


def tuned(folder: Path, name: str) -> Tuned:
    kind = family_named(FAMILY_OF[name])
    source = ModelSource(str(folder))
    family = kind.load(source, frozenset({"denoiser"}), dtype=torch.float32, device="cpu")
    parameters = {}
    for part, denoiser in family.denoisers.items():
        some = list(adaptable_modules(denoiser))[::3]
        choices = dict.fromkeys(some, ModuleChoice(rank=2, alpha=2.0))
        adapter = AdapterSet.attach(denoiser, choices, dropout=0.1, seed=1)
        parameters |= {f"{part}.{key}": value for key, value in adapter.named_parameters().items()}
    batches = []
    for number in range(STEPS):
        noisy, t_B, conditioning = family.example(SIDE, SIDE, batch=1)
        generator = torch.Generator().manual_seed(number)
        noisy = torch.randn(noisy.shape, generator=generator)
        # Of two experts, one for early and one for late times, each has its turn.
        t_B = torch.full_like(t_B, (number + 0.5) / STEPS)
        batches.append((noisy, t_B, conditioning, torch.randn(noisy.shape, generator=generator)))
    first = {key: value.detach().clone() for key, value in parameters.items()}
    return Tuned(family, parameters, first, batches)


def streamed(family: Family, share: float) -> PretendedTransfer:
    """With so few rooms that blocks have to take turns."""
    transfer, blocks = PretendedTransfer(), family.blocks()
    rooms = 2 if len(blocks) > 2 and share == 1 else 1
    stream = stream_weights(family.denoisers.values(), blocks, share, transfer, CPU, rooms=rooms)
    assert stream is not None
    transfer.hide()
    return transfer


def offloaded(family: Family) -> PretendedTransfer:
    transfer = PretendedTransfer()
    offload_activations(family.denoisers.values(), family.blocks(), transfer, smallest=512, leaving=0)
    return transfer


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], what: object) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all(), what
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", FAMILY_OF)
def test_losses_and_gradients_are_those_of_the_plain_path(tiny_folder: TinyFolder, name: str) -> None:
    folder = tiny_folder(name)
    model = tuned(folder, name)
    expected = model.learn()
    all_away = streamed(model.family, 1.0)
    assert_same(model.learn_with(["keep"]), expected, "keep")
    assert_same(model.learn_with(["keep-matmul"]), expected, "keep-matmul")
    offloaded(model.family)
    assert_same(model.learn_with(["recompute"]), expected, "recompute")

    model = tuned(folder, name)
    half_away = streamed(model.family, 0.5)
    activations = offloaded(model.family)
    assert_same(model.learn_with(["keep-attention", "recompute", "keep", "keep-matmul"]), expected, "mixed")
    assert 0 < len(half_away.started) < len(all_away.started)
    assert len(activations.device_rooms) >= STEPS, "nothing came back"
