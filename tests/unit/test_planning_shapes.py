"""What the plan counts of a config: sizes, references and holes, sound, and releases that are not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from burnish.config.schema import RunConfig
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.planner.known_values import is_asked_of_unknown, with_places
from burnish.planner.lesson import Lesson
from burnish.planner.live_bytes import LiveBytes, Work
from burnish.planner.lowering import cuda_lowering
from burnish.planner.phases import caption_phase
from burnish.planner.profile import BlockCost, Profile, offloaded, step_of
from burnish.planner.recipe import Shape
from burnish.planner.references import shown
from burnish.planner.trace import sound_of
from burnish.planning_shapes import drawn_shape, numbers_in, shapes_of


def config(family: str, **sections: Any) -> RunConfig:
    given = {"name": "x", "model": {"path": "owner/name", "family": family}, "data": [{"path": "pictures"}]}
    return RunConfig.model_validate({**given, "method": {"kind": "lora"}, "train": {"steps": 10}, **sections})


def released(family: str, path: str = "owner/name", **asked: Any) -> Family:
    return family_named(family).released(ModelSource(path, **asked))


def test_the_largest_bucket_of_each_resolution_counts_most_tokens_first() -> None:
    data = [{"path": "pictures", "resolutions": [512, 1024]}]
    found = shapes_of(config("flux", data=data), released("flux"))
    assert [one.height * one.width for one in found] == [1024 * 1024, 512 * 512]
    assert {(one.references, one.masked) for one in found} == {(0, False)}


@pytest.mark.parametrize(
    ("family", "path", "source", "counted"),
    [
        ("flux", "owner/FLUX.1-Kontext-dev", {"references": ["before"]}, (1, False)),
        ("flux2", "owner/name", {"references": ["one", "two"]}, (2, False)),
        ("flex2", "owner/name", {"references": ["lines"]}, (1, False)),
        ("flex2", "owner/name", {"references": ["lines"], "masks": "holes"}, (2, True)),
        ("wan21", "owner/name", {"frames": [33]}, (1, False)),
        ("wan21", "Wan-AI/Wan2.1-T2V-14B-Diffusers", {"frames": [33]}, (0, False)),
        ("wan21", "owner/name", {"frames": [1]}, (0, False)),
    ],
)
def test_references_that_are_named_and_those_that_a_sample_is_itself(
    family: str, path: str, source: dict[str, Any], counted: tuple[int, bool]
) -> None:
    (shape,) = shapes_of(
        config(family, data=[{"path": "clips", "resolutions": [512], **source}]), released(family, path)
    )
    assert (shape.references, shape.masked) == counted


def test_each_source_is_counted_with_what_it_teaches() -> None:
    slider = {"target": "a", "positive": "b", "negative": "c"}
    data = [
        {"path": "pictures", "resolutions": [1024]},
        {"path": "wanted", "resolutions": [1024], "preference": {"rejected": "r"}},
        {"kind": "generated", "resolutions": [512], "slider": slider},
        {"path": "ends", "resolutions": [512], "slider": {"kind": "pictures", "opposite": "o"}},
    ]
    wanted = config("flux", data=data, train={"steps": 10, "batch_size": 3})
    found = [(one.width, one.batch, one.lesson) for one in shapes_of(wanted, released("flux"))]
    assert found == [
        (1024, 6, Lesson("preference")),  # both pictures of a pair at once
        (1024, 3, Lesson()),
        (512, 3, Lesson("opposites")),
        (512, 3, Lesson("direction")),
    ]


@pytest.mark.parametrize(
    ("source", "counted"),
    [
        ({"target": "model"}, Lesson(counted=True, kept=True)),
        ({"preserve": {"word": "dog"}}, Lesson(counted=True, kept=True)),
        ({"loss_masks": {"path": "masks"}}, Lesson(counted=True)),
        ({"loss_masks": {"path": "masks", "prior": 0.5}}, Lesson(counted=True, kept=True)),
    ],
)
def test_what_asks_the_model_as_it_was_is_counted(source: dict[str, Any], counted: Lesson) -> None:
    guided = {"steps": 10, "objective": {"guided_target": 3.5}}
    for train, expected in (({"steps": 10}, counted), (guided, replace(counted, unprompted=True))):
        told = config("flux", data=[{"path": "pictures", **source}], train=train)
        assert [one.lesson for one in shapes_of(told, released("flux"))] == [expected]


def test_samples_count_the_references_of_their_prompts() -> None:
    prompts = ["a cat", {"prompt": "make it red", "references": ["a.png"]}]
    shape = drawn_shape(config("flux", sample={"prompts": prompts, "size": [500, 770]}), released("flux"))
    assert shape == Shape(496, 768, references=1)
    assert drawn_shape(config("flux"), released("flux")) is None


def test_generated_pictures_count_as_drawn() -> None:
    own = {"path": "pictures"}
    drawn = {
        "kind": "generated",
        "prompts": ["a dog"],
        "count": 8,
        "resolutions": [512, 1000],
        "batch_size": 2,
    }
    found = drawn_shape(config("flux", data=[own, {**drawn, "role": "regularization"}]), released("flux"))
    assert found == Shape(992, 992, batch=2)
    larger = config(
        "flux", data=[own, {**drawn, "batch_size": 1}], sample={"prompts": ["a cat"], "size": 2048}
    )
    assert drawn_shape(larger, released("flux")) == Shape(2048, 2048)


def test_the_numbers_of_a_file_are_known_from_its_header(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(())}, tmp_path / "some.safetensors")
    assert numbers_in(tmp_path / "some.safetensors") == 16


def parameters(family: Family) -> float:
    return sum(one.numel() for part in family.denoisers.values() for one in part.parameters()) / 1e9


@pytest.mark.parametrize(
    ("family", "path", "billions"),
    [
        ("wan21", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1.42),
        ("wan21", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.29),
        ("flux2", "black-forest-labs/FLUX.2-klein-base-4B", 3.88),
        ("flux2", "black-forest-labs/FLUX.2-dev", 32.2),
    ],
)
def test_a_release_that_is_not_here_has_the_size_that_its_id_tells(
    family: str, path: str, billions: float
) -> None:
    kind = family_named(family)
    assert parameters(kind.skeleton(of=kind.released(ModelSource(path)))) == pytest.approx(billions, rel=0.01)


def test_klein_has_the_text_encoder_of_klein() -> None:
    kind = family_named("flux2")
    of = kind.released(ModelSource("black-forest-labs/FLUX.2-klein-base-4B"))
    encoders = kind.skeleton(of=of, parts=frozenset({"text_encoders"})).loaded
    assert [type(one).__name__ for one in encoders.values()] == ["Qwen3Model"]


def test_sound_and_single_denoisers_are_there_where_they_are_asked_for() -> None:
    ltx2 = family_named("ltx2")
    loud = ltx2.skeleton(1, of=released("ltx2", audio=True))
    assert sound_of(loud, Shape(512, 512, 49)) == (8, 51, 16)
    assert sound_of(loud, Shape(512, 512)) is None
    assert "tokens_audio_BSD" in loud.example(256, 256, 1, 9)[2]
    assert sound_of(ltx2.skeleton(1, of=released("ltx2")), Shape(512, 512, 49)) is None
    ideogram = family_named("ideogram4")
    alone = ideogram.skeleton(1, of=released("ideogram4", denoisers=("transformer",)))
    assert set(alone.denoisers) == {"transformer"}


@pytest.mark.parametrize(
    ("family", "path", "name", "tokens"),
    [
        ("flux", "owner/FLUX.1-Kontext-dev", "tokens_reference_BND", 256),
        ("qwen_image_edit", "owner/name", "tokens_reference_BND", None),
        ("flux2", "owner/name", "tokens_reference_BND", 256),
        ("qwen_image21", "owner/name", "tokens_reference_BNC", 4096),
        ("wan21", "owner/name", "clip_BSD", 257),  # as CLIP sees the first frame, on the host
    ],
)
def test_references_are_as_many_tokens_as_the_family_makes_of_them(
    family: str, path: str, name: str, tokens: int | None
) -> None:
    kind = family_named(family)
    seeing = kind.skeleton(of=kind.released(ModelSource(path)), parts=frozenset({"vae"}))
    one = shown(seeing, Shape(256, 256, batch=2, references=1))
    assert one[name].is_meta
    assert one[name].shape[0] == 2
    if tokens is not None:
        assert one[name].shape[1] == tokens
    assert all(value.is_meta for value in one.values() if value.is_floating_point())


def test_a_mask_that_is_known_picks_as_many_of_what_is_not() -> None:
    mask = torch.tensor([True, False, True])
    with FakeTensorMode(allow_non_fake_inputs=True):
        unknown = torch.empty(3, 4)
    with LiveBytes():
        assert unknown[mask].shape == (2, 4)
        assert not torch.all(unknown == 0)
    assert with_places(torch.ops.aten.add.Tensor, (unknown, mask)) == (unknown, mask)
    assert not is_asked_of_unknown(torch.ops.aten._local_scalar_dense.default, (mask[0],))


def test_masks_and_draws_of_millions_are_counted_without_being_made() -> None:
    frames = torch.arange(4).repeat_interleave(512)
    counted = LiveBytes(FakeTensorMode(allow_non_fake_inputs=True), rounding=1)
    with counted:
        earlier = frames[None, :] <= frames[:, None]
        mask = torch.where(earlier, 0.0, float("-inf"))
        drawn = torch.randint(9, (1024, 1024), generator=torch.Generator())
        assert not isinstance(frames[None, :] + 1, FakeTensor)
    assert all(isinstance(one, FakeTensor) for one in (mask, drawn))
    assert (mask.shape, drawn.shape) == ((2048, 2048), (1024, 1024))
    assert counted.peak >= 2048 * 2048 * 5 + 1024 * 1024 * 8


@pytest.mark.parametrize("width", [64, 512])
def test_attention_of_one_sample_or_of_wide_heads_is_lowered_too(width: int) -> None:
    with FakeTensorMode():
        query = torch.empty(2, 16, width, dtype=torch.bfloat16)
    with cuda_lowering():
        assert torch.nn.functional.scaled_dot_product_attention(query, query, query).shape == query.shape


def test_no_file_of_the_repository_is_needed_for_a_plan_of_what_is_not_here(tmp_path: Path) -> None:
    from burnish.planner.rates import card_named
    from burnish.planning import plan_run

    run = config(
        "wan21",
        model={"path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "family": "wan21", "offline": True},
        data=[{"path": "pictures", "resolutions": [256], "frames": [5]}],
        memory={"cache_folder": tmp_path, "weights": "native", "activations": "recompute"},
    )
    plan = plan_run(run, card_named("24GiB"))
    assert any("1.4 billion" in note for note in plan.notes)
    assert plan.peak == max(row.bytes for row in plan.rows) <= plan.budget


def test_a_second_plan_traces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish import planning
    from burnish.planner.rates import card_named

    run = config(
        "sd15",
        model={"path": "owner/name", "family": "sd15", "offline": True},
        data=[{"path": "pictures", "resolutions": [64]}],
        sample={"prompts": ["a cat"], "size": 64},
        memory={"cache_folder": tmp_path, "weights": "native", "activations": "recompute"},
    )
    first = planning.plan_run(run, card_named("24GiB"))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("traced again")

    for name in ("encoding_phase", "decoding_phase", "drawing_phase"):
        monkeypatch.setattr(planning, name, never)
    monkeypatch.setattr("burnish.planner.measure.trace_step", never)
    assert planning.plan_run(run, card_named("24GiB")) == first
    assert [row.what for row in first.rows][-1] == "samples"


def test_text_encoders_that_end_in_a_wide_projection_take_their_weights_and_little_more() -> None:
    kind = family_named("ltx2")
    phases = {
        kept_as: caption_phase(kind.skeleton(parts=frozenset({"text_encoders"})), kept_as, 1024)
        for kept_as in (None, "int8")
    }
    # Gemma 3 12B's released files hold 24.4 GB, of which its eyes are 0.9.
    assert 22 < phases[None].weights / 2**30 < 26
    assert phases["int8"].weights < 0.6 * phases[None].weights
    for phase in phases.values():
        assert phase.peak - phase.weights < 3 * 2**30


def test_what_waits_on_the_host_does_not_pile_up() -> None:
    gib = 2**30
    block = BlockCost(4 * gib, 5 * gib, -4 * gib, 3 * gib, Work(), Work())
    fixed = {"weights": (0,) * 10, "trained": (0,) * 10, "weights_outside": 0, "trained_outside": 0}
    levels = dict.fromkeys(("tail_change", "rest_peak", "rest_change", "optimizer_peak"), 0)
    step = Profile(
        blocks=(block,) * 10,
        backward_order=tuple(reversed(range(10))),
        resident=gib,
        first_level=gib,
        head_peak=gib,
        tail_peak=2 * gib,
        outside=Work(),
        optimizer=Work(),
        **fixed,
        **levels,
    )
    assert step_of([step] * 10).peak == (1 + 40 + 3) * gib
    # Two blocks' own on the way, beside what one takes while it runs.
    assert step_of([offloaded(step)] * 10).peak == (1 + 5 + 8) * gib
