"""Which families there are: the built-in ones, and those that other packages bring.

A package adds a family with an entry point of group `burnish.families`:

    [project.entry-points."burnish.families"]
    mine = "my_package.mine:Mine"
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import cast

from burnish.errors import ModelError, UserError
from burnish.families.sources import index_file, locate, read_header, read_json, weight_files
from burnish.family import Family, ModelSource

GROUP = "burnish.families"
BUILT_IN = {
    "sd15": "burnish.families.sd15:StableDiffusion15",
    "sd2": "burnish.families.sd2:StableDiffusion2",
    "sdxl": "burnish.families.sdxl:StableDiffusionXL",
    "flux": "burnish.families.flux:Flux",
    "chroma": "burnish.families.chroma:Chroma",
    "flex1": "burnish.families.flex1:Flex1",
    "flex2": "burnish.families.flex2:Flex2",
    "flux2": "burnish.families.flux2:Flux2",
    "kolors": "burnish.families.kolors:Kolors",
    "sd3": "burnish.families.sd3:StableDiffusion3",
    "ltx": "burnish.families.ltx:LTXVideo",
    "ltx2": "burnish.families.ltx2:LTX2",
    "hunyuan_video": "burnish.families.hunyuan_video:HunyuanVideo",
    "hunyuan_video15": "burnish.families.hunyuan_video15:HunyuanVideo15",
    "hunyuan_image": "burnish.families.hunyuan_image:HunyuanImage",
    "ideogram4": "burnish.families.ideogram4:Ideogram4",
    "krea2": "burnish.families.krea2:Krea2",
    "ernie_image": "burnish.families.ernie_image:ErnieImage",
    "cogview4": "burnish.families.cogview4:CogView4",
    "omnigen2": "burnish.families.omnigen2:OmniGen2",
    "lumina2": "burnish.families.lumina2:Lumina2",
    "sana": "burnish.families.sana:Sana",
    "qwen_image": "burnish.families.qwen_image:QwenImage",
    "qwen_image_edit": "burnish.families.qwen_image_edit:QwenImageEdit",
    "qwen_image21": "burnish.families.qwen_image21:QwenImage21",
    "z_image": "burnish.families.z_image:ZImage",
    "auraflow": "burnish.families.auraflow:AuraFlow",
    "wan_vace": "burnish.families.wan_vace:WanVace",
    "wan22": "burnish.families.wan22:Wan22",
    "wan21": "burnish.families.wan21:Wan21",
    "hidream": "burnish.families.hidream:HiDream",
    "hidream_e1": "burnish.families.hidream_e1:HiDreamE1",
    "anima": "burnish.families.anima:Anima",
    "pixart": "burnish.families.pixart:PixArt",
}


@cache
def family_names() -> tuple[str, ...]:
    """Keys for `model.family`, built-in ones first; imports none of them."""
    return tuple(dict.fromkeys([*BUILT_IN, *sorted(_others())]))


def families() -> dict[str, type[Family]]:
    """Every family by name, imported."""
    return {name: family_named(name) for name in family_names()}


def family_named(name: str) -> type[Family]:
    """The family that the YAML calls `name`.

    Raises:
        UserError: there is none of this name, or another package's family cannot be imported.
    """
    target = BUILT_IN.get(name)
    if target is None and name not in _others():
        close = difflib.get_close_matches(name, family_names(), n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise UserError(f"There is no family {name!r}.", remedy=f"{hint}Known: {', '.join(family_names())}.")
    if target is not None:
        module, _, attribute = target.partition(":")
        return cast("type[Family]", getattr(importlib.import_module(module), attribute))
    entry = _others()[name]
    try:
        return cast("type[Family]", entry.load())
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The family {name!r} of the package {entry.value.split(':')[0]} cannot be imported: {error}.",
            remedy="Update or remove that package.",
        ) from error


@cache
def _others() -> dict[str, importlib.metadata.EntryPoint]:
    """Entry points of other packages; a built-in name cannot be taken over."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in BUILT_IN}


def detect_family(source: ModelSource) -> type[Family]:
    """The one family whose weights these are.

    Raises:
        ModelError: the weights cannot be found or read, or no family or more than one knows them.
    """
    local = replace(source, path=str(locate(source)))  # a Hub id is looked up once, not once per family
    matches = {name: family for name, family in families().items() if family.detect(local)}
    if len(matches) == 1:
        return next(iter(matches.values()))
    if matches:
        raise ModelError(
            f"{source.path} fits more than one family: {', '.join(matches)}.",
            remedy="Say which in the config, for example `model.family: " + next(iter(matches)) + "`.",
        )
    raise ModelError(
        f"{source.path} is of no known family. Found: {_found(local)}.",
        remedy=f"Known families: {', '.join(family_names())}.",
    )


def _found(source: ModelSource) -> str:
    """What lies at a local source, in a line."""
    path = locate(source)
    if path.is_dir():
        index = index_file(path)
        if index.is_file():
            return f"a diffusers folder of {read_json(index).get('_class_name', 'an unnamed pipeline')}"
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        has_weights = any(entry.suffix == ".safetensors" for entry in path.iterdir())
        if has_weights and (path / "config.json").is_file():
            return f"one part of a pipeline ({weight_files(path)[0].name}); give the folder above it"
        return f"a folder without model_index.json that holds {names}"
    header = read_header(path)
    tops = sorted({name.split(".")[0] for name in header})
    return f"{len(header)} tensors under {', '.join(tops[:8])}, such as {next(iter(header), 'none')}"
