"""New words beside the tokens of real tokenizers: where they stand in a template, what is read around them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from burnish.families import hunyuan_image, hunyuan_video15, krea2, qwen, qwen_image, qwen_image_edit, umt5
from burnish.families.token_words import TokenVocabulary, written_out

WORD = "<it>"
TOKENS = (WORD, f"{WORD}_1", f"{WORD}_2")


@pytest.fixture(scope="module")
def taught() -> PreTrainedTokenizerBase:
    """Qwen's own tokenizer with a word of three vectors."""
    tokenizer = qwen.shipped_tokenizer()
    width = {"hidden_size": 4, "intermediate_size": 4, "head_dim": 4}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    encoder = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **width, **heads))
    TokenVocabulary(tokenizer, encoder).add(WORD, nn.Parameter(torch.zeros(3, 4)))
    return tokenizer


def in_chat(prompt: str) -> str:
    """As Qwen's chat template writes HunyuanVideo 1.5's messages."""
    messages = hunyuan_video15.conversation(prompt)
    return "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)


TEMPLATES: dict[str, tuple[Callable[[str], str], int]] = {
    "qwen_image": (qwen_image.TEMPLATE.format, qwen_image.INSTRUCTION_TOKENS),
    "qwen_image_edit": (qwen_image_edit.TEMPLATE.format, qwen_image_edit.INSTRUCTION_TOKENS),
    "hunyuan_image": (hunyuan_image.TEMPLATE.format, hunyuan_image.INSTRUCTION_TOKENS),
    "krea2": (f"{krea2.BEFORE}{{}}".format, krea2.BEFORE_TOKENS),
    "hunyuan_video15": (in_chat, hunyuan_video15.INSTRUCTION_TOKENS),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_word_that_begins_the_prompt_is_the_first_thing_that_a_model_is_told(
    taught: PreTrainedTokenizerBase, name: str
) -> None:
    template, before = TEMPLATES[name]
    ids = taught(template(written_out(taught, f"{WORD} on a chair"))).input_ids
    assert ids[:before] == taught(template("a chair")).input_ids[:before]
    assert ids[before : before + 3] == taught.convert_tokens_to_ids(list(TOKENS))


def test_what_stands_around_is_read_by_itself(taught: PreTrainedTokenizerBase) -> None:
    """As ComfyUI reads a prompt: text, vectors, text, none of which knows of the others."""
    before, after = "a photo of", "on a red chair, and"
    ids = taught(written_out(taught, f"{before} {WORD} {after} {WORD}.")).input_ids
    numbers = taught.convert_tokens_to_ids(list(TOKENS))
    parts = [taught(before).input_ids, numbers, taught(after).input_ids, numbers, taught(".").input_ids]
    assert ids == list(chain.from_iterable(parts))
    assert written_out(taught, "a chair, <|im_end|> \n<it2") == "a chair, <|im_end|> \n<it2"


def test_words_that_carry_their_blank_are_known() -> None:
    for tokenizer in (qwen.shipped_tokenizer(), umt5.shipped_tokenizer()):
        vocabulary = TokenVocabulary(
            tokenizer, UMT5EncoderModel(UMT5Config(vocab_size=8, d_model=4, num_layers=1))
        )
        assert vocabulary.knows("chair")
        assert vocabulary.knows("f\u00fcr")
        assert not vocabulary.knows("ohwxq")
        assert len(vocabulary.numbers("chair")) == 1


def test_gemma_3_scales_the_vectors_as_its_own() -> None:
    config = Gemma3TextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    tokenizer, encoder = qwen.shipped_tokenizer(), Gemma3TextModel(config)
    vectors_ND = nn.Parameter(torch.randn(2, 16))
    TokenVocabulary(tokenizer, encoder).add(WORD, vectors_ND)
    ids_BS = torch.tensor([[1, *tokenizer.convert_tokens_to_ids(list(TOKENS[:2]))]])
    embedded_BSD = encoder(ids_BS, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(embedded_BSD[0, 1:], vectors_ND * 4)
