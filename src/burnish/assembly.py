"""From a config and a loaded family to a `Training` and its tasks: every section meets the part it describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from burnish.adapters.attached import AdapterSet, all_at, all_disabled
from burnish.adapters.words import NewWord, keeps_lengths
from burnish.checkpoint.store import CheckpointStore
from burnish.compute.attention import Attention, Call, Kind, recorded
from burnish.compute.attention_choice import choose
from burnish.compute.compile import Compilation, compile_blocks
from burnish.config.method import Vae, trains_text, word_of
from burnish.config.schema import RunConfig
from burnish.data.batch import Batch
from burnish.events import Events
from burnish.families.sources import user_cache_folder
from burnish.family import Family
from burnish.generate import attach_adapter, merge_adapter
from burnish.hardware import shares_memory
from burnish.loop import Training
from burnish.memory.activation_offload import offload_activations
from burnish.memory.activations import activation_modes, set_activations
from burnish.memory.gradient_release import GradientRelease
from burnish.memory.state_offload import StatesOnHost
from burnish.memory.streaming import stream_weights
from burnish.memory.transfer import transfer_to, waited_for
from burnish.model import DTYPES
from burnish.objective import Denoising
from burnish.optim.build import build_optimizer
from burnish.optim.ema import Ema
from burnish.optim.one_by_one import OneByOne
from burnish.optim.schedule import learning_rate_factor
from burnish.preparation import Prepared
from burnish.reconstruction import Reconstruction, autoencoder_of, set_recomputing
from burnish.run_folder import RunFolder
from burnish.sampling.sampler import EncodedRequest, encode_requests, with_references
from burnish.signals import StopRequest
from burnish.tasks import Sample, Save, Validate
from burnish.trained import Told, Trained, keeps_all, results_of, trained_parts


@dataclass(frozen=True, slots=True)
class Assembled:
    """A training and what happens beside its steps, in this order."""

    training: Training
    validate: Validate | None
    save: Save
    sample: Sample | None
    attention: Attention
    compilation: Compilation | None

    @property
    def tasks(self) -> list[Callable[[Training], None]]:
        told = self.compilation.tell if self.compilation is not None else None
        return [task for task in (told, self.validate, self.save, self.sample) if task is not None]


def assemble(
    config: RunConfig,
    resolved: str,
    family: Family,
    prepared: Prepared,
    folder: RunFolder,
    device: torch.device,
    dtype: torch.dtype,
    events: Events,
    stop: StopRequest,
) -> Assembled:
    """Make ready what the method trains of the loaded denoisers, and build all that trains it.

    Args:
        resolved: the config as YAML text, kept in every file.

    Raises:
        AdapterError, ConfigError: targets that match nothing, or that the export format cannot hold.
        MissingPackage: the optimizer needs one.
    """
    if config.model.base_adapter is not None:
        merge_adapter(family, config.model.base_adapter, config.model.base_adapter_strength, events.warned)
    assistants = []
    if config.model.training_adapter is not None:
        assistants = [attach_adapter(family, config.model.training_adapter, events.warned)]
    trained = trained_parts(config, family, device, dtype)
    assert config.memory.activations != "auto", "what is open is settled first"
    assert config.memory.stream != "auto"
    assert config.memory.offload_activations != "auto"
    blocks = family.blocks() if family.denoisers else []
    if isinstance(config.method, Vae):
        set_recomputing(autoencoder_of(family), config.memory.activations == "recompute")
    set_activations(blocks, activation_modes(config.memory.activations, len(blocks)))
    denoisers = list(family.denoisers.values())
    if config.memory.stream:
        stream_weights(denoisers, blocks, config.memory.stream, transfer_to(device), device)
    if config.memory.offload_activations:
        offload_activations(denoisers, blocks, transfer_to(device))
    training = build_training(config, family, trained, prepared, device, dtype)
    attention = build_attention(config, training, prepared)
    compilation = None
    if config.memory.compile:  # after the attention's choice, which watches the blocks as they are
        compilation = compile_blocks(blocks, events.warned, cache_folder(config))
    return Assembled(
        training=training,
        validate=build_validate(config, prepared, events),
        save=build_save(config, resolved, family, trained, prepared, folder, events, stop),
        sample=build_sample(config, family, training, prepared, folder, assistants, attention, events, stop),
        attention=attention,
        compilation=compilation,
    )


def kept_together(config: RunConfig, device: torch.device, warn: Callable[[str], None]) -> RunConfig:
    """The config without moves between the host and a GPU that have one memory, which would free nothing."""
    memory = config.memory
    moves = {"stream": 0.0} if memory.stream not in (0.0, "auto") else {}
    moves |= {"offload_activations": False} if memory.offload_activations is True else {}
    moves |= {"offload_optimizer": False} if memory.offload_optimizer else {}
    if not moves or device.type != "cuda" or not shares_memory(device):
        return config
    named = " and ".join(f"memory.{option}" for option in moves)
    warn(f"{named} left off: the GPU shares the system's memory, so that moving to the host frees nothing")
    return config.model_copy(update={"memory": memory.model_copy(update=moves)})


def cache_folder(config: RunConfig) -> Path:
    return config.memory.cache_folder or user_cache_folder()


def build_attention(config: RunConfig, run: Training, prepared: Prepared) -> Attention:
    """The kernels that answer the calls of the run's largest batch.

    Raises:
        MachineError: the one that is asked for is not there, or cannot answer them.
    """

    def calls() -> list[Call]:
        found: dict[Kind, Call] = {}
        whole = next(prepared.batches(prepared.plan.largest(), workers=0)).to(run.device)
        batch = whole.parts(run.batch_parts)[0]
        with torch.no_grad(), recorded(found):
            for _ in run.objective.turns(run.family, run.told(batch), run.seed):
                continue
        return list(found.values())

    if not run.family.denoisers:
        return Attention()
    return choose(config.memory.attention, calls, run.device, cache_folder(config))


def build_training(
    config: RunConfig,
    family: Family,
    trained: Mapping[str, Trained],
    prepared: Prepared,
    device: torch.device,
    dtype: torch.dtype,
) -> Training:
    train = config.train
    groups: list[dict[str, Any]] = []
    parameters: dict[str, torch.nn.Parameter] = {}
    constants: dict[str, torch.Tensor] = {}
    for part, one in trained.items():
        groups += one.parameter_groups(train.optimizer.learning_rate)
        parameters |= {f"{part}.{name}": value for name, value in one.named_parameters().items()}
        if isinstance(one, AdapterSet):
            constants |= {f"{part}.{name}": value for name, value in one.constants().items()}
    optimizer = build_steps(config, groups, device)
    release = None
    if config.memory.gradient_release:
        assert isinstance(optimizer, OneByOne)
        release = GradientRelease(list(parameters.values()), optimizer.step_one, train.max_grad_norm)
    words = {part: one for part, one in trained.items() if isinstance(one, NewWord)}
    asked = word_of(config.method)
    if asked is not None and asked.lengths == "vocabulary":
        optimizer.register_step_post_hook(keeps_lengths(words))
    run = Training(
        family=family,
        objective=build_objective(config, family, trained),
        parameters=parameters,
        optimizer=optimizer,
        learning_rate_factor=partial(learning_rate_factor, train.schedule, total=train.steps),
        batches=partial(prepared.batches, workers=train.loader_workers),
        batches_per_epoch=prepared.plan.batches_per_epoch,
        device=device,
        dtype=dtype,
        scaler=torch.amp.GradScaler(device.type, enabled=train.precision == "fp16"),
        seed=config.seed,
        steps=train.steps,
        accumulate=train.accumulate,
        batch_parts=1 if config.memory.batch_parts == "auto" else config.memory.batch_parts,
        max_grad_norm=train.max_grad_norm,
        ema=Ema(parameters, train.ema.decay or 0.99, train.ema.width) if train.ema else None,
        constants=constants,
        model_identity=family.identity("denoiser" if family.denoisers else "vae"),
        data_fingerprint=prepared.plan.fingerprint,
        held_out_fingerprint=held_out_fingerprint(config, prepared),
        release=release,
    )
    if trains_text(config.method):
        run.model_identity += family.identity("text_encoders")
        run.told = partial(with_prompts, family)
    return run


def build_objective(
    config: RunConfig, family: Family, trained: Mapping[str, Trained]
) -> Denoising | Reconstruction:
    if isinstance(config.method, Vae):
        return Reconstruction.of(config.method, DTYPES[config.train.precision])
    return with_adapters(Denoising.of(config.train.objective, family), trained)


def with_prompts(family: Family, batch: Batch) -> Batch:
    """The batch with its captions encoded now, so that gradients reach what is trained of the text encoders."""
    return replace(batch, conditioning=family.encode_prompts(batch.captions).merged(batch.conditioning))


def with_adapters(objective: Denoising, trained: Mapping[str, Trained]) -> Denoising:
    """The objective with the denoisers as they were before training, and at other strengths of what trains; as it is
    where their own weights move."""
    adapters = [one for one in trained.values() if isinstance(one, AdapterSet)]
    if len(adapters) < len(trained):
        return objective
    return replace(objective, frozen=partial(all_disabled, adapters), strength=partial(all_at, adapters))


def build_steps(
    config: RunConfig, groups: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer, weight by weight and with its state on the host where the memory section says so."""
    memory = config.memory
    section, singly = config.train.optimizer, memory.steps_singly
    optimizer = build_optimizer(section, groups, seed=config.seed, one_by_one=singly)
    if memory.offload_optimizer:
        assert isinstance(optimizer, OneByOne)
        optimizer.keeper = StatesOnHost(transfer_to(device), partial(waited_for, device))
    return optimizer


def held_out_fingerprint(config: RunConfig, prepared: Prepared) -> str:
    """Changes when held-out losses of before and after no longer compare; empty without validation."""
    section = config.train.validation
    if section is None or prepared.held_out is None:
        return ""
    return f"{prepared.held_out.fingerprint} at {section.times}"


def build_validate(config: RunConfig, prepared: Prepared, events: Events) -> Validate | None:
    section, plan = config.train.validation, prepared.held_out
    if section is None or plan is None:
        return None

    def batches() -> Iterator[Batch]:
        stream = prepared.batches(0, workers=0, plan=plan)
        return (next(stream) for _ in range(plan.batches_per_epoch))

    improvement = section.early_stop.min_improvement if section.early_stop else 0.0
    return Validate(batches, section.times, section.every, improvement, events)


def build_save(
    config: RunConfig,
    resolved: str,
    family: Family,
    trained: Mapping[str, Trained],
    prepared: Prepared,
    folder: RunFolder,
    events: Events,
    stop: StopRequest,
) -> Save:
    return Save(
        store=CheckpointStore(folder.checkpoints),
        results=results_of(Told(config, resolved, prepared, trained), family, folder),
        every=config.save.every,
        keep=config.save.keep,
        keep_results=keeps_all(config),
        config_hash=prepared.config_hash,
        events=events,
        stop_requested=lambda: stop.requested is not None,
        wait_for_space=config.save.on_disk_full == "wait",
    )


def build_sample(
    config: RunConfig,
    family: Family,
    run: Training,
    prepared: Prepared,
    folder: RunFolder,
    training_adapters: list[AdapterSet],
    attention: Attention,
    events: Events,
    stop: StopRequest,
) -> Sample | None:
    if not prepared.requests and not prepared.asked:
        return None

    def requests() -> Sequence[EncodedRequest]:
        if prepared.encoded:
            return prepared.requests
        return with_references(family, encode_requests(family, prepared.asked), device=run.device)

    return Sample(
        requests=requests,
        folder=folder.samples,
        every=config.sample.every,
        batch_size=config.sample.batch_size,
        disabled=training_adapters,
        attention=attention,
        events=events,
        raise_if_stopped=stop.raise_if_requested,
    )
