"""Every family: each of its adapter formats, in diffusers' own loader and by ComfyUI's rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfyui_rules
import diffusers_rules
import pytest
import torch
from released_widths import flux_loader, tiny_loaders
from safetensors.torch import load_file
from tiny import Case, cases
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules
from burnish.adapters.lora import LoraWeights
from burnish.adapters.targeting import choose_modules
from burnish.config.method import Lora
from burnish.export.adapter_file import read_adapter, write_adapter
from burnish.export.verify import verify_adapter
from burnish.export_keys import ExportKeys, NativeModule
from burnish.families.registry import family_named
from burnish.family import ModelSource

TinyFolder = Callable[[str], Path]
CASES = cases()
METHODS = {"default": Lora(rank=3, alpha=5.0), "attention": Lora(rank=2, alpha=2.0, targets="attention")}


@dataclass(frozen=True)
class Written:
    """An adapter of one denoiser whose weights are random rather than zero."""

    path: Path
    weights: Mapping[str, LoraWeights]
    denoiser: nn.Module
    part: str
    keys: ExportKeys


def write(
    case: Case, folder: Path, to: Path, method: Lora, format: str, *, audio: bool = False
) -> list[Written]:
    family = family_named(case.family).load(
        ModelSource(str(folder)), frozenset({"denoiser"}), dtype=torch.float32, device="cpu"
    )
    targets = {name: one.with_audio() if audio else one for name, one in family.targets.items()}
    written = []
    for part, denoiser in family.denoisers.items():
        chosen = choose_modules(denoiser, targets, family.default_targets, method)
        adapter = AdapterSet.attach(denoiser, chosen, dropout=0.0, seed=5)
        generator = torch.Generator().manual_seed(6)
        for layer in adapter.layers.values():
            layer.lora_B.data.normal_(0, 0.1, generator=generator)
        weights, modules = adapter.weights(), adaptable_modules(denoiser)
        path = to / f"{part}-{format}.safetensors"
        write_adapter(
            path,
            weights,
            part=part,
            keys=family.export,
            modules=modules,
            format=format,
            dtype=torch.float32,
            metadata={},
        )
        verify_adapter(path, weights, denoiser, part=part, keys=family.export)
        written.append(Written(path, weights, denoiser, part, family.export))
    return written


def formats(case: Case) -> tuple[str, ...]:
    return family_named(case.family).export.formats


FLUX_KOHYA = ("flux", "chroma", "flex1")


def kohya(name: str) -> tuple[str, ...]:
    """Families whose files for sd-scripts are in the names of the release, each once."""
    return ("kohya",) if name in (*FLUX_KOHYA, "flux2", "qwen_image", "z_image") else ()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "format"), [(n, f) for n, case in CASES.items() for f in formats(case)])
def test_it_is_read_back(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, format: str, method: str
) -> None:
    for one in write(CASES[name], tiny_folder(name), tmp_path, METHODS[method], format):
        file = read_adapter(one.path, adaptable_modules(one.denoiser), part=one.part, keys=one.keys)
        assert file.notes == ()
        found = {module: weights.delta() for module, weights in file.weights.items()}
        diffusers_rules.assert_same_deltas(found, one.weights)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "format"),
    [
        (name, format)
        for name, case in CASES.items()
        for format in sorted(
            {family_named(case.family).export.default, "diffusers", *kohya(name)} & set(formats(case))
        )
        if case.loads_adapters
    ],
)
def test_diffusers_loads_all_of_it(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, format: str, method: str
) -> None:
    case = CASES[name]
    for one in write(case, tiny_folder(name), tmp_path, METHODS[method], format):
        flux = flux_loader(one.denoiser) if format == "kohya" and name in FLUX_KOHYA else {}
        with tiny_loaders({**case.loader_widths, **flux}):
            options = {"load_into_transformer_2": True} if one.part == "transformer_2" else {}
            found = diffusers_rules.loaded_deltas(
                tiny_folder(name), one.path, part=one.part, pipeline=case.pipeline, **options
            )
        diffusers_rules.assert_same_deltas(found, one.weights)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "format"),
    [(n, f) for n, case in CASES.items() for f in ("comfy", *kohya(n)) if f in formats(case)],
)
def test_comfyui_loads_all_of_the_names_of_the_release(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, format: str, method: str
) -> None:
    case = CASES[name]
    for one in write(case, tiny_folder(name), tmp_path, METHODS[method], format):
        assert_comfyui_loads(one)


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "all"])
@pytest.mark.parametrize(
    ("name", "format"),
    [
        (name, format)
        for name, case in CASES.items()
        if family_named(case.family).capabilities.audio
        for format in formats(case)
    ],
)
def test_layers_of_sound_are_loaded_by_both(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, format: str, targets: str
) -> None:
    method = Lora(rank=2, alpha=3.0, targets=targets)
    (one,) = write(CASES[name], tiny_folder(name), tmp_path, method, format, audio=True)
    assert any("audio" in module for module in one.weights)
    file = read_adapter(one.path, adaptable_modules(one.denoiser), part=one.part, keys=one.keys)
    diffusers_rules.assert_same_deltas({key: it.delta() for key, it in file.weights.items()}, one.weights)
    found = diffusers_rules.loaded_deltas(
        tiny_folder(name), one.path, part=one.part, pipeline=CASES[name].pipeline
    )
    diffusers_rules.assert_same_deltas(found, one.weights)
    if format == "comfy":
        assert_comfyui_loads(one)


def assert_comfyui_loads(one: Written) -> None:
    expected = native_deltas(one)
    places = {}
    if one.keys.prefix.get("comfy") == "transformer.":  # as HunyuanVideo's
        places = {f"transformer.{name}": comfyui_rules.Place(name) for name in expected}
    shapes = {f"{name}.weight": tuple(delta.shape) for name, delta in expected.items()}
    found, lost = comfyui_rules.comfy_delta(load_file(one.path), shapes, places)
    assert lost == []
    assert {key for key, delta in found.items() if delta.any()} == {
        f"{name}.weight" for name, delta in expected.items() if delta.any()
    }
    for key, delta in found.items():
        torch.testing.assert_close(delta, expected[key.removesuffix(".weight")], rtol=1e-5, atol=1e-5)


def native_deltas(one: Written) -> dict[str, Tensor]:
    """What should be added to each module of the release that has a weight, zeros included."""
    modules = adaptable_modules(one.denoiser)
    expected = {}
    for name in modules:
        native = one.keys.native(name) if one.keys.native else NativeModule(name, (name,))
        if native.holds[0] == name and all(part in modules for part in native.holds):
            parts = [
                one.weights[part].delta() if part in one.weights else torch.zeros(modules[part].weight.shape)
                for part in native.holds
            ]
            whole = torch.cat(parts)
            expected[native.name] = torch.cat(whole.chunk(2)[::-1]) if native.halves_swapped else whole
    return expected
