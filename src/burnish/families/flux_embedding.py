"""FLUX.1's embedding of time, guidance and pooled caption, with the guidance left out on demand.

Shape letters: B batch, D width.
"""

from __future__ import annotations

from torch import Tensor, nn


class TimeGuidanceText(nn.Module):
    """In place of diffusers' CombinedTimestepGuidanceTextProjEmbeddings, with the same sub-modules.

    The transformer calls it with (time, guidance, pooled) or, when it is given no guidance, with (time, pooled).
    The second is the bypass: the embedding of an undistilled model, as trainers of FLUX.1-dev use it.
    """

    def __init__(self, released: nn.Module) -> None:
        super().__init__()
        self.time_proj = released.get_submodule("time_proj")
        self.timestep_embedder = released.get_submodule("timestep_embedder")
        self.guidance_embedder = released.get_submodule("guidance_embedder")
        self.text_embedder = released.get_submodule("text_embedder")

    def forward(
        self, timestep_B: Tensor, guidance_B_or_pooled_BD: Tensor, pooled_BD: Tensor | None = None
    ) -> Tensor:
        """Time and guidance in thousandths; the embedding has shape (B, width of the transformer)."""
        if pooled_BD is None:
            pooled_BD, guidance_B = guidance_B_or_pooled_BD, None
        else:
            guidance_B = guidance_B_or_pooled_BD
        embedded_BD: Tensor = self.timestep_embedder(self.time_proj(timestep_B).to(pooled_BD.dtype))
        if guidance_B is not None:
            embedded_BD = embedded_BD + self.guidance_embedder(self.time_proj(guidance_B).to(pooled_BD.dtype))
        text_BD: Tensor = self.text_embedder(pooled_BD)
        return embedded_BD + text_BD
