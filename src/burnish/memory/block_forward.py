"""The one owner of a block's `forward`: what is put around it stands here in its order, whoever asked for it first.

From the outside in: saved tensors packed elsewhere, weights brought, checkpoint, compiled code, the model's forward.
`recompute` keeps its boundary outside the compiled code, so that a block's inputs alone are saved; the modes that keep
some outputs have it inside, where the compiler decides what is recomputed without a Python call per operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Mode = Literal["keep", "keep-matmul", "keep-attention", "recompute"]
Forward = Callable[..., Any]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

_aten = torch.ops.aten
ATTENTION_OPS: frozenset[object] = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
        _aten._scaled_dot_product_attention_math_for_mps.default,
        _aten._flash_attention_forward.default,
        _aten._efficient_attention_forward.default,
        torch.ops.higher_order.flex_attention,
    }
)
MATMUL_OPS: frozenset[object] = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten._scaled_mm.default,
        _aten._int_mm.default,
        _aten.convolution.default,
    }
)
KEPT_OPS: dict[Mode, frozenset[object]] = {
    "keep-attention": ATTENTION_OPS,
    "keep-matmul": ATTENTION_OPS | MATMUL_OPS,
}


def _keep(ops: frozenset[object], context: object, op: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES: dict[Mode, Callable[..., CheckpointPolicy]] = {
    mode: partial(_keep, ops) for mode, ops in KEPT_OPS.items()
}


class Packed(Protocol):
    """What autograd holds in place of a tensor that it saved for backward."""

    def unpack(self) -> Tensor: ...


class Keeper(Protocol):
    """Keeps some of the tensors that a block saves for backward in its own way."""

    def pack(self, tensor: Tensor) -> Packed | None:
        """None: not one of mine."""
        ...


class BlockForward:
    """Stands in for a block's `forward` as long as something is asked for."""

    def __init__(self, plain: Forward) -> None:
        self.plain = plain
        self.mode: Mode = "keep"
        self.compiled_by: Callable[[Forward], Forward] | None = None
        self.bring_weights: Callable[[], object] | None = None  # before each forward, also to recompute
        self.keepers: tuple[Keeper, ...] = ()
        self._inner = plain

    @property
    def is_plain(self) -> bool:
        asked = self.compiled_by, self.bring_weights, self.keepers or None
        return self.mode == "keep" and asked == (None, None, None)

    def arrange(self) -> None:
        """Build what is called, after a change of what is asked for."""
        compiled: Callable[[Forward], Forward] = self.compiled_by or (lambda forward: forward)
        if self.mode == "keep":
            self._inner = compiled(self.plain)
        elif self.mode == "recompute":
            self._inner = partial(
                _checkpointed, compiled(self.plain), partial(_recomputing, self.bring_weights)
            )
        elif self.compiled_by is None:
            contexts = partial(_selecting, self.mode, self.bring_weights)
            self._inner = partial(_checkpointed, self.plain, contexts)
        else:  # what the compiler traces must be torch's own function, not ours
            contexts = partial(create_selective_checkpoint_contexts, POLICIES[self.mode])
            within = partial(checkpoint, self.plain, use_reentrant=False, context_fn=contexts)
            self._inner = compiled(within)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.bring_weights is not None:
            self.bring_weights()
        if not self.keepers or not torch.is_grad_enabled():
            return self._inner(*args, **kwargs)
        with saved_tensors_hooks(self._pack, _unpack):
            return self._inner(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Tensor | Packed:
        for keeper in self.keepers:
            packed = keeper.pack(tensor)
            if packed is not None:
                return packed
        return tensor


def change_forward(block: nn.Module, change: Callable[[BlockForward], None]) -> None:
    """Ask for something around a block's forward; a block of which nothing is asked any more has its own again."""
    present = block.__dict__.get("forward")
    forward = present if isinstance(present, BlockForward) else BlockForward(block.forward)
    change(forward)
    if not forward.is_plain:
        forward.arrange()
        block.forward = forward
    elif present is forward:
        block.forward = forward.plain


def _unpack(saved: Tensor | Packed) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.unpack()


def _checkpointed(forward: Forward, contexts: Callable[[], Contexts], *args: Any, **kwargs: Any) -> Any:
    """Tensors given by name go by position: torch's checkpoint saves only those in the way that hooks can see."""
    by_position = partial(_named, forward, tuple(kwargs))
    return checkpoint(by_position, *args, *kwargs.values(), use_reentrant=False, context_fn=contexts)


def _named(forward: Forward, names: tuple[str, ...], *values: Any) -> Any:
    """A call whose last values go by these names; holds none of the values, as a closure would."""
    first = len(values) - len(names)
    return forward(*values[:first], **dict(zip(names, values[first:], strict=True)))


def _recomputing(bring_weights: Callable[[], object] | None) -> Contexts:
    return nullcontext(), nullcontext() if bring_weights is None else _brought(bring_weights)


def _selecting(mode: Mode, bring_weights: Callable[[], object] | None) -> Contexts:
    make: Callable[..., Contexts] = create_selective_checkpoint_contexts
    caching, cached = make(POLICIES[mode])
    return caching, cached if bring_weights is None else _brought(bring_weights, cached)


@contextmanager
def _brought(
    bring_weights: Callable[[], object], inside: AbstractContextManager[Any] | None = None
) -> Iterator[None]:
    """Copies of weights are made outside of what counts a block's operations."""
    bring_weights()
    with inside or nullcontext():
        yield
