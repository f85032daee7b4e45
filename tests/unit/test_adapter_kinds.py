"""Layers of every kind against LyCORIS' and peft's: output, merged weight and gradients on the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lycoris.functional.lokr import kron_weight
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, LoraModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.adapters.attached import AdapterSet
from burnish.adapters.casting import cast_once
from burnish.adapters.layer import AdapterLayer, ModuleChoice
from burnish.adapters.starts import principal_factors
from burnish.adapters.targeting import choose_modules
from burnish.compute.compile import compile_blocks
from burnish.config.method import AdapterMethod, Boft, Loha, Lokr, Lora, Oft
from burnish.errors import AdapterError
from burnish.family import TargetSet
from burnish.memory.activations import set_activations
from burnish.memory.quantized import QuantizedLinear

METHODS: Mapping[str, AdapterMethod] = {
    "lora": Lora(rank=4, alpha=6.0),
    "tucker": Lora(rank=4, alpha=6.0, tucker=True),
    "dora": Lora(rank=4, alpha=6.0, dora=True),
    "dora, tucker": Lora(rank=4, alpha=2.0, dora=True, tucker=True),
    "rs": Lora(rank=4, alpha=6.0, rs_scaling=True),
    "pissa": Lora(rank=4, alpha=6.0, start="pissa"),
    "olora": Lora(rank=4, start="olora"),
    "loha": Loha(kind="loha", rank=4, alpha=2.0),
    "loha, tucker": Loha(kind="loha", rank=4, alpha=2.0, tucker=True),
    "lokr": Lokr(kind="lokr", factor=4),
    "lokr, thin": Lokr(kind="lokr", factor=4, full_rank=False, rank=2, alpha=3.0),
    "lokr, both thin": Lokr(kind="lokr", factor=-1, full_rank=False, rank=1, alpha=3.0, decompose_both=True),
    "lokr, tucker": Lokr(kind="lokr", factor=4, full_rank=False, rank=2, alpha=3.0, tucker=True),
    "dokr": Lokr(kind="lokr", factor=4, dora=True),
    "dokr, thin": Lokr(kind="lokr", factor=4, full_rank=False, rank=2, alpha=3.0, dora=True),
    "oft": Oft(kind="oft", block_size=4),
    "boft": Boft(kind="boft", block_size=4),
}


COMPILED = ("dora, tucker", "pissa", "loha", "lokr, thin", "dokr", "oft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.out = nn.Linear(16, 32)

    def forward(self, x_B8HW: Tensor) -> Tensor:
        result: Tensor = self.out(self.conv(x_B8HW).tanh().flatten(2).transpose(1, 2))
        return result


def make(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().requires_grad_(False).eval().to(dtype)


def attach(net: nn.Module, method: AdapterMethod, *, fill: bool = True) -> AdapterSet:
    chosen = choose_modules(net, {"both": TargetSet(("conv", "out"), "")}, "both", method)
    adapter = AdapterSet.attach(net, chosen, seed=7)
    generator = torch.Generator().manual_seed(8)
    for name, parameter in adapter.named_parameters().items():
        if fill:
            spread = 0.02 if name.endswith("magnitude") else 0.2
            parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return adapter


def picture(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def merged(net: Net, adapter: AdapterSet) -> Net:
    """A copy of the model without adapters, its weights with what the adapters add."""
    plain = copy.deepcopy(make(net.out.weight.dtype))
    for name, weights in adapter.weights().items():
        layer = plain.get_submodule(name)
        layer.weight.data += weights.delta(layer.weight).to(layer.weight.dtype)
    return plain


@pytest.mark.parametrize("kind", METHODS)
def test_merged_into_the_weights_it_computes_the_same(kind: str) -> None:
    net = make()
    adapter = attach(net, METHODS[kind])
    assert (net(picture()) - make()(picture())).abs().max() > 0.05
    torch.testing.assert_close(net(picture()), merged(net, adapter)(picture()), rtol=1e-5, atol=1e-5)
    adapter.detach()
    assert torch.equal(net(picture()), make()(picture()))


@pytest.mark.parametrize("kind", METHODS)
def test_fresh_it_changes_nothing_and_all_of_it_learns(kind: str) -> None:
    net = make()
    adapter = attach(net, METHODS[kind], fill=False)
    torch.testing.assert_close(net(picture()), make()(picture()), rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.SGD(adapter.named_parameters().values(), lr=0.1)
    before = adapter.named_parameters()
    before = {name: one.detach().clone() for name, one in before.items()}
    for _ in range(3):
        optimizer.zero_grad()
        (net(picture()) - 1).square().sum().backward()
        optimizer.step()
    assert [name for name, one in adapter.named_parameters().items() if torch.equal(one, before[name])] == []


def lycoris_module(kind: str, name: str, base: nn.Module, layer: AdapterLayer) -> nn.Module:
    """LyCORIS' module of the same kind over `base`, with the same tensors."""
    method = METHODS[kind]
    tucker = getattr(method, "tucker", False)
    match method:
        case Lora():
            module = LoConModule(
                name, base, 1.0, 4, method.alpha, use_tucker=tucker, weight_decompose=method.dora,
                rs_lora=method.rs_scaling, bypass_mode=False,
            )  # fmt: skip
            pairs = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}
        case Loha():
            module = LohaModule(name, base, 1.0, method.rank, method.alpha, use_tucker=tucker)
            pairs = {}
        case Lokr():
            module = LokrModule(
                name, base, 1.0, method.rank, method.alpha or method.rank, use_tucker=tucker, factor=method.factor,
                decompose_both=method.decompose_both, full_matrix=method.full_rank, weight_decompose=method.dora,
            )  # fmt: skip
            pairs = {}
        case Oft():
            module, pairs = DiagOFTModule(name, base, 1.0, method.block_size), {}
        case Boft():
            module, pairs = ButterflyOFTModule(name, base, 1.0, method.block_size), {}
    theirs = dict(module.named_parameters())
    for own, parameter in layer.named_parameters(recurse=False):
        other = module.dora_scale if own == "magnitude" else theirs[pairs.get(own, own)]
        other.data.copy_(parameter.detach().reshape(other.shape))
    return module


LYCORIS = [kind for kind in METHODS if kind not in ("pissa", "olora")]


@pytest.mark.parametrize("name", ["conv", "out"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_output_merged_weight_and_gradients_are_those_of_lycoris(kind: str, name: str) -> None:
    net = make()
    adapter = attach(net, METHODS[kind])
    layer = adapter.layers[name]
    base = make().get_submodule(name)
    theirs = lycoris_module(kind, name, base, layer)
    theirs.apply_to()
    x = picture() if name == "conv" else torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    output, expected = layer(x), base(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    weight = make().get_submodule(name).weight
    changed = weight + layer.weights().delta(weight)
    if (
        not isinstance(METHODS[kind], Loha | Lokr) or kind == "lokr"
    ):  # theirs scale twice when they merge (4.1.3)
        torch.testing.assert_close(changed, theirs.get_merged_weight()[0], rtol=1e-5, atol=1e-5)
    if getattr(METHODS[kind], "dora", False):
        return  # LyCORIS lets gradients through the length; peft, as the paper, does not

    (output.square().mean()).backward()
    (expected.square().mean()).backward()
    found = {own: one.grad for own, one in layer.named_parameters(recurse=False)}
    named = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}
    for own, grad in found.items():
        other = dict(theirs.named_parameters())[named.get(own, own)].grad
        assert_close(grad, other.reshape(grad.shape))


@pytest.mark.parametrize("name", ["conv", "out"])
@pytest.mark.parametrize("kind", ["dokr", "dokr, thin"])
def test_gradients_of_a_lokr_with_lengths_are_those_of_the_paper_s_formula(kind: str, name: str) -> None:
    """peft has no such kind; its DoRA of LoRA and the paper keep the length below the line out of gradients."""
    net = make()
    layer = attach(net, METHODS[kind]).layers[name]
    x = picture() if name == "conv" else torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    layer(x).square().mean().backward()
    own = {one: tensor.detach().requires_grad_() for one, tensor in layer.named_parameters(recurse=False)}
    weight = layer.weight
    pieces = [own.get(f"lokr_{one}") for one in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
    scale = 1.0 if "lokr_w2" in own else 3.0 / 2
    changed = weight + kron_weight(*pieces, scale=scale).view(weight.shape)
    ones = [1 for _ in weight.shape[1:]]
    changed = changed * (own["magnitude"] / changed.detach().flatten(1).norm(dim=1)).reshape(-1, *ones)
    if name == "out":
        product = torch.nn.functional.linear(x, changed, layer.bias)
    else:
        product = torch.nn.functional.conv2d(x, changed, layer.bias, stride=2, padding=1)
    product.square().mean().backward()
    for one, parameter in layer.named_parameters(recurse=False):
        assert parameter.grad.any()
        assert_close(parameter.grad, own[one].grad)


@pytest.mark.parametrize("kind", ["dora", "pissa", "olora"])
def test_output_and_gradients_are_those_of_peft(kind: str) -> None:
    method = METHODS[kind]
    assert isinstance(method, Lora)
    ours, theirs = make(), make()
    adapter = attach(ours, method, fill=False)
    config = LoraConfig(
        r=4,
        lora_alpha=method.alpha or 4,
        target_modules=["conv", "out"]
        if kind == "dora"
        else ["out"],  # its other starts are for linear layers
        use_dora=method.dora,
        init_lora_weights=True if kind == "dora" else method.start,
    )
    reference = LoraModel(theirs, config, "default")
    generator = torch.Generator().manual_seed(8)
    for name, layer in adapter.layers.items():
        if name not in config.target_modules:
            layer.active = False
            continue
        other = theirs.get_submodule(name)
        pairs = {"lora_A": other.lora_A["default"].weight, "lora_B": other.lora_B["default"].weight}
        if kind == "dora":
            pairs["magnitude"] = other.lora_magnitude_vector["default"].weight
        own = dict(layer.named_parameters(recurse=False))
        if kind == "olora":
            assert_close(own["lora_A"], pairs["lora_A"])
        if kind == "pissa":  # signs of singular vectors are each library's own
            assert_close(own["lora_B"] @ own["lora_A"], pairs["lora_B"] @ pairs["lora_A"])
        for name, parameter in own.items():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
            pairs[name].data.copy_(parameter.reshape(pairs[name].shape))
    output, expected = ours(picture()), reference(picture())
    assert_close(output, expected)
    output.square().mean().backward()
    expected.square().mean().backward()
    for name in config.target_modules:
        layer, other = adapter.layers[name], theirs.get_submodule(name)
        assert_close(layer.lora_A.grad, other.lora_A["default"].weight.grad)
        assert_close(layer.lora_B.grad, other.lora_B["default"].weight.grad)
        if kind == "dora":
            expected = other.lora_magnitude_vector["default"].weight.grad.flatten()
            assert_close(layer.magnitude.grad, expected)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_cast_together_compiled_and_computed_again_it_is_the_same(kind: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    model = nn.Sequential(make(dtype))
    adapter = attach(model[0], METHODS[kind])

    def gradients(forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        forward(picture(dtype)).float().square().mean().backward()
        found = {name: one.grad.clone() for name, one in adapter.named_parameters().items()}
        for one in adapter.named_parameters().values():
            one.grad = None
        return found

    plain = gradients(model)
    with torch.no_grad():
        drawn = model(picture(dtype))
    cast_once(model, list(adapter.layers.values()), dtype)
    torch._dynamo.reset()
    for mode in ("keep", "recompute", *(["compiled"] if kind in COMPILED else [])):
        if mode == "compiled":
            compile_blocks(list(model), pytest.fail, tmp_path, backend="aot_eager")
        else:
            set_activations(list(model), [mode])
        for name, one in gradients(model).items():
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, plain[name], rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(picture(dtype)), drawn)


@pytest.mark.parametrize("kind", METHODS)
def test_a_base_kept_in_fewer_bits(kind: str) -> None:
    net = make(torch.bfloat16)
    net.out = QuantizedLinear.of(net.out, "int8")
    adapter = attach(net, METHODS[kind])
    found = net(picture(torch.bfloat16))
    plain = make(torch.bfloat16)
    plain.out.weight.data.copy_(net.out.weight)
    other = attach(plain, METHODS[kind])
    other.load_state_dict(adapter.state_dict())
    for name, tensor in adapter.constants().items():
        other.constants()[name].copy_(tensor)
    torch.testing.assert_close(found, plain(picture(torch.bfloat16)), rtol=0.02, atol=0.02)
    found.float().sum().backward()
    assert all(one.grad is not None and one.grad.any() for one in adapter.named_parameters().values())


@pytest.mark.parametrize("kind", METHODS)
def test_without_data_for_planning(kind: str) -> None:
    with FakeTensorMode():
        net = Net().requires_grad_(False)
        adapter = attach(net, METHODS[kind], fill=False)
        net(torch.empty(2, 8, 6, 6)).sum().backward()
        assert all(one.grad is not None for one in adapter.named_parameters().values())


def test_dropped_ranks_and_modules() -> None:
    net = make()
    whole = attach(net, Lora(rank=8))
    output = net(picture())
    whole.detach()
    for method in (Lora(rank=8, rank_dropout=0.5), Lora(rank=8, module_dropout=0.5)):
        adapter = attach(net.train(), method)
        torch.manual_seed(0)
        first = net(picture()).detach()
        torch.manual_seed(0)
        assert torch.equal(first, net(picture()))
        drawn = [net(picture()).detach() for _ in range(8)]
        assert any(not torch.allclose(one, first) for one in drawn)
        with torch.no_grad():
            torch.testing.assert_close(net(picture()), output)
        if method.module_dropout:
            assert any(torch.equal(one, make()(picture())) for one in drawn)
        adapter.detach()


@pytest.mark.parametrize("kind", ["loha", "loha, tucker", "lokr", "dokr", "oft", "boft"])
@pytest.mark.parametrize("target", ["conv", "out"])
def test_dropped_outputs_and_blocks(kind: str, target: str) -> None:
    """What is left out is as in the base; the rest is scaled up, but for turns, which are whole or none."""
    method = METHODS[kind].model_copy(update={"rank_dropout": 0.5})
    net = make().train()
    adapter = attach(net, method)
    for name, layer in adapter.layers.items():
        layer.active = name == target
    layer = adapter.layers[target]
    x = picture() if target == "conv" else torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(5))
    base = layer.base(x)
    with torch.no_grad():
        whole = layer(x) - base
    torch.manual_seed(0)
    found = layer(x).detach() - base
    outputs = 1 if target == "conv" else -1
    whole_NO, found_NO = (one.movedim(outputs, -1).flatten(0, -2) for one in (whole, found))
    if kind == "boft":  # later stages turn what earlier ones left out
        assert not torch.allclose(found, whole)
        adapter.detach()
        return
    if kind == "dokr":  # lengths change what is left out, too: by the row's own factor alone
        factor = found_NO / layer.without_bias(base).movedim(outputs, -1).flatten(0, -2)
        left_out = factor.std(0) < 1e-3
        assert 0 < int(left_out.sum()) < left_out.numel()
        adapter.detach()
        return
    turned = kind == "oft"
    left_out = found_NO.abs().amax(0) < 1e-6
    assert 0 < int(left_out.sum()) < left_out.numel()
    torch.testing.assert_close(
        found_NO[:, ~left_out], whole_NO[:, ~left_out] * (1 if turned else 2), rtol=1e-4, atol=1e-5
    )
    if turned:
        blocks = left_out.view(-1, layer.oft_blocks.shape[-1])
        assert torch.equal(blocks.all(1), blocks.any(1))
    adapter.detach()


def test_b_has_a_rate_of_its_own() -> None:
    adapter = attach(make(), Lora(rank=4, dora=True, b_learning_rate_ratio=16))
    rates = {name: group["lr"] for group in adapter.parameter_groups(1e-4) for name in group["names"]}
    assert rates["out.lora_B"] == pytest.approx(1.6e-3)
    assert rates["out.lora_A"] == rates["out.magnitude"] == 1e-4


def test_a_start_on_the_weight_s_main_part_is_that_and_is_taken_off() -> None:
    net = make()
    adapter = attach(net, Lora(rank=4, alpha=2.0, start="pissa"), fill=False)
    layer = adapter.layers["out"]
    left, values, right = torch.linalg.svd(make().out.weight)
    main = (left[:, :4] * values[:4]) @ right[:4]
    torch.testing.assert_close(layer.scale * layer.lora_B @ layer.lora_A, main, rtol=1e-5, atol=1e-5)
    assert not layer.weights().delta().any()
    assert set(adapter.constants()) == {f"{name}.start_{one}" for name in ("conv", "out") for one in "AB"}

    large = torch.randn(600, 700, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0, 700) ** 4
    down, up = principal_factors(large, 8, "pissa", 1.0, 0, "x")
    left, values, right = torch.linalg.svd(large, full_matrices=False)
    missing = (large - up @ down).norm() / (large - (left[:, :8] * values[:8]) @ right[:8]).norm()
    assert 1 <= missing < 1.01


def test_a_butterfly_needs_outputs_that_can_be_halved() -> None:
    with pytest.raises(AdapterError, match="48 outputs"):
        AdapterSet.attach(
            nn.Sequential(nn.Linear(4, 48)), {"0": ModuleChoice(2, 0.0, method=Boft(kind="boft"))}, seed=0
        )
