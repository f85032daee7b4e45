"""DoRA (arXiv 2402.09353) around a change of any kind: the changed weight's rows get trained lengths m.

W' = m (W + dW) / |W + dW|. As in section 4.3 of the paper the length below the line counts as constant for gradients.
What is computed is output + (l - 1) (output - bias) + l dW x with l = m / |W + dW|, and |W + dW|^2 = |W|^2 + 2 <W, dW>
+ |dW|^2 row by row, which needs no matrix of the weight's size where dW has factors.
"""

from __future__ import annotations

from torch import Tensor, nn

from burnish.adapters.deltas import row_norms
from burnish.adapters.layer import AdapterLayer, innermost


def frozen_weight(base: nn.Module) -> Tensor:
    """(out, in, *kernel) of the layer under any adapters; widened where it is kept in fewer bits."""
    weight = innermost(base).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def own_lengths(base: nn.Module) -> Tensor:
    """(out,) |W| by row, float32: what the trained lengths begin with."""
    return row_norms(frozen_weight(base).float())


def added_lengths(squares: Tensor, crossed: Tensor, own: Tensor) -> Tensor:
    """(out,) |W + dW| from |W|^2, <W, dW> and |dW|^2 by row."""
    return (squares + 2 * crossed + own).clamp(min=1e-24).sqrt()


def lengthened(
    layer: AdapterLayer, output: Tensor, product: Tensor, magnitude: Tensor, lengths: Tensor
) -> Tensor:
    """What is added to `output`: `product` is dW x, `lengths` |W + dW| by row without gradients."""
    longer = layer.by_row(magnitude / lengths - 1)  # float32: its deviation from 0 is what matters
    ratio = longer.to(product.dtype)
    return ratio * layer.without_bias(output) + (1 + ratio) * product
