"""LTX-2 trained with its sound: both losses fall, clips without sound train frames alone, samples are heard."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clip_files import clip_bytes, clip_with_caption
from diffusers import LTX2Pipeline
from PIL import Image
from runs import digest, last_checkpoint, run_config
from safetensors import safe_open
from sound_files import clip_with_sound, tone
from tiny.ltx2 import BOTH
from torch import Tensor
from typer.testing import CliRunner

from burnish.cli.main import app
from burnish.config.schema import RunConfig
from burnish.data.audio import sound_of
from burnish.data.batch import Batch
from burnish.data.clips import inspect_clip
from burnish.diffusion.distance import squared_error
from burnish.errors import UserError
from burnish.events import Listener, StepReport
from burnish.families.ltx2 import LTX2
from burnish.family import ModelSource
from burnish.generate import attach_adapter, generate_pictures
from burnish.objective import Denoising
from burnish.run import train_run
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests

FRAMES, SIDE, CAPTION = 9, 64, "a grey thing that hums"
TRAINED = {
    "method": {"rank": 4, "alpha": 10},
    "train.optimizer.learning_rate": 1e-2,
    "train.schedule": {"kind": "constant"},
}


class Heard(Listener):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.held_out: list[float] = []
        self.drawn: list[Path] = []
        self.said: list[str] = []

    def stepped(self, report: StepReport) -> None:
        self.losses.append(report.loss)

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        self.held_out.append(loss)

    def sampled(self, step: int, pictures: Any) -> None:
        self.drawn += pictures

    def warned(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    BOTH.build(0).save_pretrained(folder)
    return folder


def hum(hertz: float) -> bytes:
    sound = np.stack([tone(hertz, 0.5, 48000), tone(2 * hertz, 0.5, 48000)])
    return clip_with_sound(sound, 48000, frames=12, kind="mp4", codec="aac", size=(SIDE, SIDE))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips with sound, one without, and a picture."""
    folder = tmp_path_factory.mktemp("clips")
    clip_with_caption(folder / "a.mp4", hum(300), CAPTION)
    clip_with_caption(folder / "b.mp4", hum(500), CAPTION)
    clip_with_caption(folder / "silent.mp4", clip_bytes(12, 24, size=(SIDE, SIDE)), CAPTION)
    Image.new("RGB", (SIDE, SIDE), "red").save(folder / "still.png")
    (folder / "still.txt").write_text(CAPTION)
    return folder


def config_of(model: Path, clips: Path, output: Path, **more: Any) -> RunConfig:
    source = {"path": str(clips), "resolutions": [SIDE], "bucket_step": 32, "frames": [FRAMES]}
    return run_config(
        model, clips, output, {"model.audio": True, "data": [source], "train.steps": 6, **TRAINED, **more}
    )


def trained(config: RunConfig) -> tuple[Heard, Path]:
    heard = Heard()
    adapter = train_run(config, progress=heard).adapter
    assert adapter is not None
    assert np.isfinite(heard.losses).all()
    return heard, adapter


def load(model: Path) -> LTX2:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return LTX2.load(ModelSource(str(model), audio=True), parts, dtype=torch.float32, device="cpu")


def both_losses(family: LTX2) -> tuple[float, float]:
    """Of frames and of sound, at fixed times and noise, of a clip that is grey and hums."""
    assert family.audio is not None
    draw = torch.Generator().manual_seed(5)
    rate = family.audio.shape.sample_rate
    samples = round(FRAMES / 24 * rate)
    sound = torch.from_numpy(np.stack([tone(300, 1, rate), tone(600, 1, rate)]))[None, :, :samples]
    grey = torch.stack([torch.full((3, SIDE, SIDE), 8 * number / 127.5 - 1) for number in range(FRAMES)], 1)
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        latents, audio = family.encode_pixels(grey[None]), family.audio.encode(sound)
        told = family.encode_prompts([CAPTION])
        for number in range(8):
            t = 0.05 + 0.9 * number / 7
            noise, hiss = (torch.randn(one.shape, generator=draw) for one in (latents, audio))
            frames, heard = family.audio.predict(
                (1 - t) * latents + t * noise, (1 - t) * audio + t * hiss, torch.tensor([t]), told
            )
            found.append((squared_error(frames, noise - latents), squared_error(heard, hiss - audio)))
    video, sounds = (float(torch.stack(list(column)).mean()) for column in zip(*found, strict=True))
    return video, sounds


def test_twenty_steps_lower_both_losses_and_diffusers_draws_the_same(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    _, adapter = trained(config_of(model, clips, tmp_path, **{"train.steps": 24}))
    with safe_open(adapter, framework="pt") as file:
        names = set(file.keys())
    for part in ("attn1", "ff", "audio_attn1", "audio_ff", "audio_to_video_attn", "video_to_audio_attn"):
        assert any(f".transformer_blocks.0.{part}." in name for name in names), part

    family = load(model)
    before, plain = both_losses(family), drawn(family)
    attach_adapter(family, adapter, note=pytest.fail)
    after, with_adapter = both_losses(family), drawn(family)
    assert after[0] < 0.97 * before[0]
    assert after[1] < 0.97 * before[1]
    pipeline = LTX2Pipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    answer = pipeline(
        prompt=[CAPTION],
        negative_prompt=[""],
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=2,
        guidance_scale=3.0,
        audio_guidance_scale=3.0,
        generator=[torch.Generator("cpu").manual_seed(7)],
        output_type="latent",
        **BOTH.call,
    )
    vae = pipeline.audio_vae
    sound = (answer.audio - vae.latents_mean.view(1, 1, 1, -1)) / vae.latents_std.view(1, 1, 1, -1)
    theirs = BOTH.unpack(pipeline, answer.frames)[0], sound[0]
    for ours, reference, without in zip(with_adapter, theirs, plain, strict=True):
        torch.testing.assert_close(ours, reference.detach(), atol=1e-4, rtol=0)
        assert (ours - without).abs().max() > 0.01, "the adapter has no effect to compare"


def drawn(family: LTX2) -> tuple[Tensor, Tensor]:
    request = PictureRequest(CAPTION, "", 7, SIDE, SIDE, 2, 3.0, frames=FRAMES)
    encoded = encode_requests(family, [request])
    (both,) = draw_latents(family, encoded, device="cpu", dtype=torch.float32)
    assert isinstance(both, tuple)
    return both


def test_the_loss_is_that_of_frames_and_that_of_sound_added_up(model: Path) -> None:
    """By the equations of flow matching, with noise of each its own and one time."""
    family = load(model)
    assert family.audio is not None
    latents, _, told = family.example(SIDE, SIDE, batch=2, frames=FRAMES)
    audio = torch.randn(2, *family.audio.shape.of(FRAMES / 24))
    batch = Batch(latents, told, torch.ones(2), ("a", "b"), ("a", "b"), 3, audio)
    objective = Denoising(family.schedule)
    with torch.no_grad():
        loss_B, t_B = objective.losses(family, batch, seed=1)
        noise, hiss = objective.draw_noise(batch, 1), objective.draw_audio_noise(batch, 1)
        assert hiss is not None
        t = t_B.view(-1, 1, 1, 1)
        noisy = (1 - t[..., None]) * latents + t[..., None] * noise
        frames, heard = family.audio.predict(noisy, (1 - t) * audio + t * hiss, t_B, told)
    expected = ((frames - (noise - latents)) ** 2).mean((1, 2, 3, 4)) + ((heard - (hiss - audio)) ** 2).mean(
        (1, 2, 3)
    )
    torch.testing.assert_close(loss_B, expected)
    assert not torch.equal(hiss[0], hiss[1])


def test_a_run_samples_with_sound_validates_and_says_what_is_silent(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    sample = {
        "every": 3,
        "at_start": False,
        "size": [SIDE, SIDE],
        "steps": 2,
        "frames": 25,
        "prompts": [CAPTION, {"prompt": CAPTION, "frames": 1}],
    }
    validation = {"every": 3, "pictures": 1}
    heard, adapter = trained(
        config_of(model, clips, tmp_path, **{"sample": sample, "train.validation": validation})
    )
    assert len(heard.held_out) == 2
    assert np.isfinite(heard.held_out).all()
    assert any(
        "1 clip(s) or parts of clips train without sound" in one and "silent.mp4" in one for one in heard.said
    )
    assert [path.suffix for path in heard.drawn] == [".mp4", ".png"] * 2
    check_heard(heard.drawn[0], seconds=25 / 24)
    (again,) = generate_pictures(
        config_of(model, clips, tmp_path).model,
        [PictureRequest(CAPTION, height=SIDE, width=SIDE, steps=2, frames=FRAMES)],
        tmp_path / "pictures",
        adapters=[(adapter, 1.0)],
        device="cpu",
        precision="fp32",
    )
    check_heard(again, seconds=FRAMES / 24)


def check_heard(path: Path, seconds: float) -> None:
    data = io.BytesIO(path.read_bytes())
    assert inspect_clip(data, max_megapixels=1).duration == pytest.approx(seconds)
    span = sound_of(data)
    assert span is not None
    assert span.start == pytest.approx(0, abs=0.05)
    assert span.end == pytest.approx(seconds, abs=0.1)
    with av.open(path) as container:
        (stream,) = container.streams.audio
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("aac", 24000, 2)


def test_a_run_that_was_stopped_ends_in_the_same_bits(model: Path, clips: Path, tmp_path: Path) -> None:
    def config(where: str, steps: int, **more: Any) -> RunConfig:
        return config_of(model, clips, tmp_path / where, **{"train.steps": steps, "save.every": 3, **more})

    straight, _ = trained(config("straight", 6))
    trained(config("stopped", 3))
    with pytest.raises(UserError, match=r"model.audio: True -> False"):
        train_run(config("stopped", 6, **{"model.audio": False}), progress=Listener())
    rest, _ = trained(config("stopped", 6))
    assert rest.losses == straight.losses[3:]
    assert digest(last_checkpoint(tmp_path / "stopped")) == digest(last_checkpoint(tmp_path / "straight"))


def test_without_sound_the_same_clips_train_frames_alone(model: Path, clips: Path, tmp_path: Path) -> None:
    heard, adapter = trained(config_of(model, clips, tmp_path, **{"model.audio": False}))
    with safe_open(adapter, framework="pt") as file:
        assert not [name for name in file.keys() if "audio" in name]  # noqa: SIM118
    assert not any("sound" in line for line in heard.said)


def test_burnish_generate_draws_with_sound(model: Path, tmp_path: Path) -> None:
    options = ["--model", str(model), "--audio", "-p", CAPTION, "--frames", str(FRAMES), "--size", str(SIDE)]
    where = ["--steps", "2", "--device", "cpu", "--precision", "fp32", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, ["generate", *options, *where])
    assert result.exit_code == 0, result.output
    check_heard(tmp_path / "000001.mp4", seconds=FRAMES / 24)
    assert json.loads((tmp_path / "000001.json").read_text())["sound"] is True
