"""One of Wan 2.2's two denoisers is trained alone, at its own times, and diffusers draws with it as we do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from runs import picture_folder, run_config
from safetensors import safe_open

from burnish.conditioning import Conditioning
from burnish.config.objective import Objective
from burnish.config.schema import Memory, Model
from burnish.data.batch import Batch
from burnish.events import Events, Listener
from burnish.families.wan22 import Wan22
from burnish.family import ModelSource
from burnish.generate import attach_adapter, draw_pictures_with
from burnish.objective import Denoising
from burnish.run import train_run
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests
from burnish.tasks import Validate

TinyFolder = Callable[[str], Path]
PROMPT, SEED, STEPS, GUIDANCE, SIDE, FRAMES = "a sks dog", 7, 4, 3.0, 64, 5


def drawn(model: Path, adapter: Path | None) -> torch.Tensor:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    family = Wan22.load(ModelSource(str(model)), parts, dtype=torch.float32, device="cpu")
    if adapter is not None:
        attach_adapter(family, adapter, note=pytest.fail)
    request = PictureRequest(PROMPT, "", SEED, SIDE, SIDE, STEPS, GUIDANCE, frames=FRAMES)
    return draw_latents(family, encode_requests(family, [request]), device="cpu", dtype=torch.float32)[0]


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
def test_one_denoiser_alone(tiny_folder: TinyFolder, tmp_path: Path, part: str) -> None:
    model = tiny_folder("wan22")
    config = run_config(
        model,
        picture_folder(tmp_path / "pictures"),
        tmp_path,
        {
            "model.family": "wan22",
            "model.denoisers": [part],
            "train.steps": 8,
            "train.optimizer.learning_rate": 0.05,
            "train.schedule.warmup_steps": 0,
            "method.dropout": 0.0,
            "data.0.captions": {},
            "save.dtype": "float32",
        },
    )
    adapter = train_run(config, progress=Listener()).adapter
    assert adapter is not None
    with safe_open(adapter, "pt") as opened:
        assert opened.metadata()["burnish.part"] == part
    found = drawn(model, adapter)
    assert (found - drawn(model, None)).abs().max() > 0.01

    pipeline = WanPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(
        adapter.parent, weight_name=adapter.name, load_into_transformer_2=part == "transformer_2"
    )
    reference = pipeline(
        prompt=[PROMPT],
        negative_prompt=[""],
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(SEED)],
        output_type="latent",
    ).frames[0]
    torch.testing.assert_close(found, reference.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("denoisers", "low", "high"),
    [((), 0.0, 1.0), (("transformer",), 0.875, 1.0), (("transformer_2",), 0.0, 0.875)],
)
def test_times_are_those_of_the_denoiser(
    tiny_folder: TinyFolder, denoisers: tuple[str, ...], low: float, high: float
) -> None:
    source = ModelSource(str(tiny_folder("wan22")), denoisers=denoisers)
    family = Wan22.load(source, frozenset(), dtype=torch.float32, device="cpu")
    batch = Batch(
        latents_BCHW=torch.zeros(400, 1, 1, 1, 1),
        conditioning=Conditioning({}),
        weight_B=torch.ones(400),
        sample_ids=tuple(str(number) for number in range(400)),
        paths=("",) * 400,
        position=0,
    )
    for section in (Objective(), Objective(range=(0.5, 1.0))):
        times = Denoising.of(section, family).draw_times(batch, seed=1, tokens=1)
        first = low + section.range[0] * (high - low)
        assert first <= times.min() < first + 0.2 * (high - first)
        assert high - 0.2 * (high - first) < times.max() <= high


@pytest.mark.parametrize(
    ("denoisers", "expected"),
    [((), [0.2, 0.9]), (("transformer",), [0.9, 0.9875]), (("transformer_2",), [0.175, 0.7875])],
)
def test_held_out_times_are_those_of_the_denoiser(
    tiny_folder: TinyFolder, denoisers: tuple[str, ...], expected: list[float]
) -> None:
    source = ModelSource(str(tiny_folder("wan22")), denoisers=denoisers)
    family = Wan22.load(source, frozenset(("denoiser",)), dtype=torch.float32, device="cpu")
    latents, _, conditioning = family.example(SIDE, SIDE, batch=1)
    batch = Batch(latents, conditioning, torch.ones(1), ("a#0",), ("a.png",), 0)
    judged: list[float] = []

    class Seen(Denoising):
        def losses_at(self, family: Any, batch: Any, noise: Any, t_B: Any, *more: Any, **named: Any) -> Any:
            judged.extend(t_B.tolist())
            return super().losses_at(family, batch, noise, t_B, *more, **named)

    objective = Seen(family.schedule)
    run: Any = SimpleNamespace(
        family=family, device="cpu", seed=0, objective=objective, told=lambda one: one, batch_parts=1
    )
    validate = Validate(lambda: iter([batch]), (0.2, 0.9), 1, 0.0, Events())
    assert math.isfinite(validate.loss(run))
    assert judged == pytest.approx(expected)


@pytest.mark.parametrize(("denoisers", "said"), [(["transformer_2"], 1), ([], 0)])
def test_samples_of_one_denoiser_alone_are_said_to_be_so(
    tiny_folder: TinyFolder, tmp_path: Path, denoisers: list[str], said: int
) -> None:
    heard: list[str] = []

    class Warned(Listener):
        def warned(self, text: str) -> None:
            heard.append(text)

    more = {
        "model.denoisers": denoisers,
        "train.steps": 2,
        "train.schedule.warmup_steps": 0,
        "sample": {"every": 1, "prompts": [PROMPT], "size": SIDE, "steps": 1},
    }
    config = run_config(tiny_folder("wan22"), picture_folder(tmp_path / "pictures"), tmp_path, more)
    train_run(config, progress=Warned())
    assert len([line for line in heard if "transformer_2 alone" in line and "0 to 0.875" in line]) == said


@pytest.mark.parametrize(("denoisers", "said"), [(["transformer"], 1), ([], 0)])
def test_pictures_of_one_denoiser_alone_are_said_to_be_so(
    tiny_folder: TinyFolder, caplog: pytest.LogCaptureFixture, denoisers: list[str], said: int
) -> None:
    model = Model(path=str(tiny_folder("wan22")), denoisers=denoisers)
    request = PictureRequest(PROMPT, "", SEED, SIDE, SIDE, 1, 1.0, frames=1)
    assert len(list(draw_pictures_with(model, [request] * 2, device="cpu", precision="fp32"))) == 2
    assert (
        len([line for line in caplog.messages if "transformer alone" in line and "0.875 to 1" in line])
        == said
    )


def test_both_experts_stream_as_they_are_loaded(tiny_folder: TinyFolder) -> None:
    model = Model(path=str(tiny_folder("wan22")))
    request = PictureRequest(PROMPT, "", SEED, SIDE, SIDE, 2, 1.0, frames=1)

    def drawn(memory: Memory) -> bytes:
        (picture,) = draw_pictures_with(model, [request], memory=memory, device="cpu", precision="fp32")
        return picture.tobytes()

    assert drawn(Memory(stream=1.0)) == drawn(Memory())
