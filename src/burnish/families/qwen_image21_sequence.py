"""One sequence of words and pictures through the denoiser of Qwen-Image 2.1.

The caption comes first, each reference picture in it where the text encoder saw it, and the picture that is drawn
last. Words attend to what is before them, a picture to what is before it and to itself. All but the last picture is
modulated as at time 0, so that it is the same in every step; diffusers keeps its keys and values from the first one on,
and here it is computed anew, to the same result.

It is `QwenImage21Transformer2DModel.forward` without a cache, which reads sizes and masks back from the device; here
they are known on the host.

Shape letters: B batch, C channels, H W height and width of latents, S words, N tokens of references or of the whole
sequence, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.families.masked import lengths

# What the denoiser is told of references besides words: latents, their rows and columns, words before each.
REFERENCE, SIZES, PLACES = "tokens_reference_BNC", "tokens_reference_size_BR2", "tokens_place_BR"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a sequence, the same for all of a batch's rows."""

    words: int
    places: tuple[int, ...]  # of each reference, how many words come before it
    sizes: tuple[tuple[int, int], ...]  # rows and columns of each reference's latents

    def parts(self) -> list[tuple[int, int] | int]:
        """What comes before the picture that is drawn: words from and up to which, and numbers of references."""
        found: list[tuple[int, int] | int] = []
        begin = 0
        for number, place in enumerate(self.places):
            if place > begin:
                found.append((begin, place))
            found.append(number)
            begin = place
        return [*found, (begin, self.words)] if self.words > begin else found


def latents_as_tokens(latents_BCHW: Tensor) -> Tensor:
    """(B, H * W, C) in reading order."""
    return latents_BCHW.flatten(2).transpose(1, 2)


def described(references_BCHW: Sequence[Tensor]) -> Conditioning:
    """References as the denoiser is told of them; nothing of none."""
    if not references_BCHW:
        return Conditioning({})
    sizes_R2 = torch.tensor([latents.shape[2:] for latents in references_BCHW])
    sizes_BR2 = sizes_R2.to(references_BCHW[0].device).expand(len(references_BCHW[0]), -1, -1)
    tokens_BNC = torch.cat([latents_as_tokens(latents) for latents in references_BCHW], dim=1)
    return Conditioning({REFERENCE: tokens_BNC, SIZES: sizes_BR2.contiguous()})


def layouts(conditioning: Conditioning) -> list[Layout]:
    """Of each row of a batch."""
    sizes_BR2 = conditioning.on_host(SIZES) if SIZES in conditioning else None
    places_BR = conditioning.on_host(PLACES) if PLACES in conditioning else None
    found = []
    for row, words in enumerate(lengths(conditioning)):
        # Sizes of zero are padding.
        sizes = [] if sizes_BR2 is None else [(high, wide) for high, wide in sizes_BR2[row].tolist() if high]
        # References that the prompt has not seen come behind it.
        places = [words] * len(sizes) if places_BR is None else places_BR[row, : len(sizes)].tolist()
        found.append(Layout(words, tuple(places), tuple(sizes)))
    return found


def predict(
    denoiser: Any,
    dtype: torch.dtype,
    layout: Layout,
    noisy_BCHW: Tensor,
    t_B: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Velocity (B, C, H, W), of rows that are all laid out so."""
    height, width = noisy_BCHW.shape[2:]
    drawn, t_B = height * width, t_B.to(dtype)
    words_BSD = denoiser.txt_in(conditioning["tokens_BSD"][:, : layout.words].to(dtype))
    counts = [rows * columns for rows, columns in layout.sizes]
    shown: list[Tensor] = []
    if counts:
        references_BND = denoiser.img_in(conditioning[REFERENCE][:, : sum(counts)].to(dtype))
        shown = list(torch.split(references_BND, counts, dim=1))
    pieces, segments, length = [], [], 0
    for part in layout.parts():
        piece_BND = shown[part] if isinstance(part, int) else words_BSD[:, slice(*part)]
        pieces.append(piece_BND)
        segments.append((length, length + piece_BND.shape[1], not isinstance(part, int)))
        length += piece_BND.shape[1]
    sequence_BND = torch.cat([*pieces, denoiser.img_in(latents_as_tokens(noisy_BCHW.to(dtype)))], dim=1)

    time_BD = denoiser.time_text_embed(torch.cat([t_B, torch.zeros_like(t_B[:1])]), sequence_BND)
    modulation_BD = denoiser.modulation(time_BD)
    is_drawn_N = torch.arange(length + drawn, device=noisy_BCHW.device) >= length
    turn_ND = turns(positions(layout, height, width, noisy_BCHW.device), denoiser.config.axes_dims_rope)
    for block in denoiser.transformer_blocks:
        sequence_BND = block(
            hidden_states=sequence_BND,
            modulation=modulation_BD,
            rotary_emb=turn_ND,
            target_token_mask=is_drawn_N,
            segments=segments,
        )
    last_BND = denoiser.norm_out(sequence_BND[:, length:], time_BD[:-1])
    velocity_BNC: Tensor = denoiser.proj_out(last_BND)
    return velocity_BNC.transpose(1, 2).reshape(len(noisy_BCHW), -1, height, width)


def positions(layout: Layout, height: int, width: int, device: torch.device) -> Tensor:
    """(place, row, column) of each token, (N, 3) int64.

    A word moves all three on by one. A picture stands at one place, its rows and columns are counted from its middle,
    and what follows is as far on as its longer side.
    """
    found, place = [], 0
    for part in [*layout.parts(), len(layout.sizes)]:
        if isinstance(part, int):
            rows, columns = (*layout.sizes, (height, width))[part]
            found.append(_grid(place, rows, columns, device))
            place += max(rows, columns)
        else:
            count = part[1] - part[0]
            found.append(torch.arange(place, place + count, device=device)[:, None].expand(-1, 3))
            place += count
    return torch.cat(found)


def _grid(place: int, rows: int, columns: int, device: torch.device) -> Tensor:
    row = torch.arange(rows, device=device) - (rows - rows // 2)
    column = torch.arange(columns, device=device) - (columns - columns // 2)
    at_H1, at_1W = row[:, None].expand(-1, columns), column[None, :].expand(rows, -1)
    return torch.stack([torch.full_like(at_H1, place), at_H1, at_1W], dim=-1).flatten(0, 1)


def turns(at_N3: Tensor, widths: tuple[int, ...], longest_period: float = 10_000.0) -> Tensor:
    """By how much pairs of numbers of each head are turned, a share of the head per coordinate: (N, D/2) complex64."""
    angles = []
    for axis, width in enumerate(widths):
        step = torch.arange(0, width, 2, dtype=torch.float32, device=at_N3.device) / width
        angles.append(at_N3[:, axis, None] * (1.0 / longest_period**step))
    angle_ND = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle_ND), angle_ND)
