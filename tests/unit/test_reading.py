"""Reading weight files: in threads or not, by whichever reader, the same numbers and the same complaints."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.families import reading
from burnish.families.reading import Piece, opened_whole, read_each
from burnish.families.weights import layout_of, load_module
from burnish.memory.shrinking import Shrink

WIDTH, DEPTH = 64, 12


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.register_buffer("count", torch.arange(5))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    torch.manual_seed(0)
    state = Model().state_dict()
    names = sorted(state)
    paths = [tmp_path / f"part{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        save_file({name: state[name] for name in names[number::2]}, path)
    return paths


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WORTH_THREADS", 0)
    monkeypatch.setattr(reading, "usable_processors", lambda: 4)


def loaded(files: list[Path], shrink: Shrink | None = None) -> dict[str, Tensor]:
    module = load_module(
        Model,
        layout_of(files),
        dtype=torch.bfloat16,
        device="cpu",
        what="model",
        keep_float32=("blocks.3.*",),
        shrink=shrink,
        blocks=lambda one: list(one.blocks),
    )
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_threads_read_what_is_stored(files: list[Path], in_threads: None) -> None:
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    found = loaded(files)
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        kept = torch.float32 if name.startswith("blocks.3.") else torch.bfloat16
        assert torch.equal(tensor, stored[name].to(kept) if name != "count" else stored[name])


@pytest.mark.parametrize("kept_as", ["int8", "nf4"])
def test_threads_make_layers_smaller_as_one_does(
    files: list[Path], kept_as: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = loaded(files, Shrink(kept_as, tmp_path / "alone", smallest=1))
    monkeypatch.setattr(reading, "WORTH_THREADS", 0)
    monkeypatch.setattr(reading, "usable_processors", lambda: 4)
    together = loaded(files, Shrink(kept_as, tmp_path / "together", smallest=1))
    again = loaded(files, Shrink(kept_as, tmp_path / "together", smallest=1))
    assert sum(name.endswith("codes") for name in alone) == DEPTH - 1  # one is to stay in float32
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[name])
        assert torch.equal(tensor, again[name])
    kept = [{path.name for path in (tmp_path / one).rglob("*.safetensors")} for one in ("alone", "together")]
    assert len(kept[0]) == DEPTH - 1
    assert kept[0] == kept[1]


def test_several_are_read_at_a_time(files: list[Path], in_threads: None) -> None:
    all_there = threading.Barrier(4, timeout=20)  # passes only when four are at it together

    def work(name: str, tensor: Tensor, scales: Tensor | None) -> int:
        if name.endswith("weight"):
            all_there.wait()
        return tensor.numel()

    weights = [f"blocks.{number}.weight" for number in range(4)]
    layout = {name: piece for name, piece in layout_of(files).items() if name in weights}
    for file in files:
        names = [name for name in layout if layout[name].file == file]
        assert len(names) in (0, 4)
    assert read_each(layout, layout, torch.device("cpu"), work) == dict.fromkeys(layout, WIDTH * WIDTH)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_shrinks_meanwhile_is_named(
    files: list[Path], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WORTH_THREADS", 0)
    monkeypatch.setattr(reading, "usable_processors", lambda: threads)
    layout = layout_of(files)
    with files[1].open("r+b") as file:
        file.truncate(files[1].stat().st_size - 100)
    with pytest.raises(ModelError, match=f"{files[1].name} cannot be read"):
        read_each(layout, layout, torch.device("cpu"), lambda name, tensor, scales: None)


@pytest.mark.parametrize("threads", [1, 4])
def test_what_goes_wrong_in_a_thread_is_told(
    files: list[Path], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WORTH_THREADS", 0)
    monkeypatch.setattr(reading, "usable_processors", lambda: threads)
    layout = layout_of(files)
    gone = {**layout, "count": Piece(layout["count"].file, "nothing", (5,))}
    with pytest.raises(ModelError, match="nothing"):
        read_each(gone, gone, torch.device("cpu"), lambda name, tensor, scales: None)


def test_only_the_rows_of_a_piece_are_given(files: list[Path]) -> None:
    layout = layout_of(files)
    third = {"v": Piece(layout["blocks.0.weight"].file, "blocks.0.weight", (63, WIDTH)).third(2).turned()}
    found = read_each(third, third, torch.device("cpu"), lambda name, tensor, scales: tensor.clone())
    stored = load_file(layout["blocks.0.weight"].file)["blocks.0.weight"]
    assert torch.equal(found["v"], stored[42:63].T)


def test_the_whole_file_reader_reads_the_same(files: list[Path]) -> None:
    pytest.importorskip("fastsafetensors")
    stored = load_file(files[0])
    with opened_whole(files[0], torch.device("cpu")) as file:
        found = {name: file.get_tensor(name) for name in stored}
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor)
        assert found[name].untyped_storage().nbytes() == tensor.nbytes  # not all of the file


def test_the_whole_file_reader_is_told_which_gpu(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It hands the name to `torch.cuda.set_device`, which refuses one without a number."""
    package = pytest.importorskip("fastsafetensors")
    asked = []

    class Noting(package.SafeTensorsFileLoader):  # type: ignore[misc, name-defined]
        def __init__(self, group: object, device: str, **options: object) -> None:
            asked.append(device)
            super().__init__(group, "cpu", **options)

    monkeypatch.setattr(package, "SafeTensorsFileLoader", Noting)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device in ("cuda", "cuda:2", "cpu"):
        with opened_whole(files[0], torch.device(device)):
            pass
    assert asked == ["cuda:1", "cuda:2", "cpu"]


def test_what_fastsafetensors_cannot_read_is_mapped(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(file: Path, device: torch.device) -> None:
        raise Exception("no driver")  # as the package does

    monkeypatch.setattr(reading, "has_fastsafetensors", lambda: True)
    monkeypatch.setattr(reading, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(reading, "opened_whole", refuses)
    pieces = [piece for piece in layout_of(files).values() if piece.file == files[1]]
    with reading._opened(files[1], torch.device("cuda"), pieces, whole=True) as stored:
        found = stored.get_tensor("blocks.0.weight").clone()
    assert torch.equal(found, load_file(files[1])["blocks.0.weight"])
    assert "no driver" in caplog.text


def test_files_are_read_whole_where_there_is_room(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    layout, gpu = layout_of(files), torch.device("cuda")
    pieces = [piece for piece in layout.values() if piece.file == files[1]]
    size = files[1].stat().st_size
    monkeypatch.setattr(reading, "free_bytes", lambda device: 3 * size)
    assert reading._fills(files[1], pieces, gpu)
    assert not reading._fills(files[1], pieces[: len(pieces) // 2], gpu)
    monkeypatch.setattr(reading, "free_bytes", lambda device: 2 * size)
    assert not reading._fills(files[1], pieces, gpu)
