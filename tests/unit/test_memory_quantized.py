"""Weights in fewer bits: how far products and gradients are from those of float32, and what a layer looks like."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from cublas_rules import watched
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import ModuleChoice, adaptable_modules
from burnish.memory import formats
from burnish.memory.formats import FEW_ROWS, FORMATS, FormatName, has_kernel, slow_because
from burnish.memory.quantized import QuantizedLinear, choose_products, large_linears, replace_linears
from burnish.memory.rounding import INT4, NF4, mixing, rotated, rotated_back, rounded_to_fp8, rounded_to_int8

NAMES = list(FORMATS)


def error(found: Tensor, right: Tensor) -> float:
    """Relative, in Frobenius norm."""
    return float((found.detach().double() - right.double()).norm() / right.double().norm())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: Tensor, kept_as: str, bias: Tensor | None = None) -> QuantizedLinear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight.dtype)
    plain.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return QuantizedLinear.of(plain, kept_as)


def both_ways(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What it gives, and the gradient of its input."""
    x = x.clone().requires_grad_()
    output = layer(x)
    (back,) = torch.autograd.grad(output, x, grad)
    return output.detach(), back


@pytest.mark.parametrize(
    ("kept_as", "outliers", "forward_at_most"),
    [
        ("int8", None, 0.015),
        ("fp8", None, 0.04),
        ("int8", "neighbours", 0.025),
        ("int8", "apart", 0.025),
        ("fp8", "apart", 0.04),
    ],
)
def test_products_are_as_near_as_the_formats_allow(
    kept_as: str, outliers: str | None, forward_at_most: float
) -> None:
    x, weight, grad = normal(1024, 3072), normal(3072, 3072, seed=1), normal(1024, 3072, seed=2)
    if outliers is not None:
        x[:, slice(8) if outliers == "neighbours" else slice(100, 3072, 380)] *= 50
    output, back = both_ways(layer_of(weight, kept_as), x, grad)
    assert error(output, F.linear(x, weight)) <= forward_at_most
    assert error(back, grad @ weight) <= {"int8": 0.015, "fp8": 0.04}[kept_as]


@pytest.mark.parametrize(("kept_as", "at_most"), [("int8", 0.01), ("fp8", 0.03), ("nf4", 0.1), ("int4", 0.1)])
def test_the_weight_is_near_what_was_kept(kept_as: str, at_most: float) -> None:
    weight = normal(64, 320) * 0.02
    layer = layer_of(weight, kept_as)
    assert layer.weight.dtype == weight.dtype
    assert 0 < error(layer.weight, weight) <= at_most


@pytest.mark.parametrize("kept_as", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_few_rows_meet_the_widened_weight_both_ways(kept_as: str, dtype: torch.dtype) -> None:
    layer = layer_of((normal(48, 160) * 0.05).to(dtype), kept_as, normal(48, seed=3).to(dtype))
    x, grad = normal(2, 3, 160, seed=1).to(dtype), normal(2, 3, 48, seed=2).to(dtype)
    output, back = both_ways(layer, x, grad)
    assert output.dtype == back.dtype == dtype
    # The rounding of these types to 1 part in 2^8 or 2^11 is all that may differ.
    near = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert error(output, F.linear(x.double(), layer.weight.double(), layer.bias.double())) < near
    assert error(back, grad.double() @ layer.weight.double()) < near


@pytest.mark.parametrize("kept_as", ["int8", "fp8"])
def test_many_rows_meet_rounded_rows_exactly_as_the_formula_says(kept_as: str) -> None:
    """Against the rounded factors multiplied in float64."""
    layer = layer_of(normal(48, 160) * 0.05, kept_as)
    x, grad = normal(FEW_ROWS, 160, seed=1), normal(FEW_ROWS, 48, seed=2)
    output, back = both_ways(layer, x, grad)
    rounded = {"int8": rounded_to_int8, "fp8": rounded_to_fp8}[kept_as]
    seen = layer.codes.double() * layer.scales.double()  # as the products see it
    mixed = rotated(x, mixing(160, "cpu")) if kept_as == "int8" else x
    codes, scales = rounded(mixed)
    assert error(output, (codes.double() * scales) @ seen.T) < 1e-6
    codes, scales = rounded(grad * layer.scales.T)
    expected = (codes.double() * scales) @ layer.codes.double()
    expected = rotated(expected, mixing(160, "cpu")) if kept_as == "int8" else expected
    assert error(back, expected) < 1e-6
    assert error(output, F.linear(x, layer.weight)) > 1e-3  # they are rounded


@pytest.mark.parametrize("kept_as", ["int8", "fp8"])
def test_rows_in_portions_give_the_same(kept_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(normal(48, 160), kept_as)
    x, grad = normal(200, 160, seed=1), normal(200, 48, seed=2)
    at_once = both_ways(layer, x, grad)
    monkeypatch.setattr(formats, "NUMBERS_AT_ONCE", 160 * 70)
    assert all(torch.equal(a, b) for a, b in zip(both_ways(layer, x, grad), at_once, strict=True))


@pytest.mark.parametrize("features", [16, 48, 160, 640, 3072])
def test_mixing_back_undoes_mixing_in_any_number_type(features: int) -> None:
    x, weight = normal(4, features), normal(8, features, seed=1)
    matrix = mixing(features, "cpu")
    mixed = rotated(x, matrix) @ rotated_back(weight, matrix).T
    assert error(mixed, x @ weight.T) < 1e-6
    assert rotated(x, matrix).norm() <= x.norm() * (1 + 1e-6)
    signs = matrix.float() / matrix[0, 0].float()
    assert set(signs.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(signs @ signs.T, len(matrix) * torch.eye(len(matrix)))


def test_a_row_that_is_not_finite_stays_so() -> None:
    for kept_as in NAMES:
        layer = layer_of(normal(32, 64), kept_as)
        for rows in (2, FEW_ROWS):
            x = normal(rows, 64)
            x[1, 5] = float("nan")
            output, back = both_ways(layer, x, torch.full((rows, 32), float("inf")))
            assert not output[1].isfinite().any(), kept_as
            assert output[0].isfinite().all(), kept_as
            assert not back.isfinite().any(), kept_as


def test_the_largest_number_of_a_row_never_overflows() -> None:
    rows = torch.cat([normal(4096, 16, seed=seed).abs() * 10.0 ** (seed - 4) for seed in range(8)])
    for rounded, limit in ((rounded_to_fp8, 448.0), (rounded_to_int8, 127.0)):
        codes, scales = rounded(rows)
        assert torch.equal(codes.float().amax(1), torch.full((len(rows),), limit))
        assert torch.allclose(codes.float().amax(1, keepdim=True) * scales, rows.amax(1, keepdim=True))


def test_rows_of_zeros_stay_zeros() -> None:
    for kept_as in NAMES:
        layer = layer_of(torch.zeros(32, 64), kept_as)
        assert torch.equal(layer.weight, torch.zeros(32, 64))
        output, back = both_ways(layer_of(normal(32, 64), kept_as), torch.zeros(40, 64), torch.zeros(40, 32))
        assert not output.any()
        assert not back.any()


def test_nf4_has_the_numbers_of_the_paper() -> None:
    """QLoRA, section 3, as bitsandbytes' `create_normal_map` computes it; the largest quantile is its 0.9677083."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    numbers = sorted([*above, 0.0, *below])
    assert [number / max(numbers) for number in numbers] == pytest.approx(NF4, abs=1e-6)


@pytest.mark.parametrize("kept_as", ["nf4", "int4"])
def test_four_bits_pick_the_nearest_number(kept_as: str) -> None:
    weight = normal(16, 128)
    layer = layer_of(weight, kept_as)
    assert layer.codes.nbytes == weight.numel() / 2
    table = torch.tensor({"nf4": NF4, "int4": INT4}[kept_as])
    groups = weight.reshape(16, -1, 64, 1)
    choices = table * layer.scales.float()[:, :, None, None]
    nearest = choices.take_along_dim((groups - choices).abs().argmin(-1, keepdim=True), -1)
    assert torch.equal(layer.weight, nearest.flatten(1))


def test_nf4_agrees_with_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(32, 256) * 0.03
    layer = layer_of(weight, "nf4")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(NF4, abs=1e-7)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(codes, state)
    assert error(layer.weight, weight) == pytest.approx(error(theirs, weight), rel=0.01)
    # Their codes and scales through our unpacking.
    ours = layer.kept.unpack(codes.view(32, 128), state.absmax.view(32, 4), layer.table, torch.float32)
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_an_adapter_takes_it_for_the_layer_that_it_is() -> None:
    adapters = {}
    for kept_as in (None, "int8"):
        model = nn.ModuleDict({"block": nn.Sequential(*(nn.Linear(*s) for s in ((64, 128), (128, 64))))})
        if kept_as is not None:
            layers = large_linears(model, [model["block"]], kept_as, smallest=0)
            assert list(layers) == ["block.0", "block.1"]
            for name, made in replace_linears(model, layers, kept_as).items():
                made.take(*made.kept.pack(layers[name].weight.detach()))
        assert list(adaptable_modules(model)) == ["block.0", "block.1"]
        choices = {name: ModuleChoice(4, 4.0) for name in adaptable_modules(model)}
        adapters[kept_as] = AdapterSet.attach(model, choices, dropout=0.0, seed=1)
        x = normal(40, 64)
        model["block"](x).square().mean().backward()
        for name, parameter in adapters[kept_as].named_parameters().items():
            assert parameter.grad is not None, name
    plain, kept = (one.state_dict() for one in adapters.values())
    assert all(torch.equal(plain[name], kept[name]) for name in plain)  # the same random start


@pytest.mark.parametrize("kept_as", NAMES)
def test_nothing_of_the_activations_is_saved(kept_as: FormatName) -> None:
    layer = layer_of(normal(64, 128), kept_as)
    own = {tensor.data_ptr() for tensor in layer.buffers()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(normal(64, 128).requires_grad_())
    assert {tensor.data_ptr() for tensor in saved} <= own


@pytest.mark.parametrize("kept_as", NAMES)
@pytest.mark.parametrize("rows", [2, 64])
def test_a_step_can_be_traced_without_weights(kept_as: str, rows: int) -> None:
    with FakeTensorMode():
        model = nn.ModuleList([nn.Linear(64, 128)])
        replace_linears(model, large_linears(model, [model[0]], kept_as, smallest=0), kept_as)
        (layer,) = model
        assert isinstance(layer, QuantizedLinear)
        x = torch.empty(rows, 64, requires_grad=True)
        output = layer(x)
        output.sum().backward()
        assert output.shape == (rows, 128)
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert layer.weight.shape == (128, 64)


# torch's own tracing of an autograd function makes one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kept_as", ["int8", "fp8", "nf4"])
def test_it_compiles_into_one_graph(kept_as: str) -> None:
    layer = layer_of(normal(64, 128), kept_as)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, grad = normal(40, 128), normal(40, 64)
    for ours, theirs in zip(both_ways(compiled, x, grad), both_ways(layer, x, grad), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_only_large_layers_of_the_blocks_are_chosen() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj_in = nn.Linear(1024, 1024)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 16))])
            self.blocks.append(nn.Sequential(nn.Linear(1024, 1000), nn.Linear(1001, 1024)))
            self.blocks.append(nn.Sequential(tied := nn.Linear(1024, 1024)))
            self.head = nn.Linear(1024, 1024)
            self.head.weight = tied.weight

    model = Model()
    assert list(large_linears(model, model.blocks, "int8")) == ["blocks.0.0", "blocks.1.0"]
    assert list(large_linears(model, model.blocks, "fp8")) == ["blocks.0.0"]  # multiples of 16


def test_weights_of_another_shape_or_format_are_refused() -> None:
    layer = layer_of(normal(32, 64), "int8")
    with pytest.raises(ValueError, match="are no int8 weights"):
        layer.take(*FORMATS["fp8"].pack(normal(32, 64)))
    with pytest.raises(ValueError, match="are no int8 weights"):
        layer.take(*FORMATS["int8"].pack(normal(64, 32)))


def test_a_device_without_the_products_widens_weights_and_says_so() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert slow_because("native", meta) is None
    assert slow_because("int8", cpu) is slow_because("fp8", cpu) is None
    assert "widened" in str(slow_because("nf4", cpu))
    assert "8.9" in str(slow_because("fp8", meta))
    with FakeTensorMode():
        assert has_kernel("fp8", cpu)
    layer = layer_of(normal(64, 128), "int8")
    layer.eight_bit = False  # as of one that was loaded elsewhere
    x = normal(64, 128, seed=1)
    assert error(layer(x), F.linear(x, layer.weight)) < 1e-6
    choose_products(nn.ModuleList([layer]), cpu)
    assert error(layer(x), F.linear(x, layer.weight)) > 1e-3


@pytest.mark.parametrize("kept_as", ["int8", "fp8"])
def test_products_ask_of_a_gpu_what_it_can_do(kept_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(normal(64, 48).bfloat16(), kept_as)
    asked = watched(monkeypatch)
    laid_by_columns = normal(48, 40).bfloat16().t()
    right = both_ways(layer, laid_by_columns.contiguous(), normal(40, 64, seed=2).bfloat16())
    found = both_ways(layer, laid_by_columns, normal(64, 40, seed=2).bfloat16().t())
    assert len(asked) == 4
    assert torch.equal(found[0], right[0])
    few = torch.cat([laid_by_columns] * 3).view(3, 40, 48).transpose(0, 1)
    monkeypatch.setattr(formats, "NUMBERS_AT_ONCE", 64 * 40)
    layer(few)
    assert len(asked) == 7
