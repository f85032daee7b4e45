"""Where weights come from, and that a damaged or foreign file is named as what it is."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import save_file

from burnish.errors import ModelError, UserError
from burnish.families import fingerprints, registry
from burnish.families.fingerprints import fingerprint
from burnish.families.registry import detect_family, family_named, family_names
from burnish.families.sources import locate, locate_parts, read_header, weight_files
from burnish.families.tensor_info import TensorInfo
from burnish.family import ModelSource

GOOD = {
    "first": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "second": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def written(
    folder: Path, header: str | bytes | dict[str, Any], data: int = 32, length: int | None = None
) -> Path:
    """A file in the safetensors format with this header, right or wrong."""
    raw = (
        header
        if isinstance(header, bytes)
        else (header if isinstance(header, str) else json.dumps(header)).encode()
    )
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_a_header_gives_types_and_shapes_without_metadata(tmp_path: Path) -> None:
    path = written(tmp_path, {"__metadata__": {"format": "pt"}, **GOOD})
    assert read_header(path) == {"first": TensorInfo("F32", (2, 3)), "second": TensorInfo("BF16", (4,))}


def test_a_header_reads_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "half": torch.zeros(3, 5, dtype=torch.float16),
        "flag": torch.ones(7, dtype=torch.bool),
        "eight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, path)
    assert {name: info.shape for name, info in read_header(path).items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


DAMAGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty file": (lambda f: raw_file(f, b""), "has only 0 bytes"),
    "four bytes": (lambda f: raw_file(f, b"\x08\0\0\0"), "has only 4 bytes"),
    "header length 0": (lambda f: written(f, GOOD, length=0), "header claims 0 bytes"),
    "header longer than the file": (lambda f: written(f, GOOD, length=5000), "header claims 5,000 bytes"),
    "header length 2^63": (
        lambda f: written(f, GOOD, length=2**63),
        "header claims 9,223,372,036,854,775,808",
    ),
    "header not JSON": (lambda f: written(f, '{"first": '), "header is not JSON"),
    "header not text": (lambda f: written(f, b"\xff\xfe\xfa\xfb"), "header is not JSON"),
    "header nested too deep": (lambda f: written(f, "[" * 200_000), "header is not JSON"),
    "header a list": (lambda f: written(f, "[1, 2]"), "not a JSON object"),
    "overlap": (
        lambda f: written(f, changed("second", data_offsets=[16, 24]), 24),
        "'second' and 'first' overlap",
    ),
    "hole": (lambda f: written(f, changed("second", data_offsets=[28, 36]), 36), "4 bytes before 'second'"),
    "cut off": (lambda f: written(f, GOOD, data=30), "cut off: 'second' ends at data byte 32 of 30"),
    "trailing bytes": (lambda f: written(f, GOOD, data=40), "8 bytes after the last tensor"),
    "duplicate key": (
        lambda f: written(f, json.dumps(GOOD).replace("first", "a").replace("second", "a")),
        "names 'a' more than once",
    ),
    "dtype lie": (
        lambda f: written(f, changed("first", dtype="F16")),
        "'first' is said to be F16 of shape (2, 3), which takes 12 bytes, but it has 24",
    ),
    "unknown dtype": (lambda f: written(f, changed("first", dtype="F99")), "unknown number type 'F99'"),
    "dtype no text": (lambda f: written(f, changed("first", dtype=["F32"])), "unknown number type"),
    "negative shape": (lambda f: written(f, changed("first", shape=[-2, -3])), "the shape [-2, -3]"),
    "shape of a boolean": (lambda f: written(f, changed("first", shape=[True, 6])), "the shape [True, 6]"),
    "no offsets": (
        lambda f: written(f, {"a": {"dtype": "F32", "shape": [1]}}),
        "'a' in a way that cannot be read",
    ),
    "entry no object": (lambda f: written(f, {"a": 3}), "'a' in a way that cannot be read"),
    "LFS pointer": (
        lambda f: raw_file(f, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "git lfs pull",
    ),
    "web page": (lambda f: raw_file(f, b"\n<!DOCTYPE html><html>Sign in"), "is a web page"),
}


def raw_file(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_sentence_that_names_the_file(case: str, tmp_path: Path) -> None:
    make, says = DAMAGE[case]
    path = make(tmp_path)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert says in str(caught.value)
    assert str(path) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_renamed_is_refused_unread(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="PyTorch pickle"):
        read_header(path)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x10280])
def test_a_header_as_long_as_a_pickle_begins_is_none(length: int, tmp_path: Path) -> None:
    """One file of two thousand has a header of such a length."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"title": "x"})
    spare = length - struct.unpack("<Q", path.read_bytes()[:8])[0]
    save_file({"a": torch.zeros(2)}, path, metadata={"title": "x" * (1 + spare)})
    assert path.read_bytes()[:2] == struct.pack("<Q", length)[:2]
    assert read_header(path)["a"].shape == (2,)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_pickles_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match="pickle") as caught:
        locate(ModelSource(str(path)))
    assert ".safetensors" in caught.value.remedy


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    with pytest.raises(ModelError, match=r"Did you mean .*model\.safetensors"):
        locate(ModelSource(str(tmp_path / "modle.safetensors")))


def test_offline_and_uncached_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="the run is offline"):
        locate(ModelSource("someone/some-model", offline=True))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "no Hub model of this name"),
        ("RevisionNotFoundError", "has no revision 'old'"),
        ("LocalEntryNotFoundError", "could not be reached"),
        ("HfHubHTTPError", "refused someone/some-model at old"),
    ],
)
def test_each_refusal_of_the_hub_has_its_own_sentence(
    kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    def refuse(*_: Any, **__: Any) -> str:
        if kind == "LocalEntryNotFoundError":
            raise errors.LocalEntryNotFoundError("not here")
        answer = httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co"))
        raise getattr(errors, kind)("no", response=answer)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=says) as caught:
        locate(ModelSource("someone/some-model", revision="old"))
    assert caught.value.remedy


def test_the_hub_is_asked_for_the_wanted_parts_and_fp16_only_where_there_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    on_hub = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    on_hub += ["vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]
    on_hub += ["unet/diffusion_pytorch_model.bin", "text_encoder/model.safetensors"]

    def download(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        for name in filter_repo_objects(on_hub, allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetched = lambda: {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}  # noqa: E731
    locate_parts(ModelSource("someone/some-model"), ["vae"])
    assert fetched() == {"model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors"}
    locate_parts(ModelSource("someone/some-model"), ["unet"])
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in fetched()
    assert "text_encoder/model.safetensors" not in fetched()


def test_weight_files_prefers_whole_precision_and_completeness(tmp_path: Path) -> None:
    (tmp_path / "model.fp16.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.fp16.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {"b": shards[1], "a": shards[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / shards[0]).touch()
    with pytest.raises(ModelError, match=f"lacks 1 of 2 weight files: {shards[1]}"):
        weight_files(tmp_path)
    (tmp_path / shards[1]).touch()
    assert weight_files(tmp_path) == [tmp_path / shard for shard in shards]


def test_a_fingerprint_depends_on_content_alone_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"weights")
    other.write_bytes(b"weights")
    first = fingerprint([one])
    assert fingerprint([other]) == first

    reads: list[Path] = []
    real = fingerprints._sha256
    monkeypatch.setattr(fingerprints, "_sha256", lambda file: reads.append(file) or real(file))
    assert fingerprint([one]) == first
    assert reads == []
    one.write_bytes(b"weighty")
    assert fingerprint([one]) != first
    assert reads == [one]
    assert fingerprint([one, other]) != fingerprint([other, one])


def test_a_fingerprint_survives_a_broken_or_unwritable_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"weights")
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    first = fingerprint([file])
    (tmp_path / "cache" / "fingerprints.json").write_text("{ torn")
    assert fingerprint([file]) == first
    monkeypatch.setenv("BURNISH_CACHE", str(file))  # no folder can be made below a file
    assert fingerprint([file]) == first


def test_an_unknown_family_suggests_a_known_one() -> None:
    assert set(family_names()) >= {"sd15", "sdxl", "flux"}
    with pytest.raises(UserError, match="Did you mean sdxl"):
        family_named("sdlx")


def test_weights_of_no_family_say_what_was_found(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    with pytest.raises(ModelError, match=r"2 tensors under first, second.*\n.*sd15, sd2, sdxl, flux"):
        detect_family(ModelSource(str(path)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(ModelError, match="a diffusers folder of SanaPipeline"):
        detect_family(ModelSource(str(tmp_path / "folder")))


def test_another_package_brings_a_family_but_cannot_replace_a_built_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_family.py").write_text("class Theirs:\n    title = 'Theirs'\n")
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[burnish.families]\ntheirs = their_family:Theirs\nsdxl = their_family:Theirs\nbroken = nowhere_at_all:Gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry._others.cache_clear()
    family_names.cache_clear()
    try:
        assert "theirs" in family_names()
        assert family_named("theirs").title == "Theirs"
        assert family_named("sdxl").title == "Stable Diffusion XL"
        with pytest.raises(UserError, match="'broken' of the package nowhere_at_all cannot be imported"):
            family_named("broken")
    finally:
        registry._others.cache_clear()
        family_names.cache_clear()
