"""Where a config is, and what the paths in it mean.

Relative paths in a config file start at that file's folder, so that a config can be run from anywhere. Two
start at the working directory instead: `save.folder`, and what `--set` gives, where a shell completes paths.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

from burnish.config.document import Document
from burnish.config.problems import KeyPath
from burnish.config.schema import RunConfig
from burnish.config.section import Section
from burnish.config.suggest import nearest
from burnish.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json")
CONFIG_FOLDER = "config"
BUNDLED_MODEL = "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_AnySection = TypeVar("_AnySection", bound=Section)


def find_config(reference: str | Path) -> Path:
    """The file that a full path, a relative path, or a bare name in ./config names, with or without suffix.

    Raises:
        ConfigError: there is no such file; says where was looked and which names are near.
    """
    given = Path(reference).expanduser()
    is_bare = len(given.parts) == 1 and not given.is_absolute()
    folders = [Path(), Path(CONFIG_FOLDER)] if is_bare else [Path()]
    names = (
        [given] if given.suffix.lower() in SUFFIXES else [given, *(Path(f"{given}{end}") for end in SUFFIXES)]
    )
    looked = [folder / name for folder in folders for name in names]
    try:
        for candidate in looked:
            if candidate.is_file():
                return candidate
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise ConfigError(f"{str(reference)!r} cannot be a file: {error}") from error
    places = ", ".join(str(candidate) for candidate in looked)
    what = "is a folder, not a config file" if given.is_dir() else "not found"
    near = _near_name(given, [folder / given.parent for folder in folders])
    raise ConfigError(
        f"config {str(reference)!r} {what}; looked at {places}",
        remedy=f"did you mean {near}?"
        if near
        else "`burnish config init FAMILY` writes a config to begin with",
    )


def _near_name(given: Path, folders: list[Path]) -> str | None:
    found: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
            found.update({path.stem: path for path in files})
    near = nearest(given.stem, found)
    return str(found[near]) if near else None


def with_full_paths(config: RunConfig, document: Document, config_folder: Path) -> RunConfig:
    """`config` with every path made absolute, but for `save.folder`."""
    base = config_folder.resolve()

    def start(path: KeyPath) -> Path:
        return Path.cwd() if document.place(path).is_override else base

    def absolute(path: KeyPath, value: Path) -> Path:
        if path == ("save", "folder"):
            return value.expanduser()
        return Path(os.path.normpath(start(path) / value.expanduser()))

    resolved: RunConfig = _resolved(config, (), absolute)
    where = _model_path(resolved.model.path, start(("model", "path")))
    return resolved.model_copy(update={"model": resolved.model.model_copy(update={"path": where})})


def _model_path(path: str, start: Path) -> str:
    """A file or a folder made absolute; a Hub id and the bundled model stay as they are.

    `owner/name` is a Hub id unless it exists below `start`; write `./owner/name` for a folder still to come.
    """
    if path == BUNDLED_MODEL:
        return path
    full = Path(os.path.normpath(start / Path(path).expanduser()))
    is_hub_id = _HUB_ID.fullmatch(path) and not path.endswith(".safetensors") and not path.startswith(".")
    return path if is_hub_id and not full.exists() else str(full)


def _resolved(section: _AnySection, path: KeyPath, absolute: Any) -> _AnySection:
    changes = {}
    for name in type(section).model_fields:
        before = getattr(section, name)
        after = _resolved_value(before, (*path, name), absolute)
        if after is not before:
            changes[name] = after
    return section.model_copy(update=changes) if changes else section


def _resolved_value(value: Any, path: KeyPath, absolute: Any) -> Any:
    if isinstance(value, Section):
        return _resolved(value, path, absolute)
    if isinstance(value, Path):
        return absolute(path, value)
    if isinstance(value, list):
        return [_resolved_value(item, (*path, index), absolute) for index, item in enumerate(value)]
    return value
