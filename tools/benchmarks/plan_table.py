"""What `burnish plan` chooses for some models on some cards: settings, memory, and the time that it foresees.

    python -m tools.benchmarks.plan_table > plans.json
    python -m tools.benchmarks.plan_table --markdown

Needs no GPU and no weights: sizes are those of the released models. Nothing in the table is measured; what a plan is
made of is in docs/memory.md. A first run takes some minutes per model, a second one reads the traces of the first.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from burnish.config.schema import RunConfig
from burnish.errors import UserError
from burnish.planner.choose import Choice
from burnish.planner.rates import GIB, card_named
from burnish.planning import plan_run

CARDS = ("3060", "4080", "4090", "5090", "h100")
# Title -> family, path as a Hub id, resolution, frames. Wan's 480p is 832 x 480 pixels, the area of a square of 624.
MODELS: dict[str, tuple[str, str, int, int | None]] = {
    "SDXL": ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 1024, None),
    "SD 3.5 medium": ("sd3", "stabilityai/stable-diffusion-3.5-medium", 1024, None),
    "Z-Image": ("z_image", "Tongyi-MAI/Z-Image", 1024, None),
    "FLUX.1": ("flux", "black-forest-labs/FLUX.1-dev", 1024, None),
    "Qwen-Image": ("qwen_image", "Qwen/Qwen-Image", 1024, None),
    "FLUX.2 dev": ("flux2", "black-forest-labs/FLUX.2-dev", 1024, None),
    "Wan 2.1 14B, 81 frames": ("wan21", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 624, 81),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--cards", nargs="*", default=list(CARDS), help="As for `burnish plan --gpu`.")
    parser.add_argument("--markdown", action="store_true", help="A table in place of JSON.")
    given = parser.parse_args()
    rows = []
    for model in given.models:
        for card in given.cards:
            rows.append(planned(model, card))
            print(rows[-1], file=sys.stderr)
    print(markdown(rows, given.cards) if given.markdown else json.dumps(rows, indent=2))


def config_of(model: str) -> RunConfig:
    """A LoRA of rank 16 on attention and feed-forward layers, batch 1, AdamW, bf16, without samples."""
    family, path, resolution, frames = MODELS[model]
    return RunConfig.model_validate(
        {
            "name": "plan",
            # Offline, so that the sizes are the same wherever this is run.
            "model": {"path": path, "family": family, "offline": True},
            "method": {"kind": "lora", "rank": 16, "targets": "attention+mlp"},
            "data": [
                {
                    "path": "pictures",
                    "resolutions": [resolution],
                    **({} if frames is None else {"frames": [frames]}),
                }
            ],
            "train": {"steps": 2000},
        }
    )


def planned(model: str, card: str) -> dict[str, Any]:
    row = {"model": model, "card": card_named(card).title}
    try:
        plan = plan_run(config_of(model), card_named(card))
    except UserError as error:
        return {**row, "error": error.message}
    return {
        **row,
        "offload_activations": plan.choice.settings.offload,
        "size": list(MODELS[model][2:]),
        "weights": plan.choice.settings.weights,
        "activations": plan.choice.settings.kept,
        "stream": plan.choice.settings.stream,
        "text_encoder_weights": plan.text_encoder_weights,
        "step_gib": round(plan.choice.peak / GIB, 2),
        "peak_gib": round(plan.peak / GIB, 2),
        "host_gib": round((plan.choice.host + plan.choice.waiting) / GIB, 2),
        "seconds_per_step": round(plan.times[0].seconds, 2),
        "settings": in_words(plan.choice),
    }


def in_words(choice: Choice) -> str:
    settings = choice.settings
    kept = [mode if len(settings.kept) == 1 else f"{count} {mode}" for mode, count in settings.kept.items()]
    kept += ["activations offloaded"] if settings.offload else []
    streamed = [f"{settings.stream:.0%} streamed"] if settings.stream else []
    return ", ".join([settings.weights, *kept, *streamed])


def markdown(rows: list[dict[str, Any]], cards: list[str]) -> str:
    """One row for each model and card."""
    lines = [
        "| model | card | settings | GiB, step | GiB, whole run | s/step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        told = (
            ("does not fit", "", "", "")
            if "error" in row
            else (row["settings"], row["step_gib"], row["peak_gib"], row["seconds_per_step"])
        )
        first = row["model"] if row["card"] == card_named(cards[0]).title else ""
        lines.append("| " + " | ".join(str(one) for one in (first, row["card"], *told)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
