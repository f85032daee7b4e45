"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from burnish.errors import CheckpointError
from burnish.optim.power_average import kept_share
from burnish.optim.state import Json


class Ema:
    """Keeps `average <- d average + (1 - d) parameter` for every parameter.

    d = min(decay, (1 + n) / (10 + n)) where n counts the updates before this one. The rising part is the
    `num_updates` of TensorFlow's ExponentialMovingAverage, which diffusers' EMAModel has as well: the first
    updates forget the untrained start, 90 % of it at the first. Averages are float32 or wider, on the
    parameters' devices.

    With a `width` d is that of `power_average` instead, which forgets the start at the first update.
    """

    def __init__(
        self, named_parameters: Mapping[str, Parameter], decay: float, width: float | None = None
    ) -> None:
        """Begin with the present values.

        Args:
            named_parameters: what to average, by the names used in a checkpoint.
            decay: kept share per update, in (0, 1).
            width: of a power-function profile, in the place of `decay`.
        """
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1; got {decay}")
        self.decay = decay
        self.width = width
        self._parameters = dict(named_parameters)
        self._swapped = False
        self.reset()

    def reset(self) -> None:
        """Forget the past: begin again with the present values."""
        self.updates = 0
        self._averages = [_wide(parameter).clone() for parameter in self._parameters.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages toward the present values; call it once after each optimizer step."""
        if self._swapped:
            raise RuntimeError("the parameters hold their averages now: updating would average the averages")
        if self.width is None:
            kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        else:
            kept = kept_share(self.width, self.updates + 1)
        pairs = list(zip(self._averages, self._parameters.values(), strict=True))
        if pairs and all(average.dtype == parameter.dtype for average, parameter in pairs):
            torch._foreach_lerp_(self._averages, [one.detach() for _, one in pairs], 1.0 - kept)
        else:  # one after the other: all the weights of a model widened at once would take twice its memory
            for average, parameter in pairs:
                average.lerp_(_wide(parameter), 1.0 - kept)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters hold the averages inside, and afterwards exactly what they held before.

        Changes made to the parameters inside are lost; the averages do not notice them.
        """
        if self._swapped:
            raise RuntimeError("the parameters hold their averages already")
        before = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._swapped = True
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(before)
            self._swapped = False

    def state_dict(self) -> tuple[dict[str, Tensor], Json]:
        """The averages by parameter name, not copied, the number of updates, and the width where there is one."""
        width: dict[str, Json] = {} if self.width is None else {"width": self.width}
        return dict(zip(self._parameters, self._averages, strict=True)), {"updates": self.updates, **width}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], state: Json) -> None:
        """Continue from what `state_dict` gave, bit for bit.

        Raises:
            CheckpointError: other names or shapes; nothing was changed.
        """
        own = dict(zip(self._parameters, self._averages, strict=True))
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
        if wrong:
            raise CheckpointError(f"the stored averages do not fit this run: {_some(wrong)}")
        if not isinstance(state, dict) or not isinstance(updates := state.get("updates"), int):
            raise CheckpointError(f"the stored averages do not say how many updates they saw: {state!r}")
        for name, average in own.items():
            average.copy_(tensors[name])
        self.updates = updates

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.copy_(value)


def _wide(parameter: Tensor) -> Tensor:
    # In bfloat16 a share of 0.001 of a small difference rounds to nothing: the average would stand still.
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
