from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from burnish.conditioning import Conditioning
from burnish.errors import DiskFull, ModelError, UserError
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.noise_schedule import Schedule
from burnish.sampling import stream
from burnish.sampling.decoding import decode_pictures
from burnish.sampling.outputs import next_number, write_picture
from burnish.sampling.sampler import PictureRequest, draw_pictures, encode_requests

REQUEST = PictureRequest("a café", "blurry", seed=7, steps=2, guidance=3.5)


def loaded(name: str, folder: Path) -> Family:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return family_named(name).load(ModelSource(str(folder)), parts, dtype=torch.float32, device="cpu")


def test_three_files_of_one_number(tmp_path: Path) -> None:
    picture = Image.new("RGB", (48, 32), "red")
    write_picture(tmp_path / "000001.png", picture, REQUEST, extra={"model": "x", "adapters": []})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001.json", "000001.png", "000001.txt"]
    assert (tmp_path / "000001.txt").read_text(encoding="utf-8") == "a café\n"
    with Image.open(tmp_path / "000001.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(picture))
    facts = json.loads((tmp_path / "000001.json").read_text(encoding="utf-8"))
    versions = facts.pop("versions")
    assert facts == {
        "prompt": "a café",
        "negative": "blurry",
        "seed": 7,
        "height": 32,
        "width": 48,
        "steps": 2,
        "guidance": 3.5,
        "true_guidance": 1.0,
        "reference_guidance": None,
        "frames": 1,
        "references": [],
        "mask": None,
        "model": "x",
        "adapters": [],
    }
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert {"burnish", "diffusers", "transformers"} < versions.keys()


def test_numbers_go_on_from_what_is_there(tmp_path: Path) -> None:
    assert next_number(tmp_path / "absent") == 1
    assert next_number(tmp_path) == 1
    for name in ("000001.png", "000012.txt", "000099.jpg", "step-500.png", "grid.png"):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 13


def test_a_folder_that_is_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises((DiskFull, OSError), match="gone"):
        write_picture(tmp_path / "gone" / "000001.png", Image.new("RGB", (8, 8)), REQUEST)


def test_pictures_of_a_broken_model_say_so(tiny_sd15: Path) -> None:
    family = loaded("sd15", tiny_sd15)
    latents = torch.zeros(4, 8, 8)
    latents[0, 0, 0] = float("nan")
    (picture,) = decode_pictures(family, [latents])
    assert "pixels are not finite" in picture.info["warning"]
    (fine,) = decode_pictures(family, [torch.zeros(4, 8, 8)])
    assert "warning" not in fine.info


def test_the_warning_is_written(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.info["warning"] = "3 of 64 pixels are not finite"
    write_picture(tmp_path / "000001.png", picture, REQUEST)
    facts = json.loads((tmp_path / "000001.json").read_text(encoding="utf-8"))
    assert facts["warning"] == "3 of 64 pixels are not finite"


def test_defaults_fill_what_a_request_leaves_open(tiny_flux: Path) -> None:
    family = loaded("flux", tiny_flux)
    (encoded,) = encode_requests(family, [PictureRequest("a cat")])
    assert (encoded.size, encoded.steps) == (family.defaults.size, family.defaults.steps)
    assert encoded.request.guidance == family.defaults.guidance
    assert encoded.conditioning["guidance_B"].tolist() == [family.defaults.guidance]
    assert encoded.negative is None


def test_no_guidance_no_negative_prompt(tiny_sdxl: Path) -> None:
    family = loaded("sdxl", tiny_sdxl)
    guided, unguided = encode_requests(
        family, [PictureRequest("a cat", "blurry", guidance=4.0), PictureRequest("a cat", guidance=1.0)]
    )
    assert unguided.negative is None
    assert guided.negative is not None
    expected: Conditioning = family.encode_prompts(["blurry"])
    assert torch.equal(guided.negative["tokens_BSD"], expected["tokens_BSD"])
    height, width = family.defaults.size
    assert guided.conditioning["time_ids_B6"].tolist() == [[height, width, 0, 0, height, width]]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PictureRequest("a cat", height=100, width=64), "height of 100 is no multiple of 16"),
        (PictureRequest("a cat", height=64, width=8), "width of 8"),
        (PictureRequest("a cat", steps=0), "at least one step"),
    ],
)
def test_requests_that_cannot_be_drawn(tiny_flux: Path, request_: PictureRequest, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_requests(loaded("flux", tiny_flux), [request_])


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_the_same_seed_draws_the_same_picture(name: str, request: pytest.FixtureRequest) -> None:
    family = loaded(name, request.getfixturevalue(f"tiny_{name}"))
    requests = [PictureRequest("a cat", seed=seed, height=32, width=64, steps=2) for seed in (1, 2, 1)]
    first, other, again = draw_pictures(family, requests, device="cpu", dtype=torch.float32)
    assert first.size == (64, 32)
    np.testing.assert_allclose(np.asarray(first).astype(int), np.asarray(again).astype(int), atol=1)
    assert np.asarray(first).tobytes() != np.asarray(other).tobytes()


def test_an_unknown_scheduler_is_named() -> None:
    schedule = Schedule("epsilon", {"_class_name": "MagicScheduler"}, torch.ones(1000))
    with pytest.raises(ModelError, match="MagicScheduler"):
        stream.make_scheduler(schedule)
