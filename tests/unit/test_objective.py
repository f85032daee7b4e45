"""Times, noise, weights and distances against the formulas of their papers, and the objective put together of them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.config.objective import (
    P2,
    Absolute,
    AnyLoss,
    AnyTimesteps,
    AnyWeighting,
    Bell,
    BetaTimesteps,
    CosMapTimesteps,
    Debiased,
    Emphasis,
    Huber,
    LogCosh,
    LogitNormalTimesteps,
    MinSnr,
    ModeTimesteps,
    Multires,
    PseudoHuber,
    SigmoidTimesteps,
    SmoothL1,
    SoftMinSnr,
    UniformTimesteps,
)
from burnish.data.batch import Batch
from burnish.diffusion.distance import delta_at, mean_distance
from burnish.diffusion.noise import noise_of
from burnish.diffusion.times import Timesteps
from burnish.diffusion.weights import weight_at
from burnish.family import Capabilities
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import Schedule
from burnish.objective import Denoising
from burnish.randomness import torch_generator

FLOW = Schedule("velocity", {})
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
EPSILON = Schedule("epsilon", {}, ALPHAS)
V = Schedule("v", {}, ALPHAS)


def batch_of(count: int = 3, **more: Any) -> Batch:
    latents = torch.randn(count, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    names = tuple(f"{number}@48x64#0" for number in range(count))
    return Batch(latents, Conditioning({}), torch.ones(count), names, names, 7, **more)


def halved(noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
    return noisy * 0.5


FAMILY: Any = SimpleNamespace(
    capabilities=Capabilities(), latents=LatentShape(4, 8, 2), audio=None, predict=halved
)


@pytest.mark.parametrize("schedule", [FLOW, EPSILON, V], ids=["flow", "epsilon", "v"])
def test_with_everything_off_it_is_the_plain_mean_square_to_the_bit(schedule: Schedule) -> None:
    batch = batch_of()
    loss_B, t_B = Denoising(schedule).losses(FAMILY, batch, seed=3)
    for row, name in enumerate(batch.sample_ids):
        noise = torch.randn((4, 6, 8), generator=torch_generator(3, "noise", 7, name))
        t = torch.rand((), generator=torch_generator(3, "time", 7, name))
        data = batch.latents_BCHW[row]
        if schedule.is_flow:
            noisy, target = (1 - t) * data + t * noise, noise - data
        else:
            t = (t * 1000).floor() / 1000
            signal, sigma = (
                part.sqrt().float() for part in (ALPHAS[int(t * 1000 + 0.5)], 1 - ALPHAS[int(t * 1000 + 0.5)])
            )
            noisy = signal * data + sigma * noise
            target = noise if schedule is EPSILON else signal * noise - sigma * data
        assert float(t_B[row]) == float(t)
        assert torch.equal(loss_B[row], (noisy * 0.5 - target).square().flatten().mean())


def below(law: AnyTimesteps, t: Tensor) -> Tensor:
    """The law's distribution function, from its definition."""
    match law:
        case LogitNormalTimesteps(mean=mean, std=std):
            return 0.5 * (1 + torch.erf((torch.logit(t) - mean) / std / math.sqrt(2)))
        case SigmoidTimesteps(scale=scale):
            return 0.5 * (1 + torch.erf(torch.logit(t) / scale / math.sqrt(2)))
        case BetaTimesteps(alpha=alpha):
            return t**alpha  # for beta = 1
        case CosMapTimesteps():
            fine = (torch.arange(20000) + 0.5) / 20000
            density = 2 / (math.pi - 2 * math.pi * fine + 2 * math.pi * fine**2)
            return torch.cumsum(density / 20000, 0)[(t * 20000).long() - 1]
        case ModeTimesteps(scale=scale):
            u = (torch.arange(200000) + 0.5) / 200000
            mapped = (1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)).sort().values
            return torch.searchsorted(mapped, t) / 200000
    return t


@pytest.mark.parametrize(
    "law",
    [
        UniformTimesteps(),
        LogitNormalTimesteps(kind="logit_normal", mean=0.6, std=0.8),
        SigmoidTimesteps(kind="sigmoid", scale=1.5),
        BetaTimesteps(kind="beta", alpha=3, beta=1),
        ModeTimesteps(kind="mode", scale=0.8),
        CosMapTimesteps(kind="cosmap"),
    ],
    ids=lambda law: law.kind,
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_the_distribution_of_their_law(law: AnyTimesteps, shift: float) -> None:
    count = 3000
    drawn = Timesteps(law).draw(FLOW, shift, [torch_generator(1, "t", one) for one in range(count)])
    grid = torch.linspace(0.02, 0.98, 49)
    before = grid / (shift - (shift - 1) * grid)  # the shift's inverse
    found = (drawn[:, None] <= grid).float().mean(0)
    assert (found - below(law, before)).abs().max() < 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov, 1 %


def test_parts_are_drawn_more_often_and_weigh_more() -> None:
    parts = (
        Emphasis(times=(0.5, 1.0), drawn=3.0),
        Emphasis(times=(0.9, 1.0), drawn=0.5, weight=2.0),
        Emphasis(times=(0.0, 0.2), weight=0.25),
    )
    times = Timesteps(emphasis=parts)
    t = times.draw(FLOW, 1.0, [torch_generator(2, "t", one) for one in range(4000)])
    shares = [
        float(((t >= low) & (t < high)).float().mean()) for low, high in [(0, 0.5), (0.5, 0.9), (0.9, 1.0)]
    ]
    whole = 0.5 * 1 + 0.4 * 3 + 0.1 * 1.5
    assert shares == pytest.approx([0.5 / whole, 1.2 / whole, 0.15 / whole], abs=0.025)
    assert times.weight(torch.tensor([0.1, 0.3, 0.95])).tolist() == [0.25, 1.0, 2.0]

    batch = batch_of(1)
    noise, at = torch.randn(1, 4, 6, 8), torch.tensor([0.95])
    plain = Denoising(FLOW).losses_at(FAMILY, batch, noise, at)
    heavy = Denoising(FLOW, times)
    assert heavy.losses_at(FAMILY, batch, noise, at) == 2 * plain
    assert heavy.comparable().losses_at(FAMILY, batch, noise, at) == plain


@pytest.mark.parametrize(
    ("weighting", "of_the_data"),
    [
        (MinSnr(gamma=5), lambda snr: min(snr, 5)),
        (SoftMinSnr(kind="soft_min_snr", gamma=4), lambda snr: 4 * snr / (4 + snr)),
        (Debiased(kind="debiased"), lambda snr: math.sqrt(snr)),
        (P2(kind="p2", gamma=0.5, snr_offset=2), lambda snr: snr / (2 + snr) ** 0.5),
    ],
    ids=["min_snr", "soft_min_snr", "debiased", "p2"],
)
@pytest.mark.parametrize("schedule", [FLOW, EPSILON, V], ids=["flow", "epsilon", "v"])
def test_weights_are_those_of_the_error_in_the_data(
    schedule: Schedule, weighting: AnyWeighting, of_the_data: Any
) -> None:
    """The weighted error of a wrong prediction is the paper's weight times the error in the data that it makes."""
    draw = torch.Generator().manual_seed(0)
    data, noise, wrong = (torch.randn(8, generator=draw, dtype=torch.float64) for _ in range(3))
    for t in (0.03, 0.4, 0.9):
        if schedule.is_flow:
            signal, sigma = 1 - t, t
        else:
            signal, sigma = math.sqrt(ALPHAS[int(t * 1000)]), math.sqrt(1 - ALPHAS[int(t * 1000)])
        noisy = signal * data + sigma * noise
        target, made = {
            "velocity": (noise - data, noisy - sigma * wrong),
            "epsilon": (noise, (noisy - sigma * wrong) / signal),
            "v": (signal * noise - sigma * data, signal * noisy - sigma * wrong),
        }[schedule.prediction]
        weight = float(weight_at(weighting, schedule, torch.tensor([t])))
        expected = of_the_data((signal / sigma) ** 2) * float((made - data).square().mean())
        assert weight * float((wrong - target).square().mean()) == pytest.approx(expected, rel=1e-4)


def test_published_forms_for_epsilon() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    snr = (ALPHAS / (1 - ALPHAS))[(t * 1000).long()].float()
    torch.testing.assert_close(weight_at(Debiased(kind="debiased"), EPSILON, t), 1 / snr.sqrt())
    torch.testing.assert_close(weight_at(P2(kind="p2"), EPSILON, t), 1 / (1 + snr))


def test_the_bell_is_one_on_average_and_nothing_at_the_ends() -> None:
    t = torch.linspace(0, 1, 10001)
    weight = weight_at(Bell(kind="bell"), FLOW, t)
    assert float(weight.mean()) == pytest.approx(1, abs=1e-3)
    assert weight[[0, -1]].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert float(t[weight.argmax()]) == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("delta", [0.05, 0.5])
def test_distances_are_torch_s_own_and_the_paper_s(delta: float) -> None:
    said, target = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    delta_B = torch.full((2,), delta)
    huber = F.huber_loss(said, target, reduction="none", delta=delta)
    smooth = F.smooth_l1_loss(said, target, reduction="none", beta=delta)
    error = said - target
    pseudo = delta**2 * ((1 + (error / delta) ** 2).sqrt() - 1)  # arXiv 2403.16728, equation 5
    expected: list[tuple[AnyLoss, Tensor]] = [
        (Absolute(kind="mae"), error.abs()),
        (Huber(kind="huber"), 2 * huber),
        (SmoothL1(kind="smooth_l1"), 2 * smooth),
        (PseudoHuber(kind="pseudo_huber"), 2 * pseudo),
        (LogCosh(kind="log_cosh"), 2 * torch.log(torch.cosh(error))),
    ]
    for loss, each in expected:
        torch.testing.assert_close(
            mean_distance(loss, said, target, delta_B), each.flatten(1).mean(1), atol=1e-6, rtol=1e-5
        )
    weight = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(
        mean_distance(Absolute(kind="mae"), said, target, None, weight),
        (error.abs() * weight).flatten(1).mean(1),
    )


def test_where_huber_bends_moves_with_the_time() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    loss = PseudoHuber(kind="pseudo_huber", delta=0.1)
    at = delta_at(loss, EPSILON, t)
    assert at is not None
    assert at.tolist() == pytest.approx([1.0, math.exp(-0.25 * -math.log(0.1)), 0.1])
    at = delta_at(loss.model_copy(update={"decay": "snr"}), EPSILON, t)
    assert at is not None
    sigmas = ((1 - ALPHAS) / ALPHAS).sqrt()[[0, 250, 999]]
    assert at.tolist() == pytest.approx((0.9 / (1 + sigmas) ** 2 + 0.1).tolist(), rel=1e-4)
    assert delta_at(loss.model_copy(update={"decay": "none"}), FLOW, t).tolist() == pytest.approx([0.1] * 3)  # type: ignore[union-attr]
    assert delta_at(Absolute(kind="mae"), FLOW, t) is None


@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 3, 32, 24)], ids=["picture", "clip"])
def test_coarser_noise_lies_on_top(shape: tuple[int, ...]) -> None:
    """Of unit variance as before, neighbours are alike, and so are the means of large blocks far from zero."""
    noise = noise_of(shape, torch_generator(1), multires=Multires(levels=6, discount=0.8))
    plain = noise_of(shape, torch_generator(1))
    assert noise.shape == plain.shape == torch.Size(shape)
    assert float(noise.std()) == pytest.approx(1, abs=1e-5)

    def of_blocks(noise: Tensor) -> float:
        return float(F.avg_pool2d(noise.flatten(0, -3)[None], 8).var())

    assert of_blocks(plain) < 2 / 64
    assert of_blocks(noise) > 0.1
    faint = noise_of(shape, torch_generator(1), multires=Multires(levels=1, discount=1e-3))
    torch.testing.assert_close(faint, plain / plain.std(), atol=1e-2, rtol=0)


def test_a_perturbed_input_is_to_be_cleaned_of_the_plain_noise() -> None:
    """arXiv 2301.11706, algorithm 1: the input is mixed with noise + gamma * xi, the target is noise alone."""
    seen: list[Tensor] = []

    def zero(noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(noisy)
        return torch.zeros_like(noisy)

    batch = batch_of()
    plain_B, t_B = Denoising(EPSILON).losses(FAMILY, batch, 5, zero)
    perturbed_B, again_B = Denoising(EPSILON, input_perturbation=0.1).losses(FAMILY, batch, 5, zero)
    assert torch.equal(plain_B, perturbed_B)  # the target
    assert torch.equal(t_B, again_B)
    sigma_B = (1 - ALPHAS)[(t_B * 1000).round().long()].sqrt().float()
    added = (seen[1] - seen[0]) / (0.1 * sigma_B.view(-1, 1, 1, 1))
    assert float(added.std()) == pytest.approx(1, abs=0.1)
    expected = torch.stack(
        [
            torch.randn((4, 6, 8), generator=torch_generator(5, "perturbation", 7, one))
            for one in batch.sample_ids
        ]
    )
    torch.testing.assert_close(added, expected, atol=1e-3, rtol=1e-3)
