"""What every section of the config has in common."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


class Section(BaseModel):
    """Frozen; forbids unknown keys (law L4), refuses NaN and infinity, describes every field."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=False,
        str_strip_whitespace=True,
    )

    @model_validator(mode="before")
    @classmethod
    def true_is_no_number(cls, values: Any) -> Any:
        """`steps: true` would otherwise be one step."""
        if not isinstance(values, dict):
            return values
        numbers = {name for name, field in cls.model_fields.items() if not _takes_boolean(field.annotation)}
        return {key: _without_booleans(value) if key in numbers else value for key, value in values.items()}


@dataclass(frozen=True, slots=True)
class Boolean:
    """true or false where neither is allowed: no type accepts it."""

    value: bool

    def __repr__(self) -> str:
        return str(self.value).lower()


def default_kind(kind: str) -> BeforeValidator:
    """For a tagged union: the variant that applies where `kind` is absent."""

    def add(value: Any) -> Any:
        return {**value, "kind": kind} if isinstance(value, dict) and "kind" not in value else value

    return BeforeValidator(add)


def _without_booleans(value: Any) -> Any:
    if isinstance(value, bool):
        return Boolean(value)
    return [_without_booleans(item) for item in value] if isinstance(value, list) else value


def _takes_boolean(annotation: Any) -> bool:
    if annotation in (bool, Any):
        return True
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, tuple):
        return any(map(_takes_boolean, get_args(annotation)))
    return False
