"""Attention kernels on a family's own calls: which are right there, and how fast.

    python -m tools.benchmarks.attention --families flux sdxl wan21 --size 1024
    python -m tools.benchmarks.attention --families sd3 --depth 1 --size 64        # on a CPU

The calls are those of a step without weights; the measurement is the one that `memory.attention: auto` chooses by.
FLOP are of forward and backward, 3.5 times those of the forward, masks not taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.compute.attention import Call, Kind, recorded
from burnish.compute.attention_kernels import FOR_SAMPLING, BackEnd, back_ends, unavailable
from burnish.compute.attention_probe import measure_one
from burnish.planner.recipe import Shape
from burnish.planner.skeletons import without_data
from burnish.planner.trace import batch_without_data
from tools.benchmarks import harness
from tools.benchmarks.harness import Model


def calls_of(model: Model, shape: Shape) -> list[Call]:
    """The largest call of each kind, the largest first."""
    family = model.skeleton(1)
    noisy, _, conditioning = family.example(shape.height, shape.width, shape.batch, shape.frames)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for denoiser in family.denoisers.values():
            without_data(denoiser)
        batch = batch_without_data(noisy, conditioning)
    found: dict[Kind, Call] = {}
    with torch.no_grad(), recorded(found):
        family.predict(batch.latents_BCHW, torch.full((shape.batch,), 0.5), batch.conditioning)
    return sorted(found.values(), key=lambda call: -call.size)


def row(call: Call, name: BackEnd, device: torch.device) -> dict[str, Any]:
    trouble = unavailable(name, device)
    told: dict[str, Any] = {"call": str(call.kind), "query": call.query_BHSD, "key": call.key_BHKD}
    told |= {"back_end": name}
    if trouble:
        return {**told, "trouble": trouble}
    measured = measure_one(call, name, device)
    if measured.trouble:
        return {**told, "trouble": measured.trouble}
    passes = 1.0 if name in FOR_SAMPLING else 3.5
    flop = passes * 4 * call.size * call.kind.head_dim
    rate = {"ms": round(1e3 * measured.seconds, 4), "tflops": round(flop / measured.seconds / 1e12, 3)}
    return {**told, **rate, "error": measured.error}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser_for(__doc__, of_a_model=True)
    parser.add_argument("--families", nargs="+", default=["flux", "sdxl"])
    parser.add_argument("--back-ends", nargs="+", default=list(back_ends()), choices=back_ends())
    told = parser.parse_args(arguments)
    device, shape = torch.device(told.device), harness.shape_of(told)
    rows = [
        {"family": family, **row(call, name, device)}
        for family in told.families
        for call in calls_of(harness.model_of(told, family), shape)
        for name in told.back_ends
    ]
    harness.tell(device, {"rows": rows, "size": told.size, "frames": told.frames, "batch": told.batch})


if __name__ == "__main__":
    main()
