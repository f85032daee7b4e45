"""Numbers of the released models in the code of diffusers, replaced for as long as a tiny model is read by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import CodeType
from typing import Any

from diffusers.loaders import lora_conversion_utils


@contextmanager
def tiny_loaders(numbers: Mapping[str, Mapping[int, int]]) -> Iterator[None]:
    """Within it diffusers' adapter converters, by name, have other numbers (`Case.loader_widths`)."""
    with ExitStack() as patches:
        for function, tiny in numbers.items():
            patches.enter_context(widths(getattr(lora_conversion_utils, function), tiny))
        yield


def flux_loader(denoiser: Any) -> Mapping[str, Mapping[int, int]]:
    """For `tiny_loaders`: the widths of FLUX.1 where sd-scripts' fused modules are taken apart."""
    width = denoiser.config["num_attention_heads"] * denoiser.config["attention_head_dim"]
    return {"_convert_kohya_flux_lora_to_diffusers": {3072: width, 12288: 4 * width}}


@contextmanager
def widths(function: Callable[..., Any], tiny: Mapping[int, int]) -> Iterator[None]:
    """Within it `function` has other numbers in its code.

    diffusers' converters hold the widths of the released models as constants, which a tiny model does not have.
    """
    released = function.__code__
    function.__code__ = _with_numbers(released, tiny)
    try:
        yield
    finally:
        function.__code__ = released


def _with_numbers(code: CodeType, numbers: Mapping[int, int]) -> CodeType:
    def changed(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return _with_numbers(constant, numbers)
        if isinstance(constant, tuple):
            return tuple(changed(one) for one in constant)
        return numbers.get(constant, constant) if type(constant) is int else constant

    return code.replace(co_consts=changed(code.co_consts))
