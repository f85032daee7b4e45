"""GGUF files: weights in llama.cpp's formats, widened one tensor at a time by the `gguf` package.

Denoisers (ComfyUI-GGUF, stable-diffusion.cpp) keep the names of the original release; text encoders come in llama.cpp's
names, which are turned into transformers' here. What is done with a tensor after that is as with any other file.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.errors import MissingPackage, ModelError
from burnish.families.tensor_info import TensorInfo

_SHAPE = (
    "comfy.gguf.orig_shape."  # of tensors with more dimensions than the format has, or rows no block divides
)
_T5 = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "enc.blk.#.attn_norm": "encoder.block.#.layer.0.layer_norm",
    "enc.blk.#.attn_q": "encoder.block.#.layer.0.SelfAttention.q",
    "enc.blk.#.attn_k": "encoder.block.#.layer.0.SelfAttention.k",
    "enc.blk.#.attn_v": "encoder.block.#.layer.0.SelfAttention.v",
    "enc.blk.#.attn_o": "encoder.block.#.layer.0.SelfAttention.o",
    "enc.blk.#.attn_rel_b": "encoder.block.#.layer.0.SelfAttention.relative_attention_bias",
    "enc.blk.#.ffn_norm": "encoder.block.#.layer.1.layer_norm",
    "enc.blk.#.ffn_gate": "encoder.block.#.layer.1.DenseReluDense.wi_0",
    "enc.blk.#.ffn_up": "encoder.block.#.layer.1.DenseReluDense.wi_1",
    "enc.blk.#.ffn_down": "encoder.block.#.layer.1.DenseReluDense.wo",
}
_QWEN = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.#.attn_norm": "model.layers.#.input_layernorm",
    "blk.#.attn_q": "model.layers.#.self_attn.q_proj",
    "blk.#.attn_k": "model.layers.#.self_attn.k_proj",
    "blk.#.attn_v": "model.layers.#.self_attn.v_proj",
    "blk.#.attn_output": "model.layers.#.self_attn.o_proj",
    "blk.#.attn_q_norm": "model.layers.#.self_attn.q_norm",
    "blk.#.attn_k_norm": "model.layers.#.self_attn.k_norm",
    "blk.#.ffn_norm": "model.layers.#.post_attention_layernorm",
    "blk.#.ffn_gate": "model.layers.#.mlp.gate_proj",
    "blk.#.ffn_up": "model.layers.#.mlp.up_proj",
    "blk.#.ffn_down": "model.layers.#.mlp.down_proj",
}
_NAMES = {"t5": _T5, "t5encoder": _T5, "qwen2": _QWEN, "qwen2vl": _QWEN, "qwen3": _QWEN, "qwen3vl": _QWEN}
# Others of llama.cpp's models are stored otherwise than they are computed: rows interleaved, norms shifted by one.
_OTHERS = ("llama", "gemma", "gemma2", "gemma3", "mistral3", "chatglm")


class GgufFile:
    """An open file. `get_tensor` is spelled as safetensors' is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        package = _package()
        try:
            reader = package.GGUFReader(path)
            field = reader.get_field("general.architecture")
            names = _names_of(path, "" if field is None else str(field.contents()))
            self._tensors: dict[str, Any] = {_renamed(one.name, names): one for one in reader.tensors}
            shapes = {ours: reader.get_field(_SHAPE + one.name) for ours, one in self._tensors.items()}
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise ModelError(
                f"{path} is damaged, or no GGUF file: {error}.",
                remedy="Fetch or copy the file again, and compare its size with the original.",
            ) from error
        self.header = {
            ours: TensorInfo(
                one.tensor_type.name,
                tuple(int(size) for size in (one.shape[::-1] if told is None else told.contents())),
            )
            for (ours, one), told in zip(self._tensors.items(), shapes.values(), strict=True)
        }

    def get_tensor(self, name: str) -> Tensor:
        """One tensor on the CPU: float32, or as it is stored where that is a number type of torch's.

        Raises:
            ModelError: it is in a format that the installed package cannot widen.
        """
        stored = self._tensors[name]
        try:
            numbers = _package().quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: {name} is in {stored.tensor_type.name}, which the package gguf cannot widen.",
                remedy="Update it (pip install -U gguf), or use a file in Q4_K, Q5_K, Q6_K or Q8_0.",
            ) from error
        return torch.from_numpy(np.array(numbers)).reshape(self.header[name].shape)


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def open_gguf(path: Path) -> GgufFile:
    """A file, its header read once.

    Raises:
        ModelError: it is damaged, or of a text encoder that is not read.
        MissingPackage: the package gguf is not installed.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    return _opened(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _opened(path: Path, modified: int, size: int) -> GgufFile:
    return GgufFile(path)


def _package() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise MissingPackage(
            "GGUF files are read with the package gguf, which is not installed",
            remedy="pip install gguf",
        ) from error
    return gguf


def _names_of(path: Path, architecture: str) -> dict[str, str]:
    """llama.cpp's names of modules and transformers'; none of a denoiser.

    Raises:
        ModelError: a text encoder that is not read.
    """
    if architecture in _OTHERS:
        raise ModelError(
            f"{path} is a text encoder of llama.cpp's kind {architecture!r}, which is not read.",
            remedy="Use its .safetensors file, with `memory.text_encoder_weights: nf4` where memory is short.",
        )
    return _NAMES.get(architecture, {})


def _renamed(name: str, names: dict[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    ours = names.get(re.sub(r"\d+", "#", module, count=1))
    if ours is None:
        return name
    number = re.search(r"\d+", module)
    return f"{ours.replace('#', number[0] if number else '#')}.{kind}"
