"""An adapter file of any program, open: whose modules it changes, and what it holds for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from burnish.errors import AdapterError
from burnish.export.adapter_file import metadata_alphas
from burnish.export.word_file import is_word
from burnish.export_keys import NativeModule
from burnish.toolbox.models import Match, Model, TextModule, known_models, matches, model_named, text_module
from burnish.toolbox.pieces import Kind, ModuleAdapter, kind_of, rank_of, split_key
from burnish.toolbox.stream import Stored, TensorFile, finite


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """The adapter of one module, still in its file."""

    file: TensorFile
    spelled: str  # the module as the keys begin
    keys: Mapping[str, str]  # piece -> key
    kind: Kind
    told_alpha: float | None  # by the file's metadata

    def stored(self, piece: str) -> Stored:
        return self.file.tensors[self.keys[piece]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {piece: self.stored(piece).shape for piece in self.keys}

    @property
    def is_dora(self) -> bool:
        return "dora_scale" in self.keys or "magnitude" in self.keys

    @property
    def rank(self) -> int | None:
        return rank_of(self.kind, self.shapes())

    @property
    def is_convolution(self) -> bool:
        """Of a larger kernel than 1."""
        shapes = self.shapes()
        core = next((shapes[name] for name in ("mid", "down", "lokr_w2", "hada_t1") if name in shapes), ())
        return math.prod(core[2:]) > 1

    def alpha(self) -> float | None:
        """As the file tells it, by a key or in its metadata."""
        if "alpha" not in self.keys:
            return self.told_alpha
        told = self.file.read(self.keys["alpha"])
        if told.numel() != 1:
            raise AdapterError(
                f"{self.file.path}: alpha of {self.spelled} is not one number but {tuple(told.shape)}"
            )
        return float(told)

    def change_shape(self) -> tuple[int, int] | None:
        """Rows and columns of what it changes, where its pieces tell."""
        shapes = self.shapes()
        if self.kind == "lora":
            core = shapes.get("mid", ())
            columns = math.prod(shapes["down"][1:]) * math.prod(core[2:])
            return shapes["up"][0], columns
        if self.kind == "loha" and "hada_t1" not in shapes:
            return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
        if self.kind == "lokr" and "lokr_t2" not in shapes:
            (one, two), (three, four) = (self._factor(shapes, n) for n in (1, 2))
            return one * three, two * four
        if self.kind == "full" and "diff" in shapes and shapes["diff"]:
            return shapes["diff"][0], math.prod(shapes["diff"][1:])
        return None

    @staticmethod
    def _factor(shapes: Mapping[str, tuple[int, ...]], number: int) -> tuple[int, int]:
        whole = shapes.get(f"lokr_w{number}")
        if whole is not None:
            return whole[0], math.prod(whole[1:])
        return shapes[f"lokr_w{number}_a"][0], shapes[f"lokr_w{number}_b"][1]

    def load(self, shape: tuple[int, ...]) -> ModuleAdapter:
        """Its pieces in memory, for a weight of that shape.

        Raises:
            AdapterError: they do not fit the weight or each other, or hold NaN.
        """
        told = self.change_shape()
        if told is not None and told != (shape[0], math.prod(shape[1:])):
            raise AdapterError(
                f"{self.file.path}: {self.spelled} changes a weight of {told[0]} rows and {told[1]} columns; "
                f"the model's has the shape {shape}",
                remedy="The adapter is of another model, or of another size of it.",
            )
        pieces = {piece: self._read(key) for piece, key in self.keys.items() if piece != "alpha"}
        return ModuleAdapter(self.kind, pieces, shape, self.alpha())

    def _read(self, key: str) -> Tensor:
        tensor = self.file.read(key)
        if tensor.is_floating_point() and not finite(tensor):
            raise AdapterError(
                f"{self.file.path}: {key} holds NaN or infinity",
                remedy="The training that wrote it had broken down; use an earlier save.",
            )
        return tensor.to(torch.float32)


class AdapterSource:
    """An adapter file, open; a context manager.

    `modules` are those of the denoiser, `texts` those of text encoders; `unknown` keys belong to nothing that is known
    here. `model` is None where no family knows any of the modules.

    Raises:
        ModelError: the file is no whole safetensors file.
        AdapterError: it holds no adapter, but perhaps a checkpoint.
        UserError: `family` is none.
    """

    def __init__(self, path: Path, family: str | None = None) -> None:
        self.path = path
        self.file = TensorFile(path)
        try:
            self._entries, self.unknown = _entries(self.file)
            if not self._entries:
                raise _no_adapter(self.file)
            self.texts = self._texts()
            texts = set(self.texts.values())
            own = [one for one in self._entries if one not in texts]
            self.matches = self._matches(own, family)
            self.model = self.matches[0].model if self.matches else None
            self.modules = self._modules(own)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    @property
    def metadata(self) -> dict[str, str]:
        return self.file.metadata

    def entries(self) -> Iterator[Entry]:
        yield from self.modules.values()
        yield from self.texts.values()

    def alternatives(self) -> list[Model]:
        """Other models that know its modules as well; an adapter of one may be spelled like that of a relative."""
        best = self.matches[0] if self.matches else None
        return [one.model for one in self.matches[1:] if best and _rank(one) == _rank(best)]

    def _texts(self) -> dict[TextModule, Entry]:
        found: dict[TextModule, Entry] = {}
        for entry in self._entries:
            module = text_module(entry.spelled)
            if module is not None:
                found[module] = entry
        return found

    def _matches(self, own: Sequence[Entry], family: str | None) -> list[Match]:
        among = known_models() if family is None else (model_named(family),)
        found = matches({one.spelled: one.change_shape() for one in own}, self.metadata, among)
        if family is not None and not found and own:
            raise AdapterError(
                f"{self.path}: {among[0].title} knows none of its {len(own)} modules, such as {own[0].spelled}"
            )
        return found

    def _modules(self, own: Sequence[Entry]) -> dict[NativeModule, Entry]:
        found: dict[NativeModule, Entry] = {}
        for entry in own:
            target = None if self.model is None else self.model.find(entry.spelled)
            if target is None:
                self.unknown += entry.keys.values()
            elif target in found:
                raise AdapterError(
                    f"{self.path}: two spellings of {target.name} ({found[target].spelled} and {entry.spelled})"
                )
            else:
                found[target] = entry
        return found

    def known_model(self) -> Model:
        """The model it is for.

        Raises:
            AdapterError: none is known, or it has not all of the file's modules.
        """
        if self.model is None:
            if self.texts:
                raise AdapterError(
                    f"{self.path} changes text encoders alone, which does not tell the model",
                    remedy="Name its family with --family.",
                )
            some = ", ".join(entry.spelled for entry in self._entries[:3])
            raise AdapterError(
                f"{self.path}: no family that Burnish knows has its modules, such as {some}",
                remedy="`burnish families` lists them; the spelling may be one that is not known here.",
            )
        if self.unknown:
            shown = ", ".join(self.unknown[:4]) + (
                f" and {len(self.unknown) - 4} more" if len(self.unknown) > 4 else ""
            )
            raise AdapterError(
                f"{self.path}: {len(self.unknown)} of {len(self.file.tensors)} keys belong to no module of "
                f"{self.model.title}: {shown}",
                remedy="They would be lost. If they may be, add --drop-unknown; if the family is another, name it "
                "with --family.",
            )
        return self.model


def _rank(match: Match) -> tuple[int, bool, int]:
    return match.known, match.named, match.exact


def _entries(file: TensorFile) -> tuple[list[Entry], list[str]]:
    """The adapters in a file, and the keys that are no piece of one."""
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for key in file.tensors:
        spelled, piece = split_key(key)
        if piece is None:
            unknown.append(key)
        elif piece in found.setdefault(spelled, {}):
            raise AdapterError(
                f"{file.path}: {spelled} has two of {piece}, {found[spelled][piece]} and {key}"
            )
        else:
            found[spelled][piece] = key
    # Names for peft's metadata are without a prefix; a name of the file ends with them.
    alphas = _alphas(file, list(found))
    entries = []
    for spelled, keys in found.items():
        kind = kind_of({piece: len(file.tensors[key].shape) for piece, key in keys.items()})
        if kind is None:
            unknown += keys.values()
        else:
            entries.append(Entry(file, spelled, keys, kind, alphas.get(spelled)))
    return entries, unknown


def _alphas(file: TensorFile, spelled: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in ("transformer", "unet", "text_encoder", "text_encoder_2"):
        own = [name for name in spelled if name.startswith(f"{part}.")]
        if own:
            found |= metadata_alphas(file.path, file.metadata, part, own)
    return found


def _no_adapter(file: TensorFile) -> AdapterError:
    names = list(file.tensors)
    weights = sum(name.endswith((".weight", ".bias")) for name in names)
    remedy = "Give a LoRA or LyCORIS file."
    if is_word(file.path):
        remedy = "It is a new word (textual inversion); of these commands only `inspect` is for words."
    elif weights > len(names) / 2:
        remedy = "It looks like a checkpoint; `burnish adapter extract BASE TUNED` makes an adapter of two."
    return AdapterError(
        f"{file.path} holds no adapter: none of its {len(names)} tensors is a piece of one "
        f"({', '.join(names[:3]) or 'it is empty'})",
        remedy=remedy,
    )
