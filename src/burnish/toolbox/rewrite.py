"""An adapter file with other numbers under the same keys: of lower rank, or of another strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from burnish.errors import AdapterError
from burnish.toolbox.convert import Outcome
from burnish.toolbox.low_rank import RankChoice, factored, reduced
from burnish.toolbox.source import AdapterSource, Entry
from burnish.toolbox.stream import HASH, Spool, refuse_existing
from burnish.toolbox.writing import LENGTHS, STALE

# The piece by which the effect of each kind is multiplied; the first that a file has.
_FACTORS = {
    "lora": ("up",),
    "loha": ("hada_w1_a", "hada_w1_b"),
    "lokr": ("lokr_w1", "lokr_w1_a"),
}
_SUMS = ("diff", "diff_b")
Change = Callable[[Entry], Mapping[str, Tensor]]


def scale(source: AdapterSource, path: Path, factor: float, *, force: bool = False) -> Outcome:
    """Write an adapter whose effect is `factor` times that of the source, in its own spelling and number types.

    Raises:
        AdapterError: a kind whose effect is not proportional to any of its pieces.
    """

    def scaled(entry: Entry) -> Mapping[str, Tensor]:
        if entry.is_dora or entry.kind in ("oft", "boft", "glora"):
            raise AdapterError(
                f"{source.path}: the effect of {entry.spelled} is no multiple of anything in the file",
                remedy="Make it a LoRA first: burnish adapter convert --as lora --rank N --base BASE.",
            )
        if entry.kind in _FACTORS:
            chosen = [next(piece for piece in _FACTORS[entry.kind] if piece in entry.keys)]
        else:
            chosen = [piece for piece in _SUMS if piece in entry.keys]
        return {piece: _wide(entry, piece) * factor * _told_strength(entry) for piece in chosen}

    return _rewritten(source, path, scaled, Outcome(path, "as it was"), force=force)


def resize(
    source: AdapterSource,
    path: Path,
    choice: RankChoice,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Outcome:
    """Write LoRAs of lower rank, by the exact decomposition of each; other kinds are refused.

    Raises:
        AdapterError: a module's adapter is no LoRA.
    """
    outcome = Outcome(path, "as it was")

    def smaller(entry: Entry) -> Mapping[str, Tensor]:
        told = entry.change_shape()
        if entry.kind == "full":
            return {}
        if entry.kind != "lora" or entry.is_dora or told is None or "scalar" in entry.keys:
            raise AdapterError(
                f"{source.path}: the adapter of {entry.spelled} is no plain LoRA",
                remedy="Make it one of the rank you want: burnish adapter convert --as lora --rank N.",
            )
        down, core = entry.stored("down").shape, entry.stored("mid").shape if "mid" in entry.keys else ()
        kernel = core[2:] if core else down[2:]
        weights = entry.load((told[0], down[1], *kernel)).as_lora()
        assert weights is not None
        if core:
            found = factored(weights.delta().flatten(1), choice)
            made = found.as_weights((told[0], down[1], *kernel))
        else:
            made, found = reduced(weights, choice)
        outcome.losses.add(entry.spelled, found)
        if "alpha" not in entry.keys:
            return {"down": made.down, "up": made.up}
        # Alpha stays what it was, the same in all modules of most files, which diffusers relies on.
        alpha = entry.alpha() or float(made.rank)
        return {"down": made.down, "up": made.up * (made.rank / alpha), "alpha": torch.tensor(alpha)}

    return _rewritten(source, path, smaller, outcome, dtype=dtype, force=force)


def _told_strength(entry: Entry) -> float:
    """What the metadata say of the strength, which the new file's will not."""
    if "alpha" in entry.keys or entry.told_alpha is None or entry.rank is None:
        return 1.0
    return entry.told_alpha / entry.rank


def _wide(entry: Entry, piece: str) -> Tensor:
    return entry.file.read(entry.keys[piece]).float()


def _rewritten(
    source: AdapterSource,
    path: Path,
    change: Change,
    outcome: Outcome,
    *,
    dtype: torch.dtype | None = None,
    force: bool,
) -> Outcome:
    """The file with the pieces that `change` gives in the place of the source's; what it leaves out stays."""
    refuse_existing(path, force=force)
    if source.unknown:
        raise AdapterError(
            f"{source.path}: {len(source.unknown)} keys are of nothing that is known here: {source.unknown[0]}",
            remedy="burnish adapter convert --drop-unknown leaves them out.",
        )
    with Spool(path) as spool:
        ranks: set[int | None] = set()
        for entry in source.entries():
            changed = change(entry)
            dropped = {"mid"} if "down" in changed else set()
            for piece, key in entry.keys.items():
                if piece in dropped:
                    continue
                stored = entry.stored(piece)
                kept = stored.dtype if dtype is None or piece == "alpha" or key.endswith(LENGTHS) else dtype
                tensor = changed[piece] if piece in changed else entry.file.read(key)
                wanted = tensor.reshape(stored.shape) if tensor.numel() == 1 else tensor
                spool.add(key, wanted.to(kept).contiguous())
            outcome.modules += 1
            ranks |= {changed["down"].shape[0] if "down" in changed else entry.rank} - {None}
        metadata = {key: value for key, value in source.metadata.items() if key not in STALE}
        if "ss_network_dim" in metadata and ranks:
            metadata["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        spool.finish(metadata | {HASH: ""})
        outcome.tensors = len(spool)
    return outcome
