"""kill -9 while saving: at random moments, and at every single step of a save.

Run as a program, this file is the process that forks what is killed: one thread, torch imported once. It prints what
it found as JSON, and the tests judge that.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from burnish.atomic import Json, publish_folder
from burnish.checkpoint.store import CheckpointStore, Loaded
from burnish.config.optimizers import AdamW
from burnish.optim.build import build_optimizer
from burnish.optim.ema import Ema
from burnish.optim.state import pack_state, unpack_state

KILLS = 40
STEPS = 60


class Run:
    """A small training run that saves after every step; saving takes nearly all of its time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"lora_A": (64, 512), "lora_B": (512, 64)}
        self.parameters = {n: Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        self.optimizer = build_optimizer(AdamW(learning_rate=1e-2), [{"params": self.parameters.values()}])
        self.ema = Ema(self.parameters, decay=0.9)
        self.step = 0

    def resume(self, loaded: Loaded) -> None:
        self.step = loaded.step
        for name, parameter in self.parameters.items():
            parameter.data.copy_(loaded.tensors["adapter"][name])
        unpack_state(self.optimizer, self.names, loaded.tensors["optimizer"], loaded.state["optimizer"])
        self.ema.load_state_dict(loaded.tensors["ema"], loaded.state["ema"])

    def advance(self) -> None:
        for index, parameter in enumerate(self.parameters.values()):
            target = torch.full_like(parameter, float((self.step * 7 + index) % 5))
            parameter.grad = parameter.detach() - target
        self.optimizer.step()
        self.ema.update()
        self.step += 1

    def content(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Json]]:
        optimizer_tensors, optimizer_state = pack_state(self.optimizer, self.names)
        averages, ema_state = self.ema.state_dict()
        adapter = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return (
            {"adapter": adapter, "optimizer": optimizer_tensors, "ema": averages},
            {"optimizer": optimizer_state, "ema": ema_state},
        )

    def save(self, store: CheckpointStore) -> None:
        tensors, state = self.content()
        store.save(self.step, tensors, state, config_hash="x")
        store.prune(2)


def digest(tensors: dict[str, dict[str, Tensor]], state: object) -> str:
    """One hash of every bit of a checkpoint's content."""
    total = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for file in sorted(tensors):
        for name, tensor in sorted(tensors[file].items()):
            total.update(f"{file}/{name}/{tuple(tensor.shape)}".encode())
            total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def straight_run() -> list[str]:
    """The digest after 0, 1, ... steps of a run that nothing stopped and that saved nothing."""
    run = Run()
    digests = [digest(*run.content())]
    while run.step < STEPS:
        run.advance()
        digests.append(digest(*run.content()))
    return digests


def resumed(folder: Path) -> Run:
    run = Run()
    loaded = CheckpointStore(folder).load_newest()
    if loaded is not None:
        run.resume(loaded)
    return run


def train_to_the_end(folder: Path, committed: Callable[[int], None]) -> None:
    store = CheckpointStore(folder)
    run = resumed(folder)
    committed(run.step)
    while run.step < STEPS:
        run.advance()
        run.save(store)
        committed(run.step)


def forked(work: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Run `work` in a child that can report numbers; returns its process and where to read them."""
    reader, writer = os.pipe()

    def report(number: int) -> None:
        os.write(writer, number.to_bytes(4, "little"))

    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            work(report)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 70)
    os.close(writer)
    return pid, reader


def drained(reader: int) -> list[int]:
    data = b""
    while chunk := os.read(reader, 65536):
        data += chunk
    os.close(reader)
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


def kill_once(folder: Path, digests: list[str], delay_s: float) -> dict[str, Any]:
    """Train on in a child, kill it `delay_s` after it began, and look at what it left."""
    pid, reader = forked(lambda committed: train_to_the_end(folder, committed))
    select.select([reader], [], [], 60)  # its first report: it has resumed, and saves from now on
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    reported = drained(reader)
    left = [name for name in os.listdir(folder) if name.startswith(".tmp")] if folder.exists() else []
    loaded = CheckpointStore(folder).load_newest("full")
    step = 0 if loaded is None else loaded.step
    return {
        "killed": os.WIFSIGNALED(status),
        "exit": os.waitstatus_to_exitcode(status),
        "while saving": bool(left),
        "first": reported[0],
        "committed": reported[-1],
        "step": step,
        "same": loaded is None or digest(loaded.tensors, loaded.state) == digests[step],
        "passed over": [] if loaded is None else list(loaded.passed_over),
        "swept": sorted(CheckpointStore(folder).sweep()) == sorted(left),
    }


def kill_at_random_moments(folder: Path) -> dict[str, Any]:
    """Kill 40 times, each time going on from what the last one left; then run to the end."""
    digests = straight_run()
    chance = random.Random(0)
    kills: list[dict[str, Any]] = []
    final: list[bool] = []
    while len(kills) < KILLS:
        outcome = kill_once(folder, digests, chance.uniform(0.0, 0.08))
        if outcome["killed"]:
            kills.append(outcome)
        if outcome["step"] == STEPS:
            final.append(bool(outcome["same"]))
            shutil.rmtree(folder)
    train_to_the_end(folder, lambda _: None)
    final.append(digest(*resumed(folder).content()) == digests[STEPS])
    return {"kills": kills, "final": final, "left": sorted(os.listdir(folder))}


def marked(mark: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Json]]:
    tensors = {name: {"w": torch.full((32, 32), mark + 0.25)} for name in ("adapter", "ema", "optimizer")}
    return tensors, {"mark": mark}


def prepared(folder: Path, scene: str) -> None:
    """Step 1 is committed; in some scenes there already is a step 2, whole or damaged."""
    store = CheckpointStore(folder)
    for step, mark in ((1, 10), (2, 20)) if scene != "new" else ((1, 10),):
        tensors, state = marked(mark)
        store.save(step, tensors, state, config_hash="x")
    if scene == "over a damaged one":
        (folder / "step-00000002" / "state.json").write_text("{}")


def save_second(folder: Path, observer: Callable[[str], None]) -> None:
    tensors, state = marked(21)
    CheckpointStore(folder).save(2, tensors, state, config_hash="x", observer=observer)


def end_at(folder: Path, moment: str) -> dict[str, Any]:
    """End a child at one moment of its save of step 2, and look at what it left."""

    def observer(heard: str) -> None:
        if heard == moment:
            os._exit(9)

    pid, reader = forked(lambda _: save_second(folder, observer))
    _, status = os.waitpid(pid, 0)
    drained(reader)
    store = CheckpointStore(folder)
    loaded = store.load_newest("full")
    assert loaded is not None
    tensors, state = marked(int(str(loaded.state["mark"])))
    outcome: dict[str, Any] = {
        "exit": os.waitstatus_to_exitcode(status),
        "mark": loaded.state["mark"],
        "same": digest(loaded.tensors, loaded.state) == digest(tensors, state),
    }
    store.sweep()
    save_second(folder, lambda _: None)
    again = store.load_newest("full")
    outcome["saved again"] = again is not None and again.step == 2 and again.state["mark"] == 21
    outcome["left"] = sorted(os.listdir(folder))
    return outcome


def end_at_every_moment(folder: Path) -> dict[str, Any]:
    scenes: dict[str, Any] = {}
    for scene in ("new", "again", "over a damaged one"):
        pristine = folder / "pristine"
        prepared(pristine, scene)
        moments: list[str] = []
        shutil.copytree(pristine, folder / "dry")
        save_second(folder / "dry", moments.append)
        outcomes = []
        for index, moment in enumerate(moments):
            copy = folder / f"{index}"
            shutil.copytree(pristine, copy)
            outcomes.append({"moment": moment, **end_at(copy, moment)})
            shutil.rmtree(copy)
        scenes[scene] = outcomes
        shutil.rmtree(pristine)
        shutil.rmtree(folder / "dry")
    return scenes


def publish_and_die(folder: Path) -> dict[str, Any]:
    """The project's other way to make a folder appear: killed at random, it is whole or absent."""
    chance, seen = random.Random(1), {"whole": 0, "absent": 0, "torn": 0}
    for index in range(20):
        temporary, final = folder / f".tmp-{index}", folder / f"final-{index}"
        temporary.mkdir(parents=True)
        for name in range(10):
            (temporary / f"{name}").write_bytes(bytes([index]) * 65536)
        pid, reader = forked(lambda _, temporary=temporary, final=final: publish_folder(temporary, final))  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        drained(reader)
        if not final.exists():
            seen["absent"] += 1
        elif all((final / f"{name}").read_bytes() == bytes([index]) * 65536 for name in range(10)):
            seen["whole"] += 1
        else:
            seen["torn"] += 1
    return dict(seen)


PROGRAMS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "random": kill_at_random_moments,
    "moments": end_at_every_moment,
    "publish": publish_and_die,
}


def program(name: str, folder: Path) -> dict[str, Any]:
    """Run one of `PROGRAMS` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, name, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is fast to flush, where there is one."""
    shared = Path("/dev/shm")
    path = shared / f"burnish-{os.getpid()}-{tmp_path.name}" if os.access(shared, os.W_OK) else tmp_path
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, memory_folder: Path) -> Path:
    return (tmp_path if request.param == "disk" else memory_folder) / "checkpoints"


def test_killed_at_random_moments_of_saving(
    folder: Path, record_property: Callable[[str, object], None]
) -> None:
    result = program("random", folder)
    kills = result["kills"]
    saving = sum(kill["while saving"] for kill in kills)
    print(f"{len(kills)} kills, {saving} with a half-written checkpoint, {len(result['final'])} runs ended")
    record_property("kills while saving", saving)
    assert len(kills) == KILLS
    assert saving >= KILLS // 8, "too few of the kills came in the middle of a save to prove anything"
    for kill in kills:
        assert kill["same"], kill
        assert kill["step"] - kill["committed"] in (0, 1), kill  # nothing that was reported is lost
        assert kill["passed over"] == [], kill
        assert kill["swept"], kill
    assert all(result["final"])
    assert result["left"] == [f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}"]


def test_ended_at_every_moment_of_a_save(memory_folder: Path) -> None:
    scenes = program("moments", memory_folder)
    assert set(scenes) == {"new", "again", "over a damaged one"}
    for scene, outcomes in scenes.items():
        moments = [outcome["moment"] for outcome in outcomes]
        assert len(moments) >= 30, moments
        committed = moments.index("after rename")
        before = {"new": 10, "again": 20, "over a damaged one": 10}[scene]
        for position, outcome in enumerate(outcomes):
            assert outcome["exit"] == 9, outcome
            assert outcome["mark"] == (21 if position >= committed else before), (scene, outcome)
            assert outcome["same"], (scene, outcome)
            assert outcome["saved again"], (scene, outcome)
            left = [name for name in outcome["left"] if name != "broken"]
            assert left == ["step-00000001", "step-00000002"], (scene, outcome)


def test_a_published_folder_is_whole_or_absent(tmp_path: Path) -> None:
    seen = program("publish", tmp_path)
    assert seen["torn"] == 0
    assert sum(seen.values()) == 20


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(PROGRAMS[sys.argv[1]](Path(sys.argv[2]))))
