"""Mistral's tokenizer out of a weight file gives the numbers of the one in the folder."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_mistral import MARKS, mistral_tokenizer
from transformers import PreTrainedTokenizerFast

from burnish.errors import ModelError
from burnish.families import mistral, tekken
from burnish.families.clip import byte_letters
from burnish.families.registry import family_named
from burnish.families.sources import weight_files
from burnish.family import ModelSource

TinyFolder = Callable[[str], Path]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = ["a photo of a sks dog", "Don't  stop: 2024!\nme now", "Straße, 日本 😀", "[INST]quick[/INST] fox"]


def written(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """A tokenizer's vocabulary as a `tekken.json`, with room for marks that have no name and words that are cut."""
    letters = dict(zip(byte_letters(), tekken._bytes_in_order(), strict=True))
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    plain = [vocabulary[number] for number in range(len(MARKS), len(vocabulary))]
    words = [base64.b64encode(bytes(letters[one] for one in token)).decode() for token in plain]
    cut = [base64.b64encode(b"cut off").decode()]
    stated: dict[str, Any] = {
        "config": {
            "pattern": GPT2,
            "default_vocab_size": len(vocabulary),
            "default_num_special_tokens": len(MARKS),
        },
        "vocab": [{"rank": rank, "token_bytes": word} for rank, word in enumerate(words + cut)],
        "special_tokens": [{"rank": n, "token_str": m, "is_control": True} for n, m in enumerate(MARKS)],
    }
    return json.dumps(stated).encode()


def test_the_numbers_are_those_of_the_tokenizer_it_was_made_from() -> None:
    theirs = mistral_tokenizer()
    ours = tekken.tokenizer_of(written(theirs))
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
    for found, wanted in zip(
        mistral.chat_ids(ours, TEXTS, "You see.", 64),
        mistral.chat_ids(theirs, TEXTS, "You see.", 64),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_marks_without_a_name_keep_their_numbers() -> None:
    stated = json.loads(written(mistral_tokenizer()))
    stated["config"]["default_num_special_tokens"] += 5
    stated["config"]["default_vocab_size"] += 5
    made = tekken.tokenizer_of(json.dumps(stated).encode())
    assert made.convert_tokens_to_ids(f"<SPECIAL_{len(MARKS)}>") == len(MARKS)
    assert made("a").input_ids == [number + 5 for number in mistral_tokenizer()("a").input_ids]


@pytest.mark.parametrize("damaged", [b"{", b"{}", b'{"config": 1}'])
def test_something_else_is_refused(damaged: bytes) -> None:
    with pytest.raises(ModelError, match="tokenizer beside the weights of Mistral"):
        tekken.tokenizer_of(damaged)


def test_flux2_dev_from_comfyuis_files_reads_prompts_as_the_folder(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """The file has neither the layers that are not read, nor the last norm, nor eyes."""
    folder = tiny_folder("flux2")
    weights = {k: v for file in weight_files(folder / "text_encoder") for k, v in load_file(file).items()}
    old = "language_model.model."
    kept = {
        "model." + name.removeprefix(old): tensor
        for name, tensor in weights.items()
        if name.startswith(old)
        and name != old + "norm.weight"
        and not (".layers." in name and int(name.split(".")[3]) >= 30)
    }
    assert f"{old}layers.31.mlp.up_proj.weight" in weights
    kept["tekken_model"] = torch.frombuffer(bytearray(written(mistral_tokenizer())), dtype=torch.uint8)
    file = tmp_path / "mistral_3_small_flux2_bf16.safetensors"
    save_file(kept, file)
    transformer = weight_files(folder / "transformer")[0]
    kind: Any = family_named("flux2")
    sources = ModelSource(str(folder)), ModelSource(str(transformer), text_encoders=(file,))
    wanted, found = (
        kind.load(source, frozenset(["text_encoders"]), dtype=torch.float32, device="cpu")
        for source in sources
    )
    for layer, other in zip(
        found.module("text_encoder").layers, wanted.module("text_encoder").layers, strict=True
    ):
        for name, tensor in other.state_dict().items():
            assert torch.equal(layer.state_dict()[name], tensor), name
    assert isinstance(found.module("text_encoder").norm, torch.nn.Identity)
    ids = [
        mistral.chat_ids(one.tokenizer("text_encoder"), TEXTS, "You see.", 64)[0] for one in (found, wanted)
    ]
    assert torch.equal(*ids)
    assert found.count_tokens(TEXTS[0]) == wanted.count_tokens(TEXTS[0])
