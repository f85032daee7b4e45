"""What the adapter of one module consists of, in whatever file, and what it adds to the module's weight.

    lora     up, down (and mid: the Tucker form of a convolution)      dora: besides, the length of each row
    loha     hada_w1_a, _b, hada_w2_a, _b (hada_t1, _t2)               lokr: lokr_w1 or its factors, lokr_w2 likewise
    oft      oft_blocks of 3 axes, boft of 4                           full: diff, the difference itself

Sources of the spellings: ComfyUI's `comfy/weight_adapter`, LyCORIS' `lycoris/modules`, diffusers'
`loaders/lora_conversion_utils.py`, sd-scripts' `networks/lora.py`, x-flux' `src/flux/modules/layers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from burnish.adapters import deltas
from burnish.adapters.lora import LoraWeights
from burnish.errors import AdapterError

Kind = Literal["lora", "loha", "lokr", "oft", "boft", "glora", "full"]

# Ending of a key -> piece; of endings that fit, the first counts.
_SPELLINGS = {
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora_B"), "up"),
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_A"), "down"),
    **dict.fromkeys((".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight"), "up"),
    **dict.fromkeys((".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight"), "down"),
    ".lora_mid.weight": "mid",
    ".dora_scale": "dora_scale",
    **dict.fromkeys(
        (
            ".lora_magnitude_vector.default.weight",
            ".lora_magnitude_vector.weight",
            ".lora_magnitude_vector.default",
            ".lora_magnitude_vector",
            ".lokr_magnitude_vector",
        ),
        "magnitude",
    ),
    **{
        f".{name}": name
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    },
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{name}": name for name in ("oft_blocks", "rescale", "diff", "diff_b", "scalar")},
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    **{f".{name}.weight": f"glora_{name}" for name in ("a1", "a2", "b1", "b2")},
    ".alpha": "alpha",
}
# x-flux stands apart: `double_blocks.0.processor.qkv_lora1.down.weight`.
_XFLUX = re.compile(r"(?P<stem>.+\.processor\.\w*lora\d?)\.(?P<piece>up|down)\.weight")
_ATTENTION = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")  # of diffusers before peft


def split_key(key: str) -> tuple[str, str | None]:
    """A key's module as it is spelled, and which piece it is; None for what is no piece of an adapter."""
    match = _XFLUX.fullmatch(key)
    if match:
        return match["stem"], match["piece"]
    key = _ATTENTION.sub(lambda m: f".to_{m[1]}{'.0' if m[1] == 'out' else ''}.lora.", key)
    for ending, piece in _SPELLINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), piece
    return key, None


def kind_of(pieces: Mapping[str, int]) -> Kind | None:
    """The kind of adapter that has these pieces, by piece their number of axes; None of an incomplete one."""
    names = pieces.keys()
    if {"up", "down"} <= names:
        return "lora"
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= names:
        return "loha"
    if all(f"lokr_w{n}" in names or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= names for n in (1, 2)):
        return "lokr"
    if "oft_blocks" in names:
        return "oft" if pieces["oft_blocks"] == 3 else "boft"
    if {"glora_a1", "glora_a2", "glora_b1", "glora_b2"} <= names:
        return "glora"
    return "full" if names & {"diff", "diff_b"} else None


@dataclass(frozen=True, slots=True)
class ModuleAdapter:
    """The adapter of one module in memory: its pieces as float32, by the names of `split_key`.

    `alpha` is None where a file tells none; the strength is 1 then. `shape` is that of the module's weight.
    """

    kind: Kind
    pieces: Mapping[str, Tensor]
    shape: tuple[int, ...]
    alpha: float | None = None
    strength: float = field(default=1.0)  # of the whole effect

    @property
    def is_dora(self) -> bool:
        return "dora_scale" in self.pieces or "magnitude" in self.pieces

    @property
    def needs_base(self) -> bool:
        """Whether the delta depends on the weight it is added to."""
        return self.is_dora or self.kind in ("oft", "boft", "glora")

    @property
    def rank(self) -> int | None:
        """None of kinds without one, such as a LoKr of two whole factors."""
        return rank_of(self.kind, {name: tuple(one.shape) for name, one in self.pieces.items()})

    @property
    def scale(self) -> float:
        """What the product of the pieces is multiplied with."""
        rank = self.rank
        scale = 1.0 if self.alpha is None or rank is None else self.alpha / rank
        return scale * float(self.pieces["scalar"]) if "scalar" in self.pieces else scale

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What it adds to the weight, float32 of the weight's shape.

        Raises:
            AdapterError: it depends on the weight, which was not given, or the pieces do not fit.
        """
        if self.needs_base and weight is None:
            raise AdapterError(f"what a {self.told} changes depends on the weights of the base model")
        try:
            added = self._added(weight)
        except (RuntimeError, ValueError) as error:  # torch's own words about shapes
            raise AdapterError(f"the pieces of an adapter for {self.shape} do not fit: {error}") from error
        if self.is_dora and weight is not None:
            added = self._decomposed(weight.float(), added) - weight.float()
        return added if self.strength == 1.0 else self.strength * added

    def _added(self, weight: Tensor | None) -> Tensor:
        pieces, shape = self.pieces, self.shape
        if self.kind == "lora":
            product = deltas.lora_delta(pieces["up"], pieces["down"], pieces.get("mid"), scale=self.scale)
            return product.reshape(shape)
        if self.kind == "loha":
            first, second = ((pieces[f"hada_w{n}_a"], pieces[f"hada_w{n}_b"]) for n in (1, 2))
            cores = (pieces.get("hada_t1"), pieces.get("hada_t2"))
            return deltas.loha_delta(*first, *second, *cores, scale=self.scale, shape=shape)
        if self.kind == "lokr":
            return deltas.lokr_delta(*self.lokr_factors(), scale=self.scale, shape=shape)
        if self.kind in ("oft", "boft") and weight is not None and "rescale" not in pieces:
            return deltas.turned_delta(weight.float(), self._turns())
        if self.kind == "full":
            return pieces["diff"].reshape(shape) if "diff" in pieces else torch.zeros(shape)
        raise AdapterError(f"a {self.told} is not taken apart here")

    def lokr_factors(self) -> tuple[Tensor, Tensor]:
        """Both factors as matrices."""
        first, second = (
            deltas.lokr_factor(
                self.pieces.get(f"lokr_w{n}"),
                self.pieces.get(f"lokr_w{n}_a"),
                self.pieces.get(f"lokr_w{n}_b"),
                self.pieces.get(f"lokr_t{n}"),
            )
            for n in (1, 2)
        )
        return first, second

    def _turns(self) -> Tensor:
        """The blocks, kept within the constraint that stands where others have alpha (COFT, arXiv 2306.07280)."""
        blocks = self.pieces["oft_blocks"]
        if not self.alpha:
            return blocks
        norm = (blocks - blocks.transpose(-1, -2)).norm()
        return blocks * min(1.0, self.alpha / float(norm + 1e-8))

    def _decomposed(self, weight: Tensor, added: Tensor) -> Tensor:
        """DoRA as trained: lengths along the rows, or in LyCORIS' older form along the columns."""
        magnitude = self.pieces.get(
            "magnitude"
        )  # of rows always, though of a convolution it is (1, out, 1, 1)
        scale = self.pieces["dora_scale"] if magnitude is None else None
        if scale is not None and by_columns(scale, self.shape):
            changed = weight + added
            lengths = changed.transpose(0, 1).flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).eps)
            factors = (scale.flatten() / lengths).reshape(1, -1, *(1 for _ in self.shape[2:]))
            by_column: Tensor = factors * changed
            return by_column
        rows = scale if magnitude is None else magnitude
        assert rows is not None
        return deltas.dora_weight(weight, added, rows.flatten())

    def as_lora(self) -> LoraWeights | None:
        """The same as up and down, exactly; None where that is not possible without rounding off."""
        if self.is_dora or "diff_b" in self.pieces or self.kind != "lora":
            return None
        up, down = self.pieces["up"].flatten(1), self.pieces["down"]
        if "mid" in self.pieces:
            # The core and the way down are one convolution: (r, r, *kernel) after (r, in).
            down = torch.einsum("ij...,jc->ic...", self.pieces["mid"], down.flatten(1))
        ones = (1,) * (len(self.shape) - 2)
        down = down.reshape(down.shape[0], *self.shape[1:])
        return LoraWeights(down, up.reshape(*up.shape, *ones), self.scale * self.strength * down.shape[0])

    @property
    def splits_by_rows(self) -> bool:
        """Whether what it does to some rows of the weight is an adapter of the same kind."""
        return not self.is_dora and self.kind in ("loha", "full") and "hada_t1" not in self.pieces

    def rows(self, begin: int, end: int) -> ModuleAdapter:
        """What it does to some rows, where it splits by rows."""
        by_row = ("hada_w1_a", "hada_w2_a", "diff", "diff_b")
        pieces = {name: one[begin:end] if name in by_row else one for name, one in self.pieces.items()}
        return replace(self, pieces=pieces, shape=(end - begin, *self.shape[1:]))

    def times(self, factor: float) -> ModuleAdapter:
        """The same with its effect multiplied."""
        return replace(self, strength=self.strength * factor)

    @property
    def told(self) -> str:
        return f"{'do' + self.kind[-2:] if self.is_dora else self.kind}"


def rank_of(kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """By what alpha is divided; None where nothing is."""
    if kind == "lora":
        return shapes["down"][0]
    if kind == "loha":
        return shapes["hada_w1_b"][0]
    if kind == "lokr":
        # The second factor's where both have one, as LyCORIS and ComfyUI have it.
        return next(
            (shapes[f"lokr_{name}_b"][0] for name in ("w2", "w1") if f"lokr_{name}_b" in shapes), None
        )
    return None


def by_columns(magnitude: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the lengths are those of columns: (1, in, ...), in LyCORIS' older files."""
    return magnitude.dim() > 1 and magnitude.shape[0] == 1 and shape[0] != 1
