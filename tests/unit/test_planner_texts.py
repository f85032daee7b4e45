"""The plan of steps that encode captions themselves, as where text encoders or words train, against real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_planner import allocated, kept, peak_of

from burnish.assembly import with_prompts
from burnish.conditioning import Conditioning
from burnish.config.schema import RunConfig
from burnish.data.batch import Batch
from burnish.errors import ModelError, UserError
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.memory.activations import Mode
from burnish.memory.formats import has_kernel
from burnish.memory.quantized import replace_linears
from burnish.model import DTYPES
from burnish.objective import Denoising
from burnish.optim.build import build_optimizer
from burnish.placement import Part
from burnish.planner.rates import card_named
from burnish.planner.recipe import Shape
from burnish.planning import plan_run
from burnish.planning_traces import RunTraces
from burnish.trained import trained_parts

TinyFolder = Callable[[str], Path]
PARTS: frozenset[Part] = frozenset({"denoiser", "text_encoders"})
WORD = {"token": "<it>", "vectors": 4}
LORA = {"kind": "lora", "rank": 4}
METHODS: dict[str, dict[str, Any]] = {
    "adapters": LORA | {"text_encoders": {"which": ["clip_l"]}},
    "whole": {"kind": "full", "text_encoders": {}},
    "word": {"kind": "textual_inversion", **WORD},
    "pivotal": LORA | {"word": WORD},
}


def run_of(model: Path, folder: Path, method: dict[str, Any], /, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "model": {"path": str(model)},
            "method": method,
            "data": [{"path": str(folder), "resolutions": [256]}],
            "train": {"steps": 10, "precision": "fp32"},
            "memory": {"cache_folder": folder},
            **sections,
        }
    )


def real_step(config: RunConfig, family: Family, shape: Shape, mode: Mode) -> Callable[[], None]:
    """A step as a run makes it, of the run's own parts."""
    dtype = DTYPES[config.train.precision]
    trained = trained_parts(config, family, torch.device("cpu"), dtype)
    kept(mode)(family)
    groups = [group for one in trained.values() for group in one.parameter_groups(1e-4)]
    parameters = [one for group in groups for one in group["params"]]
    optimizer, objective = build_optimizer(config.train.optimizer, groups), Denoising(family.schedule)
    latents, times_B, told = family.example(shape.height, shape.width, shape.batch)
    captions = ("a photo of <it>",) * shape.batch
    with torch.no_grad():
        said = set(family.encode_prompts(captions))
    rest = Conditioning({name: one for name, one in told.items() if name not in said})
    del told
    batch = Batch(latents, rest, torch.ones(shape.batch), captions, captions, 0, captions=captions)

    def step() -> None:
        for turn in objective.turns_at(
            family, with_prompts(family, batch), torch.randn_like(latents, dtype=torch.float32), times_B
        ):
            torch.autograd.backward((turn.loss_B * turn.weight_B).sum())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize(
    ("name", "method", "mode"),
    [
        ("sd3", "adapters", "recompute"),
        ("sd15", "whole", "keep"),
        ("flux", "word", "keep"),
        ("flux", "pivotal", "keep"),
    ],
)
def test_a_step_that_encodes_captions_takes_what_a_real_one_does(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, method: str, mode: Mode
) -> None:
    model, shape = tiny_folder(name), Shape(256, 256, batch=4)
    config = run_of(model, tmp_path, METHODS[method])
    family = family_named(name).load(
        ModelSource(str(model)), PARTS, dtype=DTYPES[config.train.precision], device="cpu"
    )
    taken = allocated(real_step(config, family, shape, mode))
    traced = RunTraces(config, cuda=False).profile(shape, "native", mode)
    assert peak_of(traced) - traced.resident == pytest.approx(taken, rel=0.01)
    held = sum(
        one.nbytes for module in family.loaded.values() for one in [*module.parameters(), *module.buffers()]
    )
    own = sum(
        one.nbytes for module in family.loaded.values() for one in module.parameters() if one.requires_grad
    )
    assert sum(traced.weights) + traced.weights_outside == pytest.approx(held - own, rel=0.001)
    assert sum(traced.trained) + traced.trained_outside == pytest.approx(
        3 * own, rel=0.01
    )  # counters of steps


def test_text_encoders_become_smaller_where_a_word_would_not_fit(tmp_path: Path) -> None:
    """Of FLUX.1: 9.2 GiB of text encoders as they come, beside a denoiser that can be streamed."""
    sections = {
        "model": {"path": "owner/name", "family": "flux", "offline": True},
        "data": [{"path": str(tmp_path), "resolutions": [256]}],
        "train": {"steps": 10},
        "memory": {"cache_folder": tmp_path, "weights": "int8", "activations": "recompute"},
    }
    config = run_of(tmp_path, tmp_path, METHODS["word"], **sections)
    plan = plan_run(config, card_named("12GiB"))
    assert plan.text_encoder_weights == "int8"
    assert plan.peak <= plan.budget
    assert [row.what.strip() for row in plan.rows][:3] == ["pictures", "weights", "trained"]
    assert plan.rows[1].why.endswith("and text encoders, int8")
    assert plan.rows[2].why == "a word's vectors, the optimizer's state"


def test_layers_that_were_streamed_from_the_host_multiply_as_planned_where_a_word_trains(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    model = tiny_folder("flux")
    family = family_named("flux").load(ModelSource(str(model)), PARTS, dtype=torch.float32, device="cpu")
    denoiser = family.denoisers["transformer"]
    name, linear = next((n, m) for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear))
    made = replace_linears(denoiser, {name: linear}, "int8", eight_bit=False)  # as of one loaded elsewhere
    trained_parts(run_of(model, tmp_path, METHODS["word"]), family, torch.device("cpu"), torch.float32)
    assert made[name].eight_bit is has_kernel("int8", torch.device("cpu")) is True


def test_what_a_model_has_not_is_said_instead_of_planned(tmp_path: Path) -> None:
    model = {"path": "owner/name", "family": "z_image", "offline": True}
    method = LORA | {"text_encoders": {}}
    with pytest.raises(UserError, match="has no CLIP"):
        plan_run(run_of(tmp_path, tmp_path, method, model=model), card_named("4090"))


def test_a_tokenizer_that_does_not_come_with_burnish_is_read_from_the_model(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    config = run_of(tiny_folder("cogview4"), tmp_path, METHODS["word"])
    traced = RunTraces(config, cuda=False).profile(Shape(64, 64), "native", "keep")
    width = 32
    assert traced.trained_outside == pytest.approx(
        3 * 4 * width * 4, abs=8
    )  # vectors and two averages; a counter
    nowhere = family_named("cogview4").skeleton(parts=frozenset({"text_encoders"}))
    with pytest.raises(ModelError, match=r"tokenizer of CogView4's text_encoder .* the model is not here"):
        nowhere.encode_prompts(["a dog"])
