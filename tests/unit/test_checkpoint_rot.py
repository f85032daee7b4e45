"""Bit rot: each file of the newest checkpoint damaged in each way is found, named, and stepped over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from burnish.checkpoint.manifest import verify_folder
from burnish.checkpoint.store import CheckpointStore
from burnish.errors import CheckpointError

FILES = ["adapter.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return rewrite


def flipped(position: float) -> Callable[[Path], None]:
    def flip(data: bytes) -> bytes:
        at = int(position * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :]

    return rewritten(flip)


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte flipped": flipped(0.0),
    "middle byte flipped": flipped(0.5),
    "last byte flipped": flipped(1.0),
    "one byte short": rewritten(lambda data: data[:-1]),
    "one byte longer": rewritten(lambda data: data + b"\n"),
    "half": rewritten(lambda data: data[: len(data) // 2]),
    "zeroed": rewritten(lambda data: bytes(len(data))),
    "empty": rewritten(lambda data: b""),
    "deleted": Path.unlink,
    "a folder": folder_in_its_place,
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = CheckpointStore(tmp_path_factory.mktemp("pristine"))
    for step in (1, 2):
        tensors = {name: {"w": torch.full((8, 8), step + 0.5)} for name in ("adapter", "ema", "optimizer")}
        store.save(step, tensors, {"step": step, "random": list(range(100))}, config_hash="abc")
    return store.folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_named_and_stepped_over(
    file: str, damage: Callable[[Path], None], pristine: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pristine, folder)
    damaged = folder / "step-00000002" / file
    damage(damaged)
    before = sorted(str(path) for path in folder.rglob("*"))

    store = CheckpointStore(folder)
    found, loaded = store.newest(), store.load_newest()
    assert found is not None
    assert loaded is not None
    assert found.step == loaded.step == loaded.state["step"] == 1
    assert torch.equal(loaded.tensors["adapter"]["w"], torch.full((8, 8), 1.5))
    assert len(found.passed_over) == len(loaded.passed_over) == 1
    assert found.passed_over[0] == loaded.passed_over[0]
    assert str(damaged) in found.passed_over[0]
    with pytest.raises(CheckpointError, match=file):
        store.load(folder / "step-00000002")
    assert sorted(str(path) for path in folder.rglob("*")) == before


def test_every_single_byte_of_the_manifest_counts(pristine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000002"
    shutil.copytree(pristine / "step-00000002", folder)
    raw = (folder / "manifest.json").read_bytes()
    undetected = []
    with open(folder / "manifest.json", "r+b", buffering=0) as file:
        for position, byte in enumerate(raw):
            os.pwrite(file.fileno(), bytes([byte ^ 0x01]), position)
            try:
                verify_folder(folder)
                undetected.append(position)
            except CheckpointError:
                os.pwrite(file.fileno(), bytes([byte]), position)
    verify_folder(folder)
    assert len(raw) > 500
    assert undetected == []
