"""Profiles and phases kept on disk: a trace takes seconds, and the same step is planned at every start of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from burnish.atomic import atomic_write_text
from burnish.planner.phases import Phase
from burnish.planner.profile import Profile
from burnish.planner.version import planner_version

Kept = TypeVar("Kept")


class ProfileStore:
    """They by the hash of all that a trace depends on; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def profile(self, facts: Mapping[str, Any], trace: Callable[[], Profile]) -> Profile:
        """The stored profile of these facts, or a new one. `facts` must be plain values."""
        return self._kept(facts, trace, Profile.as_json, Profile.from_json)

    def phase(self, facts: Mapping[str, Any], trace: Callable[[], Phase]) -> Phase:
        """The same of what happens beside steps."""
        return self._kept(facts, trace, asdict, lambda stored: Phase(**stored))

    def _kept(
        self,
        facts: Mapping[str, Any],
        trace: Callable[[], Kept],
        write: Callable[[Kept], dict[str, Any]],
        read: Callable[[dict[str, Any]], Kept],
    ) -> Kept:
        told = json.dumps({"facts": facts, **planner_version()}, sort_keys=True, default=str)
        name = hashlib.blake2b(told.encode(), digest_size=20).hexdigest()
        path = self.folder / f"{name}.json" if self.folder is not None else None
        if path is not None:
            # What is not there, or was written by a version that kept something else, is traced anew.
            with suppress(OSError, ValueError, TypeError, KeyError):
                return read(json.loads(path.read_text(encoding="utf-8")))
        traced = trace()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps(write(traced)))
        return traced
