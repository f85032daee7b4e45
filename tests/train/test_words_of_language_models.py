"""Textual inversion where language models read prompts: a word is learned, and is in diffusers what it is here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import test_families_learn
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_families_learn import load, ours, pictures, theirs
from test_textual_inversion import CASES as CLIP_AND_T5
from test_textual_inversion import SAID, WORD, Losses, hold_still, word_config
from tiny import cases
from torch import Tensor, nn
from transformers import AutoTokenizer

from burnish.conditioning import Conditioning
from burnish.errors import DataError, UserError
from burnish.events import Listener
from burnish.export.word_file import is_word, write_word
from burnish.families.registry import family_named, family_names
from burnish.family import Family, ModelSource
from burnish.generate import learn_word
from burnish.run import train_run

TinyFolder = Callable[[str], Path]
CASES = cases()
NAMES = [WORD, f"{WORD}_1", f"{WORD}_2"]
# No blank between what is read as one; nor around it, as ComfyUI reads what stands before and behind by itself.
JOINED = SAID.replace(f" {WORD} ", "".join(NAMES))
# By kind of encoder: Qwen2.5-VL, Qwen3, Gemma 2, UMT5, Mistral, GLM.
TRAINED = {
    "qwen_image": "qwen25_7b",
    "z_image": "qwen3_4b",
    "lumina2": "gemma2_2b",
    "wan21_still": "umt5xxl",
    "ernie_image": "ministral3_3b",
    "cogview4": "glm",
}
# As ComfyUI calls the encoders (`embedding_key` of its tokenizers).
ENCODERS = {
    "flex1": ["clip_l", "t5xxl"],
    "flex2": ["clip_l", "t5xxl"],
    "flux2": ["mistral3_24b"],
    "auraflow": ["pile_t5xl"],
    "flux2_klein": ["qwen3_4b"],
    "kolors": ["chatglm3"],
    "ltx2_guided_still": ["gemma3_12b"],
    "hunyuan_video": ["clip_l", "llama"],
    "hunyuan_video_i2v": ["clip_l", "llama"],
    "hunyuan_video15": ["qwen25_7b"],
    "hunyuan_image": ["qwen25_7b"],
    "ideogram4": ["qwen3vl_8b"],
    "krea2": ["qwen3vl_4b"],
    "omnigen2": ["qwen25_3b"],
    "sana": ["gemma2_2b"],
    "qwen_image_edit_2509": ["qwen25_7b"],
    "qwen_image21": ["qwen3vl_8b"],
    "wan_vace_still": ["umt5xxl"],
    "wan22_5b_still": ["umt5xxl"],
    "hidream": ["clip_g", "clip_l", "llama", "t5xxl"],
    "hidream_e1": ["clip_g", "clip_l", "llama", "t5xxl"],
    "anima": ["qwen3_06b"],
}


OPTIMIZER = {"kind": "adamw", "learning_rate": 0.2}  # such small models hardly listen to one word


def parts_with_word(model: Path, name: str, path: Path) -> dict[str, nn.Module]:
    """A pipeline's text encoder and tokenizer with the vectors of a file put in by hand."""
    pipeline = CASES[name].pipeline.from_pretrained(model)
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    tokenizer.add_tokens(NAMES)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    numbers = tokenizer.convert_tokens_to_ids(NAMES)
    encoder.get_input_embeddings().weight.data[numbers] = load_file(path)[TRAINED[name]]
    return {"text_encoder": encoder, "tokenizer": tokenizer}


@pytest.mark.parametrize("name", TRAINED)
def test_a_word_is_learned_and_diffusers_draws_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = CASES[name], tiny_folder(name)
    monkeypatch.setattr(test_families_learn, "CAPTION", SAID)
    pictures(tmp_path / "pictures", case.side)
    method = {"kind": "textual_inversion", "token": WORD, "vectors": len(NAMES), "initial": "dog"}
    settings = {"method": {**method, "lengths": "free"}, "train.steps": 12, "train.optimizer": OPTIMIZER}
    config = word_config(model, tmp_path, **settings)
    hold_still(monkeypatch)
    path = train_run(config, progress=(losses := Losses())).adapter
    assert path is not None
    assert losses.seen[-1] < losses.seen[0] - 1e-4, (
        "noise and times are held: what moves the loss is the word"
    )
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == [TRAINED[name]]
        assert file.metadata()["modelspec.trigger_phrase"] == WORD

    family = load(model, case)
    monkeypatch.setattr(test_families_learn, "CAPTION", SAID.replace(WORD, "dog dog dog"))
    before = ours(family, case)
    assert learn_word(family, path) == WORD
    monkeypatch.setattr(test_families_learn, "CAPTION", SAID)
    with_word = ours(family, case)
    assert (with_word - before).abs().max() > 1e-3, "there is no effect to compare"
    monkeypatch.setattr(test_families_learn, "CAPTION", JOINED)
    with_theirs = theirs(model, None, case, **parts_with_word(model, name, path))
    torch.testing.assert_close(with_word, with_theirs, atol=1e-5, rtol=0)


def only_texts(name: str, model: Path) -> Family:
    family = family_named(CASES[name].family)
    return family.load(
        ModelSource(str(model)), frozenset({"text_encoders"}), dtype=torch.float32, device="cpu"
    )


def floats(told: Conditioning) -> dict[str, Tensor]:
    return {key: one for key, one in told.items() if one.is_floating_point()}


@pytest.mark.parametrize("name", ENCODERS)
def test_what_a_prompt_with_the_word_says_comes_from_its_vectors(
    tiny_folder: TinyFolder, tmp_path: Path, name: str
) -> None:
    family = only_texts(name, tiny_folder(name))
    plain = "two people walking on green grass"
    before = family.encode_prompts([plain])
    assert sorted(family.vocabularies) == ENCODERS[name]
    draw = torch.Generator().manual_seed(3)
    taught: dict[str, nn.Parameter] = {}
    for encoder, vocabulary in family.vocabularies.items():
        assert vocabulary.knows("dog")
        assert not vocabulary.knows(WORD)
        known_ND = vocabulary.vectors[vocabulary.numbers("dog")][:1]
        drawn_ND = known_ND + 0.3 * known_ND.std() * torch.randn(2, known_ND.shape[1], generator=draw)
        taught[encoder] = nn.Parameter(drawn_ND.float())
        vocabulary.add(WORD, taught[encoder])
        assert vocabulary.knows(WORD)
    for key, one in family.encode_prompts([plain]).items():
        assert torch.equal(one, before[key]), key

    pixels_3HW = torch.rand(3, 56, 84, generator=draw) * 2 - 1
    for shown in [(), [[pixels_3HW]]] if family.capabilities.prompts_see_references else [()]:
        told = floats(family.encode_prompts([SAID], shown)).values()
        sum((one * torch.randn(one.shape, generator=draw)).sum() for one in told).backward()
        for encoder, vectors_ND in taught.items():
            assert vectors_ND.grad is not None, encoder
            assert (vectors_ND.grad.abs().amax(dim=1) > 0).all(), encoder
            vectors_ND.grad = None
    more = family.count_tokens(SAID) - family.count_tokens(SAID.replace(f" {WORD}", ""))
    assert 1 <= more <= 3

    path = tmp_path / "word.safetensors"
    write_word(path, taught, torch.float32, {})
    assert is_word(path)


def test_animas_other_reader_is_given_padding_for_the_word(tiny_folder: TinyFolder) -> None:
    """As `AnimaTEModel` of ComfyUI gives it, whose T5 numbers have no vectors."""
    family = only_texts("anima", tiny_folder("anima"))
    vocabulary = family.vocabularies["qwen3_06b"]
    vocabulary.add(WORD, nn.Parameter(vocabulary.vectors[:2].clone()))
    given: list[Tensor] = []

    def watch(module: nn.Module, arguments: object, told: dict[str, Tensor]) -> None:
        given.append(told["target_input_ids"])

    family.loaded["text_conditioner"].register_forward_pre_hook(watch, with_kwargs=True)
    family.encode_prompts([SAID])
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("anima") / "t5_tokenizer")
    before, after = tokenizer("a photo of").input_ids[:-1], tokenizer("on a red chair").input_ids
    assert given[0].tolist() == [[*before, *[tokenizer.pad_token_id] * 2, *after]]


def test_every_family_can_be_taught_words() -> None:
    here = {CASES[name].family for name in (*TRAINED, *ENCODERS)}
    assert here | {case.family for case in CLIP_AND_T5.values()} == set(family_names())


def test_what_cannot_be_is_said_before_the_first_step(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "pictures", 64)
    for text in (tmp_path / "pictures").glob("*.txt"):
        text.write_text(SAID)
    pictures(tmp_path / "shown", 64)
    source = {"kind": "folder", "path": str(tmp_path / "pictures"), "resolutions": [64]}
    source["references"] = [str(tmp_path / "shown")]
    edit = word_config(tiny_folder("qwen_image_edit_2509"), tmp_path, data=[source])
    with pytest.raises(DataError, match="sees references beside a prompt"):
        train_run(edit, progress=Listener())
    z_image = family_named("z_image")
    monkeypatch.setattr(z_image, "export", type(z_image.export)("diffusers", ("diffusers",), "z", "z"))
    with pytest.raises(UserError, match="cannot be taught words"):
        train_run(word_config(tiny_folder("z_image"), tmp_path), progress=Listener())
