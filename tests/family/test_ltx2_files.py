"""LTX-2's checkpoint holds all but Gemma in one file; ComfyUI also keeps its parts apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from tiny_gemma import gemma_tokenizer, sentencepiece_model
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.families import pipeline
from burnish.families.ltx2 import LTX2, NAMES
from burnish.families.native import NativeNames
from burnish.families.slots import PipelineSource
from burnish.families.sources import read_json, weight_files
from burnish.family import ModelSource

TinyFolder = Callable[[str], Path]
Weights = dict[str, Tensor]
PARTS = ("transformer", "vae", "connectors", "audio_vae", "vocoder", "text_encoder")
# As diffusers' `scripts/convert_ltx2_to_diffusers.py` reads them.
CONNECTORS = {
    "video_embeddings_connector": "video_connector",
    "audio_embeddings_connector": "audio_connector",
    "transformer_1d_blocks": "transformer_blocks",
    "text_embedding_projection.aggregate_embed": "text_proj_in",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
VOCODER = {"ups": "upsamplers", "resblocks": "resnets", "conv_pre": "conv_in", "conv_post": "conv_out"}
STATISTICS = {
    "per_channel_statistics.mean-of-means": "latents_mean",
    "per_channel_statistics.std-of-means": "latents_std",
}


def weights_in(folder: Path) -> Weights:
    return {k: v for file in weight_files(folder) for k, v in load_file(file).items()}


def named_back(weights: Weights, names: Mapping[str, str]) -> Weights:
    """Weights in diffusers' names under those of the release."""

    def back(name: str) -> str:
        for theirs, ours in names.items():
            name = name.replace(ours, theirs)
        return name

    return {back(name): tensor.contiguous() for name, tensor in weights.items()}


def native_transformer(weights: Weights, names: NativeNames) -> Weights:
    found = {}
    for key, tensor in weights.items():
        module, _, kind = key.rpartition(".")
        whole = names.native_module(key).name
        found[whole if whole != key or not module else f"{names.native_module(module).name}.{kind}"] = tensor
    return found


def native_vae(weights: Weights) -> Weights:
    """Stages in one flat list, those of other sizes between them; and statistics that nothing reads."""

    def back(name: str) -> str:
        name = name.replace("resnets", "res_blocks")
        for side, place, up_or_down in (("encoder", 8, "down"), ("decoder", 0, "up")):
            name = name.replace(f"{side}.mid_block", f"{side}.{up_or_down}_blocks_.{place}")
        name = re.sub(
            r"down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down_blocks_.{2 * int(m[1]) + 1}", name
        )
        name = re.sub(r"down_blocks\.(\d)", lambda m: f"down_blocks_.{2 * int(m[1])}", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up_blocks_.{2 * int(m[1]) + 1}", name)
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up_blocks_.{2 * int(m[1]) + 2}", name)
        return name.replace("blocks_", "blocks")

    found = {back(name): tensor for name, tensor in named_back(weights, STATISTICS).items()}
    mean = weights["latents_mean"]
    unread = {f"per_channel_statistics.{name}": torch.ones_like(mean) for name in ("channel", "mean-of-stds")}
    return {**found, **unread}


def native_connectors(weights: Weights) -> Weights:
    named = named_back(weights, CONNECTORS)
    own = "text_embedding_projection."
    return {n if n.startswith(own) else f"model.diffusion_model.{n}": t for n, t in named.items()}


class Files:
    """The tiny folder's weights as the release keeps them."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place
        parts = {part: weights_in(folder / part) for part in PARTS}
        transformer = native_transformer(parts["transformer"], NAMES)
        self.parts: dict[str, Weights] = {
            "transformer": {f"model.diffusion_model.{n}": t for n, t in transformer.items()},
            "vae": native_vae(parts["vae"]),
            "connectors": native_connectors(parts["connectors"]),
            "audio_vae": named_back(parts["audio_vae"], STATISTICS),
            "vocoder": named_back(parts["vocoder"], VOCODER),
        }
        self.gemma = self.saved("gemma", parts["text_encoder"])
        self.configs: dict[str, Any] = {part: read_json(folder / part / "config.json") for part in PARTS}
        self.configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")

    def saved(self, name: str, weights: Weights) -> Path:
        path = self.place / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
        return path

    def checkpoint(self, *parts: str) -> Path:
        found: Weights = {}
        for part in parts:
            prefix = f"{part}." if part in ("vae", "audio_vae", "vocoder") else ""
            found |= {prefix + name: tensor for name, tensor in self.parts[part].items()}
        return self.saved("ltx-2-19b-dev", found)


@pytest.fixture
def files(tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    found = Files(tiny_folder("ltx2"), tmp_path)
    monkeypatch.setattr(pipeline, "shipped_configs", lambda family: found.configs)
    return found


ALL = ("transformer", "vae", "connectors", "audio_vae", "vocoder")


def source_of(files: Files, *parts: str, **more: Any) -> ModelSource:
    options = {"text_encoders": (files.gemma, files.folder / "tokenizer"), "audio": True, **more}
    return ModelSource(str(files.checkpoint(*parts)), **options)


def assert_the_folders_weights(files: Files, source: ModelSource) -> None:
    found = PipelineSource(source, LTX2.slots, files.configs, LTX2.title)
    whole = PipelineSource(ModelSource(str(files.folder), audio=True), LTX2.slots, files.configs, LTX2.title)
    for slot in LTX2.slots:
        ours, theirs = (one.load(slot, torch.float32, "cpu").state_dict() for one in (found, whole))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), f"{slot.folder}: {name}"
    assert [slot.folder for slot in LTX2.slots] == ["transformer", "vae", "text_encoder", *ALL[2:]]


def test_the_checkpoint_holds_the_folders_weights(files: Files) -> None:
    assert_the_folders_weights(files, source_of(files, *ALL))


def test_parts_apart_hold_the_folders_weights(files: Files) -> None:
    vae = files.saved("LTX2_video_vae_bf16", files.parts["vae"])
    connectors = files.saved("ltx-2-19b-embeddings_connector", files.parts["connectors"])
    encoders = (files.gemma, connectors, files.folder / "tokenizer")
    source = source_of(files, "transformer", "audio_vae", "vocoder", vae=vae, text_encoders=encoders)
    assert_the_folders_weights(files, source)


def test_diffusers_reads_the_same_autoencoders(files: Files) -> None:
    readers = {
        "vae": single_file_utils.convert_ltx2_vae_to_diffusers,
        "audio_vae": single_file_utils.convert_ltx2_audio_vae_to_diffusers,
    }
    for part, read in readers.items():
        found = read({f"{part}.{name}": tensor for name, tensor in files.parts[part].items()})
        wanted = weights_in(files.folder / part)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tokenizer", ["in ComfyUI's file", "in a folder"])
def test_captions_are_those_of_the_folder(files: Files, tokenizer: str) -> None:
    def captions(source: ModelSource) -> Conditioning:
        parts = frozenset(["text_encoders"])
        family = LTX2.load(source, parts, dtype=torch.float32, device="cpu")
        return family.encode_prompts(["a cat on a mat"])

    named = source_of(files, *ALL)
    if tokenizer == "in ComfyUI's file":
        pieces = sentencepiece_model(gemma_tokenizer())
        tokens = {"spiece_model": torch.frombuffer(bytearray(pieces), dtype=torch.uint8)}
        gemma = files.saved("gemma_3_12B_it", {**load_file(files.gemma), **tokens})
        named = source_of(files, *ALL, text_encoders=(gemma,))
    found = captions(named)
    wanted = captions(ModelSource(str(files.folder), audio=True))
    assert set(found) == set(wanted) == {"tokens_BSD", "tokens_audio_BSD"}
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)


def test_captions_depend_on_the_file_that_holds_the_connectors(files: Files) -> None:
    def identity(source: ModelSource) -> str:
        family = LTX2.load(source, frozenset(), dtype=torch.float32, device="cpu")
        return family.identity("text_encoders")

    before = identity(source_of(files, *ALL))
    files.parts["connectors"]["text_embedding_projection.aggregate_embed.weight"] *= 2
    assert identity(source_of(files, *ALL)) != before


def test_what_is_missing_or_strange_is_named(files: Files) -> None:
    def refusal(source: ModelSource) -> ModelError:
        parts = frozenset(["denoiser", "vae", "text_encoders"])
        with pytest.raises(ModelError) as error:
            LTX2.load(source, parts, dtype=torch.float32, device="cpu")
        return error.value

    assert "holds no connectors" in refusal(source_of(files, "transformer", "vae", audio=False)).message
    lacks = refusal(source_of(files, "transformer", "connectors", audio=False))
    assert "holds no vae" in lacks.message
    assert "`model.vae`" in lacks.remedy
    strange = refusal(source_of(files, *ALL, vae=files.gemma))
    assert "holds no vae of LTX-2" in strange.message
    files.configs["transformer"] = json.loads(json.dumps(files.configs["transformer"]))
    later = {n: t for n, t in files.parts["transformer"].items() if "caption_projection" not in n}
    files.parts["transformer"] = later
    assert "2.3 is read from its diffusers folder" in refusal(source_of(files, *ALL)).message
