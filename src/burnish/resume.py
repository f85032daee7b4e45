"""What a checkpoint holds, how it is restored, and what a changed config means for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from burnish.checkpoint.store import Loaded
from burnish.errors import CheckpointError, UserError
from burnish.loop import Training
from burnish.optim.state import pack_state, unpack_state

# What a checkpoint's tensors depend on: a run cannot go on with another value. The weights themselves are compared
# by content when the checkpoint is restored.
FIXED = (
    "model.family",
    "model.denoisers",
    "model.audio",
    "model.prediction",
    "model.base_adapter",
    "model.base_adapter_strength",
    "model.training_adapter",
    *(f"method.{name}" for name in ("kind", "rank", "alpha", "conv_rank", "conv_alpha")),
    *(f"method.{name}" for name in ("targets", "include", "exclude", "groups", "rs_scaling", "tucker")),
    *(f"method.{name}" for name in ("dora", "start")),
    *(f"method.{name}" for name in ("factor", "full_rank", "decompose_both", "block_size", "stages")),
    *(f"method.{name}" for name in ("token", "vectors", "lengths", "text_encoders", "word", "encoder")),
    "seed",
    *(f"train.optimizer.{name}" for name in ("kind", "class_path", "rounding")),
    "train.precision",
)
FREE = (".learning_rate",)  # below a fixed option, what may change all the same


def flat(values: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested mappings and lists with its dotted path."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, Sequence) and not isinstance(values, str) and values:
        for index, value in enumerate(values):
            yield from flat(value, f"{prefix}.{index}")
    else:
        yield prefix, values


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One readable line per option that differs, such as `train.steps: 200 -> 400`."""
    old, new = dict(flat(before)), dict(flat(now))
    return [
        f"{path}: {old.get(path, 'absent')} -> {new.get(path, 'absent')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def refuse_fixed_changes(changes: Sequence[str]) -> None:
    """Raises:
    UserError: an option changed that a checkpoint's tensors depend on.
    """
    starts = tuple(f"{path}{end}" for path in FIXED for end in ".:")
    fixed = [
        line for line in changes if line.startswith(starts) and not line.partition(":")[0].endswith(FREE)
    ]
    if fixed:
        raise UserError(
            "this run has checkpoints made with other values of\n    " + "\n    ".join(fixed),
            remedy="Start a new run with --name, or put the old values back.",
        )


class TrainingState(BaseModel):
    """The part of a checkpoint that is not tensors: state.json.

    No random state: every draw is a function of seed and position (law L1).
    """

    model_config = ConfigDict(extra="forbid")

    step: int
    steps: int
    position: int
    batches_per_epoch: int
    skipped: list[int]
    seed: int
    best_step: int | None
    best_loss: float | None
    patience_loss: float | None
    validations_without_improvement: int
    model_identity: str
    data_fingerprint: str
    held_out_fingerprint: str
    optimizer: Any
    scaler: dict[str, Any]
    ema: Any = None


def checkpoint_content(run: Training) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Everything that a resume needs (rule R4): tensors by file, and state.json."""
    names = {parameter: name for name, parameter in run.parameters.items()}
    optimizer_tensors, optimizer_state = pack_state(run.optimizer, names)
    tensors = {
        "adapter": {name: parameter.detach() for name, parameter in run.parameters.items()},
        "optimizer": optimizer_tensors,
    }
    if run.constants:
        tensors["start"] = {name: tensor.detach() for name, tensor in run.constants.items()}
    average = None
    if run.ema is not None:
        tensors["ema"], average = run.ema.state_dict()
    state = TrainingState(
        step=run.step,
        steps=run.steps,
        position=run.position,
        batches_per_epoch=run.batches_per_epoch,
        skipped=sorted(run.skipped),
        seed=run.seed,
        best_step=run.best_step,
        best_loss=run.best_loss,
        patience_loss=run.patience_loss,
        validations_without_improvement=run.validations_without_improvement,
        model_identity=run.model_identity,
        data_fingerprint=run.data_fingerprint,
        held_out_fingerprint=run.held_out_fingerprint,
        optimizer=optimizer_state,
        scaler=run.scaler.state_dict(),
        ema=average,
    )
    return tensors, state.model_dump()


def restore(run: Training, loaded: Loaded) -> list[str]:
    """Put a checkpoint's state into `run`; returns what was converted rather than kept, in sentences.

    Raises:
        CheckpointError: the checkpoint's state or tensors do not fit this run.
    """
    try:
        state = TrainingState.model_validate(loaded.state)
    except ValidationError as error:
        raise CheckpointError(
            f"state.json of step {loaded.step} cannot be read: {error.error_count()} fields differ from this version's",
            remedy="Go on with the version of Burnish that made it, or start a new run with --name.",
        ) from error
    if state.model_identity != run.model_identity:
        raise UserError(
            f"the base model's weights are not those that the checkpoint of step {loaded.step} was trained on",
            remedy="Put the old weights back, or start a new run with --name.",
        )
    _copy_into(run.parameters, loaded.tensors["adapter"])
    _copy_into(run.constants, loaded.tensors.get("start", {}))
    names = {parameter: name for name, parameter in run.parameters.items()}
    unpack_state(run.optimizer, names, loaded.tensors["optimizer"], state.optimizer)
    if run.scaler.is_enabled() and state.scaler:
        run.scaler.load_state_dict(state.scaler)
    run.step, run.skipped = state.step, set(state.skipped)
    run.updating = False  # whatever was half done is gone
    run.position, converted = _position(state.position, state.batches_per_epoch, run.batches_per_epoch)
    notes = [_restore_average(run, loaded), _restore_best(run, state), converted]
    if converted:
        run.skipped.clear()  # positions of other batches
    elif state.data_fingerprint != run.data_fingerprint:
        notes.append("the pictures, captions or their settings changed: the order goes on with the new ones")
    if state.steps != run.steps:
        notes.append(
            f"train.steps was {state.steps} and is {run.steps}: the learning-rate curve now spans {run.steps} "
            f"steps and goes on from step {run.step} of it"
        )
    return [note for note in notes if note]


def _copy_into(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    if parameters.keys() != tensors.keys():
        differing = sorted(parameters.keys() ^ tensors.keys())
        raise CheckpointError(
            f"the checkpoint holds other trained modules than this run, such as {', '.join(differing[:3])}",
            remedy="Start a new run with --name.",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _restore_average(run: Training, loaded: Loaded) -> str:
    if run.ema is None:
        return "train.ema is off now: the stored average is left behind" if "ema" in loaded.tensors else ""
    if "ema" not in loaded.tensors:
        run.ema.reset()
        return f"train.ema is new: the average begins with the weights of step {run.step}"
    stored = loaded.state["ema"]
    if isinstance(stored, dict) and stored.get("width") != run.ema.width:
        run.ema.reset()
        return f"train.ema.width is another: the average begins with the weights of step {run.step}"
    run.ema.load_state_dict(loaded.tensors["ema"], stored)
    return ""


def _restore_best(run: Training, state: TrainingState) -> str:
    """Held-out losses compare only where the same is measured."""
    if state.held_out_fingerprint != run.held_out_fingerprint:
        run.best_step = run.best_loss = run.patience_loss = None
        run.validations_without_improvement = 0
        return (
            "the held-out pictures or times changed: the best step is looked for anew"
            if state.best_step
            else ""
        )
    run.best_step, run.best_loss = state.best_step, state.best_loss
    run.patience_loss = state.patience_loss
    run.validations_without_improvement = state.validations_without_improvement
    return ""


def _position(position: int, per_epoch_then: int, per_epoch_now: int) -> tuple[int, str]:
    """The micro-step to go on with; where the epoch's length changed, the same share of the epochs seen."""
    if per_epoch_then == per_epoch_now:
        return position, ""
    converted = math.floor(position / per_epoch_then * per_epoch_now)
    return converted, (
        f"an epoch had {per_epoch_then} batches and now has {per_epoch_now} (other pictures or batch size): "
        f"going on at the same share, epoch {position / per_epoch_then:.2f}"
    )
