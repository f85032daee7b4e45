"""Mistral's tokenizer out of ComfyUI's files, which keep `tekken.json` beside the weights.

Byte pairs in the order of their ranks, behind a thousand special marks
(`mistral_common/tokens/tokenizers/tekken.py` of https://github.com/mistralai/mistral-common).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from safetensors import safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from burnish.errors import ModelError
from burnish.families.clip import byte_letters
from burnish.families.weights import Layout

TENSOR = "tekken_model"
# What the released template comes to for a system's message and a user's text.
CHAT = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- set mark = 'SYSTEM_PROMPT]' if message['role'] == 'system' else 'INST]' %}{{- '[' + mark }}"
    "{%- for block in message['content'] %}{{- block['text'] }}{%- endfor %}{{- '[/' + mark }}{%- endfor %}"
)


def tokenizer_in_file(layout: Layout) -> PreTrainedTokenizerBase | None:
    """None if the file holds none."""
    held = [piece for name, piece in layout.items() if name.rpartition(".")[2] == TENSOR]
    if not held:
        return None
    with safe_open(held[0].file, framework="pt") as file:
        return tokenizer_of(bytes(file.get_tensor(held[0].name).numpy()))


def tokenizer_of(tekken: bytes) -> PreTrainedTokenizerFast:
    """The tokenizer of a `tekken.json`; pads on the left.

    Raises:
        ModelError: it is none.
    """
    try:
        stated: Mapping[str, Any] = json.loads(tekken)
        config = stated["config"]
        room = int(config["default_num_special_tokens"])
        named = {int(mark["rank"]): str(mark["token_str"]) for mark in stated["special_tokens"]}
        known = int(config["default_vocab_size"]) - room
        ranks = {
            base64.b64decode(one["token_bytes"]): int(one["rank"])
            for one in stated["vocab"]
            if int(one["rank"]) < known
        }
        pattern = str(config["pattern"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The tokenizer beside the weights of Mistral cannot be read: {error}.",
            remedy="Fetch the file again, or use the diffusers folder of the model as `model.path`.",
        ) from error
    marks = [named.get(number, f"<SPECIAL_{number}>") for number in range(room)]
    return _fast(marks, ranks, pattern)


def _fast(marks: list[str], ranks: Mapping[bytes, int], pattern: str) -> PreTrainedTokenizerFast:
    letter = dict(zip(_bytes_in_order(), byte_letters(), strict=True))

    def spelled(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    merges: list[tuple[int, str, str]] = []
    for token, rank in ranks.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        both = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(rank, spelled(a), spelled(b)) for _, _, a, b in sorted(both)]
    merges.sort(key=lambda merge: merge[0])
    vocabulary = {mark: number for number, mark in enumerate(marks)}
    vocabulary |= {spelled(token): len(marks) + rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[(a, b) for _, a, b in merges], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=131_072,
        chat_template=CHAT,
    )


def _bytes_in_order() -> list[int]:
    """Bytes in the order of `byte_letters`: the printable ones, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*printable, *(byte for byte in range(256) if byte not in printable)]
