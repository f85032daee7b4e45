"""Blocks compiled one by one: a model's repeated blocks share their code, and so their graphs.

Compiling a whole denoiser takes minutes; compiling what is repeated takes one graph for each kind of block, however
many there are. Sizes: the first batch makes a graph of its sizes alone. Where a later one differs (another bucket, a
longer caption, a partial batch), one more graph is made that takes any size in those dimensions, and it serves all
further buckets. A graph per bucket would have to know the buckets, and caption lengths have none; a graph for any size
from the start would cost runs of one size what such graphs lose.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from burnish.memory.block_forward import BlockForward, Forward, change_forward

_log = logging.getLogger(__name__)
_GRAPHS_PER_CODE = (
    64  # torch's own 8 is too few for a UNet, whose blocks of one class differ in width and depth
)
_GRAPHS_IN_ALL = 1024
_OF_THE_COMPILER = (  # warnings about torch's own code, of no use to a user
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.jit.script",
    "<class 'torch.autograd.function.Function'> should not be instantiated",
)


@dataclass
class Compilation:
    """Compiles forwards on their first call; once one cannot be compiled, all run as they are.

    `backend` is one of `torch.compile`: inductor makes kernels, aot_eager checks all but that.
    """

    warn: Callable[[str], None]
    backend: str = "inductor"
    trouble: str = ""  # why nothing is compiled any more
    seconds: float = 0.0  # of calls that compiled, all but nothing of them computing
    graphs: int = 0
    _told: int | None = field(default=0, init=False)  # graphs after the last step; None: said already

    def __call__(self, forward: Forward) -> Forward:
        compiled = torch.compile(forward, backend=self.backend)
        return partial(self._run, compiled, forward)

    def _run(self, compiled: Forward, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        if not self.trouble:
            before, began = _graphs(), time.perf_counter()
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                self._fall_back(error)
            finally:
                if _graphs() != before:
                    self.graphs += _graphs() - before
                    self.seconds += time.perf_counter() - began
        return forward(*args, **kwargs)

    def _fall_back(self, error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        self.trouble = " ".join(lines[:2]) or type(error).__name__  # what its developers need follows
        _log.info("compiling failed", exc_info=error)
        self.warn(f"memory.compile has no effect, blocks run as they are: {self.trouble[:300]}")

    def tell(self, *_: object) -> None:
        """After each step: say once what compiling took, as soon as a step has needed no more of it."""
        if self._told is None or self.trouble:
            return
        if 0 < self.graphs == self._told:
            _log.info("blocks compiled: %d graphs in %.1f s", self.graphs, self.seconds)
            self._told = None
        else:
            self._told = self.graphs


def _graphs() -> int:
    """Graphs that were compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def compile_blocks(
    blocks: Sequence[nn.Module], warn: Callable[[str], None], cache_folder: Path, backend: str = "inductor"
) -> Compilation:
    """Have each block compiled on its first call, forward and backward.

    Args:
        cache_folder: compiled kernels are kept below it, under keys that the compiler makes of all they depend on.
        warn: told once, with the reason, where compiling fails and the blocks go on uncompiled.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder / "compiled"))
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS_PER_CODE)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, _GRAPHS_IN_ALL)
    # Backward is compiled with its forward: an error there can still be answered by running as it is.
    functorch.force_non_lazy_backward_lowering = True
    for text in _OF_THE_COMPILER:
        warnings.filterwarnings("ignore", message=text)
    compilation = Compilation(warn, backend)
    for block in blocks:
        change_forward(block, partial(_compile, compilation))
    return compilation


def _compile(compilation: Compilation, forward: BlockForward) -> None:
    forward.compiled_by = compilation
