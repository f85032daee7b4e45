"""What a plan depends on besides its config and the model; imports nothing heavy."""

from __future__ import annotations

from importlib.metadata import version

from burnish import __version__

PLANNER_VERSION = 8  # raise when the same step would be counted otherwise


def planner_version() -> dict[str, str]:
    """Of everything whose change could change what is counted."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {**libraries, "burnish": __version__, "planner": str(PLANNER_VERSION)}
