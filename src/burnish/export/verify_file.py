"""The file as a reader opens it: tensors, which format it is in, what stands before a module's name.

Shares nothing with the writer. Sources: ComfyUI `comfy/lora.py`, diffusers `loaders/lora_pipeline.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from burnish.adapters.layer import Adaptable
from burnish.errors import ExportError
from burnish.export.verify_kinds import FileKind
from burnish.export_keys import AdapterFormat, ExportKeys, NativeModule

LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_down\.weight|lora_A\.weight)|(?P<up>lora_up\.weight|lora_B\.weight)"
    r"|(?P<alpha>alpha))"
)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors, metadata = {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} does not read back: {error}") from error
    expect(path, "no floats", [name for name, tensor in tensors.items() if not tensor.is_floating_point()])
    expect(path, "not finite", [name for name, tensor in tensors.items() if not tensor.isfinite().all()])
    return tensors, metadata


def format_of(
    path: Path,
    tensors: Mapping[str, Tensor],
    part: str,
    keys: ExportKeys,
    modules: Mapping[str, Adaptable],
    kind: FileKind,
) -> AdapterFormat:
    if kind == "lokr" and set(map(module_start, tensors)) <= set(lokr_names(modules, keys)):
        return "diffusers"
    plain, comfy = diffusers_prefix(part), comfy_prefix(keys) if "comfy" in keys.formats else None
    flat = [key for key in tensors if key.startswith("lora_unet_")]
    dotted = [key for key in tensors if key.startswith(plain)]
    native = [key for key in tensors if comfy is not None and key.startswith(comfy)]
    expect(path, "that no reader knows", [key for key in tensors if key not in {*flat, *dotted, *native}])
    if not tensors:
        raise ExportError(f"{path.name} holds no tensors")
    if comfy == plain and dotted:
        # The same prefix for both, so that the names tell which it is.
        known = {plain + name for name in modules}
        dotted = [key for key in dotted if module_start(key) in known]
        native = [key for key in native if key not in dotted]
    kinds: dict[AdapterFormat, list[str]] = {"kohya": flat, "diffusers": dotted, "comfy": native}
    present: list[AdapterFormat] = [format for format, found in kinds.items() if found]
    if len(present) > 1:
        raise ExportError(
            f"{path.name} mixes two spellings, {kinds[present[0]][0]} and {kinds[present[1]][0]}"
        )
    return present[0]


def module_start(key: str) -> str:
    """What stands before a key's ending."""
    match = LORA_KEY.fullmatch(key)
    return match["module"] if match else key.rpartition(".")[0]


def lokr_names(modules: Iterable[str], keys: ExportKeys) -> dict[str, str]:
    """What stands before the endings of a LoKr that diffusers reads, where it does -> module."""
    if keys.lokr is None:
        return {}
    flat = keys.lokr.endswith("_")
    return {keys.lokr + (name.replace(".", "_") if flat else name): name for name in modules}


def diffusers_prefix(part: str) -> str:
    """A second denoiser, `transformer_2`, is loaded from keys of `transformer.` as well."""
    return "unet." if part == "unet" else "transformer."


def comfy_prefix(keys: ExportKeys) -> str:
    return keys.prefix.get("comfy", "diffusion_model.")


def names_of(
    modules: Iterable[str], format: AdapterFormat, part: str, keys: ExportKeys, kind: FileKind = "lora"
) -> dict[str, str]:
    """What stands before a key's ending -> module, or module of the release, as readers look it up."""
    if format == "comfy":
        return {comfy_prefix(keys) + name: name for name in modules}
    if kind == "lokr" and format == "diffusers" and keys.lokr is not None:
        return lokr_names(modules, keys)
    if format == "diffusers":
        return {f"{diffusers_prefix(part)}{name}": name for name in modules}
    names: dict[str, str] = {}
    for name in modules:
        flat = "lora_unet_" + name.replace(".", "_")
        if flat in names:
            raise ExportError(f"{flat} would mean both {names[flat]} and {name}")
        names[flat] = name
    return names


def natives_of(modules: Iterable[str], keys: ExportKeys) -> dict[str, NativeModule]:
    """The modules of the original release, by name, as far as all they hold can be trained."""
    if keys.native is None:
        return {name: NativeModule(name, (name,)) for name in modules}
    known = set(modules)
    return {native.name: native for native in map(keys.native, known) if known.issuperset(native.holds)}


def expect(path: Path, what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ExportError(
            f"{path.name} does not read back as trained; {len(names)} {what}: {shown}",
            remedy="The file must not be used. The checkpoint beside it is not affected.",
        )
