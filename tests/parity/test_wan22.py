"""Wan 2.2: 5B goes on from a first frame as its pipeline does; each of A14B's denoisers is for its own times."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from reference import NEGATIVES, PROMPTS, SEEDS, STEPS
from safetensors.torch import save_file
from test_families_equal_pipelines import told
from test_single_files import folder_weights, native_weights
from tiny import wan

from burnish.conditioning import Conditioning
from burnish.errors import ModelError, UserError
from burnish.families.registry import detect_family, families, family_named
from burnish.families.wan_names import NAMES
from burnish.family import ModelSource
from burnish.model import ChosenModel
from burnish.placement import Part
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests

TinyFolder = Callable[[str], Path]
FRAMES = 9
ALL: tuple[Part, ...] = ("denoiser", "vae", "text_encoders")


def load(path: Path, *parts: Part, denoisers: tuple[str, ...] = (), vae: Path | None = None) -> Any:
    source = ModelSource(str(path), vae=vae, denoisers=denoisers)
    return family_named("wan22").load(source, frozenset(parts), dtype=torch.float32, device="cpu")


def test_5b_goes_on_from_a_first_frame_as_its_pipeline(tmp_path: Path) -> None:
    wan.wide_image(0).save_pretrained(tmp_path)
    pipeline = WanImageToVideoPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    height, width = wan.SIZE
    reference = pipeline(
        image=wan.first_frame(),
        prompt=list(PROMPTS),
        negative_prompt=list(NEGATIVES),
        height=height,
        width=width,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).frames.detach()
    family = load(tmp_path, *ALL)
    assert detect_family(ModelSource(str(tmp_path))) is family_named("wan22")
    requests = [
        PictureRequest(prompt, negative, seed, height, width, STEPS, 4.0, FRAMES, references=(Path("told"),))
        for prompt, negative, seed in zip(PROMPTS, NEGATIVES, SEEDS, strict=True)
    ]
    shown = wan.told(family, FRAMES)
    encoded = [told(one, shown) for one in encode_requests(family, requests)]
    found = torch.stack(draw_latents(family, encoded, device="cpu", dtype=torch.float32))
    torch.testing.assert_close(found[:, :, 1:], reference[:, :, 1:], atol=1e-4, rtol=0)
    # The scheduler rounds times to whole thousandths, so that ours arrives at the first frame almost exactly; the
    # pipeline puts it there in the end.
    first = shown["first_frame_BCTHW"].expand(len(SEEDS), -1, -1, -1, -1)
    torch.testing.assert_close(found[:, :, :1], first, atol=5e-3, rtol=0)
    torch.testing.assert_close(reference[:, :, :1], first, atol=1e-4, rtol=0)


def test_5b_goes_on_where_the_user_says_so(tmp_path: Path) -> None:
    """The same weights draw either way; a single file cannot say which."""
    wan.wide_image(0).save_pretrained(tmp_path / "said_by_the_folder")
    folder = tmp_path / "said_by_the_user"
    shutil.copytree(tmp_path / "said_by_the_folder", folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanPipeline"}))
    file = tmp_path / "wan2.2_ti2v_5B.safetensors"
    save_file(native_weights(NAMES, folder_weights(folder, "transformer")), file)
    for path in (folder, file):
        assert not load(path).capabilities.first_frame
        asked = ChosenModel(family_named("wan22"), ModelSource(str(path), first_frame=True), None)
        assert asked.load(dtype=torch.float32, device="cpu").capabilities.first_frame
    source = ModelSource(str(folder), first_frame=True)
    asked_for = family_named("wan22").load(
        source, frozenset(("denoiser", "vae")), dtype=torch.float32, device="cpu"
    )
    noisy, t_B, told = asked_for.example(*wan.SIZE, batch=1, frames=FRAMES)
    for family in (asked_for, load(tmp_path / "said_by_the_folder", "denoiser", "vae")):
        with torch.no_grad():
            found = family.predict(noisy, t_B, told.merged(wan.told(family, FRAMES)))
            assert (found - asked_for.predict(noisy, t_B, told)).abs().max() > 1e-3
            torch.testing.assert_close(
                found, asked_for.predict(noisy, t_B, told.merged(wan.told(asked_for, FRAMES)))
            )


def test_ltx_goes_on_where_the_user_says_so(tiny_folder: TinyFolder) -> None:
    for asked in (False, True):
        source = ModelSource(str(tiny_folder("ltx")), first_frame=asked)
        family = ChosenModel(family_named("ltx"), source, None).load(dtype=torch.float32, device="cpu")
        assert family.capabilities.first_frame == asked
        assert family.capabilities.references == asked


def test_a_model_that_does_not_go_on_refuses_to(tiny_folder: TinyFolder) -> None:
    source = ModelSource(str(tiny_folder("wan21")), first_frame=True)
    with pytest.raises(UserError, match="first_frame"):
        ChosenModel(family_named("wan21"), source, None).load(dtype=torch.float32, device="cpu")


def test_first_and_last_frame_take_two_pictures(tiny_folder: TinyFolder) -> None:
    family = family_named("wan21").load(
        ModelSource(str(tiny_folder("wan21_flf2v"))), frozenset(ALL), dtype=torch.float32, device="cpu"
    )
    request = PictureRequest("a cat", height=64, width=96, frames=5, references=(Path("first"),))
    with pytest.raises(UserError, match="one picture is given"):
        encode_requests(family, [request])


def test_a_first_frame_costs_no_loss(tmp_path: Path) -> None:
    wan.wide_image(0).save_pretrained(tmp_path)
    family = load(tmp_path, *ALL)
    shown = wan.told(family, FRAMES)
    _, t_B, conditioning = family.example(*wan.SIZE, 1, FRAMES)
    data = torch.randn(1, *family.latents.of(*wan.SIZE, FRAMES), generator=torch.Generator().manual_seed(1))
    data[:, :, :1] = shown["first_frame_BCTHW"]
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(2))
    predicted = family.predict((1 - t_B) * data + t_B * noise, t_B, conditioning.merged(shown))
    torch.testing.assert_close(predicted[:, :, :1], (noise - data)[:, :, :1], atol=1e-5, rtol=1e-5)


def test_each_denoiser_answers_at_its_own_times(tiny_folder: TinyFolder) -> None:
    folder = tiny_folder("wan22")
    both = load(folder, "denoiser")
    high, low = (load(folder, "denoiser", denoisers=(part,)) for part in ("transformer", "transformer_2"))
    assert list(both.denoisers) == ["transformer", "transformer_2"]
    assert list(high.denoisers) == ["transformer"]
    assert list(low.denoisers) == ["transformer_2"]
    assert high.schedule.times == (0.875, 1.0)
    assert low.schedule.times == (0.0, 0.875)
    assert both.schedule.times == (0.0, 1.0)
    noisy, _, conditioning = both.example(64, 64, 4, frames=5)
    t_B = torch.tensor([0.3, 0.875, 0.9, 0.87], dtype=torch.float64)
    found = both.predict(noisy, t_B, conditioning)
    for row, one in enumerate((low, high, high, low)):
        rows = slice(row, row + 1)
        alone = one.predict(noisy[rows], t_B[rows], conditioning.rows(rows))
        torch.testing.assert_close(found[rows], alone, atol=1e-5, rtol=1e-5)


def test_an_unknown_denoiser_is_refused(tiny_folder: TinyFolder) -> None:
    with pytest.raises(ModelError, match="no denoiser 'transformer_3'; it has transformer, transformer_2"):
        load(tiny_folder("wan22"), denoisers=("transformer_3",))


def test_a_single_file_of_a_pair_must_be_said_which(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    file = tmp_path / "expert.safetensors"
    save_file(native_weights(NAMES, folder_weights(tiny_folder("wan22_i2v"), "transformer")), file)
    assert detect_family(ModelSource(str(file))) is family_named("wan22")
    with pytest.raises(ModelError, match="one of the two denoisers") as error:
        load(file)
    assert "model.denoisers: [transformer]" in str(error.value.remedy)


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
@pytest.mark.parametrize("name", ["wan22", "wan22_i2v"])
def test_a_single_file_is_the_denoiser_that_the_config_names(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.families.wan_names.HEAD_DIM", 12)
    folder, file = tiny_folder(name), tmp_path / "expert.safetensors"
    save_file(native_weights(NAMES, folder_weights(folder, part)), file)
    source = ModelSource(str(file), denoisers=(part,))
    assert [n for n, other in families().items() if other.detect(source)] == ["wan22"]
    alone = load(file, "denoiser", denoisers=(part,))
    reference = load(folder, "denoiser", denoisers=(part,))
    assert list(alone.denoisers) == [part]
    assert alone.schedule.times == reference.schedule.times
    assert alone.latents == reference.latents
    assert alone.capabilities == reference.capabilities
    noisy, t_B, conditioning = reference.example(64, 64, 1, frames=5)
    found = alone.predict(noisy, t_B, Conditioning(conditioning))
    torch.testing.assert_close(found, reference.predict(noisy, t_B, conditioning))
