"""Pictures and clips from a model and adapters: prompts are encoded first, then the denoiser and the VAE take turns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules, innermost
from burnish.config.schema import Memory, Model
from burnish.errors import AdapterError
from burnish.export.adapter_file import read_adapter, read_metadata, read_text_adapters
from burnish.export.metadata import PART
from burnish.export.text_encoders import file_modules, own_names
from burnish.export.word_file import ALONE, is_word, read_word
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

    Files of new words are adapters, too, as are text encoders' in those of denoisers. `memory` says how weights are
    kept, and which of them on the host; the defaults if absent. The text encoders are gone before the denoiser loads.

    Raises:
        ModelError, AdapterError: files that are missing or do not fit.
        MachineError: the device is not there.
    """
    where, dtype = choose_device(device, precision), DTYPES[precision]
    chosen = choose_model(model, memory)
    family = chosen.load("text_encoders", dtype=dtype, device=where)
    words = [path for path, _ in adapters if is_word(path)]
    for path, strength in adapters:
        if path in words:
            learn_word(family, path)
        else:
            attach_texts(family, path, strength, _log.warning)
    encoded = encode_requests(family, requests)
    family.release("text_encoders")
    memory = memory or Memory()
    family = chosen.load("denoiser", "vae", dtype=dtype, device=places(memory, where))
    encoded = with_references(family, encoded, device=where)
    if alone := drawn_alone(family):
        _log.warning("%s", alone)
    for path, strength in adapters:
        if path not in words:
            attach_adapter(family, path, _log.warning, texts_apart=True).multiplier = strength
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


def learn_word(family: Family, path: Path) -> str:
    """Teach the loaded text encoders the word of a file: the one its metadata tell, else the file's name.

    Raises:
        AdapterError: the file has no vectors for one of them, or of another width, or the word is known already.
    """
    told, vectors = read_metadata(path), read_word(path)
    word = told.get("modelspec.trigger_phrase", path.stem).lower()
    for name, vocabulary in family.vocabularies.items():
        found, width = vectors.get(name, vectors.get(ALONE)), vocabulary.vectors.shape[1]
        if found is None or found.dim() != 2 or found.shape[1] != width:
            raise AdapterError(
                f"{path.name} holds no vectors of {width} numbers for {name}",
                remedy=f"Is it a word for another model than {family.title}?",
            )
        if vocabulary.knows(word):
            raise AdapterError(f"{path.name}: {word!r} is in the vocabulary of {name} already")
        vocabulary.add(word, nn.Parameter(found.float().to(vocabulary.vectors.device), requires_grad=False))
    if not family.vocabularies:
        raise AdapterError(f"{path.name} is a new word, and {family.title} cannot be taught words here")
    return word


def attach_texts(
    family: Family, path: Path, strength: float, note: Callable[[str], None]
) -> list[AdapterSet]:
    """Attach what an adapter file holds for the loaded text encoders, frozen; often that is nothing.

    Raises:
        AdapterError: as `attach_adapter`.
    """
    parts = family.export.text_encoders
    if not parts:
        return []
    encoders = {part: family.loaded[part] for part in parts}
    files = read_text_adapters(path, {p: file_modules(one) for p, one in encoders.items()}, family.export)
    attached = []
    for part, file in files.items():
        for line in file.notes:
            note(line)
        one = AdapterSet.from_weights(encoders[part], own_names(file.weights, encoders[part]))
        one.multiplier = strength
        attached.append(one)
    return attached


def attach_adapter(
    family: Family, path: Path, note: Callable[[str], None], *, texts_apart: bool = False
) -> AdapterSet:
    """Attach a saved adapter, frozen, to the denoiser it is for; `note` hears what had to be assumed.

    What the file holds for text encoders is an error, unless it is attached by `attach_texts` (`texts_apart`).

    Raises:
        AdapterError: the file does not fit, or does not tell which of several denoisers it is for.
    """
    part = _part_of(family, path)
    denoiser = family.denoisers[part]
    modules = adaptable_modules(denoiser)
    file = read_adapter(path, modules, part=part, keys=family.export, texts_apart=texts_apart)
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
