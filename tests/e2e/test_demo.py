"""The embedded demo, end to end: it learns the robot and keeps what it knew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from burnish.demo.command import export_config, run_demo
from burnish.errors import UserError
from burnish.events import Listener
from burnish.run_folder import RunFolder


@pytest.mark.slow
def test_the_demo_learns_the_robot_and_keeps_what_it_knew(tmp_path: Path) -> None:
    demo = run_demo(tmp_path, Listener())
    figures = demo.figures
    assert figures.seeds == 32
    assert figures.before < 0.10, figures
    assert figures.after > 0.90, figures
    assert figures.ordinary < 0.10, figures

    folder = RunFolder(tmp_path / "demo")
    status = folder.status()
    assert status is not None
    assert (status.state, status.step) == ("done", 300)
    losses = [value for _, value in folder.metrics("loss")]
    assert len(losses) == 300
    assert np.mean(losses[-50:]) < 0.6 * np.mean(losses[:10])
    assert demo.run.adapter == folder.adapters / "demo.safetensors"
    for picture in (demo.grid, demo.curve, folder.samples / "grid.png"):
        with Image.open(picture) as opened:
            assert min(opened.size) > 200
    page = demo.report.read_text()
    assert "before_after.png" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_config_and_pictures_can_be_taken_away_once(tmp_path: Path) -> None:
    from burnish.config.load import load_config

    written = export_config(tmp_path / "mine")
    config = load_config(written[0]).config
    assert Path(config.data[0].path) == tmp_path / "mine" / "dataset"  # type: ignore[union-attr]
    assert len(list(written[1].glob("*.png"))) == 16
    with pytest.raises(UserError, match="exists already"):
        export_config(tmp_path / "mine")
