"""The schema as a reader sees it: which sections there are, and where a key path of the user leads."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from burnish.config.problems import KeyPath
from burnish.config.section import Section


@dataclass(frozen=True, slots=True)
class SectionPlace:
    """A section and where it stands: `train.optimizer.`, `data[].captions.`; "" is the top level."""

    prefix: str
    section: type[Section]


@dataclass(frozen=True, slots=True)
class Fork:
    """A union on the way: what could have stood at `path`, and the branch that an error is about."""

    path: KeyPath
    members: tuple[Any, ...]
    chosen: Any

    @property
    def is_tagged(self) -> bool:
        return all(is_section(member) and kind_of(member) for member in self.members)


@dataclass(frozen=True, slots=True)
class Location:
    """Where an error of pydantic lies, in the user's terms."""

    path: KeyPath
    type: Any  # what belongs there; Any behind an unknown key
    owner: type[Section] | None  # the section that the last key was looked up in
    forks: tuple[Fork, ...]


def is_section(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, Section)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union without None, or the one type it is; `Annotated` is looked through."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    members = [member for argument in get_args(annotation) for member in alternatives(argument)]
    return tuple(member for member in members if member is not type(None))


def kind_of(section: type[Section]) -> str | None:
    """The tag of a variant, such as `adamw`; None for a section without `kind`, or with several."""
    kind = section.model_fields.get("kind")
    choices = get_args(kind.annotation) if kind and get_origin(kind.annotation) is Literal else ()
    return str(choices[0]) if len(choices) == 1 else None


@cache
def all_sections(root: type[Section]) -> tuple[SectionPlace, ...]:
    """Every section below `root`, itself first."""
    return tuple(_walk(root, ""))


def _walk(section: type[Section], prefix: str) -> Iterator[SectionPlace]:
    yield SectionPlace(prefix, section)
    for name, field in section.model_fields.items():
        for inner, mark in _inner_sections(field.annotation):
            yield from _walk(inner, f"{prefix}{name}{mark}.")


def _inner_sections(annotation: Any) -> Iterator[tuple[type[Section], str]]:
    for member in alternatives(annotation):
        if get_origin(member) is list:
            yield from ((inner, "[]" + mark) for inner, mark in _inner_sections(get_args(member)[0]))
        elif is_section(member):
            yield member, ""


def locate(root: type[Section], location: tuple[str | int, ...]) -> Location:
    """Translate pydantic's error location.

    pydantic puts the branch of a union between the keys, as in `train.optimizer.adamw.betas`; the user has no
    such key.
    """
    path: KeyPath = ()
    at: Any = root
    owner: type[Section] | None = None
    forks: list[Fork] = []
    for part in location:
        members = alternatives(at)
        if len(members) > 1 and isinstance(part, str):
            at = _branch(members, part)
            forks.append(Fork(path, members, at))
            continue
        owner = members[0] if is_section(members[0]) else None
        path = (*path, part)
        at = _step(members[0], part)
    return Location(path, at, owner, tuple(forks))


def _branch(members: tuple[Any, ...], label: str) -> Any:
    """The member that pydantic calls `label`: a tag, a class name, `tuple[...]`, or some scalar's name."""
    for member in members:
        if is_section(member) and label in (kind_of(member), member.__name__):
            return member
        if get_origin(member) in (list, tuple) and label.startswith(get_origin(member).__name__):
            return member
    return next((member for member in members if is_scalar(member)), members[0])


def is_scalar(member: Any) -> bool:
    return not is_section(member) and get_origin(member) not in (list, tuple)


def _step(member: Any, part: str | int) -> Any:
    if is_section(member):
        return member.model_fields[part].annotation if part in member.model_fields else Any
    arguments = get_args(member)
    if get_origin(member) is list:
        return arguments[0]
    if get_origin(member) is tuple and isinstance(part, int):
        return arguments[min(part, len(arguments) - 1)]
    return Any
