"""Z-Image: Turbo in a single file, and the training adapters that keep it what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.families.registry import detect_family
from burnish.family import ModelSource
from burnish.generate import attach_adapter


@pytest.mark.parametrize(
    ("name", "shift", "steps", "guidance"),
    [("z_image_turbo_bf16", 3.0, 9, 0.0), ("z_image_bf16", 6.0, 50, 4.0)],
)
def test_a_single_file_is_turbo_by_its_name(
    tiny_folder: Callable[[str], Path], tmp_path: Path, name: str, shift: float, steps: int, guidance: float
) -> None:
    weights = load_file(tiny_folder("z_image") / "transformer" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / f"{name}.safetensors"
    save_file(weights, file)
    source = ModelSource(str(file))
    family = detect_family(source).load(source, frozenset(), dtype=torch.float32, device="cpu")
    assert family.name == "z_image"
    assert family.schedule.shift == shift
    assert (family.defaults.steps, family.defaults.guidance) == (steps, guidance)


def lora(module: str, down: str, up: str, rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{module}.{down}.weight": torch.randn(4, columns, generator=draw) * 0.1,
        f"{module}.{up}.weight": torch.randn(rows, 4, generator=draw) * 0.1,
    }


@pytest.mark.parametrize("spelling", ["split", "fused"])
def test_training_adapters_are_taken_whole_and_taken_off(
    tiny_folder: Callable[[str], Path], tmp_path: Path, spelling: str
) -> None:
    """As published for Turbo (`diffusion_model.` before diffusers' names), and by sd-scripts' kin (fused)."""
    folder = tiny_folder("z_image_turbo")
    source = ModelSource(str(folder))
    family = detect_family(source).load(source, frozenset(["denoiser"]), dtype=torch.float32, device="cpu")
    block = family.denoisers["transformer"].get_submodule("layers.0.attention")
    width = block.to_q.in_features
    if spelling == "split":
        tensors = {
            key: tensor
            for seed, name in enumerate(("to_q", "to_k", "to_v", "to_out.0"))
            for key, tensor in lora(
                f"diffusion_model.layers.0.attention.{name}", "lora_A", "lora_B", width, width, seed
            ).items()
        }
        added = {
            name: tensors[f"diffusion_model.layers.0.attention.{name}.lora_B.weight"]
            @ tensors[f"diffusion_model.layers.0.attention.{name}.lora_A.weight"]
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        }
    else:
        stem = "lora_unet_layers_0_attention_qkv"
        tensors = lora(stem, "lora_down", "lora_up", 3 * width, width, 0)
        tensors[f"{stem}.alpha"] = torch.tensor(4.0)
        delta = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
        added = dict(zip(("to_q", "to_k", "to_v"), delta.chunk(3), strict=True))
    save_file(tensors, tmp_path / "adapter.safetensors")

    example = family.example(64, 64, batch=1)
    with torch.no_grad():
        plain = family.predict(*example)
        adapter = attach_adapter(family, tmp_path / "adapter.safetensors", note=pytest.fail)
        with_adapter = family.predict(*example)
        adapter.multiplier = 0.0
        torch.testing.assert_close(family.predict(*example), plain)
    reference = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        for name, delta in added.items():
            reference.get_submodule(f"layers.0.attention.{name}").weight += delta
        family.modules["transformer"] = reference
        torch.testing.assert_close(with_adapter, family.predict(*example), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(with_adapter, plain, atol=1e-4)
