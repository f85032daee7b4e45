"""A config back to YAML."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML

from burnish.config.schema import RunConfig


def to_yaml(config: RunConfig) -> str:
    """Every option with its value, defaults included; reading it again gives an equal config."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(_escaped(config.model_dump(mode="json")), stream)
    return stream.getvalue()


def _escaped(value: Any) -> Any:
    """`${` written so that reading does not look for a variable."""
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value
