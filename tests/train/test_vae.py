"""A VAE learns to show pictures better, stays compatible, and is what diffusers and we read back."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from PIL import Image
from runs import digest, last_checkpoint, picture_folder, run_config
from safetensors.torch import load_file
from torch import Tensor

from burnish.config.load import load_config
from burnish.config.schema import Model, RunConfig
from burnish.data.prepare import pixels_of
from burnish.errors import ConfigError, Interrupted, UserError
from burnish.events import Listener
from burnish.model import choose_model
from burnish.reconstruction import Reconstruction, edges_of
from burnish.run import check_run, train_run
from burnish.run_folder import RunFolder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures without captions; of other sizes than what is cut from them."""
    folder = picture_folder(tmp_path_factory.mktemp("pictures") / "eight", count=8, size=96)
    for caption in folder.glob("*.txt"):
        caption.unlink()
    return folder


def vae_config(
    model: Path, pictures: Path, output: Path, changes: Mapping[str, Any] | None = None
) -> RunConfig:
    method = {"kind": "vae", "crop": 64, **(changes or {}).get("method", {})}
    values = {
        "data.0.resolutions": [96],
        "data.0.captions": {},
        "train.batch_size": 2,
        "train.steps": 30,
        "train.optimizer.learning_rate": 2e-3,
        "train.schedule": {"kind": "constant"},
        **{key: value for key, value in (changes or {}).items() if key != "method"},
    }
    values["method"] = method
    return run_config(model, pictures, output, values)


class Heard(Listener):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.warnings: list[str] = []

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        self.losses.append(loss)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def unseen() -> Tensor:
    """Two pictures like those of the folder, which are not in it."""
    draw = np.random.default_rng(77)
    made = [Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(2)]
    return torch.stack([pixels_of(one.resize((64, 64), Image.Resampling.BICUBIC)) for one in made])


@torch.no_grad()
def shown(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return vae.decode(vae.encode(pixels).latent_dist.mode()).sample


def test_the_decoder_of_a_real_model_shows_unseen_pictures_better(pictures: Path, tmp_path: Path) -> None:
    """The demo model's, which was trained; no single file could tell its groups of channels."""
    heard = Heard()
    changes = {
        "train.validation": {"every": 10, "pictures": 2},
        "train.optimizer.learning_rate": 5e-4,
        "train.batch_size": 1,
    }
    config = vae_config(Path("demo"), pictures, tmp_path, changes)
    result = train_run(config, progress=heard)
    assert heard.losses[-1] < heard.losses[0]
    assert not [line for line in heard.warnings if "caption" in line]
    before = choose_model(config.model).load("vae", dtype=torch.float32, device="cpu").loaded["vae"]
    assert isinstance(before, AutoencoderKL)
    models = RunFolder(result.folder).models
    after = AutoencoderKL.from_pretrained(models / "tiny" / "vae")
    pixels = unseen()
    assert F.mse_loss(shown(after, pixels), pixels) < 0.6 * F.mse_loss(shown(before, pixels), pixels)
    assert not list(models.glob("*.safetensors"))
    with pytest.raises(ConfigError, match=r"groups of channels"):
        train_run(
            vae_config(Path("demo"), pictures, tmp_path / "file", {"save.format": "comfy"}), progress=heard
        )


@pytest.mark.parametrize(("name", "encoder"), [("sd15", False), ("flux", True)])
def test_it_shows_unseen_pictures_better_and_loads_in_diffusers(
    tiny_folder: Any, pictures: Path, tmp_path: Path, name: str, encoder: bool
) -> None:
    model = tiny_folder(name)
    changes = {"method": {"encoder": encoder}, "train.ema": {"decay": 0.5}}
    result = train_run(vae_config(model, pictures, tmp_path, changes), progress=Listener())
    models = RunFolder(result.folder).models
    before = AutoencoderKL.from_pretrained(model / "vae")
    after, again = (AutoencoderKL.from_pretrained(models / "tiny" / "vae") for _ in range(2))
    pixels = unseen()
    assert F.mse_loss(shown(after, pixels), pixels) < 0.8 * F.mse_loss(shown(before, pixels), pixels)

    old, new = before.state_dict(), after.state_dict()
    moved = {key.split(".")[0] for key in new if not torch.equal(old[key], new[key])}
    sides = {key.split(".")[0] for key in new if encoder or key.startswith(("decoder", "post_quant"))}
    assert moved == sides
    average = last_checkpoint(tmp_path).tensors["ema"]
    assert torch.equal(average["vae.decoder.conv_in.weight"], new["decoder.conv_in.weight"])

    # The single file: what diffusers' own converter makes of it, and what our reader does.
    file = models / "tiny-vae.safetensors"
    converted = convert_ldm_vae_checkpoint(load_file(file), after.config)
    again.load_state_dict(converted)
    assert all(torch.equal(one, new[key]) for key, one in again.state_dict().items())
    family = choose_model(Model(path=str(model), vae=file)).load("vae", dtype=torch.float32, device="cpu")
    latents = family.encode_pixels(pixels)
    scaled = (
        after.encode(pixels).latent_dist.mode() - (after.config.shift_factor or 0)
    ) * after.config.scaling_factor
    torch.testing.assert_close(latents, scaled, atol=1e-5, rtol=0)
    torch.testing.assert_close(family.decode_latents(latents), shown(after, pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder", [False, True])
def test_an_interrupted_run_ends_in_the_same_bits(
    tiny_folder: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: bool
) -> None:
    changes = {
        "method": {"encoder": encoder, "l1": 0.5},
        "train.steps": 6,
        "train.precision": "bf16" if encoder else "fp32",
        "memory.activations": "recompute" if encoder else "keep",
        "train.ema": {"decay": 0.9},
    }
    model = tiny_folder("sd15")
    train_run(vae_config(model, pictures, tmp_path / "straight", changes), progress=Listener())
    expected = digest(last_checkpoint(tmp_path / "straight"))
    losses = Reconstruction.losses

    def lose_and_stop(objective: Reconstruction, family: Any, batch: Any, seed: int) -> Tensor:
        if batch.position == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return losses(objective, family, batch, seed)

    stopped = vae_config(model, pictures, tmp_path / "stopped", changes)
    monkeypatch.setattr(Reconstruction, "losses", lose_and_stop)
    with pytest.raises(Interrupted):
        train_run(stopped, progress=Listener())
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "stopped").step == 4
    train_run(stopped, progress=Listener())
    assert digest(last_checkpoint(tmp_path / "stopped")) == expected


def test_edges_are_what_blurring_takes_away() -> None:
    """Shifts of brightness have none; fine stripes have more than broad ones, which have them at coarser scales."""
    flat = torch.full((1, 3, 64, 64), 0.7)
    assert edges_of(flat).abs().max() < 1e-6
    fine, broad = torch.ones(2, 1, 3, 64, 64)
    fine[..., ::2], broad[..., :32] = -1, -1
    interior = (
        2 / 3
    )  # a value among three of which one is alike: 1 - (-1 + 1 - 1) / 3 = 4/3, of two alike 2/3
    assert float(edges_of(fine)) > 2 * interior * 0.9
    assert 0 < float(edges_of(broad)) < float(edges_of(fine))
    both = torch.cat([fine, broad])
    torch.testing.assert_close(edges_of(both), torch.cat([edges_of(fine), edges_of(broad)]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sample: {prompts: [a cat]}", "sample.prompts"),
        ("train: {precision: fp16}", "overflows in fp16"),
        ("train: {objective: {noise_offset: 0.1}}", "train.objective"),
        ("data: [{kind: generated, prompts: [x]}, {path: p}]", "what it drew itself"),
        ("data: [{path: p, loss_masks: {kind: alpha}}]", "data.0.loss_masks"),
        ("memory: {gradient_release: true}", "memory.gradient_release"),
        ("method: {kind: vae, mse: 0, edges: 0}", "all 0"),
    ],
)
def test_what_does_not_go_with_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = {"data": "data: [{path: p}]", "method": "method: {kind: vae}"}
    lines[text.partition(":")[0]] = text
    (tmp_path / "run.yaml").write_text("\n".join(["name: a", "model: {path: demo}", *lines.values()]))
    with pytest.raises(ConfigError) as raised:
        load_config("run.yaml")
    assert said.replace(".0.", "[0].") in str(raised.value) or said in str(raised.value)


def test_other_kinds_of_vae_are_refused(tiny_folder: Any, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a AutoencoderKLWan; only AutoencoderKL is trained"):
        check_run(vae_config(tiny_folder("wan21"), pictures, tmp_path), Listener())
    check_run(vae_config(tiny_folder("sd15"), pictures, tmp_path), Listener())
