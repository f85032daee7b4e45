"""The schema for editors, a config in full, and a config to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from burnish.config.dump import to_yaml
from burnish.config.schema import RunConfig

SCHEMA_FILE = "burnish.schema.json"
Preset = Literal["adapter", "dreambooth"]


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


def starter(facts: StarterFacts, preset: Preset = "adapter", class_word: str = "dog") -> str:
    """A commented config for one folder of pictures; loads as it is.

    Args:
        preset: an adapter from about twenty captioned pictures; or DreamBooth (arXiv 2208.12242), a subject from a few
            pictures without captions, beside pictures of its class that the model draws itself.
        class_word: of DreamBooth, what the subject is one of.
    """
    data, train, prompts = _PARTS[preset]
    text = _TEMPLATE.format(
        schema=SCHEMA_FILE,
        title=facts.title,
        family=facts.name,
        targets=facts.targets,
        target_sets=", ".join(facts.target_sets),
        data=data.format(resolution=min(facts.size), word=class_word),
        train=train,
        steps=facts.steps,
        guidance=f"{facts.guidance:g}",
        objective=_GUIDANCE_EMBEDDING if facts.guidance_embedding else "",
        prompts=prompts.format(word=class_word) + (_NEGATIVE if facts.negative_prompt else ""),
    )
    return "".join(f"{_aligned(line)}\n" for line in text.splitlines())


def _aligned(line: str) -> str:
    """Comments behind options begin in one column, however long the family's name is."""
    option, mark, comment = line.partition("  # ")
    return f"{option.rstrip():<30} # {comment}" if mark and option.strip() else line


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
{data}
train:
{train}  optimizer:
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
{prompts}
save:
  every: 250
  keep: 3                    # checkpoints to resume from; adapters are kept all

memory:
  activations: recompute     # much less memory, about a third slower; `keep` is the fastest
"""

_ADAPTER_DATA = """\
  - path: ./pictures         # about twenty pictures; a caption in a .txt file of the same name beside each
    resolutions: [{resolution}]
    captions:
      prefix: "[trigger], "
      dropout: 0.05          # share of draws without caption
"""

_ADAPTER_TRAIN = """\
  steps: 2000                # about 100 times the number of pictures
  batch_size: 1
"""

_ADAPTER_PROMPTS = """\
    - "[trigger] on a beach at sunset"
    - prompt: a photo of [trigger]
"""

_DREAMBOOTH_DATA = """\
  # What the subject is one of: {word}. Another word goes to all places where this one stands.
  - path: ./pictures         # three to ten pictures of one subject, in other places and lights
    resolutions: [{resolution}]
    repeats: 20              # five pictures 20 times: as many draws as there are pictures of the class
    captions:
      default: a photo of [trigger] {word}   # of each picture without a .txt file
  - kind: generated          # drawn by the model before training: any {word} stays any {word} (prior preservation)
    prompts: [a photo of a {word}]
    count: 100
    weight: 1.0              # of their loss: more keeps the class better, less learns the subject faster
    resolutions: [{resolution}]
    # path: ./class-pictures  # pictures of the class that you have; only what they lack of `count` is drawn
"""

_DREAMBOOTH_TRAIN = """\
  steps: 800                 # with accumulate: 2, about 160 draws of each of five pictures
  batch_size: 1
  accumulate: 2              # the subject and the class, one of each on average
"""

_DREAMBOOTH_PROMPTS = """\
    - a photo of a {word}     # should stay as it is before the first step
    - a [trigger] {word} on a beach at sunset
    - prompt: a photo of [trigger] {word}
"""

_PARTS: dict[Preset, tuple[str, str, str]] = {
    "adapter": (_ADAPTER_DATA, _ADAPTER_TRAIN, _ADAPTER_PROMPTS),
    "dreambooth": (_DREAMBOOTH_DATA, _DREAMBOOTH_TRAIN, _DREAMBOOTH_PROMPTS),
}
