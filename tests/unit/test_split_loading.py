"""Streamed blocks stay in host memory while a denoiser loads; the device is a pretended one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_device import DEVICE, Far, pretended
from safetensors.torch import save_file
from torch import Tensor, nn

from burnish.families.weights import layout_of, load_module
from burnish.memory import shrinking
from burnish.memory.shrinking import Shrink
from burnish.memory.streaming import streamed_blocks, tensors_by_block
from burnish.placement import Split, device_of, place_of

WIDTH, DEPTH = 32, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(DEPTH)
        )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file(Model().state_dict(), path)
    return path


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_chosen_blocks_stay_on_the_host(file: Path, share: float) -> None:
    seen: list[Sequence[int]] = []

    def away(sizes: Sequence[int]) -> list[int]:
        seen.append(list(sizes))
        return streamed_blocks(sizes, share)

    stored = layout_of([file])
    with pretended():
        module = load_module(
            Model,
            stored,
            dtype=torch.bfloat16,
            device=Split(DEVICE, away),
            what="model",
            blocks=lambda one: list(one.blocks),
        )
    assert seen == [[2 * (WIDTH * WIDTH + WIDTH) * 4] * DEPTH]
    stays = tuple(f"blocks.{number}." for number in streamed_blocks(seen[0], share))
    assert len(stays) == DEPTH * share
    for name, tensor in tensors(module).items():
        assert isinstance(tensor.data, Far) != name.startswith(stays), name
        assert tensor.dtype == torch.bfloat16


def test_weights_in_fewer_bits_stay_there_too_made_or_read(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinking, "_stored", partial(stored_near, shrinking._stored))
    load = partial(
        load_module,
        Model,
        layout_of([file]),
        dtype=torch.bfloat16,
        what="model",
        shrink=Shrink("nf4", tmp_path / "cache", smallest=1),
        blocks=lambda one: list(one.blocks),
    )
    plain = tensors(load(device="cpu"))
    assert sum(name.endswith("codes") for name in plain) == 2 * DEPTH
    for folder in ("made", "cache"):
        load.keywords["shrink"] = Shrink("nf4", tmp_path / folder, smallest=1)
        with pretended():
            split = tensors(load(device=Split(DEVICE, lambda sizes: [0, 2])))
        assert split.keys() == plain.keys()
        for name, tensor in split.items():
            if not name.endswith("table"):
                assert isinstance(tensor.data, Far) != name.startswith(("blocks.0.", "blocks.2.")), (
                    folder,
                    name,
                )
            near = tensor.data.inner if isinstance(tensor.data, Far) else tensor
            assert torch.equal(near, plain[name]), (folder, name)


def stored_near(read: Callable[..., Any], path: Path, device: torch.device) -> tuple[Tensor, Tensor] | None:
    found = read(path, torch.device("cpu"))
    return found if found is None or device.type == "cpu" else (Far(found[0]), Far(found[1]))


def test_places() -> None:
    away = Split("cuda", lambda sizes: [])
    assert place_of("vae", "cpu") == "cpu"
    assert place_of("denoiser", {"denoiser": away, "vae": "cpu"}) is away
    assert place_of("vae", {"denoiser": away, "vae": "cpu"}) == "cpu"
    assert device_of(away) == device_of("cuda") == "cuda"


def test_the_choice_while_loading_is_that_of_streaming() -> None:
    model = Model().requires_grad_(False)
    sizes = [sum(one.nbytes for one in own) for own in tensors_by_block([model], list(model.blocks))]
    assert sizes == [2 * (WIDTH * WIDTH + WIDTH) * 4] * DEPTH
