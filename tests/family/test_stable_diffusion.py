"""Stable Diffusion 1.5, 2 and XL: single files, the released sizes, and diffusers' own answers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from original_layout import (
    Weights,
    clip_in_open_clip_names,
    prefixed,
    unet_in_original_names,
    vae_in_old_diffusers_names,
    vae_in_original_names,
)
from safetensors.torch import load_file, save_file
from tiny.stable_diffusion import open_clip_h
from tiny_pipelines import build, clip_g, clip_l
from torch import Tensor

from burnish.errors import ModelError, UserError
from burnish.families import clip
from burnish.families.latent_diffusion import Layouts
from burnish.families.noise_schedule import alphas_cumprod
from burnish.families.registry import detect_family, family_named
from burnish.families.sd2 import LAYERS_READ as LAYERS_READ_OF_H
from burnish.families.sd2 import LAYOUTS as SD2_LAYOUTS
from burnish.families.sd15 import LAYOUTS as SD15_LAYOUTS
from burnish.families.sd15 import StableDiffusion15
from burnish.families.sdxl import LAYOUTS as SDXL_LAYOUTS
from burnish.families.sdxl import StableDiffusionXL
from burnish.family import Family, ModelSource
from burnish.latent_shape import PictureInfo
from burnish.placement import Part

PARTS: frozenset[Part] = frozenset(("denoiser", "vae", "text_encoders"))
PROMPTS = ["a photo of a cat", "Don't  stop: 2024!"]
NAMES = ("sd15", "sd2", "sdxl")


@dataclass(frozen=True)
class Model:
    """A tiny model with CLIP's real vocabulary, as a diffusers folder and its weights."""

    name: str
    folder: Path
    unet: Weights
    vae: Weights
    text_encoders: list[Weights]  # with `text_model.` before all but the projection

    def text_in_single_file(self) -> Weights:
        if self.name == "sd15":
            old_buffer = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
            return prefixed({**self.text_encoders[0], **old_buffer}, "cond_stage_model.transformer.")
        if self.name == "sd2":
            return prefixed(clip_in_open_clip_names(self._whole_clip_h()), "cond_stage_model.model.")
        return {
            **prefixed(self.text_encoders[0], "conditioner.embedders.0.transformer."),
            **prefixed(clip_in_open_clip_names(self.text_encoders[1]), "conditioner.embedders.1.model."),
        }

    def _whole_clip_h(self) -> Weights:
        """With the layer above those that are read, and the projection, which is not."""
        weights, last = self.text_encoders[0], f"text_model.encoder.layers.{LAYERS_READ_OF_H - 1}."
        above = {
            last.replace(str(LAYERS_READ_OF_H - 1), str(LAYERS_READ_OF_H)) + k[len(last) :]: v + 1
            for k, v in weights.items()
            if k.startswith(last)
        }
        assert above
        return {**weights, **above, "text_projection.weight": torch.zeros(12, 32)}

    def original_unet(self) -> Weights:
        return unet_in_original_names(self.unet, stages=3 if self.name == "sdxl" else 4, layers=2)

    def original_vae(self) -> Weights:
        return vae_in_original_names(self.vae, stages=4, layers=1)

    def single_file(self) -> Weights:
        schedule = {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
        return {
            **prefixed(self.original_unet(), "model.diffusion_model."),
            **prefixed(self.original_vae(), "first_stage_model."),
            **self.text_in_single_file(),
            **schedule,
        }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {name: _built(name, tmp_path_factory.mktemp("models") / name) for name in NAMES}


def _built(name: str, folder: Path) -> Model:
    pipeline = build(name, folder)
    generator = torch.Generator().manual_seed(5)
    encoders = {"text_encoder": (clip_l(clip.shipped_tokenizer()), clip.END)}
    if name == "sd2":
        encoders["text_encoder"] = (open_clip_h(clip.shipped_tokenizer("!"), LAYERS_READ_OF_H), "!")
    if name == "sdxl":
        encoders["text_encoder_2"] = (clip_g(clip.shipped_tokenizer("!")), "!")
    texts = []
    for part, (encoder, padding) in encoders.items():
        for parameter in encoder.parameters():
            parameter.data.normal_(0, 0.2, generator=generator)
        encoder.save_pretrained(folder / part)
        clip.shipped_tokenizer(padding).save_pretrained(folder / part.replace("text_encoder", "tokenizer"))
        weights = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
        texts.append({k if k.startswith("text_proj") else f"text_model.{k}": t for k, t in weights.items()})
    return Model(name, folder, pipeline.unet.state_dict(), pipeline.vae.state_dict(), texts)


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]


def saved(weights: Weights, path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path)
    return path


def loaded(name: str, source: ModelSource | Path, dtype: torch.dtype = torch.float32) -> Family:
    source = source if isinstance(source, ModelSource) else ModelSource(str(source))
    return family_named(name).load(source, PARTS, dtype=dtype, device="cpu")


def answers(family: Family) -> dict[str, Tensor]:
    """Everything a family computes, for one picture and two captions."""
    conditioning = family.encode_prompts(PROMPTS)
    conditioning = conditioning.merged(
        family.describe_pictures([PictureInfo((90, 70), (3, 5), (64, 64))] * 2)
    )
    generator = torch.Generator().manual_seed(1)
    latents_BCHW = family.encode_pixels(torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1)
    return {
        **conditioning,
        "latents": latents_BCHW,
        "pixels": family.decode_latents(latents_BCHW),
        "predicted": family.predict(latents_BCHW, torch.tensor([0.25, 0.75]), conditioning),
    }


def assert_same_answers(one: Family, other: Family) -> None:
    expected = answers(one)
    for name, tensor in answers(other).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_single_file_in_the_original_layout_answers_as_the_folder(model: Model, tmp_path: Path) -> None:
    path = saved(model.single_file(), tmp_path / "model.safetensors")
    assert detect_family(ModelSource(str(path))) is family_named(model.name)
    from_file = loaded(model.name, path)
    assert_same_answers(loaded(model.name, model.folder), from_file)
    identities = {from_file.identity(part) for part in PARTS}
    assert len(identities) == len(PARTS)  # though all three parts are the same file


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_separate_files_as_comfyui_has_them_answer_as_the_folder(
    model: Model, prefix: str, tmp_path: Path
) -> None:
    texts = [
        saved(weights, tmp_path / f"clip_{n}.safetensors") for n, weights in enumerate(model.text_encoders)
    ]
    source = ModelSource(
        str(saved(prefixed(model.original_unet(), prefix), tmp_path / "unet.safetensors")),
        vae=saved(model.original_vae(), tmp_path / "vae.safetensors"),
        text_encoders=tuple(reversed(texts)),  # told apart by width, not by order
    )
    assert detect_family(source) is family_named(model.name)
    assert_same_answers(loaded(model.name, model.folder), loaded(model.name, source))


def test_a_unet_file_in_diffusers_names_and_an_old_vae_load_as_well(model: Model, tmp_path: Path) -> None:
    source = ModelSource(
        str(saved(model.unet, tmp_path / "unet.safetensors")),
        vae=saved(vae_in_old_diffusers_names(model.vae), tmp_path / "vae.safetensors"),
        text_encoders=tuple(
            saved(w, tmp_path / f"{n}.safetensors") for n, w in enumerate(model.text_encoders)
        ),
    )
    assert_same_answers(loaded(model.name, model.folder), loaded(model.name, source))


def test_a_vae_file_replaces_the_folders_own(model: Model, tmp_path: Path) -> None:
    vae = {name: tensor * 1.01 for name, tensor in model.vae.items()}
    path = saved(vae, tmp_path / "vae.safetensors")
    plain = loaded(model.name, model.folder)
    replaced = loaded(model.name, ModelSource(str(model.folder), vae=path))
    assert replaced.identity("vae") != plain.identity("vae")
    assert replaced.identity("denoiser") == plain.identity("denoiser")
    pixels_B3HW = torch.zeros(1, 3, 64, 64)
    assert not torch.equal(replaced.encode_pixels(pixels_B3HW), plain.encode_pixels(pixels_B3HW))


def test_a_file_without_text_encoders_says_which_option_names_them(model: Model, tmp_path: Path) -> None:
    path = saved(prefixed(model.original_unet(), "model.diffusion_model."), tmp_path / "unet.safetensors")
    kind = family_named(model.name)
    for part, option in (("text_encoders", "model.text_encoders"), ("vae", "model.vae")):
        with pytest.raises(ModelError) as caught:
            kind.load(ModelSource(str(path)), frozenset([part]), dtype=torch.float32, device="cpu")
        assert option in caught.value.remedy


def test_missing_tensors_are_named(model: Model, tmp_path: Path) -> None:
    weights = model.single_file()
    del weights["model.diffusion_model.middle_block.0.in_layers.2.bias"]
    del weights["model.diffusion_model.out.2.bias"]
    path = saved(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"UNet lacks 2 of \d+ tensors, such as .*conv_out\.bias"):
        loaded(model.name, path)


def test_tensors_that_nothing_uses_are_reported(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {**model.single_file(), "model.diffusion_model.adapter.0.weight": torch.zeros(1)}
    path = saved(weights, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, logger="burnish"):
        loaded(model.name, path)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("burnish")] == [
        "UNet: 1 tensors are not used, such as adapter.0.weight"
    ]


def test_another_shape_than_the_config_says_is_an_error(model: Model, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model.folder, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.weight"] = torch.zeros(4, 3, 3, 3)
    saved(tensors, weights)
    with pytest.raises(ModelError, match=r"conv_out.weight is \(4, 3, 3, 3\) in .*, expected"):
        loaded(model.name, copy)


def test_a_pruned_unet_with_uneven_transformers_loads(models: dict[str, Model], tmp_path: Path) -> None:
    """As SSD-1B and Vega: transformer depths that differ from layer to layer."""
    config = UNet2DConditionModel.load_config(models["sdxl"].folder / "unet")
    down, up = [[0, 0], [2, 2], [3, 3]], [[3, 1, 2], [2, 1, 1], [0, 0, 0]]
    config |= {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}
    torch.manual_seed(0)
    pruned = UNet2DConditionModel.from_config(config).eval()
    original = unet_in_original_names(pruned.state_dict(), stages=3, layers=2)
    path = saved(prefixed(original, "model.diffusion_model."), tmp_path / "pruned.safetensors")
    family = StableDiffusionXL.load(
        ModelSource(str(path)), frozenset(["denoiser"]), dtype=torch.float32, device="cpu"
    )
    noisy_BCHW, t_B, conditioning = family.example(64, 64, batch=1)
    with torch.no_grad():
        expected_BCHW = pruned(
            noisy_BCHW,
            t_B * 1000,
            conditioning["tokens_BSD"],
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_BD"],
                "time_ids": conditioning["time_ids_B6"],
            },
        ).sample
    assert torch.equal(family.predict(noisy_BCHW, t_B, conditioning), expected_BCHW)


def test_a_single_file_marked_as_v_prediction_is_read_so(models: dict[str, Model], tmp_path: Path) -> None:
    marked = {**models["sdxl"].single_file(), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    schedule = loaded("sdxl", saved(marked, tmp_path / "marked.safetensors")).schedule
    assert schedule.prediction == "v"
    assert schedule.scheduler["prediction_type"] == "v_prediction"
    assert schedule.alphas_cumprod is not None
    assert schedule.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(("spread", "prediction"), [(0.05, "epsilon"), (0.12, "v")])
def test_what_a_single_file_of_stable_diffusion_2_predicts_is_told_by_a_norm(
    models: dict[str, Model], tmp_path: Path, spread: float, prediction: str
) -> None:
    weights = models["sd2"].single_file()
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    weights[name] = torch.linspace(-1.73, 1.73, len(weights[name])) * spread
    path = saved(weights, tmp_path / "model.safetensors")
    family = loaded("sd2", path)
    assert family.schedule.prediction == prediction
    assert family.defaults.size == ((768, 768) if prediction == "v" else (512, 512))
    asked = family_named("sd2").load(
        ModelSource(str(path)), frozenset(), dtype=torch.float32, device="cpu", prediction="v"
    )
    assert asked.schedule.prediction == "v"


@pytest.mark.parametrize("name", NAMES)
def test_an_inpainting_unet_of_a_single_file(models: dict[str, Model], tmp_path: Path, name: str) -> None:
    weights = models[name].single_file()
    first = "model.diffusion_model.input_blocks.0.0.weight"
    weights[first] = torch.cat([weights[first], weights[first], weights[first][:, :1]], dim=1)
    source = ModelSource(str(saved(weights, tmp_path / "model.safetensors")))
    assert detect_family(source) is family_named(name)
    family = loaded(name, source)
    assert family.capabilities.masks
    assert family.capabilities.references == 1
    noisy_BCHW, t_B, conditioning = family.example(64, 64, batch=1)
    whole = torch.cat([torch.ones(1, 1, 8, 8), torch.zeros(1, 4, 8, 8)], dim=1)
    without = family.predict(noisy_BCHW, t_B, conditioning)
    assert torch.equal(family.predict(noisy_BCHW, t_B, conditioning.merged({"hole_B5HW": whole})), without)
    assert not torch.equal(
        family.predict(noisy_BCHW, t_B, conditioning.merged({"hole_B5HW": whole * 0})), without
    )


@pytest.mark.parametrize("name", NAMES)
def test_captions_and_predictions_equal_the_pipelines_own(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(name))
    family = loaded(name, tiny_folder(name))
    prompts = ["a photo of a sks dog", ""]
    conditioning = family.encode_prompts(prompts)
    picture = PictureInfo((512, 384), (10, 20), (64, 64))
    conditioning = conditioning.merged(family.describe_pictures([picture] * 2))
    noisy_BCHW, _, _ = family.example(64, 64, batch=2)
    extra = {}
    with torch.no_grad():
        if name == "sdxl":
            tokens_BSD, _, pooled_BD, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
            assert torch.equal(conditioning["pooled_BD"], pooled_BD)
            time_ids = pipeline._get_add_time_ids(
                picture.original, picture.crop, picture.target, torch.float32, pooled_BD.shape[1]
            )
            extra = {
                "added_cond_kwargs": {"text_embeds": pooled_BD, "time_ids": time_ids.repeat(2, 1)},
            }
        else:
            tokens_BSD, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        assert torch.equal(conditioning["tokens_BSD"], tokens_BSD)
        expected = pipeline.unet(noisy_BCHW, torch.tensor([731.0, 731.0]), tokens_BSD, **extra).sample
    found = family.predict(noisy_BCHW, torch.tensor([0.731] * 2).double(), conditioning)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_sdxl_time_ids_stay_exact_when_the_conditioning_is_cast(tiny_sdxl: Path) -> None:
    family = StableDiffusionXL.load(
        ModelSource(str(tiny_sdxl)), frozenset(), dtype=torch.bfloat16, device="cpu"
    )
    described = family.describe_pictures([PictureInfo((1025, 769), (1, 3), (1001, 999))])
    assert described.to("cpu", torch.bfloat16)["time_ids_B6"].tolist() == [[1025, 769, 1, 3, 1001, 999]]


def test_sdxl_vae_stays_in_float32_when_the_rest_is_float16(tiny_sdxl: Path) -> None:
    latents_BCHW = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        family = StableDiffusionXL.load(
            ModelSource(str(tiny_sdxl)), frozenset(["vae"]), dtype=dtype, device="cpu"
        )
        latents_BCHW[dtype] = family.encode_pixels(torch.zeros(1, 3, 64, 64))
    assert latents_BCHW[torch.float16].dtype == torch.float32
    assert torch.equal(latents_BCHW[torch.float16], latents_BCHW[torch.float32])
    assert latents_BCHW[torch.bfloat16].dtype == torch.bfloat16


# Parameters of the released models: SD 1.5 as counted in arXiv 2112.10752 and the model cards, SDXL 2.6 B and
# 83.7 M of arXiv 2307.01952, OpenAI CLIP ViT-L/14 text 123 M, OpenCLIP bigG text 695 M,
# and ViT-H without its last layer 340 M.
@pytest.mark.parametrize(
    ("layouts", "unet", "text"),
    [
        (SD15_LAYOUTS, 859_520_964, [123_060_480]),
        (SD2_LAYOUTS, 865_910_724, [340_387_840]),
        (SDXL_LAYOUTS, 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_shipped_configs_give_the_released_sizes(layouts: Layouts, unet: int, text: list[int]) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = layouts.config
    with torch.device("meta"):
        denoiser = UNet2DConditionModel.from_config(config["unet"])
        vae = AutoencoderKL.from_config(config["vae"])
        encoders = [
            (CLIPTextModelWithProjection if place.projection else CLIPTextModel)(CLIPTextConfig(**encoder))
            for place, encoder in zip(layouts.text_encoders, config["text_encoders"], strict=True)
        ]
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == unet
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    assert [sum(parameter.numel() for parameter in encoder.parameters()) for encoder in encoders] == text


@pytest.mark.parametrize(
    "config",
    [
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "rescale_betas_zero_snr": True,
        },
        {"beta_schedule": "linear"},
        {},
        {"beta_schedule": "squaredcos_cap_v2"},
        {
            "beta_start": 0.00085,
            "beta_end": 0.014,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1100,
        },
        {"trained_betas": [0.001 + 0.00001 * step for step in range(1000)]},
    ],
)
def test_the_noise_schedule_is_that_of_diffusers(config: dict[str, Any]) -> None:
    expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod
    found = alphas_cumprod(config)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-7)


def test_an_unknown_noise_schedule_is_an_error() -> None:
    with pytest.raises(ModelError, match="'sigmoid'"):
        alphas_cumprod({"beta_schedule": "sigmoid"})


def test_prediction_can_be_overridden_but_not_by_velocity(tiny_sd15: Path) -> None:
    source = ModelSource(str(tiny_sd15))
    kind = StableDiffusion15
    family = kind.load(source, frozenset(), dtype=torch.float32, device="cpu", prediction="v")
    assert family.schedule.prediction == "v"
    assert family.schedule.scheduler["prediction_type"] == "v_prediction"
    with pytest.raises(UserError, match="velocity"):
        kind.load(source, frozenset(), dtype=torch.float32, device="cpu", prediction="velocity")


# Ids as OpenAI's own tokenizer gives them (clip.tokenize of https://github.com/openai/CLIP).
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("Don't  stop\nme now", [847, 713, 1691, 614, 692]),
        ("SKS dog ohwx woman", [48136, 1929, 47993, 2308]),
        ("Straße ñandú", [1894, 127, 253, 324, 6445, 672, 36019]),
        (
            "Élan, it's 2024! 😀 日本",
            [3459, 4872, 267, 585, 568, 273, 271, 273, 275, 256, 7334, 39121, 19277, 361],
        ),
    ],
)
def test_the_shipped_tokenizer_is_clips(text: str, ids: list[int]) -> None:
    tokenizer = clip.shipped_tokenizer()
    assert len(tokenizer) == 49_408
    padded = clip.token_ids(tokenizer, [text])[0].tolist()
    assert padded == [49406, *ids, 49407] + [49407] * (75 - len(ids))
    assert clip.token_ids(clip.shipped_tokenizer("!"), [text])[0].tolist()[len(ids) + 2 :] == [0] * (
        75 - len(ids)
    )
