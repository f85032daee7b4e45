"""ChatGLM3 (https://github.com/THUDM/ChatGLM3) as a text encoder: diffusers' own copy of model and tokenizer.

Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from burnish.families.slots import Slot
from burnish.families.text_slots import settings_of
from burnish.families.token_words import written_out


def chatglm_slot(folder: str, tokenizer: str) -> Slot:
    """ChatGLM3 of a diffusers folder; no single file in use holds it."""
    return Slot(
        folder=folder,
        part="text_encoders",
        make=_make,
        tokenizer=tokenizer,
        load_tokenizer=_tokenizer_in,
        unused=("output_layer.*", "transformer.*"),
    )


class _ChatGLM(ChatGLMModel):  # type: ignore[misc]
    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.word_embeddings = value


def _make(config: dict[str, Any]) -> nn.Module:
    # Memory that is left as it was found would hide missing weights.
    model: nn.Module = _ChatGLM(ChatGLMConfig(**settings_of(config)), empty_init=False)
    return model


def _tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = ChatGLMTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def last_states(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int
) -> tuple[Tensor, Tensor]:
    """The last but one hidden state (B, S, D) with S = `length`, padding on the left; and the last of the last token,
    (B, D).
    """
    encoded = tokenizer(
        [written_out(tokenizer, prompt) for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).to(next(encoder.parameters()).device)
    answer = encoder(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        position_ids=encoded["position_ids"],
        output_hidden_states=True,
        return_dict=True,
    )
    # Its hidden states are (S, B, D).
    return answer.hidden_states[-2].transpose(0, 1).contiguous(), answer.hidden_states[-1][-1]
