"""A tiny Mistral 3: byte-level BPE with its marks and chat template, a language model, and eyes that no test opens."""

from __future__ import annotations

from tiny_pipelines import CORPUS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

MARKS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)
# What the released template does to a system's and a user's message: texts between marks, a picture as its mark.
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT]' + message['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST]' }}
        {%- for block in message['content'] %}
            {%- if block['type'] == 'text' %}{{- block['text'] }}{%- else %}{{- '[IMG]' }}{%- endif %}
        {%- endfor %}
        {{- '[/INST]' }}
    {%- endif %}
{%- endfor %}"""


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `CORPUS`; pads at the left, as released."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(MARKS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2048,
        additional_special_tokens=list(MARKS[3:6] + MARKS[7:]),
    )
    fast.chat_template = TEMPLATE
    return fast


def mistral3(
    tokenizer: PreTrainedTokenizerFast, width: int = 32, layers: int = 32
) -> Mistral3ForConditionalGeneration:
    """Heads as wide as released, wider together than the model; two layers more than FLUX.2 reads of it."""
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": len(tokenizer),
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 128,
                "num_hidden_layers": layers,
                "max_position_embeddings": 2048,
                "sliding_window": None,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": 56,
                "patch_size": 14,
                "head_dim": 8,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
            vision_feature_layer=-1,
            spatial_merge_size=2,
            tie_word_embeddings=False,
        )
    )
