"""How a run is shown: rate, time left, loss, learning rate, memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from burnish.cli.output import Output
from burnish.cli.progress import Pace, PlainProgress, TerminalProgress
from burnish.errors import UserError
from burnish.events import RunResult, StepReport

FOLDER = Path("runs") / "robot"


def report(step: int, seconds: float = 0.5, memory_gib: float | None = 12.34) -> StepReport:
    return StepReport(step, 100, 0.1, 0.25, 1.0, 1e-4, seconds, memory_gib)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pace_leaves_the_slow_first_step_out() -> None:
    pace = Pace()
    pace.add(30.0)
    assert pace.rate() == "30.0 s/step"
    for _ in range(10):
        pace.add(0.25)
    assert pace.seconds_per_step == pytest.approx(0.25)
    assert pace.rate() == "4.0 steps/s"
    assert pace.left(14400) == "1:00:00"


def test_pace_follows_the_last_steps() -> None:
    pace = Pace()
    for seconds in [1.0] * 100 + [2.0] * 50:
        pace.add(seconds)
    assert pace.rate() == "2.0 s/step"
    assert Pace().rate() == "- steps/s"


def test_plain_lines_come_every_few_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    plain = PlainProgress(stream, every_s=5.0, clock=clock)
    plain.started(0, 100)
    for step in range(1, 101):
        clock.now += 0.5
        plain.stepped(report(step))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training: step 0 of 100"
    assert lines[1] == "step 1/100  loss 0.2500  lr 1.00e-04  memory 12.3 GiB  2.0 steps/s  0:00:50 left"
    assert [line.split()[1] for line in lines[1:]] == [f"{step}/100" for step in [*range(1, 100, 10), 100]]


def test_plain_phases_tell_begin_and_end() -> None:
    stream, clock = io.StringIO(), Clock()
    plain = PlainProgress(stream, every_s=5.0, clock=clock)
    for done in range(1, 21):
        clock.now += 0.5
        plain.phase("encoding pictures", done, 20)
    plain.phase("loading the denoiser", 0, 0)
    assert stream.getvalue().splitlines() == [
        "encoding pictures: 1/20",
        "encoding pictures: 11/20",
        "encoding pictures: 20/20",
        "loading the denoiser",
    ]


def test_no_memory_figure_on_a_processor() -> None:
    stream = io.StringIO()
    PlainProgress(stream).stepped(report(1, memory_gib=None))
    assert "memory" not in stream.getvalue()


def everything(listener: PlainProgress | TerminalProgress) -> None:
    listener.phase("checking pictures", 3, 20)
    listener.phase("checking pictures", 20, 20)
    listener.phase("loading the denoiser", 0, 0)
    listener.started(0, 100)
    listener.stepped(report(1))
    listener.validated(10, 0.125, True)
    listener.saved(
        10,
        FOLDER / "checkpoints",
        FOLDER / "adapters" / "a.safetensors",
        {"keys": 88, "difference": 0.0012345},
    )
    listener.phase("drawing samples", 1, 2)
    listener.sampled(10, [FOLDER / "samples" / "1.png"])
    listener.warned("a caption is [bold]empty[/bold]")
    listener.stepped(report(11))
    listener.finished(
        RunResult("done", 100, FOLDER, FOLDER / "adapters" / "a.safetensors", 10, 0.125, ["1 batch skipped"])
    )


TOLD = (
    "checking pictures: 20/20",
    "step 10: held-out loss 0.12500, the best so far",
    "step 10: saved and verified runs/robot/adapters/a.safetensors (keys 88, difference 0.00123)",
    "step 10: 1 picture(s) in runs/robot/samples",
    "note: a caption is [bold]empty[/bold]",
    "done at step 100",
    "1 batch skipped",
    "best held-out loss 0.12500 at step 10",
    "adapter: runs/robot/adapters/a.safetensors",
)


def test_plain_tells_everything() -> None:
    stream = io.StringIO()
    everything(PlainProgress(stream))
    for line in TOLD:
        assert line in stream.getvalue().splitlines()


def test_terminal_tells_everything_and_clears_its_bars() -> None:
    stream = io.StringIO()
    terminal = TerminalProgress(Console(file=stream, force_terminal=True, width=160, color_system=None))
    everything(terminal)
    text = stream.getvalue()
    for line in TOLD:
        assert line in text
    assert "2.0 steps/s  0:00:44 left  loss 0.2500  lr 1.00e-04  memory 12.3 GiB" in text
    assert text.endswith("\x1b[2K")  # the last line of the display is wiped


def test_cursor_is_shown_all_the_while() -> None:
    """A process that is killed cannot bring it back."""
    stream = io.StringIO()
    terminal = TerminalProgress(Console(file=stream, force_terminal=True, width=160, color_system=None))
    terminal.started(0, 100)
    terminal.stepped(report(1))
    text = stream.getvalue()
    terminal.stop()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > -1


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_how_an_unfinished_run_is_told(state: str) -> None:
    stream = io.StringIO()
    PlainProgress(stream).finished(RunResult(state, 7, FOLDER, notes=["why"]))
    told = stream.getvalue()
    assert f"{state} at step 7" in told
    assert ("the same command goes on from there" in told) == (state == "stopped")
    assert ("why" in told) == (state == "stopped")  # why it failed is told by the error


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    return tmp_path / "deep" / "run.log"


def test_log_gets_words_progress_and_errors(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted_work() -> None:
        with Output(log) as output:
            output.say("first [words]")
            output.progress().phase("checking pictures", 1, 1)
            raise UserError("bad pictures", remedy="Mend them.")

    with pytest.raises(UserError):
        interrupted_work()
    expected = ["first [words]", "checking pictures: 1/1"]
    assert capsys.readouterr().out.splitlines() == expected
    assert log.read_text().splitlines() == [*expected, "bad pictures", "  Mend them."]


def test_log_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"), Output(tmp_path):
        pass
