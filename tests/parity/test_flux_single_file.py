"""A FLUX.1 from single files is, to the bit, the one from its diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from native_flux import Weights, native_transformer, native_vae
from safetensors.torch import save_file
from tiny_pipelines import kl_vae
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.families.flux import Flux
from burnish.families.registry import detect_family
from burnish.family import ModelSource
from burnish.placement import Part

Model = TypeVar("Model", bound=nn.Module)
PREFIX = "model.diffusion_model."
# "a photo of a sks dog": from `sentencepiece` with Google's spiece.model of T5, and from OpenAI's CLIP tokenizer.
T5_IDS = [3, 9, 1202, 13, 3, 9, 3, 7, 157, 7, 1782, 1]
CLIP_IDS = [49406, 320, 1125, 539, 320, 48136, 1929, 49407]


@dataclass
class Models:
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    clip: CLIPTextModel
    t5: T5EncoderModel


def transformer(*, guidance: bool, head_dim: int = 128) -> FluxTransformer2DModel:
    """Two heads of the released size; three kinds of depth and width that no table could guess."""
    return drawn(
        FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=head_dim,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=guidance,
            axes_dims_rope=(16, 56, 56) if head_dim == 128 else (4, 6, 6),
        )
    )


def drawn(model: Model) -> Model:
    """Every parameter different from every other: none is left at zero or one."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> Models:
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=12,
        hidden_act="quick_gelu",
        eos_token_id=49407,
    )
    t5 = T5Config(
        vocab_size=32128,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=True,
    )
    return Models(
        transformer(guidance=True),
        drawn(kl_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant=False)),
        drawn(CLIPTextModel(clip)),
        drawn(T5EncoderModel(t5)),
    )


def clip_file(model: CLIPTextModel) -> Weights:
    """ComfyUI's clip_l.safetensors has the names of older transformers."""
    return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in model.state_dict().items()}


def t5_file(model: T5EncoderModel) -> Weights:
    return {name: t for name, t in model.state_dict().items() if name != "encoder.embed_tokens.weight"}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def written(path: Path, *parts: Weights) -> Path:
    save_file({name: t.contiguous() for part in parts for name, t in part.items()}, path)
    return path


def loaded(source: ModelSource, *parts: Part) -> Flux:
    assert detect_family(source) is Flux
    return Flux.load(source, frozenset(parts), dtype=torch.float32, device="cpu")


def inputs() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 16, 4, 6, generator=generator)
    tokens = torch.randn(2, 9, 32, generator=generator)
    pooled = torch.randn(2, 24, generator=generator)
    given = {"tokens_BSD": tokens, "pooled_BD": pooled, "guidance_B": torch.tensor([3.5, 2.0])}
    return noisy, torch.tensor([0.3, 0.9]), Conditioning(given)


@pytest.mark.parametrize("prefix", ["", PREFIX, "diffusion_model."])
@pytest.mark.parametrize("guidance", [True, False])
@torch.no_grad()
def test_denoiser_equals_the_folders(tmp_path: Path, guidance: bool, prefix: str) -> None:
    model = transformer(guidance=guidance)
    file = written(tmp_path / "flux.safetensors", prefixed(prefix, native_transformer(model)))
    single = loaded(ModelSource(str(file)), "denoiser")
    folder = diffusers_folder(tmp_path / "folder", model)
    from_folder = loaded(ModelSource(str(folder)), "denoiser")

    assert single.capabilities.guidance_embedding is guidance
    assert single.defaults.steps == (28 if guidance else 4)
    theirs = from_folder.denoisers["transformer"].state_dict()
    ours = single.denoisers["transformer"].state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(single.predict(*inputs()), from_folder.predict(*inputs()))


def diffusers_folder(folder: Path, model: FluxTransformer2DModel) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    model.save_pretrained(folder / "transformer")
    kl_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant=False).save_config(
        folder / "vae"
    )
    return folder


@torch.no_grad()
def test_denoiser_in_diffusers_names(tmp_path: Path, models: Models) -> None:
    file = written(tmp_path / "flux.safetensors", models.transformer.state_dict())
    native = written(tmp_path / "native.safetensors", native_transformer(models.transformer))
    ours = loaded(ModelSource(str(file)), "denoiser").predict(*inputs())
    assert torch.equal(ours, loaded(ModelSource(str(native)), "denoiser").predict(*inputs()))


@torch.no_grad()
def test_8_bit_weights_are_those_weights(tmp_path: Path, models: Models) -> None:
    native = native_transformer(models.transformer)
    rounded = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in native.items()}
    small = written(tmp_path / "fp8.safetensors", rounded)
    same = written(tmp_path / "fp32.safetensors", {name: t.float() for name, t in rounded.items()})
    ours = loaded(ModelSource(str(small)), "denoiser").predict(*inputs())
    assert torch.equal(ours, loaded(ModelSource(str(same)), "denoiser").predict(*inputs()))


@pytest.mark.parametrize("all_in_one", [False, True])
@torch.no_grad()
def test_vae_and_text_encoders(tmp_path: Path, models: Models, all_in_one: bool) -> None:
    native, vae = native_transformer(models.transformer), native_vae(models.vae)
    clip, t5 = clip_file(models.clip), t5_file(models.t5)
    if all_in_one:
        file = written(
            tmp_path / "all.safetensors",
            prefixed(PREFIX, native),
            prefixed("vae.", vae),
            prefixed("text_encoders.clip_l.transformer.", clip),
            prefixed("text_encoders.t5xxl.transformer.", t5),
        )
        source = ModelSource(str(file))
    else:
        source = ModelSource(
            str(written(tmp_path / "flux.safetensors", native)),
            vae=written(tmp_path / "ae.safetensors", vae),
            text_encoders=(
                written(tmp_path / "t5xxl.safetensors", t5),  # in any order
                written(tmp_path / "clip_l.safetensors", clip),
            ),
        )
    family = loaded(source, "vae", "text_encoders")

    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = models.vae.decode(latents / 0.3611 + 0.1159).sample
    assert torch.equal(family.decode_latents(latents), expected)

    conditioning = family.encode_prompts(["a photo of a sks dog"])
    t5_ids = torch.tensor([T5_IDS + [0] * (512 - len(T5_IDS))])
    clip_ids = torch.tensor([CLIP_IDS + [49407] * (77 - len(CLIP_IDS))])
    assert torch.equal(conditioning["tokens_BSD"], models.t5(t5_ids).last_hidden_state)
    assert torch.equal(conditioning["pooled_BD"], models.clip(clip_ids).pooler_output)
    assert len({family.identity(part) for part in ("denoiser", "vae", "text_encoders")}) == 3


@torch.no_grad()
def test_without_guidance_the_embedding_is_bypassed(tmp_path: Path, models: Models) -> None:
    """The reference is diffusers' own transformer that has no guidance embedding, with the same other weights."""
    file = written(tmp_path / "flux.safetensors", native_transformer(models.transformer))
    noisy, t, conditioning = inputs()
    bare = Conditioning({name: conditioning[name] for name in ("tokens_BSD", "pooled_BD")})
    ours = loaded(ModelSource(str(file)), "denoiser").predict(noisy, t, bare)

    undistilled = transformer(guidance=False)
    weights = models.transformer.state_dict()
    undistilled.load_state_dict({name: weights[name] for name in undistilled.state_dict()})
    reference = written(tmp_path / "reference.safetensors", native_transformer(undistilled))
    assert torch.equal(ours, loaded(ModelSource(str(reference)), "denoiser").predict(noisy, t, bare))


def refused(source: ModelSource, *parts: Part) -> str:
    with pytest.raises(ModelError) as caught:
        Flux.load(source, frozenset(parts), dtype=torch.float32, device="cpu")
    assert caught.value.remedy
    return str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path, models: Models) -> None:
    file = str(written(tmp_path / "flux.safetensors", native_transformer(models.transformer)))
    t5 = written(tmp_path / "t5xxl.safetensors", t5_file(models.t5))
    clip = written(tmp_path / "clip_l.safetensors", clip_file(models.clip))
    for said, source, part in (
        ("holds no vae of FLUX.1.\n  Name its file (ae.safetensors)", ModelSource(file), "vae"),
        ("(clip_l.safetensors) under `model.text_encoders`", ModelSource(file), "text_encoders"),
        ("(clip_l.safetensors)", ModelSource(file, text_encoders=(t5,)), "text_encoders"),
        ("(t5xxl_fp16.safetensors)", ModelSource(file, text_encoders=(clip,)), "text_encoders"),
    ):
        assert said in refused(source, part)


def test_what_would_load_wrongly_is_refused(tmp_path: Path, models: Models) -> None:
    native = native_transformer(models.transformer)
    scale = {"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(1)}
    scaled = written(tmp_path / "scaled.safetensors", native, scale)
    assert "quantized weights with scales" in refused(ModelSource(str(scaled)), "denoiser")

    narrow = native_transformer(transformer(guidance=True, head_dim=16))
    heads = written(tmp_path / "heads.safetensors", narrow)
    assert "axes_dims_rope" in refused(ModelSource(str(heads)), "denoiser")

    depth = {**native, "img_in.weight": torch.zeros(256, 128)}
    assert "takes 128 channels" in refused(
        ModelSource(str(written(tmp_path / "depth.safetensors", depth))), "denoiser"
    )

    lacking = {name: tensor for name, tensor in native.items() if "single_blocks.1.linear2" not in name}
    assert "lacks 2 of" in refused(
        ModelSource(str(written(tmp_path / "lacking.safetensors", lacking))), "denoiser"
    )


def test_relatives_are_not_taken_for_flux(tmp_path: Path, models: Models) -> None:
    """Chroma has FLUX.1's blocks and no `vector_in`."""
    native = native_transformer(models.transformer)
    chroma = {name: tensor for name, tensor in native.items() if not name.startswith("vector_in")}
    assert not Flux.detect(ModelSource(str(written(tmp_path / "chroma.safetensors", chroma))))
