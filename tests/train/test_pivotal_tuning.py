"""A new word together with adapters: both learn, both are saved, and diffusers draws with both as we do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import test_families_learn
import torch
from runs import digest, last_checkpoint
from safetensors.torch import load_file
from test_families_learn import load, ours, pictures
from test_textual_inversion import CASES, SAID, WORD, Losses, Stop, hold_still, parts_with_word, word_config

from burnish.adapters.words import NewWord
from burnish.config.checks import contradictions
from burnish.config.schema import Model
from burnish.errors import DataError, Interrupted, UserError
from burnish.events import Listener
from burnish.generate import attach_adapter, attach_texts, draw_pictures_with, learn_word
from burnish.run import train_run
from burnish.sampling.sampler import PictureRequest

TinyFolder = Callable[[str], Path]
METHOD = {
    "rank": 4,
    "alpha": 10,
    "word": {"token": WORD, "vectors": 2, "initial": "dog", "learning_rate": 2e-2},
    "text_encoders": {"learning_rate": 1e-3},
}
SETTINGS = {
    "method": METHOD,
    "train.optimizer": {"kind": "adamw", "learning_rate": 1e-2},
    "train.steps": 20,
}


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_families_learn, "CAPTION", SAID)


def theirs(model: Path, adapter: Path, word: Path) -> torch.Tensor:
    """What diffusers draws with an adapter and a word."""
    case = CASES["sdxl"]
    pipeline = case.pipeline.from_pretrained(model)
    pipeline.register_modules(**parts_with_word(model, case, word))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    height, width = case.size
    drawn = pipeline(
        prompt=[SAID],
        negative_prompt=[""],
        height=height,
        width=width,
        num_inference_steps=test_families_learn.STEPS,
        guidance_scale=test_families_learn.GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(test_families_learn.SEED)],
        output_type="latent",
    )
    found: torch.Tensor = drawn.images[0]
    return found


def test_both_learn_and_diffusers_draws_with_both(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = CASES["sdxl"], tiny_folder("sdxl")
    pictures(tmp_path / "pictures", case.side)
    hold_still(monkeypatch)
    config = word_config(model, tmp_path, **SETTINGS)
    adapter = train_run(config, progress=(losses := Losses())).adapter
    assert losses.seen[-1] < 0.97 * losses.seen[0]
    assert adapter is not None
    assert adapter.name == "tiny.safetensors"
    word = adapter.with_name("tiny-word.safetensors")
    assert sorted(load_file(word)) == ["clip_g", "clip_l"]

    family = load(model, case)
    start = family.vocabularies["clip_l"].vectors[family.vocabularies["clip_l"].numbers("dog")[0]]
    assert learn_word(family, word) == WORD
    assert (load_file(word)["clip_l"] - start).abs().max() > 0.01, "the word did not learn"
    lengths = family.vocabularies["clip_l"].vectors.norm(dim=1)
    assert load_file(word)["clip_l"].norm(dim=1).max() <= lengths.quantile(0.99) + 1e-5
    alone = ours(family, case)
    attach_texts(family, adapter, 1.0, pytest.fail)
    with_texts = ours(family, case)
    attach_adapter(family, adapter, pytest.fail, texts_apart=True)
    whole = ours(family, case)
    assert (with_texts - alone).abs().max() > 1e-3
    assert (whole - with_texts).abs().max() > 0.01
    torch.testing.assert_close(whole, theirs(model, adapter, word), atol=1e-4, rtol=0)

    request = PictureRequest(SAID, "", 7, 64, 64, 1, 3.0)
    where = Model(path=str(model))
    draw = [
        next(iter(draw_pictures_with(where, [request], adapters=files, device="cpu", precision="fp32")))
        for files in ([], [(word, 1.0)], [(word, 1.0), (adapter, 1.0)])
    ]
    one, two, three = (picture.tobytes() for picture in draw)
    assert one != two
    assert two != three


def test_resume_is_exact(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    model = tiny_folder("sd15")
    for place in ("through", "stopped"):
        (tmp_path / place).mkdir()
        pictures(tmp_path / place / "pictures", 64)
    changes = {**SETTINGS, "train.steps": 6, "train.ema": {"decay": 0.9}}
    through = word_config(model, tmp_path / "through", **changes)
    stopped = word_config(model, tmp_path / "stopped", **changes)
    train_run(through, progress=Listener())
    with pytest.raises(Interrupted):
        train_run(stopped, progress=Stop())
    train_run(stopped, progress=Listener())
    ended = [last_checkpoint(one.save.folder) for one in (through, stopped)]
    assert digest(ended[0]) == digest(ended[1])
    saved = [
        one.save.folder / "tiny" / "adapters" / "tiny-word-00000006.safetensors" for one in (through, stopped)
    ]
    assert saved[0].read_bytes()[-64:] == saved[1].read_bytes()[-64:]


def test_what_cannot_go_together_is_named(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    config = word_config(
        tmp_path,
        tmp_path,
        **{
            "method": METHOD,
            "memory.gradient_release": True,
            "train.optimizer": {"kind": "adamw_schedule_free", "learning_rate": 1e-3},
        },
    )
    named = [".".join(str(key) for key in path) for path, _ in contradictions(config)]
    assert named[:2] == ["memory.gradient_release", "method.word.lengths"]
    pictures(tmp_path / "pictures", 64)
    for text in (tmp_path / "pictures").glob("*.txt"):
        text.write_text("a chair")
    with pytest.raises(DataError, match=r"method\.word\.token: no caption says"):
        train_run(word_config(tiny_folder("sd15"), tmp_path, **SETTINGS), progress=Listener())
    with pytest.raises(UserError, match="has no CLIP"):
        train_run(
            word_config(tiny_folder("z_image"), tmp_path, **{**SETTINGS, "model.family": "z_image"}),
            progress=Listener(),
        )


def test_a_word_trains_at_its_own_rate() -> None:
    vectors = torch.nn.Parameter(torch.zeros(1, 4))
    assert NewWord(vectors, (0.0, 1.0), 0.5).parameter_groups(0.1)[0]["lr"] == 0.5
    assert NewWord(vectors, (0.0, 1.0)).parameter_groups(0.1)[0]["lr"] == 0.1
