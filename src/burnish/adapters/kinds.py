"""Which layer is made for a method, and which for weights that were read: the one table of the kinds there are."""

from __future__ import annotations

from collections.abc import Mapping

from burnish.adapters.layer import AdapterLayer, AdapterWeights
from burnish.adapters.loha import LohaLayer, LohaWeights
from burnish.adapters.lokr import LokrLayer, LokrWeights
from burnish.adapters.lora import LoraLayer, LoraWeights
from burnish.adapters.oft import OftLayer, OftWeights
from burnish.config.method import AdapterMethod, Boft, Loha, Lokr, Lora, Oft

_BY_METHOD: Mapping[type[AdapterMethod], type[AdapterLayer]] = {
    Lora: LoraLayer,
    Loha: LohaLayer,
    Lokr: LokrLayer,
    Oft: OftLayer,
    Boft: OftLayer,
}
_BY_WEIGHTS: Mapping[type, type[AdapterLayer]] = {
    LoraWeights: LoraLayer,
    LohaWeights: LohaLayer,
    LokrWeights: LokrLayer,
    OftWeights: OftLayer,
}


def layer_of(method: AdapterMethod) -> type[AdapterLayer]:
    """What trains by a method."""
    return _BY_METHOD[type(method)]


def layer_for(weights: AdapterWeights) -> type[AdapterLayer]:
    """What computes with weights that are there already."""
    return _BY_WEIGHTS[type(weights)]
