"""The plan against what a real step takes, against measured cards, and against its own laws."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cublas_rules import watched
from torch.profiler import ProfilerActivity, profile

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import AdapterLayer, ModuleChoice, adaptable_modules
from burnish.conditioning import Conditioning
from burnish.config.method import AdapterMethod, Loha, Lokr, Lora, Oft
from burnish.data.batch import Batch
from burnish.errors import UserError
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.memory.activations import ORDER, Mode, activation_modes, set_activations
from burnish.objective import Denoising
from burnish.planner import probe, trace
from burnish.planner.choose import Choice, Limits, choices, preferred, smallest
from burnish.planner.live_bytes import LiveBytes, Work
from burnish.planner.measure import Measure
from burnish.planner.probe import _eight_bit_product, measured_rates
from burnish.planner.profile import BlockCost, Profile, profile_of, step_of
from burnish.planner.rates import Rates, card_called, card_named
from burnish.planner.recipe import Recipe, Shape
from burnish.planner.trace import trace_step

TinyFolder = Callable[[str], Path]
RANK = 4


def adam(groups: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-4, fused=True)  # type: ignore[arg-type]


LORA = Lora()


def everything(family: Family, method: AdapterMethod = LORA) -> dict[str, dict[str, ModuleChoice]]:
    inside = {module for block in family.blocks() for module in block.modules()}
    return {
        part: {
            name: ModuleChoice(RANK, RANK, method=method)
            for name, module in adaptable_modules(denoiser).items()
            if module in inside and isinstance(module, torch.nn.Linear)
        }
        for part, denoiser in family.denoisers.items()
    }


def kept(modes: Mode | float | dict[Mode, int]) -> Callable[[Family], None]:
    def keep(family: Family) -> None:
        blocks = family.blocks()
        set_activations(blocks, activation_modes(modes, len(blocks)))

    return keep


def real_peak(family: Family, shape: Shape, mode: Mode, method: AdapterMethod = LORA) -> int:
    """Bytes that torch's CPU allocator held at most during a step, above those before it."""
    adapters = [
        AdapterSet.attach(family.denoisers[part], chosen, dropout=0.0, seed=0)
        for part, chosen in everything(family, method).items()
    ]
    kept(mode)(family)
    parameters = [
        one for adapter in adapters for group in adapter.parameter_groups(1e-4) for one in group["params"]
    ]
    optimizer = adam([{"params": parameters}])
    noisy, times_B, conditioning = family.example(shape.height, shape.width, shape.batch, shape.frames)
    ids = tuple(str(row) for row in range(shape.batch))
    batch = Batch(noisy, conditioning, torch.ones(shape.batch), ids, ids, 0)
    objective = Denoising(family.schedule)

    def step() -> None:
        loss_B = objective.losses_at(family, batch, torch.randn_like(noisy, dtype=torch.float32), times_B)
        torch.autograd.backward(loss_B.sum())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return allocated(step)


def allocated(step: Callable[[], None]) -> int:
    """Bytes that torch's CPU allocator held at most during a second step, above those before it."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    level = peak = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


@pytest.mark.parametrize("mode", ORDER)
@pytest.mark.parametrize(("name", "tolerance"), [("sd3", 0.01), ("flux", 0.02)])
def test_a_traced_step_takes_what_the_allocator_says(
    tiny_folder: TinyFolder, name: str, tolerance: float, mode: Mode
) -> None:
    kind = family_named(name)
    load = partial(kind.load, ModelSource(str(tiny_folder(name))), dtype=torch.float32, device="cpu")
    shape = Shape(256, 256, batch=4)  # kernels have room of their own, which shrinks beside activations
    real = real_peak(load(frozenset({"denoiser"})), shape, mode)
    known = load(frozenset())
    traced = trace_step(
        lambda: kind.skeleton(of=known, dtype=torch.float32),
        shape,
        Recipe(
            everything(kind.skeleton(of=known)), Denoising(known.schedule), adam, keep_activations=kept(mode)
        ),
        cuda=False,
    )
    assert peak_of(traced) - traced.resident == pytest.approx(real, rel=tolerance)


def optimizer_peak(made: Callable[..., torch.optim.Optimizer], *, cuda: bool = True, **told: bool) -> int:
    kind = family_named("sd3")
    known = kind.skeleton(1, of=kind.released(ModelSource("")))
    recipe = Recipe(
        everything(known), Denoising(known.schedule), lambda groups: made(groups, lr=1e-4, **told)
    )
    return trace_step(lambda: known, Shape(64, 64), recipe, cuda=cuda).optimizer_peak


def test_optimizers_that_are_not_told_how_step_as_torch_has_them_step_on_a_gpu() -> None:
    radam, adafactor = torch.optim.RAdam, torch.optim.Adafactor
    copies = optimizer_peak(radam, foreach=True)
    assert optimizer_peak(radam) == copies > optimizer_peak(radam, foreach=False)
    assert optimizer_peak(radam, cuda=False) < copies
    assert optimizer_peak(adafactor) == optimizer_peak(adafactor, foreach=False)
    assert optimizer_peak(adafactor) < optimizer_peak(adafactor, foreach=True)
    assert optimizer_peak(torch.optim.AdamW, fused=True) < optimizer_peak(torch.optim.AdamW)


KINDS: tuple[AdapterMethod, ...] = (
    Lora(dora=True),
    Loha(kind="loha"),
    Lokr(kind="lokr", factor=4),
    Oft(kind="oft", block_size=8),
)


@pytest.mark.parametrize("method", KINDS, ids=lambda method: type(method).__name__)
def test_a_traced_step_of_every_kind_of_adapter_takes_what_the_allocator_says(
    tiny_folder: TinyFolder, method: AdapterMethod
) -> None:
    kind = family_named("flux")
    load = partial(kind.load, ModelSource(str(tiny_folder("flux"))), dtype=torch.float32, device="cpu")
    shape = Shape(256, 256, batch=4)
    real = real_peak(load(frozenset({"denoiser"})), shape, "keep", method)
    known = load(frozenset())
    choices = everything(kind.skeleton(of=known), method)
    recipe = Recipe(choices, Denoising(known.schedule), adam, keep_activations=kept("keep"))
    traced = trace_step(lambda: kind.skeleton(of=known, dtype=torch.float32), shape, recipe, cuda=False)
    assert peak_of(traced) - traced.resident == pytest.approx(real, rel=0.03)


def peak_of(profile: Profile) -> int:
    return step_of([profile] * len(profile.blocks)).peak


# Peaks of one LoRA step, rank 16 on every linear layer of the blocks, 1024 pixels, batch 1, AdamW, in GiB as
# torch.cuda.max_memory_allocated had them on an H200 (torch 2.11, flash attention, nothing compiled). Captions of
# Z-Image had 256 tokens. Adapters took tokens there as they came, not rows of them, which is 0.08 GiB less of FLUX.
LARGE = "stabilityai/stable-diffusion-3.5-large"
MEASURED = [
    ("flux", None, 1024, "recompute", None, 25.48, 0.005),
    ("flux", None, 1024, "keep-attention", None, 26.99, 0.005),
    ("flux", None, 1024, "keep-matmul", None, 51.77, 0.005),
    ("flux", None, 1024, {"recompute": 28, "keep": 29}, None, 39.16, 0.012),
    ("flux", None, 1024, "keep", None, 53.88, 0.007),
    ("flux", None, 512, "keep", None, 33.54, 0.009),
    ("flux", None, 1024, "recompute", "int8", 14.64, 0.012),
    ("sdxl", None, 1024, "recompute", None, 6.10, 0.028),
    ("sdxl", None, 1024, "keep", None, 11.95, 0.02),
    ("z_image", None, 1024, "recompute", None, 14.60, 0.012),
    ("z_image", None, 1024, "keep", None, 51.21, 0.01),
    ("sd3", LARGE, 1024, "keep", None, 37.71, 0.025),
]


@pytest.fixture(scope="module")
def measures() -> dict[str, Measure]:
    """One per model: what a trace of it teaches serves the next."""
    made = {}
    for name, path in dict.fromkeys((row[0], row[1]) for row in MEASURED):
        kind = family_named(name)
        of = None if path is None else kind.released(ModelSource(path))
        made[name] = Measure(partial(kind.skeleton, of=of), linear_layers_of_blocks)
    return made


def linear_layers_of_blocks(family: Family) -> dict[str, dict[str, ModuleChoice]]:
    ((part, denoiser),) = family.denoisers.items()
    named = adaptable_modules(denoiser).items()
    linear = [(name, module) for name, module in named if isinstance(module, torch.nn.Linear)]
    inside = {module for block in family.blocks() for module in block.modules()}
    return {
        part: {name: ModuleChoice(16, 16) for name, module in linear if module in inside or "_block" in name}
    }


def short_captions(shape: Shape) -> Conditioning:
    tokens = torch.zeros(shape.batch, 256, 2560, dtype=torch.bfloat16)
    mask = torch.ones(shape.batch, 256, dtype=torch.bool)
    return Conditioning({"tokens_BSD": tokens, "mask_BS": mask}).to("meta")  # as a skeleton's own


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "size", "mode", "kept_as", "gib", "tolerance"), MEASURED)
def test_the_plan_foresees_what_a_card_measured(
    measures: dict[str, Measure],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    path: str | None,
    size: int,
    mode: Mode | dict[Mode, int],
    kept_as: str | None,
    gib: float,
    tolerance: float,
) -> None:
    measure = measures[name]
    monkeypatch.setattr(AdapterLayer, "forward", AdapterLayer._adapted)  # the step that was measured

    def profile(uniform: Mode) -> Profile:
        objective = Denoising(measure.skeleton(1).schedule)
        recipe = Recipe({}, objective, adam, kept_as=kept_as, keep_activations=kept(uniform))
        if name == "z_image":
            recipe = replace(recipe, shown=short_captions)
        return measure.profile(Shape(size, size), recipe)

    used = mode if isinstance(mode, dict) else {mode: 1}
    profiles = {one: profile(one) for one in used}
    count = len(next(iter(profiles.values())).blocks)
    modes = activation_modes(mode, count)
    assert step_of([profiles[one] for one in modes]).peak / 2**30 == pytest.approx(gib, rel=tolerance)


def traced(depth: int | None, modes: Mode | float | dict[Mode, int], measure: bool = False) -> Profile:
    kind = family_named("sana")
    recipe = Recipe({}, Denoising(kind.skeleton(1).schedule), adam, keep_activations=kept(modes))
    if measure:
        return Measure(kind.skeleton, everything).profile(Shape(512, 512), recipe)
    family = kind.skeleton(depth)
    return trace_step(lambda: family, Shape(512, 512), replace(recipe, choices=everything(family)))


def test_a_shallow_model_stands_for_the_whole_one() -> None:
    whole, deepened = traced(None, "keep"), traced(None, "keep", measure=True)
    assert deepened.weights == whole.weights
    assert deepened.resident == pytest.approx(whole.resident, rel=1e-3)  # what each tensor is rounded to
    assert peak_of(deepened) == pytest.approx(peak_of(whole), rel=2e-3)
    work = step_of([deepened] * len(deepened.blocks)).work
    assert work.matmul_flop == step_of([whole] * len(whole.blocks)).work.matmul_flop


def test_a_mixture_is_put_together_from_uniform_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LiveBytes] = []  # what was counted, before it is cut into blocks and put together again

    def watched(counted: LiveBytes, *sizes: Any) -> Profile:
        seen.append(counted)
        return profile_of(counted, *sizes)

    monkeypatch.setattr(trace, "profile_of", watched)
    uniform: dict[Mode, Profile] = {mode: traced(6, mode) for mode in ("recompute", "keep-matmul", "keep")}
    mixtures: list[dict[Mode, int]] = [{"recompute": 2, "keep": 4}, {"recompute": 3, "keep-matmul": 3}]
    for mixture in mixtures:
        mixed = traced(6, mixture)
        composed = step_of([uniform[mode] for mode in activation_modes(mixture, 6)])
        assert composed.peak == pytest.approx(seen[-1].peak, rel=2e-3)
        assert composed.work.matmul_flop == step_of([mixed] * 6).work.matmul_flop
        ahead = sum(one.work.matmul_flop for one in seen[-1].stretches if one.name == "forward")
        assert composed.forward.matmul_flop == pytest.approx(ahead, rel=0.02)


def test_profiles_survive_the_disk() -> None:
    profile = traced(2, "recompute")
    assert Profile.from_json(json.loads(json.dumps(profile.as_json()))) == profile


# What is chosen.

SIZES = 20  # blocks


def block(growth: int, work: float) -> BlockCost:
    return BlockCost(growth, growth + 10, -growth, 30, Work(work), Work(2 * work))


def step_in(mode: Mode) -> Profile:
    growth, work = {"recompute": (1, 4e12), "keep": (20, 3e12)}[mode]
    return Profile(
        blocks=(block(growth, work),) * SIZES,
        backward_order=tuple(reversed(range(SIZES))),
        weights=(100,) * SIZES,
        weights_outside=50,
        trained=(0,) * SIZES,
        trained_outside=10,
        resident=2060,
        first_level=2060,
        head_peak=2060,
        tail_change=0,
        tail_peak=0,
        rest_peak=0,
        rest_change=0,
        optimizer_peak=5,
        outside=Work(),
        optimizer=Work(),
    )


PROFILES: dict[str, dict[Mode, Profile]] = {
    "native": {mode: step_in(mode) for mode in ("recompute", "keep")}  # type: ignore[misc]
}
RATES = Rates(1e12, None, None, 1e12, 1e12, from_host=1e12)


def best(budget: int, rates: Rates = RATES, **pins: object) -> Choice:
    limits = Limits(("native",), **pins)  # type: ignore[arg-type]
    return preferred(choices(PROFILES, rates, budget, limits, compiled=False))


def test_with_room_nothing_is_computed_twice() -> None:
    assert best(10_000).settings.kept == {"keep": SIZES}


def test_less_room_recomputes_no_more_than_it_must() -> None:
    tight = best(2300, may_stream=False)
    assert tight.peak <= 2300
    again = tight.settings.kept["recompute"]
    assert 0 < again < SIZES
    fewer = ("recompute",) * (again - 1) + ("keep",) * (SIZES - again + 1)
    assert step_of([PROFILES["native"][mode] for mode in fewer]).peak > 2300  # type: ignore[index]


def test_streaming_is_cheaper_than_computing_twice_where_the_bus_is_fast() -> None:
    streamed = best(1500)
    assert streamed.settings.kept == {"keep": SIZES}
    assert streamed.host > 0
    assert best(1500, stream=0.75).settings.stream == 0.75


def test_a_slow_bus_makes_streaming_slower_than_computing_twice() -> None:
    """400 bytes would have to come twice a step, in 80 s of forward and 40 s more of backward."""
    room = step_of([PROFILES["native"]["recompute"]] * SIZES).peak
    assert best(room).host > 0
    slow = best(room, replace(RATES, from_host=1.0))
    assert (slow.host, slow.settings.kept) == (0, {"recompute": SIZES})
    pinned = best(room, replace(RATES, from_host=1.0), modes=("recompute",) * SIZES, stream=1.0)
    blocks = SIZES * 4  # TFLOP forward; twice that backward
    assert pinned.host == 100 * SIZES
    assert pinned.seconds == pytest.approx(max(blocks, pinned.host) + max(2 * blocks, pinned.host), rel=1e-6)


def test_as_fast_is_chosen_with_less_on_the_host() -> None:
    """A block that is computed again takes 3 of 180 s more: to stream is not worth that."""
    room = step_of([PROFILES["native"]["keep"]] * SIZES).peak - 15
    found = choices(PROFILES, RATES, room, Limits(("native",)), compiled=False)
    assert found[0].host > 0
    assert preferred(found).host == 0
    assert preferred(found).settings.kept == {"recompute": 1, "keep": SIZES - 1}


def test_what_blocks_keep_can_wait_on_the_host() -> None:
    large = {mode: grown(profile, 2**30) for mode, profile in PROFILES["native"].items()}
    least = step_of([large["recompute"]] * SIZES).peak

    def fitting(budget: int, *, offload: bool) -> list[Choice]:
        limits = Limits(("native",), stream=0.0, offload=offload)
        return choices({"native": large}, RATES, budget, limits, compiled=False)

    assert not fitting(least - 2**30, offload=False)
    waiting = preferred(fitting(least - 2**30, offload=True))
    assert waiting.settings.offload
    assert waiting.host == 0
    assert waiting.waiting == sum(large[mode].blocks[0].growth for mode in waiting.settings.modes)


def grown(profile: Profile, times: int) -> Profile:
    blocks = tuple(
        replace(one, growth=one.growth * times, change=one.change * times) for one in profile.blocks
    )
    return replace(profile, blocks=blocks)


def test_the_host_takes_no_more_than_it_has() -> None:
    streamed = best(1500, may_stream=True)
    assert streamed.host > 800
    assert not choices(PROFILES, RATES, 1500, Limits(("native",), host=800), compiled=False)


def test_one_memory_for_both_is_never_streamed() -> None:
    rates = replace(RATES, unified=True)
    assert not choices(PROFILES, rates, 1500, Limits(("native",)), compiled=False)
    assert smallest(PROFILES, rates, Limits(("native",)), compiled=False).host == 0


def test_what_is_pinned_stays() -> None:
    pinned = best(10_000, modes=("recompute",) * SIZES, stream=0.0)
    assert pinned.settings.kept == {"recompute": SIZES}
    assert not pinned.host


def test_cards_are_known_by_what_people_call_them() -> None:
    assert card_named("RTX 4090") is card_named("4090")
    assert card_named("24GiB").gib == 24
    assert card_called("NVIDIA GeForce RTX 4070 Ti SUPER") is card_named("4070tisuper")
    assert card_called("Some other card") is None
    with pytest.raises(UserError, match="no card is called 'gtx'"):
        card_named("gtx")


def test_rates_are_measured_once(tmp_path: Path) -> None:
    rates = measured_rates(torch.device("cpu"), tmp_path, side=128)
    assert min(rates.matmul, rates.attention, rates.from_host) > 0
    assert rates.fp8 is None
    assert measured_rates(torch.device("cpu"), tmp_path, side=128) == rates


def test_rates_of_another_planner_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have kept other rates than this one reads."""
    measured_rates(torch.device("cpu"), tmp_path, side=128)
    (kept,) = tmp_path.iterdir()
    kept.write_text('{"of_old": 1.0}')
    monkeypatch.setattr(probe, "PLANNER_VERSION", 0)
    assert measured_rates(torch.device("cpu"), tmp_path, side=128).matmul > 0


@pytest.mark.parametrize("kept_as", ["int8", "fp8"])
def test_the_products_that_are_timed_are_those_a_gpu_makes(
    kept_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = watched(monkeypatch)
    # 30 times a number is to fit into 8 bits.
    a, b = (torch.randn(64, 64, dtype=torch.bfloat16).clamp(-4, 4) for _ in range(2))
    found = _eight_bit_product(kept_as, a, b)()
    assert len(made) == 1
    expected = a.float() @ b.float() * (900 if kept_as == "int8" else 1)
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
