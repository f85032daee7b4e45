"""Pictures and clips from a model and adapters: prompts are encoded first, then the denoiser and the VAE take turns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules, innermost
from burnish.config.schema import Memory, Model
from burnish.errors import AdapterError
from burnish.export.adapter_file import read_adapter, read_metadata
from burnish.export.metadata import PART
from burnish.family import Family
from burnish.memory.quantized import QuantizedLinear
from burnish.memory.streaming import stream_weights
from burnish.memory.transfer import transfer_to
from burnish.model import DTYPES, choose_device, choose_model, places
from burnish.sampling.decoding import Drawn, decode_pictures
from burnish.sampling.outputs import next_number, write_picture
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests, with_references

_log = logging.getLogger(__name__)


def draw_pictures_with(
    model: Model,
    requests: Sequence[PictureRequest],
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    memory: Memory | None = None,
    device: str = "auto",
    precision: str = "bf16",
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Drawn]:
    """One picture or clip per request, in order, batch by batch; each adapter is a file and its strength.

    `memory` says how weights are kept, and which of them on the host; the defaults if absent.
    The text encoders are gone before the denoiser loads.

    Raises:
        ModelError, AdapterError: files that are missing or do not fit.
        MachineError: the device is not there.
    """
    where, dtype = choose_device(device, precision), DTYPES[precision]
    chosen = choose_model(model, memory)
    family = chosen.load("text_encoders", dtype=dtype, device=where)
    encoded = encode_requests(family, requests)
    family.release("text_encoders")
    memory = memory or Memory()
    family = chosen.load("denoiser", "vae", dtype=dtype, device=places(memory, where))
    encoded = with_references(family, encoded, device=where)
    if alone := drawn_alone(family):
        _log.warning("%s", alone)
    for path, strength in adapters:
        attach_adapter(family, path, _log.warning).multiplier = strength
    if memory.stream != "auto" and memory.stream:
        stream_weights(family.denoisers.values(), family.blocks(), memory.stream, transfer_to(where), where)
    for first in range(0, len(encoded), batch_size):
        progress(first, len(encoded))
        latents = draw_latents(family, encoded[first : first + batch_size], device=where, dtype=dtype)
        yield from decode_pictures(family, latents)
    progress(len(encoded), len(encoded))


def drawn_alone(family: Family) -> str | None:
    """What is to be said of pictures that one of several denoisers draws at all times; None where none is amiss."""
    begin, end = family.schedule.times
    if (begin, end) == (0.0, 1.0):
        return None
    return (
        f"{family.title} draws with {', '.join(family.denoisers)} alone, which is made for times from {begin:g} to "
        f"{end:g} (0 is the picture, 1 is noise): what comes of it is not how the model draws. With the release's "
        "folder, and `model.denoisers` left out, all denoisers draw."
    )


def attach_adapter(family: Family, path: Path, note: Callable[[str], None]) -> AdapterSet:
    """Attach a saved adapter, frozen, to the denoiser it is for; `note` hears what had to be assumed.

    Raises:
        AdapterError: the file does not fit, or does not tell which of several denoisers it is for.
    """
    part = _part_of(family, path)
    denoiser = family.denoisers[part]
    file = read_adapter(path, adaptable_modules(denoiser), part=part, keys=family.export)
    for line in file.notes:
        note(f"{path.name}: {line}")
    return AdapterSet.from_weights(denoiser, file.weights)


def merge_adapter(family: Family, path: Path, strength: float, note: Callable[[str], None]) -> None:
    """Add a saved adapter to the weights of the denoiser it is for, for good; `note` hears what had to be assumed.

    Layers whose weights are kept in fewer bits would lose most of it: there it stays beside the weights, frozen.

    Raises:
        AdapterError: as `attach_adapter`.
    """
    adapter = attach_adapter(family, path, note)
    beside = {}
    for name, weights in adapter.weights().items():
        layer = innermost(adapter.layers[name])
        if isinstance(layer, QuantizedLinear):
            beside[name] = weights
            continue
        weight = layer.weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            delta = weights.delta(weight.cpu()).to(weight.device)
            weight.copy_(weight.float() + strength * delta)
    adapter.detach()
    if beside:
        AdapterSet.from_weights(adapter.denoiser, beside).multiplier = strength


def part_labels(family: Family) -> dict[str, str]:
    """What file names call each of several denoisers; empty where the model has only one."""
    parts = list(family.denoisers)
    if len(parts) == 1:
        return {part: family.export.labels[part] for part in parts if part in family.export.labels}
    return {part: family.export.labels.get(part, part) for part in parts}


def _part_of(family: Family, path: Path) -> str:
    """The denoiser that an adapter file is for: from its metadata, else from its name."""
    parts = list(family.denoisers)
    if len(parts) == 1:
        return parts[0]
    told = read_metadata(path).get(PART)
    if told in parts:
        return told
    labels = part_labels(family)
    in_name = {part: label for part, label in labels.items() if _letters(label) in _letters(path.stem)}
    # `transformer` is also found where `transformer_2` is meant.
    longest = [
        part
        for part, label in in_name.items()
        if not any(_letters(label) in _letters(other) for other in in_name.values() if other != label)
    ]
    if len(longest) != 1:
        names = " or ".join(labels.values())
        raise AdapterError(
            f"{path.name} does not tell which denoiser of {family.title} it is for: {names}",
            remedy=f"Give one file for each, renamed so that {names} is part of its name.",
        )
    return longest[0]


def _letters(text: str) -> str:
    """Lower case, without what separates words in file names."""
    return "".join(one for one in text.lower() if one.isalnum())


def generate_pictures(
    model: Model,
    requests: Sequence[PictureRequest],
    output: Path,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    memory: Memory | None = None,
    device: str = "auto",
    precision: str = "bf16",
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Draw, and write numbered pictures with a .txt and a .json beside each; numbers go on from what is there.

    Each is written as soon as its batch is drawn, so that an interruption loses no more than a batch.
    """
    pictures = draw_pictures_with(
        model,
        requests,
        adapters=adapters,
        memory=memory,
        device=device,
        precision=precision,
        batch_size=batch_size,
        progress=progress,
    )
    facts: Mapping[str, object] = {
        "model": model.path,
        "adapters": [{"file": path.name, "strength": strength} for path, strength in adapters],
    }
    output.mkdir(parents=True, exist_ok=True)
    first, paths = next_number(output), []
    for number, (picture, request) in enumerate(zip(pictures, requests, strict=True), first):
        path = output / f"{number:06d}.png"
        paths.append(write_picture(path, picture, request, extra=facts))
    return paths
