"""Every family's blocks compile without a break in their graphs, and compute what they computed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import cases
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.targeting import choose_modules
from burnish.compute.compile import compile_blocks
from burnish.config.method import Lora
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.memory.activations import Mode, set_activations
from burnish.memory.quantized import QuantizedLinear

TinyFolder = Callable[[str], Path]
# One pipeline of each family: its others have the same blocks.
PIPELINE_OF = {"sd15": "sd15", "sdxl": "sdxl"}
for name, case in cases().items():
    PIPELINE_OF.setdefault(case.family, name)


# Experts that a token is sent to are known when they are called; what is around them compiles.
IN_PIECES = {"hidream", "hidream_e1"}


def adapted(
    folder: Path, family_name: str, change: Callable[[Family], None] = lambda family: None
) -> tuple[Family, list[nn.Parameter]]:
    """A family's denoisers with adapters that have an effect."""
    parts = frozenset(("denoiser",))
    family = family_named(family_name).load(
        ModelSource(str(folder)), parts, dtype=torch.float32, device="cpu"
    )
    change(family)
    trained: list[nn.Parameter] = []
    generator = torch.Generator().manual_seed(0)
    for denoiser in family.denoisers.values():
        method = Lora(kind="lora", rank=4, alpha=4)
        choices = choose_modules(denoiser, family.targets, family.default_targets, method)
        found = AdapterSet.attach(denoiser, choices, dropout=0.0, seed=1).named_parameters()
        for parameter in found.values():
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        trained += found.values()
    return family, trained


def one_of_each(family: Family) -> list[nn.Module]:
    """The last block of each class: its input has gradients, as that of all but a model's first block."""
    inside = {module: part for part, denoiser in family.denoisers.items() for module in denoiser.modules()}
    return list({(type(block), inside[block]): block for block in family.blocks()}.values())


def loss_and_gradients(family: Family, trained: list[nn.Parameter], side: int) -> tuple[Tensor, list[Tensor]]:
    loss = family.predict(*family.example(side, side, batch=2)).square().mean()
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss.detach(), [one for one in gradients if one is not None]


def assert_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    whole, right = (torch.cat([one.flatten() for one in pair[1]]) for pair in (found, expected))
    assert (whole - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("name", PIPELINE_OF)
def test_compiled_blocks_compute_the_same(tiny_folder: TinyFolder, tmp_path: Path, name: str) -> None:
    family, trained = adapted(tiny_folder(PIPELINE_OF[name]), name)
    expected = loss_and_gradients(family, trained, 64)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    chosen = one_of_each(family)
    compilation = compile_blocks(chosen, pytest.fail, tmp_path, backend="eager")
    assert_same(loss_and_gradients(family, trained, 64), expected)
    assert compilation.graphs == len({type(block) for block in chosen}) + (name in IN_PIECES)
    assert bool(torch._dynamo.utils.counters["graph_break"]) == (name in IN_PIECES)


@pytest.mark.parametrize("name", ["flux"])
def test_blocks_of_one_class_share_graphs_and_so_do_all_sizes_after_the_first(
    tiny_folder: TinyFolder, tmp_path: Path, name: str
) -> None:
    family, trained = adapted(tiny_folder(name), name)
    sizes = (64, 96, 128, 64)
    expected = [loss_and_gradients(family, trained, side) for side in sizes]
    torch._dynamo.reset()
    compilation = compile_blocks(family.blocks(), pytest.fail, tmp_path, backend="aot_eager")
    graphs = []
    for side, right in zip(sizes, expected, strict=True):
        assert_same(loss_and_gradients(family, trained, side), right)
        graphs.append(compilation.graphs)
    # Of each of two classes the first block differs: nothing before it is trained, or its input lies otherwise.
    assert graphs == [4, 8, 8, 8]


@pytest.mark.parametrize(
    ("mode", "kept_as"),
    [
        ("keep-matmul", None),
        ("recompute", None),
        ("keep-attention", "int8"),
        ("recompute", "fp8"),
        ("keep-matmul", "nf4"),
    ],
)
def test_modes_of_activations_and_weights_in_fewer_bits_compile_as_well(
    tiny_folder: TinyFolder, tmp_path: Path, mode: Mode, kept_as: str | None
) -> None:
    def fewer_bits(family: Family) -> None:
        for block in family.blocks() if kept_as else []:
            for name, layer in list(block.named_modules()):
                if isinstance(layer, nn.Linear):
                    parent, _, child = name.rpartition(".")
                    shrunk = QuantizedLinear.of(layer, str(kept_as), eight_bit=True)
                    block.get_submodule(parent).register_module(child, shrunk)

    family, trained = adapted(tiny_folder("ernie_image"), "ernie_image", fewer_bits)
    expected = loss_and_gradients(family, trained, 64)
    torch._dynamo.reset()
    chosen = one_of_each(family)
    set_activations(chosen, [mode] * len(chosen))
    compilation = compile_blocks(chosen, pytest.fail, tmp_path, backend="aot_eager")
    assert_same(loss_and_gradients(family, trained, 64), expected)
    assert compilation.graphs == len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ernie_image", "flux"])
def test_the_kernels_of_the_real_compiler_compute_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    family, trained = adapted(tiny_folder(name), name)
    loss, gradients = loss_and_gradients(family, trained, 64)
    torch._dynamo.reset()
    compile_blocks(one_of_each(family), pytest.fail, tmp_path)
    found_loss, found = loss_and_gradients(family, trained, 64)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    whole, right = (torch.cat([one.flatten() for one in pair]) for pair in (found, gradients))
    assert (whole - right).norm() < 1e-4 * right.norm()
    assert any((tmp_path / "compiled").rglob("*.so")), "nothing is kept for a second run"
