"""What readers make of the tensors of each kind, and how far that is from what was trained.

Shares nothing with the writer. Sources: ComfyUI `comfy/weight_adapter/{loha,lokr,oft,boft,base}.py`; LyCORIS'
`make_module_from_state_dict`, which wants an alpha in every module; diffusers `_bake_lokr_alpha_`. Each `*_difference`
gives (difference, what rounding of the file explains, norm of what was trained), of the delta or what stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from burnish.adapters.layer import AdapterWeights
from burnish.adapters.loha import LohaWeights
from burnish.adapters.lokr import LokrWeights
from burnish.adapters.oft import OftWeights

FileKind = Literal["lora", "dora", "loha", "lokr", "dokr", "oft"]
Difference = tuple[float, float, float]
_UNLIKE = (math.inf, 0.0, 0.0)
_ROWS = 2048  # of a delta at a time

LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def kind_in(tensors: Mapping[str, Tensor]) -> FileKind:
    """What a file holds, by the endings of its keys."""
    endings = {key.rpartition(".")[2] for key in tensors}
    if endings & LOHA:
        return "loha"
    lengths = endings & {"dora_scale", "lora_magnitude_vector", "lokr_magnitude_vector"}
    if any(ending.startswith("lokr_") for ending in endings):
        return "dokr" if lengths else "lokr"
    if "oft_blocks" in endings:
        return "oft"
    return "dora" if lengths else "lora"


def wrong_pieces(kind: FileKind, pieces: Mapping[str, Tensor]) -> str | None:
    """Why a reader could not use the tensors of one module, by the end of their keys; None where it can."""
    names = set(pieces) - {"alpha"}
    if "alpha" not in pieces:
        return "whose alpha is missing"
    match kind:
        case "loha":
            complete = names == LOHA
        case "oft":
            complete = (
                names == {"oft_blocks"} and pieces["alpha"].item() == 0
            )  # another alpha limits the turn
        case _:
            first = names & {"lokr_w1", "lokr_w1_a", "lokr_w1_b"}
            second = names - first
            complete = first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}) and second in (
                {"lokr_w2"},
                {"lokr_w2_a", "lokr_w2_b"},  # no core: ComfyUI's code fails at what it makes with one
            )
    return None if complete else "without all of their tensors, or with others"


def unswapped(kind: FileKind, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a module whose outputs the release has with their halves the other way round, in diffusers' order."""
    by_output = ("hada_w1_a", "hada_w2_a") if kind == "loha" else ("oft_blocks",)
    return {
        name: torch.cat(piece.chunk(2)[::-1]) if name in by_output else piece
        for name, piece in pieces.items()
    }


def difference(
    kind: FileKind, pieces: Mapping[str, Tensor], trained: AdapterWeights, rows: slice | None = None
) -> Difference:
    """Of one module; `rows` are its outputs within what was read, where the release keeps several layers in one."""
    match trained:
        case LohaWeights() if kind == "loha":
            return _loha_difference(pieces, trained, rows)
        case LokrWeights() if kind in ("lokr", "dokr") and rows is None:
            return _lokr_difference(pieces, trained)
        case OftWeights() if kind == "oft":
            return _oft_difference(pieces["oft_blocks"], trained.blocks, rows)
    return _UNLIKE


def is_idle(kind: FileKind, pieces: Mapping[str, Tensor], rows: slice) -> bool:
    """Whether it does nothing at all to these outputs."""
    if kind == "loha":
        return not (_product(pieces, 1)[rows] * _product(pieces, 2)[rows]).any()
    blocks = pieces["oft_blocks"]
    own = _blocks_of(blocks, rows)
    return own is not None and not (own - own.mT).any()


def _loha_difference(pieces: Mapping[str, Tensor], trained: LohaWeights, rows: slice | None) -> Difference:
    scale = pieces["alpha"].item() / pieces["hada_w1_b"].shape[0]
    own = slice(0, trained.shape[0]) if rows is None else rows
    count = math.prod(trained.shape[1:])
    try:
        read = [_product(pieces, number)[own] for number in (1, 2)]
        noise = [_rounding(pieces, number)[own] for number in (1, 2)]
    except RuntimeError:  # factors that do not fit each other
        return _UNLIKE
    expected = trained.delta().double().reshape(trained.shape[0], -1)
    if read[0].shape != (trained.shape[0], count) or read[1].shape != read[0].shape:
        return _UNLIKE
    off = allowed = norm = 0.0
    for first in range(0, len(expected), _ROWS):
        part = slice(first, first + _ROWS)
        one, two = read[0][part].double(), read[1][part].double()
        off += float((scale * one * two - expected[part]).square().sum())
        allowed += float(((noise[0][part] * two) ** 2 + (one * noise[1][part]) ** 2).sum()) * scale**2
        norm += float(expected[part].square().sum())
    return off**0.5, 3 * allowed**0.5 + 1e-6 * norm**0.5 + 1e-30, norm**0.5


def _product(pieces: Mapping[str, Tensor], number: int) -> Tensor:
    """(out, in * kernel volume) of one of the two products, as a reader multiplies it."""
    return pieces[f"hada_w{number}_a"].float() @ pieces[f"hada_w{number}_b"].float()


def _rounding(pieces: Mapping[str, Tensor], number: int) -> Tensor:
    """How far each entry of that product may be off, as its factors were rounded independently."""
    squares = {name: piece.float() ** 2 for name, piece in pieces.items() if name != "alpha"}
    return (2 * _product(squares, number)).sqrt() * _unit(pieces[f"hada_w{number}_a"])


def _lokr_difference(pieces: Mapping[str, Tensor], trained: LokrWeights) -> Difference:
    """Of Kronecker products, from their factors: |A x B|^2 = |A|^2 |B|^2, and so on for what is between two."""
    thin = pieces.get("lokr_w2_b", pieces.get("lokr_w1_b"))
    scale = 1.0 if thin is None else pieces["alpha"].item() / thin.shape[0]
    found = [_lokr_factor(pieces, number) for number in (1, 2)]
    expected = [one.double() for one in trained.factors()]
    if any(one is None or one.shape != two.shape for one, two in zip(found, expected, strict=True)):
        return _UNLIKE
    first, second = (one for one in found if one is not None)
    first, expected[0] = first * scale, expected[0] * trained.scale
    off = [first - expected[0], second - expected[1]]
    squared = (
        off[0].square().sum() * second.square().sum()
        + 2 * (off[0] * expected[0]).sum() * (off[1] * second).sum()
        + expected[0].square().sum() * off[1].square().sum()
    )
    norm = float(expected[0].norm() * expected[1].norm())
    noise = [_lokr_noise(pieces, number) for number in (1, 2)]
    allowed = 3 * (abs(scale) * noise[0] * float(second.norm()) + float(first.norm()) * noise[1])
    return float(squared.clamp(min=0).sqrt()), allowed + 1e-6 * norm + 1e-30, norm


def _lokr_factor(pieces: Mapping[str, Tensor], number: int) -> Tensor | None:
    """(rows, columns * kernel volume) as a reader makes it; None where it cannot."""
    whole = pieces.get(f"lokr_w{number}")
    made: Tensor
    if whole is not None:
        made = whole.double().flatten(1)
        return made
    a, b = pieces[f"lokr_w{number}_a"].double(), pieces[f"lokr_w{number}_b"].double()
    if a.shape[-1] != b.shape[0]:
        return None
    made = a @ b
    return made


def _lokr_noise(pieces: Mapping[str, Tensor], number: int) -> float:
    """How far rounding may move that factor, in its norm."""
    squares = {name: piece.double() ** 2 for name, piece in pieces.items() if name != "alpha"}
    made = _lokr_factor(squares, number)
    any_piece = next(piece for name, piece in pieces.items() if name.startswith(f"lokr_w{number}"))
    return 0.0 if made is None else float(2 * made.sum()) ** 0.5 * _unit(any_piece)


def _oft_difference(blocks: Tensor, trained: Tensor, rows: slice | None) -> Difference:
    """Of what turns less the identity do: a turn's transpose turns the other way, and is far from it."""
    own = blocks if rows is None else _blocks_of(blocks, rows)
    if own is None or own.shape != trained.shape:
        return _UNLIKE
    found, expected = _moves(own.double()), _moves(trained.double())
    skew = float((trained - trained.mT).double().norm())
    norm = float(expected.norm())
    return float((found - expected).norm()), 6 * _unit(blocks) * skew + 1e-6 * norm + 1e-30, norm


def _blocks_of(blocks: Tensor, rows: slice) -> Tensor | None:
    """Those of some outputs; None where these are no whole blocks, or the blocks are of a butterfly."""
    size = blocks.shape[-1]
    if blocks.dim() != 3 or rows.start % size or rows.stop % size:
        return None
    return blocks[rows.start // size : rows.stop // size]


def _moves(blocks: Tensor) -> Tensor:
    """R - I as readers make R, by an inverse."""
    skew = blocks - blocks.mT
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    moves: Tensor = (one + skew) @ torch.linalg.inv(one - skew) - one
    return moves


def lengths_problem(
    pieces: Mapping[str, Tensor],
    magnitudes: Sequence[Tensor | None],
    norms: Sequence[tuple[Tensor, Tensor]],
    for_comfyui: bool,
    prefix: str,
) -> str | None:
    """What is wrong with DoRA's tensors of one module of a file, which may hold several layers; None if nothing.

    Args:
        magnitudes: (out,) of each layer in it as trained, in the file's order of rows; None where it was not trained.
        norms: (out,) of each, |W| and |W + dW| by row.
        for_comfyui: whether ComfyUI reads the file, which then needs `dora_scale`.
        prefix: of the other key, `lora`, or `lokr` where diffusers is not to take the file for a LoRA.
    """
    own, changed = (torch.cat(side).double() for side in zip(*norms, strict=True))
    trained = torch.cat(
        [
            norm[0].double() if one is None else one.double()
            for one, norm in zip(magnitudes, norms, strict=True)
        ]
    )
    found = pieces.get(f"{prefix}_magnitude_vector")
    if found is None or found.numel() != len(trained):
        return f"no {prefix}_magnitude_vector of one number for each output"
    if not torch.allclose(found.double().flatten(), trained, rtol=1e-5, atol=0):
        return f"another {prefix}_magnitude_vector than was trained"
    scale = pieces.get("dora_scale")
    if not for_comfyui:
        return None
    if scale is None or scale.dim() < 2 or scale.shape[0] != len(trained) or scale.numel() != len(trained):
        return "no dora_scale of the shape (outputs, 1)"
    # ComfyUI multiplies W + dW by dora_scale / |W|.
    if not torch.allclose(scale.double().flatten() / own, trained / changed, rtol=1e-4, atol=0):
        return "a dora_scale with which ComfyUI makes another weight than was trained"
    return None


def _unit(tensor: Tensor) -> float:
    """Half the distance of two numbers of a type, relative; that of float32 where everything is computed in it."""
    return max(torch.finfo(tensor.dtype).eps / 2, 1e-7)
