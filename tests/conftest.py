"""What all tests share: no network, and tiny pipelines built once per session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before any import of huggingface_hub or transformers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread per test process: the sums come out in the same order everywhere, and two processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

TinyFolder = Callable[[str], Path]

# Warnings are errors; these come from inside a library, where no caller can avoid them.
UPSTREAM_WARNINGS = (
    # diffusers' ChatGLM, Kolors' text encoder, compiles an activation as torch once wished.
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
    # diffusers' ChromaTransformer2DModel takes its position embedding from where it used to be.
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning",
    # diffusers' EulerDiscreteScheduler gives a torch tensor to numpy, whose `copy` argument torch lacks.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in UPSTREAM_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the cache of the person who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BURNISH_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """Folder of a tiny pipeline by name (sd15, sdxl, flux, flux_schnell), built on first use; read only."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            from tiny_pipelines import build

            folders[name] = tmp_path_factory.mktemp("tiny") / name
            build(name, folders[name])
        return folders[name]

    return folder_of


@pytest.fixture(scope="session")
def tiny_sd15(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("sd15")


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("sdxl")


@pytest.fixture(scope="session")
def tiny_flux(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("flux")


@pytest.fixture(scope="session")
def tiny_flux_schnell(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("flux_schnell")
