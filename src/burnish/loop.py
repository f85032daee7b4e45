"""The train loop, top to bottom. Saving, sampling and validation are tasks that the run hands in (tasks.py)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from burnish.data.batch import Batch
from burnish.errors import NonFiniteLoss
from burnish.events import Events, StepReport
from burnish.family import Family
from burnish.memory.gradient_release import GradientRelease
from burnish.objective import Denoising, Turn
from burnish.optim.ema import Ema
from burnish.optim.schedule import apply_learning_rate
from burnish.randomness import stable_seed
from burnish.reconstruction import Reconstruction

# Of the limit: below it a gradient is its own clipped one to the bit, and need not be multiplied by one.
CLIPPED_FROM = 1 - 1e-4
MAX_OVERFLOWS = 20  # fp16: as many halvings of the loss scale in a row mean that the loss itself is broken


@dataclass
class Training:
    """What a run owns while it trains; `step`, `position` and `skipped` move, the rest stays.

    `batches(position)` yields the micro-batches from that micro-step on, for ever, as a pure function.
    """

    family: Family
    objective: Denoising | Reconstruction
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate_factor: Callable[[int], float]
    batches: Callable[[int], Iterator[Batch]]
    batches_per_epoch: int
    device: torch.device
    dtype: torch.dtype
    scaler: torch.amp.GradScaler
    seed: int
    steps: int
    accumulate: int = 1
    batch_parts: int = 1  # of a micro-batch, learned one after the other
    max_grad_norm: float = 1.0
    ema: Ema | None = None
    # What parameters are relative to, in checkpoints.
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    model_identity: str = ""  # hash of the frozen weights: a checkpoint belongs to them
    data_fingerprint: str = ""  # of what is drawn in which order
    held_out_fingerprint: str = ""  # of what the held-out loss is measured on
    step: int = 0  # optimizer steps done
    position: int = 0  # micro-step that the next step begins with
    skipped: set[int] = field(default_factory=set)  # positions that a roll-back passes over
    best_step: int | None = None  # by held-out loss
    best_loss: float | None = None
    patience_loss: float | None = None  # the last loss that counted as an improvement for early stopping
    validations_without_improvement: int = 0
    updating: bool = False  # inside the optimizer's update: weights and state are not to be saved now
    release: GradientRelease | None = None  # weights move in backward, not after it
    # Adds to a batch what is encoded in the step itself.
    told: Callable[[Batch], Batch] = field(default=lambda batch: batch)


def train(
    run: Training,
    events: Events,
    tasks: Sequence[Callable[[Training], None]],
    should_stop: Callable[[], bool],
) -> None:
    """Train until `run.steps`, going on from `run.step`; each task is called after every step.

    Raises:
        NonFiniteLoss: loss or gradient is NaN or inf; the weights are as they were before the step, unless `release`
            moved them.
    """
    events.started(run.step, run.steps)
    with closing(take(run)) as stream:
        train_from(stream, run, events, tasks, should_stop)


def train_from(
    stream: Iterator[Batch],
    run: Training,
    events: Events,
    tasks: Sequence[Callable[[Training], None]],
    should_stop: Callable[[], bool],
) -> None:
    """The steps themselves, on an open stream of batches."""
    parameters = list(run.parameters.values())
    overflows = 0
    while run.step < run.steps and not should_stop():
        began = time.perf_counter()
        factor = run.learning_rate_factor(run.step)
        apply_learning_rate(run.optimizer, factor)

        batches = [next(stream) for _ in range(run.accumulate)]
        samples = sum(len(batch.sample_ids) for batch in batches)  # a partial batch counts for less
        if run.release is not None:
            judged, loss_value, norm_value = released_step(run, run.release, batches[0], samples)
            accuracy = [float(share) for share in told_apart(judged)]
        else:
            judged = [turn for batch in batches for turn in micro_step(run, batch, samples)]
            run.scaler.unscale_(run.optimizer)
            grad_norm = total_norm([one.grad for one in parameters if one.grad is not None])
            loss = torch.stack([(one.loss_B * one.weight_B).sum() for one in judged]).sum() / samples
            found = torch.stack([loss, grad_norm, *told_apart(judged)])
            loss_value, norm_value, *accuracy = found.tolist()  # the one host sync of a step
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            overflows += 1
            if not (run.scaler.is_enabled() and math.isfinite(loss_value) and overflows <= MAX_OVERFLOWS):
                raise non_finite(run, judged, loss_value, norm_value)
            run.scaler.update(run.scaler.get_scale() * run.scaler.get_backoff_factor())
            run.optimizer.zero_grad(set_to_none=True)
            run.position = judged[-1].batch.position + 1
            continue

        overflows = 0
        if run.release is None:
            if norm_value > CLIPPED_FROM * run.max_grad_norm:
                clip_grads_with_norm_(parameters, run.max_grad_norm, grad_norm)
            run.updating = True
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
        if run.ema is not None:
            run.ema.update()
        run.step += 1
        run.position = judged[-1].batch.position + 1
        run.updating = False
        seconds = time.perf_counter() - began
        events.stepped(report(run, loss_value, norm_value, seconds, accuracy[0] if accuracy else None))
        for task in tasks:
            task(run)


def take(run: Training) -> Generator[Batch, None, None]:
    """Batches from `run.position` on, on the device, without those that a roll-back skips."""
    for batch in run.batches(run.position):
        if batch.position not in run.skipped:
            yield batch.to(run.device)


def micro_step(run: Training, batch: Batch, samples: int) -> list[Turn]:
    """Forward and backward of one micro-batch; gradients add up to those of the mean over the step's `samples`.

    Losses stay on the device until the step's one synchronisation.
    """
    seed_dropout(stable_seed(run.seed, "dropout", batch.position), run.device)
    judged = []
    for part in batch.parts(run.batch_parts):
        with closing(run.objective.turns(run.family, run.told(part), run.seed)) as turns:
            for turn in turns:
                scaled = run.scaler.scale((turn.loss_B * turn.weight_B).sum() / samples)
                torch.autograd.backward(scaled)
                judged.append(replace(turn, loss_B=turn.loss_B.detach()))
    return judged


def released_step(
    run: Training, release: GradientRelease, batch: Batch, samples: int
) -> tuple[list[Turn], float, float]:
    """Forward, and backward that moves the weights on its way; the loss and the gradient's norm.

    Raises:
        NonFiniteLoss: the loss is NaN or inf; the weights are as they were before the step.
    """
    seed_dropout(stable_seed(run.seed, "dropout", batch.position), run.device)
    (turn,) = run.objective.turns(
        run.family, run.told(batch), run.seed
    )  # sliders, which have two, are refused
    loss = (turn.loss_B * turn.weight_B).sum() / samples
    judged = [replace(turn, loss_B=turn.loss_B.detach())]
    value = float(
        loss.detach()
    )  # known before the first weight moves, at the price of a second wait for the device
    if not math.isfinite(value):
        raise non_finite(run, judged, value, 0.0)
    run.updating = True
    with release.moving():
        torch.autograd.backward(loss)
    return judged, value, float(release.norm())


def seed_dropout(seed: int, device: torch.device) -> None:
    """Make what dropout draws a function of the position: it takes from the device's own generator.

    Not `torch.manual_seed`: that also prepares every other device, which took a millisecond per micro-step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients as one vector, float32.

    What torch.nn.utils.get_total_norm does on one device, in three quarters of its time for an adapter's hundreds of
    small tensors: it sorts them by device first.
    """
    if not gradients:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(list(gradients), 2, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def told_apart(judged: Sequence[Turn]) -> list[Tensor]:
    """Share of a step's pairs that are told apart rightly, as the one value, of no dimension; nothing without pairs."""
    pairs = [one.told_apart_B for one in judged if one.told_apart_B is not None]
    return [torch.cat(pairs).mean()] if pairs else []


def report(
    run: Training, loss: float, grad_norm: float, seconds: float, accuracy: float | None
) -> StepReport:
    on_cuda = run.device.type == "cuda"
    return StepReport(
        step=run.step,
        steps=run.steps,
        epoch=run.position / run.batches_per_epoch,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=max(
            float(group["lr"]) * float(group.get("d", 1.0)) for group in run.optimizer.param_groups
        ),
        seconds=seconds,
        memory_gib=torch.cuda.max_memory_allocated(run.device) / 2**30 if on_cuda else None,
        accuracy=accuracy,
    )


def non_finite(run: Training, judged: Sequence[Turn], loss: float, grad_norm: float) -> NonFiniteLoss:
    """The error that names samples, times and positions to blame: those whose loss is not finite, or all."""
    bad = [one for one in judged if not torch.isfinite(one.loss_B).all()]
    named = [
        f"{path} at t = {t:.3f} (loss {value:g})"
        for one in bad or judged
        for path, t, value in zip(one.batch.paths, one.t_B.tolist(), one.loss_B.tolist(), strict=True)
        if not bad or not math.isfinite(value)
    ]
    weights = (
        "some weights have moved and are not to be saved"
        if run.updating
        else "the weights are as they were before it"
    )
    error = NonFiniteLoss(
        f"step {run.step + 1}: the {'loss' if bad else 'gradient'} is not finite (loss {loss:g}, gradient norm "
        f"{grad_norm:g}, {run.dtype}); {weights}. Samples: {'; '.join(named)}",
        remedy="Lower train.optimizer.learning_rate, use train.precision: bf16 or fp32, look at the named pictures, "
        "or set train.on_nonfinite: {kind: rollback} to skip such batches.",
    )
    error.positions = tuple(one.batch.position for one in bad or judged)
    return error
