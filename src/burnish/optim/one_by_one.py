"""An optimizer that steps one parameter at a time, and rounds bfloat16 weights as asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from burnish.optim.learned import kind_of, learned_keys
from burnish.optim.rounding import rounded_stochastically, split
from burnish.randomness import stable_seed

Rounding = Literal["nearest", "stochastic", "kahan"]
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

# Of a parameter's state, beside what its optimizer keeps:
_GROUP = "group"  # what that optimizer learned in its group, such as its count of steps
_ROUNDED = "rounded"  # how often it was rounded stochastically
_COMPENSATION = "compensation"  # what its rounding to nearest has lost so far
_OURS = (_GROUP, _ROUNDED, _COMPENSATION)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter and what its optimizer moves: itself, or in its place a float32 one that is empty between steps."""

    parameter: Parameter
    moved: Parameter
    index: int

    @property
    def is_rounded(self) -> bool:
        return self.moved is not self.parameter


@dataclass(frozen=True, slots=True)
class _Unit:
    """Parameters that are stepped together; `outer` are their groups in the same order as the optimizer's own."""

    optimizer: torch.optim.Optimizer
    slots: list[_Slot]
    outer: list[dict[str, Any]]


class StateKeeper(Protocol):
    """Whoever keeps the state of parameters somewhere else between their steps."""

    def bring(self, parameter: Parameter, state: dict[str, Any]) -> None:
        """Before a step: have the tensors of `state` beside the parameter."""
        ...

    def send(self, parameter: Parameter, state: dict[str, Any]) -> None:
        """After it."""
        ...

    def settle(self) -> None:
        """Have everything where it can be read."""
        ...

    def is_kept(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a state of these tensors is for keeping."""
        ...


class OneByOne(torch.optim.Optimizer):
    """Each parameter has an optimizer of its own, and can be stepped as soon as its gradient is there.

    With `rounding` other than `nearest`, a bfloat16 parameter is stepped in float32 (its gradient and its optimizer's
    state, too) and then rounded: `stochastic` draws, as a function of the seed, the parameter's place among all and the
    number of its steps; `kahan` keeps what rounding lost in a bfloat16 `compensation` and adds it back before the next
    step. Parameters of other types are stepped as they are. The float32 copy is there during the step only.

    The state of a parameter is that of its optimizer and, under `group`, what that one keeps in its group.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        make: Make,
        *,
        rounding: Rounding = "nearest",
        seed: int = 0,
        together: bool = False,
    ) -> None:
        """Make the optimizers.

        Args:
            groups: `params` and options such as `lr`.
            make: an optimizer of such groups.
            seed: of stochastic rounding.
            together: one optimizer for all, for kinds that find one rate for all weights; `step_one` is not for them.
        """
        self.rounding, self.seed, self.together = rounding, seed, together
        self.keeper: StateKeeper | None = None
        super().__init__([dict(group) for group in groups], {})
        self._units: list[_Unit] = []
        self._unit_of: dict[Parameter, _Unit] = {}
        slots = iter(self._slots())
        by_group = [[next(slots) for _ in group["params"]] for group in self.param_groups]
        if together:
            self._add(self.param_groups, by_group, make)
            return
        for outer, group_slots in zip(self.param_groups, by_group, strict=True):
            for slot in group_slots:
                self._add([outer], [[slot]], make)

    @property
    def kind(self) -> str:
        """What a stored state belongs to."""
        how = "together" if self.together else "one by one"
        return f"{kind_of(self.made_of)}, {how}"

    @property
    def made_of(self) -> torch.optim.Optimizer:
        """One of its optimizers, which are all of one kind."""
        return self._units[0].optimizer

    @property
    def learned(self) -> tuple[str, ...]:
        """Keys of the groups that are learned: with one optimizer for all, those of its own."""
        return learned_keys(self.made_of) if self.together else ()

    @property
    def inside(self) -> list[torch.optim.Optimizer]:
        """Those that do the steps."""
        return [unit.optimizer for unit in self._units]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        for unit in self._units:
            self._step(unit)

    @torch.no_grad()
    def step_one(self, parameter: Parameter) -> None:
        """Step this one, from its gradient, which stays."""
        if self.together:
            raise RuntimeError("these parameters are stepped together")
        self._step(self._unit_of[parameter])

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averaged points of a schedule-free optimizer into the parameters; the state stays in training."""
        for unit in self._units:
            self._bring(unit.slots)
            self._enter(unit, unit.slots)
            unit.optimizer.eval()  # type: ignore[attr-defined]
            unit.optimizer.state.clear()
            self._send(unit.slots)
            for inner in unit.optimizer.param_groups:
                inner["train_mode"] = True
            for slot in unit.slots:
                if slot.is_rounded:
                    slot.parameter.copy_(slot.moved)
                    _empty(slot)

    def _slots(self) -> list[_Slot]:
        parameters = [one for group in self.param_groups for one in group["params"]]
        return [_Slot(one, self._moved(one), index) for index, one in enumerate(parameters)]

    def _moved(self, parameter: Parameter) -> Parameter:
        if self.rounding == "nearest" or parameter.dtype != torch.bfloat16:
            return parameter
        return Parameter(_placeholder(parameter))

    def _add(self, outer: list[dict[str, Any]], slots: list[list[_Slot]], make: Make) -> None:
        inner_groups = [
            {**group, "params": [slot.moved for slot in chosen]}
            for group, chosen in zip(outer, slots, strict=True)
        ]
        unit = _Unit(make(inner_groups), [slot for chosen in slots for slot in chosen], outer)
        for group, inner in zip(outer, unit.optimizer.param_groups, strict=True):
            group["lr"] = inner["lr"]
            if "train_mode" in inner:
                group["train_mode"] = True
            # Where a step's count is: on the device with these, else on the CPU.
            group.update({key: inner[key] for key in ("fused", "capturable") if key in inner})
            if self.together:
                group.update({key: inner[key] for key in learned_keys(unit.optimizer)})
        self._units.append(unit)
        self._unit_of |= dict.fromkeys((slot.parameter for slot in unit.slots), unit)

    def _step(self, unit: _Unit) -> None:
        slots = [slot for slot in unit.slots if slot.parameter.grad is not None]
        if not slots:
            return
        self._bring(slots)
        self._enter(unit, slots)
        for slot in slots:
            if slot.is_rounded:
                assert slot.parameter.grad is not None
                slot.moved.grad = slot.parameter.grad.float()
        unit.optimizer.step()
        self._leave(unit, slots)
        self._send(slots)

    def _bring(self, slots: Sequence[_Slot]) -> None:
        if self.keeper is not None:
            for slot in slots:
                self.keeper.bring(slot.parameter, self.state[slot.parameter])

    def _send(self, slots: Sequence[_Slot]) -> None:
        if self.keeper is not None:
            for slot in slots:
                self.keeper.send(slot.parameter, self.state[slot.parameter])

    def _enter(self, unit: _Unit, slots: Sequence[_Slot]) -> None:
        """Give the unit's optimizer its parameters, state and options."""
        for slot in slots:
            state = self.state[slot.parameter]
            unit.optimizer.state[slot.moved] = {
                key: value for key, value in state.items() if key not in _OURS
            }
            if slot.is_rounded:
                exact = slot.parameter.detach().float()
                if _COMPENSATION in state:
                    exact += state[_COMPENSATION]
                slot.moved.data = exact
        for group, inner in zip(unit.outer, unit.optimizer.param_groups, strict=True):
            inner["lr"] = group["lr"]
            if self.together:
                inner.update({key: group[key] for key in self.learned if key in group})
            else:
                inner.update(self.state[unit.slots[0].parameter].get(_GROUP, {}))

    def _leave(self, unit: _Unit, slots: Sequence[_Slot]) -> None:
        """Take the state back, and the weights in the number type they have."""
        keys = learned_keys(unit.optimizer)
        for slot in slots:
            state = self.state[slot.parameter]
            ours = {key: state[key] for key in _OURS if key in state}
            state.clear()
            state.update(unit.optimizer.state[slot.moved], **ours)
            if slot.is_rounded:
                self._round(slot, state)
        unit.optimizer.state.clear()
        for group, inner in zip(unit.outer, unit.optimizer.param_groups, strict=True):
            learned = {key: inner[key] for key in keys if key in inner}
            if self.together:
                group.update(learned)
            elif learned:
                self.state[unit.slots[0].parameter][_GROUP] = learned

    def _round(self, slot: _Slot, state: dict[str, Any]) -> None:
        exact = slot.moved.detach()
        if self.rounding == "kahan":
            nearest, state[_COMPENSATION] = split(exact)
            slot.parameter.copy_(nearest)
        else:
            drawn = state.get(_ROUNDED, 0)
            generator = torch.Generator(exact.device)
            generator.manual_seed(stable_seed(self.seed, "rounding", slot.index, drawn))
            slot.parameter.copy_(rounded_stochastically(exact, generator))
            state[_ROUNDED] = drawn + 1
        _empty(slot)


def _empty(slot: _Slot) -> None:
    slot.moved.data = _placeholder(slot.parameter)
    slot.moved.grad = None


def _placeholder(parameter: Tensor) -> Tensor:
    """The shape and device of the parameter in float32, over a single number."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device).expand(parameter.shape)
