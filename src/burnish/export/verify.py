"""A written adapter is read back as ComfyUI and diffusers read it, and compared with what was trained.

ComfyUI logs a key that it does not know, or a shape that does not fit, and goes on: such a file seems to work
and does less than it should. So each save is checked here. Nothing below is shared with the writer.

Sources: ComfyUI `comfy/lora.py` and `comfy/weight_adapter/lora.py` (delta = up @ down over flattened
matrices, times alpha / rank, or 1 without alpha); diffusers `loaders/lora_pipeline.py` and
`utils/peft_utils.py`. A module of the original release that stacks several of diffusers' is taken apart by its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from burnish.adapters.layer import Adaptable, adaptable_modules, weight_shape
from burnish.adapters.lora import LoraWeights
from burnish.errors import ExportError
from burnish.family import AdapterFormat, ExportKeys, NativeModule

_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_down\.weight|lora_A\.weight)|(?P<up>lora_up\.weight|lora_B\.weight)"
    r"|(?P<alpha>alpha))"
)


@dataclass(frozen=True, slots=True)
class Verification:
    """A file that reads back as trained."""

    format: AdapterFormat
    keys: int
    modules: int
    dtype: str
    max_relative_difference: float  # of a module's delta, in the Frobenius norm; rounding to `dtype` only

    def facts(self) -> dict[str, object]:
        """For status files and reports."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Read:
    """One module's adapter as a reader understands it: scale * up @ down."""

    down: Tensor
    up: Tensor
    scale: float


def verify_adapter(
    path: Path, trained: Mapping[str, LoraWeights], denoiser: nn.Module, *, part: str, keys: ExportKeys
) -> Verification:
    """Check that an adapter file reads back as trained.

    Each key belongs to a module of `denoiser`, each trained module is there, shapes fit, and the delta that a
    reader computes is the trained one within the rounding of the file's number type. What was not trained is
    exactly zero, and there only where its format needs it. `trained` is float32; `denoiser` may have adapters
    attached, its own names count.

    Raises:
        ExportError: anything of this is not so; names the keys or modules.
    """
    tensors, metadata = _read(path)
    modules = adaptable_modules(denoiser)
    format = _format(path, tensors, part, keys, modules)
    if format not in keys.formats:
        raise ExportError(
            f"{path.name} is in the {format} format, which {keys.modelspec} files are not read in"
        )
    if "lora_adapter_metadata" in metadata:
        raise ExportError(f"{path.name}: lora_adapter_metadata holds an alpha that ComfyUI does not read")

    if format == "comfy":
        natives = _natives(modules, keys)
        names = {_comfy_prefix(keys) + name: name for name in natives}
        stacks = _as_reader(path, tensors, names, folded=True)
        _check_filled(path, stacks, natives, trained, keys)
        found = _taken_apart(path, stacks, natives, trained, modules)
    else:
        names = _names(modules, format, part)
        found = _as_reader(path, tensors, names, folded=format == "diffusers")
    _expect(path, "trained but not in the file", [name for name in trained if name not in found])
    _expect(path, "in the file but not trained", [name for name in found if name not in trained])

    largest = 0.0
    wrong = []
    for name, read in found.items():
        _check_shape(path, name, read, weight_shape(modules[name]))
        difference, allowed, norm = _difference(read, trained[name])
        if not difference <= allowed:
            wrong.append(f"{name} (by {difference / norm if norm else difference:.2g})")
        largest = max(largest, difference / norm if norm else 0.0)
    _expect(path, "with another effect than was trained", wrong)
    dtypes = {str(read.down.dtype).removeprefix("torch.") for read in found.values()}
    return Verification(format, len(tensors), len(found), ", ".join(sorted(dtypes)), largest)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors, metadata = {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} does not read back: {error}") from error
    _expect(path, "no floats", [name for name, tensor in tensors.items() if not tensor.is_floating_point()])
    _expect(path, "not finite", [name for name, tensor in tensors.items() if not tensor.isfinite().all()])
    return tensors, metadata


def _format(
    path: Path,
    tensors: Mapping[str, Tensor],
    part: str,
    keys: ExportKeys,
    modules: Mapping[str, Adaptable],
) -> AdapterFormat:
    plain, comfy = _diffusers_prefix(part), _comfy_prefix(keys) if "comfy" in keys.formats else None
    flat = [key for key in tensors if key.startswith("lora_unet_")]
    dotted = [key for key in tensors if key.startswith(plain)]
    native = [key for key in tensors if comfy is not None and key.startswith(comfy)]
    _expect(path, "that no reader knows", [key for key in tensors if key not in {*flat, *dotted, *native}])
    if not tensors:
        raise ExportError(f"{path.name} holds no tensors")
    if comfy == plain and dotted:
        # The same prefix for both, so that the names tell which it is.
        known = {plain + name for name in modules}
        dotted = [key for key in dotted if key.rpartition(".lora_")[0] in known]
        native = [key for key in native if key not in dotted]
    kinds: dict[AdapterFormat, list[str]] = {"kohya": flat, "diffusers": dotted, "comfy": native}
    present: list[AdapterFormat] = [format for format, found in kinds.items() if found]
    if len(present) > 1:
        raise ExportError(
            f"{path.name} mixes two spellings, {kinds[present[0]][0]} and {kinds[present[1]][0]}"
        )
    return present[0]


def _diffusers_prefix(part: str) -> str:
    """A second denoiser, `transformer_2`, is loaded from keys of `transformer.` as well."""
    return "unet." if part == "unet" else "transformer."


def _comfy_prefix(keys: ExportKeys) -> str:
    return keys.prefix.get("comfy", "diffusion_model.")


def _names(modules: Iterable[str], format: AdapterFormat, part: str) -> dict[str, str]:
    """Prefix of a key -> module, as both readers look it up."""
    if format == "diffusers":
        return {f"{_diffusers_prefix(part)}{name}": name for name in modules}
    names: dict[str, str] = {}
    for name in modules:
        flat = "lora_unet_" + name.replace(".", "_")
        if flat in names:
            raise ExportError(f"{flat} would mean both {names[flat]} and {name}")
        names[flat] = name
    return names


def _natives(modules: Iterable[str], keys: ExportKeys) -> dict[str, NativeModule]:
    """The modules of the original release, by name, as far as all they hold can be trained."""
    if keys.native is None:
        return {name: NativeModule(name, (name,)) for name in modules}
    known = set(modules)
    return {native.name: native for native in map(keys.native, known) if known.issuperset(native.holds)}


def _as_reader(
    path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str], *, folded: bool
) -> dict[str, _Read]:
    """Each module's adapter; `folded` where readers expect a scale of 1 and no alpha."""
    pieces: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        name = names.get(match["module"]) if match else None
        if match is None or name is None or match.lastgroup is None:
            unknown.append(key)
        else:
            pieces.setdefault(name, {})[match.lastgroup] = tensor
    _expect(path, "that belong to no module of the model", unknown)
    _expect(
        path,
        "without both matrices",
        [name for name, one in pieces.items() if not {"down", "up"} <= set(one)],
    )
    with_alpha = [name for name, one in pieces.items() if "alpha" in one]
    if folded:
        _expect(path, "with an alpha key, for which diffusers refuses the file", with_alpha)
    alphas = {one["alpha"].item() for one in pieces.values() if "alpha" in one}
    if with_alpha:
        _expect(path, "whose alpha is missing", [name for name in pieces if name not in with_alpha])
    if len(alphas) > 1:
        raise ExportError(f"{path.name} has more than one alpha ({sorted(alphas)}); diffusers mixes them up")
    return {
        name: _Read(
            one["down"],
            one["up"],
            one["alpha"].item() / one["down"].shape[0] if "alpha" in one else 1.0,
        )
        for name, one in pieces.items()
    }


def _taken_apart(
    path: Path,
    stacks: Mapping[str, _Read],
    natives: Mapping[str, NativeModule],
    trained: Mapping[str, LoraWeights],
    modules: Mapping[str, Adaptable],
) -> dict[str, _Read]:
    """The adapters of diffusers' trained modules; whatever is beside them in a stack must be exactly zero."""
    found = {}
    stray = []
    for name, stack in stacks.items():
        up, inner = stack.up, 0
        if natives[name].halves_swapped:
            half = up.shape[0] // 2
            up = torch.cat([up[half:], up[:half]])
        shapes = [weight_shape(modules[part]) for part in natives[name].holds]
        heights = [shape[0] for shape in shapes]
        ranks = [trained[part].rank if part in trained else 0 for part in natives[name].holds]
        total, rank = sum(heights), sum(ranks) or stack.up.shape[1]
        if up.shape[0] != total or tuple(stack.down.shape) != (rank, *shapes[0][1:]):
            raise ExportError(
                f"{path.name}: {name} has matrices {tuple(stack.down.shape)} and {tuple(stack.up.shape)}; "
                f"{(rank, *shapes[0][1:])} and {(total, rank)} were expected"
            )
        for part, rank, rows in zip(natives[name].holds, ranks, torch.split(up, heights), strict=True):
            own = slice(inner, inner + rank)
            if torch.cat([rows[:, :inner], rows[:, inner + rank :]], dim=1).count_nonzero():
                stray.append(part)
            if rank:
                found[part] = _Read(stack.down[own], rows[:, own], stack.scale)
            inner += rank
    _expect(path, "affected by what was trained for others, or not at all", stray)
    return found


def _check_filled(
    path: Path,
    stacks: Mapping[str, _Read],
    natives: Mapping[str, NativeModule],
    trained: Mapping[str, LoraWeights],
    keys: ExportKeys,
) -> None:
    """Modules without any trained part are there where a reader needs them, and only there."""
    needed = {
        name
        for name, native in natives.items()
        if any(fnmatchcase(part, pattern) for part in native.holds for pattern in keys.complete)
    }
    empty = {name for name in stacks if not any(part in trained for part in natives[name].holds)}
    _expect(path, "needed by readers but not in the file", sorted(needed - set(stacks)))
    _expect(path, "in the file but neither trained nor needed", sorted(empty - needed))


def _check_shape(path: Path, name: str, read: _Read, weight: tuple[int, ...]) -> None:
    """(rank, in, *kernel) and (out, rank, 1, ...) for a weight (out, in, *kernel)."""
    rank = read.down.shape[0]
    down, up = (rank, *weight[1:]), (weight[0], rank, *(1 for _ in weight[2:]))
    if (tuple(read.down.shape), tuple(read.up.shape)) != (down, up):
        raise ExportError(
            f"{path.name}: {name} has matrices {tuple(read.down.shape)} and {tuple(read.up.shape)}; "
            f"the model's weight {weight} needs {down} and {up}"
        )


def _difference(read: _Read, trained: LoraWeights) -> tuple[float, float, float]:
    """Norm of (read delta - trained delta), the norm that rounding explains, and that of the trained delta.

    All without the deltas themselves, which are as large as the model: the difference is again a product of
    thin factors, (up' - up) down' + up (down' - down), written so that nothing large cancels. Rounding to a
    type with unit roundoff u moves each factor's entries by up to u, independently, so that the product moves
    by about u * sqrt(2 sum_k |up_k|^2 |down_k|^2); 3 in place of sqrt(2) leaves room, and the delta's own norm
    covers factors whose entries all round alike.
    """
    read_up, read_down = read.scale * read.up.double().flatten(1), read.down.double().flatten(1)
    up, down = trained.scale * trained.up.double().flatten(1), trained.down.double().flatten(1)
    if read_up.shape != up.shape or read_down.shape != down.shape:
        return float("inf"), 0.0, 0.0
    difference = _product_norm(
        torch.cat([read_up - up, up], dim=1), torch.cat([read_down, read_down - down], dim=0)
    )
    norm = _product_norm(up, down)

    info = torch.finfo(read.down.dtype)
    independent = float((up.square().sum(0) * down.square().sum(1)).sum().sqrt())
    rounding = 3 * max(info.eps / 2, 1e-7) * max(independent, norm)
    # Below the smallest normal number the error is absolute: half of the smallest step.
    step = info.smallest_normal * info.eps / 2 * max(1.0, trained.scale, abs(read.scale))
    underflow = step * float(up.numel() ** 0.5 * down.norm() + down.numel() ** 0.5 * up.norm())
    return difference, rounding + underflow, norm


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of left @ right, from the small Gram matrices of both."""
    squared = ((left.T @ left) * (right @ right.T)).sum()
    return float(squared.clamp(min=0).sqrt())


def _expect(path: Path, what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ExportError(
            f"{path.name} does not read back as trained; {len(names)} {what}: {shown}",
            remedy="The file must not be used. The checkpoint beside it is not affected.",
        )
