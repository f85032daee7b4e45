"""HiDream's transformer as it can be trained: diffusers' own, with experts that gradients reach.

Diffusers' experts compute without gradients unless the whole model is in training mode, in which the model answers
with patches instead of latents. Here they are the same modules under the same names, called by another rule.

Shape letters: B batch, S tokens, D width, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


class RoutedExperts(nn.Module):
    """Feed-forward of one expert for all tokens and a few of several for each, weighted by a gate.

    As in DeepSeek-V3 (arXiv 2412.19437) without its balancing: a token's weights are the gate's softmax over all
    experts, not normed over those that are chosen.
    """

    def __init__(self, given: MOEFeedForwardSwiGLU) -> None:
        super().__init__()
        self.shared_experts = given.shared_experts
        self.experts = given.experts
        self.gate = given.gate

    # What goes where is known when it is computed: no graph holds for the next batch.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, states_BSD: Tensor) -> Tensor:
        chosen_TK, weights_TK, _ = self.gate(states_BSD)
        states_TD = states_BSD.flatten(0, 1)
        routed_TD = torch.zeros_like(states_TD)
        order_N = chosen_TK.flatten().argsort(stable=True)
        shares = order_N.split(self._shares(chosen_TK))
        for expert, share in zip(self.experts, shares, strict=True):
            token = share // chosen_TK.shape[1]
            answer = expert(states_TD[token]) * weights_TK.flatten()[share, None]
            routed_TD = routed_TD.index_add(0, token, answer.to(routed_TD.dtype))
        shared_BSD: Tensor = self.shared_experts(states_BSD)
        return routed_TD.view_as(states_BSD) + shared_BSD

    def _shares(self, chosen_TK: Tensor) -> list[int]:
        """How many tokens each expert is called for: the one thing of a layer that is read back from the device."""
        experts = len(self.experts)
        if chosen_TK.is_meta or isinstance(chosen_TK, FakeTensor):
            # Without weights nothing is known of the choice: an even share.
            whole, over = divmod(chosen_TK.numel(), experts)
            return [whole + (number < over) for number in range(experts)]
        numbers_E = torch.arange(experts, device=chosen_TK.device)
        counts: list[int] = (chosen_TK.flatten()[:, None] == numbers_E).sum(0).tolist()
        return counts


class HiDreamTransformer(HiDreamImageTransformer2DModel):  # type: ignore[misc]
    """Sizes of pictures are plain numbers, so that no device has to be asked for them; of more patches than the config
    foresees it takes all."""

    def patchify(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None, list[tuple[int, int]], Tensor]:
        """Patches (B, S, D), their mask (B, S), rows and columns of each picture, and positions (B, S, 3).

        As released, only what is not square is filled up to `max_seq`, and the mask empties the keys of what was
        added without taking it out of the attention.
        """
        batch, channels, height, width = hidden_states.shape
        side = int(self.config.patch_size)
        rows, columns = height // side, width // side
        cut = hidden_states.reshape(batch, channels, rows, side, columns, side)
        patches_BSD = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
        of_rows, of_columns = (
            torch.arange(count, device=hidden_states.device, dtype=torch.float32) for count in (rows, columns)
        )
        at_S3 = torch.cartesian_prod(of_rows.new_zeros(1), of_rows, of_columns)
        mask_BS = None
        if height != width:
            added = max(0, self.max_seq - rows * columns)
            mask_BS = nn.functional.pad(patches_BSD.new_ones(batch, rows * columns), (0, added))
            patches_BSD = nn.functional.pad(patches_BSD, (0, 0, 0, added))
            at_S3 = nn.functional.pad(at_S3, (0, 0, 0, added))
        return patches_BSD, mask_BS, [(rows, columns)] * batch, at_S3.expand(batch, -1, -1)


def transformer(config: dict[str, Any]) -> HiDreamTransformer:
    model: HiDreamTransformer = HiDreamTransformer.from_config(config)
    for holder in [*model.double_stream_blocks, *model.single_stream_blocks]:
        if isinstance(holder.block.ff_i, MOEFeedForwardSwiGLU):
            holder.block.ff_i = RoutedExperts(holder.block.ff_i)
    return model
