"""Telling an out-of-memory error from other errors, and cleaning up after one."""

from __future__ import annotations

import gc
import traceback

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is torch's or Python's way of saying that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator has no exception class of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_memory_of(error: BaseException) -> None:
    """Let go of what failed, while its error is being handled: the frames it names hold their tensors until it is gone,
    and what is done about it would have to do with what they leave."""
    told: BaseException | None = error
    while told is not None:
        traceback.clear_frames(told.__traceback__)
        told = told.__context__
    release_cached_memory()


def release_cached_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
