"""What the config names beside a model's path: the VAE's file, and for text encoders files and folders.

A folder under `model.text_encoders` is one of transformers: it holds weights, a tokenizer, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from burnish.errors import ModelError
from burnish.families.sources import STEMS, SUFFIXES, has_weights, locate, locate_parts, weight_files
from burnish.family import ModelSource
from burnish.placement import Part

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_WEIGHTS = tuple(stem + mark for stem in STEMS for mark in ".-")
_SETTINGS = (".json", ".txt", ".model", ".jinja")


def separate_file(path: Path) -> Path:
    """A file beside the checkpoint, such as a VAE of its own.

    Raises:
        ModelError: it is not there, or is a folder.
    """
    found = locate(ModelSource(str(path), offline=True))
    if found.is_dir():
        raise ModelError(f"{path} is a folder.", remedy="Name the .safetensors file itself.")
    return found


def separate_weights(path: Path) -> list[Path]:
    """The weight files of an entry of `model.text_encoders`, shards in their order; none of a tokenizer's folder.

    Raises:
        ModelError: it is not there, is incomplete, or is a folder of something else.
    """
    found = locate(ModelSource(str(path), offline=True))
    if found.is_file():
        return [found]
    names = sorted(entry.name for entry in found.iterdir())
    if any(name.startswith(_WEIGHTS) for name in names):
        return weight_files(found)
    # Of a whole model's folders `tokenizer` may be that of another text encoder.
    if "model_index.json" in names or tokenizer_in(found) is None:
        raise ModelError(
            f"{path} is no text encoder by itself (model.safetensors) and no tokenizer; found: "
            f"{', '.join(names) or 'nothing'}.",
            remedy="Name the .safetensors file, or of a model's folders that of the text encoder or the tokenizer.",
        )
    return []


def tokenizer_in(path: Path) -> Path | None:
    """The folder of the tokenizer that comes with an entry: itself, or `tokenizer` below it; None if there is none.

    Raises:
        ModelError: half a tokenizer, with which prompts would be read otherwise than the model was taught.
    """
    for folder in (path, path / "tokenizer"):
        config = (folder / _TOKENIZER_CONFIG).is_file()
        vocabulary = any((folder / name).is_file() for name in _VOCABULARIES)
        if config and vocabulary:
            return folder
        if config or vocabulary:
            lacking = _VOCABULARIES[0] if config else _TOKENIZER_CONFIG
            raise ModelError(
                f"The tokenizer in {folder} lacks {lacking}.",
                remedy="Copy all files of the model's tokenizer folder there.",
            )
    return None


def files_named(source: ModelSource, part: Part) -> list[Path]:
    """All files that the config names for a part: weights, and what tokenizers are made of."""
    if part == "vae" and source.vae is not None:
        return [separate_file(source.vae)]
    if part != "text_encoders":
        return []
    found: list[Path] = []
    for entry in source.text_encoders:
        found += separate_weights(entry)
        tokenizer = tokenizer_in(entry)
        found += settings_in(tokenizer) if tokenizer is not None else []
    return found


def files_behind(source: ModelSource, path: Path, part: Part, folders: Sequence[str]) -> list[Path]:
    """Every file that a part's numbers depend on: weights, configs, tokenizers.

    Args:
        path: what `locate` found for the source.
        folders: below a diffusers folder, those that hold what the config does not name apart.
    """
    named = files_named(source, part)
    if path.is_file():
        return named if any(file.suffix.lower() in SUFFIXES for file in named) else [path, *named]
    if not folders:
        return named
    root = locate_parts(source, folders)
    for folder in folders:
        if has_weights(folder):
            named += weight_files(root / folder)
        named += settings_in(root / folder)
    return named


def settings_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in _SETTINGS)
