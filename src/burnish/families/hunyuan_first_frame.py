"""How HunyuanVideo's image-to-video releases are told a clip's first frame (https://github.com/Tencent/HunyuanVideo-I2V).

LLaVA sees the picture in its template; every so many of its patches go before the caption. The denoiser takes the
picture's latents in place of the first noisy frame (`token_replace`), or on further channels beside a mask of where
they are (`latent_concat`). Drawing begins with noise in which all frames have a little of the picture.

Shape letters: B batch, C channels, T frames, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.families import llava
from burnish.families.token_words import written_out
from burnish.family import NegativePrompt

FIRST_FRAME = "first_frame_BC1HW"
# As released, missing blanks included (diffusers: HunyuanVideoImageToVideoPipeline); so many tokens are before the
# caption, the picture counted as one.
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\n"
    "Describe the video by detailing the following aspects according to the reference image: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>\n\n"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
INSTRUCTION_TOKENS = 103
ANSWER_TOKENS = 4  # that the states leave out: the caption's end and whose turn it is
HEADER_END = "<|end_header_id|>"
EVERY = {"token_replace": 4, "latent_concat": 2}  # of so many patches one is read
CLEAN_SHARE = 1e-3  # of the picture in what drawing begins with


def prompt_states(
    encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    pictures: Sequence[Tensor],
    *,
    length: int,
    layer: int,
    every: int,
) -> tuple[Tensor, Tensor]:
    """Of prompts and the picture beside each: patches, then caption, (B, S, D), and the mask of what is no padding.

    Args:
        pictures: each (3, H, W) in [-1, 1].
        length: tokens of a caption and what closes it, at most.
        layer: whose states are read.
        every: of so many patches one is read.
    """
    encoded = tokenizer(
        [TEMPLATE.format(written_out(tokenizer, prompt)) for prompt in prompts],
        padding="max_length",
        max_length=INSTRUCTION_TOKENS + length,
        truncation=True,
        return_tensors="pt",
    ).to(encoder.device)
    rows = []
    for ids_S, mask_S, picture in zip(encoded.input_ids, encoded.attention_mask, pictures, strict=True):
        states, _ = llava.hidden_states(encoder, ids_S[None], mask_S[None], picture[None].to(encoder.device))
        rows.append(_read(states[layer][0], ids_S, mask_S, tokenizer, encoder, every))
    tokens, masks = zip(*rows, strict=True)
    return torch.stack(tokens), torch.stack(masks)


def _read(
    states_SD: Tensor, ids_S: Tensor, mask_S: Tensor, tokenizer: Any, encoder: Any, every: int
) -> tuple[Tensor, Tensor]:
    """Of one prompt: every so many patches, the caption, and what is behind the answer's header."""
    place = int((ids_S == encoder.config.image_token_index).nonzero()[0, 0])
    headers = (ids_S == tokenizer.convert_tokens_to_ids(HEADER_END)).nonzero().flatten()
    # The last of three headers is the answer's; of a caption that was cut off it is not there.
    end = int(headers[-1]) + 1 if len(headers) > 2 else len(ids_S)
    more = llava.PATCHES - 1  # positions that the picture takes beyond its mark
    patches_SD = states_SD[place : place + llava.PATCHES : every]
    caption_SD = states_SD[INSTRUCTION_TOKENS + more : end - ANSWER_TOKENS + more]
    mask = [mask_S.new_ones(len(patches_SD)), mask_S[INSTRUCTION_TOKENS : end - ANSWER_TOKENS], mask_S[end:]]
    return torch.cat([patches_SD, caption_SD, states_SD[end + more :]]), torch.cat(mask)


def picture_for(prompt: str, references: Sequence[Tensor]) -> Tensor:
    """What is shown beside a prompt: its first reference; to what is to be kept away from, as without any, black."""
    if references and not isinstance(prompt, NegativePrompt):
        return references[0]
    return torch.full((3, llava.SIDE, llava.SIDE), -1.0)


def known_channels(first_BC1HW: Tensor | None, noisy_BCTHW: Tensor) -> Tensor:
    """(B, C + 1, T, H, W): the first frame's latents, zeros after it, and the mask; all zeros without one."""
    channels = torch.zeros_like(torch.cat([noisy_BCTHW, noisy_BCTHW[:, :1]], dim=1))
    if first_BC1HW is not None:
        channels[:, :-1, :1] = first_BC1HW.to(channels)
        channels[:, -1:, :1] = 1
    return channels


def begin(noise_BCTHW: Tensor, conditioning: Conditioning) -> Tensor:
    """What drawing begins with."""
    if FIRST_FRAME not in conditioning:
        return noise_BCTHW
    share = torch.tensor(1 - CLEAN_SHARE)
    first_BC1HW = conditioning[FIRST_FRAME].float()
    return noise_BCTHW.float() * share + first_BC1HW * (1 - share)
