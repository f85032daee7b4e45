"""An adapter of the difference between two checkpoints of one model.

Layer by layer: the difference of a weight is decomposed and let go before the next is read. The number type of the
files matters: what training changed by less than a rounding step is not in the difference.

LoKr is the nearest Kronecker product in the Frobenius norm: with the difference rearranged so that a product a x b
becomes the outer product of a and b, the leading pair of singular vectors (Van Loan, Pitsianis 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from burnish.adapters.deltas import split_width
from burnish.errors import ModelError, UserError
from burnish.export_keys import NativeModule
from burnish.families.registry import detect_family, family_named
from burnish.family import ModelSource
from burnish.toolbox.base import Base
from burnish.toolbox.check import reads_back
from burnish.toolbox.convert import Outcome
from burnish.toolbox.low_rank import Factored, RankChoice, factored
from burnish.toolbox.models import Model, model_of_family
from burnish.toolbox.pieces import ModuleAdapter
from burnish.toolbox.readers import who_reads
from burnish.toolbox.regroup import Targeted
from burnish.toolbox.stream import refuse_existing
from burnish.toolbox.writing import AdapterWriter, chosen_format, same_name

Kind = Literal["lora", "locon", "lokr"]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Extraction:
    """What is made of a difference.

    Args:
        rank: of linear layers and convolutions of 1x1.
        conv_rank: of larger convolutions, with `locon` and `lokr`.
        factor: of LoKr, the size of the smaller matrix; -1 for about the root.
        least: modules whose difference is smaller than this, beside their weight, are left out.
        biases: differences of biases and norms are written as they are, which ComfyUI alone reads.
    """

    kind: Kind = "lora"
    rank: RankChoice = field(default_factory=lambda: RankChoice(rank=32))
    conv_rank: RankChoice | None = None
    factor: int = -1
    least: float = 0.0
    biases: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(
                f"there is no kind {self.kind!r}", remedy=f"Give --kind {', '.join(get_args(Kind))}."
            )

    def takes(self, shape: tuple[int, ...]) -> bool:
        return self.kind != "lora" or prod(shape[2:]) == 1

    def choice(self, shape: tuple[int, ...]) -> RankChoice:
        return self.rank if prod(shape[2:]) == 1 or self.conv_rank is None else self.conv_rank


@dataclass
class _LeftOut:
    """Differences that the adapter does not hold."""

    squared: float = 0.0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, difference: Tensor) -> None:
        self.squared += float(difference.double().square().sum())
        self.names.append(name)


def extract(
    base_path: Path,
    tuned_path: Path,
    path: Path,
    wanted: Extraction,
    *,
    family: str | None = None,
    denoiser: str | None = None,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress = lambda count: None,
) -> Outcome:
    """Write what `tuned` has that `base` has not.

    Raises:
        ModelError: the two are not of one model.
        UserError: there is no difference, or `path` exists.
    """
    refuse_existing(path, force=force)
    kind = family_named(family) if family else detect_family(ModelSource(str(base_path)))
    model = model_of_family(kind)
    with Base(base_path, kind, denoiser) as base, Base(tuned_path, kind, denoiser) as tuned:
        _refuse_strangers(base, tuned)
        if wanted.biases and model.keys.default == "diffusers" and format in ("auto", "diffusers"):
            raise UserError(
                "files in the diffusers format hold no differences of biases",
                remedy="Add --format comfy, or leave --biases out.",
            )
        chosen = chosen_format(format, model, ())
        modules = _modules(model, base, wanted, model.keys.unreadable.get(chosen, ()))
        outcome, left_out = Outcome(path, chosen), _LeftOut()
        with AdapterWriter(
            path, model, chosen, dtype=dtype or torch.float16, alpha=float(wanted.rank.rank or 1)
        ) as writer:
            for native, parts in _by_native(model, base, modules).items():
                _extract_group(writer, native, parts, base, tuned, wanted, outcome, progress)
            for name in sorted(set(base.layout) - {f"{module}.weight" for module in modules}):
                _compare(writer, name, base, tuned, left_out, biases=wanted.biases)
                progress(base.nbytes(name) + tuned.nbytes(name))
            if not outcome.modules:
                raise UserError(
                    f"{tuned_path} does not differ from {base_path} in any layer that takes an adapter"
                )
            writer.complete(_released(model, base))
            network = "lycoris.kohya" if wanted.kind == "lokr" else "networks.lora"
            outcome.tensors = writer.finish({"ss_sd_model_name": base_path.name}, network)
            outcome.readers = who_reads(model.keys, chosen, writer.kinds)
    reads_back(path, model).file.close()
    _tell(outcome, left_out)
    return outcome


def _refuse_strangers(base: Base, tuned: Base) -> None:
    missing = sorted(base.layout.keys() ^ tuned.layout.keys())
    # Buffers of positions and the like come and go between releases of libraries.
    weights = [name for name in missing if name.endswith(".weight")]
    if weights:
        raise ModelError(
            f"{len(weights)} weights are in only one of {base.path} and {tuned.path}, such as {weights[0]}",
            remedy="Both must be of the same model.",
        )
    differing = [
        n for n in base.layout if n in tuned.layout and base.layout[n].shape != tuned.layout[n].shape
    ]
    if differing:
        name = differing[0]
        raise ModelError(
            f"{len(differing)} weights differ in shape: {name} is {base.layout[name].shape} in {base.path} and "
            f"{tuned.layout[name].shape} in {tuned.path}",
            remedy="Both must be of the same model; an inpainting model has a larger first layer.",
        )


def _modules(model: Model, base: Base, wanted: Extraction, unreadable: Sequence[str]) -> list[str]:
    """Those that get an adapter; what else differs is told."""
    names = [name.removesuffix(".weight") for name in base.layout if name.endswith(".weight")]
    return [
        name
        for name in names
        if model.takes(name)
        and wanted.takes(base.shape(name))
        and not any(fnmatchcase(name, pattern) for pattern in unreadable)
    ]


def _by_native(model: Model, base: Base, modules: list[str]) -> dict[NativeModule, list[str]]:
    found: dict[NativeModule, list[str]] = {}
    for module in modules:
        found.setdefault(model.native(module), []).append(module)
    return found


def _extract_group(
    writer: AdapterWriter,
    native: NativeModule,
    parts: list[str],
    base: Base,
    tuned: Base,
    wanted: Extraction,
    outcome: Outcome,
    progress: Progress,
) -> None:
    # A Kronecker product cannot be put together of those of parts, nor taken apart.
    whole = (
        wanted.kind == "lokr"
        and writer.model.keys.by_release(writer.format)
        and len(parts) == len(native.holds)
    )
    targets = [native] if whole else [NativeModule(part, (part,)) for part in parts]
    made: list[Targeted] = []
    for target in targets:
        difference = _difference(target, base, tuned, wanted.least)
        progress(sum(one.nbytes(f"{part}.weight") for part in target.holds for one in (base, tuned)))
        if difference is None:
            continue
        outcome.modules += 1
        if wanted.kind == "lokr":
            spelled = same_name(writer.model, target, writer.format)
            if spelled is None:
                raise UserError(f"{target.name} has no module of its own in the {writer.format} format")
            adapter, found = _kronecker(difference, wanted)
            writer.raw(spelled, adapter)
        else:
            shape = base.target_shape(target)
            found = factored(difference.flatten(1), wanted.choice(shape))
            made.append((target, found.as_weights(shape)))
        outcome.losses.add(target.name, found)
    if made:
        for spelled, weights in writer.group(native, made).items():
            writer.lora(spelled, weights)


def _difference(target: NativeModule, base: Base, tuned: Base, least: float) -> Tensor | None:
    """None where it is nothing, or too little beside the weight."""
    parts = []
    for part in target.holds:
        one = torch.zeros(base.shape(part))
        tuned.add_to(one, f"{part}.weight", 1.0)
        base.add_to(one, f"{part}.weight", -1.0)
        parts.append(one)
    difference = parts[0] if len(parts) == 1 else torch.cat(parts)
    difference = torch.cat(difference.chunk(2)[::-1]) if target.halves_swapped else difference
    change = float(difference.norm())
    little = least * float(base.weight(target).norm()) if least else 0.0
    return None if change <= little else difference


def _kronecker(difference: Tensor, wanted: Extraction) -> tuple[ModuleAdapter, Factored]:
    """The nearest product of a small and a larger matrix."""
    rows, columns = difference.shape[:2]
    kernel = difference.shape[2:]
    (o1, o2), (i1, i2) = split_width(rows, wanted.factor), split_width(columns, wanted.factor)
    inner = i2 * prod(kernel)
    arranged = (
        difference.flatten(1).reshape(o1, o2, i1, inner).permute(0, 2, 1, 3).reshape(o1 * i1, o2 * inner)
    )
    found = factored(arranged, RankChoice(rank=1))
    pieces = {
        "lokr_w1": found.up.reshape(o1, i1),
        "lokr_w2": found.down.reshape(o2, i2, *kernel),
    }
    return ModuleAdapter("lokr", pieces, tuple(difference.shape), alpha=1.0), found


def _compare(
    writer: AdapterWriter, name: str, base: Base, tuned: Base, left_out: _LeftOut, *, biases: bool
) -> None:
    """Biases, norms and what else takes no adapter of this kind: written as they are, or told."""
    if name not in tuned.layout:
        return
    difference = tuned.read(name) - base.read(name)
    if not difference.count_nonzero():
        return
    module, _, kind = name.rpartition(".")
    spelled = same_name(writer.model, NativeModule(module, (module,)), writer.format) if module else None
    if biases and spelled is not None and kind in ("weight", "bias") and difference.dim() == 1:
        writer.piece(spelled, "diff" if kind == "weight" else "diff_b", difference)
    else:
        left_out.add(name, difference)


def _released(model: Model, base: Base) -> bool:
    shapes = {name: base.layout.get(f"{name}.weight") for name in model.shapes}
    return all(piece is not None and piece.shape == model.shapes[name] for name, piece in shapes.items())


def _tell(outcome: Outcome, left_out: _LeftOut) -> None:
    if left_out.names:
        share = (left_out.squared / (left_out.squared + outcome.losses.squared_norm)) ** 0.5
        shown = ", ".join(left_out.names[:3])
        outcome.notes.append(
            f"{len(left_out.names)} tensors changed that this adapter does not hold ({shown} ...): {share:.1%} of the "
            "difference, in the Frobenius norm"
        )
