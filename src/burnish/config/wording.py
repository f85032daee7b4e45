"""pydantic's errors in the words of this project: where, what is allowed, what was found, what was meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from burnish.config.document import Document
from burnish.config.problems import KeyPath, Problem, starts_with
from burnish.config.section import Section
from burnish.config.shape import Location, alternatives, is_scalar, is_section, kind_of, locate
from burnish.config.suggest import called_elsewhere, nearest, unknown_key_hint

MAX_SHOWN = 60
MISSING = "missing;"

_SCALAR_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
_WRONG_SHAPE = ("_type", "_parsing", "literal_error")


def problems_from(error: ValidationError, document: Document, root: type[Section]) -> list[Problem]:
    """Every error as a problem; several about one value of a union become one."""
    problems: dict[tuple[KeyPath, str], Problem] = {}
    for details in error.errors(include_url=False):
        found = _judged(details, document.values, root)
        if found is None or any(starts_with(found[0], spoiled) for spoiled in document.spoiled):
            continue
        problems[found] = Problem(document.place(found[0]), *found)
    return [problem for problem in problems.values() if not _is_misspelt(problem, problems)]


def _is_misspelt(problem: Problem, found: Iterable[tuple[KeyPath, str]]) -> bool:
    """Whether a key that is missing was meant by another one beside it: said once is enough."""
    *section, key = problem.path or ("",)
    if not problem.text.startswith(MISSING):
        return False
    return any(path[:-1] == tuple(section) and text.endswith(f"did you mean {key}?") for path, text in found)


def shown(value: Any) -> str:
    """A value as the user may recognise it, cut to a line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing (null)"
    kind = "a mapping " if isinstance(value, dict) else "a list " if isinstance(value, list) else ""
    text = repr(value)
    return kind + (text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}...")


def _judged(details: ErrorDetails, values: Any, root: type[Section]) -> tuple[KeyPath, str] | None:
    """(path, text), or None for an error of a union's branch that was not meant."""
    location = locate(root, details["loc"])
    for fork in location.forks:
        if fork.is_tagged:
            continue
        value = _value_at(values, fork.path)
        if not any(_fits(member, value) for member in fork.members):
            return fork.path, f"should be {_either(map(_name, fork.members))}; got {shown(value)}"
        if not _fits(fork.chosen, value):
            return None
        if location.path == fork.path and details["type"].endswith(_WRONG_SHAPE):
            hint = _literal_hint(fork.members, value)
            return fork.path, f"should be {_either(map(_name, fork.members))}; got {shown(value)}{hint}"
    return location.path, _text(details, location, values, root)


def _text(details: ErrorDetails, location: Location, values: Any, root: type[Section]) -> str:
    value, kind = details["input"], details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(location, values, root)
    if kind == "missing":
        return f"{MISSING} {_description(location)}"
    if kind == "value_error":
        return details["msg"].removeprefix("Value error, ")
    if kind == "union_tag_invalid":
        kinds = [str(kind_of(member)) for member in alternatives(location.type)]
        near = nearest(str(value.get("kind")), kinds)
        return _sentence(f"no such kind; allowed: {', '.join(kinds)}; got {shown(value.get('kind'))}", near)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return _not_a_mapping(location, value)
    if kind == "list_type":
        return f"should be a list, each entry on a line that begins with `- `; got {shown(value)}"
    if kind == "literal_error":
        return f"{details['msg']}; got {shown(value)}{_literal_hint(alternatives(location.type), value)}"
    if kind == "string_type" and isinstance(value, int | float):
        return f"should be text; got the number {value!r}; put it in quotes"
    if kind == "path_type":
        return f"should be a path; got {shown(value)}"
    return f"{details['msg']}; got {shown(value)}"


def _unknown_key(location: Location, values: Any, root: type[Section]) -> str:
    key, owner = str(location.path[-1]), location.owner
    if owner is None:
        return "no such option"
    for fork in location.forks:
        if not fork.is_tagged or fork.path != location.path[:-1]:
            continue
        meant = key if any(key in one.model_fields for one in fork.members) else called_elsewhere(key)
        others = [member for member in fork.members if meant in member.model_fields]
        if others and meant not in owner.model_fields:
            given = _value_at(values, (*fork.path, "kind"))
            why = "" if given else f" (no kind is given, which means {kind_of(owner)})"
            kinds = _either(str(kind_of(member)) for member in others)
            return f"no such option of kind {kind_of(owner)}{why}; {meant} belongs to kind {kinds}"
    prefix = "".join("[]" if isinstance(part, int) else f".{part}" for part in location.path[:-1]).lstrip(".")
    return unknown_key_hint(key, tuple(owner.model_fields), root, prefix)


def _not_a_mapping(location: Location, value: Any) -> str:
    sections = [member for member in alternatives(location.type) if is_section(member)]
    if value is None:
        return "nothing is given below this key; leave the key out to have the defaults"
    kinds = [str(kind_of(section)) for section in sections if kind_of(section)]
    near = nearest(value, kinds) if isinstance(value, str) else None
    if near:
        return f"should be a mapping; write {{kind: {near}}}; got {shown(value)}"
    keys = dict.fromkeys(key for section in sections for key in section.model_fields)
    return f"should be a mapping with keys such as {', '.join(list(keys)[:6])}; got {shown(value)}"


def _description(location: Location) -> str:
    field = location.owner.model_fields.get(str(location.path[-1])) if location.owner else None
    return (field.description if field else None) or "it has no default"


def _literal_hint(members: Sequence[Any], value: Any) -> str:
    choices = [
        str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)
    ]
    near = nearest(value, choices) if isinstance(value, str) else None
    return f"; did you mean {near}?" if near else ""


def _sentence(text: str, near: str | None) -> str:
    return f"{text}; did you mean {near}?" if near else text


def _fits(member: Any, value: Any) -> bool:
    if isinstance(value, dict):
        return is_section(member)
    if isinstance(value, list):
        return get_origin(member) in (list, tuple)
    return is_scalar(member)


def _name(member: Any) -> str:
    if is_section(member):
        return f"a mapping with {', '.join(member.model_fields)}"
    if get_origin(member) is tuple:
        return f"a list of {len(get_args(member))}"
    if get_origin(member) is list:
        return "a list"
    if get_origin(member) is Literal:
        return _either(repr(choice) for choice in get_args(member))
    return _SCALAR_NAMES.get(member, str(member))


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(values, dict):
            values = values.get(str(part))
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            return None
    return values


def _either(names: Iterable[str]) -> str:
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} or {listed[-1]}"
