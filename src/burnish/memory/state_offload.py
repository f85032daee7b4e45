"""An optimizer's state in host memory: a parameter's own comes to the device for its step, and goes home after it.

Which parameter follows which is learned in the first step; from the second on, the next ones' state is on its way while
one is stepped. What a step wrote goes home beside the computation as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from burnish.memory.transfer import Transfer, dense, padded, view_in

ROOMS = 3  # one is stepped with, one arrives, one leaves
SMALLEST = 1 << 16  # bytes of a parameter's state; less than this stays on the device


@dataclass(frozen=True, slots=True)
class _Home:
    """A parameter's state on the host, and where each tensor lies in its bytes."""

    bytes: Tensor
    places: Mapping[str, tuple[int, Tensor]]  # by key: where it begins, and its shape (meta device)
    views: Mapping[str, Tensor]  # into `bytes`

    def views_in(self, room: Tensor) -> dict[str, Tensor]:
        return {key: view_in(room, begin, shape) for key, (begin, shape) in self.places.items()}

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        return tensors.keys() == self.places.keys() and all(
            (one.shape, one.dtype) == (self.places[key][1].shape, self.places[key][1].dtype)
            for key, one in tensors.items()
        )


@dataclass(slots=True, eq=False)
class _Room:
    """Bytes on the device; `arriving` and `leaving` are copies under way, the latter of what `was`."""

    bytes: Tensor
    parameter: Parameter | None = None
    views: dict[Parameter, dict[str, Tensor]] = field(default_factory=dict)
    was: Parameter | None = None
    arriving: object | None = None
    leaving: object | None = None


@dataclass
class StatesOnHost:
    """Keeps states of `burnish.optim.one_by_one.OneByOne`.

    Args:
        wait: returns once all that was asked of the device is done.
    """

    transfer: Transfer
    wait: Callable[[], None]
    rooms: int = ROOMS
    smallest: int = SMALLEST
    _homes: dict[Parameter, _Home] = field(default_factory=dict)
    _rooms: list[_Room] = field(default_factory=list)
    _after: dict[Parameter, Parameter] = field(default_factory=dict)  # as it was the last time
    _last: Parameter | None = None

    @property
    def host_bytes(self) -> int:
        return sum(home.bytes.numel() for home in self._homes.values())

    @property
    def device_rooms(self) -> list[Tensor]:
        return [room.bytes for room in self._rooms]

    def is_kept(self, tensors: Mapping[str, Tensor]) -> bool:
        return sum(one.nbytes for one in tensors.values()) >= self.smallest

    def bring(self, parameter: Parameter, state: dict[str, Any]) -> None:
        """Have the state on the device for what is asked of it from here on."""
        tensors = _tensors(state)
        if not self.is_kept(tensors):
            return
        home = self._homes.get(parameter)
        if home is None or any(one is not home.views.get(key) for key, one in tensors.items()):
            # It was read from a checkpoint.
            home = self._settled(parameter, tensors)
        room = self._room_with(parameter) or self._begun(parameter, home)
        self._arrived(room)
        state.update(self._views(room, parameter, home))

    def send(self, parameter: Parameter, state: dict[str, Any]) -> None:
        """Let the state go home, and the next parameter's come."""
        tensors = _tensors(state)
        if not self.is_kept(tensors):
            return
        home = self._homes.get(parameter)
        if home is None or not home.fits(tensors):
            home = self._new_home(parameter, tensors)
        room = self._room_with(parameter) or self._free(home)
        for key, view in self._views(room, parameter, home).items():
            if tensors[key] is not view:  # made by this step
                view.copy_(tensors[key])
        room.leaving = self.transfer.start(home.bytes, room.bytes[: home.bytes.numel()])
        room.parameter, room.was = None, parameter
        state.update(home.views)
        self._expect_next(parameter)

    def settle(self) -> None:
        """Wait until everything is at home, for whoever reads it there."""
        for room in self._rooms:
            self._left(room)
        self.wait()

    def _expect_next(self, parameter: Parameter) -> None:
        if self._last is not None:
            self._after[self._last] = parameter
        self._last = parameter
        following = self._after.get(parameter)
        home = None if following is None else self._homes.get(following)
        if following is not None and home is not None and self._room_with(following) is None:
            self._begun(following, home)

    def _begun(self, parameter: Parameter, home: _Home) -> _Room:
        for one in self._rooms:
            if one.was is parameter:
                self._left(one)
        room = self._free(home)
        room.parameter = parameter
        room.arriving = self.transfer.start(room.bytes[: home.bytes.numel()], home.bytes)
        return room

    def _room_with(self, parameter: Parameter) -> _Room | None:
        return next((room for room in self._rooms if room.parameter is parameter), None)

    def _free(self, home: _Home) -> _Room:
        """A room for so much, the one that has been left for longest where there are as many as may be."""
        size = home.bytes.numel()
        if len(self._rooms) < self.rooms:
            self._rooms.append(_Room(self.transfer.device_room(size)))
            return self._rooms[-1]
        room = next((one for one in self._rooms if one.parameter is None), self._rooms[0])
        self._arrived(room)
        self._left(room)
        self._rooms.remove(room)
        self._rooms.append(room)
        room.parameter = None
        if room.bytes.numel() < size:
            room.views.clear()
            room.bytes = torch.empty(0, dtype=torch.uint8)  # gone before there is a larger one
            room.bytes = self.transfer.device_room(size)
        return room

    def _views(self, room: _Room, parameter: Parameter, home: _Home) -> dict[str, Tensor]:
        if parameter not in room.views:
            room.views[parameter] = home.views_in(room.bytes)
        return room.views[parameter]

    def _arrived(self, room: _Room) -> None:
        if room.arriving is not None:
            self.transfer.finish(room.arriving)
            room.arriving = None

    def _left(self, room: _Room) -> None:
        if room.leaving is not None:
            self.transfer.finish(room.leaving)
            room.leaving = room.was = None

    def _new_home(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> _Home:
        places, size = {}, 0
        for key, tensor in tensors.items():
            places[key] = (size, dense(tensor))
            size += padded(tensor.nbytes)
        room = self.transfer.host_room(size)
        views = {key: view_in(room, begin, shape) for key, (begin, shape) in places.items()}
        for one in self._rooms:
            one.views.pop(parameter, None)
        self._homes[parameter] = _Home(room, places, views)
        return self._homes[parameter]

    def _settled(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> _Home:
        """A home with these tensors in it, wherever they are."""
        room = self._room_with(parameter)
        if room is not None:  # what was on its way is not what is wanted
            self._arrived(room)
            room.parameter = None
        home = self._homes.get(parameter)
        if home is None or not home.fits(tensors):
            home = self._new_home(parameter, tensors)
        for key, view in home.views.items():
            view.copy_(tensors[key])
        return home


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is kept per weight, in plain tensors; counters stay where they are."""
    return {
        key: one
        for key, one in state.items()
        if isinstance(one, Tensor) and one.dim() > 0 and not is_traceable_wrapper_subclass(one)
    }
