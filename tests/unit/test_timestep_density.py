"""`burnish config show --timesteps`, and schedules that end in pure noise."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from typer.testing import CliRunner

from burnish.cli.histogram import charts
from burnish.cli.main import app
from burnish.config.load import load_config
from burnish.errors import UserError
from burnish.families.noise_schedule import schedule_of, with_zero_terminal_snr
from burnish.noise_schedule import ResolutionShift, Schedule
from burnish.sampling.stream import make_scheduler
from burnish.timestep_density import densities

CONFIG = """\
name: shown
model: {family: flux, path: not-here}
data: [{path: pictures, resolutions: [512, 1024]}]
train: {objective: {shift: resolution}}
"""


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path / "run.yaml"


def test_the_shares_are_those_of_the_shifted_law(config: Path) -> None:
    found = densities(load_config(config).config, parts=8, draws=4000)
    assert [(one.size, one.tokens) for one in found] == [("1024 x 1024", 4096), ("512 x 512", 1024)]
    for one in found:
        shift = ResolutionShift().factor(one.tokens, 0)
        assert one.shift == pytest.approx(shift)

        def below(t: float, shift: float = shift) -> float:
            before = t / (shift - (shift - 1) * t)
            return 0.5 * (1 + math.erf(math.log(before / (1 - before)) / math.sqrt(2)))

        edges = [0.0, *(below(number / 8) for number in range(1, 8)), 1.0]
        expected = [high - low for low, high in pairwise(edges)]
        assert one.shares == pytest.approx(expected, abs=0.026)  # Kolmogorov-Smirnov at 4000 draws
        assert [below(quarter) for quarter in one.quarters] == pytest.approx([0.25, 0.5, 0.75], abs=0.026)


def test_it_is_drawn_in_eighty_columns(config: Path) -> None:
    result = CliRunner().invoke(app, ["config", "show", str(config), "--timesteps"])
    assert result.exit_code == 0, result.output
    assert result.output.count("0 clean") == 2
    assert "1024 x 1024, 4,096 tokens, shift 3.16" in result.output
    assert max(map(len, result.output.splitlines())) <= 80

    shown = densities(load_config(config, overrides=["train.objective.shift=1"]).config, 64, draws=500)
    assert [one.size for one in shown] == ["all sizes"]  # without a shift by size they are the same
    plain = charts(shown, fine=False)
    assert plain.isascii()
    bars = [line[8:] for line in plain.splitlines()[1:9]]
    tallest = shown[0].shares.index(max(shown[0].shares))
    assert sum(len(line) > tallest and line[tallest] == "#" for line in bars) >= 7
    assert [line for line in bars if line.startswith("#")] == []  # few are so clean


def test_a_schedule_down_to_pure_noise_is_diffusers_own() -> None:
    config = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
    }
    plain = schedule_of(config, None)
    schedule = with_zero_terminal_snr(plain)
    betas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").betas
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert schedule.alphas_cumprod is not None
    assert plain.alphas_cumprod is not None
    torch.testing.assert_close(schedule.alphas_cumprod.float(), expected, atol=1e-6, rtol=1e-4)
    assert float(schedule.alphas_cumprod[-1]) == 0
    assert float(schedule.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]))

    sampler = make_scheduler(schedule)  # PNDM cannot begin in pure noise
    torch.testing.assert_close(sampler.alphas_cumprod, expected, atol=1e-6, rtol=1e-4)
    sampler.set_timesteps(4)
    assert int(sampler.timesteps[0]) == 999
    euler = with_zero_terminal_snr(schedule_of({**config, "_class_name": "EulerDiscreteScheduler"}, None))
    assert euler.scheduler["_class_name"] == "EulerDiscreteScheduler"
    for refused in (Schedule("velocity", {}), schedule_of(config, "epsilon")):
        with pytest.raises(UserError, match="zero_terminal_snr"):
            with_zero_terminal_snr(refused)
