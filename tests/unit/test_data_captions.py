"""Captions: encodings, lists, and what is drawn of them."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
from corpus import caption, good_set, scene

from burnish.config.data import Captions, Folder
from burnish.data.caption_rules import CaptionRules
from burnish.data.captions import BadCaption, decode_text, read_caption, read_caption_list
from burnish.data.preflight import prepare_samples
from burnish.errors import DataError

TAGS = "1girl, solo, red hair, smile, outdoors, blue sky"


@pytest.mark.parametrize(
    "text",
    [
        "it’s a café – “naïve” œuvre",
        "L’ÉTÉ CRÉÉ À CHÂTEAU",
        "Ein schöner Bär überquert die Straße",
        "el niño comió piñas a 20 °C",
        "créée en été",
        "50 € … ok",
    ],
)
def test_western_text_of_an_old_editor_is_read(text: str):
    got, notes = decode_text(text.encode("cp1252"))
    assert got == text
    assert notes == ("read as Windows-1252",)


@pytest.mark.parametrize("encoding", ["gbk", "big5", "shift_jis", "euc_kr", "koi8_r", "cp1251"])
def test_other_scripts_are_refused_not_garbled(encoding: str):
    texts = {
        "gbk": [
            "a photo of 狗",
            "1girl, 狗",
            "一只黑色的猫",
            "a photo of 中国 city",
            "1girl, 红色头发, smile",
        ],
        "big5": ["黑色的貓", "a photo of 台灣 city"],
        "shift_jis": ["黒い猫が座っている"],
        "euc_kr": ["검은 고양이", "photo of 고양이"],
        "koi8_r": ["чёрная кошка на столе"],
        "cp1251": ["чёрная кошка на столе", "photo of кот on a table", "я и ты"],
    }[encoding]
    for text in texts:
        with pytest.raises(BadCaption, match="not UTF-8") as raised:
            decode_text(text.encode(encoding))
        assert raised.value.remedy


def test_utf8_is_never_mistaken():
    for text in ("a cat", "café", "一只猫", "чёрная кошка", "🤖 x", "a\tb", ""):
        assert decode_text(text.encode()) == (text, ())
    with pytest.raises(BadCaption, match="UTF-16"):
        decode_text(b"\xff\xfea\0b")


def test_lines_are_joined(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"  a cat\r\n\r\n on a mat \r\n")
    assert read_caption(path).text == "a cat on a mat"
    path.write_bytes(b"a cat\n")
    assert read_caption(path).notes == ()


def test_a_list_names_every_bad_line(tmp_path: Path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"file": "a.png", "caption": "x"}\n\nnope\n{"file": "./a.png", "caption": "y"}\n')
    with pytest.raises(BadCaption) as raised:
        read_caption_list(path)
    assert "list.jsonl:3" in str(raised.value)
    assert "list.jsonl:4  'a.png' is already on line 1" in str(raised.value)
    with pytest.raises(BadCaption, match="absent"):
        read_caption_list(tmp_path / "absent.jsonl")


def test_a_list_covers_folders_and_says_what_is_not_there(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    scene(1).save(tmp_path / "sub" / "a.png")
    decomposed = unicodedata.normalize("NFD", "é.png")
    scene(2).save(tmp_path / decomposed)
    entries = [("sub/a.png", "one  [trigger]"), ("é.png", "two"), ("gone.png", "three")]
    lines = [json.dumps({"file": name, "caption": text}) for name, text in entries]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    source = Folder(path=tmp_path, resolutions=[64], bucket_step=16, captions=Captions(jsonl="list.jsonl"))
    data = prepare_samples([source], pixel_multiple=8, trigger="sks")
    assert {sample.picture_id: sample.caption for sample in data.samples} == {
        "0/sub/a.png": "one sks",
        f"0/{decomposed}": "two",
    }
    assert any("gone.png" in line for line in data.report.all_warnings())


def test_captions_of_a_mac_archive_are_found(tmp_path: Path):
    scene(1).save(tmp_path / (unicodedata.normalize("NFC", "café") + ".png"))
    (tmp_path / (unicodedata.normalize("NFD", "café") + ".TXT")).write_text("a cup")
    source = Folder(path=tmp_path, resolutions=[64], bucket_step=16)
    assert [s.caption for s in prepare_samples([source], pixel_multiple=8).samples] == ["a cup"]


def test_trigger_goes_before_training_captions_only(tmp_path: Path):
    for name in ("train", "prior"):
        good_set(tmp_path / name, 3)
    rules = Captions(prefix="[trigger], ")
    sources = [
        Folder(path=tmp_path / "train", captions=rules, resolutions=[64], bucket_step=16),
        Folder(
            path=tmp_path / "prior", captions=rules, role="regularization", resolutions=[64], bucket_step=16
        ),
    ]
    data = prepare_samples(sources, pixel_multiple=8, trigger="ohwx")
    for sample in data.samples:
        texts = sample.captions(seed=1)
        assert len(texts) == 1
        assert texts[0].startswith("ohwx, a sks") == (sample.role == "train")
        assert ("ohwx" in texts[0]) == (sample.role == "train")
    caption(tmp_path / "prior" / "good00.png", "a [trigger]")
    with pytest.raises(DataError, match=r"good00.*regularization"):
        prepare_samples(sources, pixel_multiple=8, trigger="ohwx")


def test_a_trigger_that_no_caption_says_is_warned_about(tmp_path: Path):
    good_set(tmp_path, 3)
    source = Folder(path=tmp_path, resolutions=[64], bucket_step=16)
    assert "ohwx" in prepare_samples([source], pixel_multiple=8, trigger="ohwx").report.all_warnings()[0]
    assert prepare_samples([source], pixel_multiple=8, trigger="sks").report.all_warnings() == []
    caption(tmp_path / "good00.png", "a [trigger]")
    with pytest.raises(DataError, match="no trigger is set"):
        prepare_samples([source], pixel_multiple=8)


def test_every_drawn_caption_was_foreseen_and_draws_are_pure():
    rules = CaptionRules(prefix="sks,", dropout=0.25, shuffle_tags=True, keep_tags=2, variants=4)
    foreseen = rules.possible(TAGS, picture_id="0/a.png", seed=3)
    assert len(foreseen) == 5
    assert "" in foreseen
    keys = [(f"0/a.png@64x64#{repeat}", epoch) for repeat in range(3) for epoch in range(200)]
    drawn = {
        key: rules.draw(TAGS, picture_id="0/a.png", draw_id=key[0], epoch=key[1], seed=3) for key in keys
    }
    assert set(drawn.values()) == set(foreseen)
    random.Random(0).shuffle(keys)
    for name, epoch in keys:
        again = rules.draw(TAGS, picture_id="0/a.png", draw_id=name, epoch=epoch, seed=3)
        assert again == drawn[name, epoch]
    assert sum(not text for text in drawn.values()) / len(keys) == pytest.approx(0.25, abs=0.06)
    for text in foreseen:
        if text:
            assert text.startswith("sks, 1girl, solo, ")
            assert sorted(text.removeprefix("sks, ").split(", ")) == sorted(TAGS.split(", "))
    other = rules.possible(TAGS, picture_id="0/a.png", seed=4)
    assert set(other) != set(foreseen)


def test_without_rules_a_caption_stays_as_it_is():
    text = "a cat,  on a mat;"
    assert CaptionRules().possible(text, picture_id="x", seed=0) == (text,)
    assert CaptionRules(dropout=1.0).draw(text, picture_id="x", draw_id="x", epoch=0, seed=0) == ""
    rules = CaptionRules(shuffle_tags=True, keep_tags=1, separator=" | ", variants=8)
    for got in rules.possible("a | b | c", picture_id="x", seed=0):
        assert got in ("a | b | c", "a | c | b")
