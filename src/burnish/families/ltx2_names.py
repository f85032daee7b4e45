"""Where the files of LTX-2 keep what stands beside the transformer: autoencoders, vocoder, connectors.

Lightricks' checkpoints hold all of them; ComfyUI's also come one by one, without the prefixes. Names after the release
(https://github.com/Lightricks/LTX-2, `model_configurator.py` of each part) and diffusers' own readers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from burnish.families import ltx_vae
from burnish.families.native import PREFIXES
from burnish.families.weights import Layout, below

_STATISTICS = {
    "per_channel_statistics.mean-of-means": "latents_mean",
    "per_channel_statistics.std-of-means": "latents_std",
}
_CONNECTOR_SIGN = "video_embeddings_connector.learnable_registers"
_PROJECTION = "text_embedding_projection."
_CONNECTORS = (
    ("video_embeddings_connector.", "video_connector."),
    ("audio_embeddings_connector.", "audio_connector."),
    (".transformer_1d_blocks.", ".transformer_blocks."),
    (f"{_PROJECTION}aggregate_embed.", "text_proj_in."),
    (f"{_PROJECTION}video_aggregate_embed.", "video_text_proj_in."),
    (f"{_PROJECTION}audio_aggregate_embed.", "audio_text_proj_in."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
)
_VOCODER = {
    "ups": "upsamplers",
    "resblocks": "resnets",
    "conv_pre": "conv_in",
    "conv_post": "conv_out",
}


def find_vae(layout: Layout) -> Layout | None:
    """The autoencoder of frames under diffusers' names; None if there is none."""
    if {"latents_std", "encoder.down_blocks.0.downsamplers.0.conv.conv.weight"} <= set(layout):
        return layout
    signs = {"per_channel_statistics.std-of-means", "encoder.down_blocks.1.conv.conv.weight"}
    inside = next((i for i in (layout, below(layout, "vae.")) if signs <= set(i)), None)
    return None if inside is None else ltx_vae.diffusers_names(inside)


def find_connectors(layout: Layout) -> Layout | None:
    """The connectors under diffusers' names: of the release, beside the transformer's own; None if there are none."""
    if "video_connector.transformer_blocks.0.attn1.to_q.weight" in layout:
        return layout
    inside = next((i for p in PREFIXES if _CONNECTOR_SIGN in (i := below(layout, p))), None)
    if inside is None:
        return None
    # The projection of all of Gemma's states stands at the root of the release's files.
    own = {**_projection_of(layout), **_projection_of(inside)}
    stems = ("video_embeddings_connector.", "audio_embeddings_connector.")
    own |= {name: piece for name, piece in inside.items() if name.startswith(stems)}
    return {_replaced(name, _CONNECTORS): piece for name, piece in own.items()}


def _projection_of(layout: Layout) -> Layout:
    return {name: piece for name, piece in layout.items() if name.startswith(_PROJECTION)}


def find_audio_vae(layout: Layout) -> Layout | None:
    """The autoencoder of sound under diffusers' names, which differ in the statistics; None if there is none."""
    signs = {"encoder.down.0.block.0.conv1.conv.weight", "decoder.up.0.block.0.conv1.conv.weight"}
    inside = next((i for i in (layout, below(layout, "audio_vae.")) if signs <= set(i)), None)
    return None if inside is None else {_STATISTICS.get(n, n): piece for n, piece in inside.items()}


def find_vocoder(layout: Layout) -> Layout | None:
    """LTX-2's vocoder under diffusers' names; None if there is none."""
    if {"upsamplers.0.weight", "resnets.0.convs1.0.weight"} <= set(layout):
        return layout
    signs = {"ups.0.weight", "resblocks.0.convs1.0.weight"}
    inside = next((i for i in (layout, below(layout, "vocoder.")) if signs <= set(i)), None)
    return None if inside is None else {_first_part(n, _VOCODER): piece for n, piece in inside.items()}


def _replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in pairs:
        name = name.replace(theirs, ours)
    return name


def _first_part(name: str, parts: Mapping[str, str]) -> str:
    return re.sub(r"^[^.]+", lambda match: parts.get(match[0], match[0]), name)
