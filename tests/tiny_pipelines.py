"""Complete diffusers pipelines of a few megabytes with random weights, built offline.

The topology is that of the released models: the kinds, order and number of blocks, the number of attention
heads, VAE compression and latent channels, and the hand-over between text encoders and denoiser. Only widths,
depths and vocabularies are small. Parameters that a released model initialises to zero are drawn at random,
so that every adapter placed on them has an effect. The same name and seed give the same weights.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CORPUS = (
    "a photo of a sks dog sitting on a red chair in the kitchen, soft light, high quality",
    "a painting of a cat in the style of monet, blue sky, green grass, two people walking",
    "anime girl with long hair, black eyes, smile, masterpiece, best quality, 1girl, solo, looking at viewer",
    "the quick brown fox jumps over the lazy dog. ohwx woman wearing a white dress, portrait, studio",
    "low quality, blurry, worst quality, bad anatomy, watermark, text, ugly, distorted",
) * 4

Model = TypeVar("Model", bound=nn.Module)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def build(name: str, folder: Path, seed: int = 0) -> DiffusionPipeline:
    """Build the pipeline `name` (of `PIPELINES` or `tiny.cases()`), save it to `folder`, return it (fp32, CPU)."""
    from tiny import cases

    make = PIPELINES[name] if name in PIPELINES else cases()[name].build
    pipeline = make(seed)
    pipeline.save_pretrained(folder)
    return pipeline


def _sd15(seed: int) -> DiffusionPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        unet=drawn(
            seed,
            lambda: UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16, 32, 32),
                norm_num_groups=8,
                cross_attention_dim=24,
                attention_head_dim=8,  # the number of heads, as in the released config
            ),
        ),
        vae=drawn(seed + 1, lambda: kl_vae(latent_channels=4, scaling_factor=0.18215)),
        text_encoder=drawn(seed + 2, lambda: clip_l(tokenizer)),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def _sdxl(seed: int) -> DiffusionPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(padding="!")
    return StableDiffusionXLPipeline(
        unet=drawn(
            seed,
            lambda: UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(10, 20, 40),
                norm_num_groups=2,
                cross_attention_dim=24 + 40,  # both text encoders side by side
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=6 * 256 + 40,
                transformer_layers_per_block=(1, 2, 3),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            ),
        ),
        vae=drawn(seed + 1, lambda: kl_vae(latent_channels=4, scaling_factor=0.13025, force_upcast=True)),
        text_encoder=drawn(seed + 2, lambda: clip_l(tokenizer)),
        text_encoder_2=drawn(seed + 3, lambda: clip_g(tokenizer_2)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        image_encoder=None,
        feature_extractor=None,
        add_watermarker=False,
    )


PIPELINES: dict[str, Callable[[int], DiffusionPipeline]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
}


def drawn(seed: int, make: Callable[[], Model]) -> Model:
    """The model that `make` gives under `seed`, in eval mode, with no parameter left at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.02)
    return model


def kl_vae(
    *,
    latent_channels: int,
    scaling_factor: float,
    shift_factor: float | None = None,
    quant: bool = True,
    force_upcast: bool = False,
) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 16, 16],
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        force_upcast=force_upcast,
    )


def clip_l(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(_clip_config(tokenizer, width=24, heads=12, activation="quick_gelu"))


def clip_l_with_projection(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """As in Stable Diffusion 3 and HiDream, which take its pooled embedding projected."""
    return CLIPTextModelWithProjection(_clip_config(tokenizer, width=24, heads=12, activation="quick_gelu"))


def clip_g(tokenizer: CLIPTokenizer, layers: int = 3) -> CLIPTextModelWithProjection:
    """OpenCLIP's bigG. With more layers than CLIP-L's twelve, separate files of the two are told apart."""
    return CLIPTextModelWithProjection(
        _clip_config(tokenizer, width=40, heads=20, activation="gelu", layers=layers)
    )


def _clip_config(
    tokenizer: CLIPTokenizer, *, width: int, heads: int, activation: str, layers: int = 3
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 2,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        hidden_act=activation,
        projection_dim=width,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5(tokenizer: T5TokenizerFast, width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**t5_settings(tokenizer, width)))


def t5_settings(tokenizer: PreTrainedTokenizerBase, width: int) -> dict[str, Any]:
    """Of T5's config, and of UMT5's."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    }


def clip_tokenizer(padding: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte-level BPE, trained on `CORPUS`; SDXL's second one pads with `!`."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)

    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    # As in the real vocabulary, `!` comes first, and every byte also has a form that ends a word.
    tokens = [
        "!",
        *(token for token in model["vocab"] if token != "!"),
        *(letter + "</w>" for letter in letters),
    ]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in model["merges"]],
        pad_token=padding,
        model_max_length=77,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """T5's unigram tokenizer, trained on `CORPUS`, with its hundred sentinels at the end."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = string.printable.strip()
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        unk_token="<unk>",
        special_tokens=["<pad>", "</s>", "<unk>"],
        show_progress=False,
        initial_alphabet=[*letters, "\u2581"],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    known = {piece for piece, _ in vocabulary}
    vocabulary += [(letter, -12.0) for letter in letters if letter not in known]
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in range(99, -1, -1)]
    return T5TokenizerFast(vocab=vocabulary, model_max_length=512)
