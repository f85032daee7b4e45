"""Qwen as a text encoder: the shipped tokenizer, every spelling of the weights, only the parts that are needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import drawn
from tiny_qwen import qwen3_lm, qwen25_vl, qwen_tokenizer
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from burnish.errors import ModelError
from burnish.families import qwen
from burnish.families.slots import Slot
from burnish.families.text_slots import tokenizer_in
from burnish.families.weights import Layout, layout_of, load_module

IDS = torch.tensor([[5, 9, 300, 17], [8, 3, 2, 60]])


def module_of(slot: Slot, config: dict[str, object], layout: Layout) -> nn.Module:
    return load_module(
        lambda: slot.make(dict(config)),
        layout,
        dtype=torch.float32,
        device="cpu",
        what="text encoder",
        unused=slot.unused,
    )


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2_5_VLForConditionalGeneration]:
    folder = tmp_path_factory.mktemp("vl")
    model = drawn(0, lambda: qwen25_vl(qwen_tokenizer()))
    model.save_pretrained(folder)
    return folder, model


def spelled_as_released(folder: Path, target: Path) -> Path:
    """`model.layers.*`, `visual.*`: Qwen's own files of 2025 and ComfyUI's."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        tensors[name] = tensor.clone()
    assert "model.layers.0.self_attn.q_proj.bias" in tensors
    assert "visual.blocks.0.attn.qkv.weight" in tensors
    save_file(tensors, target)
    return target


def test_the_shipped_tokenizer_numbers_as_released() -> None:
    tokenizer = qwen.shipped_tokenizer()
    assert len(tokenizer) == 151_665
    assert tokenizer.pad_token_id == 151_643
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|image_pad|>", "<|file_sep|>"]) == [
        151_644,
        151_655,
        151_664,
    ]
    # Published with Qwen2.5: "hello world" of transformers' documentation, and the roles of its chats.
    assert tokenizer("Hello world").input_ids == [9707, 1879]
    assert tokenizer("<|im_start|>user\n").input_ids == [151_644, 872, 198]
    assert len(qwen.shipped_tokenizer(qwen3=True)) == 151_669


def test_chats_read_as_the_released_templates_write_them() -> None:
    chat = [{"role": "user", "content": "a {{ cat }}"}]
    asked = {"tokenize": False, "add_generation_prompt": True}
    turn = "<|im_start|>user\na {{ cat }}<|im_end|>\n<|im_start|>assistant\n"
    of_qwen3 = qwen_tokenizer(qwen3=True)
    assert of_qwen3.apply_chat_template(chat, **asked, enable_thinking=True) == turn
    assert (
        of_qwen3.apply_chat_template(chat, **asked, enable_thinking=False) == turn + "<think>\n\n</think>\n\n"
    )
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert qwen_tokenizer().apply_chat_template(chat, **asked) == default + turn
    chat = [{"role": "system", "content": "Be brief."}, *chat]
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert qwen_tokenizer().apply_chat_template(chat, **asked) == system + turn


def test_a_tokenizer_folder_reads_as_it_was_made(tmp_path: Path) -> None:
    made = qwen_tokenizer(qwen3=True)
    made.save_pretrained(tmp_path)
    text = "<|im_start|>user\nit's a dog in 2024<|im_end|><think>"
    assert tokenizer_in(tmp_path)(text).input_ids == made(text).input_ids


@pytest.mark.parametrize("spelling", ["folder", "released"])
@pytest.mark.parametrize("eyes", [False, True])
def test_vl_answers_as_transformers(
    vl: tuple[Path, Qwen2_5_VLForConditionalGeneration], tmp_path: Path, spelling: str, eyes: bool
) -> None:
    folder, reference = vl
    file = folder / "model.safetensors"
    if spelling == "released":
        file = spelled_as_released(folder, tmp_path / "qwen_2.5_vl_7b.safetensors")
    config = json.loads((folder / "config.json").read_text())
    slot = qwen.qwen25_vl_slot(eyes=eyes)
    layout = slot.find(layout_of([file]))
    assert layout == slot.tidy(layout_of([file]))
    assert layout is not None
    module = module_of(slot, config, layout)
    with torch.no_grad():
        expected = reference(IDS, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(module(IDS).last_hidden_state, expected)
    names = {name for name, _ in module.named_parameters()}
    assert any(name.startswith("visual.") for name in names) == eyes
    assert not any("lm_head" in name for name in names)


def test_sizes_of_a_single_file_follow_the_weights(
    vl: tuple[Path, Qwen2_5_VLForConditionalGeneration], tmp_path: Path
) -> None:
    folder, reference = vl
    shipped = {
        **json.loads((folder / "config.json").read_text()),
        "vision_config": {**reference.config.vision_config.to_dict(), "depth": 32, "hidden_size": 1280},
    }
    shipped["text_config"] = {**shipped["text_config"], "num_hidden_layers": 28, "hidden_size": 3584}
    slot = qwen.qwen25_vl_slot(eyes=True)
    layout = slot.find(layout_of([spelled_as_released(folder, tmp_path / "file.safetensors")]))
    assert layout is not None
    module = module_of(slot, slot.config_of(shipped, layout), layout)
    with torch.no_grad():
        assert torch.equal(
            module(IDS).last_hidden_state, reference(IDS, output_hidden_states=True).hidden_states[-1]
        )


def test_qwen3_of_any_spelling_answers_as_transformers(tmp_path: Path) -> None:
    reference = drawn(0, lambda: qwen3_lm(qwen_tokenizer(qwen3=True)))
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    slot = qwen.qwen3_slot()
    layout = slot.find(layout_of([tmp_path / "model.safetensors"]))
    assert layout is not None
    module = module_of(slot, slot.config_of({**config, "num_hidden_layers": 36}, layout), layout)
    with torch.no_grad():
        for found, expected in zip(
            module(IDS, output_hidden_states=True).hidden_states,
            reference(IDS, output_hidden_states=True).hidden_states,
            strict=True,
        ):
            assert torch.equal(found, expected)


def test_a_slot_takes_no_other_model(
    vl: tuple[Path, Qwen2_5_VLForConditionalGeneration], tmp_path: Path
) -> None:
    drawn(0, lambda: qwen3_lm(qwen_tokenizer(qwen3=True))).save_pretrained(tmp_path)
    of_qwen3, of_vl = layout_of([tmp_path / "model.safetensors"]), layout_of([vl[0] / "model.safetensors"])
    assert qwen.qwen25_vl_slot().find(of_qwen3) is None
    assert qwen.qwen3_slot().find(of_vl) is None


def test_weights_with_scales_beside_them_are_refused(tmp_path: Path) -> None:
    drawn(0, lambda: qwen3_lm(qwen_tokenizer(qwen3=True))).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.scale_weight"] = torch.ones(())
    save_file(tensors, tmp_path / "scaled.safetensors")
    with pytest.raises(ModelError, match="quantized weights with scales"):
        qwen.qwen3_slot().find(layout_of([tmp_path / "scaled.safetensors"]))
