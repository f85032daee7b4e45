"""Laws that are about the source itself (L7): no pickle, no eval, no shell, weights only."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "pickle": r"^\s*(import|from)\s+(pickle|dill|joblib|shelve|marshal)\b",
    "torch.load without weights_only": r"torch\.load\((?!.*weights_only=True)",
    "eval or exec": r"(?<![\w.])(?<!def )(eval|exec)\(",
    "a shell": r"shell=True|os\.system\(|os\.popen\(",
    "yaml.load": r"\byaml\.load\(",
    "numpy object arrays": r"allow_pickle=True",
}
REQUIRED_BY = {"pydantic_core": "pydantic", "httpx2": "huggingface-hub"}
"""Packages imported here that are always there with another one: parts of what that one offers."""


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_the_source_has_none(what: str) -> None:
    files = sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "tools").rglob("*.py"))
    assert len(files) > 60
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    hits = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in files
        for match in pattern.finditer(file.read_text())
    ]
    assert hits == []


def test_no_family_is_named_outside_the_families() -> None:
    """What differs between families is data or a method of theirs: nothing else may ask for a name (STYLE)."""
    pattern = re.compile(r"family\.name\s*(==|in)|[\"'](sd15|sdxl|flux)[\"']")
    files = [file for file in (ROOT / "src").rglob("*.py") if file.parent.name != "families"]
    hits = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in files
        for match in pattern.finditer(file.read_text())
    ]
    assert hits == []


def distribution_name(requirement: str) -> str:
    """The name alone of a requirement or a distribution, as package indexes compare names."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def imported_packages(file: Path) -> set[str]:
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(str(node.module).partition(".")[0])
    return imported


def test_every_imported_package_is_declared() -> None:
    """What happens to be installed on one machine is missing on the next one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {distribution_name(requirement) for group in groups for requirement in group}
    distributions = packages_distributions()
    files = [file for folder in ("src", "tests", "tools") for file in (ROOT / folder).rglob("*.py")]
    own = {"burnish", "tools"} | {
        path.stem for path in (ROOT / "tests").rglob("*") if path.suffix in ("", ".py")
    }
    undeclared = {
        f"{file.relative_to(ROOT)}: {package}"
        for file in files
        for package in imported_packages(file) - own - sys.stdlib_module_names
        for named in [distributions.get(package, [])]
        if named
        and not declared & {distribution_name(name) for name in [*named, REQUIRED_BY.get(package, package)]}
    }
    assert undeclared == set()
