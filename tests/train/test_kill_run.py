"""kill -9 at random moments of saving: always loadable, and the run that goes on ends in the same hash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill_often import config_for
from runs import digest, last_checkpoint, picture_folder, short_prompts

from burnish.events import Listener
from burnish.run import train_run

KILLS = 40


@pytest.mark.slow
def test_forty_kills_while_saving(tiny_flux: Path, tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "pictures")
    model = short_prompts(tiny_flux, tmp_path / "model")
    train_run(config_for(model, pictures, tmp_path / "straight"), progress=Listener())
    expected = digest(last_checkpoint(tmp_path / "straight"))

    script = Path(__file__).with_name("kill_often.py")
    arguments = [str(model), str(pictures), str(tmp_path / "killed"), str(KILLS), "3"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("killed")]) == KILLS, lines
    assert lines[-1] == f"finished: {expected}"
    left = [path.name for path in (tmp_path / "killed").rglob(".tmp-*")]
    assert left == []
