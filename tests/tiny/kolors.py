"""Kolors: Stable Diffusion XL's UNet behind ChatGLM3, with a longer noise schedule."""

from __future__ import annotations

import atexit
import io
import shutil
import tempfile
from functools import cache
from pathlib import Path

from diffusers import AutoencoderKL, EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from sentencepiece import SentencePieceTrainer
from tiny_pipelines import CORPUS, drawn, kl_vae
from torch import nn

from tiny import Case

WIDTH = 32  # of the text encoder; its last state is the pooled embedding


@cache
def chatglm_tokenizer() -> ChatGLMTokenizer:
    """BPE with a byte for every unknown letter; its class reads nothing but a file."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "tokenizer.model"
    file.write_bytes(written.getvalue())
    return ChatGLMTokenizer(str(file))


def chatglm(tokenizer: ChatGLMTokenizer) -> ChatGLMModel:
    """As ChatGLM3: two keys for all heads, biases in the queries alone, half of a head turned."""
    config = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=tokenizer.vocab_size + 7,
        hidden_size=WIDTH,
        ffn_hidden_size=48,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        original_rope=True,
    )
    model = ChatGLMModel(config, empty_init=False)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # its own class of norm leaves them as it found the memory
            nn.init.normal_(parameter, 1.0, 0.1)
    return model


def _vae() -> AutoencoderKL:
    return kl_vae(latent_channels=4, scaling_factor=0.13025, force_upcast=False)


def _kolors(seed: int) -> KolorsPipeline:
    tokenizer = chatglm_tokenizer()
    return KolorsPipeline(
        unet=drawn(
            seed,
            lambda: UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(10, 20, 40),
                norm_num_groups=2,
                cross_attention_dim=16,
                encoder_hid_dim=WIDTH,
                encoder_hid_dim_type="text_proj",
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=6 * 256 + WIDTH,
                transformer_layers_per_block=(1, 2, 3),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            ),
        ),
        vae=drawn(seed + 1, _vae),
        text_encoder=drawn(seed + 2, lambda: chatglm(tokenizer)),
        tokenizer=tokenizer,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.014,
            beta_schedule="scaled_linear",
            steps_offset=1,
            num_train_timesteps=1100,
            timestep_spacing="leading",
        ),
        image_encoder=None,
        feature_extractor=None,
    )


CASES = {"kolors": Case("kolors", _kolors)}
