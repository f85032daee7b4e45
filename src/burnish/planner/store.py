"""Profiles kept on disk: a trace takes seconds, and the same step is planned at every start of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from burnish import __version__
from burnish.atomic import atomic_write_text
from burnish.planner.profile import Profile

PLANNER_VERSION = 1  # raise when the same step would be counted otherwise


class ProfileStore:
    """Profiles by the hash of all that a trace depends on; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def profile(self, facts: Mapping[str, Any], trace: Callable[[], Profile]) -> Profile:
        """The stored profile of these facts, or a new one. `facts` must be plain values."""
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        versions["burnish"] = __version__
        told = json.dumps(
            {"facts": facts, "planner": PLANNER_VERSION, **versions}, sort_keys=True, default=str
        )
        name = hashlib.blake2b(told.encode(), digest_size=20).hexdigest()
        path = self.folder / f"{name}.json" if self.folder is not None else None
        found = _read(path) if path is not None else None
        if found is not None:
            return found
        profile = trace()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps(profile.as_json()))
        return profile


def _read(path: Path) -> Profile | None:
    """None where nothing is stored, or something that this version cannot read."""
    try:
        return Profile.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None
