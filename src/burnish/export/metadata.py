"""What an adapter file says about itself.

`modelspec.*` is https://github.com/Stability-AI/ModelSpec 1.0.1, read by model browsers. `ss_*` are the names
that kohya's sd-scripts gave them; A1111 and Forge decide by `ss_base_model_version` whether they list a file,
and the resize and merge tools need `ss_network_*`. All values are strings.

`ss_sd_model_name` tells only the last part of the base model's path. `burnish.config` tells more: it is the whole
resolved config, with the full paths of pictures, model and caches, the prompts, and what stood for each `${VAR}`.
Whoever publishes an adapter publishes these too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import PurePath

from burnish import __version__
from burnish.adapters.layer import AdapterWeights
from burnish.adapters.lora import LoraWeights
from burnish.export.kinds import one_kind
from burnish.export_keys import ExportKeys

AVERAGE = "burnish.average"  # JSON: width and updates of a power-function average, and the run's step
PART = "burnish.part"  # where a model has several denoisers, a file is for one of them
TAG_LIMIT = (
    2000  # per source; the header of a file with a caption for every picture would outgrow its weights
)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an adapter comes from, as far as its file should say."""

    name: str  # of the run; A1111 offers it as alias
    base_model: str  # path or Hub id; only its last part is written
    resolution: tuple[int, int]  # height and width in pixels
    step: int
    epoch: int
    seed: int
    config: str  # the resolved config, YAML or JSON text
    part: str | None = None  # the denoiser it is for, as diffusers spells it
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # source -> tag -> count
    trigger: str | None = None
    when: datetime | None = None  # of the save; now if absent


def adapter_metadata(
    keys: ExportKeys, weights: Mapping[str, AdapterWeights], provenance: Provenance
) -> dict[str, str]:
    """The metadata of an adapter file; hashes of its tensors are added when it is written."""
    height, width = provenance.resolution
    when = (provenance.when or datetime.now(UTC)).astimezone(UTC)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{keys.modelspec}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": provenance.name,
        "modelspec.date": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.resolution": f"{width}x{height}",
        **_network(weights),
        "ss_base_model_version": keys.base_model_version,
        "ss_v2": str(keys.base_model_version.startswith("sd_v2")),
        "ss_sd_model_name": PurePath(provenance.base_model.rstrip("/\\").replace("\\", "/")).name,
        "ss_output_name": provenance.name,
        "ss_resolution": f"({width}, {height})",
        "ss_steps": str(provenance.step),
        "ss_epoch": str(provenance.epoch),
        "ss_seed": str(provenance.seed),
        "ss_tag_frequency": json.dumps(_most_frequent(provenance.tag_frequency), ensure_ascii=False),
        "burnish.version": __version__,
        "burnish.config": provenance.config,
    }
    if provenance.part:
        metadata[PART] = provenance.part
    if provenance.trigger:
        metadata["modelspec.trigger_phrase"] = provenance.trigger
    return metadata


def word_metadata(keys: ExportKeys, provenance: Provenance, word: str) -> dict[str, str]:
    """The metadata of a new word's file."""
    about = model_metadata(keys, replace(provenance, part=None, trigger=word))
    return {**about, "modelspec.architecture": f"{keys.modelspec}/textual-inversion"}


def vae_metadata(keys: ExportKeys, provenance: Provenance) -> dict[str, str]:
    """The metadata of a VAE's file."""
    about = model_metadata(keys, replace(provenance, part=None, trigger=None))
    return {**about, "modelspec.architecture": f"{keys.modelspec}/vae"}


def model_metadata(keys: ExportKeys, provenance: Provenance) -> dict[str, str]:
    """The metadata of a whole denoiser's single file."""
    height, width = provenance.resolution
    when = (provenance.when or datetime.now(UTC)).astimezone(UTC)
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": keys.modelspec,
        "modelspec.implementation": "diffusers",
        "modelspec.title": provenance.name,
        "modelspec.date": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.resolution": f"{width}x{height}",
        "burnish.version": __version__,
        "burnish.step": str(provenance.step),
        "burnish.config": provenance.config,
    }
    if provenance.part:
        metadata[PART] = provenance.part
    if provenance.trigger:
        metadata["modelspec.trigger_phrase"] = provenance.trigger
    return metadata


def file_hashes(serialised: bytes) -> dict[str, str]:
    """The hashes by which A1111 recognises an adapter whose metadata was edited.

    `serialised` is a safetensors file of the tensors that holds the `ss_*` metadata only. `sshs_model_hash`
    is the SHA-256 of what follows the header, `sshs_legacy_hash` the first 8 digits of the SHA-256 of the
    64 KiB that begin at 1 MiB.

    Source: `precalculate_safetensors_hashes` in kohya-ss/sd-scripts, library/train_util.py.
    """
    view = memoryview(serialised)
    payload = view[8 + int.from_bytes(view[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(payload).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(view[0x100000:0x110000]).hexdigest()[:8],
    }


def _network(weights: Mapping[str, AdapterWeights]) -> dict[str, str]:
    """What sd-scripts calls the kind; `ss_network_dim` and `_alpha`, "Dynamic" where modules differ, as its resize
    tool writes it. LyCORIS' kinds name their algorithm instead."""
    kind = one_kind(weights)
    if kind not in ("lora", "dora"):
        told = {"algo": {"oft": "diag-oft", "dokr": "lokr"}.get(kind, kind)}
        told |= {"dora_wd": "True"} if kind == "dokr" else {}
        return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(told)}
    loras = [one.untuckered() for one in weights.values() if isinstance(one, LoraWeights)]
    described = {"ss_network_module": "networks.lora"} | _ranks(loras)
    if kind == "dora":
        args = json.loads(described.get("ss_network_args", "{}"))
        described["ss_network_args"] = json.dumps({**args, "dora_wd": "True"})
    return described


def _ranks(weights: list[LoraWeights]) -> dict[str, str]:
    linear = [one for one in weights if one.down.dim() == 2 or one.down[0, 0].numel() == 1]
    convolutions = [one for one in weights if one.down.dim() > 2 and one.down[0, 0].numel() > 1]
    first = linear or convolutions
    described = {"ss_network_dim": _one_rank(first), "ss_network_alpha": _one_alpha(first)}
    if linear and convolutions:
        extra = {"conv_dim": _one_rank(convolutions), "conv_alpha": _one_alpha(convolutions)}
        described["ss_network_args"] = json.dumps(extra)
    return described


def _one_rank(weights: list[LoraWeights]) -> str:
    ranks = {one.rank for one in weights}
    return str(ranks.pop()) if len(ranks) == 1 else "Dynamic"


def _one_alpha(weights: list[LoraWeights]) -> str:
    alphas = {one.alpha for one in weights}
    return f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic"


def _most_frequent(tags: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    return {
        source: dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TAG_LIMIT])
        for source, counts in tags.items()
    }
