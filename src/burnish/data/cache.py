"""Latents and conditioning, encoded once and found again by content (law L3).

An entry's key is the hash of all that went into it, so nothing in here can go stale: what changed has another
key. An entry is a safetensors file with a checksum, written beside its place and renamed, so that two processes
may share a folder and a killed one leaves nothing torn under a final name.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from burnish.atomic import atomic_write_bytes, cannot_write, sweep
from burnish.data import audio, clips, companions, pictures
from burnish.data.samples import Sample
from burnish.family import Family

MASK_VERSION = 1  # raise it when the same mask would give other weights
ENCODING_VERSION = 1  # raise it when the same pixels or words would be encoded or stored differently

Kind = Literal["latents", "captions", "masks"]
Entry = Mapping[str, Tensor]

_TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n# Burnish: cached latents and captions; safe to delete.\n"
)


@dataclass(frozen=True, slots=True)
class CacheKeys:
    """Names entries. `vae` and `text_encoders` are `family.identity(part)`, which covers the number type the
    encoder computes in; `dtype` is that of the stored tensors. `family` is its name: of one VAE's encodings of
    references families make different conditioning. `prompts_see_references` is the family's capability.
    """

    vae: str
    text_encoders: str
    dtype: torch.dtype
    family: str = ""
    prompts_see_references: bool = False

    @classmethod
    def of(cls, family: Family, dtype: torch.dtype) -> CacheKeys:
        return cls(
            family.identity("vae"),
            family.identity("text_encoders"),
            dtype,
            family.name,
            family.capabilities.prompts_see_references,
        )

    def latents(self, sample: Sample, *, flip: bool) -> str:
        return _digest(
            {
                "kind": "latents",
                **_pixels(sample, flip),
                **self._shown(sample),
                **({"audio": audio.CODE_VERSION} if sample.audio else {}),
                "encoding": ENCODING_VERSION,
                "encoder": self.vae,
                "dtype": str(self.dtype),
            }
        )

    def mask(self, sample: Sample, grid: tuple[int, int], *, flip: bool) -> str:
        """Of a mask of the loss, at the latents' height and width."""
        assert sample.counts is not None, "one that has a mask"
        own = sample.counts.mask
        return _digest(
            {
                "kind": "masks",
                **(
                    {**own.key(), "flip": flip}
                    if own is not None
                    else {**_pixels(sample, flip), "alpha": True}
                ),
                "grid": grid,
                "pictures": pictures.CODE_VERSION,
                "version": MASK_VERSION,
            }
        )

    def caption(self, text: str, sample: Sample | None = None, *, flip: bool = False) -> str:
        """Of a text, as it is encoded for `sample`: the same for all unless prompts see references."""
        shown: dict[str, object] = {}
        if sample is not None and self.sees(sample):
            shown = {**self._shown(sample), "flip": flip}
            if sample.sees_itself:
                shown["itself"] = _pixels(sample, flip)
        return _digest(
            {
                "kind": "captions",
                "text": text,
                **shown,
                "encoding": ENCODING_VERSION,
                "encoder": self.text_encoders,
                "dtype": str(self.dtype),
            }
        )

    def sees(self, sample: Sample) -> bool:
        """Whether this sample's captions are encoded together with its references."""
        return self.prompts_see_references and sample.has_references

    def _shown(self, sample: Sample) -> dict[str, object]:
        """What is encoded besides the sample's own pixels; empty for most."""
        if not sample.has_references:
            return {}
        shown: dict[str, object] = {
            "family": self.family,
            "references": [one.key() for one in sample.references],
            "itself": sample.sees_itself,
            "frames": sample.frames,
            "background": sample.background,
            "pictures": pictures.CODE_VERSION,
        }
        if sample.sees_end:
            shown["end"] = True
        if sample.fills_holes:
            drawn = {"drawn": companions.HOLES_VERSION}
            shown["mask"] = sample.mask.key() if sample.mask is not None else drawn
        return shown


def _pixels(sample: Sample, flip: bool) -> dict[str, object]:
    """All that the pixels of a sample depend on."""
    fit = sample.fit
    pixels: dict[str, object] = {
        "file": sample.sha256,
        "resized": fit.resized,
        "crop": [fit.top, fit.left, fit.bucket.height, fit.bucket.width],
        "flip": flip,
        "background": sample.background,
        "pictures": pictures.CODE_VERSION,
    }
    if sample.is_clip:
        pixels["clip"] = [sample.frames, sample.start, sample.fps, clips.CODE_VERSION]
    return pixels


def _digest(content: Mapping[str, object]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=24).hexdigest()


class Cache(Protocol):
    """Where entries live. `get` verifies, and gives None for what is missing or damaged."""

    repaired: int  # damaged entries met so far

    def get(self, kind: Kind, key: str) -> Entry | None: ...

    def put(self, kind: Kind, key: str, entry: Entry) -> None: ...


class RamCache:
    """Entries in memory, for as long as the process lives."""

    def __init__(self) -> None:
        self.repaired = 0
        self._entries: dict[tuple[Kind, str], Entry] = {}

    def get(self, kind: Kind, key: str) -> Entry | None:
        return self._entries.get((kind, key))

    def put(self, kind: Kind, key: str, entry: Entry) -> None:
        self._entries[kind, key] = {name: tensor.detach().cpu().clone() for name, tensor in entry.items()}


class DiskCache:
    """Entries as `KIND/ab/abcdef....safetensors` below `folder`; the last read ones stay in memory.

    Args:
        folder: made when missing; may be shared by processes and runs.
        remembered_bytes: how much of what was read last is kept in memory.
    """

    def __init__(self, folder: Path, *, remembered_bytes: int = 64 << 20) -> None:
        self.folder = folder
        self.repaired = 0
        self._limit = remembered_bytes
        self._recent: OrderedDict[tuple[Kind, str], Entry] = OrderedDict()
        self._recent_bytes = 0
        if not (folder / "CACHEDIR.TAG").exists():
            write_entry(folder / "CACHEDIR.TAG", _TAG, scratch=self._scratch)
        sweep(self._scratch)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_recent": OrderedDict(), "_recent_bytes": 0, "repaired": 0}

    def get(self, kind: Kind, key: str) -> Entry | None:
        recent = self._recent.get((kind, key))
        if recent is not None:
            self._recent.move_to_end((kind, key))
            return recent
        try:
            data = self.path(kind, key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError:  # a bad sector, a folder in its place: as good as torn
            self.repaired += 1
            return None
        entry = unpack(data, key)
        if entry is None:
            self.repaired += 1
            return None
        self._remember(kind, key, entry)
        return entry

    def put(self, kind: Kind, key: str, entry: Entry) -> None:
        """Raises:
        DiskFull: no space, or the folder cannot be written.
        """
        write_entry(self.path(kind, key), pack(entry, key), scratch=self._scratch)

    def path(self, kind: Kind, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    @property
    def _scratch(self) -> Path:
        return self.folder / "scratch"

    def _remember(self, kind: Kind, key: str, entry: Entry) -> None:
        self._recent[kind, key] = entry
        self._recent_bytes += _size(entry)
        while self._recent_bytes > self._limit:
            _, dropped = self._recent.popitem(last=False)
            self._recent_bytes -= _size(dropped)


def write_entry(path: Path, data: bytes, *, scratch: Path) -> None:
    """Write a file of the cache whole or not at all, and the folders on the way to it.

    Raises:
        DiskFull: no space, or the folder cannot be written.
    """
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, path, needed=len(data)) from error
    atomic_write_bytes(path, data, scratch=scratch)


def pack(entry: Entry, key: str) -> bytes:
    """A safetensors file that names its key and a checksum over all tensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.items()}
    return save_tensors(tensors, {"key": key, "checksum": _checksum(tensors)})


def unpack(data: bytes, key: str) -> Entry | None:
    """The tensors of a packed entry; None where it is torn, changed or another entry's."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, LookupError, TypeError):
        return None
    if metadata.get("key") != key or metadata.get("checksum") != _checksum(tensors):
        return None
    return tensors


def _checksum(tensors: Entry) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _size(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())
