"""Where the tensors of a model on disk lie, by diffusers' and transformers' names; no weight is read.

For tools that change weights where they are; a family itself loads them (`Family.load`).
"""

from __future__ import annotations

from pathlib import Path

from burnish.errors import ModelError
from burnish.families.latent_diffusion import Checkpoint
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import PipelineSource, shipped_configs
from burnish.families.unet_family import UNetFamily
from burnish.families.weights import Layout
from burnish.family import Family, ModelSource


def denoiser_layout(family: type[Family], path: Path, denoiser: str | None = None) -> Layout:
    """The denoiser's tensors in a diffusers folder or a single file.

    Args:
        denoiser: which of several, as diffusers spells it; the first if absent.

    Raises:
        ModelError: the weights are of another family, damaged, or of a family whose files are not known here.
    """
    source = ModelSource(str(path), denoisers=(denoiser,) if denoiser else ())
    if not family.detect(source):
        raise ModelError(f"{path} is not {family.title}.", remedy="Is it the base model of this adapter?")
    if issubclass(family, PipelineFamily):
        found = PipelineSource(source, family.slots, shipped_configs(family.name), family.title)
        return found.layout(next(slot for slot in family.denoiser_slots() if found.has(slot)))
    if issubclass(family, UNetFamily):
        return Checkpoint(source, family.layouts).unet_layout
    raise ModelError(f"Where {family.title} keeps its weights is not known here.")
