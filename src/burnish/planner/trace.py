"""One training step on tensors without data: the real family, adapters, objective and optimizer, no weights, no GPU.

What is counted is what the code does, so a change there changes the plan. Fake tensors (torch's FakeTensorMode) know
shapes, types and storages only. Upper bound for compiled blocks, which keep less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves

from burnish.adapters.attached import AdapterSet
from burnish.adapters.casting import cast_once
from burnish.adapters.own_weights import OwnWeights
from burnish.conditioning import Conditioning
from burnish.data.batch import Batch
from burnish.family import Family
from burnish.memory.gradient_release import GradientRelease
from burnish.memory.state_offload import StatesOnHost
from burnish.objective import Denoising
from burnish.optim.one_by_one import OneByOne
from burnish.planner.known_values import Answered
from burnish.planner.live_bytes import ROUNDING, LiveBytes
from burnish.planner.lowering import cuda_lowering
from burnish.planner.profile import Profile, profile_of
from burnish.planner.skeletons import keep_weights, without_data

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step is given: pixels as (height, width), frames, pictures per micro-step."""

    height: int
    width: int
    frames: int = 1
    batch: int = 1
    references: int = 0  # pictures that the model is shown beside the caption
    masked: bool = False  # the first of them has a hole


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the step is made; each part is that of the run itself."""

    # By denoiser, then by module what its adapter is; or, of its own weights, by weight its learning rate.
    choices: Mapping[str, Mapping[str, Any]]
    objective: Denoising
    optimizer: Callable[[Groups], torch.optim.Optimizer]
    kept_as: str | None = None  # format of the large frozen layers; None: in the run's number type
    keep_activations: Callable[[Family], None] = lambda family: None  # sets what is kept for backward
    accumulates: bool = False
    averages: bool = False
    dropout: float = 0.0
    own_weights: bool = False  # the denoisers' own weights train, in place of adapters
    releases: bool = False  # each is stepped in backward; the optimizer is then a OneByOne, as with the next
    offloads: bool = False  # the optimizer's state waits on the host
    shown: Callable[[Shape], Conditioning] = lambda shape: Conditioning({})  # of the references


def trace_step(skeleton: Callable[[], Family], shape: Shape, recipe: Recipe, *, cuda: bool = True) -> Profile:
    """Trace one step.

    Args:
        skeleton: makes the family without weights; it is changed and thrown away.
        cuda: attention and norms as CUDA runs them, else as the CPU does.
    """
    family = skeleton()
    noisy, _, conditioning = family.example(shape.height, shape.width, shape.batch, shape.frames)
    conditioning = conditioning.merged(recipe.shown(shape))
    if recipe.kept_as is not None:
        keep_weights(family, recipe.kept_as)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for denoiser in family.denoisers.values():
            without_data(denoiser)
        groups = _made_trainable(family, recipe, noisy.dtype)
        recipe.keep_activations(family)
        parameters = [one for group in groups for one in group["params"]]
        optimizer, host = recipe.optimizer(groups), _Host()
        if cuda:
            _step_as_on_cuda(optimizer)
        if recipe.offloads:
            assert isinstance(optimizer, OneByOne)
            optimizer.keeper = StatesOnHost(host, lambda: None)
        _touch_state(optimizer, parameters)
        batch = batch_without_data(noisy, conditioning, sound_of(family, shape))
    # The mode is off from here on: fake tensors bring their own, and what code makes out of nothing (positions, masks)
    # keeps its values, so that it can be read on the host as in a real step.
    with cuda_lowering() if cuda else nullcontext():
        counted = LiveBytes(fake, rounding=ROUNDING if cuda else 1, elsewhere=host.storages)
        return _step(family, batch, recipe, parameters, optimizer, counted)


def _made_trainable(family: Family, recipe: Recipe, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Optimizer groups of what the recipe trains."""
    groups: list[dict[str, Any]] = []
    for part, chosen in recipe.choices.items():
        denoiser = family.denoisers[part]
        if recipe.own_weights:
            groups += OwnWeights.unfreeze(denoiser, chosen).parameter_groups(1e-4)
            continue
        adapter = AdapterSet.attach(denoiser, chosen, dropout=recipe.dropout, seed=0)
        cast_once(denoiser, list(adapter.layers.values()), dtype)
        groups += adapter.parameter_groups(1e-4)
    return groups


def _step_as_on_cuda(optimizer: torch.optim.Optimizer) -> None:
    """By one kernel, where torch's own optimizers would make copies of all that they step (optim/makers.py)."""
    single = optimizer.inside if isinstance(optimizer, OneByOne) else []
    for group in (group for one in (optimizer, *single) for group in one.param_groups):
        if "fused" in group and "foreach" in group:
            group["fused"], group["foreach"] = True, False


class _Host:
    """Host memory of a trace: rooms whose storages are told apart from the device's."""

    def __init__(self) -> None:
        self.storages: set[int] = set()
        self._rooms: list[Tensor] = []  # alive, so that no other storage takes a place that is noted

    def host_room(self, size: int) -> Tensor:
        room = torch.empty(size, dtype=torch.uint8)
        self._rooms.append(room)
        self.storages.add(room.untyped_storage()._cdata)
        return room

    def device_room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def start(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def finish(self, begun: object) -> None:
        return


def sound_of(family: Family, shape: Shape) -> tuple[int, ...] | None:
    """(C, L, F) of the sound of clips of this shape; None where there is none."""
    if family.audio is None or shape.frames == 1:
        return None
    return family.audio.shape.of(shape.frames / family.defaults.fps)


def batch_without_data(
    noisy: Tensor, conditioning: Conditioning, sound: tuple[int, ...] | None = None
) -> Batch:
    """A batch without data but in whole numbers and masks, which keep their values where they are known.

    Captions of several rows are not of one length. To be called under FakeTensorMode.
    """
    with unset_fake_temporarily():
        known = {name: _known(name, one, conditioning) for name, one in conditioning.items()}
    told = {
        name: torch.empty(conditioning[name].shape, dtype=conditioning[name].dtype) if one is None else one
        for name, one in known.items()
    }
    ids = tuple(str(index) for index in range(len(noisy)))
    latents = torch.empty(noisy.shape, dtype=noisy.dtype)
    audio = None if sound is None else torch.empty(len(noisy), *sound, dtype=noisy.dtype)
    return Batch(latents, Conditioning(told), torch.ones(len(noisy)), ids, ids, 0, audio)


def _known(name: str, tensor: Tensor, conditioning: Conditioning) -> Tensor | None:
    on_host = conditioning.on_host(name)
    if on_host is None or tensor.is_floating_point():
        return None
    on_host = on_host.clone()
    if name.startswith("mask") and on_host.dim() > 1 and on_host.shape[1]:
        on_host[1:, -1] = 0
    return on_host


def _step(
    family: Family,
    batch: Batch,
    recipe: Recipe,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    counted: LiveBytes,
) -> Profile:
    times_B = torch.full((len(batch.sample_ids),), 0.5)
    averages = [parameter.detach().clone() for parameter in parameters] if recipe.averages else []
    if recipe.accumulates:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    blocks = family.blocks()
    frozen = _by_block(family, blocks, lambda one: 0 if one.requires_grad else _size(one))
    counted.follow([list(one.parameters()) + list(one.buffers()) for one in family.denoisers.values()])
    counted.follow([parameter.grad for parameter in parameters if parameter.grad is not None])
    counted.follow([batch.latents_BCHW, batch.audio_BCLF, list(batch.conditioning.values()), averages])
    counted.follow(list(optimizer.state.values()))
    if isinstance(optimizer, OneByOne) and isinstance(optimizer.keeper, StatesOnHost):
        counted.follow(optimizer.keeper.device_rooms)
    release = None
    if recipe.releases:
        assert isinstance(optimizer, OneByOne)
        release = GradientRelease(parameters, optimizer.step_one, 1.0)
    once_more = int(recipe.averages) + int(recipe.accumulates)

    def with_state(one: Tensor) -> int:
        if not one.requires_grad:
            return 0
        state = [leaf for leaf in tree_leaves(optimizer.state.get(one)) if isinstance(leaf, Tensor)]
        state = [leaf for leaf in state if leaf.untyped_storage()._cdata not in counted.elsewhere]
        return _size(one) * (1 + once_more) + sum(_size(leaf) for leaf in state)

    trained = _by_block(family, blocks, with_state)
    counted.begin()
    with counted, _marked(counted, blocks):
        noise = torch.empty_like(batch.latents_BCHW, dtype=torch.float32)
        audio = batch.audio_BCLF
        audio_noise = None if audio is None else torch.empty_like(audio, dtype=torch.float32)
        loss_B = recipe.objective.losses_at(family, batch, noise, times_B, None, audio_noise)
        counted.mark("tail", None)
        loss = (loss_B * batch.weight_B).sum() / len(batch.sample_ids)
        with nullcontext() if release is None else release.moving():
            torch.autograd.backward(loss)
        counted.mark("rest", None)
        if release is None:
            clip_grad_norm_(parameters, 1.0)
        counted.mark("optimizer", None)
        if release is None:
            with Answered():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    singly = isinstance(optimizer, OneByOne) and not optimizer.together
    return replace(profile_of(counted, frozen, trained), singly=singly)


def _touch_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Give the optimizer its state, which it makes at the first step: the second is the one to trace."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with Answered():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def _marked(counted: LiveBytes, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Mark each block's forward, and its backward when the first gradient of what it gave arrives."""
    handles = []
    seen: set[int] = set()

    def backward_of(block: int) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            if block not in seen:
                seen.add(block)
                counted.mark("backward", block)

        return arrived

    def hooks(block: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def begins(*_: object) -> None:
            counted.mark("forward", block)

        def ends(module: nn.Module, args: object, output: object) -> None:
            counted.mark("between", None)
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(backward_of(block))  # type: ignore[no-untyped-call]

        return begins, ends

    for index, block in enumerate(blocks):
        begins, ends = hooks(index)
        handles += [block.register_forward_pre_hook(begins), block.register_forward_hook(ends)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_block(
    family: Family, blocks: Sequence[nn.Module], size: Callable[[Tensor], int]
) -> tuple[list[int], int]:
    """Bytes of parameters and buffers in each block, and of those outside of blocks."""

    def total(module: nn.Module) -> int:
        return sum(size(one) for one in [*module.parameters(), *module.buffers()])

    inside = [total(block) for block in blocks]
    return inside, sum(total(one) for one in family.denoisers.values()) - sum(inside)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
