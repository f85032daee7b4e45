"""What the file of a new word (textual inversion) is: its vectors by text encoder, and how each program calls it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from burnish.export.adapter_file import read_metadata
from burnish.export.word_file import ALONE, read_by_comfyui, read_word

A1111_READS = frozenset({ALONE, "clip_l", "clip_g"})  # modules/textual_inversion/textual_inversion.py


@dataclass(frozen=True, slots=True)
class WordVectors:
    """The vectors of a word in one text encoder; lengths are Euclidean."""

    encoder: str
    vectors: int
    width: int
    shortest: float
    longest: float


@dataclass(frozen=True, slots=True)
class WordInspection:
    """Everything that is told about a word's file; `spelled` is what a prompt says, by program."""

    path: str
    kib: float
    word: str | None
    encoders: list[WordVectors]
    dtypes: list[str]
    spelled: dict[str, str]
    metadata: dict[str, str]


def inspect_word(path: Path) -> WordInspection:
    """Look at a file of which `is_word` holds.

    Raises:
        ExportError: it is damaged.
    """
    tensors, metadata = read_word(path), read_metadata(path)
    word = metadata.get("modelspec.trigger_phrase")
    encoders = []
    for name, vectors_ND in sorted(tensors.items()):
        lengths = vectors_ND.float().norm(dim=-1)
        encoders.append(
            WordVectors(
                name, len(vectors_ND), vectors_ND.shape[-1], float(lengths.min()), float(lengths.max())
            )
        )
    spelled = {"burnish generate": word or path.stem.lower()}
    if read_by_comfyui(tensors):
        spelled["ComfyUI"] = f"embedding:{path.stem}"
    if tensors.keys() <= A1111_READS:
        spelled["A1111, Forge"] = path.stem
    return WordInspection(
        path=str(path),
        kib=path.stat().st_size / 2**10,
        word=word,
        encoders=encoders,
        dtypes=sorted({str(one.dtype).removeprefix("torch.") for one in tensors.values()}),
        spelled=spelled,
        metadata=metadata,
    )
