"""Schema, full view, starter configs and the examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from burnish.cli.configs import starter_facts
from burnish.cli.main import app
from burnish.config.data import Folder, Generated
from burnish.config.describe import SCHEMA_FILE, json_schema, show, starter
from burnish.config.load import load_config
from burnish.config.schema import RunConfig
from burnish.config.shape import all_sections
from burnish.families.registry import family_names

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_family_has_an_example_and_every_example_loads() -> None:
    files = sorted(EXAMPLES.glob("*.yaml"))
    shown = set()
    for file in files:
        config = load_config(file).config
        assert config.model.family in family_names()
        shown.add(config.model.family)
        assert config.sample.prompts, file
        first, *_ = file.read_text().splitlines()
        assert first == f"# yaml-language-server: $schema={SCHEMA_FILE}"
    assert shown == set(family_names())


@pytest.mark.parametrize("name", family_names())
def test_starter_loads_and_fits_its_family(name: str, folder: Path) -> None:
    result = CliRunner().invoke(app, ["config", "init", name, "--output", "mine.yaml"])
    assert result.exit_code == 0, result.stderr
    text = (folder / "mine.yaml").read_text()
    assert text.startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n")
    config = load_config("mine").config
    facts = starter_facts(name)
    assert config.model.family == name
    assert config.method.targets in facts.target_sets
    assert config.data[0].resolutions == [facts.size[0]]
    assert config.sample.steps == facts.steps
    assert config.sample.guidance == facts.guidance
    assert "[trigger]" in text
    assert max(map(len, text.splitlines())) <= 120


def test_dreambooth_is_a_subject_beside_its_class(folder: Path) -> None:
    """Every family's: as the paper has it (arXiv 2208.12242, section 3), subject and class count alike."""
    for name in family_names():
        (folder / "mine.yaml").write_text(starter(starter_facts(name), "dreambooth", "old cat"))
        config = load_config("mine").config
        subject, drawn = config.data
        assert isinstance(subject, Folder)
        assert isinstance(drawn, Generated)
        assert subject.captions.default == f"a photo of {config.trigger} old cat"
        assert (drawn.role, drawn.prompts, drawn.weight) == ("regularization", ["a photo of a old cat"], 1.0)
        assert subject.resolutions == drawn.resolutions == [min(starter_facts(name).size)]
        assert drawn.count == 5 * subject.repeats
        assert config.sample.prompts[0] == drawn.prompts[0]
        assert "[trigger]" not in show(config)
        assert max(map(len, (folder / "mine.yaml").read_text().splitlines())) <= 120
    told = ["config", "init", name, "--preset", "dreambooth", "--class", "old cat"]
    assert CliRunner().invoke(app, told).stdout == starter(starter_facts(name), "dreambooth", "old cat")
    alone = CliRunner().invoke(app, ["config", "init", name, "--class", "cat"])
    assert alone.exit_code == 2
    assert "--preset dreambooth" in alone.stderr


def test_starter_is_not_written_over_a_file(folder: Path) -> None:
    (folder / "mine.yaml").write_text("precious")
    name = family_names()[0]
    result = CliRunner().invoke(app, ["config", "init", name, "-o", "mine.yaml"])
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert (folder / "mine.yaml").read_text() == "precious"
    assert CliRunner().invoke(app, ["config", "init", name, "-o", "mine.yaml", "--force"]).exit_code == 0
    assert (folder / "mine.yaml").read_text() == starter(starter_facts(name))


def test_starter_of_no_family_names_those_there_are() -> None:
    result = CliRunner().invoke(app, ["config", "init", family_names()[0] + "x"])
    assert result.exit_code == 2
    for name in family_names():
        assert name in result.stderr


def test_schema_file_describes_every_option(folder: Path) -> None:
    result = CliRunner().invoke(app, ["config", "schema", "--output", SCHEMA_FILE])
    assert result.exit_code == 0, result.stderr
    schema = json.loads((folder / SCHEMA_FILE).read_text())
    assert schema == json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    described = 0
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False, section["title"]
        for name, option in section["properties"].items():
            if name != "kind":
                named = schema["$defs"].get(option.get("$ref", "").removeprefix("#/$defs/"), {})
                assert option.get("description") or named.get("description"), (section["title"], name)
                described += 1
    assert described > 100


def test_every_number_has_a_bound() -> None:
    """An option without bounds would let a slip of the finger through to the run."""

    def unbounded(option: dict[str, Any]) -> bool:
        parts = option.get("anyOf", [option])
        bounds = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
        return any(
            part.get("type") in ("integer", "number") and not any(b in part for b in bounds) for part in parts
        )

    checked_elsewhere = {("Objective", "shift"), ("Objective", "guidance")}  # number or word: by a validator
    schema = json_schema()
    found = {
        (section["title"], name)
        for section in [schema, *schema["$defs"].values()]
        for name, option in section["properties"].items()
        if unbounded(option)
    }
    assert found <= checked_elsewhere


def test_every_section_forbids_unknown_keys_and_is_frozen() -> None:
    places = all_sections(RunConfig)
    assert len(places) > 20
    for place in places:
        assert issubclass(place.section, BaseModel)
        assert place.section.model_config["extra"] == "forbid", place
        assert place.section.model_config["frozen"], place


def test_show_is_the_resolved_config(folder: Path) -> None:
    (folder / "run.yaml").write_text("name: a\nmodel: {path: demo}\ndata: [{path: p}]\n")
    result = CliRunner().invoke(app, ["config", "show", "run", "--set", "train.steps=7", "-n", "b"])
    assert result.exit_code == 0
    (folder / "resolved.yaml").write_text(result.stdout)
    again = load_config("resolved").config
    assert (again.name, again.train.steps) == ("b", 7)
    assert show(again) == result.stdout
