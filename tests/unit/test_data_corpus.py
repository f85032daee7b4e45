"""Every picture and caption row of the bad-input corpus, in a set of 20 good files, has its stated outcome."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from corpus import ROWS, Row, caption_list, good_set, scene

from burnish.config.data import Captions, Folder
from burnish.data.plan import BatchPlan
from burnish.data.preflight import PreparedData, prepare_samples
from burnish.errors import DataError


def prepared(folder: Path, report: Path | None = None, **options: object) -> PreparedData:
    source = Folder(path=folder, resolutions=[64], bucket_step=16, **options)
    return prepare_samples([source], pixel_multiple=8, report_path=report)


def hashes(folder: Path) -> dict[str, str]:
    """Of every regular file, by name."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {os.fsdecode(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def order(data: PreparedData) -> list[tuple[str, ...]]:
    plan = BatchPlan(data.samples, 4, seed=7)
    return [tuple(draw.id + draw.caption for draw in plan.draws(at)) for at in range(12)]


def test_the_corpus_is_all_there():
    assert {row.number for row in ROWS} == set(range(1, 48)) - {44}
    assert len(ROWS) == 64


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_outcome(row: Row, tmp_path: Path):
    folder, report_path = tmp_path / "pictures", tmp_path / "data_report.json"
    good = good_set(folder)
    undisturbed = prepared(folder)
    names = row.make(folder)
    before = hashes(folder)

    if row.outcome == "E":
        with pytest.raises(DataError) as raised:
            prepared(folder, report_path)
        assert raised.value.exit_code == 2
        message = str(raised.value)
        assert row.says in message
        assert all(name in message for name in names)
        assert "Traceback" not in message
        found = json.loads(report_path.read_text())["sources"][0]
        assert [outcome["file"] for outcome in found["errors"]] == names[:1]
        assert all(outcome["remedy"] for outcome in found["errors"])
        return

    data = prepared(folder, report_path)
    used = {sample.picture_id.removeprefix("0/") for sample in data.samples}
    report = json.loads(report_path.read_text())
    found = report["sources"][0]
    assert found["errors"] == []
    if row.outcome == "S":
        assert used == set(good)
        assert [outcome["file"] for outcome in found["skipped"]] == names
        assert row.says in found["skipped"][0]["reason"]
        assert found["skipped"][0]["remedy"]
        assert found["fixed"] == []
        assert order(data) == order(undisturbed)
        assert BatchPlan(data.samples, 4, 7).fingerprint == BatchPlan(undisturbed.samples, 4, 7).fingerprint
    else:
        assert found["skipped"] == []
        assert used == {*good, *names}
    if row.outcome == "F":
        assert {outcome["file"] for outcome in found["fixed"]} == set(names)
        assert any(row.says in outcome["reason"] for outcome in found["fixed"])
    if row.outcome == "W":
        assert found["fixed"] == []
        assert row.says in " ".join(found["warnings"])
    assert hashes(folder) == before


def test_an_unreadable_picture_is_skipped(tmp_path: Path):
    folder = Path(tempfile.mkdtemp())
    nobody, me = 65534, os.geteuid()
    try:
        good = good_set(folder)
        scene(1).save(folder / "locked.png")
        (folder / "locked.png").chmod(0)
        folder.chmod(0o755)
        if me == 0:  # root may read everything
            os.seteuid(nobody)
        data = prepared(folder)
    finally:
        os.seteuid(me)
        shutil.rmtree(folder)
    assert len(data.samples) == len(good)
    (skipped,) = data.report.skipped
    assert (skipped.file, skipped.reason) == ("locked.png", "no permission to read it")


def test_line_seven_of_a_caption_list_is_named(tmp_path: Path):
    path = caption_list(tmp_path, good_set(tmp_path))
    lines = path.read_text().splitlines()
    rules = Captions(jsonl=path)
    assert len(prepared(tmp_path, captions=rules).samples) == 20
    for bad in (
        "not json",
        "[1]",
        '{"file": "good06.png"}',
        '{"file": "good06.png", "caption": 3}',
        lines[0],
    ):
        path.write_text("\n".join([*lines[:6], bad, *lines[7:]]))
        with pytest.raises(DataError, match=r"captions\.jsonl:7") as raised:
            prepared(tmp_path, captions=rules)
        assert raised.value.exit_code == 2


def test_captions_longer_than_the_encoder_reads_are_counted(tmp_path: Path):
    good_set(tmp_path)
    (tmp_path / "good03.txt").write_text("word " * 100)
    data = prepared(tmp_path)
    assert data.report.count_tokens(data.samples, 0, lambda text: len(text.split()), 77) == 1
    assert data.report.to_json()["captions"]["over_token_limit"] == 1
    assert "more than 77 tokens" in data.report.all_warnings()[0]


def test_every_problem_is_told_at_once(tmp_path: Path):
    good_set(tmp_path)
    wanted = [row for row in ROWS if row.outcome == "E" and row.number in (31, 42, 46)]
    names = [name for row in wanted for name in row.make(tmp_path)]
    with pytest.raises(DataError, match="3 problems") as raised:
        prepared(tmp_path)
    assert all(name in str(raised.value) for name in names)


@pytest.mark.parametrize(("fraction", "allowed"), [(0.0, 0), (0.01, 1), (0.1, 2), (1.0, 5)])
def test_as_many_may_be_skipped_as_the_config_says(tmp_path: Path, fraction: float, allowed: int):
    good_set(tmp_path)
    for number in range(5):
        os.unlink(tmp_path / f"good{number:02d}.txt")
        if number < allowed:
            assert len(prepared(tmp_path, max_skip_fraction=fraction).report.skipped) == number + 1
        else:
            with pytest.raises(DataError, match=f"good{number:02d}"):
                prepared(tmp_path, max_skip_fraction=fraction)


@pytest.mark.parametrize("content", ["nothing", "text", "missing", "file"])
def test_nothing_usable_is_an_error(tmp_path: Path, content: str):
    folder = tmp_path / "pictures"
    if content in ("nothing", "text"):
        folder.mkdir()
    if content == "text":
        (folder / "a.txt").write_text("a cat")
    if content == "file":
        folder.write_text("not a folder")
    with pytest.raises(DataError, match=str(folder)) as raised:
        prepared(folder)
    assert raised.value.remedy


def test_missing_captions_follow_the_config(tmp_path: Path):
    good_set(tmp_path)
    os.unlink(tmp_path / "good05.txt")
    with pytest.raises(DataError, match=r"good05.*no caption"):
        prepared(tmp_path, captions=Captions(on_missing="error"))
    data = prepared(tmp_path, captions=Captions(default="a thing"))
    assert [s.caption for s in data.samples if "good05" in s.picture_id] == ["a thing"]
    assert "default" in data.report.fixed[0].reason


def test_strict_encoding_refuses_what_auto_reads(tmp_path: Path):
    good_set(tmp_path)
    for text in (b"caf\xe9", "\ufeffa cat".encode("utf-16-le")):
        (tmp_path / "good05.txt").write_bytes(text)
        with pytest.raises(DataError, match=r"good05.*not UTF-8"):
            prepared(tmp_path, captions=Captions(encoding="utf-8"))


def test_hidden_files_caches_and_run_folders_are_no_data(tmp_path: Path):
    good = good_set(tmp_path)
    for name in (".hidden", "__MACOSX", "mine"):
        good_set(tmp_path / name, 2)
    good_set(tmp_path / "cache", 2)
    (tmp_path / "cache" / "CACHEDIR.TAG").write_text("")
    good_set(tmp_path / "run" / "samples", 2)
    (tmp_path / "run" / "status.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "inside").symlink_to(tmp_path)  # a folder linked into itself
    source = Folder(path=tmp_path, resolutions=[64], bucket_step=16)
    data = prepare_samples([source], pixel_multiple=8, ignore=[tmp_path / "mine"])
    assert len(data.samples) == len(good)
    good_set(tmp_path / "sub", 3)
    assert len(prepared(tmp_path, recursive=True).samples) == len(good) + 5
    assert len(prepared(tmp_path, recursive=False).samples) == len(good)


def test_a_damaged_memory_of_decoded_pictures_is_mended(tmp_path: Path):
    good_set(tmp_path / "pictures")
    (tmp_path / "pictures" / "good00.png").write_bytes(b"")
    cache = tmp_path / "cache"
    source = Folder(path=tmp_path / "pictures", resolutions=[64], bucket_step=16)
    first = prepare_samples([source], pixel_multiple=8, cache_folder=cache)
    remembered = sorted(cache.rglob("*.json"))
    assert len(remembered) == 20
    again = prepare_samples([source], pixel_multiple=8, cache_folder=cache)
    for number, path in enumerate(remembered):
        path.write_bytes((b"", b"{", b"[]", b'{"fixes": 3}', b'{"other": 1, "fixes": []}')[number % 5])
    mended = prepare_samples([source], pixel_multiple=8, cache_folder=cache)
    assert first.samples == again.samples == mended.samples
    assert first.report.to_json() == again.report.to_json() == mended.report.to_json()
