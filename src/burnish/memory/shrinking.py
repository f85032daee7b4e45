"""Large linear layers of a module put into a smaller format while it loads, and kept on disk for the next time.

Layer by layer: what is on a GPU at any moment is the smaller module and one layer as it was, on a CPU as many layers as
there are threads. Kept layers are files of their own, `weights/KEY/LAYER.safetensors`, whose key is a hash of all that
their numbers depend on (law L3): a load that was cut off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from burnish.atomic import atomic_write_bytes, free_bytes, readable_bytes, sweep
from burnish.errors import DiskFull
from burnish.families.scales import of_rows, widened
from burnish.memory.formats import FORMAT_VERSION, FORMATS
from burnish.memory.quantized import QuantizedLinear, large_linears, repeated_parts, replace_linears
from burnish.memory.rounding import FP8

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shrink:
    """How the large linear layers of a part are kept: what `Family.load` is given.

    Args:
        kept_as: a key of `FORMATS`.
        folder: where they are stored for the next time; nowhere if None.
        smallest: weights of fewer numbers stay as they are; `quantized.SMALLEST` if None.
    """

    kept_as: str
    folder: Path | None = None
    smallest: int | None = None

    @property
    def name(self) -> str:
        """Changes with the numbers that come out."""
        return f"{self.kept_as} {FORMAT_VERSION}"

    def begin(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module] | None,
        content: Callable[[Collection[str]], str],
        *,
        spared: Sequence[str],
        dtype: torch.dtype,
        device: torch.device | str,
        away: tuple[str, ...] = (),
    ) -> Shrinking:
        """Replace the large layers of a module without weights, and fill those that are on disk."""
        chosen = large_linears(
            module,
            repeated_parts(module) if blocks is None else blocks,
            self.kept_as,
            smallest=self.smallest,
        )
        layers = {
            name: layer
            for name, layer in chosen.items()
            if not any(fnmatch(f"{name}.weight", rule) for rule in spared)
        }
        made = replace_linears(module, layers, self.kept_as)
        shrinking = Shrinking(made, dtype, torch.device(device), away)
        if self.folder is not None and layers:
            parts = {"content": content([f"{name}.weight" for name in layers]), "format": self.name}
            key = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=24).hexdigest()
            shrinking.read(self.folder / "weights" / key)
        return shrinking


@dataclass
class Shrinking:
    """One module while it loads."""

    layers: dict[str, QuantizedLinear]
    dtype: torch.dtype
    device: torch.device
    away: tuple[str, ...] = ()  # beginnings of the names of layers that stay in host memory
    folder: Path | None = None
    filled: set[str] = field(default_factory=set)

    @property
    def waiting(self) -> set[str]:
        """Weights that are to come, as the module named them."""
        return {f"{name}.weight" for name in self.layers.keys() - self.filled}

    @property
    def weights(self) -> set[str]:
        return {f"{name}.weight" for name in self.layers}

    def take(self, weight_name: str, weight: Tensor, scales: Tensor | None = None) -> None:
        """Keep a layer's weight (N, K), which is on the device; see `placement.Shrinking`."""
        name = weight_name.removesuffix(".weight")
        layer = self.layers[name]
        packed = _as_stored(layer, weight, scales)
        if packed is None:
            packed = layer.kept.pack(weight if scales is None else widened(weight, scales))
        if name.startswith(self.away):
            packed = packed[0].cpu(), packed[1].cpu()
        layer.take(*packed, dtype=self.dtype)
        self.filled.add(name)
        self._store(name, *packed)

    def read(self, folder: Path) -> None:
        """Fill the layers that are in `folder`; the others will be written there, if there is room."""
        for name, layer in self.layers.items():
            home = torch.device("cpu") if name.startswith(self.away) else self.device
            found = _stored(folder / f"{name}.safetensors", home)
            if found is None:
                continue
            try:
                layer.take(*found, dtype=self.dtype)
            except ValueError:
                continue
            self.filled.add(name)
        self.folder = folder
        self._make_room()

    def _make_room(self) -> None:
        if self.folder is None or not self.waiting:
            return
        needed = sum(
            layer.codes.nbytes + layer.scales.nbytes
            for name, layer in self.layers.items()
            if name not in self.filled
        )
        if free_bytes(self.folder) < 2 * needed:
            _log.warning(
                "%s would take more than half of what is free on the disk: the smaller weights are made anew each time",
                readable_bytes(needed),
            )
            self.folder = None
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
        except OSError as error:
            self._give_up(error)

    def _store(self, name: str, codes: Tensor, scales: Tensor) -> None:
        folder = self.folder  # another thread may give it up meanwhile
        if folder is None:
            return
        data = save({"codes": codes.cpu().contiguous(), "scales": scales.cpu().contiguous()})
        try:
            atomic_write_bytes(folder / f"{name}.safetensors", data)
        except DiskFull as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Without a place on disk the next load takes as long as this one, nothing else."""
        _log.warning("the smaller weights are not kept for the next time: %s", error)
        self.folder = None


def _as_stored(layer: QuantizedLinear, weight: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Codes and scales of a weight that is stored in e4m3 already, and need not be rounded again; else None."""
    if layer.kept_as != "fp8" or weight.dtype != FP8:
        return None
    rows = torch.ones(len(weight), 1, device=weight.device) if scales is None else of_rows(scales)
    return None if rows is None else (weight.clone(), rows)


def _stored(path: Path, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Codes and scales of a layer on disk; None where it is not there, or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return file.get_tensor("codes").clone(), file.get_tensor("scales").clone()
    except (SafetensorError, OSError) as error:
        _log.warning("%s is made anew: %s", path, error)
        return None


def shrink_of(kept_as: str, folder: Path | None) -> Shrink | None:
    """What a config's word means: `native` keeps layers as they are."""
    if kept_as == "native":
        return None
    assert kept_as in FORMATS
    return Shrink(kept_as, folder)
