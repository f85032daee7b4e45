"""The arithmetic of each kind of adapter against LyCORIS'."""

from __future__ import annotations

import pytest
import torch
from lycoris.functional import factorization, locon, loha, lokr
from lycoris.functional.boft import diff_weight as boft_diff
from lycoris.functional.diag_oft import diff_weight as oft_diff
from lycoris.functional.general import weight_decompose
from torch import Tensor

from burnish.adapters import deltas

KERNELS = [(), (3,), (3, 3), (1, 3, 3)]
GAMMA = torch.tensor(0.7, dtype=torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_lora_and_loha(kernel: tuple[int, ...]) -> None:
    ones = tuple(1 for _ in kernel)
    up, down, core = normal(24, 5, *ones), normal(5, 10, *kernel), normal(5, 5, *kernel)
    shape = (24, 10, *kernel)
    assert_same(
        deltas.lora_delta(up, down, scale=0.7), locon.diff_weight(down, up, None, gamma=0.7).view(shape)
    )
    one, two = (normal(24, 5), normal(5, down[0].numel())), (normal(5, 24).T, normal(5, down[0].numel()) + 1)
    expected = loha.diff_weight(one[1], one[0], two[1], two[0], None, None, gamma=GAMMA)
    assert_same(deltas.loha_delta(*one, *two, scale=0.7, shape=shape), expected.view(shape))
    if kernel:
        thin = normal(5, 10, *ones)
        expected = locon.diff_weight(thin, up, core, gamma=0.7).view(shape)
        assert_same(deltas.lora_delta(up, thin, core, scale=0.7), expected)
        rows, columns = deltas.without_core(core, up.flatten(1).T, thin.flatten(1))
        assert_same(0.7 * (rows @ columns).view(shape), expected)
        parts = normal(5, 24), normal(5, 10), normal(5, 24) + 1, normal(5, 10) - 1, core, core + 1
        w1_a, w1_b, w2_a, w2_b, t1, t2 = parts
        expected = loha.diff_weight(w1_b, w1_a, w2_b, w2_a, t1, t2, gamma=GAMMA)
        assert_same(deltas.loha_delta(*parts, scale=0.7), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_lokr(kernel: tuple[int, ...]) -> None:
    first, whole, shape = normal(4, 2), normal(6, 5, *kernel), (24, 10, *kernel)
    expected = lokr.kron_weight(first, None, None, whole, None, None, None, scale=0.7).view(shape)
    assert_same(deltas.lokr_delta(first, deltas.lokr_factor(whole), scale=0.7, shape=shape), expected)
    a, b = normal(6, 3), normal(3, whole[0].numel())
    expected = lokr.kron_weight(first, None, None, None, a, b, None, scale=0.7).view(shape)
    assert_same(deltas.lokr_delta(first, deltas.lokr_factor(None, a, b), scale=0.7, shape=shape), expected)
    if kernel:
        a, b, core = normal(3, 6), normal(3, 5), normal(3, 3, *kernel)
        expected = lokr.kron_weight(first, None, None, None, a, b, core, scale=0.7).view(shape)
        assert_same(
            deltas.lokr_delta(first, deltas.lokr_factor(None, a, b, core), scale=0.7, shape=shape), expected
        )
    with pytest.raises(ValueError, match="whole or a product"):
        deltas.lokr_factor(None, a)


@pytest.mark.parametrize("kernel", KERNELS)
def test_oft_boft_and_dora(kernel: tuple[int, ...]) -> None:
    weight = normal(48, 5, *kernel).float()
    blocks = 0.2 * normal(8, 6, 6).float()
    torch.testing.assert_close(deltas.turned_delta(weight, blocks), oft_diff(weight, blocks, None))
    stages = 0.2 * normal(4, 8, 6, 6).float()
    torch.testing.assert_close(
        deltas.turned_delta(weight, stages), boft_diff(weight, stages, None, constraint=0)
    )
    delta, magnitude = normal(48, 5, *kernel).float() + 0.1, normal(48).abs().float()
    expected = weight_decompose(weight + delta, magnitude.view(-1, 1, *(1 for _ in kernel)))
    torch.testing.assert_close(deltas.dora_weight(weight, delta, magnitude), expected)


def test_widths_split_as_lycoris_splits_them() -> None:
    for width in [*range(1, 200), 320, 640, 1280, 3072, 12288]:
        for factor in (-1, 1, 2, 3, 4, 8, 16, 24, 64, 800):
            assert deltas.split_width(width, factor) == tuple(factorization(width, factor))
