from __future__ import annotations

from pathlib import Path

import pytest

from burnish.errors import UserError
from burnish.sampling.prompts import PromptLine, read_prompts


def file(folder: Path, text: str, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_lines_comments_and_kohyas_options(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "\ufeff# a comment\r\n"
        "\n"
        "a cat, 20-year-old -- well--worn\n"
        "  a dog --n blurry, low quality --d 42 --w 832 --h 1216 --s 30 --g 6.5 \n"
        'he said "--" --l 4\n',
    )
    assert read_prompts(path) == [
        PromptLine("a cat, 20-year-old -- well--worn", line=3),
        PromptLine(
            "a dog",
            line=4,
            negative="blurry, low quality",
            seed=42,
            width=832,
            height=1216,
            steps=30,
            guidance=6.5,
        ),
        PromptLine('he said "--"', line=5, guidance=4.0),
    ]


def test_json_lines(tmp_path: Path) -> None:
    text = '{"prompt": "a cat --d 3", "negative": "", "seed": 7, "guidance": 2}\n{"prompt": "a dog", "steps": 4}\n'
    expected = [
        PromptLine("a cat --d 3", line=1, seed=7, guidance=2.0),
        PromptLine("a dog", line=2, steps=4),
    ]
    assert read_prompts(file(tmp_path, text, "prompts.jsonl")) == expected
    assert read_prompts(file(tmp_path, text, "mixed.txt")) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --q 3", "no option --q; known: --n, --d, --w, --h, --s, --g"),
        ("a cat --d many", "seed should be a whole number from 0"),
        ("a cat --d", "seed should be a whole number"),
        ("a cat --d -1", "got '-1'"),
        ("a cat --w 8", "width should be a whole number from 16 to 8192, got '8'"),
        ("a cat --g nan", "guidance should be a number from 0.0 to 50.0, got 'nan'"),
        ("a cat --d 1 --d 2", "seed is given twice"),
        ("--d 1", "has no prompt"),
        ('{"prompt": "a cat", "sed": 1}', "no such entry 'sed'; did you mean seed?"),
        ('{"prompt": 3}', "prompt should be a text, got 3"),
        ('{"prompt": "a cat", "seed": "7"}', "seed should be a number, got '7'"),
        ('{"prompt": "a cat", "steps": true}', "steps should be a number, got True"),
        ('{"prompt": "a cat"', "not a JSON object"),
        ('{"negative": "a cat"}', "has no prompt"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = file(tmp_path, f"a fine prompt\n{line}\n")
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert f"{path}:2  " in str(caught.value)
    assert message in str(caught.value)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = file(tmp_path, "a --q 1\nb\nc --s 0\n")
    with pytest.raises(UserError, match="2 problem") as caught:
        read_prompts(path)
    assert f"{path}:1  " in str(caught.value)
    assert f"{path}:3  " in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(file(tmp_path, "# nothing\n\n"))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(latin)
