"""HunyuanImage where prompts quote something: ByT5's letters, and the longer reign of the usual guidance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanImage, DiffusionPipeline
from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text
from reference import PROMPTS, STEPS
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.families.hunyuan_image import HunyuanImage, quoted
from burnish.families.hunyuan_image_names import NAMES, NAMES_APART
from burnish.families.hunyuan_image_vae import vae_name
from burnish.families.registry import detect_family
from burnish.families.slots import PipelineSource, shipped_configs
from burnish.family import ModelSource
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests

TinyFolder = Callable[[str], Path]
QUOTING = "a sign that reads \"open\" beside 'closed', in ‘red’ and “blue”"
SIZE, SEED = (64, 96), 3
WEIGHTS = "diffusion_pytorch_model.safetensors"


def loaded(folder: Path) -> Any:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return HunyuanImage.load(ModelSource(str(folder)), parts, dtype=torch.float32, device="cpu")


def ours(family: Any, prompts: list[str], guidance: float) -> list[Tensor]:
    requests = [PictureRequest(prompt, "", SEED, *SIZE, STEPS, guidance) for prompt in prompts]
    return draw_latents(family, encode_requests(family, requests), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("prompt", [QUOTING, 'say "a"', "it's a cat's", *PROMPTS])
def test_what_is_quoted(prompt: str) -> None:
    assert quoted(prompt) == (extract_glyph_text(prompt) or "")


@pytest.mark.parametrize("name", ["hunyuan_image", "hunyuan_image_distilled"])
def test_a_prompt_that_quotes_draws_the_pipelines_latents(tiny_folder: TinyFolder, name: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(name))
    pipeline.set_progress_bar_config(disable=True)
    reference = pipeline(
        prompt=[QUOTING],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        distilled_guidance_scale=3.5,
        output_type="latent",
    ).images[0]
    family = loaded(tiny_folder(name))
    (found,) = ours(family, [QUOTING], 3.5)
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=0)
    (other,) = ours(family, [QUOTING.replace("open", "shut")], 3.5)
    assert (other - found).abs().max() > 1e-3, "the letters have no effect"


def test_quoting_and_plain_prompts_of_one_batch_are_drawn_as_each_alone(tiny_folder: TinyFolder) -> None:
    family = loaded(tiny_folder("hunyuan_image"))
    prompts = [QUOTING, PROMPTS[0]]
    alone = [*ours(family, prompts[:1], 3.5), *ours(family, prompts[1:], 3.5)]
    for together, one in zip(ours(family, prompts, 3.5), alone, strict=True):
        torch.testing.assert_close(together, one, atol=1e-5, rtol=0)


def in_comfyuis_names(name: str) -> str:
    """A stacked name of Tencent's as ComfyUI keeps it."""
    for theirs, comfys in (
        ("_attn_qkv.", "_attn.qkv."),
        ("_attn_proj.", "_attn.proj."),
        ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
        ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
        (".q_norm.weight", ".norm.query_norm.scale"),
        (".k_norm.weight", ".norm.key_norm.scale"),
        ("_mod.linear.", "_mod.lin."),
        (".modulation.linear.", ".modulation.lin."),
        ("_mlp.fc1.", "_mlp.0."),
        ("_mlp.fc2.", "_mlp.2."),
        (".mlp.fc1.", ".mlp.0."),
        (".mlp.fc2.", ".mlp.2."),
        ("time_in.mlp.0.", "time_in.in_layer."),
        ("time_in.mlp.2.", "time_in.out_layer."),
        ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
        ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
        ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
        ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ):
        name = name.replace(theirs, comfys)
    return name


@pytest.mark.parametrize("spelling", ["tencent", "comfyui"])
def test_files_in_either_spelling_give_the_weights_of_the_folder(
    tiny_folder: TinyFolder, tmp_path: Path, spelling: str
) -> None:
    folder = tiny_folder("hunyuan_image")
    wanted = load_file(folder / "transformer" / WEIGHTS)
    native: dict[str, Tensor] = {}
    for key in wanted:
        module, _, kind = key.rpartition(".")
        told = (NAMES_APART if spelling == "tencent" else NAMES).native_module(module)
        if told.holds[0] != module:
            continue
        stacked = torch.cat([wanted[f"{one}.{kind}"] for one in told.holds])
        whole = torch.cat(stacked.chunk(2)[::-1]) if told.halves_swapped else stacked
        name = f"{told.name}.{kind}"
        native[name if spelling == "tencent" else in_comfyuis_names(name)] = whole.contiguous()
    save_file(native, tmp_path / "model.safetensors")
    source = ModelSource(str(tmp_path / "model.safetensors"))
    assert detect_family(source) is HunyuanImage
    found = PipelineSource(source, HunyuanImage.slots, shipped_configs("hunyuan_image"), HunyuanImage.title)
    slot = HunyuanImage.denoiser_slots()[0]
    weights = found.load(slot, torch.float32, "cpu").state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.down.2.block.1.conv1.weight", "encoder.down_blocks.7.conv1.weight"),
        ("encoder.down.4.downsample.conv.bias", "encoder.down_blocks.14.conv.bias"),
        ("encoder.down.5.block.1.norm2.bias", "encoder.down_blocks.16.norm2.bias"),
        ("decoder.up.0.upsample.conv.bias", "decoder.up_blocks.3.conv.bias"),
        ("decoder.up.5.block.2.norm1.weight", "decoder.up_blocks.22.norm1.weight"),
        ("decoder.mid.attn_1.q.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        ("encoder.mid.attn_1.proj_out.bias", "encoder.mid_block.attentions.0.proj.bias"),
        ("encoder.mid.attn_1.norm.bias", "encoder.mid_block.attentions.0.norm.bias"),
        ("encoder.mid.block_2.conv2.bias", "encoder.mid_block.resnets.1.conv2.bias"),
        ("encoder.norm_out.bias", "encoder.norm_out.bias"),
    ],
)
def test_names_of_the_released_autoencoder(theirs: str, ours: str) -> None:
    assert vae_name(theirs) == ours
    with torch.device("meta"):
        released = AutoencoderKLHunyuanImage.from_config(shipped_configs("hunyuan_image")["vae"])
    assert ours in released.state_dict()
