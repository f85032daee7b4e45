"""What a config file may hold, and what becomes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from burnish.config.data import Folder, Generated
from burnish.config.document import plain_value
from burnish.config.load import load_config
from burnish.config.objective import SigmoidTimesteps, UniformTimesteps
from burnish.config.optimizers import AdamW, Prodigy
from burnish.config.schema import RunConfig
from burnish.config.train import RollBackOnNonFinite
from burnish.errors import ConfigError

MINIMAL = "name: robot\nmodel: {path: demo}\ndata: [{path: pictures}]\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder: Path, text: str, **options: object) -> RunConfig:
    return load_config(write(folder, text), **options).config  # type: ignore[arg-type]


def refusal(folder: Path, text: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


# Finding the file


@pytest.mark.parametrize("reference", ["config/mine.yaml", "config/mine", "mine", "mine.yaml"])
def test_found_by_path_and_by_bare_name(reference: str, folder: Path) -> None:
    path = write(folder, MINIMAL, "config/mine.yaml")
    assert load_config(reference).path == path
    assert load_config(path).path == path
    assert load_config(str(path.with_suffix(""))).path == path


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_suffix_may_be_left_out(suffix: str, folder: Path) -> None:
    text = '{"name": "a", "model": {"path": "demo"}, "data": [{"path": "p"}]}'
    write(folder, text, f"config/other{suffix}")
    assert load_config("other").config.name == "a"


def test_file_here_wins_over_the_config_folder(folder: Path) -> None:
    write(folder, MINIMAL.replace("robot", "far"), "config/run.yaml")
    write(folder, MINIMAL, "run.yaml")
    assert load_config("run").config.name == "robot"


def test_folder_is_no_config(folder: Path) -> None:
    (folder / "run").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        load_config("run")


@pytest.mark.parametrize("reference", ["x" * 5000, "a\0b"])
def test_impossible_name_is_refused(reference: str) -> None:
    with pytest.raises(ConfigError):
        load_config(reference)


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("true", True),
        ("null", None),
        ("~", None),
        ("yes", "yes"),
        ("1e-4x", "1e-4x"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("12:30", "12:30"),
        ("nan", "nan"),
    ],
)
def test_plain_scalars_by_the_core_schema(text: str, value: object) -> None:
    found = plain_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["1e-4", "0.0001", "1.0E-4", "'1e-4'", "100e-6"])
def test_learning_rate_in_any_notation(text: str, folder: Path) -> None:
    config = loaded(folder, MINIMAL + f"train: {{optimizer: {{learning_rate: {text}}}}}\n")
    assert config.train.optimizer.learning_rate == 1e-4


def test_kind_may_be_left_out(folder: Path) -> None:
    config = loaded(
        folder,
        "name: a\nmodel: {path: demo}\ndata: [{path: p}, {kind: generated, prompts: [x]}]\n"
        "train:\n  optimizer: {learning_rate: 2e-4}\n  on_nonfinite: {}\n  objective: {timesteps: {}}\n",
    )
    assert isinstance(config.data[0], Folder)
    assert isinstance(config.data[1], Generated)
    assert isinstance(config.train.optimizer, AdamW)
    assert config.train.on_nonfinite.kind == "stop"
    assert isinstance(config.train.objective.timesteps, UniformTimesteps)


def test_kind_chooses_the_variant(folder: Path) -> None:
    config = loaded(
        folder,
        MINIMAL
        + "train:\n  optimizer: {kind: prodigy, d_coef: 2}\n  on_nonfinite: {kind: rollback, max_batches: 5}\n"
        "  objective: {timesteps: {kind: sigmoid, scale: 2}}\n",
    )
    assert config.train.optimizer == Prodigy(kind="prodigy", d_coef=2)
    assert config.train.on_nonfinite == RollBackOnNonFinite(kind="rollback", max_batches=5)
    assert config.train.objective.timesteps == SigmoidTimesteps(kind="sigmoid", scale=2)


def test_json_with_tabs_and_escapes(folder: Path) -> None:
    text = '{\n\t"name":\t"a",\n\t"trigger": "caf\\u00e9 \\ud83d\\ude00",\n'
    text += '\t"model": {"path":"demo"},"data":[{"path":"p"}]}'
    config = load_config(write(folder, text, "run.json")).config
    assert config.trigger == "café \U0001f600"
    assert config == load_config(write(folder, text, "same.yaml")).config


def test_aliases_are_read(folder: Path) -> None:
    config = loaded(
        folder,
        "name: a\nmodel: {path: demo}\ndata:\n- &one {path: p, repeats: 3}\n- *one\nsample: {seed: 1}\n",
    )
    assert config.data[0] == config.data[1]
    assert config.data[0].repeats == 3


def test_byte_order_mark_and_windows_lines(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_config(path).config.name == "robot"


# Variables


def test_variables_from_environment_and_env_files(folder: Path) -> None:
    text = MINIMAL + "seed: ${SEED}\ntrigger: '${WORD} $${WORD} ${HERE} ${BESIDE}'\n"
    write(folder, "HERE=cwd\nBESIDE=cwd\nWORD=file\n", ".env")
    write(folder, "export BESIDE='beside it'\n", "configs/.env")
    path = write(folder, text, "configs/run.yaml")
    config = load_config(path, environment={"SEED": "12", "WORD": "sks"}).config
    assert config.seed == 12
    assert config.trigger == "sks ${WORD} cwd beside it"


def test_environment_is_the_process_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_TEST_WORD", "from outside")
    assert loaded(folder, MINIMAL + "trigger: ${BURNISH_TEST_WORD}\n").trigger == "from outside"


def test_value_of_a_variable_is_not_yaml(folder: Path) -> None:
    config = loaded(folder, MINIMAL + "trigger: ${X}\n", environment={"X": "a: [b, # c"})
    assert config.trigger == "a: [b, # c"


def test_every_unset_variable_is_named(folder: Path) -> None:
    text = refusal(folder, MINIMAL + "trigger: ${ONE}\nsave: {folder: '${TWO}/${THREE}'}\n", environment={})
    assert "run.yaml:4  trigger\n      the variable ONE is not set" in text
    assert "TWO is not set" in text
    assert "THREE is not set" in text
    assert text.startswith("2 problems")


def test_unreadable_env_file_is_told(folder: Path) -> None:
    (folder / ".env").write_bytes(b"A=\xff\xfe\n")
    assert ".env" in refusal(folder, MINIMAL + "trigger: ${A}\n", environment={})


def test_name_and_trigger_are_filled_in(folder: Path) -> None:
    config = loaded(
        folder,
        "name: robot\ntrigger: sks [name]\nmodel: {path: demo}\n"
        "data: [{path: 'p/[name]', captions: {prefix: '[trigger], '}}]\n"
        "sample: {prompts: ['[trigger] in rain', {prompt: 'the [name] of [trigger]'}]}\n",
        name="knight",
    )
    assert config.trigger == "sks knight"
    assert isinstance(config.data[0], Folder)
    assert config.data[0].captions.prefix.startswith("sks knight,")
    assert config.data[0].path == folder / "p" / "knight"
    assert config.sample.prompts[0] == "sks knight in rain"
    assert not isinstance(config.sample.prompts[1], str)
    assert config.sample.prompts[1].prompt == "the knight of sks knight"


def test_trigger_in_the_trigger_is_refused(folder: Path) -> None:
    assert "in the trigger itself" in refusal(folder, MINIMAL + "trigger: a [trigger]\n")


# Overrides


def test_overrides_reach_sections_lists_and_variants(folder: Path) -> None:
    config = loaded(
        folder,
        MINIMAL,
        overrides=[
            "train.steps=100",
            "data.0.repeats=3",
            "train.optimizer.learning_rate=1e-3",
            "train.optimizer.kind=prodigy",
            "sample.prompts=[a, {prompt: b, size: [64, 96]}]",
            "trigger=sks",
            "train.steps=200",
            "method.targets='attention+mlp'",
            "model.revision=",
        ],
    )
    assert config.train.steps == 200
    assert config.data[0].repeats == 3
    assert isinstance(config.train.optimizer, Prodigy)
    assert config.train.optimizer.learning_rate == 1e-3
    assert len(config.sample.prompts) == 2
    assert config.trigger == "sks"
    assert config.method.targets == "attention+mlp"
    assert config.model.revision is None


def test_override_mends_what_the_file_has_wrong(folder: Path) -> None:
    text = MINIMAL + "train: {steps: nonsense}\ntrigger: ${UNSET}\n"
    config = loaded(folder, text, overrides=["train.steps=5", "trigger=sks"], environment={})
    assert (config.train.steps, config.trigger) == (5, "sks")


def test_name_wins_over_file_and_override(folder: Path) -> None:
    assert loaded(folder, MINIMAL, overrides=["name=b"], name="c").name == "c"


# Paths


def test_relative_paths_start_at_the_config_and_overrides_at_the_working_directory(folder: Path) -> None:
    text = (
        "name: a\nmodel: {path: ./base, vae: vae.safetensors, text_encoders: [te.safetensors]}\n"
        "data: [{path: ../pics}, {path: pics2, captions: {jsonl: c.jsonl}}]\nmemory: {cache_folder: cache}\n"
    )
    path = write(folder, text, "configs/run.yaml")
    config = load_config(path, overrides=["data.0.path=there"]).config
    assert config.model.path == str(folder / "configs" / "base")
    assert config.model.vae == folder / "configs" / "vae.safetensors"
    assert config.model.text_encoders == [folder / "configs" / "te.safetensors"]
    assert isinstance(config.data[0], Folder)
    assert isinstance(config.data[1], Folder)
    assert config.data[0].path == folder / "there"
    assert config.data[1].path == folder / "configs" / "pics2"
    assert config.data[1].captions.jsonl == folder / "configs" / "c.jsonl"
    assert config.memory.cache_folder == folder / "configs" / "cache"
    assert config.save.folder == Path("runs")


def test_home_is_filled_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = loaded(folder, "name: a\nmodel: {path: ~/m}\ndata: [{path: ~/p}]\nsave: {folder: ~/r}\n")
    assert isinstance(config.data[0], Folder)
    assert config.data[0].path == Path("/home/someone/p")
    assert config.model.path == "/home/someone/m"
    assert config.save.folder == Path("/home/someone/r")


@pytest.mark.parametrize(
    ("given", "is_path"),
    [
        ("demo", False),
        ("owner/name", False),
        ("black-forest-labs/FLUX.1-dev", False),
        ("./owner/name", True),
        ("./demo", True),
        ("model", True),
        ("model.safetensors", True),
        ("models/file.safetensors", True),
        ("a/b/c", True),
        ("../owner/name", True),
    ],
)
def test_model_path_or_hub_id(given: str, is_path: bool, folder: Path) -> None:
    config = loaded(folder, f"name: a\nmodel: {{path: {given}}}\ndata: [{{path: p}}]\n")
    expected = os.path.normpath(folder / given) if is_path else given
    assert config.model.path == expected


def test_folder_that_exists_is_no_hub_id(folder: Path) -> None:
    (folder / "owner" / "name").mkdir(parents=True)
    config = loaded(folder, "name: a\nmodel: {path: owner/name}\ndata: [{path: p}]\n")
    assert config.model.path == str(folder / "owner" / "name")


def test_run_folder_inside_pictures_is_found_through_links(folder: Path) -> None:
    (folder / "pics").mkdir()
    (folder / "link").symlink_to("pics")
    text = "name: a\nmodel: {path: demo}\ndata: [{path: pics}]\nsave: {folder: link/out}\n"
    assert "inside this folder of pictures" in refusal(folder, text)


def test_pictures_beside_the_runs_are_fine(folder: Path) -> None:
    config = loaded(
        folder, "name: pics\nmodel: {path: demo}\ndata: [{path: runs-pics}, {path: runs/other}]\n"
    )
    assert len(config.data) == 2


# The resolved text

TRICKY = [
    "1e-4",
    "true",
    "null",
    "~",
    "- a",
    "a: b",
    "# no",
    "'q'",
    '"d"',
    "${X}",
    "$${X}",
    "[a]",
    "0x1F",
    ".5",
    ".5e3",
    "+.INF",
    "é\u2028x",
]


@pytest.mark.parametrize("word", TRICKY)
def test_resolved_text_reads_back_to_the_same_config(word: str, folder: Path) -> None:
    written = json.dumps(word.replace("${", "$${"))
    text = MINIMAL + f"trigger: {written}\nsample: {{prompts: [{written}, {{prompt: {written}}}]}}\n"
    first = load_config(write(folder, text))
    assert first.config.trigger == word
    again = load_config(write(folder, first.text, "resolved.yaml"))
    assert again.config == first.config
    assert again.text == first.text


def test_resolved_text_holds_every_option(folder: Path) -> None:
    found = YAML(typ="safe", pure=True).load(
        load_config(write(folder, MINIMAL)).text
    )  # an independent reader
    assert set(found) == set(RunConfig.model_fields)
    assert found["train"]["optimizer"] == {
        "learning_rate": 1e-4,
        "rounding": "stochastic",
        "weight_decay": 0.01,
        "kind": "adamw",
        "betas": [0.9, 0.999],
        "eps": 1e-8,
    }
    assert found["save"]["folder"] == "runs"
