"""The plan of VAE training against what a real step takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_planner import allocated
from test_planner_texts import run_of

from burnish.conditioning import Conditioning
from burnish.config.method import Vae
from burnish.config.schema import Memory, RunConfig
from burnish.data.batch import Batch
from burnish.errors import UserError
from burnish.events import Listener
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.memory.activations import Mode
from burnish.model import DTYPES
from burnish.optim.build import build_optimizer
from burnish.planner.profile import step_of
from burnish.planner.rates import GIB, card_named
from burnish.planner.recipe import Shape
from burnish.planning import plan_run
from burnish.planning_traces import RunTraces
from burnish.reconstruction import Reconstruction, autoencoder_of, set_recomputing
from burnish.run_folder import RunFolder
from burnish.run_plan import CONTEXT, FRAGMENTED
from burnish.settling import put_in_force, settle
from burnish.trained import trained_parts

TinyFolder = Callable[[str], Path]
SIDE, ROWS = 128, 2


def vae_run(model: Path, folder: Path, precision: str, **method: Any) -> RunConfig:
    told = {"kind": "vae", "l1": 0.5, "crop": SIDE, **method}
    return run_of(model, folder, told, train={"steps": 10, "precision": precision, "batch_size": ROWS})


def real_step(config: RunConfig, family: Family, mode: Mode) -> Callable[[], None]:
    """A step as a run makes it, of the run's own parts."""
    assert isinstance(config.method, Vae)
    (trained,) = trained_parts(config, family, torch.device("cpu"), torch.float32).values()
    set_recomputing(autoencoder_of(family), mode == "recompute")
    groups = trained.parameter_groups(1e-5)
    parameters = [one for group in groups for one in group["params"]]
    optimizer = build_optimizer(config.train.optimizer, groups)
    objective = Reconstruction.of(config.method, DTYPES[config.train.precision])
    ids = ("a", "b")
    batch = Batch(torch.rand(ROWS, 3, SIDE, SIDE), Conditioning({}), torch.ones(ROWS), ids, ids, 0)

    def step() -> None:
        for turn in objective.turns(family, batch, 0):
            torch.autograd.backward((turn.loss_B * turn.weight_B).sum() / ROWS)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize(
    ("precision", "encoder", "mode"),
    [("fp32", False, "keep"), ("fp32", True, "recompute"), ("bf16", True, "keep")],
)
def test_a_step_of_a_vae_takes_what_a_real_one_does(
    tiny_folder: TinyFolder, tmp_path: Path, precision: str, encoder: bool, mode: Mode
) -> None:
    model = tiny_folder("sd15")
    config = vae_run(model, tmp_path, precision, encoder=encoder)
    family = family_named("sd15").load(
        ModelSource(str(model)), frozenset({"vae"}), dtype=torch.float32, device="cpu"
    )
    taken = allocated(real_step(config, family, mode))
    traced = RunTraces(config, cuda=False).vae_profile(Shape(SIDE, SIDE, batch=ROWS), mode)
    assert step_of([traced]).peak - traced.resident == pytest.approx(taken, rel=0.01)


def recomputing(config: RunConfig, **more: Any) -> Memory:
    return config.memory.model_copy(update={"activations": "recompute", **more})


def test_the_plan_of_a_vae_keeps_what_fits(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    config = vae_run(tiny_folder("sd15"), tmp_path, "bf16")
    card = card_named("4090")
    plan = plan_run(config, card)
    assert [row.what.strip() for row in plan.rows] == ["weights", "trained", "activations", "training"]
    assert plan.choice.settings.modes == ("keep",)
    assert plan.rows[2].why == f"keep; batch {ROWS} of {SIDE}x{SIDE}, gradients"
    (less,) = plan.cheaper
    assert less.settings.modes == ("recompute",)
    assert less.seconds > plan.choice.seconds

    def within(torch_may: int, parts: int | str) -> Any:
        memory = config.memory.model_copy(update={"batch_parts": parts})
        within_it = replace(card, gib=(torch_may + CONTEXT + FRAGMENTED) / GIB)
        return plan_run(config.model_copy(update={"memory": memory}), within_it)

    assert within(plan.peak - 1, 1).choice == less
    with pytest.raises(UserError, match="training take at least"):
        within(less.peak - 1, 1)
    one_by_one = within(less.peak - 1, "auto")
    assert one_by_one.choice.settings.parts == ROWS
    assert one_by_one.choice.peak < less.peak
    assert one_by_one.times[0].shape.batch == ROWS
    train = config.train.model_copy(update={"batch_size": 1, "accumulate": 2})
    single = plan_run(config.model_copy(update={"train": train, "memory": recomputing(config)}), card)
    in_parts = plan_run(config.model_copy(update={"memory": recomputing(config, batch_parts=ROWS)}), card)
    assert in_parts.choice.peak - single.choice.peak == (ROWS - 1) * 3 * SIDE * SIDE * 4  # wait on the device
    alone = plan_run(config.model_copy(update={"memory": recomputing(config)}), card)
    assert alone.choice.settings.parts == 1


def test_a_run_is_settled_by_the_plan_and_can_step_down(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    config = vae_run(tiny_folder("sd15"), tmp_path, "fp32")
    config = config.model_copy(update={"memory": config.memory.model_copy(update={"budget": "2GiB"})})
    folder = RunFolder(tmp_path / "run")
    folder.make()
    settled = settle(config, torch.device("cpu"), folder, Listener())
    assert settled.config.memory.activations == "keep"
    assert settled.plan is not None
    (less,) = settled.plan.fallbacks
    family = family_named("sd15").skeleton(parts=frozenset({"vae"}))
    run: Any = SimpleNamespace(family=family)
    for choice, recomputes in ((less, True), (settled.plan.choice, False)):
        put_in_force(choice, run)
        assert autoencoder_of(family).is_gradient_checkpointing is recomputes


def test_within_autocast_norms_are_float32_on_a_gpu(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    config = vae_run(tiny_folder("sd15"), tmp_path, "bf16")
    on_cpu, on_gpu = (
        RunTraces(config, cuda=cuda).vae_profile(Shape(SIDE, SIDE, batch=ROWS), "keep")
        for cuda in (False, True)
    )
    assert on_gpu.blocks[0].growth > 1.3 * on_cpu.blocks[0].growth
