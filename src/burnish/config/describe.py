"""The schema for editors, a config in full, and a config to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from burnish.config.dump import to_yaml
from burnish.config.schema import RunConfig

SCHEMA_FILE = "burnish.schema.json"


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config: editors check and complete with it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
        "title": "Burnish run",
    }


def show(config: RunConfig) -> str:
    """Every option with its value, defaults included, as YAML that reads back to an equal config."""
    return to_yaml(config)


@dataclass(frozen=True, slots=True)
class StarterFacts:
    """What a family says of itself, as far as a first config needs it."""

    name: str  # as in `model.family`
    title: str
    size: tuple[int, int]  # height and width in pixels the model was made for
    targets: str
    target_sets: tuple[str, ...]
    steps: int  # of sampling
    guidance: float
    negative_prompt: bool
    guidance_embedding: bool


def starter(facts: StarterFacts) -> str:
    """A commented config for one folder of about twenty pictures; loads as it is."""
    text = _TEMPLATE.format(
        schema=SCHEMA_FILE,
        title=facts.title,
        family=facts.name,
        resolution=min(facts.size),
        targets=facts.targets,
        target_sets=", ".join(facts.target_sets),
        steps=facts.steps,
        guidance=f"{facts.guidance:g}",
        objective=_GUIDANCE_EMBEDDING if facts.guidance_embedding else "",
        negative=_NEGATIVE if facts.negative_prompt else "",
    )
    return "".join(f"{_aligned(line)}\n" for line in text.splitlines())


def _aligned(line: str) -> str:
    """Comments behind options begin in one column, however long the family's name is."""
    option, mark, comment = line.partition("  # ")
    return f"{option.rstrip():<30} # {comment}" if mark else line


_GUIDANCE_EMBEDDING = """\
  objective:
    guidance: 1.0            # what the guidance embedding is told while training; `bypass` trains without it
"""

_NEGATIVE = """\
      negative: blurry, lowres
"""

_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# {title}: a first config. Check it with `burnish train THIS_FILE --check`, start it without `--check`.
# `burnish config schema --output {schema}` writes the file of the line above, for an editor;
# `burnish config show THIS_FILE` prints every option there is, with its value.

name: my-{family}      # the run goes to runs/my-{family}, the adapter is my-{family}.safetensors
trigger: sks                 # the word that calls what is learned; replaces [trigger] below

model:
  family: {family}
  path: ./models/{family}    # a diffusers folder, a .safetensors file, or a Hub id such as owner/name

method:
  kind: lora
  rank: 16                   # larger learns more and forgets more
  alpha: 16                  # the adapter is scaled by alpha / rank
  targets: {targets}         # one of: {target_sets}

data:
  - path: ./pictures         # about twenty pictures; a caption in a .txt file of the same name beside each
    resolutions: [{resolution}]
    captions:
      prefix: "[trigger], "
      dropout: 0.05          # share of draws without caption

train:
  steps: 2000                # about 100 times the number of pictures
  batch_size: 1
  optimizer:
    kind: adamw
    learning_rate: 1e-4
  schedule:
    kind: cosine
    warmup_steps: 100
{objective}
sample:
  every: 250
  steps: {steps}
  guidance: {guidance}
  prompts:
    - "[trigger] on a beach at sunset"
    - prompt: a photo of [trigger]
{negative}
save:
  every: 250
  keep: 3                    # checkpoints to resume from; adapters are kept all

memory:
  activations: recompute     # much less memory, about a third slower; `keep` is the fastest
"""
