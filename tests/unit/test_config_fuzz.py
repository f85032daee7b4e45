"""Random damage to example configs: they load to something or raise ConfigError, never anything else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.config.load import LoadedConfig, load_config
from burnish.config.schema import RunConfig
from burnish.config.shape import all_sections
from burnish.errors import ConfigError
from burnish.families.registry import family_names

EXAMPLES = Path(__file__).parents[2] / "examples"
MUTATIONS = 2000
KEYS = sorted({key for place in all_sections(RunConfig) for key in place.section.model_fields})
# fmt: off
ODD_VALUES = (
    "", "~", "null", "true", "no", "0", "-1", "1e-4", "1e999", ".nan", ".inf", "-.INF", "nan", "0x1F", "0o7", "1_000",
    "+5", "1.", ".5", "e5", "1e5e5", "9" * 30, "9" * 5000, "[]", "{}", "[[]]", "{a: b}", "[1, 2]", "''", '""', "|", ">",
    "*x", "&x 1", "&x", "<<:", "?", "-", ":", "@a", "`a", "!!python/object:x y", "!!int a", "!x", "'", "${HOME}",
    "${UNSET_BY_TEST}", "$${X}", "${", "[trigger]", "'[trigger]'", "'[name]'", "2026-01-01", "12:30:45",
    '"\\ud83d"', '"\\Uffffffff"', '"\\x00"', "\U0001f600", "\u2028", "#", "%YAML", "---", "...",
)
# fmt: on


def delete_line(lines: list[str], draw: random.Random) -> None:
    del lines[draw.randrange(len(lines))]


def repeat_line(lines: list[str], draw: random.Random) -> None:
    lines.insert(draw.randrange(len(lines)), draw.choice(lines))


def swap_lines(lines: list[str], draw: random.Random) -> None:
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]


def change_indentation(lines: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(lines))
    lines[at] = draw.choice([" ", "  ", "\t", "    ", "- ", ""]) + lines[at].lstrip(draw.choice([" ", " -"]))


def change_value(lines: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(lines))
    lines[at] = lines[at].partition(":")[0] + ": " + draw.choice(ODD_VALUES)


def change_key(lines: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(lines))
    before, colon, after = lines[at].partition(":")
    indent = before[: len(before) - len(before.lstrip(" -"))]
    lines[at] = indent + draw.choice(KEYS) + colon + after


def insert_key(lines: list[str], draw: random.Random) -> None:
    line = " " * draw.choice([0, 2, 4]) + f"{draw.choice(KEYS)}: {draw.choice(ODD_VALUES)}"
    lines.insert(draw.randrange(len(lines) + 1), line)


def damage_characters(lines: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(lines))
    characters = list(lines[at])
    for _ in range(draw.randint(1, 4)):
        where = draw.randrange(len(characters) + 1)
        characters[where : where + draw.randint(0, 2)] = draw.choice(
            "abz019:-[]{}#&*!|>'\"%@`,?.\t $~\\\x00\x7fé"
        )
    lines[at] = "".join(characters)


MUTATORS: tuple[Callable[[list[str], random.Random], None], ...] = (
    delete_line,
    repeat_line,
    swap_lines,
    change_indentation,
    change_value,
    change_key,
    insert_key,
    damage_characters,
)


def load_or_refusal(file: Path, overrides: list[str]) -> LoadedConfig | ConfigError:
    try:
        return load_config(file, overrides=overrides)
    except ConfigError as error:
        return error


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_damaged_config_loads_or_is_refused(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNSET_BY_TEST", raising=False)
    text = "\n".join(
        line
        for line in (EXAMPLES / example).read_text().splitlines()
        if line.strip() and line.strip()[0] != "#"
    )
    draw = random.Random(f"damage {example}")
    file = tmp_path / "run.yaml"
    loaded = refused = 0
    for _ in range(MUTATIONS // 4 + 1):
        lines = text.splitlines()
        for _ in range(draw.choice([1, 1, 2, 3])):
            draw.choice(MUTATORS)(lines, draw)
        file.write_text("\n".join(lines), encoding="utf-8")
        override = (
            [f"{draw.choice(KEYS)}.{draw.choice(KEYS)}={draw.choice(ODD_VALUES)}"]
            if draw.random() < 0.1
            else []
        )
        result = load_or_refusal(file, override)
        if isinstance(result, ConfigError):
            refused += 1
            assert result.problems, str(result)
            assert all(problem.startswith(("run.yaml:", "--set ")) for problem in result.problems), str(
                result
            )
        else:
            loaded += 1
            file.write_text(result.text, encoding="utf-8")
            assert load_config(file).config == result.config
    assert loaded >= 20, "so much damage says nothing about what loads"
    assert refused >= 20


def test_the_examples_are_found() -> None:
    assert len(list(EXAMPLES.glob("*.yaml"))) >= len(family_names())
