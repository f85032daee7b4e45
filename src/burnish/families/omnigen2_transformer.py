"""The transformer of OmniGen2 (arXiv 2506.18871), which is in no library: written from the paper's equations and the
released names of its weights.

Text, reference pictures and the noisy picture are first refined apart, then go through the same blocks as one
sequence. Blocks are those of Lumina-Image 2.0: grouped queries with normed heads, norms before and after attention
and feed-forward layers, gates under tanh. What differs is that references have an embedder, refiners and learned
numbers of their own, and the positions: Omni-RoPE counts (sequence, row, column), where a word moves all three on by
one, a picture is at one place of the sequence, rows and columns of every picture begin at 0, and the next picture is
as far on as the longer side of the one before.

Time runs from noise at 0 to data at 1, and the prediction is data - noise.

Shape letters: B batch, C channels, H W height and width of latents, S words, R patches of references, N tokens or
patches, D width, A heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

MAX_REFERENCES = 5
TIME_WAVES = 256  # sines and cosines of the time
LONGEST_PERIOD = 10_000.0  # of the waves of time and of rotary positions
WIDEST_TIME = 1024  # of the embedded time, in models that are wider
HEAD_EPSILON, LAST_EPSILON = 1e-5, 1e-6


def patches_of(latents_BCHW: Tensor, side: int) -> Tensor:
    """Square patches in reading order, (B, N, side * side * C), channels innermost."""
    batch, channels, height, width = latents_BCHW.shape
    split = latents_BCHW.reshape(batch, channels, height // side, side, width // side, side)
    return split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def latents_of(patches_BND: Tensor, height: int, width: int, side: int) -> Tensor:
    """The inverse of `patches_of` for latents of `height` x `width`."""
    batch, _, depth = patches_BND.shape
    channels = depth // side**2
    split = patches_BND.reshape(batch, height // side, width // side, side, side, channels)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def grid(rows: int, columns: int, device: torch.device) -> Tensor:
    """(row, column) of each patch in reading order, (N, 2)."""
    return torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    ).reshape(-1, 2)


class Positions(nn.Module):
    """Angles by which pairs of neighbouring numbers of each head are turned, a share of the head per coordinate."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, at_BN3: Tensor) -> Tensor:
        """Unit complex numbers (B, N, 1, E/2), complex64."""
        # Apple's GPUs lack float64.
        precise = torch.float32 if at_BN3.device.type == "mps" else torch.float64
        angles = []
        for axis, width in enumerate(self.widths):
            step = torch.arange(0, width, 2, dtype=precise, device=at_BN3.device) / width
            angles.append(at_BN3[..., axis, None].to(precise) * LONGEST_PERIOD**-step)
        angle_BNE = torch.cat(angles, dim=-1).float()
        return torch.polar(torch.ones_like(angle_BNE), angle_BNE).unsqueeze(2)


def turned(heads_BNAE: Tensor, turn_BN1E: Tensor) -> Tensor:
    pairs = torch.view_as_complex(heads_BNAE.float().reshape(*heads_BNAE.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn_BN1E).flatten(-2).to(heads_BNAE.dtype)


class Attention(nn.Module):
    """Several queries share a key and value; queries and keys are normed per head."""

    def __init__(self, width: int, heads: int, shared_heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.to_q = nn.Linear(width, heads * self.head, bias=False)
        self.to_k = nn.Linear(width, shared_heads * self.head, bias=False)
        self.to_v = nn.Linear(width, shared_heads * self.head, bias=False)
        self.norm_q = nn.RMSNorm(self.head, eps=HEAD_EPSILON)
        self.norm_k = nn.RMSNorm(self.head, eps=HEAD_EPSILON)
        self.to_out = nn.ModuleList([nn.Linear(heads * self.head, width, bias=False)])

    def forward(self, tokens_BND: Tensor, mask_BN: Tensor | None, turn_BN1E: Tensor) -> Tensor:
        query, key, value = (
            made(tokens_BND).unflatten(-1, (-1, self.head)) for made in (self.to_q, self.to_k, self.to_v)
        )
        query, key = turned(self.norm_q(query), turn_BN1E), turned(self.norm_k(key), turn_BN1E)
        shared = query.shape[2] // key.shape[2]
        found_BANE = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.repeat_interleave(shared, dim=2).transpose(1, 2),
            value.repeat_interleave(shared, dim=2).transpose(1, 2),
            attn_mask=None if mask_BN is None else mask_BN[:, None, None, :],
        )
        out: Tensor = self.to_out[0](found_BANE.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, inner, bias=False)
        self.linear_2 = nn.Linear(inner, width, bias=False)
        self.linear_3 = nn.Linear(width, inner, bias=False)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        out: Tensor = self.linear_2(functional.silu(self.linear_1(tokens_BND)) * self.linear_3(tokens_BND))
        return out


class ModulatedNorm(nn.Module):
    """A norm, and what time makes of it: scale and gate of attention, scale and gate of the feed-forward layers."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.linear = nn.Linear(min(width, WIDEST_TIME), 4 * width)
        self.norm = nn.RMSNorm(width, eps=epsilon)

    def forward(self, tokens_BND: Tensor, time_BD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        made_B1D = self.linear(functional.silu(time_BD)).unsqueeze(1)
        scale, gate, scale_after, gate_after = made_B1D.chunk(4, dim=-1)
        return self.norm(tokens_BND) * (1 + scale), gate.tanh(), 1 + scale_after, gate_after.tanh()


class Block(nn.Module):
    def __init__(
        self, width: int, heads: int, shared_heads: int, inner: int, epsilon: float, *, modulated: bool
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, shared_heads)
        self.feed_forward = FeedForward(width, inner)
        self.norm1 = ModulatedNorm(width, epsilon) if modulated else nn.RMSNorm(width, eps=epsilon)
        self.ffn_norm1 = nn.RMSNorm(width, eps=epsilon)
        self.norm2 = nn.RMSNorm(width, eps=epsilon)
        self.ffn_norm2 = nn.RMSNorm(width, eps=epsilon)

    def forward(
        self, tokens_BND: Tensor, mask_BN: Tensor | None, turn_BN1E: Tensor, time_BD: Tensor | None = None
    ) -> Tensor:
        """`mask_BN`: which tokens are attended to; None for all. `time_BD`: of a modulated block."""
        if time_BD is None:
            attended = self.attn(self.norm1(tokens_BND), mask_BN, turn_BN1E)
            tokens_BND = tokens_BND + self.norm2(attended)
            after: Tensor = self.ffn_norm2(self.feed_forward(self.ffn_norm1(tokens_BND)))
            return tokens_BND + after
        normed, gate, scale_after, gate_after = self.norm1(tokens_BND, time_BD)
        tokens_BND = tokens_BND + gate * self.norm2(self.attn(normed, mask_BN, turn_BN1E))
        made = self.feed_forward(self.ffn_norm1(tokens_BND) * scale_after)
        fed: Tensor = gate_after * self.ffn_norm2(made)
        return tokens_BND + fed


class TimeEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_WAVES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, time_B: Tensor) -> Tensor:
        half = TIME_WAVES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time_B.device) / half
        angles = time_B[:, None].float() * torch.exp(-log(LONGEST_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        out: Tensor = self.linear_2(functional.silu(self.linear_1(waves)))
        return out


class Embedders(nn.Module):
    """Of time and captions, under the names of the release."""

    def __init__(self, width: int, text_width: int, epsilon: float) -> None:
        super().__init__()
        self.timestep_embedder = TimeEmbedder(min(width, WIDEST_TIME))
        self.caption_embedder = nn.Sequential(
            nn.RMSNorm(text_width, eps=epsilon), nn.Linear(text_width, width)
        )


class LastLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(min(width, WIDEST_TIME), width)
        self.norm = nn.LayerNorm(width, LAST_EPSILON, elementwise_affine=False)
        self.linear_2 = nn.Linear(width, out)

    def forward(self, tokens_BND: Tensor, time_BD: Tensor) -> Tensor:
        scale_B1D = 1 + self.linear_1(functional.silu(time_BD)).unsqueeze(1)
        out: Tensor = self.linear_2(self.norm(tokens_BND) * scale_B1D)
        return out


class OmniGen2Transformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The arguments are those of the released config.json, `axes_lens` (of its tables) without use here."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2520,
        num_layers: int = 32,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 21,
        num_kv_heads: int = 7,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: tuple[int, ...] = (40, 40, 40),
        axes_lens: tuple[int, ...] = (10_000, 10_000, 10_000),
        text_feat_dim: int = 2048,
        timestep_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        inner = int(4 * hidden_size * (ffn_dim_multiplier or 1.0))
        inner = (inner + multiple_of - 1) // multiple_of * multiple_of

        def blocks(count: int, *, modulated: bool = True) -> nn.ModuleList:
            sizes = (hidden_size, num_attention_heads, num_kv_heads, inner, norm_eps)
            return nn.ModuleList([Block(*sizes, modulated=modulated) for _ in range(count)])

        patch = patch_size * patch_size
        self.positions = Positions(tuple(axes_dim_rope))
        self.x_embedder = nn.Linear(patch * in_channels, hidden_size)
        self.ref_image_patch_embedder = nn.Linear(patch * in_channels, hidden_size)
        self.time_caption_embed = Embedders(hidden_size, text_feat_dim, norm_eps)
        self.context_refiner = blocks(num_refiner_layers, modulated=False)
        self.noise_refiner = blocks(num_refiner_layers)
        self.ref_image_refiner = blocks(num_refiner_layers)
        self.layers = blocks(num_layers)
        self.norm_out = LastLayer(hidden_size, patch * (out_channels or in_channels))
        self.image_index_embedding = nn.Parameter(torch.randn(MAX_REFERENCES, hidden_size) * 0.02)

    def forward(
        self,
        latents_BCHW: Tensor,
        time_B: Tensor,
        text_BSD: Tensor,
        mask_BS: Tensor | None = None,
        references_BRD: Tensor | None = None,
        reference_at_BR3: Tensor | None = None,
        pictures: Sequence[slice] = (),
    ) -> Tensor:
        """Data - noise, in the shape of the latents.

        Args:
            time_B: 0 for noise, 1 for data.
            mask_BS: which words are there, padding on the right; None where there is none.
            references_BRD: their patches as `patches_of` gives them.
            reference_at_BR3: number of the picture from 1 (0 for padding), row, column.
            pictures: between which patches of references the first, second, ... one is, in whichever row.
        """
        side = self.config.patch_size
        height, width = latents_BCHW.shape[2:]
        patches_BND = patches_of(latents_BCHW, side)
        words, count = text_BSD.shape[1], patches_BND.shape[1]
        time_BD = self.time_caption_embed.timestep_embedder(time_B * self.config.timestep_scale)

        text_at_BS3 = torch.arange(words, device=text_BSD.device)[None, :, None].expand(len(text_BSD), -1, 3)
        next_B = _lengths(text_BSD, mask_BS)
        turn_text = self.positions(text_at_BS3)
        text_BSD = self.time_caption_embed.caption_embedder(text_BSD)
        for block in self.context_refiner:
            text_BSD = block(text_BSD, mask_BS, turn_text)

        tokens, turns, masks = [text_BSD], [turn_text], [mask_BS]
        if references_BRD is not None and reference_at_BR3 is not None:
            number_BR = reference_at_BR3[..., 0]
            at_BR3, next_B = _along_the_sequence(reference_at_BR3, next_B, len(pictures))
            turn = self.positions(at_BR3)
            tokens.append(self._refined_references(references_BRD, number_BR, pictures, turn, time_BD))
            turns.append(turn)
            masks.append(number_BR > 0)

        picture_at_N2 = grid(height // side, width // side, latents_BCHW.device)
        picture_at_BN2 = picture_at_N2.expand(len(next_B), -1, -1)
        turn = self.positions(torch.cat([next_B[:, None, None].expand(-1, count, 1), picture_at_BN2], dim=-1))
        picture_BND = self.x_embedder(patches_BND)
        for block in self.noise_refiner:
            picture_BND = block(picture_BND, None, turn, time_BD)
        tokens.append(picture_BND)
        turns.append(turn)
        masks.append(None)

        joined_BND, turn, mask_BN = torch.cat(tokens, dim=1), torch.cat(turns, dim=1), _joined(tokens, masks)
        for block in self.layers:
            joined_BND = block(joined_BND, mask_BN, turn, time_BD)
        return latents_of(self.norm_out(joined_BND[:, -count:], time_BD), height, width, side)

    def _refined_references(
        self,
        patches_BRD: Tensor,
        number_BR: Tensor,
        pictures: Sequence[slice],
        turn_BR1E: Tensor,
        time_BD: Tensor,
    ) -> Tensor:
        """Each picture refined alone: its patches attend to none of another."""
        embedded_BRD = self.ref_image_patch_embedder(patches_BRD)
        refined_BRD = torch.zeros_like(embedded_BRD)
        for number, columns in enumerate(pictures, start=1):
            mask_BR = number_BR[:, columns] == number
            one_BRD = embedded_BRD[:, columns] + self.image_index_embedding[number - 1]
            # Rows without this picture attend to what is not used afterwards, rather than to nothing.
            attended_BR = mask_BR | ~mask_BR.any(dim=1, keepdim=True)
            for block in self.ref_image_refiner:
                one_BRD = block(one_BRD, attended_BR, turn_BR1E[:, columns], time_BD)
            refined_BRD[:, columns] = torch.where(mask_BR[..., None], one_BRD, refined_BRD[:, columns])
        return refined_BRD


def _lengths(text_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Words of each caption, (B,)."""
    if mask_BS is None:
        return torch.full((len(text_BSD),), text_BSD.shape[1], device=text_BSD.device)
    return mask_BS.sum(dim=1)


def _along_the_sequence(at_BR3: Tensor, next_B: Tensor, pictures: int) -> tuple[Tensor, Tensor]:
    """Positions with the pictures' places in the sequence for their numbers, and the next free place."""
    number_BR, place_BR = at_BR3[..., 0], torch.zeros_like(at_BR3[..., 0])
    longest_BR = at_BR3[..., 1:].amax(dim=-1) + 1
    for number in range(1, pictures + 1):
        here_BR = number_BR == number
        place_BR = torch.where(here_BR, next_B[:, None], place_BR)
        next_B = next_B + (longest_BR * here_BR).amax(dim=1)
    return torch.cat([place_BR[..., None], at_BR3[..., 1:]], dim=-1), next_B


def _joined(tokens: list[Tensor], masks: list[Tensor | None]) -> Tensor | None:
    """One mask for tokens side by side; None where nothing is masked."""
    if all(mask is None for mask in masks):
        return None
    whole = [
        torch.ones(one.shape[:2], dtype=torch.bool, device=one.device) if mask is None else mask
        for one, mask in zip(tokens, masks, strict=True)
    ]
    return torch.cat(whole, dim=1)
