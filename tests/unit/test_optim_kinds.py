"""Every kind of optimizer: its steps against the formula of its paper, and that it finds what it is sent to find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import Parameter

from burnish.config.optimizers import AnyOptimizer
from burnish.config.schedules import AnySchedule
from burnish.config.shape import alternatives, kind_of
from burnish.errors import ConfigError, MissingPackage
from burnish.optim.build import build_optimizer, check_optimizer, what_is_lost
from burnish.optim.one_by_one import OneByOne
from burnish.optim.schedule import apply_learning_rate
from burnish.optim.schedule_free import averaged_point, is_schedule_free
from burnish.optim.state import pack_state, unpack_state

# Rates at which each gets there in `STEPS` steps.
RATES = {
    "adamw": 0.02,
    "adamw8bit": 0.02,
    "adafactor": 0.02,
    "lion": 0.01,
    "came": 0.02,
    "prodigy": 1.0,
    "prodigy_schedule_free": 1.0,
    "adamw_schedule_free": 0.05,
    "muon": 0.05,
    "soap": 0.02,
    "ademamix": 0.01,
    "custom": 0.05,
}
STEPS = 200


def section(kind: str, **options: Any) -> AnyOptimizer:
    given = {"class_path": "torch.optim.RAdam"} if kind == "custom" else {}
    return TypeAdapter[AnyOptimizer](AnyOptimizer).validate_python({"kind": kind, **given, **options})


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def steps(
    section: AnyOptimizer, value: np.ndarray, gradients: list[np.ndarray]
) -> tuple[Parameter, torch.optim.Optimizer]:
    parameter = Parameter(torch.tensor(value))
    optimizer = build_optimizer(section, [{"params": [parameter]}])
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter, optimizer


def close(parameter: Tensor, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_every_kind_is_here() -> None:
    assert list(RATES) == [kind_of(member) for member in alternatives(AnyOptimizer)]


@pytest.mark.parametrize("union", [AnyOptimizer, AnySchedule], ids=["optimizers", "schedules"])
def test_the_manual_has_every_kind(union: Any) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    assert not [kind for member in alternatives(union) if f"`{(kind := kind_of(member))}`" not in manual]


def loss_of(parameters: list[Parameter], target: Tensor) -> Tensor:
    down, up = parameters
    return ((up.float() @ down.float() - target) ** 2).mean()


@pytest.mark.parametrize("kind", RATES)
def test_an_adapter_finds_a_matrix_of_its_rank(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(12, 3, generator=draw) @ torch.randn(3, 10, generator=draw)
    parameters = [Parameter(torch.randn(4, 10, generator=draw) / 3), Parameter(torch.zeros(12, 4))]
    options = {"d0": 1e-3} if "prodigy" in kind else {}
    built = section(kind, learning_rate=RATES[kind], **options)
    optimizer = build_optimizer(built, [{"params": parameters}])
    before = loss_of(parameters, target).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(parameters, target).backward()
        optimizer.step()
    assert is_schedule_free(optimizer) == built.schedule_free
    with averaged_point(optimizer) if built.schedule_free else nullcontext():
        assert loss_of(parameters, target).item() < 0.02 * before


def test_lion_takes_the_steps_of_the_paper() -> None:
    value, gradients = numbers(3, 4), [numbers(3, 4, seed=seed) for seed in (1, 2)]
    built = section("lion", learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95))
    parameter, _ = steps(built, value, gradients)
    momentum = np.zeros((3, 4))
    for gradient in gradients:  # arXiv 2302.06675, algorithm 2
        value = value - 0.01 * (np.sign(0.8 * momentum + 0.2 * gradient) + 0.1 * value)
        momentum = 0.95 * momentum + 0.05 * gradient
    close(parameter, value)


def test_came_takes_the_steps_of_the_paper() -> None:
    value, gradients = numbers(3, 4), [numbers(3, 4, seed=seed) for seed in (1, 2)]
    built = section("came", learning_rate=0.01, weight_decay=0.1, clip_threshold=0.5)
    parameter, _ = steps(built, value, gradients)
    momentum = np.zeros((3, 4))
    rows, columns, spread_rows, spread_columns = np.zeros(3), np.zeros(4), np.zeros(3), np.zeros(4)
    for gradient in gradients:  # arXiv 2307.02047, algorithm 2
        square = gradient**2 + 1e-30
        rows = 0.999 * rows + 0.001 * square.mean(1)
        columns = 0.999 * columns + 0.001 * square.mean(0)
        update = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
        update /= max(1.0, np.sqrt((update**2).mean()) / 0.5)
        momentum = 0.9 * momentum + 0.1 * update
        spread = (update - momentum) ** 2 + 1e-16
        spread_rows = 0.9999 * spread_rows + 0.0001 * spread.mean(1)
        spread_columns = 0.9999 * spread_columns + 0.0001 * spread.mean(0)
        confident = momentum / np.sqrt(np.outer(spread_rows, spread_columns) / spread_rows.mean())
        value = value - 0.01 * 0.1 * value - 0.01 * confident
    close(parameter, value)


def test_ademamix_takes_the_steps_of_the_paper() -> None:
    value, gradients = numbers(3, 4), [numbers(3, 4, seed=seed) for seed in (1, 2, 3)]
    built = section(
        "ademamix", learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95, 0.99), alpha=3.0, eps=1e-6
    )
    parameter, _ = steps(built, value, gradients)
    fast, second, slow = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4))
    for t, gradient in enumerate(gradients, 1):  # arXiv 2409.03137, algorithm 1 without its schedulers
        fast = 0.8 * fast + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        slow = 0.99 * slow + 0.01 * gradient
        moved = (fast / (1 - 0.8**t) + 3.0 * slow) / (np.sqrt(second / (1 - 0.95**t)) + 1e-6)
        value = value - 0.01 * 0.1 * value - 0.01 * moved
    close(parameter, value)


def test_schedule_free_adamw_averages_as_in_the_paper() -> None:
    value, gradients = numbers(3, 4), [numbers(3, 4, seed=seed) for seed in (1, 2, 3)]
    built = section("adamw_schedule_free", learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    parameter, optimizer = steps(built, value, gradients)
    z, x, second, weights = value.copy(), value.copy(), np.zeros((3, 4)), 0.0
    for t, gradient in enumerate(gradients, 1):  # arXiv 2405.15682, algorithm 1, at one rate
        y = 0.2 * z + 0.8 * x
        second = 0.95 * second + 0.05 * gradient**2
        z = z - 0.01 * (gradient / (np.sqrt(second / (1 - 0.95**t)) + 1e-6) + 0.1 * y)
        weights += 0.01**2
        share = 0.01**2 / weights
        x = (1 - share) * x + share * z
    close(parameter, 0.2 * z + 0.8 * x)
    with averaged_point(optimizer):
        close(parameter, x)
    close(parameter, 0.2 * z + 0.8 * x)


def test_schedule_free_prodigy_begins_at_its_first_guess() -> None:
    value, gradient = numbers(3, 4), numbers(3, 4, seed=1)
    built = section("prodigy_schedule_free", d0=1e-3, weight_decay=0.1, betas=(0.9, 0.99))
    _, optimizer = steps(built, value.astype(np.float32), [gradient.astype(np.float32)])
    [state] = optimizer.state.values()
    # v = 0.01 (d g)^2, so that d g / sqrt(v) is 10 everywhere, and is divided by the root of its mean square's root
    update = 10 * np.sign(gradient) / np.sqrt(10)
    close(state["z"], value - 1e-3 * (update + 0.1 * value), 1e-5)


def test_muon_makes_the_step_of_a_matrix_orthogonal_and_leaves_the_rest_to_adamw() -> None:
    gradient = numbers(6, 4, seed=1)
    matrix, row = Parameter(torch.zeros(6, 4).double()), Parameter(torch.ones(5).double())
    kernel = Parameter(torch.ones(2, 2, 3, 3).double())
    built = section("muon", learning_rate=0.01, weight_decay=0.1, eps=1e-6)
    optimizer = build_optimizer(built, [{"params": [matrix, row]}, {"params": [kernel], "lr": 0.02}])
    others = [Parameter(one.detach().clone()) for one in (row, kernel)]
    groups = [{"params": others[:1], "lr": 0.01}, {"params": others[1:], "lr": 0.02}]
    reference = torch.optim.AdamW(groups, eps=1e-6, weight_decay=0.1)
    for parameter in (matrix, row, kernel, *others):
        parameter.grad = torch.full_like(parameter, 0.3)
    matrix.grad = torch.tensor(gradient)
    optimizer.step()
    reference.step()
    close(row, others[0].detach().numpy(), 1e-12)
    close(kernel, others[1].detach().numpy(), 1e-12)
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    turned = left.T @ (-matrix.detach().numpy() / (0.01 * 0.2 * np.sqrt(6))) @ right.T
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=0.05)  # its five rounds are in bfloat16
    assert ((np.diag(turned) > 0.6) & (np.diag(turned) < 1.3)).all()


def test_soap_steps_along_the_directions_of_a_gradient_that_stays() -> None:
    gradient = numbers(4, 4, seed=1)
    built = section("soap", learning_rate=0.01, weight_decay=0.0)
    parameter, _ = steps(built, np.zeros((4, 4)), [gradient, gradient])
    # arXiv 2409.11321: the first step only looks. In the basis of its own singular vectors the gradient is diagonal,
    # and Adam's first step there is its sign.
    left, _, right = np.linalg.svd(gradient)
    close(parameter, -0.01 * left @ right, 1e-5)


def test_soap_leaves_long_sides_as_they_are() -> None:
    built = section("soap", largest_side=4)
    _, optimizer = steps(built, np.zeros((3, 8)), [numbers(3, 8)] * 2)
    [state] = optimizer.state.values()
    assert [len(side) for side in state["Q"]] == [3, 0]


def test_the_8bit_optimizer_follows_adamw() -> None:
    value = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    ours, theirs = Parameter(value.clone()), Parameter(value.clone())
    built = section(
        "adamw8bit", learning_rate=1e-2, weight_decay=0.1, paged=True
    )  # no pages on the processor
    optimizer = build_optimizer(built, [{"params": [ours]}])
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for seed in range(5):
        for parameter, one in ((ours, optimizer), (theirs, reference)):
            parameter.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + 1))
            one.step()
    assert optimizer.state[ours]["state1"].dtype == torch.uint8
    moved, wanted = ours.detach() - value, theirs.detach() - value
    assert float((moved - wanted).norm() / wanted.norm()) < 0.05


def test_a_class_by_path_gets_its_arguments() -> None:
    value, gradients = numbers(3, 4), [numbers(3, 4, seed=seed) for seed in (1, 2)]
    arguments = {"momentum": 0.8, "nesterov": True}
    built = section(
        "custom", class_path="torch.optim.SGD", learning_rate=0.1, weight_decay=0.2, arguments=arguments
    )
    parameter, _ = steps(built, value, gradients)
    other = Parameter(torch.tensor(value))
    reference = torch.optim.SGD([other], lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.2)
    for gradient in gradients:
        other.grad = torch.tensor(gradient)
        reference.step()
    assert torch.equal(parameter, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"class_path": "torch.optim.SGD", "arguments": {"nestrov": True}},
            r"arguments\.nestrov: no such argument; did you mean nesterov\?\n.*takes lr, momentum, dampening",
        ),
        (
            {"class_path": "torch.optim.Radam"},
            r"no such class: torch\.optim\.Radam; did you mean .*\.RAdam\?",
        ),
        ({"class_path": "torch.nn.Linear"}, r"this is no torch\.optim\.Optimizer: torch\.nn\.Linear"),
        ({"class_path": "torch.optim.RAdam", "arguments": {"betas": [2, 3]}}, "refuses them: Invalid beta"),
        (
            {"class_path": "torch.optim.LBFGS", "weight_decay": 0.1},
            r"optimizer\.weight_decay: no such argument",
        ),
    ],
)
def test_wrong_arguments_of_a_class_by_path_name_the_right_ones(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        check_optimizer(section("custom", **options), torch.device("cpu"))


def test_a_class_of_a_package_that_is_not_here_says_so() -> None:
    with pytest.raises(MissingPackage, match="no module named no_such_package"):
        check_optimizer(section("custom", class_path="no_such_package.sub.Adam"), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["prodigy", "prodigy_schedule_free", "custom"])
def test_what_steps_together_does_not_step_one_by_one(kind: str) -> None:
    with pytest.raises(ConfigError, match="steps all weights together"):
        build_optimizer(section(kind), [{"params": [Parameter(torch.zeros(2))]}], one_by_one=True)


def test_rounding_to_nearest_is_said_where_it_loses_steps() -> None:
    half, whole = Parameter(torch.zeros(2).bfloat16()), Parameter(torch.zeros(2))
    assert "round to nothing; stochastic and kahan keep them" in what_is_lost(
        section("adamw", rounding="nearest"), [whole, half]
    )
    assert not what_is_lost(section("adamw", rounding="nearest"), [whole])
    assert not what_is_lost(section("adamw", rounding="stochastic"), [half])


def targets(count: int) -> Iterator[tuple[int, Tensor]]:
    for step in range(count):
        yield step, torch.randn(6, 40, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("kind", RATES)
def test_rounding_works_around_every_kind(kind: str) -> None:
    """In bfloat16, rounded so that nothing is lost on the way, the weights end near those of float32."""
    start = torch.randn(6, 40, generator=torch.Generator().manual_seed(99)).bfloat16()
    exact, rounded = Parameter(start.float()), Parameter(start.clone())
    rate = 1.0 if "prodigy" in kind else 1e-3
    options = {"d0": 1e-3} if "prodigy" in kind else {}
    reference = build_optimizer(section(kind, learning_rate=rate, **options), [{"params": [exact]}])
    built = section(kind, learning_rate=rate, rounding="kahan", **options)
    optimizer = build_optimizer(built, [{"params": [rounded]}])
    assert isinstance(optimizer, OneByOne)
    for _, target in targets(20):
        exact.grad = (exact.detach() - target).bfloat16().float()
        rounded.grad = exact.grad.bfloat16()
        reference.step()
        optimizer.step()
    moved = exact.detach() - start.float()
    held = rounded.detach().float() + optimizer.state[rounded]["compensation"].float()
    assert float((held - exact.detach()).norm() / moved.norm()) < 0.02


@pytest.mark.parametrize("kind", ["adamw_schedule_free", "prodigy_schedule_free"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_looking_at_the_average_changes_nothing(kind: str, rounding: str) -> None:
    ended = []
    for looking in (False, True):
        parameter = Parameter(torch.ones(6, 40, dtype=torch.bfloat16))
        built = section(kind, rounding=rounding, learning_rate=1.0 if "prodigy" in kind else 0.1)
        optimizer = build_optimizer(built, [{"params": [parameter]}], seed=3)
        for step, target in targets(6):
            parameter.grad = (parameter.detach() - target).bfloat16()
            optimizer.step()
            if looking and step % 2:
                trained = parameter.detach().clone()
                with averaged_point(optimizer):
                    if kind == "adamw_schedule_free":
                        assert not torch.equal(parameter, trained)
        ended.append(parameter)
    assert torch.equal(*ended)


@pytest.mark.parametrize("kind", RATES)
def test_a_rounded_run_ends_in_the_same_bits_after_a_resume(kind: str) -> None:
    """Each with an optimizer of its own keeps what that one learned in its group, and follows the rate of the run."""

    def built() -> tuple[Parameter, torch.optim.Optimizer]:
        parameter = Parameter(torch.ones(6, 40, dtype=torch.bfloat16))
        options = {"d0": 1e-3} if "prodigy" in kind else {}
        chosen = section(kind, rounding="stochastic", learning_rate=RATES[kind], **options)
        return parameter, build_optimizer(chosen, [{"params": [parameter]}], seed=5)

    def train(parameter: Parameter, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step, target in list(targets(last))[first:]:
            apply_learning_rate(optimizer, 1 - step / 10)
            parameter.grad = (parameter.detach() - target).bfloat16()
            optimizer.step()

    straight, optimizer = built()
    train(straight, optimizer, 0, 6)
    first, stopped = built()
    train(first, stopped, 0, 4)
    second, resumed = built()
    train(second, resumed, 0, 1)
    with torch.no_grad():
        second.copy_(first)
    unpack_state(resumed, {second: "w"}, *pack_state(stopped, {first: "w"}))
    train(second, resumed, 4, 6)
    assert torch.equal(straight, second)

    parameter, still = built()
    apply_learning_rate(still, 0.0)
    for _, target in targets(2):
        parameter.grad = target.bfloat16()
        still.step()
    assert (parameter == 1).all()


def test_schedule_free_prodigy_finds_one_rate_for_all_groups_and_multiplies_it_by_theirs() -> None:
    parameters = [Parameter(torch.ones(4, 4)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}]
    optimizer = build_optimizer(section("prodigy_schedule_free", weight_decay=0.0, d0=1e-3), groups)
    for step in range(5):
        for number, parameter in enumerate(parameters):
            turns = number == 1 and step % 2  # by itself it would find no rate
            parameter.grad = torch.full_like(parameter, -1.0 if turns else 1.0)
        optimizer.step()
        if step == 0:
            moved = [float((1 - parameter.detach()).mean()) for parameter in parameters]
    assert moved[1] == pytest.approx(0.5 * moved[0])
    found = [group["d"] for group in optimizer.param_groups]
    assert found[0] == found[1] > 1e-3


class Elsewhere:
    """Keeps states away from the parameters between their steps."""

    def __init__(self) -> None:
        self.kept: dict[Parameter, dict[str, Any]] = {}

    def bring(self, parameter: Parameter, state: dict[str, Any]) -> None:
        state.update(self.kept.pop(parameter, {}))

    def send(self, parameter: Parameter, state: dict[str, Any]) -> None:
        self.kept[parameter] = dict(state)
        state.clear()

    def settle(self) -> None: ...

    def is_kept(self, tensors: Mapping[str, Tensor]) -> bool:
        return True


def test_the_average_of_states_that_are_kept_elsewhere_is_found() -> None:
    averages = []
    for keeper in (None, Elsewhere()):
        parameter = Parameter(torch.ones(6, 40))
        chosen = section("adamw_schedule_free", learning_rate=0.1)
        optimizer = build_optimizer(chosen, [{"params": [parameter]}], one_by_one=True)
        assert isinstance(optimizer, OneByOne)
        optimizer.keeper = keeper
        for _, target in targets(4):
            parameter.grad = parameter.detach() - target
            optimizer.step()
        with averaged_point(optimizer):
            averages.append(parameter.detach().clone())
        assert not torch.equal(averages[-1], parameter)
    assert torch.equal(*averages)
