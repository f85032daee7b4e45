"""Text encoders and tokenizers that the config names as folders, where a single file cannot bring the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.families import hunyuan_video_parts, pipeline, t5
from burnish.families.registry import family_named
from burnish.families.slots import shipped_configs
from burnish.families.sources import read_json, weight_files
from burnish.family import ModelSource

TinyFolder = Callable[[str], Path]
# The text encoder whose tokenizer does not ship, by family.
NEEDS: Mapping[str, tuple[str, str]] = {
    "hunyuan_video": ("text_encoder", "tokenizer"),
    "auraflow": ("text_encoder", "tokenizer"),
    "cogview4": ("text_encoder", "tokenizer"),
    "hidream": ("text_encoder_4", "tokenizer_4"),
}
PROMPTS = ["a cat on a mat", "a dog"]


def prompts_of(family: str, source: ModelSource) -> Conditioning:
    loaded = family_named(family).load(
        source, frozenset(["text_encoders"]), dtype=torch.float32, device="cpu"
    )
    conditioning: Conditioning = loaded.encode_prompts(PROMPTS)
    return conditioning


def identity_of(family: str, source: ModelSource) -> str:
    return (
        family_named(family)
        .load(source, frozenset(), dtype=torch.float32, device="cpu")
        .identity("text_encoders")
    )


def assert_same(found: Conditioning, wanted: Conditioning) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


class Parts:
    """One tiny pipeline taken apart: files of the denoiser and of the text encoder that needs a tokenizer; the other
    text encoders as folders with the tiny tokenizers, since those that ship know other words."""

    def __init__(self, name: str, folder: Path, place: Path) -> None:
        self.name, self.folder, self.place = name, folder, place
        self.denoiser = self._file("transformer", place / "denoiser.safetensors")
        index = read_json(folder / "model_index.json")
        encoders = sorted(part for part in index if part.startswith("text_encoder"))
        self.needy, tokenizer = NEEDS[name]
        self.tokenizer = folder / tokenizer
        self.encoders = {part: self._folder(part, "") for part in encoders if part != self.needy}
        self.encoders[self.needy] = self._file(self.needy, place / "needy.safetensors")
        self.configs: dict[str, Any] = {
            part: read_json(folder / part / "config.json") for part in ("transformer", "vae", *encoders)
        }
        self.configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")

    def _file(self, part: str, path: Path) -> Path:
        (file,) = weight_files(self.folder / part)
        weights = load_file(file)
        self._widen(weights)
        save_file(weights, path)
        return path

    def _folder(self, part: str, tokenizer_below: str) -> Path:
        """A text encoder as transformers keeps a model: weights, config and tokenizer together."""
        made = self.place / part
        shutil.copytree(
            self.folder / part.replace("text_encoder", "tokenizer"),
            made / tokenizer_below,
            dirs_exist_ok=True,
        )
        shutil.copy(self.folder / part / "config.json", made / "config.json")
        self._file(part, made / "model.safetensors")
        return made

    def _widen(self, weights: dict[str, Tensor]) -> None:
        """T5s are told apart by the released number of rows, of which the tiny tokenizer uses the first."""
        if "shared.weight" in weights:
            missing = t5.VOCABULARY - len(weights["shared.weight"])
            for name in {"shared.weight", "encoder.embed_tokens.weight"} & weights.keys():
                weights[name] = functional.pad(weights[name], (0, 0, 0, missing))

    def source(self, *more: Path, without: str = "") -> ModelSource:
        files = [file for part, file in self.encoders.items() if part != without]
        return ModelSource(str(self.denoiser), text_encoders=(*files, *more))

    def needy_folder(self, tokenizer_below: str) -> Path:
        return self._folder(self.needy, tokenizer_below)


@pytest.fixture(params=NEEDS)
def parts(
    request: pytest.FixtureRequest, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Parts:
    found = Parts(request.param, tiny_folder(request.param), tmp_path)
    # Of single files the shipped configs hold what shapes do not tell, such as the number of heads.
    monkeypatch.setattr(pipeline, "shipped_configs", lambda family: found.configs)
    monkeypatch.setattr(hunyuan_video_parts, "HEAD_DIM", 16)
    return found


def test_a_tokenizer_beside_the_files(parts: Parts) -> None:
    wanted = prompts_of(parts.name, ModelSource(str(parts.folder)))
    assert_same(prompts_of(parts.name, parts.source(parts.tokenizer)), wanted)


@pytest.mark.parametrize("below", ["", "tokenizer"])
def test_a_text_encoder_with_its_tokenizer_in_one_folder(parts: Parts, below: str) -> None:
    source = parts.source(parts.needy_folder(below), without=parts.needy)
    wanted = prompts_of(parts.name, ModelSource(str(parts.folder)))
    assert_same(prompts_of(parts.name, source), wanted)


def test_without_one_the_message_says_what_to_put_where(parts: Parts) -> None:
    with pytest.raises(ModelError, match="does not ship with Burnish") as error:
        prompts_of(parts.name, parts.source())
    assert f"`{NEEDS[parts.name][1]}`" in error.value.remedy
    assert "`model.text_encoders`" in error.value.remedy


def test_half_a_tokenizer_is_refused(parts: Parts) -> None:
    for present, lacking in (("tokenizer.json", "tokenizer_config.json"), ("tokenizer_config.json",) * 2):
        half = parts.place / f"only_{present}"
        half.mkdir()
        shutil.copy(parts.tokenizer / present, half)
        missing = "tokenizer.json" if present == lacking else lacking
        with pytest.raises(ModelError, match=f"lacks {missing}"):
            prompts_of(parts.name, parts.source(half))


def test_a_damaged_tokenizer_is_a_message(parts: Parts) -> None:
    damaged = parts.place / "damaged"
    shutil.copytree(parts.tokenizer, damaged)
    (damaged / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        prompts_of(parts.name, parts.source(damaged))


def test_captions_are_kept_apart_by_tokenizer(parts: Parts) -> None:
    other = parts.place / "other"
    shutil.copytree(parts.tokenizer, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    plain, same, changed = (
        identity_of(parts.name, parts.source(*more)) for more in ((), (parts.tokenizer,), (other,))
    )
    assert len({plain, same, changed}) == 3
    assert identity_of(parts.name, parts.source(parts.tokenizer)) == same


def test_a_folder_of_something_else_is_refused(parts: Parts) -> None:
    with pytest.raises(ModelError, match=r"no text encoder by itself .* found: model_index"):
        prompts_of(parts.name, parts.source(parts.folder))
    foreign = parts.place / "foreign.safetensors"
    save_file({"a.weight": torch.zeros(2)}, foreign)
    with pytest.raises(ModelError, match="holds no text encoder of"):
        prompts_of(parts.name, parts.source(foreign))


def test_hidreams_folder_takes_llama_from_another(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """As on the Hub: three of four text encoders in the folder, Llama fetched by itself."""
    whole = tiny_folder("hidream")
    released, llama = tmp_path / "released", tmp_path / "llama"
    shutil.copytree(whole, released)
    shutil.move(released / "text_encoder_4", llama)
    shutil.copytree(released / "tokenizer_4", llama, dirs_exist_ok=True)
    shutil.rmtree(released / "tokenizer_4")
    source = ModelSource(str(released), text_encoders=(llama,))
    with pytest.MonkeyPatch.context() as patch:
        configs = {
            **shipped_configs("hidream"),
            "text_encoder_4": read_json(whole / "text_encoder_4" / "config.json"),
        }
        patch.setattr(pipeline, "shipped_configs", lambda family: configs)
        found, key = prompts_of("hidream", source), identity_of("hidream", source)
    assert_same(found, prompts_of("hidream", ModelSource(str(whole))))
    changed = llama / "tokenizer_config.json"
    changed.write_text(changed.read_text() + " ")
    assert identity_of("hidream", source) != key


def test_a_tokenizer_that_ships_is_not_asked_for(tiny_folder: TinyFolder) -> None:
    folder = tiny_folder("flux")
    source = ModelSource(str(folder), text_encoders=(folder / "tokenizer_2",))
    with pytest.raises(ModelError, match="ships with Burnish"):
        prompts_of("flux", source)
