"""Each optimizer against the formula of its paper, and what cannot be built."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from burnish.config.optimizers import Adafactor, AdamW, AdamW8bit, Prodigy
from burnish.errors import ConfigError, MissingPackage
from burnish.optim.build import build_optimizer


def with_gradient(values: object, gradient: object) -> Parameter:
    parameter = Parameter(torch.tensor(np.asarray(values), dtype=torch.float64))
    parameter.grad = torch.tensor(np.asarray(gradient), dtype=torch.float64)
    return parameter


def test_adamw_takes_the_steps_of_the_paper() -> None:
    section = AdamW(learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    value, gradients = np.array([1.0, -2.0]), [np.array([0.5, 3.0]), np.array([-1.0, 2.0])]
    parameter = with_gradient(value, gradients[0])
    optimizer = build_optimizer(section, [{"params": [parameter]}])
    assert optimizer.defaults["fused"], "many small tensors are one call"

    first, second = np.zeros(2), np.zeros(2)
    for t, gradient in enumerate(gradients, start=1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        # arXiv 1711.05101, algorithm 2, with the rate inside the decay as torch and everyone else has it
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        moved = (first / (1 - 0.8**t)) / (np.sqrt(second / (1 - 0.95**t)) + 1e-6)
        value = value - 0.01 * 0.1 * value - 0.01 * moved
    np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-12)


def test_adafactor_takes_the_step_of_the_paper_at_a_fixed_rate() -> None:
    section = Adafactor(kind="adafactor", learning_rate=0.01, weight_decay=0.1, clip_threshold=0.5)
    generator = np.random.default_rng(0)
    value, gradient = generator.normal(size=(3, 4)), generator.normal(size=(3, 4))
    parameter = with_gradient(value, gradient)
    build_optimizer(section, [{"params": [parameter]}]).step()

    # arXiv 1804.04235, algorithm 4 without its relative step size; at t = 1 the second moment forgets all
    square = gradient**2 + 1e-30
    rows, columns = square.mean(axis=1), square.mean(axis=0)
    update = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
    update /= max(1.0, np.sqrt((update**2).mean()) / 0.5)
    expected = value - 0.01 * 0.1 * value - 0.01 * update
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-6)


def test_adafactor_moves_a_parameter_that_starts_at_zero_by_the_rate_of_the_config() -> None:
    parameter = with_gradient(np.zeros((8, 8)), np.random.default_rng(1).normal(size=(8, 8)))
    build_optimizer(Adafactor(kind="adafactor", learning_rate=1e-3), [{"params": [parameter]}]).step()
    size = math.sqrt(parameter.detach().square().mean().item())
    assert 0.5e-3 < size < 2e-3


def test_prodigy_takes_the_steps_of_the_paper() -> None:
    section = Prodigy(kind="prodigy", weight_decay=0.1, betas=(0.9, 0.99), d0=1e-3, safeguard_warmup=True)
    start = np.array([1.0, -2.0])
    parameter = with_gradient(start, [0.0, 0.0])
    optimizer = build_optimizer(section, [{"params": [parameter]}])

    # arXiv 2306.06101, algorithm 4: gamma = 1, and the decay is AdamW's
    d, value, decay = 1e-3, start.copy(), math.sqrt(0.99)
    numerator, sums, first, second = 0.0, np.zeros(2), np.zeros(2), np.zeros(2)
    for _ in range(8):
        gradient = 2 * (value - np.array([3.0, 4.0]))
        parameter.grad = torch.tensor(2 * (parameter.detach().numpy() - np.array([3.0, 4.0])))
        optimizer.step()
        first = 0.9 * first + 0.1 * d * gradient
        second = 0.99 * second + 0.01 * d**2 * gradient**2
        # both sides of the fraction carry a factor 1 / d0 in the code; it cancels
        numerator = decay * numerator + d * d * gradient.dot(start - value)
        sums = decay * sums + d * d * gradient
        estimate = numerator / np.abs(sums).sum()
        used, d = d, max(d, estimate)
        value = value - 0.1 * used * value - used * first / (np.sqrt(second) + d * 1e-8)
    assert d > 1e-3, "the estimate never grew: the test would not see a wrong one"
    assert optimizer.param_groups[0]["d"] == pytest.approx(d, rel=1e-9)
    np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-9)


def test_prodigy_moves_a_group_by_its_share_of_the_rate() -> None:
    moved = []
    for rate in (1.0, 0.25):
        one, other = with_gradient([1.0, 2.0], [0.3, -0.2]), with_gradient([4.0, 8.0], [-0.7, 0.9])
        build_optimizer(
            Prodigy(kind="prodigy", d0=1e-2, weight_decay=0.0),
            [{"params": [one]}, {"params": [other], "lr": rate}],
        ).step()
        moved.append((one.detach().clone(), other.detach() - torch.tensor([4.0, 8.0])))
    assert torch.equal(moved[0][0], moved[1][0])
    torch.testing.assert_close(moved[1][1], 0.25 * moved[0][1], rtol=1e-9, atol=0)


def test_prodigy_says_nothing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    build_optimizer(Prodigy(kind="prodigy", weight_decay=0.01), [{"params": [with_gradient([1.0], [1.0])]}])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("section", [AdamW(), Adafactor(kind="adafactor")], ids=lambda section: section.kind)
def test_a_group_keeps_its_own_rate_and_the_others_take_the_sections(section: AdamW | Adafactor) -> None:
    groups: list[dict[str, Any]] = [
        {"params": [with_gradient([1.0], [1.0])], "names": ["a"]},
        {"params": iter([with_gradient([1.0], [1.0])]), "lr": 5e-4},
        {"params": []},
    ]
    built = build_optimizer(section, groups).param_groups
    assert [group["lr"] for group in built] == [1e-4, 5e-4]
    assert [group["initial_lr"] for group in built] == [1e-4, 5e-4]
    assert {group["weight_decay"] for group in built} == {0.01}


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(AdamW(), [{"params": []}])


def test_the_8bit_optimizer_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # how Python itself marks what cannot be imported
    with pytest.raises(MissingPackage) as caught:
        build_optimizer(AdamW8bit(kind="adamw8bit"), [{"params": [with_gradient([1.0], [1.0])]}])
    assert 'pip install "burnish[quant]"' in str(caught.value)
    assert "or use kind: adamw" in str(caught.value)


def test_the_8bit_optimizer_says_where_it_is_not_there() -> None:
    pytest.importorskip("bitsandbytes")
    parameter = Parameter(torch.zeros(2, 2, device="meta"))
    with pytest.raises(MissingPackage, match="adamw8bit is not there for meta"):
        build_optimizer(AdamW8bit(kind="adamw8bit"), [{"params": [parameter]}])
