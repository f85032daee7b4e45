"""What is saved, what is found, what is kept."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from burnish.checkpoint import manifest as manifests
from burnish.checkpoint.content import required_bytes
from burnish.checkpoint.store import CheckpointStore
from burnish.errors import CheckpointError, NonFiniteLoss

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def content(step: int) -> dict[str, dict[str, Tensor]]:
    return {
        "adapter": {"w": torch.full((4, 3), float(step)), "v": torch.arange(5) + step},
        "optimizer": {"w:exp_avg": torch.full((4, 3), -float(step))},
    }


def save(store: CheckpointStore, step: int, mark: int | None = None) -> Path:
    value = step if mark is None else mark
    return store.save(step, content(value), {"mark": value}, config_hash="abc")


def holds(store: CheckpointStore, step: int, mark: int | None = None) -> None:
    """The newest that loads is exactly what was saved at `step`."""
    value = step if mark is None else mark
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == step
    assert loaded.state == {"mark": value}
    for file, tensors in content(value).items():
        assert loaded.tensors[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded.tensors[file][name], tensor)


def damage(path: Path) -> None:
    data = bytearray((path / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "adapter.safetensors").write_bytes(data)


def test_saved_and_loaded_are_the_same(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.newest() is None
    assert store.load_newest() is None
    path = save(store, 250)
    assert path == tmp_path / "run" / "checkpoints" / "step-00000250"
    holds(store, 250)
    assert sorted(os.listdir(path)) == [
        "adapter.safetensors", "manifest.json", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    assert os.listdir(store.folder) == ["step-00000250"]


def test_the_files_are_safetensors_of_every_dtype_layout_and_shape(tmp_path: Path) -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 50
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES}
    tensors |= {
        "transposed": values.t(),
        "a view with gaps": values[::2, ::3],
        "expanded": torch.ones(1).expand(7),
        "empty": torch.zeros(0, 3),
        "no dimension": torch.tensor(2.5),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "a parameter": torch.nn.Parameter(values.clone()),
        'quo"te ü': values[0],
    }
    path = CheckpointStore(tmp_path).save(1, {"adapter": tensors}, {}, config_hash="x")
    with safe_open(path / "adapter.safetensors", framework="pt") as file:
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            # equal bytes, because float8 has no comparison
            assert torch.equal(as_bytes(read), as_bytes(tensor.detach())), name
    raw = (path / "adapter.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0, f"{name} is not aligned"


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_the_manifest_says_what_it_is_about(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 7)
    written = json.loads((path / "manifest.json").read_text())["manifest"]
    assert written["step"] == 7
    assert written["config_hash"] == "abc"
    assert written["versions"].keys() == {"burnish", "torch", "python"}
    assert {name: entry["size"] for name, entry in written["files"].items()} == {
        name: (path / name).stat().st_size for name in os.listdir(path) if name != "manifest.json"
    }


def test_the_bytes_foretold_are_the_bytes_taken(tmp_path: Path) -> None:
    tensors = {"adapter": {"w": torch.zeros(1000, 1000)}, "ema": {"w": torch.zeros(333)}}
    path = CheckpointStore(tmp_path).save(1, tensors, {"x": "y" * 5000}, config_hash="x")
    taken = sum(file.stat().st_size for file in path.iterdir())
    assert taken <= required_bytes(tensors, {"x": "y" * 5000}) <= taken + 5 * 4096


@pytest.mark.parametrize("file", ["adapter", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_saved(file: str, value: float, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    tensors = content(2)
    tensors[file] = {"fine": torch.zeros(3), "blocks.3.lora_B": torch.tensor([[0.0, value], [value, 1.0]])}
    with pytest.raises(NonFiniteLoss, match=rf"{file} tensor blocks.3.lora_B: 2 of 4 values"):
        store.save(2, tensors, {}, config_hash="x")
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_an_optimizer_may_hold_infinity(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"optimizer": {"d": torch.tensor(float("inf"))}}, {}, config_hash="x")
    assert torch.isinf(store.load(path).tensors["optimizer"]["d"])


def test_what_the_formats_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with pytest.raises(CheckpointError, match="complex64"):
        store.save(2, {"adapter": {"w": torch.zeros(2, dtype=torch.complex64)}}, {}, config_hash="x")
    with pytest.raises(CheckpointError, match="JSON"):
        store.save(2, content(2), {"loss": float("nan")}, config_hash="x")
    with pytest.raises(CheckpointError, match="no name"):
        store.save(2, {"../adapter": {}}, {}, config_hash="x")
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2, mark=20)
    save(store, 2, mark=21)
    holds(store, 2, mark=21)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]


def test_a_step_saved_over_a_damaged_one_keeps_the_damaged_one_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    for mark in (20, 21, 22):
        damage(save(store, 2, mark=mark))
    with caplog.at_level(logging.WARNING):
        save(store, 2, mark=23)
    holds(store, 2, mark=23)
    assert sorted(os.listdir(tmp_path / "broken")) == ["step-00000002", "step-00000002-2", "step-00000002-3"]
    assert "adapter.safetensors is damaged" in caplog.text
    assert store.steps() == [1, 2]


def test_a_superseded_one_is_used_when_the_new_one_never_came_or_is_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = save(store, 2, mark=20)
    os.rename(path, tmp_path / "step-00000002.superseded")  # as a crash in the middle leaves it
    holds(store, 2, mark=20)
    assert store.prune(2) == []
    holds(store, 2, mark=20)
    damage(save(CheckpointStore(tmp_path / "other"), 2, mark=21))
    shutil.copytree(tmp_path / "other" / "step-00000002", path)
    holds(store, 2, mark=20)
    save(store, 2, mark=22)
    holds(store, 2, mark=22)
    assert sorted(os.listdir(tmp_path)) == ["broken", "other", "step-00000001", "step-00000002"]


def test_a_checkpoint_that_was_renamed_is_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    shutil.copytree(save(store, 2), tmp_path / "step-00000009")
    found = store.newest()
    assert found is not None
    assert found.step == 2
    assert found.passed_over == [
        f"{tmp_path / 'step-00000009' / 'manifest.json'} is of step 2; the folder was renamed"
    ]
    holds(store, 2)


def test_a_checkpoint_under_another_steps_name_is_set_aside_and_not_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    os.rename(save(store, 1), tmp_path / "step-00000002")
    save(store, 2)
    holds(store, 2)
    assert store.load(tmp_path / "broken" / "step-00000002").step == 1


def test_a_format_from_the_future_is_passed_over_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "FORMAT", 2)
        path = save(store, 5)
    with pytest.raises(CheckpointError, match="format 2; this version of Burnish reads up to 1") as caught:
        store.load(path)
    assert caught.value.remedy == "Update Burnish."


def test_only_damaged_ones_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        damage(save(store, step))
    for find in (store.newest, store.load_newest):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies") as caught:
            find()
        for step in (1, 2):
            assert str(tmp_path / f"step-0000000{step}" / "adapter.safetensors") in caught.value.message
    assert store.steps() == [1, 2]


def test_a_large_file_is_checked_by_size_and_hashed_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    monkeypatch.setattr(manifests, "HASHED_BELOW", 10)
    damage(save(store, 2))
    quick, full = store.newest(), store.newest("full")
    assert quick is not None
    assert full is not None
    assert (quick.step, full.step) == (2, 1)
    header = bytearray((tmp_path / "step-00000002" / "adapter.safetensors").read_bytes())
    header[:8] = b"\xff" * 8
    (tmp_path / "step-00000002" / "adapter.safetensors").write_bytes(header)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    assert "step-00000002/adapter.safetensors" in loaded.passed_over[0]


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 8):
        save(store, step)
    assert store.prune(3, protect={2}) == [1, 3, 4]
    assert store.steps() == [2, 5, 6, 7]
    assert store.prune(3, protect={2}) == []
    assert sorted(os.listdir(tmp_path)) == [f"step-0000000{step}" for step in (2, 5, 6, 7)]


@pytest.mark.parametrize("keep", [-1, 0, 1, 2])
def test_prune_keeps_two_whatever_it_is_told(keep: int, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 5):
        save(store, step)
    store.prune(keep)
    assert store.steps() == [3, 4]


def test_prune_counts_only_what_verifies_and_deletes_nothing_that_does_not(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 8):
        save(store, step)
    for step in (2, 6, 7):
        damage(tmp_path / f"step-0000000{step}")
    assert store.prune(2) == [1, 3]
    assert store.steps() == [2, 4, 5, 6, 7]
    holds(store, 5)
    damage(tmp_path / "step-00000005")  # changed after it verified: the memory of that must not count
    assert store.prune(2) == []
    holds(store, 4)
    damage(tmp_path / "step-00000004")
    assert store.prune(2) == []
    assert store.steps() == [2, 4, 5, 6, 7]


def test_prune_drops_a_superseded_one_whose_successor_verifies(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    shutil.copytree(save(store, 2), tmp_path / "step-00000002.superseded")
    assert store.prune(2) == []
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000002.superseded")
    damage(tmp_path / "step-00000002")
    store.prune(2)
    holds(store, 2)


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    for name in ("step-abc", "step-1", "notes", ".tmp-00000002-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    holds(store, 1)
    assert store.steps() == [1]
    store.prune(2)
    assert len(os.listdir(tmp_path)) == 6
