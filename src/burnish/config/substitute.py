"""`${VAR}` from the environment and `.env` files; `[name]` and `[trigger]` from the config itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.config.document import Document
from burnish.config.problems import KeyPath, Place, Problem

_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Environment:
    """Variables a config may name: from the process, else from `.env` beside the config, else in the cwd."""

    def __init__(self, variables: Mapping[str, str] | None, config_folder: Path) -> None:
        self._variables = os.environ if variables is None else variables
        self._folders = dict.fromkeys((config_folder, Path.cwd()))
        self._from_files: dict[str, str] | None = None  # read when a config first names a variable
        self.problems: list[Problem] = []

    def expand(self, text: str) -> tuple[str, str]:
        """`text` with each `${VAR}` replaced and `$${` read as `${`, and what is wrong with it or ""."""
        wrong: list[str] = []

        def value(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            name = match[1]
            if not match[0].endswith("}") or not _VARIABLE.fullmatch(name):
                wrong.append(
                    f"{match[0]!r} names no variable; write ${{NAME}}, or $${{ for the characters ${{"
                )
                return ""
            found = self._lookup(name)
            if found is None:
                wrong.append(
                    f"the variable {name} is not set, neither in the environment nor in a .env file beside "
                    "the config or in the working directory; set it, or write $${ for the characters ${"
                )
            return found or ""

        return _REFERENCE.sub(value, text), "; ".join(wrong)

    def _lookup(self, name: str) -> str | None:
        if name in self._variables:
            return self._variables[name]
        if self._from_files is None:
            self._from_files = {}
            for folder in self._folders:
                for key, value in self._read(folder / ".env").items():
                    self._from_files.setdefault(key, value)
        return self._from_files.get(name)

    def _read(self, path: Path) -> dict[str, str]:
        from dotenv import dotenv_values

        if not path.is_file():
            return {}
        try:
            values = dotenv_values(path, interpolate=False, encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(Problem(Place(str(path), 0), (), f"cannot be read: {error}"))
            return {}
        return {key: value for key, value in values.items() if value is not None}


def fill_in(document: Document) -> None:
    """Replace `[name]` and `[trigger]` in every text; `[trigger]` without a trigger is a problem."""
    values = document.values
    if not isinstance(values, dict):
        return
    name, trigger = values.get("name"), values.get("trigger")
    words = {"[name]": name if isinstance(name, str) else None}
    if isinstance(trigger, str):
        if "[trigger]" in trigger:
            problem = Problem(
                document.place(("trigger",)), ("trigger",), "[trigger] stands in the trigger itself"
            )
            document.problems.append(problem)
            return
        trigger = values["trigger"] = _replaced(trigger, words, document, ("trigger",))
    words["[trigger]"] = trigger if isinstance(trigger, str) else None
    for key in values:
        if key not in ("name", "trigger"):
            values[key] = _filled(values[key], words, document, (key,))


def _filled(value: Any, words: Mapping[str, str | None], document: Document, path: KeyPath) -> Any:
    if isinstance(value, str):
        return _replaced(value, words, document, path)
    if isinstance(value, dict):
        return {key: _filled(inner, words, document, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, words, document, (*path, index)) for index, inner in enumerate(value)]
    return value


def _replaced(text: str, words: Mapping[str, str | None], document: Document, path: KeyPath) -> str:
    for placeholder, word in words.items():
        if placeholder not in text:
            continue
        key = placeholder.strip("[]")
        if word is None and (key,) not in document.spoiled:
            message = (
                f"uses {placeholder}, but `{key}` is not set; add `{key}: ...` at the top level; got {text!r}"
            )
            document.problems.append(Problem(document.place(path), path, message))
        text = text.replace(placeholder, word or "")
    return text
