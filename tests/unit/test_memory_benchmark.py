"""The benchmark of what saves memory runs, and says that nothing but time and memory changed."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from burnish.model import EMBEDDED

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "src" / "burnish" / EMBEDDED / "assets" / "model"


def test_memory_modes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model",
        str(MODEL),
        "--size",
        "64",
        "--steps",
        "1",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["memory_modes.py", *options])
    runpy.run_path(str(ROOT / "tools" / "benchmarks" / "memory_modes.py"), run_name="__main__")
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["activations"], row["stream"], row["offload"]) for row in rows[:2]] == [
        ("keep", 0.0, False),
        ("keep-matmul", 0.0, False),
    ]
    assert len(rows) == 10
    assert {row["apart"] for row in rows} == {0.0}
    assert all(row["ms_per_step"] > 0 for row in rows)
