"""The file of a new word, as A1111, ComfyUI and diffusers read it, read back and compared bit by bit.

Of a model with one CLIP alone that is one tensor, `emb_params`; of others, one by each encoder's name: `clip_l`,
`clip_g`, `t5xxl`, `qwen3_4b`. A1111 and ComfyUI call a word by the file's name
(`modules/textual_inversion/textual_inversion.py`; `load_embed` in `comfy/sd1_clip.py`); diffusers is told the word
(`load_textual_inversion`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from burnish.atomic import atomic_write_bytes, cannot_write
from burnish.errors import ExportError, NonFiniteLoss

ALONE = "emb_params"
# As ComfyUI calls them (`embedding_key` of its tokenizers in `comfy/text_encoders`): those for which it looks into
# models/embeddings, and others, of which `glm` and `chatglm3` are not in it at all.
_IN_COMFYUI = r"clip_[lgh]|t5xxl|qwen3_06b|qwen3_[48]b|qwen3vl_[48]b|llama|mistral3_24b|ministral3_3b"
_ELSEWHERE = r"umt5xxl|pile_t5xl|qwen25_[37]b|gemma2_2b|gemma3_12b|glm|chatglm3"
_ENCODER = re.compile(f"{_IN_COMFYUI}|{_ELSEWHERE}")


@dataclass(frozen=True, slots=True)
class WordWritten:
    """A file that reads back as trained."""

    vectors: int
    encoders: str
    dtype: str

    def facts(self) -> dict[str, object]:
        """For status files and reports."""
        return asdict(self)


def write_word(
    path: Path, vectors: Mapping[str, Tensor], dtype: torch.dtype, metadata: Mapping[str, str]
) -> WordWritten:
    """Write the vectors (N, D) of a word by the names of their vocabularies; the folder is made.

    Raises:
        NonFiniteLoss: a vector is NaN or infinite in `dtype`; nothing is written (law L5).
        ExportError: the file does not read back as written.
        DiskFull: it cannot be written; one that was there before is untouched.
    """
    tensors = {
        (ALONE if len(vectors) == 1 and name.startswith("clip") else name): one.detach()
        .to(dtype)
        .cpu()
        .contiguous()
        for name, one in vectors.items()
    }
    if not all(one.isfinite().all() for one in tensors.values()):
        raise NonFiniteLoss(
            f"{path.name} was not written: the word's vectors are not finite in {dtype}",
            remedy="Go back to an earlier checkpoint and lower train.optimizer.learning_rate.",
        )
    data = safetensors.torch.save(tensors, {"format": "pt", **metadata})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, path, needed=len(data)) from error
    atomic_write_bytes(path, data)
    _compare(path, vectors, dtype)
    return WordWritten(
        len(next(iter(vectors.values()))), " ".join(vectors), str(dtype).removeprefix("torch.")
    )


def is_word(path: Path) -> bool:
    """Whether a file holds a new word and no adapter: each tensor has the name of a text encoder, or `emb_params`."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError):
        return False  # said by who reads it as an adapter
    return bool(names) and all(name == ALONE or _ENCODER.fullmatch(name) for name in names)


def read_by_comfyui(encoders: Collection[str]) -> bool:
    """Whether a prompt can say `embedding:NAME` there: it looks for such files in all of these text encoders."""
    return all(name == ALONE or re.fullmatch(_IN_COMFYUI, name) for name in encoders)


def read_word(path: Path) -> dict[str, Tensor]:
    """The tensors of a word's file.

    Raises:
        ExportError: it is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{path} cannot be read: {error}", remedy="Save again, or check the disk."
        ) from error


def _compare(path: Path, vectors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """What a reader finds, beside the vectors as they trained."""
    found = read_word(path)
    wanted = {name if name in found else ALONE: one for name, one in vectors.items()}
    wrong = found.keys() ^ wanted.keys() or {
        name
        for name, one in wanted.items()
        if found[name].dtype != dtype or not torch.equal(found[name], one.detach().cpu().to(dtype))
    }
    if wrong:
        raise ExportError(
            f"{path} does not read back as trained: {', '.join(sorted(wrong))}",
            remedy="Check the disk; the checkpoint of this step is sound.",
        )
