"""Anima's single file, which holds the transformer and the text conditioner, and what a modular index says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.errors import ModelError
from burnish.families.anima_names import NAMES
from burnish.families.registry import detect_family, families, family_named
from burnish.family import Family, ModelSource

TinyFolder = Callable[[str], Path]
Weights = dict[str, Tensor]


@pytest.fixture
def folder(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("anima")


def weights(folder: Path, part: str) -> Weights:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def native(folder: Path) -> Weights:
    """The transformer in the names of the release, with the buffers that its trainer left."""
    named = {}
    for name, tensor in weights(folder, "transformer").items():
        module, _, kind = name.rpartition(".")
        named[f"{NAMES.native_module(module).name}.{kind}"] = tensor
    buffers = ("pos_embedder.seq", "accum_iteration", "blocks.0.self_attn.q_norm._extra_state")
    return {**named, **{name: torch.zeros(4) for name in buffers}}


def written(folder: Path, path: Path, prefix: str, conditioner: Weights | None = None) -> ModelSource:
    adapter = weights(folder, "text_conditioner") if conditioner is None else conditioner
    both = {**native(folder), **{f"llm_adapter.{name}": tensor for name, tensor in adapter.items()}}
    save_file({prefix + name: tensor for name, tensor in both.items()}, path)
    (qwen,) = (folder / "text_encoder").glob("*.safetensors")
    (vae,) = (folder / "vae").glob("*.safetensors")
    return ModelSource(str(path), vae=vae, text_encoders=(qwen,))


def load(source: ModelSource) -> Family:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return family_named("anima").load(source, parts, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("prefix", ["", "net.", "model.diffusion_model.", "model.diffusion_model.net."])
def test_a_single_file_is_the_folder(folder: Path, tmp_path: Path, prefix: str) -> None:
    source = written(folder, tmp_path / "anima.safetensors", prefix)
    assert detect_family(source) is family_named("anima")
    assert [other.name for other in families().values() if other.detect(source)] == ["anima"]
    whole, file = load(ModelSource(str(folder))), load(source)
    example = whole.example(64, 96, batch=2)
    assert torch.equal(file.predict(*example), whole.predict(*example))
    for part in ("text_conditioner", "text_encoder", "vae"):
        found, wanted = (family.module(part).state_dict() for family in (file, whole))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), part


def test_diffusers_reads_the_same_transformer_from_that_file(folder: Path) -> None:
    wanted = weights(folder, "transformer")
    file = {f"net.{name}": tensor for name, tensor in native(folder).items()}
    found = single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers(file)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_the_conditioner_it_is_another_model(folder: Path, tmp_path: Path) -> None:
    source = written(folder, tmp_path / "cosmos.safetensors", "net.", conditioner={})
    with pytest.raises(ModelError, match="is of no known family"):
        detect_family(source)


def test_cached_captions_depend_on_the_conditioner_inside_the_file(folder: Path, tmp_path: Path) -> None:
    conditioner = weights(folder, "text_conditioner")
    one = written(folder, tmp_path / "one.safetensors", "net.")
    other = written(
        folder, tmp_path / "other.safetensors", "net.", {k: v + 1 for k, v in conditioner.items()}
    )
    first, second = (load(source) for source in (one, other))
    assert first.identity("text_encoders") != second.identity("text_encoders")
    assert first.identity("vae") == second.identity("vae")
    again = load(replace(one, vae=None, path=str(folder)))
    assert again.identity("text_encoders") != first.identity("text_encoders")


def test_an_empty_prompt_beside_a_long_one_is_finite_and_as_alone(folder: Path) -> None:
    family = load(ModelSource(str(folder)))
    both = family.encode_prompts(["", "a red chair on a beach"])["tokens_BSD"]
    alone = family.encode_prompts([""])["tokens_BSD"]
    assert both.isfinite().all()
    torch.testing.assert_close(both[:1], alone)
    assert alone[0, 0].abs().max() > 0.1  # T5's end of the prompt
    assert not alone[0, 1:].any()
