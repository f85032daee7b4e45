"""What diffusers itself makes of an adapter file: loaded by the pipeline's own loader, nothing left over or said."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft.tuners.lora import LoraLayer as PeftLayer
from released_widths import widths as widths
from torch import Tensor, nn

from burnish.adapters.lora import LoraWeights


def loaded_deltas(
    folder: Path,
    adapter: Path,
    *,
    part: str = "transformer",
    pipeline: type[DiffusionPipeline] = DiffusionPipeline,
    **options: Any,
) -> dict[str, Tensor]:
    """Load a file into the pipeline in `folder`; fails on anything that diffusers says about it.

    Args:
        part: the denoiser that the file is for.
        options: of `load_lora_weights`, such as `load_into_transformer_2=True`.

    Returns:
        What is added to each module of the denoiser, of the shape of its weight; modules without effect left out.
    """
    loaded = pipeline.from_pretrained(folder)
    load(loaded, adapter, **options)
    return deltas(getattr(loaded, part))


def load(pipeline: DiffusionPipeline, adapter: Path, **options: Any) -> None:
    """Load a file by the pipeline's own loader, as `loaded_deltas`."""
    with nothing_said():
        pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name, **options)


def deltas(denoiser: nn.Module) -> dict[str, Tensor]:
    """What the loaded adapter adds to each module, less the modules to which it adds nothing."""
    found = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, PeftLayer):
            (adapter,) = module.scaling
            delta = module.get_delta_weight(adapter).detach()
            if delta.count_nonzero():
                found[name] = delta
    return found


def assert_same_deltas(found: Mapping[str, Tensor], trained: Mapping[str, LoraWeights]) -> None:
    """The same modules, each with what was trained, within 1e-5."""
    assert found.keys() == trained.keys()
    for name, weights in trained.items():
        expected = weights.delta()
        torch.testing.assert_close(
            found[name].reshape(expected.shape),
            expected,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@contextmanager
def nothing_said() -> Iterator[None]:
    """Fails on anything that diffusers logs, except that the file has no keys for text encoders."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    diffusers_logging.add_handler(listener)
    try:
        yield
    finally:
        diffusers_logging.remove_handler(listener)
    no_text_encoder = tuple(
        f"No LoRA keys associated to {kind}" for kind in ("CLIPTextModel", "T5EncoderModel", "ChatGLMModel")
    )
    assert [line for line in said if not line.startswith(no_text_encoder)] == []
