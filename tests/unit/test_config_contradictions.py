"""Options that do not go together are told with the place of the one to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.load import load_config
from burnish.errors import ConfigError

HEAD = "name: a\nmodel: {path: demo}\ndata: [{path: p}]\n"


@pytest.mark.parametrize(
    ("text", "line", "path", "says"),
    [
        ("method: {kind: full}\nmemory: {weights: int8}\n", 5, "memory.weights", "cannot be int8"),
        ("method: {kind: full}\ntrain: {precision: fp16}\n", 5, "train.precision", "use bf16 or fp32"),
        ("method: {kind: full}\nmemory: {stream: 0.5}\n", 5, "memory.stream", "none is frozen"),
        ("method: {kind: full}\nsave: {format: kohya}\n", 5, "save.format", "a spelling of adapters"),
        ("method: {kind: full, rank: 4}\n", 4, "method.rank", "no such option"),
        (
            "method: {kind: full}\nmodel: {path: demo, training_adapter: x.safetensors}\n",
            5,
            "model.training_adapter",
            "goes with adapters",
        ),
        (
            "memory: {gradient_release: true}\ntrain: {accumulate: 4}\n",
            4,
            "memory.gradient_release",
            "train.accumulate: 4 adds them up",
        ),
        (
            "memory: {gradient_release: true, batch_parts: 2}\n",
            4,
            "memory.batch_parts",
            "each weight moves as soon as its gradient is there",
        ),
        (
            "memory: {gradient_release: true}\ntrain: {precision: fp16}\n",
            4,
            "memory.gradient_release",
            "use train.precision: bf16",
        ),
        (
            "memory: {offload_optimizer: true}\ntrain: {optimizer: {kind: prodigy}}\n",
            4,
            "memory.offload_optimizer",
            "prodigy steps all together",
        ),
        (
            "memory: {offload_optimizer: true}\ntrain: {optimizer: {kind: adamw_schedule_free}}\n",
            4,
            "memory.offload_optimizer",
            "with all of its state at once",
        ),
    ],
)
def test_a_contradiction_names_what_to_change(
    tmp_path: Path, text: str, line: int, path: str, says: str
) -> None:
    head = HEAD.replace("model: {path: demo}\n", "\n") if "\nmodel:" in text else HEAD
    (tmp_path / "run.yaml").write_text(head + text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml")
    (problem,) = error.value.problems
    assert f"run.yaml:{line}  {path}\n" in problem
    assert says in problem


@pytest.mark.parametrize(
    "text",
    [
        "method: {kind: full, targets: attention}\nmemory: {stream: 0.5}\n",  # what is frozen can be streamed
        "method: {kind: full}\nmemory: {weights: native, gradient_release: true, offload_optimizer: true}\n",
        "memory: {gradient_release: true}\n",
    ],
)
def test_what_goes_together_loads(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(HEAD + text)
    assert load_config(tmp_path / "run.yaml").config.name == "a"
