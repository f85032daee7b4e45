"""A pretended accelerator on the CPU: tensors that say they are elsewhere, and refuse to meet others that are not.

What a GPU would refuse is refused here too: an operation with tensors of both devices. Tensors without dimensions and
indices may come from the CPU, as everywhere. What upstream code makes in C++ by its neighbour's device, without naming
it (`pad_sequence`), is put right by hand.

`reading` lists what waits for such a device: numbers, places of what is true, whole tensors that are read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import extract_stack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda:0")
_ACROSS = ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_", "_local_scalar_dense")


# What a GPU answers only when all before it is done; besides, an index of bools is turned into places.
_READ = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc")
_READ += ("_linalg_check_errors",)
_READ_BEGINNINGS = ("_unique", "unique", "repeat_interleave")
_seen: list[list[str]] = []


@contextmanager
def reading() -> Iterator[list[str]]:
    """Where a tensor of the device is read back meanwhile: `file.py:function`, in diffusers or what trains."""
    places: list[str] = []
    _seen.append(places)
    try:
        yield places
    finally:
        _seen.remove(places)


def _note_reading() -> None:
    if not _seen:
        return
    stack = extract_stack()
    if any(frame.name == "_clip_grads_with_norm_" for frame in stack):
        return  # which moves the factor to where C++ says that the gradients are; on a GPU it is there already
    frames = [frame for frame in stack if "/diffusers/" in frame.filename or "/burnish/" in frame.filename]
    place = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].name}" if frames else "elsewhere"
    for places in _seen:
        places.append(place)


def _waits(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation on tensors of the device makes the host wait."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(isinstance(one, Far) and one.dtype == torch.bool for one in args[1])
    if name == "_to_copy":
        return kwargs.get("device") is not None and not _is_far(kwargs["device"])
    if name == "copy_":
        return not isinstance(args[0], Far)
    return name in _READ or name.startswith(_READ_BEGINNINGS)


class Far(Tensor):
    """A tensor that says it is on `DEVICE`; its values are in `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Far:
        made: Far = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="cpu"
        )
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **kwargs: Any) -> str:
        return f"Far({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        _note_reading()
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor on a GPU is no numpy array")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor on a GPU is no numpy array")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.to, Tensor.type_as, Tensor.cpu):
                return _converted(func, args, kwargs or {})
            if func is torch._C._nn.pad_sequence:
                return Far(func(*_near(args), **_near(kwargs or {})))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _backwards() -> bool:
    """Whether autograd is at work, whose C++ fills in zeros by its neighbour's device without naming it."""
    return torch._C._current_graph_task_id() != -1


def _is_far(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _near(values: Any) -> Any:
    return tree_map(lambda one: one.inner if isinstance(one, Far) else one, values)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    if isinstance(tensor, Far):
        if _is_far(device):
            return tensor
        _note_reading()
        return tensor.inner
    return Far(tensor.detach()) if _is_far(device) else tensor


def _converted(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """`to`, which would ask C++ where the tensor is."""
    device, dtype = kwargs.get("device", "cpu" if func is Tensor.cpu else None), kwargs.get("dtype")
    for one in args[1:]:
        if isinstance(one, Tensor):
            device, dtype = one.device, one.dtype
        elif isinstance(one, str | torch.device):
            device = one
        elif isinstance(one, torch.dtype):
            dtype = one
    tensor: Tensor = args[0] if device is None else moved(args[0], device)
    return tensor if dtype is None else Tensor.to(tensor, dtype)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    far = any(isinstance(one, Far) for one in tensors)
    strangers = [tuple(one.shape) for one in tensors if not isinstance(one, Far) and one.dim()]
    own = bool(args) and isinstance(args[0], Far)
    if (
        far
        and strangers
        and not _backwards()
        and (name not in _ACROSS or (name.startswith("index") and not own))
    ):
        raise RuntimeError(f"two devices in {func}: {strangers} on the CPU")
    if far and _waits(name, args, kwargs):
        _note_reading()
    device = kwargs.get("device")
    if device is not None:
        far = _is_far(device)
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False} if far else kwargs
    elif name in ("copy_", "index", "index_put", "index_put_", "_index_put_impl_"):
        far = own
    result = func(*_near(args), **_near(kwargs))
    in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_")
    if in_place and args and isinstance(args[0], Tensor):
        return args[0]
    return tree_map(lambda one: Far(one) if isinstance(one, Tensor) else one, result) if far else result


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def move(module: nn.Module) -> None:
    """Put a module's parameters and buffers there."""
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None and not isinstance(parameter, Far):
                one._parameters[name] = nn.Parameter(Far(parameter.detach()), requires_grad=False)
        for name, buffer in one._buffers.items():
            if buffer is not None and not isinstance(buffer, Far):
                one._buffers[name] = Far(buffer)


def _made(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, Far):
            device = DEVICE if device is None else device
        made = original(_near(data), *args, **kwargs)
        return made if device is None else moved(made, device)

    return make


@contextmanager
def pretended() -> Iterator[None]:
    with torch.device("cpu"):
        torch.tensor(
            []
        )  # at the first of these torch notes, for good, which functions make tensors: not ours
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), _Mode():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch, "tensor", _made(torch.tensor))
        patch.setattr(torch, "as_tensor", _made(torch.as_tensor))
        yield
