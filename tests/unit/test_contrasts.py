"""Sliders and preferences: losses against their formulas, strengths and noise of each pass, pairs found in folders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from burnish.adapters.attached import AdapterSet, all_at
from burnish.adapters.layer import ModuleChoice
from burnish.conditioning import Conditioning
from burnish.config.contrasts import Preference as PreferenceSection
from burnish.config.data import Folder, Generated
from burnish.config.load import load_config
from burnish.config.method import Lora
from burnish.config.objective import MinSnr
from burnish.config.suggest import called_elsewhere
from burnish.data.batch import Batch, Direction, Opposites, Preference
from burnish.data.cache import CacheKeys, RamCache
from burnish.data.loader import batches
from burnish.data.pictures import content_hash
from burnish.data.plan import BatchPlan
from burnish.data.preflight import PreparedData, prepare_samples
from burnish.data.prepare import LATENTS
from burnish.diffusion.weights import weight_at
from burnish.errors import ConfigError, DataError
from burnish.family import Capabilities
from burnish.latent_shape import LatentShape, PictureInfo
from burnish.noise_schedule import Schedule
from burnish.objective import Denoising

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
SCHEDULES = {
    "flow": Schedule("velocity", {}),
    "epsilon": Schedule("epsilon", {}, ALPHAS),
    "v": Schedule("v", {}, ALPHAS),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


class Said:
    """A family that says something of its own for each strength and prompt, and notes what it was asked."""

    capabilities, latents, audio = Capabilities(guidance_embedding=True), LatentShape(4, 8, 2), None

    def __init__(self) -> None:
        self.strength, self.asked = 1.0, list[tuple[float, list[float], Tensor, bool]]()

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        before, self.strength = self.strength, strength
        yield
        self.strength = before

    def predict(self, noisy: Tensor, t_B: Tensor, told: Conditioning) -> Tensor:
        assert told["guidance_B"].tolist() == [1.0] * len(noisy)
        self.asked.append((self.strength, told["word"].tolist(), noisy, torch.is_grad_enabled()))
        return self.says(noisy, told["word"], self.strength)

    @staticmethod
    def says(noisy: Tensor, word_B: Tensor, strength: float) -> Tensor:
        return torch.sin(noisy * word_B.view(-1, 1, 1, 1)) * (1 + 0.3 * strength)


def told(*words: float) -> Conditioning:
    return Conditioning({"word": torch.tensor(words)})


def batch_of(words: Sequence[float], names: Sequence[str], contrast: Any = None) -> Batch:
    latents = torch.randn(len(words), 4, 6, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.arange(1.0, len(words) + 1)
    return Batch(latents, told(*words), weight, tuple(names), tuple(names), 7, contrast=contrast)


def mixed(schedule: Schedule, data: Tensor, noise: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and target, written down once more."""
    t = t_B.view(-1, 1, 1, 1)
    if schedule.is_flow:
        return (1 - t) * data + t * noise, noise - data
    alpha = ALPHAS[(t * 1000).round().long()].float()
    noisy = alpha.sqrt() * data + (1 - alpha).sqrt() * noise
    return noisy, noise if schedule.prediction == "epsilon" else alpha.sqrt() * noise - (
        1 - alpha
    ).sqrt() * data


def mean(error: Tensor) -> Tensor:
    return error.square().mean((1, 2, 3))


@every_schedule
def test_a_slider_learns_the_published_target_both_ways(schedule: Schedule) -> None:
    family: Any = Said()
    batch = batch_of(
        [0.5, 0.7], "ab", Direction(told(1.1, 1.2), told(0.2, 0.4), guidance_B=torch.tensor([2.0, 3.0]))
    )
    objective = Denoising(schedule, strength=family.at, weighting=MinSnr())
    noise, t_B = objective.draw_noise(batch, 3), torch.tensor([0.25, 0.75])
    up, down = objective.turns_at(family, batch, noise, t_B)

    noisy, _ = mixed(schedule, batch.latents_BCHW, noise, t_B)
    eta = torch.tensor([2.0, 3.0]).view(-1, 1, 1, 1)
    untrained = {
        name: family.says(noisy, torch.tensor(words), 0.0)
        for name, words in {"t": [0.5, 0.7], "+": [1.1, 1.2], "-": [0.2, 0.4]}.items()
    }
    for turn, sign in ((up, 1.0), (down, -1.0)):
        target = untrained["t"] + sign * eta * (untrained["+"] - untrained["-"])
        said = family.says(noisy, torch.tensor([0.5, 0.7]), sign)
        wanted = mean(said - target) * weight_at(MinSnr(), schedule, t_B)
        torch.testing.assert_close(turn.loss_B, wanted)
        assert turn.weight_B.tolist() == [0.5, 1.0]  # half of the sources', as there are two
    assert [(strength, grad) for strength, _, _, grad in family.asked] == [
        *[(0.0, False)] * 3,
        (1.0, True),
        (-1.0, True),
    ]
    assert family.strength == 1.0


@every_schedule
def test_both_ends_of_a_slider_see_the_same_noise_and_time(schedule: Schedule) -> None:
    family: Any = Said()
    batch = batch_of([0.5, 0.7, 0.5, 0.7], "abab", Opposites())
    first, second = Denoising(schedule, strength=family.at).turns(family, batch, seed=3)
    noise = Denoising(schedule).draw_noise(batch, 3)
    assert torch.equal(noise[:2], noise[2:])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(first.t_B, second.t_B)
    for turn, rows, strength in ((first, slice(0, 2), 1.0), (second, slice(2, 4), -1.0)):
        noisy, target = mixed(schedule, batch.latents_BCHW[rows], noise[rows], turn.t_B)
        torch.testing.assert_close(
            turn.loss_B, mean(family.says(noisy, torch.tensor([0.5, 0.7]), strength) - target)
        )
    assert [asked[0] for asked in family.asked] == [1.0, -1.0]
    assert second.weight_B.tolist() == [3.0, 4.0]


@every_schedule
@pytest.mark.parametrize("decays", [0.0, 1.0])
def test_a_preference_costs_what_was_published(schedule: Schedule, decays: float) -> None:
    family: Any = Said()
    contrast = Preference(torch.tensor([900.0, 40.0]), torch.full((2,), decays))
    batch = batch_of([0.5, 0.7, 0.5, 0.7], "abab", contrast)
    objective = Denoising(schedule, strength=family.at)
    (turn,) = objective.turns(family, batch, seed=3)
    noise, t_B = objective.draw_noise(batch, 3), turn.t_B
    assert torch.equal(noise[:2], noise[2:])
    assert torch.equal(t_B[:2], t_B[2:])

    noisy, target = mixed(schedule, batch.latents_BCHW, noise, t_B)
    trained = mean(family.says(noisy, told(0.5, 0.7, 0.5, 0.7)["word"], 1.0) - target).tolist()
    before = mean(family.says(noisy, told(0.5, 0.7, 0.5, 0.7)["word"], 0.0) - target).tolist()
    for pair, beta in enumerate([900.0, 40.0]):
        won, lost = trained[pair] - before[pair], trained[pair + 2] - before[pair + 2]
        at_time = beta * (1 - float(t_B[pair])) ** 2 if decays else beta
        inside = -at_time / 2 * (won - lost)
        cost = math.log1p(math.exp(-inside)) if inside > -30 else -inside
        assert float(turn.loss_B[pair]) == pytest.approx(cost, rel=1e-3, abs=1e-5)
        assert turn.loss_B[pair] == turn.loss_B[pair + 2]
        assert turn.told_apart_B is not None
        assert float(turn.told_apart_B[pair]) == float(inside > 0)
    assert [(asked[0], asked[3]) for asked in family.asked] == [(0.0, False), (1.0, True)]


def test_where_nothing_is_learned_a_preference_costs_ln_two_and_tells_nothing_apart() -> None:
    family: Any = Said()
    batch = batch_of([0.5, 0.5], "aa", Preference(torch.tensor([2000.0]), torch.zeros(1)))
    objective = Denoising(SCHEDULES["flow"], strength=lambda strength: family.at(1.0))
    (turn,) = objective.turns(family, batch, seed=3)
    assert turn.loss_B.tolist() == pytest.approx([math.log(2)] * 2)
    assert turn.told_apart_B is not None
    assert turn.told_apart_B.tolist() == [0.5]


@every_schedule
def test_a_guided_target_is_guidance_of_the_plain_one(schedule: Schedule) -> None:
    family: Any = Said()
    batch = replace(batch_of([0.5, 0.7], "ab"), unprompted=told(0.1, 0.1))
    objective = Denoising(schedule, guided_target=3.5)
    noise, t_B = objective.draw_noise(batch, 3), torch.tensor([0.25, 0.75])
    noisy, target = mixed(schedule, batch.latents_BCHW, noise, t_B)
    said = family.says(noisy, torch.tensor([0.5, 0.7]), 1.0)
    without = family.says(noisy, torch.tensor([0.1, 0.1]), 1.0)
    wanted = mean(said - (without + 3.5 * (target - without)))
    torch.testing.assert_close(objective.losses_at(family, batch, noise, t_B), wanted)
    assert [grad for _, _, _, grad in family.asked] == [False, True]
    torch.testing.assert_close(
        objective.comparable().losses_at(family, batch, noise, t_B), mean(said - target)
    )


def test_gradients_of_both_ends_are_those_of_their_strengths_where_blocks_compute_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    choices = {name: ModuleChoice(2, 2.0, method=Lora(kind="lora")) for name in ("0", "2")}
    adapter = AdapterSet.attach(model, choices, seed=1)
    for parameter in adapter.named_parameters().values():
        nn.init.normal_(parameter, std=0.3)

    def gradients(again: bool) -> list[Tensor]:
        def predict(noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
            return checkpoint(model, noisy, use_reentrant=False) if again else model(noisy)

        family: Any = SimpleNamespace(
            capabilities=Capabilities(), latents=LatentShape(4, 8, 2), audio=None, predict=predict
        )
        objective = Denoising(SCHEDULES["flow"], strength=lambda strength: all_at([adapter], strength))
        parameters = list(adapter.named_parameters().values())
        for parameter in parameters:
            parameter.grad = None
        for turn in objective.turns(family, batch_of([1, 1], "aa", Opposites()), seed=3):
            turn.loss_B.sum().backward()
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    kept, again = gradients(False), gradients(True)
    assert len(kept) == 4
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other)
    assert adapter.multiplier == 1.0


def test_a_set_at_a_strength_is_that_many_times_its_effect_and_at_none_is_off() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = AdapterSet.attach(model, {"0": ModuleChoice(2, 2.0)}, seed=1)
    for parameter in adapter.named_parameters().values():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    with torch.no_grad():
        full = model(x)
        with adapter.at(0.0):
            off = model(x)
            assert adapter.multiplier == 1.0
        with adapter.at(-2.0):
            torch.testing.assert_close(model(x) - off, -2 * (full - off))
        assert torch.equal(model(x), full)


def picture(path: Path, shade: int, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((*size, 3), shade, np.uint8)
    values[::8] = 255 - shade
    Image.fromarray(values).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for name, shade in (("a", 10), ("b", 60)):
        picture(tmp_path / "good" / f"{name}.png", shade)
        picture(tmp_path / "bad" / f"{name}.png", shade + 100)
        (tmp_path / "good" / f"{name}.txt").write_text(f"picture {name}")
    return tmp_path


def prepared(folder: Path, **source: Any) -> PreparedData:
    values = {"path": folder, "resolutions": [64], "bucket_step": 8, "max_skip_fraction": 1, **source}
    return prepare_samples([Folder.model_validate(values)], pixel_multiple=8, trigger="sks")


def loaded(samples: Sequence[Any], batch_size: int = 2) -> tuple[Batch, BatchPlan]:
    """The first batch, of a cache in which latents are told by their key and captions by their words."""
    cache, keys = RamCache(), CacheKeys("vae", "text", torch.float32)
    for sample in [picture for one in samples for picture in one.pictures]:
        for flip in (False, True):
            number = sum(keys.latents(sample, flip=flip).encode())
            cache.put("latents", keys.latents(sample, flip=flip), {LATENTS: torch.full((4, 8, 8), number)})
        for text in sample.captions(42):
            cache.put("captions", keys.caption(text), {"tokens": torch.tensor([list(text.encode())])})
    plan = BatchPlan(samples, batch_size, 42)
    family: Any = SimpleNamespace(describe_pictures=lambda pictures: described(pictures))
    return next(batches(plan, cache, keys, family)), plan


def described(pictures: Sequence[PictureInfo]) -> Conditioning:
    return Conditioning({"size": torch.tensor([one.target for one in pictures])})


@pytest.mark.parametrize("kind", ["preference", "opposites"])
def test_a_pair_is_one_batch_of_the_same_names_captions_and_mirroring(pairs: Path, kind: str) -> None:
    picture(pairs / "bad" / "b.png", 200, (80, 96))  # of another size: cut to the first's
    section: dict[str, Any] = {"preference": {"rejected": pairs / "bad", "beta": 30, "decay": "squared"}}
    if kind == "opposites":
        section = {"slider": {"kind": "pictures", "opposite": pairs / "bad"}}
    samples = prepared(pairs / "good", flip=True, **section).samples
    batch, plan = loaded(samples)
    assert batch.sample_ids[:2] == batch.sample_ids[2:]
    assert [Path(path).parent.name for path in batch.paths] == ["good", "good", "bad", "bad"]
    assert [Path(path).stem for path in batch.paths[:2]] == [Path(path).stem for path in batch.paths[2:]]
    assert torch.equal(batch.conditioning["tokens"][:2], batch.conditioning["tokens"][2:])
    keys = CacheKeys("vae", "text", torch.float32)
    for row, draw in enumerate(plan.draws(0)):
        for at, one in zip((row, row + 2), draw.sample.pictures, strict=True):
            number = sum(keys.latents(one, flip=draw.flip).encode())
            assert float(batch.latents_BCHW[at, 0, 0, 0]) == number
    if kind == "opposites":
        assert batch.contrast == Opposites()
    else:
        assert isinstance(batch.contrast, Preference)
        assert batch.contrast.beta_B.tolist() == [30, 30]
        assert batch.contrast.decays_B.tolist() == [1, 1]
    opposed = samples[0].opposed
    assert opposed is not None
    assert opposed.sample.sha256 == content_hash((pairs / "bad" / "a.png").read_bytes())
    changed = [replace(samples[0], opposed=replace(opposed, beta=31.0)), *samples[1:]]
    assert BatchPlan(changed, 2, 42).fingerprint != plan.fingerprint


def test_a_picture_without_its_other_or_twice_the_same_is_skipped_with_the_reason(pairs: Path) -> None:
    (pairs / "bad" / "a.png").unlink()
    found = prepared(pairs / "good", preference={"rejected": pairs / "bad"})
    assert [sample.path.name for sample in found.samples] == ["b.png"]
    (skipped,) = found.report.skipped
    assert skipped.file == "a.png"
    assert "no other picture of the pair in" in skipped.reason
    picture(pairs / "bad" / "a.png", 10)
    (skipped,) = prepared(pairs / "good", preference={"rejected": pairs / "bad"}).report.skipped
    assert "the same picture as" in skipped.reason
    with pytest.raises(DataError, match="no folder that can be read"):
        prepared(pairs / "good", preference={"rejected": pairs / "worse"})


def test_a_slider_from_prompts_reads_no_captions_and_draws_what_it_preserves(pairs: Path) -> None:
    slider = {"target": "thing", "positive": "big", "negative": "small", "preserve": ["red", "blue"]}
    (pairs / "good" / "a.txt").unlink()
    samples = prepared(pairs / "good", repeats=8, slider={**slider, "guidance": 4}).samples
    assert len(samples) == 2
    assert samples[0].captions(42) == ("thing", "big, red", "small, red", "big, blue", "small, blue")
    batch, plan = loaded(samples, 16)
    assert isinstance(batch.contrast, Direction)
    drawn = [draw.prompts for draw in plan.draws(0)]
    assert {one[0] for one in drawn if one is not None} == {"big, red", "big, blue"}
    for row, prompts in enumerate(drawn):
        assert prompts is not None
        assert prompts[0].removeprefix("big") == prompts[1].removeprefix("small")
        for side, text in zip((batch.contrast.positive, batch.contrast.negative), prompts, strict=True):
            assert bytes(side["tokens"][row].tolist()).decode().rstrip("\0") == text
    assert batch.contrast.guidance_B.tolist() == [4.0] * 16
    assert torch.equal(batch.contrast.positive["size"], batch.conditioning["size"])
    assert plan.draws(1) == BatchPlan(samples, 16, 42).draws(1) != plan.draws(0)


def test_batches_of_one_kind_do_not_mix(pairs: Path) -> None:
    plain = prepared(pairs / "good").samples
    preferred = prepared(pairs / "good", preference={"rejected": pairs / "bad"}).samples
    plan = BatchPlan([*plain, *(replace(one, picture_id=f"1/{one.picture_id}") for one in preferred)], 4, 42)
    assert [len({draw.sample.teaches for draw in plan.draws(at)}) for at in range(2)] == [1, 1]
    assert {draw.sample.teaches for draw in plan.draws(plan.largest())} == {"preference"}


def test_drawn_pictures_of_a_slider_are_taught_and_are_of_its_own_prompts() -> None:
    slider = {"target": "a cat", "positive": "a fat cat", "negative": "a thin cat"}
    source = Generated.model_validate({"kind": "generated", "slider": slider})
    assert source.role == "train"
    assert source.prompts == ["a cat", "a fat cat", "a thin cat"]
    told = Generated.model_validate({"kind": "generated", "slider": slider, "prompts": ["two cats"]})
    assert told.prompts == ["two cats"]
    with pytest.raises(ValidationError, match="prompts must say what to draw"):
        Generated.model_validate({"kind": "generated"})
    assert PreferenceSection(rejected=Path("x")).decay == "none"


def test_the_empty_caption_comes_with_batches_that_ask_for_it(pairs: Path) -> None:
    plain = prepared(pairs / "good").samples
    asked, _ = loaded([replace(sample, unprompted=True) for sample in plain])
    assert asked.unprompted is not None
    assert asked.unprompted["tokens"].shape == (2, 0)
    assert torch.equal(asked.unprompted["size"], asked.conditioning["size"])
    assert loaded(plain)[0].unprompted is None


SLIDER = "slider: {target: a, positive: b, negative: c}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"data: [{{path: p, {SLIDER}}}]\nmethod: {{kind: full}}", "train an adapter"),
        ("data: [{path: p, preference: {rejected: r}}]\nmethod: {kind: full}", "train an adapter"),
        (
            "data: [{path: p}]\nmethod: {kind: full}\nsample: {prompts: [{prompt: a, strength: -1}]}",
            "sample.prompts.0.strength",
        ),
        (f"data: [{{path: p, {SLIDER}}}]\nmethod: {{kind: oft}}", "train lora, loha or lokr"),
        (f"data: [{{path: p, {SLIDER}}}]\nmethod: {{dora: true}}", "otherwise for dora"),
        (f"data: [{{path: p, {SLIDER}}}]\nmemory: {{gradient_release: true}}", "two directions in one step"),
        (f"data: [{{path: p, {SLIDER}, captions: {{default: x}}}}]", "its target is the caption"),
        (f"data: [{{path: p, {SLIDER}, preference: {{rejected: r}}}}]", "slider and preference do not go together"),
        ("data: [{path: p, preference: {rejected: r}, loss_masks: {kind: alpha}}]", "a source of its own"),
        (f"data: [{{path: p, {SLIDER}, target: model}}]", "target: picture"),
        ("data: [{kind: generated, role: regularization, " + SLIDER + "}]", "role: train"),
        ("data: [{path: p, preference: {rejected: r}}]\nmethod: {kind: vae}", "data.0.preference"),
        ("data: [{path: p, preference: {loser: r}}]", "did you mean rejected"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "run.yaml").write_text(f"name: a\nmodel: {{path: demo}}\n{text}\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml")
    assert says in str(error.value)


def test_names_of_other_trainers_are_understood() -> None:
    assert [called_elsewhere(one) for one in ("positive_prompt", "guidance_strength", "beta_dpo")] == [
        "positive",
        "guidance",
        "beta",
    ]


def test_folders_of_pairs_are_found_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.yaml").write_text(
        "name: a\nmodel: {path: demo}\ndata: [{path: p, slider: {kind: pictures, opposite: o}}]\n"
    )
    (source,) = load_config(tmp_path / "c" / "run.yaml").config.data
    assert isinstance(source, Folder)
    assert source.other_side == tmp_path / "c" / "o"
