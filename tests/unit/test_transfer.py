"""Host memory locked by the driver, here a recorded one, and how tensors lie in bytes."""

from __future__ import annotations

import gc

import pytest
import torch

from burnish.memory import transfer
from burnish.memory.transfer import PlainTransfer, is_dense, padded, pinned, transfer_to, view_in


class Driver:
    """CUDA's runtime, as far as memory is locked."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.status == 0:
            self.locked[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_memory_is_locked_in_whole_pages_until_its_last_tensor_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    monkeypatch.setattr(transfer, "_runtime", lambda: driver)
    room = pinned(5000)
    assert room.numel() == 5000
    assert driver.locked == {room.data_ptr(): 5000}
    assert room.data_ptr() % 4096 == 0
    part = room[512:1024].view(torch.float32)
    part.fill_(1.0)
    del room
    gc.collect()
    assert driver.locked
    assert part.sum() == 128
    del part
    gc.collect()
    assert driver.locked == {}


def test_where_the_driver_refuses_memory_is_plain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the error is not told again, as CUDA does at the next launch."""
    left = ["out of memory"]

    def launched(*_: object, **__: object) -> None:
        if left:
            raise torch.AcceleratorError(left.pop())

    monkeypatch.setattr(transfer, "_runtime", lambda: Driver(status=2))
    monkeypatch.setattr(torch, "ones", launched)
    room = pinned(3 << 20)
    room.fill_(7)
    assert not left
    assert "does not lock 3 MiB" in caplog.text
    del room
    gc.collect()


def test_a_device_without_streams_copies_at_once() -> None:
    plain = transfer_to(torch.device("cpu"))
    assert isinstance(plain, PlainTransfer)
    host, device = plain.host_room(8), plain.device_room(8)
    host.fill_(3)
    plain.finish(plain.start(device, host))
    assert torch.equal(device, host)


def test_views_of_any_type_and_order() -> None:
    room = torch.zeros(2048, dtype=torch.uint8)
    like = torch.empty(3, 5, dtype=torch.bfloat16).t()
    view = view_in(room, 512, like)
    view.fill_(1.0)
    assert (view.shape, view.stride(), view.dtype) == ((5, 3), (1, 5), torch.bfloat16)
    assert room[:512].sum() == 0
    assert torch.equal(room[512 : 512 + 30].view(torch.bfloat16), torch.ones(15, dtype=torch.bfloat16))
    assert [padded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_numbers_without_gaps() -> None:
    tensor = torch.empty(2, 3, 4)
    assert is_dense(tensor)
    assert is_dense(tensor.permute(2, 0, 1))
    assert is_dense(tensor[1])
    assert is_dense(tensor.as_strided((1, 3, 4), (7, 4, 1))), "a length of one has no step"
    assert not is_dense(tensor[:, :2])
    assert not is_dense(tensor[:, :, ::2])
    assert not is_dense(torch.empty(1, 3).expand(2, 3))
