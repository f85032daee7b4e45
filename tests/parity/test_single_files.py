"""Single files in the names of the release and in ComfyUI's layout give the same weights as the diffusers folder.

The file is written by the family's table of names read backwards; that the table is right is told by diffusers' own
converter, which must turn the same file into the weights of the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from released_widths import widths
from safetensors.torch import load_file, save_file
from tiny import Case, cases
from torch import Tensor

from burnish.errors import ModelError
from burnish.families.native import NativeNames
from burnish.families.pipeline import PipelineFamily
from burnish.families.registry import detect_family, families, family_named
from burnish.families.slots import PipelineSource, shipped_configs
from burnish.families.sources import weight_files
from burnish.families.weights import load_module
from burnish.family import ModelSource

TinyFolder = Callable[[str], Path]
CASES = {name: case for name, case in cases().items() if case.native is not None}
Weights = dict[str, Tensor]


def family_of(case: Case) -> Any:
    return family_named(case.family)


def folder_weights(folder: Path, part: str) -> Weights:
    return {k: v for file in weight_files(folder / part) for k, v in load_file(file).items()}


def native_weights(names: NativeNames, weights: Weights, last_swapped: tuple[str, ...] = ()) -> Weights:
    """Diffusers' weights as the release names and stacks them."""
    kinds = {ours: native for native, ours in names.kinds.items()}
    found: Weights = {}
    for key in weights:
        module, _, kind = key.rpartition(".")
        native = names.native_module(key)
        if native.name != key or not module:  # a parameter of its own, such as a table of positions
            found[native.name] = weights[key]
            continue
        native = names.native_module(module)
        if native.holds[0] != module:
            continue  # written with the first of its stack
        stacked = torch.cat([weights[f"{one}.{kind}"] for one in native.holds])
        if module in last_swapped or names.is_swapped(module):
            stacked = torch.cat(list(reversed(stacked.chunk(2))))
        if stacked.dim() == 1:  # of norms; matrices are weights everywhere
            kind = kinds.get(kind, kind)
        found[f"{native.name}.{kind}"] = stacked.contiguous()
    return found


def assert_same(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def written(folder: Path, case: Case, path: Path, prefix: str) -> Path:
    assert case.native is not None
    native = native_weights(case.native, folder_weights(folder, "transformer"), case.swapped)
    save_file({prefix + name: tensor for name, tensor in native.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", CASES)
def test_a_native_file_gives_the_weights_of_the_folder(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, prefix: str
) -> None:
    folder, case = tiny_folder(name), CASES[name]
    file = written(folder, case, tmp_path / "model.safetensors", prefix)
    source = ModelSource(str(file))
    assert detect_family(source) is family_of(case)
    family = family_of(case)
    assert issubclass(family, PipelineFamily)
    assert [other for other in families().values() if other.detect(source)] == [family]
    wanted = folder_weights(folder, "transformer")
    slot = family.denoiser_slots()[0]
    found = PipelineSource(source, family.slots, shipped_configs(family.name), family.title)
    layout = found.layout(slot)
    assert layout.keys() == wanted.keys()
    config = family.load(ModelSource(str(folder)), frozenset(), dtype=torch.float32, device="cpu").configs
    module = load_module(
        lambda: slot.make(dict(config[slot.folder])),
        layout,
        dtype=torch.float32,
        device="cpu",
        what="denoiser",
    )
    assert_same({k: v for k, v in module.state_dict().items() if k in wanted}, wanted)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.upstream])
def test_diffusers_reads_the_same_weights_from_that_file(tiny_folder: TinyFolder, name: str) -> None:
    folder, case = tiny_folder(name), CASES[name]
    assert case.native is not None
    assert case.upstream is not None
    wanted = folder_weights(folder, "transformer")
    native = native_weights(case.native, wanted, case.swapped)
    convert = getattr(single_file_utils, case.upstream)
    with widths(convert, case.upstream_widths):
        assert_same(convert(dict(native)), wanted)


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_says_what_it_is(tiny_folder: TinyFolder, tmp_path: Path, name: str) -> None:
    folder, case = tiny_folder(name), CASES[name]
    whole = written(folder, case, tmp_path / "whole.safetensors", "")
    family = family_of(case)

    def refusal(path: Path) -> str:
        with pytest.raises(ModelError) as error:
            family.load(ModelSource(str(path)), frozenset(["denoiser"]), dtype=torch.float32, device="cpu")
        return error.value.message

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    assert "is damaged: it is cut off" in refusal(cut)
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git-lfs pointer" in refusal(pointer)
    pickle = tmp_path / "pickle.safetensors"
    pickle.write_bytes(b"PK\x03\x04" + b"0" * 200)
    assert "pickle" in refusal(pickle)
    lora = tmp_path / "lora.safetensors"
    save_file({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}, lora)
    assert f"is not {family.title}" in refusal(lora)
    other = next((n for n, c in CASES.items() if c.family != case.family), None)
    if other is not None:
        foreign = written(tiny_folder(other), CASES[other], tmp_path / "foreign.safetensors", "")
        assert f"is not {family.title}" in refusal(foreign)
