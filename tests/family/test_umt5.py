"""UMT5 under the names of Wan's own release is the same encoder; its shipped tokenizer cuts as it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import drawn, t5_tokenizer
from tiny_umt5 import umt5
from torch import Tensor

from burnish.errors import ModelError
from burnish.families.umt5 import shipped_tokenizer, umt5_slot
from burnish.families.wan import encode_prompts, tidy_prompt
from burnish.families.weights import layout_of, load_module

ENCODER = drawn(0, lambda: umt5(t5_tokenizer()))
SLOT = umt5_slot("text_encoder", "tokenizer", vocabulary=ENCODER.config.vocab_size)
ATTENTION = "layer.0.SelfAttention"


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of `wan/modules/t5.py` of https://github.com/Wan-Video/Wan2.1, written out."""
    named = {
        "token_embedding.weight": state["shared.weight"],
        "norm.weight": state["encoder.final_layer_norm.weight"],
    }
    for number in range(ENCODER.config.num_layers):
        theirs, ours = f"blocks.{number}", f"encoder.block.{number}"
        for letter in "qkvo":
            named[f"{theirs}.attn.{letter}.weight"] = state[f"{ours}.{ATTENTION}.{letter}.weight"]
        bias = state[f"{ours}.{ATTENTION}.relative_attention_bias.weight"]
        named[f"{theirs}.pos_embedding.embedding.weight"] = bias
        named[f"{theirs}.norm1.weight"] = state[f"{ours}.layer.0.layer_norm.weight"]
        named[f"{theirs}.norm2.weight"] = state[f"{ours}.layer.1.layer_norm.weight"]
        feed_forward = f"{ours}.layer.1.DenseReluDense"
        named[f"{theirs}.ffn.gate.0.weight"] = state[f"{feed_forward}.wi_0.weight"]
        named[f"{theirs}.ffn.fc1.weight"] = state[f"{feed_forward}.wi_1.weight"]
        named[f"{theirs}.ffn.fc2.weight"] = state[f"{feed_forward}.wo.weight"]
    return named


def weights(kind: str) -> dict[str, Tensor]:
    state = {k: v for k, v in ENCODER.state_dict().items() if k != "encoder.embed_tokens.weight"}
    match kind:
        case "original":
            return original(state)
        case "all in one":
            return {f"text_encoders.umt5xxl.transformer.{k}": v for k, v in state.items()}
        case "other name of the embedding":
            embedding = {"encoder.embed_tokens.weight": state.pop("shared.weight")}
            return {**state, **embedding}
        case "ComfyUI":
            return {**state, "spiece_model": torch.zeros(8, dtype=torch.uint8)}
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["original", "all in one", "other name of the embedding", "ComfyUI"])
def test_every_layout_gives_the_same_encoder(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "umt5.safetensors"
    save_file({name: tensor.clone() for name, tensor in weights(kind).items()}, file)
    layout = SLOT.find(layout_of([file]))
    assert layout is not None
    shipped = {
        **ENCODER.config.to_dict(),
        "num_layers": 1,
        "d_model": 8,
        "d_kv": 2,
        "d_ff": 9,
        "num_heads": 3,
    }
    config = SLOT.config_of(shipped, layout)
    loaded = load_module(
        lambda: SLOT.make(config), layout, dtype=torch.float32, device="cpu", what="UMT5", unused=SLOT.unused
    )
    for name, tensor in ENCODER.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "umt5.safetensors"
    save_file(weights("all in one"), file)
    slot = umt5_slot("text_encoder", "tokenizer")
    layout = slot.find(layout_of([file]))
    assert layout is not None
    with pytest.raises(ModelError, match=r"knows \d+ pieces, its tokenizer 256,384"):
        slot.config_of({}, layout)


def test_the_shipped_tokenizer_is_umt5s() -> None:
    # Pieces of google/umt5-xxl's spiece.model, with </s> at the end and <pad> after it.
    tokenizer = shipped_tokenizer()
    ids = tokenizer(["a photo of a cat", ""], padding="max_length", max_length=8).input_ids
    assert ids == [[289, 7821, 329, 289, 6283, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert tokenizer(["Two spaces,中文提示词"]).input_ids == [
        [16349, 103613, 275, 41874, 4769, 6376, 27103, 1]
    ]
    assert len(tokenizer) == 256_300


def test_prompts_are_mended_and_zeros_follow_their_end() -> None:
    assert tidy_prompt("  caf\u00c3\u00a9 &amp;amp; \n tea\u3000x ") == "caf\u00e9 & tea x"
    tokens = encode_prompts(["a sks dog", "a  sks\ndog ", ""], ENCODER, t5_tokenizer())["tokens_BSD"]
    assert tokens.shape == (3, 512, 32)
    assert torch.equal(tokens[0], tokens[1])
    length = len(t5_tokenizer()("a sks dog").input_ids)
    assert tokens[0, :length].abs().sum(-1).all()
    assert not tokens[0, length:].any()
    assert tokens[2, 0].any()
    assert not tokens[2, 1:].any()
