"""Textual inversion: a word is learned and nothing else, resumes to the bit, and is in diffusers what it is here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_families_learn
import torch
from pydantic import ValidationError
from runs import digest, last_checkpoint, run_config
from safetensors import safe_open
from safetensors.torch import load_file
from test_families_learn import load, ours, pictures, theirs
from tiny import Case, cases
from tiny_pipelines import PIPELINES
from torch import Tensor

import burnish.run
from burnish.assembly import Assembled
from burnish.config.checks import contradictions
from burnish.data.batch import Batch
from burnish.errors import ConfigError, DataError, Interrupted
from burnish.events import Listener, StepReport
from burnish.generate import learn_word
from burnish.objective import Denoising, held_noise
from burnish.run import train_run
from burnish.run_folder import RunFolder

TinyFolder = Callable[[str], Path]
WORD = "<it>"
SAID = f"a photo of {WORD} on a red chair"
CASES = {name: Case(name, PIPELINES[name]) for name in ("sd15", "sdxl")} | {
    name: cases()[name] for name in ("sd2", "sd3", "flux", "chroma", "pixart_sigma", "ltx")
}
ENCODERS = {
    "sd15": {"clip_l": ""},
    "sd2": {"clip_h": ""},
    "sdxl": {"clip_l": "", "clip_g": "_2"},
    "sd3": {"clip_l": "", "clip_g": "_2", "t5xxl": "_3"},
    "flux": {"clip_l": "", "t5xxl": "_2"},
    "chroma": {"t5xxl": ""},
    "pixart": {"t5xxl": ""},
    "ltx": {"t5xxl": ""},
}
VECTORS = 8


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_families_learn, "CAPTION", SAID)


def word_config(model: Path, folder: Path, **changes: Any) -> Any:
    values = {
        "method": {"kind": "textual_inversion", "token": WORD, "vectors": VECTORS, "initial": "dog"},
        "train.optimizer": {"kind": "adamw", "learning_rate": 2e-2},
        "train.schedule": {"kind": "constant"},
        "data": [{"kind": "folder", "path": str(folder / "pictures"), "resolutions": [64]}],
        **changes,
    }
    return run_config(model, folder / "pictures", folder / "runs", values)


def parts_with_word(model: Path, case: Case, path: Path) -> dict[str, Any]:
    """A pipeline's text encoders and tokenizers after diffusers read the file, or for want of that by hand."""
    pipeline, file, parts = case.pipeline.from_pretrained(model), load_file(path), {}
    for name, ending in ENCODERS[case.family].items():
        encoder, tokenizer = (getattr(pipeline, f"{part}{ending}") for part in ("text_encoder", "tokenizer"))
        if hasattr(pipeline, "load_textual_inversion"):
            pipeline.load_textual_inversion(
                {WORD: file[name]} if len(file) > 1 else str(path),
                token=WORD,
                text_encoder=encoder,
                tokenizer=tokenizer,
            )
        else:
            tokenizer.add_tokens(whole := names(len(file[name])))
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            numbers = tokenizer.convert_tokens_to_ids(whole)
            encoder.get_input_embeddings().weight.data[numbers] = file[name]
        parts |= {f"text_encoder{ending}": encoder, f"tokenizer{ending}": tokenizer}
    return parts


def names(count: int) -> list[str]:
    return [WORD, *(f"{WORD}_{number}" for number in range(1, count))]


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("name", CASES)
def test_a_word_is_learned_and_nothing_else_and_diffusers_draws_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = CASES[name], tiny_folder(name)
    pictures(tmp_path / "pictures", case.side)
    config = word_config(
        model,
        tmp_path,
        **{
            "train.steps": 16,
            "sample.prompts": [SAID],
            "sample.size": 64,
            "sample.steps": 2,
            "sample.every": 8,
        },
    )
    kept: list[tuple[Assembled, dict[str, Tensor]]] = []
    assemble = burnish.run.assemble

    def watched(*args: Any) -> Assembled:
        assembled = assemble(*args)
        kept.append((assembled, {key: one.clone() for key, one in weights(assembled).items()}))
        return assembled

    monkeypatch.setattr(burnish.run, "assemble", watched)
    hold_still(monkeypatch)
    path = train_run(config, progress=(losses := Losses())).adapter
    assert path is not None
    assert losses.seen[-1] < 0.995 * losses.seen[0]
    ((assembled, before),) = kept
    for key, one in weights(assembled).items():
        assert torch.equal(one, before[key]) == (".added." not in key), key
    samples = RunFolder(tmp_path / "runs" / "tiny").samples
    ending = "mp4" if name == "ltx" else "png"
    first, last = (samples / f"step-{step:08d}-01.{ending}" for step in (8, 16))
    assert first.read_bytes() != last.read_bytes(), "samples are drawn with the word as it was at the start"

    family = load(model, case)
    with monkeypatch.context() as plain:
        plain.setattr(test_families_learn, "CAPTION", SAID.replace(WORD, " ".join(["dog"] * VECTORS)))
        before_drawn = ours(family, case)
    assert learn_word(family, path) == WORD
    file = load_file(path)
    alone = name in ("sd15", "sd2")
    assert sorted(file) == (["emb_params"] if alone else sorted(ENCODERS[case.family]))
    with_word = ours(family, case)
    assert (with_word - before_drawn).abs().max() > 0.01, "there is no effect to compare"
    if name in ("sd3", "pixart_sigma", "ltx"):  # whose pipelines do not write all tokens of a word out
        monkeypatch.setattr(test_families_learn, "CAPTION", SAID.replace(WORD, " ".join(names(VECTORS))))
    with_theirs = theirs(model, None, case, **parts_with_word(model, case, path))
    torch.testing.assert_close(with_word, with_theirs, atol=1e-4, rtol=0)
    for (name, vocabulary), one in zip(
        family.vocabularies.items(), assembled.training.parameters.values(), strict=True
    ):
        assert torch.equal(file.get(name, file.get("emb_params")), one.detach())
        lengths = vocabulary.vectors.norm(dim=1)
        assert one.norm(dim=1).max() <= lengths.quantile(0.99) + 1e-5
        assert one.norm(dim=1).min() >= lengths.quantile(0.01) - 1e-5


class Losses(Listener):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def stepped(self, report: StepReport) -> None:
        self.seen.append(report.loss)


def hold_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise and time for a picture in every step: what is left that moves the loss is the word."""

    def noise(objective: Denoising, batch: Batch, seed: int) -> Tensor:
        return held_noise(seed, "still", batch.latents_BCHW.shape[1:], batch.sample_ids, 0.5)

    def times(objective: Denoising, batch: Batch, seed: int, tokens: int) -> Tensor:
        return torch.full((len(batch.sample_ids),), 0.5)

    monkeypatch.setattr(Denoising, "draw_noise", noise)
    monkeypatch.setattr(Denoising, "draw_times", times)


def weights(assembled: Assembled) -> dict[str, Tensor]:
    return {
        f"{part}.{key}": one.detach()
        for part, module in assembled.training.family.loaded.items()
        for key, one in module.named_parameters()
    }


class Stop(Listener):
    def stepped(self, report: StepReport) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_resume_is_exact(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    model = tiny_folder("sdxl")
    for place in ("through", "stopped"):
        (tmp_path / place).mkdir()
        pictures(tmp_path / place / "pictures", 64)
        for text in (tmp_path / place / "pictures").glob("*.txt"):
            text.write_text(SAID)
    changes = {
        "train.steps": 7,
        "train.ema": {"decay": 0.9},
        "train.validation": {"pictures": 1, "every": 2, "times": [0.3, 0.7]},
        "train.batch_size": 1,
        "memory.activations": "recompute",
    }
    through = word_config(model, tmp_path / "through", **changes)
    stopped = word_config(model, tmp_path / "stopped", **changes)
    whole = train_run(through, progress=Listener())
    with pytest.raises(Interrupted):
        train_run(stopped, progress=Stop())
    assert last_checkpoint(stopped.save.folder).step == 3
    result = train_run(stopped, progress=Listener())
    assert digest(last_checkpoint(through.save.folder)) == digest(last_checkpoint(stopped.save.folder))
    assert (result.best_step, result.best_loss) == (whole.best_step, whole.best_loss)
    assert whole.best_loss is not None
    assert whole.adapter is not None
    with safe_open(whole.adapter, "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == WORD


@pytest.mark.parametrize(
    ("token", "said"),
    [("my cat", "one word"), ("a,b", "one word"), ("<Cat>", "lower case"), ("", "at least 1")],
)
def test_what_is_no_word_is_refused_at_once(tmp_path: Path, token: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        word_config(tmp_path, tmp_path, **{"method.token": token})


def test_what_cannot_be_learned_is_said_before_the_first_step(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "pictures", 64)
    with pytest.raises(DataError, match="no caption says '<it>'"):
        train_run(word_config(tiny_folder("sd15"), tmp_path), progress=Listener())
    for text in (tmp_path / "pictures").glob("*.txt"):
        text.write_text("a chair")
    for budget in ("auto", "2GiB"):  # which is planned first
        known = word_config(
            tiny_folder("sd15"), tmp_path, **{"method.token": "chair", "memory.budget": budget}
        )
        with pytest.raises(ConfigError, match="'chair' is in the vocabulary of clip_l already"):
            train_run(known, progress=Listener())


def test_options_without_sense_for_a_word_are_named(tmp_path: Path) -> None:
    config = word_config(
        tmp_path,
        tmp_path,
        **{
            "memory.gradient_release": True,
            "save.format": "kohya",
            "train.optimizer": {"kind": "adamw_schedule_free", "learning_rate": 1e-3},
        },
    )
    named = [".".join(str(key) for key in path) for path, _ in contradictions(config)]
    assert named[:3] == ["save.format", "memory.gradient_release", "method.lengths"]
