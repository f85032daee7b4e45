"""Mistakes people make in a config: one readable message each, with file and line, exit code 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from burnish.cli.main import app

GOOD = """\
name: robot
trigger: sks
model:
  path: demo
data:
  - path: pictures
"""


@dataclass(frozen=True)
class Mistake:
    """`text` goes below GOOD, or stands alone; the message has to say `where` and each of `says`."""

    name: str
    text: str
    where: str
    says: tuple[str, ...]
    alone: bool = False
    options: tuple[str, ...] = ()
    suffix: str = ".yaml"

    @property
    def content(self) -> str:
        return self.text if self.alone else GOOD + self.text


MISTAKES = [
    Mistake("unknown key", "wibble: 1\n", "run.yaml:7  wibble", ("no such option", "the top level has name")),
    Mistake("typo", "method: {alhpa: 4}\n", "run.yaml:7  method.alhpa", ("did you mean alpha?",)),
    Mistake(
        "near typo of a long key",
        "train:\n  optimizer:\n    learning_rat: 1\n",
        "run.yaml:9  train.optimizer.learning_rat",
        ("did you mean learning_rate?",),
    ),
    Mistake("typo of a section", "trian: {steps: 3}\n", "run.yaml:7  trian", ("did you mean train?",)),
    Mistake(
        "right key, wrong section",
        "train:\n  learning_rate: 1e-4\n",
        "run.yaml:8  train.learning_rate",
        ("belongs to `train.optimizer.`",),
    ),
    Mistake("right key at the top", "steps: 10\n", "run.yaml:7  steps", ("belongs to", "`train.`")),
    Mistake(
        "another trainer's name",
        "method: {network_dim: 8}\n",
        "run.yaml:7  method.network_dim",
        ("mean rank?",),
    ),
    Mistake(
        "option of another kind",
        "train:\n  objective:\n    timesteps: {std: 2}\n",
        "run.yaml:9  train.objective.timesteps.std",
        ("no kind is given, which means uniform", "belongs to kind logit_normal"),
    ),
    Mistake(
        "number with a letter",
        "train:\n  optimizer: {learning_rate: 1e-4x}\n",
        "run.yaml:8  train.optimizer.learning_rate",
        ("valid number", "got '1e-4x'"),
    ),
    Mistake(
        "word for a number", "train: {steps: many}\n", "run.yaml:7  train.steps", ("integer", "got 'many'")
    ),
    Mistake("half a step", "train: {steps: 1.5}\n", "run.yaml:7  train.steps", ("fractional", "got 1.5")),
    Mistake(
        "true for a number", "train: {steps: true}\n", "run.yaml:7  train.steps", ("integer", "got true")
    ),
    Mistake(
        "zero rank",
        "method:\n  rank: 0\n",
        "run.yaml:8  method.rank",
        ("greater than or equal to 1", "got 0"),
    ),
    Mistake("negative rank", "method:\n  rank: -4\n", "run.yaml:8  method.rank", ("got -4",)),
    Mistake("alpha 0", "method:\n  alpha: 0\n", "run.yaml:8  method.alpha", ("greater than 0", "got 0")),
    Mistake(
        "nan",
        "train:\n  optimizer:\n    learning_rate: .nan\n",
        "run.yaml:9  train.optimizer.learning_rate",
        ("finite",),
    ),
    Mistake("nan as a word", "method: {alpha: nan}\n", "run.yaml:7  method.alpha", ("finite", "got 'nan'")),
    Mistake(
        "infinity", "train: {max_grad_norm: .inf}\n", "run.yaml:7  train.max_grad_norm", ("finite", "got inf")
    ),
    Mistake("too large to be finite", "method: {alpha: 1e999}\n", "run.yaml:7  method.alpha", ("finite",)),
    Mistake(
        "duplicate key", "seed: 1\nseed: 2\n", "run.yaml:8  seed", ("twice", "run.yaml:7 and", "run.yaml:8")
    ),
    Mistake(
        "duplicate key inside",
        "train:\n  steps: 5\n  batch_size: 1\n  steps: 6\n",
        "run.yaml:10  train.steps",
        ("run.yaml:8 and",),
    ),
    Mistake("tab", "train:\n\tsteps: 5\n", "run.yaml:8", ("a tab", "spaces")),
    Mistake("bad indentation", "train:\n  steps: 5\n   batch_size: 2\n", "run.yaml:9", ("indentation",)),
    Mistake("missing colon", "train:\n  steps 5\n  batch_size: 2\n", "run.yaml:", ("indentation", "`: `")),
    Mistake(
        "unclosed quote", 'trigger: "sks\n', "run.yaml:", ("the quote that opens in line 7 is not closed",)
    ),
    Mistake(
        "python object",
        'seed: !!python/object/apply:os.system ["echo hacked"]\n',
        "run.yaml:7  seed",
        ("!!python/object/apply:os.system is refused",),
    ),
    Mistake("own tag", "seed: !secret 3\n", "run.yaml:7  seed", ("!secret is refused",)),
    Mistake(
        "variable not set",
        "save: {folder: '${BURNISH_TEST_UNSET}/x'}\n",
        "run.yaml:7  save.folder",
        ("BURNISH_TEST_UNSET is not set",),
    ),
    Mistake(
        "variable without a name",
        "save: {folder: '${}/x'}\n",
        "run.yaml:7  save.folder",
        ("names no variable",),
    ),
    Mistake(
        "trigger used, none set",
        "name: a\nmodel: {path: demo}\ndata:\n- path: p\n  captions: {prefix: '[trigger], '}\n",
        "run.yaml:5  data.0.captions.prefix",
        ("uses [trigger], but `trigger` is not set",),
        alone=True,
    ),
    Mistake(
        "bracket without quotes", "sample:\n  prompts:\n  - [trigger] in rain\n", "run.yaml:9", ("quotes",)
    ),
    Mistake(
        "two exclusive options",
        "name: a\nmodel: {path: demo}\ndata:\n- path: p\n  captions:\n    jsonl: c.jsonl\n    extension: .caption\n",
        "run.yaml:5  data.0.captions",
        ("jsonl and extension exclude each other",),
        alone=True,
    ),
    Mistake(
        "option that needs another",
        "name: a\nmodel: {path: demo}\ndata:\n- path: p\n  captions: {keep_tags: 2}\n",
        "run.yaml:5  data.0.captions",
        ("shuffle_tags: true",),
        alone=True,
    ),
    Mistake(
        "warm-up longer than the run",
        "train:\n  steps: 5\n  schedule: {warmup_steps: 9}\n",
        "run.yaml:7  train",
        ("warmup_steps (9) must be below steps (5)",),
    ),
    Mistake(
        "empty list",
        "name: a\nmodel: {path: demo}\ndata: []\n",
        "run.yaml:3  data",
        ("at least 1 item",),
        alone=True,
    ),
    Mistake(
        "required key missing",
        "name: a\nmodel: {path: demo}\n",
        "run.yaml:1  data",
        ("missing", "pictures"),
        alone=True,
    ),
    Mistake(
        "required key inside missing",
        "name: a\nmodel: {path: demo}\ndata:\n  - repeats: 2\n",
        "run.yaml:4  data.0.path",
        ("missing", "Folder with pictures"),
        alone=True,
    ),
    Mistake(
        "option of another kind by another trainer's name",
        "train:\n  schedule: {kind: cosine, num_cycles: 3}\n",
        "run.yaml:8  train.schedule.num_cycles",
        ("no such option of kind cosine", "cycles belongs to kind cosine_restarts"),
    ),
    Mistake(
        "class by the word for it",
        "train:\n  optimizer: {kind: custom, class: torch.optim.SGD}\n",
        "run.yaml:8  train.optimizer.class",
        ("did you mean class_path?",),
    ),
    Mistake(
        "rate given twice",
        "train:\n  optimizer: {kind: custom, class_path: torch.optim.SGD, arguments: {lr: 1}}\n",
        "run.yaml:8  train.optimizer.arguments",
        ("lr does not belong here", "learning_rate"),
    ),
    Mistake(
        "two averages",
        "train:\n  optimizer: {kind: adamw_schedule_free}\n  ema: {decay: 0.9}\n",
        "run.yaml:7  train",
        ("adamw_schedule_free keeps an average of its own; leave ema out",),
    ),
    Mistake(
        "average and falling rate",
        "train:\n  optimizer: {kind: prodigy_schedule_free}\n  schedule: {kind: cosine}\n",
        "run.yaml:7  train",
        ("schedule.kind should be constant", "got cosine"),
    ),
    Mistake(
        "unknown kind",
        "train:\n  optimizer: {kind: adam}\n",
        "run.yaml:8  train.optimizer",
        ("adafactor", "mean adamw?"),
    ),
    Mistake(
        "name for a mapping",
        "train: {optimizer: prodigy}\n",
        "run.yaml:7  train.optimizer",
        ("{kind: prodigy}",),
    ),
    Mistake(
        "unknown kind of adapter",
        "method: {kind: lokar}\n",
        "run.yaml:7  method",
        ("lora, loha", "mean lokr?"),
    ),
    Mistake(
        "bad choice",
        "train: {precision: bf32}\n",
        "run.yaml:7  train.precision",
        ("'bf16', 'fp16' or 'fp32'", "mean"),
    ),
    Mistake(
        "list for a mapping",
        "train:\n  - steps: 5\n",
        "run.yaml:7  train",
        ("should be a mapping", "got a list"),
    ),
    Mistake(
        "text for a mapping", "train: fast\n", "run.yaml:7  train", ("should be a mapping", "got 'fast'")
    ),
    Mistake(
        "mapping for a list",
        "name: a\nmodel: {path: demo}\ndata:\n  path: p\n",
        "run.yaml:3  data",
        ("list",),
        alone=True,
    ),
    Mistake("nothing below a key", "sample:\n", "run.yaml:7  sample", ("leave the key out",)),
    Mistake(
        "size as text", "sample: {size: 10x10}\n", "run.yaml:7  sample.size", ("whole number or a list of 2",)
    ),
    Mistake("size of three", "sample:\n  size: [64, 64, 3]\n", "run.yaml:8  sample.size", ("at most 2",)),
    Mistake(
        "size too small", "sample:\n  size: [64, 8]\n", "run.yaml:8  sample.size.1", ("equal to 16", "got 8")
    ),
    Mistake(
        "number or word",
        "train: {objective: {shift: famly}}\n",
        "run.yaml:7  train.objective.shift",
        ("mean family?",),
    ),
    Mistake(
        "prompt of a wrong kind",
        "sample:\n  prompts:\n    - 3\n",
        "run.yaml:9  sample.prompts.0",
        ("text or a mapping",),
    ),
    Mistake(
        "typo in a prompt",
        "sample:\n  prompts:\n    - fine\n    - promt: a\n",
        "run.yaml:10  sample.prompts.1.promt",
        ("mean prompt?",),
    ),
    Mistake(
        "number for a word",
        "name: 3\nmodel: {path: demo}\ndata: [{path: p}]\n",
        "run.yaml:1  name",
        ("quotes",),
        alone=True,
    ),
    Mistake(
        "name with a slash",
        "name: a/b\nmodel: {path: demo}\ndata: [{path: p}]\n",
        "run.yaml:1  name",
        ("'a/b'",),
        alone=True,
    ),
    Mistake("empty file", "", "run.yaml:1", ("empty", "config init"), alone=True),
    Mistake("comments alone", "# nothing\n", "run.yaml:1", ("empty",), alone=True),
    Mistake("no mapping", "- a\n- b\n", "run.yaml:1", ("should be a mapping", "got a list"), alone=True),
    Mistake("two documents", "---\nname: b\n", "run.yaml:7", ("second document",)),
    Mistake("alias of itself", "sample: &s {prompts: [*s]}\n", "run.yaml:7  sample.prompts.0", ("alias",)),
    Mistake("merge key", "train:\n  <<: {steps: 5}\n", "run.yaml:", ("`<<` is not read",)),
    Mistake(
        "run inside its pictures",
        "name: a\nmodel: {path: demo}\ndata:\n  - path: .\nsave: {folder: .}\n",
        "run.yaml:4  data.0.path",
        ("inside this folder of pictures", "save.folder"),
        alone=True,
    ),
    Mistake(
        "override of no option",
        "",
        "--set train.stps=5",
        ("did you mean steps?",),
        options=("--set", "train.stps=5"),
    ),
    Mistake(
        "override out of range",
        "",
        "--set train.steps=0",
        ("equal to 1",),
        options=("--set", "train.steps=0"),
    ),
    Mistake("override without value", "", "--set seed", ("KEY=VALUE",), options=("--set", "seed")),
    Mistake(
        "override beyond a list",
        "",
        "--set data.4.repeats=2",
        ("entries 0 to 0",),
        options=("--set", "data.4.repeats=2"),
    ),
    Mistake(
        "override through a number", "", "--set name.x=2", ("has no `x`",), options=("--set", "name.x=2")
    ),
    Mistake("override of bad YAML", "", "--set seed=[1", ("expected",), options=("--set", "seed=[1")),
    Mistake("bad name on the command line", "", "--name a/b", ("should match",), options=("--name", "a/b")),
    Mistake(
        "JSON without a comma",
        '{"name": "a"\n "seed": 1}',
        "run.json:2",
        ("not valid JSON", "delimiter"),
        True,
        (),
        ".json",
    ),
    Mistake(
        "JSON typo", '{\n\t"name": "a",\n\t"sed": 1}', "run.json:3  sed", ("mean seed?",), True, (), ".json"
    ),
]


def test_there_are_mistakes_enough() -> None:
    assert len(MISTAKES) >= 60
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BURNISH_TEST_UNSET", raising=False)
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_told_with_its_place(mistake: Mistake, folder: Path) -> None:
    (folder / f"run{mistake.suffix}").write_text(mistake.content)
    result = CliRunner().invoke(app, ["train", f"run{mistake.suffix}", "--check", *mistake.options])
    told = result.stderr
    assert result.exit_code == 2, told
    assert any(line.strip().startswith(mistake.where) for line in told.splitlines()), told
    for words in mistake.says:
        assert words in told
    assert "Traceback" not in told
    assert "unexpected" not in told
    if mistake.name not in ("override without value", "JSON typo"):
        assert told.startswith(f"1 problem in run{mistake.suffix}\n")


@pytest.mark.parametrize("name", ["typo", "duplicate key", "tab", "python object", "variable not set"])
def test_mistake_in_a_process_of_its_own(name: str, folder: Path) -> None:
    mistake = next(mistake for mistake in MISTAKES if mistake.name == name)
    (folder / "run.yaml").write_text(mistake.content)
    program = "from burnish.cli.main import app; app()"
    run = subprocess.run(
        [sys.executable, "-c", program, "train", "run.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "NO_COLOR": "1"},
        check=False,
    )
    assert run.returncode == 2
    assert mistake.where in run.stderr
    assert "Traceback" not in run.stderr + run.stdout
    assert not (folder / "runs").exists()


def test_all_mistakes_at_once_in_the_order_of_the_file(folder: Path) -> None:
    (folder / "run.yaml").write_text(GOOD + "method:\n  rank: 0\n  alhpa: 4\ntrain:\n  learning_rate: fast\n")
    result = CliRunner().invoke(app, ["train", "run.yaml", "--set", "seed=-1"])
    assert result.exit_code == 2
    assert result.stderr.startswith("4 problems in run.yaml\n")
    places = [
        line.split()[0] for line in result.stderr.splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert places == ["run.yaml:8", "run.yaml:9", "run.yaml:11", "--set"]


def test_message_has_the_documented_form(folder: Path) -> None:
    (folder / "run.yaml").write_text(GOOD + "method:\n  rank: 0\n  alhpa: 4\n")
    result = CliRunner().invoke(app, ["train", "run.yaml"])
    assert result.stderr == (
        "2 problems in run.yaml\n"
        "  run.yaml:8  method.rank\n"
        "      Input should be greater than or equal to 1; got 0\n"
        "  run.yaml:9  method.alhpa\n"
        "      no such option; did you mean alpha?\n"
    )


def test_markup_in_a_value_is_shown_as_it_is(folder: Path) -> None:
    (folder / "run.yaml").write_text(GOOD + "train: {precision: '[bold]x[/bold] [/]'}\n")
    assert "got '[bold]x[/bold] [/]'" in CliRunner().invoke(app, ["train", "run.yaml"]).stderr


def test_config_that_is_nowhere_names_places_and_near_names(folder: Path) -> None:
    (folder / "config").mkdir()
    (folder / "config" / "portrait.yaml").write_text(GOOD)
    result = CliRunner().invoke(app, ["train", "potrait"])
    assert result.exit_code == 2
    for place in ("potrait.yaml", "config/potrait.yaml", "config/potrait.json"):
        assert place in result.stderr
    assert "did you mean config/portrait.yaml?" in result.stderr


def test_file_that_is_not_utf8_names_the_line(folder: Path) -> None:
    (folder / "run.yaml").write_bytes(GOOD.encode() + b"trigger: caf\xe9\n")
    result = CliRunner().invoke(app, ["train", "run.yaml"])
    assert result.exit_code == 2
    assert "run.yaml:7" in result.stderr
    assert "0xe9" in result.stderr


def test_aliases_cannot_fill_the_memory(folder: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (folder / "run.yaml").write_text("\n".join(levels))
    result = CliRunner().invoke(app, ["train", "run.yaml"])
    assert result.exit_code == 2
    assert "aliases" in result.stderr


def test_nesting_has_an_end(folder: Path) -> None:
    for depth in (60, 5000):
        (folder / "run.yaml").write_text(GOOD + "sample: {prompts: " + "[" * depth + "]" * depth + "}\n")
        result = CliRunner().invoke(app, ["train", "run.yaml"])
        assert result.exit_code == 2
        assert "nested deeper than 40 levels" in result.stderr
