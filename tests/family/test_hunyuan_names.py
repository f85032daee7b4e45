"""HunyuanVideo's transformer under the names that ComfyUI keeps it by, which are like FLUX.1's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.families.hunyuan_names import NAMES, find_transformer
from burnish.families.reading import Piece
from burnish.families.sources import weight_files
from burnish.families.weights import layout_of

# Tencent's names -> ComfyUI's, after `HunyuanVideo.process_unet_state_dict` of its `supported_models.py`.
RULES = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"),
    (".k_norm.weight", ".norm.key_norm.scale"),
    ("_attn_proj.", "_attn.proj."),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
)


def in_comfyui(name: str) -> str:
    for tencent, comfyui in RULES:
        name = name.replace(tencent, comfyui)
    return name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyuis_names_are_read(tiny_folder: Callable[[str], Path], prefix: str) -> None:
    ours = layout_of(weight_files(tiny_folder("hunyuan_video") / "transformer"))
    comfyui: dict[str, Piece] = {}
    for key, piece in ours.items():
        module, _, kind = key.rpartition(".")
        native = NAMES.native_module(module)
        if native.holds[0] == module:
            rows = sum(ours[f"{one}.{kind}"].shape[0] for one in native.holds)
            name = prefix + in_comfyui(f"{native.name}.{kind}")
            comfyui[name] = Piece(piece.file, name, (rows, *piece.shape[1:]))
    assert prefix + "double_blocks.0.img_attn.norm.query_norm.scale" in comfyui
    found = find_transformer(comfyui)
    assert found is not None
    assert {key: piece.shape for key, piece in found.items()} == {
        key: piece.shape for key, piece in ours.items()
    }
