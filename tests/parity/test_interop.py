"""Adapters in other programs: diffusers itself, and ComfyUI's rules on models in their original layout."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfyui_rules
import diffusers_rules
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import lora_conversion_utils, single_file_utils
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer as PeftLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules
from burnish.adapters.targeting import choose_modules
from burnish.config.method import Lora, LoraGroup
from burnish.export.adapter_file import read_adapter, write_adapter
from burnish.export.verify import verify_adapter
from burnish.families.registry import family_named
from burnish.family import Family

TinyFolder = Callable[[str], Path]
FAMILIES = ("sd15", "sdxl", "flux")

# One alpha for all, unlike the rank; ranks, alphas and so scales that differ by module, convolutions included.
METHODS = {
    "attention+mlp": Lora(rank=4, alpha=6.0, targets="attention+mlp"),
    "all with groups": Lora(
        rank=4,
        alpha=2.0,
        conv_rank=3,
        conv_alpha=7.5,
        targets="all",
        groups=[
            LoraGroup(match=["*to_q", "*.net.2"], rank=2, alpha=5.0),
            LoraGroup(match=["*to_k"], rank=8),
            LoraGroup(match=["*to_v"], alpha=0.3),
        ],
    ),
}


@dataclass(frozen=True)
class Case:
    """A tiny pipeline and an adapter file whose weights are random rather than zero."""

    family: type[Family]
    folder: Path
    part: str
    method: Lora

    def pipeline(self) -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def denoiser(self, pipeline: DiffusionPipeline) -> nn.Module:
        denoiser = getattr(pipeline, self.part)
        assert isinstance(denoiser, nn.Module)
        return denoiser

    def attach(self, pipeline: DiffusionPipeline) -> AdapterSet:
        denoiser = self.denoiser(pipeline).requires_grad_(False)
        chosen = choose_modules(denoiser, self.family.targets, self.family.default_targets, self.method)
        adapter = AdapterSet.attach(denoiser, chosen, dropout=0.0, seed=5)
        generator = torch.Generator().manual_seed(6)
        for layer in adapter.layers.values():
            layer.lora_B.data.normal_(0, 0.1 / layer.scale**0.5, generator=generator)
        return adapter

    def write(self, adapter: AdapterSet, path: Path, format: str = "auto") -> Path:
        weights = adapter.weights()
        keys = self.family.export
        write_adapter(
            path,
            weights,
            part=self.part,
            keys=keys,
            modules=adaptable_modules(adapter.denoiser),
            format=format,
            dtype=torch.float32,
            metadata={},
        )
        verify_adapter(path, weights, adapter.denoiser, part=self.part, keys=keys)
        return path


@pytest.fixture(params=[(name, method) for name in FAMILIES for method in METHODS], ids="-".join)
def case(request: pytest.FixtureRequest, tiny_folder: TinyFolder) -> Case:
    name, method = request.param
    part = "transformer" if name == "flux" else "unet"
    return Case(family_named(name), tiny_folder(name), part, METHODS[method])


def draw(pipeline: DiffusionPipeline) -> Tensor:
    """Latents after two steps with guidance."""
    output = pipeline(
        "a photo of a dog",
        num_inference_steps=2,
        height=64,
        width=64,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
    )
    images = output.images
    assert isinstance(images, Tensor)
    return images


def assert_drawn_alike(found: Tensor, expected: Tensor, without: Tensor) -> None:
    assert (expected - without).abs().max() > 0.01, "the adapter has no effect to compare"
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("format", ["auto", "diffusers"])
def test_diffusers_loads_all_of_it_and_draws_the_same(case: Case, tmp_path: Path, format: str) -> None:
    ours, theirs = case.pipeline(), case.pipeline()
    without = draw(ours)
    adapter = case.attach(ours)
    path = case.write(adapter, tmp_path / "a.safetensors", format)
    diffusers_rules.load(theirs, path)
    found = diffusers_rules.deltas(case.denoiser(theirs))
    diffusers_rules.assert_same_deltas(found, adapter.weights())
    assert_drawn_alike(draw(theirs), draw(ours), without)


def test_comfyui_rules_use_every_key_and_give_the_trained_weights(case: Case, tmp_path: Path) -> None:
    pipeline = case.pipeline()
    denoiser = case.denoiser(pipeline)
    weights = {key: tensor.clone() for key, tensor in denoiser.state_dict().items()}
    config: Mapping[str, Any] = denoiser.config
    adapter = case.attach(pipeline)
    file = load_file(case.write(adapter, tmp_path / "a.safetensors"))

    if case.part == "unet":
        native = comfyui_rules.unet_native(weights, config)
        places = comfyui_rules.unet_places(weights, config)
    else:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        native = comfyui_rules.flux_native(weights, width)
        places = comfyui_rules.flux_places(weights, width)
    assert_equal(to_diffusers(case, native, config), weights, exactly=True)  # the layout is the original one

    changed = to_diffusers(case, comfyui_rules.loaded(file, places, native), config)
    expected = dict(weights)
    for name, one in adapter.weights().items():
        expected[f"{name}.weight"] = weights[f"{name}.weight"] + one.delta()
    assert_equal(changed, expected)


FLUX_METHODS = {
    **METHODS,
    # Parts of fused modules, and the modulation whose halves the release keeps the other way round.
    "parts": Lora(
        rank=3, alpha=2.0, include=["norm_out.linear"], exclude=["*.to_q", "*.to_v", "*.add_v_proj"]
    ),
    "one": Lora(
        rank=2, include=["single_transformer_blocks.1.proj_mlp"], exclude=["*blocks.*.attn.*", "*ff*"]
    ),
}


@pytest.fixture(params=FLUX_METHODS)
def flux_case(request: pytest.FixtureRequest, tiny_folder: TinyFolder) -> Case:
    return Case(family_named("flux"), tiny_folder("flux"), "transformer", FLUX_METHODS[request.param])


def test_comfyui_reads_files_in_the_names_of_the_release(flux_case: Case, tmp_path: Path) -> None:
    pipeline = flux_case.pipeline()
    denoiser = flux_case.denoiser(pipeline)
    weights = {key: tensor.clone() for key, tensor in denoiser.state_dict().items()}
    config: Mapping[str, Any] = denoiser.config
    adapter = flux_case.attach(pipeline)
    file = load_file(flux_case.write(adapter, tmp_path / "a.safetensors", "comfy"))

    native = comfyui_rules.flux_native(weights, config["num_attention_heads"] * config["attention_head_dim"])
    deltas, lost = comfyui_rules.comfy_delta(file, {key: one.shape for key, one in native.items()})
    assert lost == []
    changed = to_diffusers(
        flux_case, {key: one + deltas.get(key, torch.zeros(())) for key, one in native.items()}, config
    )
    expected = dict(weights)
    for name, one in adapter.weights().items():
        expected[f"{name}.weight"] = weights[f"{name}.weight"] + one.delta()
    assert_equal(changed, expected)


def test_fused_modules_in_kohyas_spelling_load_in_diffusers_and_here(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    case = Case(family_named("flux"), tiny_folder("flux"), "transformer", METHODS["attention+mlp"])
    ours, theirs = case.pipeline(), case.pipeline()
    denoiser = case.denoiser(theirs)
    adapter = case.attach(ours)
    path = as_kohya(case.write(adapter, tmp_path / "a.safetensors", "comfy"))

    width = denoiser.config["num_attention_heads"] * denoiser.config["attention_head_dim"]
    converter = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
    with diffusers_rules.widths(converter, {3072: width, 12288: 4 * width}):
        diffusers_rules.load(theirs, path)
    diffusers_rules.assert_same_deltas(diffusers_rules.deltas(denoiser), adapter.weights())

    keys = case.family.export
    file = read_adapter(path, adaptable_modules(case.denoiser(ours)), part=case.part, keys=keys)
    assert file.notes == ()
    found = {name: weights.delta() for name, weights in file.weights.items()}
    diffusers_rules.assert_same_deltas(found, adapter.weights())


def as_kohya(path: Path) -> Path:
    """The same adapters as sd-scripts spells them, at alpha = rank / 2."""
    tensors = {}
    for key, tensor in load_file(path).items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        module, _, matrix = name.rpartition(".")
        spelled = "lora_unet_" + module.replace(".", "_")
        if matrix == "lora_A":
            tensors[f"{spelled}.lora_down.weight"] = tensor
            tensors[f"{spelled}.alpha"] = torch.tensor(len(tensor) / 2)
        else:
            tensors[f"{spelled}.lora_up.weight"] = 2 * tensor
    save_file(tensors, path)
    return path


def to_diffusers(case: Case, native: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """By diffusers' own converter of checkpoints in the original layout."""
    if case.part == "unet":
        checkpoint = {f"model.diffusion_model.{key}": tensor for key, tensor in native.items()}
        return single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)
    # The width of the released model is a constant in there.
    width = config["num_attention_heads"] * config["attention_head_dim"]
    code = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers.__code__
    code = code.replace(co_consts=tuple(width if one == 3072 else one for one in code.co_consts))
    convert = types.FunctionType(code, vars(single_file_utils))
    return dict(convert({key: tensor.clone() for key, tensor in native.items()}))


def assert_equal(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, exactly: bool = False
) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        tolerance = 0.0 if exactly else 1e-6
        torch.testing.assert_close(
            found[key], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_diffusers_saves_is_read_with_its_alpha(
    tiny_folder: TinyFolder, tmp_path: Path, name: str
) -> None:
    """diffusers keeps alpha in the metadata: one for all, and exceptions."""
    part = "transformer" if name == "flux" else "unet"
    case = Case(family_named(name), tiny_folder(name), part, METHODS["attention+mlp"])
    theirs, ours = case.pipeline(), case.pipeline()
    without = draw(ours)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k"],
        rank_pattern={"to_k": 2},
        alpha_pattern={"to_k": 3},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    denoiser = case.denoiser(theirs)
    denoiser.add_adapter(config)
    for module in denoiser.modules():
        if isinstance(module, PeftLayer):
            module.lora_B["default"].weight.data.normal_(0, 0.1)
    type(theirs).save_lora_weights(
        tmp_path,
        **{
            f"{part}_lora_layers": get_peft_model_state_dict(denoiser),
            f"{part}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),
        },
    )

    file = read_adapter(
        tmp_path / "pytorch_lora_weights.safetensors",
        adaptable_modules(case.denoiser(ours)),
        part=part,
        keys=case.family.export,
    )
    AdapterSet.from_weights(case.denoiser(ours), file.weights)
    assert file.notes == ()
    assert_drawn_alike(draw(ours), draw(theirs), without)
