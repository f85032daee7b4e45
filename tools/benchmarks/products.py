"""Products with weights in fewer bits, forward and gradient of the input: how exact and how fast beside bfloat16.

    python -m tools.benchmarks.products --rows 4608 --shapes 3072x3072 12288x3072 3072x12288
    python -m tools.benchmarks.products --rows 256 --shapes 512x512 --repeats 3        # on a CPU

Errors are relative, in the Frobenius norm, against float32 products of the same numbers. `outliers` has 8 channels of
the input 50 times as large, as transformers' activations do. `kernel` says whether products are made in 8 bits at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.memory.formats import FORMATS, has_kernel
from tools.benchmarks import harness

LARGE_CHANNELS, LARGER_BY = 8, 50.0


def numbers(
    rows: int, shape: tuple[int, int], outliers: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Input (M, K), weight (N, K) and gradient (M, N), float32 numbers that bfloat16 holds."""
    outputs, inputs = shape
    generator = torch.Generator(device).manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator, device=device).bfloat16().float()
        for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    weight = (weight * inputs**-0.5).bfloat16().float()
    if outliers:
        x[:, :LARGE_CHANNELS] *= LARGER_BY
    return x, weight, grad


def row(
    kept_as: str,
    rows: int,
    shape: tuple[int, int],
    device: torch.device,
    *,
    outliers: bool = False,
    repeats: int = 20,
) -> dict[str, Any]:
    """One format on one shape; `bfloat16` is the plain product."""
    x, weight, grad = numbers(rows, shape, outliers, device)
    wide = x @ weight.t(), grad @ weight
    x, grad = x.bfloat16(), grad.bfloat16()
    kernel = False
    forward: Callable[[], Tensor]
    backward: Callable[[], Tensor]
    if kept_as == "bfloat16":
        plain = weight.bfloat16()
        forward, backward = (lambda: F.linear(x, plain)), (lambda: grad @ plain)
    else:
        kept, kernel = FORMATS[kept_as], has_kernel(kept_as, device)
        codes, scales = kept.pack(weight)
        table = kept.table(shape[1], device)
        forward = lambda: kept.product(x, codes, scales, table, kernel)  # noqa: E731
        backward = lambda: kept.product_back(grad, codes, scales, table, kernel)  # noqa: E731
    figures: dict[str, Any] = {"format": kept_as, "shape": shape, "rows": rows, "outliers": outliers}
    figures["kernel"] = kernel
    for name, product, right in (("forward", forward, wide[0]), ("grad_input", backward, wide[1])):
        taken = harness.summary(harness.seconds(product, repeats, device))
        error = float((product().float() - right).norm() / right.norm())
        rate = 2 * rows * shape[0] * shape[1] / (taken["ms"] / 1e3) / 1e12
        figures[name] = {"error": round(error, 6), **taken, "tflops": round(rate, 4)}
    return figures


def shape_in(text: str) -> tuple[int, int]:
    outputs, inputs = (int(number) for number in text.split("x"))
    return outputs, inputs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser_for(__doc__)
    parser.add_argument("--formats", nargs="+", default=["bfloat16", *FORMATS])
    parser.add_argument("--shapes", nargs="+", type=shape_in, default=[(3072, 3072)], help="outputs x inputs")
    parser.add_argument("--rows", type=int, default=4608)
    parser.add_argument("--repeats", type=int, default=20)
    told = parser.parse_args(arguments)
    device = torch.device(told.device)
    rows = [
        row(kept_as, told.rows, shape, device, outliers=outliers, repeats=told.repeats)
        for shape in told.shapes
        for outliers in (False, True)
        for kept_as in told.formats
    ]
    harness.tell(device, {"products": rows})


if __name__ == "__main__":
    main()
