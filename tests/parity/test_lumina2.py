"""Lumina 2 in other programs: diffusers' converters, whose widths are those of the release, and ComfyUI's rules."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import diffusers_rules
import pytest
import torch
from comfyui_rules import comfy_delta
from diffusers import DiffusionPipeline
from diffusers.loaders import lora_conversion_utils, single_file_utils
from safetensors.torch import load_file, save_file
from test_single_files import assert_same, folder_weights, native_weights
from transformers import PreTrainedTokenizerBase

from burnish.adapters.lora import AdapterSet, adaptable_modules
from burnish.adapters.targeting import choose_modules
from burnish.config.method import Lora
from burnish.errors import AdapterError, ExportError
from burnish.export.adapter_file import write_adapter
from burnish.export.verify import verify_adapter
from burnish.families import pipeline
from burnish.families.lumina2 import NAMES, Lumina2
from burnish.families.sentencepiece import Kind
from burnish.families.sources import read_json
from burnish.family import ModelSource, Part

TinyFolder = Callable[[str], Path]
WIDTHS = {2304: 48, 768: 16}


def test_diffusers_reads_the_same_weights_from_a_native_file(tiny_folder: TinyFolder) -> None:
    wanted = folder_weights(tiny_folder("lumina2"), "transformer")
    native = native_weights(NAMES, wanted)
    native["norm_final.weight"] = torch.ones(48)  # of the release, without use
    convert = single_file_utils.convert_lumina2_to_diffusers
    with diffusers_rules.widths(convert, WIDTHS):
        assert_same(convert(native), wanted)


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "all"])
def test_an_adapter_loads_in_diffusers_and_in_comfyui(
    tiny_folder: TinyFolder, tmp_path: Path, targets: str
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("lumina2"))
    denoiser = pipeline.transformer.requires_grad_(False)
    native = native_weights(NAMES, dict(denoiser.state_dict()))
    chosen = choose_modules(denoiser, Lumina2.targets, Lumina2.default_targets, Lora(rank=3, targets=targets))
    adapter = AdapterSet.attach(denoiser, chosen, dropout=0.0, seed=5)
    for layer in adapter.layers.values():
        layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(6))
    weights, path = adapter.weights(), tmp_path / "a.safetensors"
    modules = adaptable_modules(denoiser)
    write_adapter(
        path,
        weights,
        part="transformer",
        keys=Lumina2.export,
        modules=modules,
        format="auto",
        dtype=torch.float32,
        metadata={},
    )
    verify_adapter(path, weights, denoiser, part="transformer", keys=Lumina2.export)

    converter = lora_conversion_utils._convert_non_diffusers_lumina2_lora_to_diffusers
    with diffusers_rules.widths(converter, WIDTHS):
        diffusers_rules.load_and_compare(tiny_folder("lumina2"), path, weights)

    deltas, lost = comfy_delta(load_file(path), {name: tensor.shape for name, tensor in native.items()})
    assert lost == []
    for name, one in weights.items():
        stack = NAMES.native_module(name)
        rows = [weights_of.shape[0] for weights_of in (modules[part].weight for part in stack.holds)]
        place = stack.holds.index(name)
        found = torch.split(deltas[f"{stack.name}.weight"], rows)[place]
        torch.testing.assert_close(found, one.delta(), rtol=1e-5, atol=1e-6)


def test_a_layer_that_no_reader_would_find_is_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("lumina2"))
    denoiser = pipeline.transformer.requires_grad_(False)
    method = Lora(rank=2, targets="attention", include=["x_embedder"])
    chosen = choose_modules(denoiser, Lumina2.targets, Lumina2.default_targets, method)
    adapter = AdapterSet.attach(denoiser, chosen, dropout=0.0, seed=5)
    with pytest.raises((AdapterError, ExportError), match="x_embedder"):
        write_adapter(
            tmp_path / "a.safetensors",
            adapter.weights(),
            part="transformer",
            keys=Lumina2.export,
            modules=adaptable_modules(denoiser),
            format="comfy",
            dtype=torch.float32,
            metadata={},
        )


def load(source: ModelSource) -> Lumina2:
    parts: frozenset[Part] = frozenset(("denoiser", "vae", "text_encoders"))
    return Lumina2.load(source, parts, dtype=torch.float32, device="cpu")


def sentencepiece_model(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Gemma's pieces as SentencePiece stores them: text, score (the sooner merged, the higher), kind."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merged = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(model["merges"])))}
    kinds = {"<unk>": Kind.UNKNOWN, **dict.fromkeys(("<pad>", "<eos>", "<bos>"), Kind.CONTROL)}
    message = b""
    for text in sorted(model["vocab"], key=model["vocab"].get):
        kind = Kind.BYTE if text.startswith("<0x") else kinds.get(text, Kind.NORMAL)
        name, score = text.encode(), struct.pack("<f", merged.get(text, -1e6))
        piece = b"\x0a" + bytes([len(name)]) + name + b"\x15" + score + b"\x18" + bytes([kind])
        message += b"\x0a" + bytes([len(piece)]) + piece
    return message


def test_files_of_comfyui_give_what_the_folder_gives(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder("lumina2")
    parts = ("transformer", "vae", "text_encoder")
    shipped = {part: read_json(folder / part / "config.json") for part in parts}
    shipped["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    monkeypatch.setattr(pipeline, "shipped_configs", lambda name: shipped)
    whole = load(ModelSource(str(folder)))
    native = native_weights(NAMES, folder_weights(folder, "transformer"))
    save_file(native, tmp_path / "lumina.safetensors")
    save_file(folder_weights(folder, "vae"), tmp_path / "ae.safetensors")
    gemma = {f"model.{name}": tensor for name, tensor in folder_weights(folder, "text_encoder").items()}
    pieces = sentencepiece_model(whole.tokenizer("text_encoder"))
    gemma["spiece_model"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    save_file(gemma, tmp_path / "gemma.safetensors")
    apart = ModelSource(
        str(tmp_path / "lumina.safetensors"), tmp_path / "ae.safetensors", (tmp_path / "gemma.safetensors",)
    )
    files = load(apart)
    captions = ["a photo of a sks dog on a red chair, \u732b", "two people walking"]
    expected, found = whole.encode_prompts(captions), files.encode_prompts(captions)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    pixels_B3HW = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(files.encode_pixels(pixels_B3HW), whole.encode_pixels(pixels_B3HW))
    example = whole.example(64, 96, batch=2)
    assert torch.equal(files.predict(*example), whole.predict(*example))
