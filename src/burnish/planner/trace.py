"""One training step on tensors without data: the real family, adapters, objective and optimizer, no weights, no GPU.

What is counted is what the code does, so a change there changes the plan. Fake tensors (torch's FakeTensorMode) know
shapes, types and storages only. Upper bound for compiled blocks, which keep less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves

from burnish.conditioning import Conditioning
from burnish.data.batch import Batch, Direction
from burnish.family import Family
from burnish.memory.gradient_release import GradientRelease
from burnish.memory.state_offload import StatesOnHost
from burnish.objective import Denoising
from burnish.optim.one_by_one import OneByOne
from burnish.planner.known_values import Answered
from burnish.planner.lesson import Asked
from burnish.planner.live_bytes import ROUNDING, LiveBytes
from burnish.planner.lowering import cuda_lowering
from burnish.planner.made import Host, made_trainable, step_as_on_cuda, touch_state
from burnish.planner.profile import Profile, profile_of
from burnish.planner.recipe import Recipe, Shape
from burnish.planner.skeletons import keep_texts, keep_weights, modules_of, without_data


def trace_step(skeleton: Callable[[], Family], shape: Shape, recipe: Recipe, *, cuda: bool = True) -> Profile:
    """Trace one step.

    Args:
        skeleton: makes the family without weights; it is changed and thrown away.
        cuda: attention and norms as CUDA runs them, else as the CPU does.
    """
    family = skeleton()
    rows = shape.lesson.rows(shape.batch)
    noisy, _, conditioning = family.example(shape.height, shape.width, rows, shape.frames)
    conditioning = conditioning.merged(recipe.shown(replace(shape, batch=rows)))
    if recipe.kept_as is not None:
        keep_weights(family, recipe.kept_as)
    if recipe.texts_kept_as is not None:
        keep_texts(family, recipe.texts_kept_as)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for module in modules_of(family):
            without_data(module)
        groups, objective = made_trainable(family, recipe, noisy.dtype)
        recipe.keep_activations(family)
        parameters = [one for group in groups for one in group["params"]]
        optimizer, host = recipe.optimizer(groups), Host()
        if cuda:
            step_as_on_cuda(optimizer)
        if recipe.offloads:
            assert isinstance(optimizer, OneByOne)
            optimizer.keeper = StatesOnHost(host, lambda: None)
        touch_state(optimizer, parameters)
        batch = shape.lesson.taught(batch_without_data(noisy, conditioning, sound_of(family, shape)))
        waiting = [_more_rows(one, shape.parts - 1) for one in _told(batch, recipe)]
    # The mode is off from here on: fake tensors bring their own, and what code makes out of nothing (positions, masks)
    # keeps its values, so that it can be read on the host as in a real step.
    with cuda_lowering() if cuda else nullcontext():
        counted = LiveBytes(fake, rounding=ROUNDING if cuda else 1, elsewhere=host.storages)
        counted.follow(waiting)
        return _step(family, batch, recipe, objective, parameters, optimizer, counted)


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
    objective: Denoising,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    counted: LiveBytes,
) -> Profile:
    times_B = torch.full((len(batch.sample_ids),), 0.5)
    averages = [parameter.detach().clone() for parameter in parameters] if recipe.averages else []
    turns = objective.turn_count(batch)
    adds_up = recipe.accumulates or turns > 1  # at the last turn there are gradients already
    if adds_up:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    blocks = family.blocks()
    frozen = _by_block(family, blocks, lambda one: 0 if one.requires_grad else _size(one))
    counted.follow([list(one.parameters()) + list(one.buffers()) for one in modules_of(family)])
    counted.follow([parameter.grad for parameter in parameters if parameter.grad is not None])
    counted.follow([_told(batch, recipe), averages])
    if isinstance(batch.contrast, Direction):
        counted.follow([list(one.values()) for one in (batch.contrast.positive, batch.contrast.negative)])
    counted.follow(list(optimizer.state.values()))
    if isinstance(optimizer, OneByOne) and isinstance(optimizer.keeper, StatesOnHost):
        counted.follow(optimizer.keeper.device_rooms)
    release = None
    if recipe.releases:
        assert isinstance(optimizer, OneByOne)
        release = GradientRelease(parameters, optimizer.step_one, 1.0)
    once_more = int(recipe.averages) + int(adds_up)

    def with_state(one: Tensor) -> int:
        if not one.requires_grad:
            return 0
        state = [leaf for leaf in tree_leaves(optimizer.state.get(one)) if isinstance(leaf, Tensor)]
        state = [leaf for leaf in state if leaf.untyped_storage()._cdata not in counted.elsewhere]
        return _size(one) * (1 + once_more) + sum(_size(leaf) for leaf in state)

    trained = _by_block(family, blocks, with_state)
    counted.begin()
    with counted, _marked(counted, blocks):
        if recipe.caption is not None:
            batch = _said(family, batch, recipe.caption)
            counted.follow(list(batch.conditioning.values()))
        noise = torch.empty_like(batch.latents_BCHW, dtype=torch.float32)
        audio = batch.audio_BCLF
        audio_noise = None if audio is None else torch.empty_like(audio, dtype=torch.float32)
        mixed = torch.empty_like(noise) if objective.input_perturbation else None
        alike = isinstance(batch.contrast, Direction)
        asked = Asked(partial(_predicted, family, counted), turns, alike=alike)
        with closing(objective.turns_at(family, batch, noise, times_B, asked, audio_noise, mixed)) as stream:
            for turn in stream:
                if asked.is_last:
                    counted.mark("tail", None)
                loss = (turn.loss_B * turn.weight_B).sum() / len(batch.sample_ids)
                with nullcontext() if release is None else release.moving():
                    torch.autograd.backward(loss)
                asked.turn += 1
        counted.mark("rest", None)
        if release is None:
            clip_grad_norm_(parameters, 1.0)
        counted.mark("optimizer", None)
        if release is None:
            with Answered():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    singly = isinstance(optimizer, OneByOne) and not optimizer.together
    return replace(profile_of(counted, frozen, trained, turns, asked.skipped), singly=singly)


def _told(batch: Batch, recipe: Recipe) -> list[Tensor]:
    """What there is of a batch before the step; not what captions are encoded to in it."""
    parts = [batch.latents_BCHW, batch.audio_BCLF, batch.counted, batch.kept]
    parts += (batch.unprompted or {}).values()
    parts += batch.conditioning.values() if recipe.caption is None else []
    return [one for one in parts if one is not None]


def _more_rows(tensor: Tensor, times: int) -> Tensor:
    """Of the same batch, which wait for their turn."""
    return tensor.new_empty(times * len(tensor), *tensor.shape[1:])


def _said(family: Family, batch: Batch, caption: str) -> Batch:
    """As a run's step encodes captions where something of the text encoders trains."""
    told = family.encode_prompts([caption] * len(batch.sample_ids))
    return replace(batch, conditioning=batch.conditioning.merged(told))


def _predicted(
    family: Family, counted: LiveBytes, noisy: Tensor, t_B: Tensor, conditioning: Conditioning
) -> Tensor:
    if torch.is_grad_enabled():
        return family.predict(noisy, t_B, conditioning)
    counted.mark("ahead", None)
    said = family.predict(noisy, t_B, conditioning)
    counted.mark("between", None)
    return said


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
            counted.mark("forward" if torch.is_grad_enabled() else "ahead", block)

        def ends(module: nn.Module, args: object, output: object) -> None:
            counted.mark("between" if torch.is_grad_enabled() else "ahead", None)
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
    """Bytes of parameters and buffers in each block, and of those outside of blocks, in text encoders for one."""

    def total(module: nn.Module) -> int:
        return sum(size(one) for one in [*module.parameters(), *module.buffers()])

    inside = [total(block) for block in blocks]
    return inside, sum(total(one) for one in modules_of(family)) - sum(inside)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
