"""What a checkpoint folder says about itself, and whether that is true.

`manifest.json` is written last, so a folder without one is no checkpoint. It carries a checksum of its own: a
flipped bit in the list of hashes is found like one in the weights.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import burnish
from burnish.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"

Verify = Literal["quick", "full"]
HASHED_BELOW = 2**30  # "quick" hashes smaller files only: a larger one takes seconds, and its size is checked

_FileName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*\.(safetensors|json)$")]


class FileEntry(BaseModel):
    """One file of the checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """Everything a reader must know before it opens a tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = Field(ge=1)
    step: int = Field(ge=0)
    config_hash: str
    versions: dict[str, str]
    files: dict[_FileName, FileEntry]

    @property
    def tensor_names(self) -> list[str]:
        return sorted(name.removesuffix(".safetensors") for name in self.files if name != STATE)


def new_manifest(step: int, config_hash: str, files: dict[str, FileEntry]) -> Manifest:
    """The manifest of what this process just wrote."""
    versions = {
        "burnish": burnish.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Manifest(format=FORMAT, step=step, config_hash=config_hash, versions=versions, files=files)


def render(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: one fixed rendering, so that any changed byte shows."""
    content = manifest.model_dump(mode="json")
    document = {"manifest": content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()}
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, if it is whole.

    Raises:
        CheckpointError: missing, damaged, or written in a format this version does not know; names the file.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        document = json.loads(raw)
        content = document["manifest"]
        written_in = content["format"]
        if isinstance(written_in, int) and written_in > FORMAT and _checksum_holds(document):
            raise CheckpointError(
                f"{path} is of format {written_in}; this version of Burnish reads up to {FORMAT}",
                remedy="Update Burnish.",
            )
        manifest = Manifest.model_validate(content)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    if render(manifest) != raw:
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    return manifest


def _checksum_holds(document: dict[str, object]) -> bool:
    return hashlib.sha256(_canonical(document["manifest"])).hexdigest() == document.get("sha256")


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0]


def verify_folder(folder: Path, verify: Verify = "quick") -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Args:
        folder: the checkpoint.
        verify: "quick" hashes files below `HASHED_BELOW` and checks the size of all; "full" hashes all.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _verify_file(folder / name, entry, hashed=verify == "full" or entry.size < HASHED_BELOW)
    return manifest


def _verify_file(path: Path, entry: FileEntry, *, hashed: bool) -> None:
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            if size != entry.size:
                raise CheckpointError(f"{path} has {size} bytes; {entry.size} were written")
            if hashed and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise CheckpointError(f"{path} is damaged: its sha256 is not the one that was written")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
