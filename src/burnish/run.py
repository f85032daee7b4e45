"""A run: config -> preflight -> prepare -> train -> export. The whole config stops here and in assembly.py."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from burnish.assembly import Assembled, assemble, kept_together
from burnish.atomic import atomic_write_text
from burnish.checkpoint.space import check_space
from burnish.checkpoint.store import Loaded
from burnish.compute.capabilities import use_tensor_cores
from burnish.config.load import load_config, to_yaml
from burnish.config.method import Full, Vae
from burnish.config.schema import RunConfig
from burnish.config.train import RollBackOnNonFinite
from burnish.errors import BurnishError, Interrupted, NonFiniteLoss, OutOfMemory, UserError
from burnish.events import Events, Listener, RunResult, StepReport
from burnish.generate import drawn_alone
from burnish.loop import train
from burnish.memory.formats import slow_because
from burnish.memory.out_of_memory import is_out_of_memory, release_memory_of
from burnish.model import DTYPES, choose_device, choose_model, places
from burnish.optim.build import check_optimizer, state_bytes, what_is_lost
from burnish.preparation import check_data, folders, prepare, split
from burnish.refusals import refuse_unreadable, refuse_unsaid_word
from burnish.results import TextEncoderFolder
from burnish.resume import changed_options, refuse_fixed_changes, restore
from burnish.run_folder import Recorder, RunFolder
from burnish.settling import Compared, Settled, settle
from burnish.signals import StopRequest
from burnish.trained import EXPORT_DTYPES, keeps_all

_log = logging.getLogger(__name__)
LOGGED_EVERY = 50  # steps; metrics.sqlite has each


def check_run(config: RunConfig, progress: Listener) -> None:
    """What `train_run` does before a model loads: device, weights' headers, pictures, captions, a test write.

    Raises:
        BurnishError: what would stop the run.
    """
    folder = RunFolder(config.save.folder / config.name)
    folder.make()
    device = choose_device(config.memory.device, config.train.precision)
    check_optimizer(config.train.optimizer, device)
    family = choose_model(config.model, config.memory).load(
        dtype=DTYPES[config.train.precision], device=device
    )
    refuse_unreadable(config, family)
    for line in announce_changes(config, folder):
        progress.warned(line)
    samples, _ = split(config, check_data(config, folders(config), family, folder, progress).samples)
    refuse_unsaid_word(config, samples)
    check_space(folder.checkpoints, 0, config.save.keep)  # whether it can be written to at all


def train_run(config: RunConfig, *, progress: Listener) -> RunResult:
    """Train from the start, or from the newest checkpoint in the run's folder, to `train.steps`.

    Raises:
        Interrupted: a signal asked to stop; the state is saved.
        BurnishError: as the tree in errors.py; the run folder says the same.
    """
    folder = RunFolder(config.save.folder / config.name)
    refuse_if_busy(folder)
    recorder = Recorder(folder, config.train.steps)
    events = Events(recorder, progress, RunLog())
    with log_file(folder), StopRequest() as stop:
        with ended_by(events, folder):
            result = prepare_and_train(config, folder, events, stop)
        events.finished(result)
    if result.state == "stopped":
        stop.raise_if_requested()
    return result


def prepare_and_train(config: RunConfig, folder: RunFolder, events: Events, stop: StopRequest) -> RunResult:
    if config.memory.threads:
        torch.set_num_threads(config.memory.threads)
    device, dtype = (
        choose_device(config.memory.device, config.train.precision),
        torch.float32 if isinstance(config.method, Vae) else DTYPES[config.train.precision],
    )
    check_optimizer(config.train.optimizer, device)
    use_tensor_cores(device, config.train.precision)
    resolved = to_yaml(config)
    for line in announce_changes(config, folder):
        events.warned(line)
    settled = settle(kept_together(config, device, events.warned), device, folder, events)
    config = settled.config
    if why := slow_because(config.memory.weights, device):
        events.warned(f"memory.weights: {why}")
    prepared = prepare(config, hashlib.sha256(resolved.encode()).hexdigest(), folder, device, dtype, events)
    atomic_write_text(folder.config, resolved)

    events.phase("loading the VAE" if prepared.pixels else "loading the denoiser", 0, 0)
    family = prepared.model.load(*prepared.parts, dtype=dtype, device=places(config.memory, device))
    if family.denoisers and "vae" in prepared.parts and (alone := drawn_alone(family)):
        events.warned(f"samples: {alone}")
    assembled = assemble(config, resolved, family, prepared, folder, device, dtype, events, stop)
    if lost := what_is_lost(config.train.optimizer, assembled.training.parameters.values()):
        events.warned(lost)
    loaded = newest_checkpoint(assembled, events)
    checkpoint, beside = disk_bytes(config, assembled, folder)
    check_space(folder.checkpoints, checkpoint, config.save.keep + 1, beside)  # and the best
    if loaded is not None:
        for note in restore(assembled.training, loaded):
            events.warned(note)
        assembled.save.resumed(assembled.training, folder.checkpoints / f"step-{loaded.step:08d}")
    with assembled.attention.installed():
        if assembled.sample is not None and config.sample.at_start and assembled.training.step == 0:
            assembled.sample.draw(assembled.training)
        return train_to_the_end(settled, assembled, folder, events, stop)


def train_to_the_end(
    settled: Settled, assembled: Assembled, folder: RunFolder, events: Events, stop: StopRequest
) -> RunResult:
    config = settled.config
    run, validate = assembled.training, assembled.validate
    patience = config.train.validation.early_stop if config.train.validation else None

    def no_longer_improves() -> bool:
        return bool(validate and patience and run.validations_without_improvement >= patience.patience)

    stop.deferred = True
    if run.step == 0 and isinstance(config.train.on_nonfinite, RollBackOnNonFinite):
        assembled.save.checkpoint(run)  # something to roll back to
    compared = Compared(settled.plan, folder)
    with saved_when_memory_runs_out(assembled):
        while True:
            try:
                train(
                    run,
                    events,
                    [compared.after_step(events), *assembled.tasks],
                    lambda: stop.requested is not None or no_longer_improves(),
                )
                break
            except NonFiniteLoss as error:
                roll_back(config, assembled, error, events)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not (is_out_of_memory(error) and compared.step_down(run, error, events)):
                    raise
    finished = run.step >= run.steps or no_longer_improves()
    assembled.save.finish(run, ended=finished)
    if finished and run.step < run.steps and assembled.sample is not None:
        assembled.sample.draw(run)
    notes = [f"{len(run.skipped)} batch(es) skipped after a non-finite loss"] if run.skipped else []
    if no_longer_improves() and run.step < run.steps:
        notes.append(f"stopped early: no better held-out loss since step {run.best_step}")
    return RunResult(
        state="done" if finished else "stopped",
        step=run.step,
        folder=folder.path,
        adapter=assembled.save.last_adapter,
        best_step=run.best_step,
        best_loss=run.best_loss,
        notes=notes,
    )


def roll_back(config: RunConfig, assembled: Assembled, error: NonFiniteLoss, events: Events) -> None:
    """Back to the last good checkpoint, with the step's batches marked to be passed over.

    Raises:
        NonFiniteLoss: the same again, where rolling back is off or used up.
    """
    policy, run = config.train.on_nonfinite, assembled.training
    if not isinstance(policy, RollBackOnNonFinite):
        raise error
    skipped = run.skipped | set(error.positions)
    # A gradient at fault blames every micro-batch of its step; without one to blame it would only happen again.
    if not error.positions or len(skipped) > policy.max_batches * run.accumulate:
        raise error
    loaded = assembled.save.store.load_newest()
    if loaded is None:
        raise error
    run.optimizer.zero_grad(set_to_none=True)
    if run.scaler.is_enabled():
        run.scaler.update(run.scaler.get_scale())  # forget that this step's gradients were unscaled
    restore(run, loaded)
    run.skipped = skipped
    assembled.save.saved_step = loaded.step
    events.warned(f"{error.message}\nback to step {run.step}; {len(skipped)} batch(es) are passed over")


@contextmanager
def saved_when_memory_runs_out(assembled: Assembled) -> Iterator[None]:
    """Turn a step that does not fit in memory into an error with remedies, after saving the last whole step."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        run = assembled.training
        run.optimizer.zero_grad(set_to_none=True)
        release_memory_of(error)
        saved = not run.updating and run.step > 0
        if saved:
            assembled.save.save(run)
        kept = assembled.save.store.steps()
        state = f"the state of step {kept[-1]} is saved" if kept else "nothing was trained yet"
        raise OutOfMemory(
            f"step {run.step + 1} does not fit in memory on {run.device}; {state}",
            remedy="Most saved first: memory.activations: recompute; memory.stream: 1.0, weights in host memory; of "
            "whole models memory.offload_optimizer and memory.gradient_release; memory.batch_parts, as many as "
            "train.batch_size, or train.batch_size: 1 with train.accumulate to make up for it; a smaller number in "
            "data.resolutions (memory grows with its square).",
        ) from error


def refuse_if_busy(folder: RunFolder) -> None:
    """Raises:
    UserError: another process trains in this folder now.
    """
    status = folder.status()
    if status is not None and status.state in ("preparing", "running") and status.is_alive:
        if status.pid == os.getpid():
            return
        raise UserError(
            f"{folder.path} is being trained by process {status.pid} (step {status.step} of {status.steps})",
            remedy="Wait for it, stop it, or start another run with --name.",
        )


def announce_changes(config: RunConfig, folder: RunFolder) -> list[str]:
    """What differs from the config that this folder was trained with, in sentences.

    Raises:
        UserError: an option changed that the checkpoints depend on.
    """
    if not folder.config.exists() or not any(folder.checkpoints.glob("step-*")):
        return []
    before = load_config(folder.config).config
    changes = changed_options(before.model_dump(mode="json"), config.model_dump(mode="json"))
    refuse_fixed_changes(changes)
    return [f"changed since the last start: {line}" for line in changes]


def newest_checkpoint(assembled: Assembled, events: Events) -> Loaded | None:
    """The newest checkpoint that verifies; each one passed over is said, with the reason."""
    store = assembled.save.store
    for line in store.sweep():
        events.warned(line)
    loaded = store.load_newest()
    for reason in loaded.passed_over if loaded is not None else ():
        events.warned(f"passed over: {reason}")
    return loaded


def disk_bytes(config: RunConfig, assembled: Assembled, folder: RunFolder) -> tuple[int, int]:
    """Size of one checkpoint with its adapters, and what is still to come of whole models beside."""
    run = assembled.training
    parameters = list(run.parameters.values())
    count = sum(one.numel() for one in parameters)
    averages = 4 * count if run.ema is not None else 0
    if not isinstance(config.method, Full | Vae):
        return count * 4 * 6 + averages, 0  # an optimizer keeps four tensors per weight at the most
    per_weight = {
        dtype: state_bytes(config.train.optimizer, dtype, run.device)
        for dtype in {one.dtype for one in parameters}
    }
    states = sum(one.numel() * per_weight[one.dtype] for one in parameters)
    modules = run.family.denoisers or {"vae": run.family.loaded["vae"]}
    whole = sum(one.numel() for part in modules.values() for one in part.parameters())
    texts = {one.part for one in assembled.save.results if isinstance(one, TextEncoderFolder)}
    formats = (len(assembled.save.results) - len(texts)) // len(modules)
    beside = sum(one.numel() for part in texts for one in run.family.loaded[part].parameters())
    # The last, the best and the one being written; or those of every save and of the end.
    kept = 2 + run.steps // config.save.every if keeps_all(config) else 3
    written = kept * (formats * whole + beside) * EXPORT_DTYPES[config.save.dtype].itemsize
    there = sum(file.stat().st_size for file in folder.models.rglob("*") if file.is_file())
    return sum(one.nbytes for one in parameters) + int(states) + averages, max(0, written - there)


@contextmanager
def ended_by(events: Events, folder: RunFolder) -> Iterator[None]:
    """Whatever ends the run, the run folder says so."""
    try:
        yield
    except Interrupted as error:
        status = folder.status()
        _log.info("%s", error.message)
        events.finished(
            RunResult("stopped", status.step if status else 0, folder.path, notes=[error.message])
        )
        raise
    except BaseException as error:
        status = folder.status()
        text = error.message if isinstance(error, BurnishError) else f"{type(error).__name__}: {error}"
        _log.exception("the run failed")
        events.finished(RunResult("failed", status.step if status else 0, folder.path, notes=[text]))
        raise


@contextmanager
def log_file(folder: RunFolder) -> Iterator[None]:
    """Everything logged during the run also goes to logs/, one file per start."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    handler = logging.FileHandler(folder.logs / f"{stamp}-{os.getpid()}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("burnish")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


class RunLog(Listener):
    """The run's events as lines of its log file."""

    def started(self, step: int, steps: int) -> None:
        _log.info("training from step %d to %d", step, steps)

    def stepped(self, report: StepReport) -> None:
        if report.step % LOGGED_EVERY == 0:
            _log.info("step %d: loss %.5f, gradient norm %.4f", report.step, report.loss, report.grad_norm)
            if report.accuracy is not None:
                _log.info("step %d: accuracy %.3f", report.step, report.accuracy)

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        _log.info("step %d: held-out loss %.5f%s", step, loss, ", the best so far" if is_best else "")

    def sampled(self, step: int, pictures: Sequence[Path]) -> None:
        _log.info("step %d: %d samples", step, len(pictures))

    def saved(self, step: int, checkpoint: Path, adapter: Path, facts: Mapping[str, object]) -> None:
        _log.info("step %d: saved %s and %s %s", step, checkpoint.name, adapter.name, dict(facts))

    def planned(self, text: str) -> None:
        _log.info("plan: %s", text)

    def warned(self, text: str) -> None:
        _log.warning("%s", text)

    def finished(self, result: RunResult) -> None:
        _log.info("%s at step %d %s", result.state, result.step, "; ".join(result.notes))
