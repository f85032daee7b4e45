"""Where weights come from: a diffusers folder, a .safetensors file or a Hub id; and whether a file is sound.

Only the header of a file is read here, never a weight. The file format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from burnish.errors import ModelError
from burnish.families.gguf_files import open_gguf
from burnish.families.tensor_info import TensorInfo
from burnish.family import ModelSource

_WITHOUT_WEIGHTS = ("tokenizer", "processor")  # folders that are called so, `t5_tokenizer` among them
CONFIG_FILES = ("*.json", "*/*.json")
REFUSED_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
SUFFIXES = (".safetensors", ".gguf")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # how diffusers and transformers name weights
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class _Span(NamedTuple):
    begin: int
    end: int
    name: str


def locate(source: ModelSource, wanted: Sequence[str] = CONFIG_FILES) -> Path:
    """The folder or file that `source.path` names; for a Hub id, its snapshot with the `wanted` files.

    A network is reached only for a Hub id, and not when the source or HF_HUB_OFFLINE says offline (law L8).

    Args:
        source: as the user gave it.
        wanted: patterns of files to fetch from the Hub, such as `unet/*.safetensors`.

    Raises:
        ModelError: there is no such file, folder or model, or it is of a kind that is not read.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() in REFUSED_SUFFIXES:
        raise _pickle_error(path)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ModelError(
                f"{path} is neither a folder nor a .safetensors file, nor a .gguf file.",
                remedy="Give a diffusers folder, a .safetensors file, or a Hub id such as `owner/name`.",
            )
        return path
    if path.suffix.lower() not in SUFFIXES and _HUB_ID.fullmatch(source.path):
        return _snapshot(source, wanted)
    raise ModelError(f"No such file or folder: {path}.", remedy=_neighbours(path))


def locate_parts(source: ModelSource, folders: Sequence[str]) -> Path:
    """As `locate`; of a Hub id it fetches the weights and tokenizers below `folders`, and nothing twice.

    The fp16 variant of a part is fetched only where the Hub has no other.
    """
    path = locate(source, [*CONFIG_FILES, *_part_files(folders, "")])
    is_remote = not Path(source.path).expanduser().exists()
    if is_remote and any(_lacks_weights(path / folder) for folder in folders):
        path = locate(source, [*CONFIG_FILES, *_part_files(folders, ".fp16")])
    return path


def index_file(folder: Path) -> Path:
    """The list of a diffusers folder's parts, there or not; that of a modular pipeline where it is the only one."""
    usual, modular = folder / "model_index.json", folder / "modular_model_index.json"
    return modular if modular.is_file() and not usual.is_file() else usual


def _part_files(folders: Sequence[str], variant: str) -> list[str]:
    weights = [f"{stem}{variant}{rest}.safetensors" for stem in STEMS for rest in ("", "-*-of-*")]
    return [f"{folder}/{name}" for folder in folders for name in (*weights, "*.txt", "*.model", "*.jinja")]


def _lacks_weights(folder: Path) -> bool:
    return has_weights(folder.name) and not any(folder.glob("*.safetensors"))


def has_weights(folder: str) -> bool:
    """Whether a folder of this name is one of weights rather than of a tokenizer."""
    return not any(word in folder for word in _WITHOUT_WEIGHTS)


def _neighbours(path: Path) -> str:
    """What else lies where `path` was looked for."""
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    names = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"Did you mean {folder / close[0]}?"
    models = [name for name in names if name.endswith(".safetensors") or (folder / name).is_dir()]
    return f"{folder} holds: {', '.join(models[:8])}." if models else f"{folder} holds no model."


def _pickle_error(path: Path) -> ModelError:
    return ModelError(
        f"{path} is a PyTorch pickle; such a file can run any code when it is opened, so it is not read.",
        remedy="Use the .safetensors release of the model, or convert it in a program you trust "
        "(ComfyUI's node `CheckpointSave` writes .safetensors).",
    )


def _snapshot(source: ModelSource, wanted: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    name = source.path + (f" at {source.revision}" if source.revision else "")
    offline = source.offline or _offline_by_environment()
    try:
        folder = snapshot_download(
            source.path,
            revision=source.revision,
            allow_patterns=list(wanted),
            local_files_only=offline,
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"The Hub model {name} is gated: its owner wants you to accept conditions first.",
            remedy=f"Accept them at https://huggingface.co/{source.path}, then run `hf auth login` "
            "or set HF_TOKEN.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"The Hub model {source.path} has no revision {source.revision!r}.",
            remedy="Leave `model.revision` out for the newest one, or name a branch, tag or commit.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no local folder {source.path}, and no Hub model of this name that you may read.",
            remedy="Check the spelling; for a private model run `hf auth login` or set HF_TOKEN.",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if offline:
            raise ModelError(
                f"There is no local folder {source.path}, the Hub model {name} is not (wholly) in the local "
                "cache, and the run is offline.",
                remedy="Fetch it once while online (`hf download`), or drop `model.offline` "
                "and HF_HUB_OFFLINE.",
            ) from error
        raise ModelError(
            f"The Hub could not be reached, and {name} is not (wholly) in the local cache.",
            remedy="Check the network or proxy; a model that was fetched before also works offline.",
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelError(
            f"The Hub refused {name}: {error}.", remedy="Try again later, or use a local copy of the model."
        ) from error
    return Path(folder)


def _offline_by_environment() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of one part of a diffusers folder, such as `unet`, shards in their order.

    The plain file is preferred to its fp16 variant, and an index of shards to both.

    Raises:
        ModelError: there is none, a shard is missing, or there are only pickles.
    """
    if not folder.is_dir():
        raise ModelError(
            f"The model has no folder {folder}.", remedy="Is the download complete? Fetch the model again."
        )
    for variant in ("", ".fp16"):
        for stem in STEMS:
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                return _shards(index)
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
    pickles = sorted(path for path in folder.iterdir() if path.suffix in REFUSED_SUFFIXES)
    if pickles:
        raise _pickle_error(pickles[0])
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise ModelError(
        f"{folder} holds no weights (model.safetensors or diffusion_pytorch_model.safetensors); "
        f"found: {found}.",
        remedy="Is the download complete? Fetch the model again.",
    )


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not names:
        raise ModelError(f"{index} names no shards.", remedy="Fetch the model again.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:3])}.",
            remedy="The download is not complete; fetch the model again.",
        )
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder.

    Raises:
        ModelError: the file is missing or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"The model lacks {path}.", remedy="Fetch the model again.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}.", remedy="Fetch the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object.", remedy="Fetch the model again.")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, number types and shapes of the tensors in a .safetensors or .gguf file; reads no weight.

    Raises:
        ModelError: the file is missing, damaged in any way its header can show, or of another kind.
    """
    if path.suffix.lower() == ".gguf":
        return open_gguf(path).header
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            _refuse_other_kinds(path, start + file.read(120), size)
            length = struct.unpack("<Q", start)[0]
            if length == 0 or length > MAX_HEADER_BYTES or length > size - 8:
                raise _damaged(path, f"its header claims {length:,} bytes, the file has {size:,}")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error

    entries = _parse_header(path, raw)
    entries.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    spans: list[_Span] = []
    for name, entry in entries.items():
        info, span = _parse_entry(path, name, entry)
        tensors[name] = info
        spans.append(span)
    _check_spans(path, spans, size - 8 - length)
    return tensors


def _damaged(path: Path, how: str) -> ModelError:
    return ModelError(
        f"{path} is damaged: {how}.",
        remedy="Fetch or copy the file again, and compare its size with the original.",
    )


def _refuse_other_kinds(path: Path, start: bytes, size: int) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{path} is a git-lfs pointer of {size} bytes, not the weights.",
            remedy="In its folder: git lfs pull",
        )
    # A header of 640 bytes begins with the same two as a pickle of protocol 2; JSON follows its length.
    pickled = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if start.startswith(pickled) and start[8:9] != b"{":
        raise _pickle_error(path)
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ModelError(
            f"{path} is a web page, not weights.",
            remedy="The download was answered with a page (often a log-in); fetch the file again.",
        )
    if size < 8:
        raise _damaged(path, f"it has only {size} bytes")


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    repeated: list[str] = []

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(
            {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
        )
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if repeated:
        raise _damaged(path, f"its header names {repeated[0]!r} more than once")
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, _Span]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"its header describes {name!r} in a way that cannot be read") from error
    if any(type(number) is not int or number < 0 for number in numbers):
        raise _damaged(path, f"its header gives {name!r} the shape {shape} at bytes {begin} to {end}")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"its header gives {name!r} the unknown number type {dtype!r}")
    needed = math.prod(shape) * _BITS[dtype]
    if (end - begin) * 8 != needed:
        raise _damaged(
            path,
            f"{name!r} is said to be {dtype} of shape {tuple(shape)}, which takes {needed // 8:,} bytes, "
            f"but it has {end - begin:,}",
        )
    return TensorInfo(dtype, tuple(shape)), _Span(begin, end, name)


def _check_spans(path: Path, spans: Iterable[_Span], available: int) -> None:
    """The tensors must fill the data area, each byte once."""
    filled, previous = 0, ""
    for span in sorted(spans):
        if span.begin < filled:
            raise _damaged(path, f"{span.name!r} and {previous!r} overlap")
        if span.begin > filled:
            raise _damaged(path, f"{span.begin - filled:,} bytes before {span.name!r} belong to no tensor")
        if span.end > available:
            raise _damaged(
                path,
                f"it is cut off: {span.name!r} ends at data byte {span.end:,} of {available:,}",
            )
        filled, previous = span.end, span.name
    if filled != available:
        raise _damaged(path, f"{available - filled:,} bytes after the last tensor belong to no tensor")


def user_cache_folder() -> Path:
    """$BURNISH_CACHE, or ~/.cache/burnish."""
    return Path(os.environ.get("BURNISH_CACHE") or Path.home() / ".cache" / "burnish").expanduser()
