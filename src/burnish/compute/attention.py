"""Which kernel answers the denoiser's calls of `scaled_dot_product_attention`, and how the answer is redirected.

All model code, diffusers' own attention dispatch included, calls that function by its module. `Attention.installed`
puts another in its place and takes it away again. Each *kind* of call has a kernel of its own: self-attention without
a mask may go to cuDNN while attention to a masked prompt goes elsewhere. What no rule names, a VAE's single wide
head for one, is left to torch.

Shape letters: B batch, H heads, S query tokens, K key tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.compute.attention_kernels import (
    REGISTERED,
    TORCHS_OWN,
    BackEnd,
    Kernel,
    flash_replaced_by,
    kernel,
    without_flash,
)

Mask = Literal["none", "boolean", "additive"]


@dataclass(frozen=True, slots=True)
class Kind:
    """Calls that one kernel answers: all that matters to a kernel but sizes."""

    head_dim: int
    dtype: torch.dtype
    mask: Mask
    to_itself: bool  # as many keys as queries
    causal: bool
    grouped: bool  # fewer heads of keys than of queries

    def __str__(self) -> str:
        words = [f"head dimension {self.head_dim}", str(self.dtype).removeprefix("torch.")]
        words += ["self" if self.to_itself else "cross"]
        words += [f"{self.mask} mask"] * (self.mask != "none")
        words += ["causal"] * self.causal + ["grouped"] * self.grouped
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it was seen: enough to make another like it."""

    kind: Kind
    query_BHSD: tuple[int, ...]
    key_BHKD: tuple[int, ...]
    mask: tuple[int, ...] | None
    tokens_first: bool  # in memory (B, S, H, D), as projections give it

    @property
    def size(self) -> int:
        """Numbers in the matrix of scores."""
        batch, heads, queries, _ = self.query_BHSD
        return batch * heads * queries * self.key_BHKD[2]


@dataclass(frozen=True, slots=True)
class Rule:
    """Calls of this kind are answered by this kernel."""

    kind: Kind
    back_end: BackEnd


@dataclass
class Attention:
    """A choice of kernels; without rules every call is torch's own, and nothing is redirected."""

    rules: Sequence[Rule] = ()
    while_sampling: Sequence[Rule] = ()  # asked first while samples are drawn
    _samples: bool = field(default=False, init=False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it the calls of this process go where the rules say.

        One scope for the whole of training rather than one per forward: what is recomputed in backward must come
        from the kernel that computed it first.
        """
        if not (self.rules or self.while_sampling):
            yield
            return
        replaced = {rule.back_end for rule in self.rules} & REGISTERED.keys()
        before = F.scaled_dot_product_attention
        with flash_replaced_by(next(iter(replaced), "torch")):
            F.scaled_dot_product_attention = self._redirected(bool(replaced))
            try:
                yield
            finally:
                F.scaled_dot_product_attention = before

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it the rules for samples count as well: kernels without a backward, and less exact ones."""
        self._samples = True
        try:
            yield
        finally:
            self._samples = False

    def _redirected(self, is_flash_replaced: bool) -> Kernel:
        # Kernels that take flash's place raise where flash would have stepped aside: only their own rules see them.
        own = without_flash if is_flash_replaced else TORCHS_OWN
        rules = [(rule.kind, kernel(rule.back_end)) for rule in self.rules]
        for_samples = [(rule.kind, kernel(rule.back_end)) for rule in self.while_sampling]

        def scaled_dot_product_attention(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            answer = own
            if dropout_p == 0.0 and query.dim() == 4:
                for kind, candidate in for_samples + rules if self._samples else rules:
                    if _is_of(kind, query, key, value, attn_mask, is_causal, enable_gqa):
                        answer = candidate
                        break
            return answer(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        return scaled_dot_product_attention


@contextmanager
def recorded(calls: dict[Kind, Call]) -> Iterator[None]:
    """Within it, the largest call of each kind is put into `calls`."""
    before = F.scaled_dot_product_attention

    def recording(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = _call(query, key, value, *args, **kwargs)
        if call is not None and (call.kind not in calls or calls[call.kind].size < call.size):
            calls[call.kind] = call
        answer: Tensor = before(query, key, value, *args, **kwargs)
        return answer

    F.scaled_dot_product_attention = recording
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call | None:
    if query.dim() != 4 or dropout_p or value.shape[-1] != query.shape[-1]:
        return None
    kind = Kind(
        head_dim=query.shape[-1],
        dtype=query.dtype,
        mask=mask_of(attn_mask),
        to_itself=query.shape[2] == key.shape[2],
        causal=is_causal,
        grouped=enable_gqa and query.shape[1] != key.shape[1],
    )
    mask = None if attn_mask is None else tuple(attn_mask.shape)
    tokens_first = query.transpose(1, 2).is_contiguous()
    return Call(kind, tuple(query.shape), tuple(key.shape), mask, tokens_first)


def mask_of(attn_mask: Tensor | None) -> Mask:
    if attn_mask is None:
        return "none"
    return "boolean" if attn_mask.dtype == torch.bool else "additive"


def _is_of(
    kind: Kind,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Compared number by number and not by a key: a compiled block may not know its sizes while it is traced."""
    return (
        query.shape[-1] == kind.head_dim
        and value.shape[-1] == kind.head_dim
        and query.dtype == kind.dtype
        and mask_of(attn_mask) == kind.mask
        and (query.shape[2] == key.shape[2]) == kind.to_itself
        and is_causal == kind.causal
        and (enable_gqa and query.shape[1] != key.shape[1]) == kind.grouped
    )
