"""Laws that are about the source itself (L7): no pickle, no eval, no shell, weights only."""

from __future__ import annotations

import re
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
