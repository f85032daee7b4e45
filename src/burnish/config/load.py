"""From a YAML or JSON file to a checked config. All problems are told at once (law L4)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from burnish.config.checks import cross_checks
from burnish.config.document import Document, read_document
from burnish.config.dump import to_yaml
from burnish.config.overrides import apply_overrides, set_value
from burnish.config.paths import find_config, with_full_paths
from burnish.config.problems import Place, Problem, config_error
from burnish.config.schema import RunConfig
from burnish.config.substitute import Environment, fill_in
from burnish.config.wording import problems_from, shown
from burnish.errors import ConfigError

__all__ = ["LoadedConfig", "load_config", "to_yaml"]

MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config, its file, and the resolved YAML: variables, overrides, defaults and paths filled in."""

    config: RunConfig
    path: Path
    text: str


def load_config(
    reference: str | Path,
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Read, complete and check a config.

    Args:
        reference: full path, relative path, or a name in ./config; the suffix may be left out.
        overrides: `KEY=VALUE` each, as `--set` takes them.
        name: instead of the config's `name`.
        environment: variables for `${VAR}`, instead of the process environment.

    Raises:
        ConfigError: the file is not found or not readable, or has problems; the error holds all of them.
    """
    path = find_config(reference)
    source = _display(path)
    variables = Environment(environment, path.resolve().parent)
    document = read_document(
        _read(path, source),
        label=lambda line: Place(f"{source}:{line}", line),
        expand=variables.expand,
        is_json=path.suffix.lower() == ".json",
    )
    config = _checked(document, overrides, name, variables, path)
    if config is None:
        raise config_error(source, document.problems)
    return LoadedConfig(config, path.absolute(), to_yaml(config))


def _checked(
    document: Document, overrides: Sequence[str], name: str | None, variables: Environment, path: Path
) -> RunConfig | None:
    """The config, or None with the reasons in `document.problems`."""
    if not isinstance(document.values, dict):
        if not document.problems:
            document.problems.append(Problem(document.places[()], (), _not_a_config(document.values)))
        return None
    apply_overrides(document, overrides, variables.expand)
    if name is not None:
        set_value(document, ("name",), name, Place(f"--name {name}", is_override=True))
    fill_in(document)
    document.problems += variables.problems
    try:
        config = RunConfig.model_validate(document.values)
    except ValidationError as error:
        document.problems += problems_from(error, document, RunConfig)
        return None
    if document.problems:
        return None
    config = with_full_paths(config, document, path.parent)
    document.problems += cross_checks(config, document)
    return None if document.problems else config


def _not_a_config(values: object) -> str:
    if values is None:
        return "the file is empty; `burnish config init FAMILY` writes a config to begin with"
    return f"should be a mapping with keys such as name, model, data; got {shown(values)}"


def _read(path: Path, source: str) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{source} has {path.stat().st_size} bytes; a config has at most {MAX_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = Place(f"{source}:{line}", line)
        problem = Problem(place, (), f"not UTF-8: byte 0x{content[error.start]:02x}; save the file as UTF-8")
        raise config_error(source, [problem]) from error


def _display(path: Path) -> str:
    """Short where the file is below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
