"""The kernels that can answer `scaled_dot_product_attention`: which are there, and how each is called.

All take what that function takes. Shape letters: B batch, H heads, S query tokens, K key tokens, D head dimension.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BackEnd = Literal["torch", "flash", "cudnn", "efficient", "flex", "math", "flash3", "flash4", "sage"]
Kernel = Callable[..., Tensor]

TORCHS_OWN = F.scaled_dot_product_attention
FOR_SAMPLING = frozenset({"sage"})  # no backward
_FUSED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,
    "flash4": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
REGISTERED = {"flash3": "FA3", "flash4": "FA4"}  # torch.nn.attention's names of what takes flash's place
_SAGE_DIMS = (64, 96, 128)


@contextmanager
def flash_replaced_by(back_end: BackEnd) -> Iterator[None]:
    """Within it torch's flash kernel is that of a registered package; nothing happens for other back ends."""
    if back_end not in REGISTERED:
        yield
        return
    torch.nn.attention.activate_flash_attention_impl(REGISTERED[back_end])
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def kernel(back_end: BackEnd, *, strict: bool = False) -> Kernel:
    """The function that answers as `scaled_dot_product_attention` does, by this back end.

    Args:
        strict: fail where the back end cannot, as the probe wants it; a run goes on with the next best then.
    """
    match back_end:
        case "torch":
            return TORCHS_OWN
        case "flex":
            return _flex
        case "sage":
            return _sage
        case "cudnn":
            return _with_contiguous_gradient(_fused(back_end, strict))
        case _:
            return _fused(back_end, strict)


def unavailable(back_end: BackEnd, device: torch.device) -> str:
    """Why this back end cannot be used on this device, or ""."""
    on_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_cuda else (0, 0)
    match back_end:
        case "torch" | "math":
            return ""
        case "flash":
            return "" if device.type == "cpu" or capability >= (8, 0) else _needs("compute capability 8.0")
        case "flex" if device.type == "cpu":
            return "FlexAttention has no backward on a CPU"
        case _ if not on_cuda:
            return _needs("an NVIDIA GPU")
        case "flex":
            return "" if _is_there("triton") else _needs("the package triton")
        case "cudnn":
            fits = bool(torch.backends.cudnn.is_available()) and capability >= (8, 0)  # type: ignore[no-untyped-call]
            return "" if fits else _needs("cuDNN and compute capability 8.0")
        case "sage":
            fits = capability >= (8, 0)
            return (
                ""
                if fits and _is_there("sageattention")
                else _needs("the package sageattention (8.0 or newer)")
            )
        case "flash3" | "flash4":
            return _why_no_replacement(back_end, capability)
    return ""


def _why_no_replacement(back_end: str, capability: tuple[int, int]) -> str:
    module = {"flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}[back_end]
    cards = {"flash3": [(9, 0)], "flash4": [(9, 0), (10, 0)]}[back_end]
    if capability not in cards:
        return _needs("compute capability " + " or ".join(f"{major}.{minor}" for major, minor in cards))
    if not _is_there(module):
        return _needs(f"the package flash-attn {back_end[-1]} (module {module})")
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return _needs(f"a torch that can register it; {torch.__version__} cannot")
    known = torch.nn.attention.list_flash_attention_impls()
    return "" if REGISTERED[back_end] in known else _needs(f"a torch that knows {REGISTERED[back_end]}")


def back_ends() -> tuple[BackEnd, ...]:
    return get_args(BackEnd)


class _ContiguousGradient(torch.autograd.Function):
    """Hands its input on; in backward lays the gradient (B, H, S, D) out as (B, S, H, D) without gaps.

    cuDNN's backward reads past the end of a gradient that is a slice of a wider tensor, as it is where a model
    concatenates attention's output with another (torch 2.11: illegal memory access).
    """

    @staticmethod
    def forward(ctx: Any, answer_BHSD: Tensor) -> Tensor:
        return answer_BHSD.view_as(answer_BHSD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].transpose(1, 2).contiguous().transpose(1, 2)


def _with_contiguous_gradient(inner: Kernel) -> Kernel:
    def cured(*args: Any, **kwargs: Any) -> Tensor:
        answer: Tensor = _ContiguousGradient.apply(inner(*args, **kwargs))  # type: ignore[no-untyped-call]
        return answer

    return cured


def _fused(back_end: BackEnd, strict: bool) -> Kernel:
    # Uncured cuDNN is never what a call falls back to.
    others = () if strict else (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    order = list(dict.fromkeys([_FUSED[back_end], *others]))

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return TORCHS_OWN(*args, **kwargs)

    return fused


def without_flash(*args: Any, **kwargs: Any) -> Tensor:
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return TORCHS_OWN(*args, **kwargs)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """FlexAttention (arXiv 2412.05496); a mask becomes a change of each score, so that every kind of mask is right."""
    from torch.nn.attention.flex_attention import flex_attention

    change = score_change(query, key, attn_mask, is_causal)
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    answer: Tensor = attend(query, key, value, score_mod=change, scale=scale, enable_gqa=enable_gqa)
    return answer


def score_change(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Callable[..., Tensor] | None:
    """What a mask does to the score at (batch, head, query, key); None where nothing is masked."""
    if attn_mask is not None:
        mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if mask.dtype == torch.bool:
            return lambda score, b, h, q, k: torch.where(mask[b, h, q, k], score, -float("inf"))
        return lambda score, b, h, q, k: score + mask[b, h, q, k]
    if is_causal:
        return lambda score, b, h, q, k: torch.where(q >= k, score, -float("inf"))
    return None


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _sage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SageAttention (arXiv 2411.10958): 8-bit scores, no backward, no mask."""
    import sageattention

    if attn_mask is not None or enable_gqa or query.shape[-1] not in _SAGE_DIMS:
        raise RuntimeError(
            "SageAttention takes no mask, no grouped heads, and head dimensions 64, 96 and 128"
        )
    answer: Tensor = sageattention.sageattn(
        query, key, value, tensor_layout="HND", is_causal=is_causal, sm_scale=scale
    )
    return answer


def _needs(what: str) -> str:
    return f"it needs {what}"


def _is_there(module: str) -> bool:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return False
    return package == module or importlib.util.find_spec(module) is not None
