"""Optimizer state as named tensors and plain values: it fits safetensors and JSON, and returns bit for bit.

A tensor is stored as `PARAMETER:KEY`, such as `blocks.0.attn.to_q.lora_A:exp_avg`, and one in a list as
`PARAMETER:KEY.PLACE`. By name and not by position, so that a checkpoint says what does not fit instead of giving one
parameter the moments of another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from burnish.errors import CheckpointError
from burnish.optim.learned import kind_of, learned_keys
from burnish.optim.one_by_one import OneByOne

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def pack_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Parameter, str]
) -> tuple[dict[str, Tensor], Json]:
    """Everything the optimizer has learned.

    Args:
        optimizer: at any moment between two steps.
        names: a name without ":" for each of its parameters.

    Returns:
        Tensors, not copied, on the devices they live on; and the rest as JSON without NaN or infinity.

    Raises:
        CheckpointError: a parameter without a name, or a value that is neither tensor nor plain.
    """
    if isinstance(optimizer, OneByOne) and optimizer.keeper is not None:
        optimizer.keeper.settle()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Json] = {}
    shapes: dict[str, Json] = {}
    for parameter in _parameters(optimizer):
        name = _name_of(parameter, names)
        shapes[name] = list(parameter.shape)
        values: dict[str, Json] = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}:{key}"] = value.detach()
            else:
                values[key] = _encoded(value, f"{name}:{key}", tensors)
        plain[name] = values
    learned = learned_keys(optimizer)
    groups: list[Json] = [
        {key: _encoded(group[key], key, {}) for key in learned if key in group}
        for group in optimizer.param_groups
    ]
    return tensors, {
        "optimizer": kind_of(optimizer),
        # Products of matrices round by their layout: what lay by columns has to lie by columns again.
        "strides": {name: list(one.stride()) for name, one in tensors.items() if _lies_its_own_way(one)},
        "shapes": shapes,
        "plain": plain,
        "groups": groups,
    }


def unpack_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Parameter, str],
    tensors: Mapping[str, Tensor],
    state: Json,
) -> None:
    """Put back what `pack_state` gave, on the parameters' devices and without a change of dtype.

    What a `StateKeeper` keeps elsewhere stays on the CPU until its parameter is stepped.

    Options such as learning rate, betas and weight decay stay as the optimizer was built. With the same
    options, training goes on in the same bits.

    Raises:
        CheckpointError: another kind of optimizer, other parameters or other shapes; nothing was changed.
    """
    saved: Any = state
    own = {_name_of(parameter, names): parameter for parameter in _parameters(optimizer)}
    _must_fit(optimizer, own, tensors, saved)
    strides: dict[str, list[int]] = saved.get("strides", {})
    laid = {name: _laid(one, strides.get(name)) for name, one in tensors.items()}
    restored: dict[str, dict[str, object]] = {
        name: {key: _decoded(value, laid, own[name].device) for key, value in values.items()}
        for name, values in saved["plain"].items()
    }
    on_cpu = {id(parameter) for group in optimizer.param_groups for parameter in _counted_on_cpu(group)}
    keeper = optimizer.keeper if isinstance(optimizer, OneByOne) else None
    kept = {
        name for name, held in _by_parameter(tensors).items() if keeper is not None and keeper.is_kept(held)
    }
    nested = {name for values in saved["plain"].values() for name in _nested(list(values.values()))}
    for full_name in tensors.keys() - nested:
        name, _, key = full_name.rpartition(":")
        parameter = own[name]
        counter = key == "step" and id(parameter) in on_cpu
        waits = name in kept and tensors[full_name].dim() > 0
        device = "cpu" if counter or waits else parameter.device
        restored[name][key] = _held(optimizer, parameter, key, laid[full_name], device)
    optimizer.state.clear()
    for name, values in restored.items():
        if values:
            optimizer.state[own[name]] = values
    for index, group in enumerate(optimizer.param_groups):
        # A changed learning rate may split or join groups; what is learned in them is the same in all.
        learned = saved["groups"][min(index, len(saved["groups"]) - 1)]
        group.update({key: _decoded(value, {}, torch.device("cpu")) for key, value in learned.items()})


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(":")
        if tensor.dim() > 0:
            found.setdefault(name, {})[key] = tensor
    return found


def _counted_on_cpu(group: Mapping[str, Any]) -> list[Parameter]:
    """Parameters whose `step` torch keeps on the CPU: all but those of fused and capturable optimizers."""
    return [] if group.get("fused") or group.get("capturable") else group["params"]


def _must_fit(
    optimizer: torch.optim.Optimizer, own: Mapping[str, Parameter], tensors: Mapping[str, Tensor], saved: Any
) -> None:
    remedy = "Keep the method and the optimizer as they were, or start a run of another name."
    if not isinstance(saved, dict) or not {"optimizer", "shapes", "plain", "groups"} <= saved.keys():
        raise CheckpointError("the checkpoint holds no optimizer state that can be read", remedy=remedy)
    kind = kind_of(optimizer)
    if saved["optimizer"] != kind:
        raise CheckpointError(f"the checkpoint was made with {saved['optimizer']}, not {kind}", remedy=remedy)
    shapes: dict[str, list[int]] = saved["shapes"]
    problems = [f"{name} has no stored state" for name in own if name not in shapes]
    problems += [f"{name} is not in this run" for name in shapes if name not in own]
    problems += [
        f"{name} was {tuple(shapes[name])} and is {tuple(parameter.shape)}"
        for name, parameter in own.items()
        if name in shapes and list(parameter.shape) != shapes[name]
    ]
    problems += [
        f"{name} belongs to no parameter" for name in tensors if name.rpartition(":")[0] not in shapes
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the stored optimizer state does not fit: {'; '.join(problems[:3])}{more}", remedy=remedy
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _name_of(parameter: Parameter, names: Mapping[Parameter, str]) -> str:
    name = names.get(parameter)
    if name is None:
        raise CheckpointError(f"a parameter of shape {tuple(parameter.shape)} in the optimizer has no name")
    return name


def _encoded(value: object, where: str, tensors: dict[str, Tensor]) -> Json:
    """A value as JSON; what JSON does not have becomes a mapping of one key. Tensors within lists go to `tensors`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[where] = value.detach()
        return {"tensor": where}
    if isinstance(value, list | tuple):
        entries: list[Json] = [_encoded(one, f"{where}.{place}", tensors) for place, one in enumerate(value)]
        return {"tuple": entries} if isinstance(value, tuple) else entries
    if isinstance(value, dict):
        return {"dict": {str(key): _encoded(one, f"{where}.{key}", tensors) for key, one in value.items()}}
    raise CheckpointError(f"optimizer value {where} of type {type(value).__name__} cannot be stored")


def _decoded(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> object:
    if isinstance(value, list):
        return [_decoded(one, tensors, device) for one in value]
    if not isinstance(value, dict):
        return value
    [(kind, held)] = value.items()
    match kind:
        case "float":
            return float(held)
        case "tensor":
            return tensors[held].to(device, copy=True)
        case "tuple":
            return tuple(_decoded(one, tensors, device) for one in held)
        case _:
            return {key: _decoded(one, tensors, device) for key, one in held.items()}


def _held(
    optimizer: torch.optim.Optimizer,
    parameter: Parameter,
    key: str,
    tensor: Tensor,
    device: torch.device | str,
) -> Tensor:
    """A copy where the optimizer keeps it: paged states of bitsandbytes lie in memory that it allocates itself."""
    source: Any = getattr(optimizer, "made_of", optimizer)
    if key in ("state1", "state2") and getattr(source, "is_paged", False):
        paged: Tensor = source.get_state_buffer(parameter, dtype=tensor.dtype)
        return paged.copy_(tensor)
    return tensor.to(device, copy=True)


def _lies_its_own_way(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and 0 not in tensor.stride()


def _laid(tensor: Tensor, stride: list[int] | None) -> Tensor:
    """The values in memory in the order in which they lay when they were packed."""
    tensor = tensor.detach()
    return (
        tensor
        if stride is None
        else torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    )


def _nested(value: Any) -> Iterator[str]:
    """Names of the tensors that `_encoded` put aside within `value`."""
    if isinstance(value, list):
        for one in value:
            yield from _nested(one)
    elif isinstance(value, dict):
        [(kind, held)] = value.items()
        if kind == "tensor":
            yield held
        elif kind != "float":
            yield from _nested(list(held.values()) if isinstance(held, dict) else held)
