"""One training step of a VAE on tensors without data. It has no repeated blocks to choose among: all of it counts as
one, which keeps what backward needs or computes it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves

from burnish.adapters.own_weights import OwnWeights, Rates
from burnish.conditioning import Conditioning
from burnish.data.batch import Batch
from burnish.family import Family
from burnish.memory.activations import Mode
from burnish.planner.known_values import Answered
from burnish.planner.live_bytes import ROUNDING, LiveBytes
from burnish.planner.lowering import cuda_lowering
from burnish.planner.made import step_as_on_cuda, touch_state
from burnish.planner.profile import Profile, profile_of
from burnish.planner.recipe import Groups, Shape
from burnish.planner.skeletons import without_data
from burnish.reconstruction import Reconstruction, autoencoder_of, set_recomputing


def trace_vae_step(
    family: Family,
    shape: Shape,
    rates: Rates,
    objective: Reconstruction,
    optimizer_of: Callable[[Groups], torch.optim.Optimizer],
    mode: Mode,
    *,
    accumulates: bool = False,
    averages: bool = False,
    cuda: bool = True,
) -> Profile:
    """Trace one step; its profile has one block.

    Args:
        family: a skeleton with the VAE; it is changed.
        shape: of the pictures as they are learned, cut where they are.
        rates: by weight that trains.
        cuda: attention, norms and autocast as CUDA runs them, else as the CPU does.
    """
    vae = autoencoder_of(family)
    set_recomputing(vae, mode == "recompute")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        without_data(vae)
        groups = OwnWeights.unfreeze(vae, rates).parameter_groups(1e-4)
        parameters = [one for group in groups for one in group["params"]]
        optimizer = optimizer_of(groups)
        if cuda:
            step_as_on_cuda(optimizer)
        touch_state(optimizer, parameters)
        copies = [one.detach().clone() for one in parameters] if averages else []
        if accumulates:
            for one in parameters:
                one.grad = torch.zeros_like(one)
        ids = tuple(str(row) for row in range(shape.batch))
        pixels_B3HW = torch.empty(shape.batch, 3, shape.height, shape.width)
        waiting = torch.empty((shape.parts - 1) * shape.batch, 3, shape.height, shape.width)
        batch = Batch(pixels_B3HW, Conditioning({}), torch.ones(shape.batch), ids, ids, 0)
    states = list(optimizer.state.values())
    counted = LiveBytes(fake, rounding=ROUNDING if cuda else 1)
    counted.follow([[*vae.parameters(), *vae.buffers()], copies, states, pixels_B3HW, waiting])
    counted.follow([one.grad for one in parameters if one.grad is not None])
    kept = [*copies, *(one.grad for one in parameters), *tree_leaves(states)]
    trained = sum(one.nbytes for one in [*parameters, *kept] if isinstance(one, Tensor))
    frozen = sum(one.nbytes for one in vae.parameters() if not one.requires_grad)
    with cuda_lowering() if cuda else nullcontext():
        counted.begin()
        _step(counted, family, batch, objective, parameters, optimizer)
    return profile_of(counted, ((0,), frozen), ((0,), trained))


def _step(
    counted: LiveBytes,
    family: Family,
    batch: Batch,
    objective: Reconstruction,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    with counted:
        counted.mark("forward", 0)
        (turn,) = objective.turns(family, batch, 0)
        loss = (turn.loss_B * turn.weight_B).sum() / len(batch.sample_ids)
        counted.mark("tail", None)
        counted.mark("backward", 0)
        torch.autograd.backward(loss)
        counted.mark("rest", None)
        clip_grad_norm_(parameters, 1.0)
        counted.mark("optimizer", None)
        with Answered():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
