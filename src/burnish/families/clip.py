"""CLIP text encoders (arXiv 2103.00020): their tokenizer, their names in files, their config from shapes.

Shape letters: B batch, S tokens (always 77), D width.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
)

from burnish.errors import ModelError
from burnish.families.sources import read_json, weight_files
from burnish.families.token_words import written_out
from burnish.families.weights import Layout, below, layout_of, load_module
from burnish.placement import Shrink

TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
# Weights of CLIP's other half, and numbers old programs saved that are no weights.
UNUSED = ("*position_ids", "*logit_scale", "*visual*", "*vision_model*", "*attn_mask")

_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_CLIP_REST = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def shipped_tokenizer(padding: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer of 49,408 tokens, as every released CLIP text encoder here uses it.

    The vocabulary follows from the merges: each byte, each byte at a word's end, each merge, two marks
    (`clip/simple_tokenizer.py` of https://github.com/openai/CLIP).

    Args:
        padding: fills up to 77 tokens; the end mark, or `!` for SDXL's second encoder.
    """
    packed = files("burnish.families").joinpath("tokenizers", "clip_merges.txt.gz").read_bytes()
    merges = [tuple(line.split(" ")) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    letters = byte_letters()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        pad_token=padding,
        model_max_length=TOKENS,
    )


def byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def tokenizer_in(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a diffusers folder, such as `tokenizer`.

    Raises:
        ModelError: the folder is missing.
    """
    if not folder.is_dir():
        raise ModelError(f"The model lacks {folder}.", remedy="Fetch the model again.")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def count_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Tokens of a prompt with its begin and end, uncut."""
    text = written_out(tokenizer, prompt)
    return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token numbers (B, 77): start, the caption cut to 75 tokens, end, padding."""
    texts = [written_out(tokenizer, prompt) for prompt in prompts]
    encoded = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def load_from_folder(
    folder: Path,
    *,
    projection: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    shrink: Shrink | None = None,
) -> CLIPTextModel:
    """A text encoder of a diffusers folder, such as `text_encoder`."""
    config = read_json(folder / "config.json")
    return _load(config, layout_of(weight_files(folder)), projection, dtype, device, folder.name, shrink)


def load_from_layout(
    layout: Layout,
    shipped: Mapping[str, Any],
    *,
    projection: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    shrink: Shrink | None = None,
) -> CLIPTextModel:
    """A text encoder of a single file: OpenAI's names as transformers spells them, or OpenCLIP's.

    Widths, depth and vocabulary follow the weights; `shipped` gives the rest (heads, activation).

    Raises:
        ModelError: these are no CLIP weights, or they want another tokenizer than CLIP's.
    """
    layout = transformers_names(layout)
    config = config_from_shapes(shipped, layout)
    return _load(config, layout, projection, dtype, device, "CLIP text encoder", shrink)


def make(config: Mapping[str, Any], *, projection: bool) -> CLIPTextModel:
    """A text encoder of this config, with weights as transformers draws them."""
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    told = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    return kind(CLIPTextConfig(**told))


def _load(
    config: Mapping[str, Any],
    layout: Layout,
    projection: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    what: str,
    shrink: Shrink | None,
) -> CLIPTextModel:
    return load_module(
        partial(make, config, projection=projection),
        as_transformers_spells(layout, projection),
        dtype=dtype,
        device=device,
        what=what,
        unused=UNUSED if projection else (*UNUSED, "text_projection*"),
        shrink=shrink,
    )


def as_transformers_spells(layout: Layout, projection: bool) -> Layout:
    """Names as the installed transformers wants: since 5.6 CLIPTextModel does without `text_model.`."""
    inner = {name.removeprefix("text_model."): piece for name, piece in layout.items()}
    wrapped = projection or "text_model" in CLIPTextModel(_smallest_config())._modules
    if not wrapped:
        return inner
    return {
        name if name.startswith("text_projection") else f"text_model.{name}": p for name, p in inner.items()
    }


def _smallest_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2,
        hidden_size=1,
        intermediate_size=1,
        num_attention_heads=1,
        num_hidden_layers=0,
        bos_token_id=0,
        eos_token_id=1,
    )


def transformers_names(layout: Layout) -> Layout:
    """A CLIP of a single file under transformers' names without `text_model.`.

    OpenCLIP stacks query, key and value, and keeps its projection transposed (`open_clip/transformer.py`).

    Raises:
        ModelError: the layout is no CLIP text encoder.
    """
    if "transformer.embeddings.token_embedding.weight" in layout:
        layout = below(layout, "transformer.")  # as some merging programs save it
    for prefix in ("transformer.text_model.", "text_model."):
        if any(name.startswith(prefix) for name in layout):
            rest = {k: p for k, p in layout.items() if k.startswith("text_projection")}
            return {**below(layout, prefix), **rest}
    if "embeddings.token_embedding.weight" in layout:
        return layout
    model = below(layout, "model.") or layout
    if "token_embedding.weight" not in model:
        raise ModelError(
            f"No CLIP text encoder among {len(layout)} tensors such as {', '.join(sorted(layout)[:3])}.",
            remedy="Name the right files under `model.text_encoders`.",
        )
    return _from_open_clip(model)


def first_layers(layout: Layout, layers: int | None) -> Layout:
    """A layout (names of `transformers_names`) without the layers above the first `layers`; None keeps all."""
    if layers is None:
        return layout
    above = {n for n in layout if n.startswith("encoder.layers.") and int(n.split(".")[2]) >= layers}
    return {name: piece for name, piece in layout.items() if name not in above}


def _from_open_clip(model: Layout) -> Layout:
    renamed: Layout = {}
    for name, piece in model.items():
        if name in _OPEN_CLIP_REST:
            renamed[_OPEN_CLIP_REST[name]] = piece
        elif name == "text_projection":
            renamed["text_projection.weight"] = piece.turned()
        elif name.startswith("transformer.resblocks."):
            _, _, number, inner = name.split(".", 3)
            layer = f"encoder.layers.{number}"
            if inner.startswith("attn.in_proj_"):
                kind = inner.removeprefix("attn.in_proj_")
                for index, letter in enumerate("qkv"):
                    renamed[f"{layer}.self_attn.{letter}_proj.{kind}"] = piece.third(index)
            else:
                stem, _, kind = inner.rpartition(".")
                renamed[f"{layer}.{_OPEN_CLIP_BLOCK.get(stem, stem)}.{kind}"] = piece
        else:
            renamed[name] = piece
    return renamed


def config_from_shapes(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depth of `layout` (named as by `transformers_names`)."""
    try:
        vocabulary, width = layout["embeddings.token_embedding.weight"].shape
        positions = layout["embeddings.position_embedding.weight"].shape[0]
        inner_width = layout["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ModelError(f"The CLIP text encoder lacks {error}.", remedy="Fetch the file again.") from error
    depth = 1 + max(int(name.split(".")[2]) for name in layout if name.startswith("encoder.layers."))
    projection = layout.get("text_projection.weight")
    if vocabulary != shipped["vocab_size"]:
        raise ModelError(
            f"The CLIP text encoder knows {vocabulary:,} tokens, CLIP's tokenizer {shipped['vocab_size']:,}.",
            remedy="Use the diffusers folder of this model: it holds the tokenizer that belongs to it.",
        )
    return {
        **shipped,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": positions,
        "intermediate_size": inner_width,
        "num_hidden_layers": depth,
        "projection_dim": projection.shape[0] if projection else width,
    }
