"""Files of prompts: one per line, with options as kohya's prompt files have them, or JSON objects."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from burnish.errors import UserError

_OPTION = re.compile(r"(?:^|\s)--([A-Za-z]+)(?=\s|$)")
_LETTERS = {
    "n": "negative",
    "d": "seed",
    "w": "width",
    "h": "height",
    "s": "steps",
    "g": "guidance",
    "l": "guidance",  # kohya's files know two kinds of guidance; a family here has one
    "f": "frames",
    "i": "references",
    "m": "mask",
}
_TEXTS = ("prompt", "negative", "references", "mask")
_WHOLE = {
    "seed": (0, 2**63 - 1),
    "width": (16, 8192),
    "height": (16, 8192),
    "steps": (1, 1000),
    "frames": (1, 1025),
}
_GUIDANCE = (0.0, 50.0)


class _Mistake(Exception):
    """What is wrong with one line."""


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file; None where the line leaves a setting open. Sizes in pixels."""

    prompt: str
    line: int
    negative: str = ""
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    references: tuple[Path, ...] = ()
    mask: Path | None = None


def read_prompts(path: Path) -> list[PromptLine]:
    """Prompts of a .txt file (a line each, `--n negative --d seed --w --h --s steps --g guidance --f frames
    --i reference --m mask`) or .jsonl file. `--i` may be repeated; paths are relative to the file's folder.

    Empty lines and lines that begin with `#` are passed over. A line of JSON may stand in a .txt file too. An
    `--option` that is none of these ends with an error rather than in the prompt.

    Raises:
        UserError: the file cannot be read or holds no prompt; or all lines at fault, by number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"The prompt file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"The prompt file {path} is not UTF-8 (byte {error.start}).", remedy="Save it as UTF-8."
        ) from error

    found: list[PromptLine] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            as_json = path.suffix == ".jsonl" or line.startswith("{")
            one = _from_json(line, number) if as_json else _from_text(line, number)
            found.append(_with_full_paths(one, path.parent))
        except _Mistake as error:
            problems.append(f"{path}:{number}  {error}")
    if problems:
        raise UserError("\n".join([f"{len(problems)} problem(s) in {path}", *problems]))
    if not found:
        raise UserError(f"The prompt file {path} holds no prompt.", remedy="Write one prompt per line.")
    return found


def _with_full_paths(one: PromptLine, folder: Path) -> PromptLine:
    return replace(
        one,
        references=tuple(folder / path.expanduser() for path in one.references),
        mask=folder / one.mask.expanduser() if one.mask is not None else None,
    )


def _from_text(line: str, number: int) -> PromptLine:
    matches = list(_OPTION.finditer(line))
    prompt = line[: matches[0].start()].strip() if matches else line
    values: dict[str, Any] = {}
    for index, match in enumerate(matches):
        end = matches[index + 1].start() if index + 1 < len(matches) else len(line)
        letter = match[1]
        value: Any = line[match.end() : end].strip()
        name = _LETTERS.get(letter)
        if name is None:
            known = ", ".join(f"--{known}" for known in _LETTERS if known != "l")
            raise _Mistake(f"no option --{letter}; known: {known}")
        if name == "references":
            value = [*values.get(name, ()), value]
        elif name in values:
            raise _Mistake(f"{name} is given twice")
        values[name] = value if name in _TEXTS else _number(name, value)
    return _prompt_line({"prompt": prompt, **values}, number)


def _from_json(line: str, number: int) -> PromptLine:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise _Mistake(f"not a JSON object: {error}") from error
    if not isinstance(entry, dict):
        raise _Mistake(f"should be a JSON object, got {line[:40]}")
    known = ("prompt", *dict.fromkeys(_LETTERS.values()))
    for name, value in entry.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise _Mistake(f"no such entry {name!r}; {hint}")
        if name == "references" and isinstance(value, list):
            if not all(isinstance(file, str) for file in value):
                raise _Mistake(f"references should be texts, got {value!r}")
            continue
        wants_text = name in _TEXTS
        if wants_text != isinstance(value, str) or isinstance(value, bool):
            raise _Mistake(f"{name} should be a {'text' if wants_text else 'number'}, got {value!r}")
    numbers = {name: _number(name, str(entry[name])) for name in entry if name not in _TEXTS}
    if isinstance(entry.get("references"), str):
        entry["references"] = [entry["references"]]
    return _prompt_line({**entry, **numbers}, number)


def _number(name: str, text: str) -> int | float:
    """A setting's value within its bounds."""
    kind: Callable[[str], int | float] = int if name in _WHOLE else float
    low, high = _WHOLE.get(name, _GUIDANCE)
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not low <= value <= high:  # also False for NaN
        what = "a whole number" if name in _WHOLE else "a number"
        raise _Mistake(f"{name} should be {what} from {low} to {high}, got {text!r}")
    return value


def _prompt_line(values: dict[str, Any], number: int) -> PromptLine:
    if not values.get("prompt", "").strip():
        raise _Mistake("has no prompt")
    files = [*values.get("references", ()), *([values["mask"]] if "mask" in values else [])]
    if not all(file.strip() for file in files):
        raise _Mistake("names no file for its reference or mask")
    references = tuple(Path(file) for file in values.pop("references", ()))
    mask = Path(values.pop("mask")) if "mask" in values else None
    return PromptLine(line=number, references=references, mask=mask, **values)
