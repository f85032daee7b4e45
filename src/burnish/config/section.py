"""What every section of the config has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, forbids unknown keys (law L4), refuses NaN and infinity, keeps a description with every field."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=False,
        str_strip_whitespace=True,
    )
