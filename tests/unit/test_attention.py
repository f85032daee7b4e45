"""Attention kernels: the redirection, masks on each kernel, the choice by measurement and what is kept of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.compute import attention_choice, attention_kernels
from burnish.compute.attention import Attention, Call, Kind, Rule, recorded
from burnish.compute.attention_choice import choose, decide, measure, measure_apart
from burnish.compute.attention_kernels import BackEnd, kernel
from burnish.compute.attention_probe import Measured, from_json, measure_one, to_json
from burnish.errors import MachineError

CPU = torch.device("cpu")
KIND = Kind(16, torch.float32, "none", to_itself=True, causal=False, grouped=False)
CALL = Call(KIND, (2, 4, 40, 16), (2, 4, 40, 16), None, tokens_first=True)


def by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt(D) + mask) V, arXiv 1706.03762 equation 1."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2]).tril().bool()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


def drawn(tokens: int, heads: int = 4) -> Tensor:
    return torch.randn(2, tokens, heads, 16).transpose(1, 2)


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    padding = torch.arange(keys) < torch.tensor([keys, keys - 7]).view(2, 1, 1, 1)
    return {
        "none": None,
        "padding": padding,
        "whole": padding.expand(2, 4, queries, keys).contiguous(),
        "added": torch.randn(2, 1, queries, keys),
    }


@pytest.mark.parametrize("back_end", ["torch", "math", "flash", "flex"])
@pytest.mark.parametrize("mask", ["none", "padding", "whole", "added", "causal", "grouped"])
def test_every_kind_of_mask_is_right_on_every_kernel(back_end: BackEnd, mask: str) -> None:
    torch.manual_seed(0)
    query, key, value = drawn(40), drawn(23), drawn(23)
    attend = kernel(back_end)
    if back_end == "flex":  # where it is traced it needs no compiler; no backward on a CPU
        attend = torch.compile(attend, backend="eager")
    with torch.no_grad():
        if mask == "causal":
            found = attend(query, query, query, is_causal=True)
            right = by_hand(query, query, query, None, True)
        elif mask == "grouped":
            found = attend(query, key[:, :2], value[:, :2], enable_gqa=True)
            twice = (one[:, :2].repeat_interleave(2, 1) for one in (key, value))
            right = by_hand(query, *twice, None, False)
        else:
            given = masks(40, 23)[mask]
            found = attend(query, key, value, attn_mask=given)
            right = by_hand(query, key, value, given, False)
    torch.testing.assert_close(found, right, atol=2e-6, rtol=0)


STRIDES: list[tuple[int, ...]] = []


@torch.library.custom_op("burnish_tests::attend_and_look", mutates_args=())
def attend_and_look(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention whose backward looks at the gradient's layout, compiled or not."""
    return by_hand(query, key, value, None, False)


@torch.library.custom_op("burnish_tests::look", mutates_args=())
def look(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    STRIDES.append(gradient.transpose(1, 2).stride())
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    to_weights = gradient @ value.transpose(-1, -2)
    to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdim=True)) / query.shape[-1] ** 0.5
    return to_scores @ key, to_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ gradient


attend_and_look.register_fake(lambda query, key, value: torch.empty_like(query))
look.register_fake(lambda gradient, *given: tuple(torch.empty_like(one) for one in given))
attend_and_look.register_autograd(
    lambda ctx, gradient: look(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# What the compiler itself does with an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_that_reaches_cudnn_has_no_gaps(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    STRIDES.clear()
    monkeypatch.setattr(attention_kernels, "_fused", lambda *_: attend_and_look)
    query = drawn(40).requires_grad_()
    wide = torch.randn(2, 40, 2 * 4, 16)[:, :, :4].transpose(1, 2)
    attend = kernel("cudnn")
    if compiled:
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(attend(query, query, query), query, wide)
    right = torch.autograd.grad(F.scaled_dot_product_attention(query, query, query), query, wide)
    assert STRIDES == [(40 * 4 * 16, 4 * 16, 16, 1)]
    torch.testing.assert_close(found, right)


def test_calls_go_where_the_rules_say_and_the_function_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def named(back_end: BackEnd) -> Callable[..., Tensor]:
        def attend(*args: Any, **kwargs: Any) -> Tensor:
            asked.append(back_end)
            return attention_kernels.TORCHS_OWN(*args, **kwargs)

        return attend

    monkeypatch.setattr("burnish.compute.attention.kernel", named)
    before = F.scaled_dot_product_attention
    masked = replace(KIND, mask="boolean", to_itself=False)
    chosen = Attention([Rule(KIND, "flash"), Rule(masked, "flex")], [Rule(KIND, "sage")])
    query, key = drawn(40), drawn(23)
    with chosen.installed():
        F.scaled_dot_product_attention(query, query, query)
        F.scaled_dot_product_attention(query, key, key, attn_mask=masks(40, 23)["padding"])
        F.scaled_dot_product_attention(query, key, key)  # no rule
        F.scaled_dot_product_attention(query, query, query, dropout_p=0.1)  # no kernel but torch's own
        F.scaled_dot_product_attention(query.double(), query.double(), query.double())
        with chosen.sampling():
            F.scaled_dot_product_attention(query, query, query)
        F.scaled_dot_product_attention(query, query, query)
    assert asked == ["flash", "flex", "sage", "flash"]
    assert F.scaled_dot_product_attention is before


def test_nothing_is_redirected_without_rules() -> None:
    before = F.scaled_dot_product_attention
    with Attention().installed():
        assert F.scaled_dot_product_attention is before


def test_the_largest_call_of_each_kind_is_recorded() -> None:
    calls: dict[Kind, Call] = {}
    with recorded(calls):
        for tokens in (20, 40, 30):
            F.scaled_dot_product_attention(drawn(tokens), drawn(tokens), drawn(tokens))
        F.scaled_dot_product_attention(drawn(40).contiguous(), drawn(23), drawn(23), masks(40, 23)["added"])
    assert calls[KIND] == CALL
    other = replace(KIND, mask="additive", to_itself=False)
    assert calls[other] == Call(other, (2, 4, 40, 16), (2, 4, 23, 16), (2, 1, 40, 23), tokens_first=False)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_a_right_kernel_is_timed_and_a_wrong_one_is_found_out(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mask: Any
) -> None:
    kind = replace(KIND, dtype=dtype, mask=mask)
    call = replace(CALL, kind=kind, mask=None if mask == "none" else (2, 1, 1, 40))
    right = measure_one(call, "flash", CPU)
    assert right.trouble == ""
    assert right.seconds > 0
    assert right.error < (1e-6 if dtype == torch.float32 else 1e-2)

    def wrong(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return kernel("math")(query, key * 1.05, value, *args, **kwargs)

    monkeypatch.setattr(
        "burnish.compute.attention_probe.kernel",
        lambda name, strict: wrong if name == "flash" else kernel(name, strict=strict),
    )
    assert measure_one(call, "flash", CPU).trouble.startswith("wrong: error ")


def test_a_kernel_that_forgets_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return kernel("math")(query, key, value, None, *args, **kwargs)

    monkeypatch.setattr(
        "burnish.compute.attention_probe.kernel",
        lambda name, strict: forgetful if name == "flash" else kernel(name, strict=strict),
    )
    call = replace(CALL, kind=replace(KIND, mask="boolean"), mask=(2, 1, 1, 40))
    assert "wrong" in measure_one(call, "flash", CPU).trouble


def test_a_kernel_that_is_not_there_refuses() -> None:
    assert measure_one(CALL, "efficient", CPU).trouble.startswith("refused: ")


def test_measured_in_another_process_and_what_kills_it_is_blamed(tmp_path: Path) -> None:
    found = list(measure_apart([(CALL, "flash"), (CALL, "efficient")], CPU))
    assert [one.back_end for one in found] == ["flash", "efficient"]
    assert found[0].seconds > 0
    assert "refused" in found[1].trouble
    assert from_json(to_json(CALL)) == CALL

    script = tmp_path / "dies.py"  # as the real one, but the second question kills it
    script.write_text(
        "import json, os, sys\n"
        "for call, name in json.load(sys.stdin)['pairs']:\n"
        "    os.abort() if name == 'cudnn' else print(json.dumps({'seconds': 1.0}), flush=True)\n"
    )
    names: list[BackEnd] = ["torch", "cudnn", "flash"]
    found = list(measure_apart([(CALL, name) for name in names], CPU, (sys.executable, str(script))))
    assert [one.seconds for one in found] == [1.0, 0.0, 1.0]
    assert found[1].trouble == "its process ended by SIGABRT"


def test_measurements_are_kept_by_what_they_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure([CALL], ["flash", "math"], CPU, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(attention_choice, "measure_one", lambda *_: pytest.fail("measured twice"))
        assert measure([CALL], ["flash", "math"], CPU, tmp_path) == first
    again: list[str] = []
    monkeypatch.setattr(
        attention_choice,
        "measure_one",
        lambda call, name, _: again.append(name) or Measured(call.kind, name, 1.0),
    )
    measure([replace(CALL, query_BHSD=(1, 4, 40, 16))], ["flash"], CPU, tmp_path)
    monkeypatch.setattr(torch, "__version__", "9.9")
    measure([CALL], ["flash", "math"], CPU, tmp_path)
    assert again == ["flash", "flash", "math"]
    monkeypatch.undo()
    for file in (tmp_path / "measured").iterdir():
        file.write_text("[{}]")
    assert [one.back_end for one in measure([CALL], ["flash", "math"], CPU, tmp_path)] == ["flash", "math"]


def test_what_did_not_fit_beside_something_else_is_measured_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Measured(KIND, "flash", trouble="refused: CUDA out of memory. Tried to allocate 2.00 GiB")
    with monkeypatch.context() as patch:
        patch.setattr(attention_choice, "measure_one", lambda *_: full)
        assert measure([CALL], ["flash"], CPU, tmp_path) == [full]
    assert not measure([CALL], ["flash"], CPU, tmp_path)[0].trouble


def test_the_fastest_right_kernel_wins_where_it_gains_enough() -> None:
    cross = replace(KIND, to_itself=False)
    measured = [
        Measured(KIND, "torch", 1.0),
        Measured(KIND, "cudnn", 0.5),
        Measured(KIND, "efficient", 0.1, trouble="wrong: error 1.0e+00"),
        Measured(cross, "torch", 1.0),
        Measured(cross, "flash", 0.99),
    ]
    assert decide("auto", measured).rules == [Rule(KIND, "cudnn")]


def test_one_flash_kernel_at_a_time() -> None:
    small = replace(KIND, to_itself=False)
    measured = [
        Measured(KIND, "torch", 1.0),
        Measured(KIND, "flash", 0.9),
        Measured(KIND, "flash3", 0.5),
        Measured(small, "torch", 1.0),
        Measured(small, "flash", 0.2),
        Measured(small, "flash3", 0.8),
    ]
    assert decide("auto", measured).rules == [Rule(KIND, "flash3"), Rule(small, "flash3")]


def test_auto_on_a_cpu_is_torchs_own_unmeasured(tmp_path: Path) -> None:
    chosen = choose("auto", lambda: pytest.fail("nothing to ask for"), CPU, tmp_path)
    assert (chosen.rules, chosen.while_sampling) == ((), ())


def test_a_wanted_kernel_is_taken_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="burnish"):
        chosen = choose("flash", lambda: [CALL], CPU, tmp_path)
    assert chosen.rules == [Rule(KIND, "flash")]
    assert "attention, head dimension 16, float32, self: flash " in caplog.text
    assert " ms, error " in caplog.text


@pytest.mark.parametrize("wanted", ["cudnn", "efficient", "flash3", "flash4", "sage", "flex"])
def test_a_kernel_that_cannot_be_had_is_an_error_with_a_remedy(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(MachineError, match=f"memory.attention is {wanted}") as caught:
        choose(wanted, lambda: [CALL], CPU, tmp_path)
    assert "auto, torch, flash, math" in caught.value.remedy


def test_a_wanted_kernel_that_answers_no_call_is_an_error() -> None:
    with pytest.raises(MachineError, match=r"answers no call of this model \(head dimension 16.*refused"):
        decide("flash", [Measured(KIND, "flash", trouble="refused: no")])


def test_sage_answers_while_samples_are_drawn_only() -> None:
    chosen = decide("sage", [Measured(KIND, "sage", 1.0)])
    assert (chosen.rules, chosen.while_sampling) == ((), [Rule(KIND, "sage")])


class Hopper:
    """What a build of torch for CUDA says on an H100."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], modules: set[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(attention_kernels, "_is_there", lambda module: module in modules)

    def there(self) -> set[str]:
        names = attention_kernels.back_ends()
        return {name for name in names if not attention_kernels.unavailable(name, torch.device("cuda"))}


def test_what_is_there_by_compute_capability_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {"triton", "flash_attn_interface", "flash_attn.cute", "sageattention"}
    plain = {"torch", "math", "efficient"}
    ampere = plain | {"flash", "cudnn"}
    assert Hopper(monkeypatch, (9, 0), set()).there() == ampere
    assert Hopper(monkeypatch, (9, 0), everything).there() == set(attention_kernels.back_ends())
    assert Hopper(monkeypatch, (10, 0), everything).there() == ampere | {"flex", "flash4", "sage"}
    assert Hopper(monkeypatch, (8, 9), everything).there() == ampere | {"flex", "sage"}
    assert Hopper(monkeypatch, (7, 5), everything).there() == plain | {"flex"}
