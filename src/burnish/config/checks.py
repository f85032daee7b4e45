"""What no single section can judge."""

from __future__ import annotations

import os
from pathlib import Path

from burnish.config.data import Folder
from burnish.config.document import Document
from burnish.config.problems import Problem
from burnish.config.schema import RunConfig


def cross_checks(config: RunConfig, document: Document) -> list[Problem]:
    """Problems between sections; `config` has its full paths."""
    run_folder = Path(os.path.realpath(config.save.folder / config.name))
    problems = []
    for index, source in enumerate(config.data):
        if not isinstance(source, Folder):
            continue
        pictures = Path(os.path.realpath(source.path))
        if run_folder.is_relative_to(pictures):
            path = ("data", index, "path")
            text = (
                f"the run would write to {run_folder}, inside this folder of pictures {pictures}, "
                "and find its own samples there; set save.folder to a folder elsewhere"
            )
            problems.append(Problem(document.place(path), path, text))
    return problems
