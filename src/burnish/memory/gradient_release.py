"""Weights that move in backward: each is stepped as soon as its gradient is there, which is then let go.

The gradients of a model take as much memory as its weights. Here only a few are there at any time, and each weight's
operations have had their part in backward by then, so that what is computed is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

_BESIDE_ZERO = 1e-6  # as torch.nn.utils.clip_grads_with_norm_


class GradientRelease:
    """Steps parameters while a backward pass goes on within `moving`; elsewhere gradients stay as usual."""

    def __init__(
        self, parameters: Sequence[Parameter], step_one: Callable[[Parameter], None], max_norm: float
    ) -> None:
        """Watch the parameters.

        Args:
            step_one: moves a parameter by its gradient.
            max_norm: to which each gradient is clipped by itself: the norm of all is known too late.
        """
        self._step_one = step_one
        self._max_norm = max_norm
        self._is_moving = False
        self._norms: list[Tensor] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Within it, gradients move their parameters and are gone."""
        self._norms.clear()
        self._is_moving = True
        try:
            yield
        finally:
            self._is_moving = False

    def norm(self) -> Tensor:
        """Of all gradients of the last pass as one vector, before they were clipped; float32."""
        return torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else torch.zeros(())

    def _arrived(self, parameter: Tensor) -> None:
        if not self._is_moving or parameter.grad is None:
            return
        assert isinstance(parameter, Parameter)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            self._norms.append(norm)
            # By one where it is small enough, so that the host need not know.
            parameter.grad.mul_((self._max_norm / (norm + _BESIDE_ZERO)).clamp(max=1.0))
        self._step_one(parameter)
        parameter.grad = None
