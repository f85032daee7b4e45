"""What is wrong with a config: each problem with its place, its key path and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from burnish.errors import ConfigError

KeyPath = tuple[str | int, ...]

_BEYOND_THE_FILE = 1 << 30


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value came from. `label` is what is shown: `run.yaml:3`, or `--set train.steps=0`."""

    label: str
    line: int = _BEYOND_THE_FILE  # from 1; overrides come after every line of the file
    column: int = 0
    is_override: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    place: Place
    path: KeyPath
    text: str

    def __str__(self) -> str:
        head = f"{self.place.label}  {dotted(self.path)}".rstrip()
        body = "\n".join(f"    {line}" for line in self.text.splitlines())
        return f"{head}\n{body}"


def dotted(path: KeyPath) -> str:
    """`("data", 0, "path")` as the user writes it after `--set`: `data.0.path`."""
    return ".".join(str(part) for part in path)


def starts_with(path: KeyPath, prefix: KeyPath) -> bool:
    return path[: len(prefix)] == prefix


def config_error(source: str, problems: Iterable[Problem]) -> ConfigError:
    """One error for all problems, ordered as they stand in the file."""
    ordered = sorted(problems, key=lambda problem: (problem.place.line, problem.place.column))
    texts = tuple(dict.fromkeys(str(problem) for problem in ordered))
    count = "1 problem" if len(texts) == 1 else f"{len(texts)} problems"
    body = "\n".join(f"  {line}" for text in texts for line in text.splitlines())
    return ConfigError(f"{count} in {source}\n{body}", problems=texts)
