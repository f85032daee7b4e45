"""LoRA layers against peft's, and what attaching, stacking and taking off do."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import Dropout, ModuleChoice
from burnish.adapters.lora import LoraLayer, LoraWeights
from burnish.errors import AdapterError


class Net(nn.Module):
    """A linear, a strided and dilated convolution, a 1x1 convolution, and convolutions of one and three axes."""

    def __init__(self, dilation: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=dilation, dilation=dilation)
        self.point = nn.Conv2d(6, 8, 1)
        self.line = nn.Conv1d(8, 8, 3, padding="same")
        self.cube = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1))
        self.out = nn.ModuleList([nn.Linear(8, 5)])

    def forward(self, x_B3HW: Tensor) -> Tensor:
        hidden_BCHW = self.point(self.conv(x_B3HW).tanh()).tanh()
        hidden_BCL = self.line(hidden_BCHW.flatten(2)).tanh()
        hidden_BC1HW = self.cube(hidden_BCL.view_as(hidden_BCHW)[:, :, None])
        result: Tensor = self.out[0](hidden_BC1HW.flatten(2).transpose(1, 2))
        return result


CHOICES = {
    "conv": ModuleChoice(2, 5.0),
    "point": ModuleChoice(3, 1.0),
    "line": ModuleChoice(2, 2.0),
    "cube": ModuleChoice(4, 3.0),
    "out.0": ModuleChoice(4, 8.0, learning_rate=0.5),
}


def make(seed: int = 0, dilation: int = 2) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(dilation).requires_grad_(False).eval()


def attach(net: nn.Module, *, dropout: float = 0.0, seed: int = 7, fill: bool = True) -> AdapterSet:
    adapter = AdapterSet.attach(net, CHOICES, dropout=dropout, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter.layers.values():
        if fill:
            layer.lora_B.data.normal_(0, 0.3, generator=generator)
    return adapter


def picture(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def with_peft(net: nn.Module, adapter: AdapterSet) -> LoraModel:
    """peft's own layers with the same weights."""
    names = {name.replace(".", r"\."): choice for name, choice in CHOICES.items()}
    model = LoraModel(
        net,
        LoraConfig(
            target_modules=list(CHOICES),
            rank_pattern={name: choice.rank for name, choice in names.items()},
            alpha_pattern={name: choice.alpha for name, choice in names.items()},
        ),
        "default",
    )
    for name, layer in adapter.layers.items():
        theirs = net.get_submodule(name)
        theirs.lora_A["default"].weight.data.copy_(layer.lora_A.detach())
        theirs.lora_B["default"].weight.data.copy_(layer.lora_B.detach())
    return model


def test_output_and_gradients_are_peft_s() -> None:
    ours, theirs = make(dilation=1), make(dilation=1)  # peft leaves a convolution's dilation out
    adapter = attach(ours)
    reference = with_peft(theirs, adapter)
    output, expected = ours(picture()), reference(picture())
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)

    output.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in adapter.layers.items():
        other = theirs.get_submodule(name)
        torch.testing.assert_close(
            layer.lora_A.grad, other.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            layer.lora_B.grad, other.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5
        )


def test_the_delta_merged_into_the_weights_gives_the_same_output() -> None:
    net, merged = make(), make()
    adapter = attach(net)
    for name, weights in adapter.weights().items():
        merged.get_submodule(name).weight.data += weights.delta()
    torch.testing.assert_close(net(picture()), merged(picture()), rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_trains_only_itself() -> None:
    net = make()
    expected = net(picture())
    adapter = attach(net, fill=False)
    assert torch.equal(net(picture()), expected)
    trained = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in adapter.named_parameters().values()}


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    whole = attach(make(), fill=False).layers["out.0"].lora_A
    alone = (
        AdapterSet.attach(make(1), {"out.0": CHOICES["out.0"]}, dropout=0.0, seed=7).layers["out.0"].lora_A
    )
    other = attach(make(), seed=8, fill=False).layers["out.0"].lora_A
    assert torch.equal(whole, alone)
    assert not torch.equal(whole, other)
    # kaiming_uniform_(a=sqrt(5)) is uniform within 1 / sqrt(inputs).
    assert 0.5 / 8**0.5 < whole.abs().max() <= 1 / 8**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_trains_float32_adapters(dtype: torch.dtype) -> None:
    net = make().to(dtype)
    adapter = attach(net)
    output = net(picture(dtype))
    assert output.dtype == dtype
    output.float().square().mean().backward()
    for parameter in adapter.named_parameters().values():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_checkpointing_and_compiling_change_nothing() -> None:
    net = make()
    adapter = attach(net)
    net(picture()).square().mean().backward()
    plain = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters().items()}
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for forward in (lambda x: checkpoint(net, x, use_reentrant=False), compiled):
        for parameter in adapter.named_parameters().values():
            parameter.grad = None
        forward(picture()).square().mean().backward()
        for name, parameter in adapter.named_parameters().items():
            torch.testing.assert_close(parameter.grad, plain[name])
    with torch.no_grad(), adapter.disabled():
        torch.testing.assert_close(compiled(picture()), make()(picture()))


def test_dropout_acts_only_where_gradients_are_recorded() -> None:
    net = make()
    attach(net, dropout=0.5)
    torch.manual_seed(0)
    first = net(picture()).detach()
    assert not torch.allclose(first, net(picture()))
    torch.manual_seed(0)
    assert torch.equal(first, net(picture()))
    with torch.no_grad():
        whole = net(picture())
        assert torch.equal(whole, net(picture()))
    reference = make()
    attach(reference)
    assert torch.equal(whole, reference(picture()).detach())


def test_two_sets_on_the_same_modules_come_and_go_on_their_own() -> None:
    net = make()
    plain = net(picture())
    frozen = AdapterSet.from_weights(net, attach(make(), seed=1).weights())
    with_frozen = net(picture())
    trained = attach(net, seed=2)
    both = net(picture())
    assert all(parameter.requires_grad for parameter in trained.named_parameters().values())
    assert not any(parameter.requires_grad for parameter in frozen.named_parameters().values())

    with frozen.disabled(), trained.disabled():
        assert torch.equal(net(picture()), plain)
    with trained.disabled():
        assert torch.equal(net(picture()), with_frozen)
    assert torch.equal(net(picture()), both)

    frozen.detach()  # the inner one first
    alone = make()
    attach(alone, seed=2)
    assert torch.equal(net(picture()), alone(picture()))
    trained.detach()
    assert torch.equal(net(picture()), plain)
    assert not any(isinstance(module, LoraLayer) for module in net.modules())


def test_a_frozen_set_attached_later_leaves_the_trained_one_trainable() -> None:
    net = make()
    trained = attach(net, seed=2)
    AdapterSet.from_weights(net, attach(make(), seed=1).weights())
    assert all(parameter.requires_grad for parameter in trained.named_parameters().values())


def test_taking_off_restores_the_very_modules() -> None:
    net = make()
    before = dict(net.named_modules())
    adapter = attach(net)
    adapter.detach()
    after = dict(net.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())


def test_the_multiplier_scales_the_delta() -> None:
    net, merged = make(), make()
    adapter = attach(net)
    adapter.multiplier = -0.5
    for name, weights in adapter.weights().items():
        merged.get_submodule(name).weight.data += -0.5 * weights.delta()
    torch.testing.assert_close(net(picture()), merged(picture()), rtol=1e-5, atol=1e-5)


def test_parameter_groups_hold_each_parameter_once_at_its_rate() -> None:
    adapter = attach(make())
    groups = adapter.parameter_groups(1e-4)
    assert [group["lr"] for group in groups] == [1e-4, 0.5]
    assert groups[1]["names"] == ["out.0.lora_A", "out.0.lora_B"]
    names = [name for group in groups for name in group["names"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert dict(zip(names, parameters, strict=True)) == adapter.named_parameters()


def test_state_goes_from_one_set_to_another() -> None:
    source, target = attach(make(), seed=1), attach(make(), seed=2)
    state = copy.deepcopy(source.state_dict())
    target.load_state_dict(state)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    adapter = attach(make())
    before = copy.deepcopy(adapter.state_dict())
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del state["conv.lora_A"]
    state["line.lora_B"] = torch.zeros(8, 9, 1)
    state["else.lora_A"] = torch.zeros(1)
    with pytest.raises(AdapterError) as caught:
        adapter.load_state_dict(state)
    for part in ("missing conv.lora_A", "unknown else.lora_A", "line.lora_B is (8, 9, 1), not (8, 2, 1)"):
        assert part in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(AdapterError, match="needs"):
        AdapterSet.from_weights(make(), {"out.0": LoraWeights(torch.zeros(2, 9), torch.zeros(5, 2), 2.0)})
    with pytest.raises(AdapterError, match=r"out\.1"):
        AdapterSet.attach(make(), {"out.1": ModuleChoice(1, 1.0)}, dropout=0.0, seed=0)


def test_a_wrapped_layer_answers_like_its_base() -> None:
    net = make()
    linear, conv = net.out[0], net.conv
    attach(net)
    assert net.out[0].weight is linear.weight
    assert net.out[0].bias is linear.bias
    assert (net.out[0].in_features, net.out[0].out_features) == (8, 5)
    assert (net.conv.in_channels, net.conv.out_channels) == (3, 6)
    assert (net.conv.kernel_size, net.conv.stride, net.conv.padding) == (
        conv.kernel_size,
        conv.stride,
        conv.padding,
    )
    assert not hasattr(net.out[0], "kernel_size")


def test_a_denoiser_without_weights_takes_adapters_for_planning() -> None:
    with torch.device("meta"):
        net = Net()
    adapter = attach(net, fill=False)
    assert all(parameter.device.type == "meta" for parameter in adapter.named_parameters().values())


def test_inputs_without_tokens_pass() -> None:
    """As of models that are shown a first frame, or none."""
    layer = nn.Linear(8, 4)
    adapted = LoraLayer(layer, LoraLayer.fresh(layer, ModuleChoice(2, 2), 0, "a"), Dropout())
    assert adapted(torch.zeros(3, 0, 8)).shape == (3, 0, 4)
