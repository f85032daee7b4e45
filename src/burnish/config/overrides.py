"""`--set KEY=VALUE`: keys by dots, list items by number, values as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from burnish.config.document import Document, Expand, read_document
from burnish.config.problems import KeyPath, Place, Problem, dotted, starts_with


def apply_overrides(document: Document, overrides: Sequence[str], expand: Expand) -> None:
    """Put each `KEY=VALUE` into `document`, later ones over earlier ones; problems go to its list."""
    for text in overrides:
        place = Place(f"--set {text}", is_override=True)
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problem = "write KEY=VALUE, such as `--set train.steps=100` or `--set data.0.repeats=3`"
            document.problems.append(Problem(place, (), problem))
            continue
        _apply(document, parts, value, place, expand)


def set_value(document: Document, path: KeyPath, value: Any, place: Place) -> None:
    """Put one ready value at a top-level path, such as the name that `--name` gives."""
    document.values[path[0]] = value
    _replace_places(document, path, place)


def _apply(document: Document, parts: list[str], text: str, place: Place, expand: Expand) -> None:
    parsed = read_document(text, label=lambda line: place, expand=expand)
    holder, path, problem = _holder(document, parts, place)
    if problem or parsed.problems:
        shown = tuple(parts)
        document.problems += [Problem(place, shown, found.text) for found in parsed.problems]
        document.problems += [Problem(place, shown, problem)] if problem else []
        document.spoiled.add(path)
        return
    holder[path[-1]] = parsed.values
    _replace_places(document, path, place)
    document.places.update({(*path, *inner): place for inner in parsed.places})


def _replace_places(document: Document, path: KeyPath, place: Place) -> None:
    """What stood at `path` and below is gone, with whatever was wrong there."""
    for known in [known for known in document.places if starts_with(known, path)]:
        del document.places[known]
    document.spoiled = {known for known in document.spoiled if not starts_with(known, path)}
    document.problems = [
        problem for problem in document.problems if not problem.path or not starts_with(problem.path, path)
    ]
    document.places[path] = place


def _holder(document: Document, parts: list[str], place: Place) -> tuple[Any, KeyPath, str]:
    """The dict or list that the last part is a key of, the whole path, and what is in the way or ""."""
    at: Any = document.values
    path: tuple[str | int, ...] = ()
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        here = f"`{dotted(path)}`" if path else "the config"
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                entries = f"entries 0 to {len(at) - 1}" if at else "no entries"
                return at, (*path, part), f"{here} is a list with {entries}; got {part!r} as its number"
            path = (*path, int(part))
        elif isinstance(at, dict):
            path = (*path, part)
            if not is_last and at.get(part) is None:
                at[part] = {}
                document.places[path] = place
        else:
            return at, (*path, part), f"{here} is {at!r}, so it has no `{part}`"
        if is_last:
            break
        at = at[path[-1]]
    return at, path, ""
