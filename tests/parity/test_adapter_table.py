"""Every kind of adapter in every format of `sd15`, `sdxl` and `flux`: verified, drawn alike by diffusers, or refused.

What diffusers is expected to load is written down here, not asked of the code: LoRAs in every format, DoRA in
diffusers' own names, and nothing else. One pipeline serves all files of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from released_widths import flux_loader, tiny_loaders
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules
from burnish.adapters.targeting import choose_modules
from burnish.config.method import AdapterMethod, Boft, Loha, Lokr, Lora, Oft
from burnish.errors import AdapterError
from burnish.export.adapter_file import write_adapter
from burnish.export.formats import refuse_unstackable, resolve_format
from burnish.export.verify import verify_adapter
from burnish.families.registry import family_named

TinyFolder = Callable[[str], Path]
PARTS = {"sd15": "unet", "sdxl": "unet", "flux": "transformer"}
METHODS: Mapping[str, AdapterMethod] = {
    "lora": Lora(rank=3, alpha=5.0, targets="attention+mlp"),
    "locon": Lora(rank=3, conv_rank=2, conv_alpha=3.0, targets="all"),
    "tucker": Lora(rank=2, alpha=2.0, tucker=True, rs_scaling=True, targets="all"),
    "pissa": Lora(rank=2, alpha=3.0, start="pissa", targets="attention"),
    "dora": Lora(rank=2, alpha=3.0, dora=True, targets="attention+mlp"),
    "loha": Loha(kind="loha", rank=2, alpha=3.0, targets="all"),
    "lokr": Lokr(kind="lokr", factor=4, targets="all"),
    "lokr, thin": Lokr(kind="lokr", factor=2, full_rank=False, rank=1, alpha=3.0, targets="attention"),
    "dokr": Lokr(kind="lokr", factor=4, dora=True, targets="attention+mlp"),
    "oft": Oft(kind="oft", block_size=4, targets="attention+mlp"),
    "boft": Boft(kind="boft", block_size=16, targets="attention"),
}
FORMATS = ("comfy", "diffusers", "kohya")
PLAIN = ("lora", "locon", "tucker", "pissa")
REFUSED = {  # (family, format) -> kinds that must be refused; None is all of them
    ("sd15", "comfy"): None,
    ("sdxl", "comfy"): None,
    ("sd15", "diffusers"): {"loha", "lokr", "lokr, thin", "dokr", "oft", "boft"},
    ("sdxl", "diffusers"): {"loha", "lokr", "lokr, thin", "dokr", "oft", "boft"},
    ("flux", "comfy"): {"lokr", "lokr, thin", "dokr", "boft"},
    ("flux", "kohya"): {"locon", "tucker", "loha", "lokr", "lokr, thin", "dokr", "boft"},
}
WAYS_OUT = ("save.format", "method.kind", "method.exclude", "method.block_size", "burnish adapter convert")


@dataclass
class Drawn:
    """A tiny pipeline and what its denoiser is called with when it draws."""

    pipeline: DiffusionPipeline
    denoiser: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @torch.no_grad()
    def predicted(self) -> Tensor:
        found = self.denoiser(*self.arguments, **self.options)[0]
        assert isinstance(found, Tensor)
        return found.clone()


@pytest.fixture(scope="module")
def drawn(tiny_folder: TinyFolder) -> Iterator[Callable[[str], Drawn]]:
    made: dict[str, Drawn] = {}

    def of(name: str) -> Drawn:
        if name not in made:
            pipeline = DiffusionPipeline.from_pretrained(tiny_folder(name))
            pipeline.set_progress_bar_config(disable=True)
            denoiser = getattr(pipeline, PARTS[name]).requires_grad_(False)
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            hook = denoiser.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
            size = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
            pipeline(prompt="a dog", generator=torch.Generator().manual_seed(1), **size)
            hook.remove()
            made[name] = Drawn(pipeline, denoiser, calls[0][0], {**calls[0][1], "return_dict": False})
        return made[name]

    yield of
    made.clear()


def as_released(denoiser: nn.Module, name: str) -> AbstractContextManager[None]:
    """diffusers' loader with the tiny model's widths in place of constants."""
    if name != "flux":
        return nullcontext()
    return tiny_loaders(flux_loader(denoiser))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", PARTS)
def test_auto_is_one_of_the_others(drawn: Callable[[str], Drawn], name: str, kind: str) -> None:
    """The one that most programs read; what it writes is what that format is tested for."""
    family, model = family_named(name), drawn(name)
    chosen = choose_modules(model.denoiser, family.targets, family.default_targets, METHODS[kind])
    expected = "diffusers" if name == "flux" else "kohya"
    assert resolve_format("auto", family.export, chosen) == expected


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("name", "kind"),
    # Other ways to the same two matrices are tried on one UNet.
    [(name, kind) for name in PARTS for kind in METHODS if name != "sdxl" or kind not in ("tucker", "pissa")],
)
def test_it_loads_as_trained_or_is_refused(
    drawn: Callable[[str], Drawn], tmp_path: Path, name: str, kind: str, format: str
) -> None:
    family, model = family_named(name), drawn(name)
    keys, modules = family.export, adaptable_modules(model.denoiser)
    chosen = choose_modules(model.denoiser, family.targets, family.default_targets, METHODS[kind])
    refused = REFUSED.get((name, format), set())
    if refused is None or kind in refused:
        adapter = AdapterSet.attach(model.denoiser, chosen, seed=5)
        weights = adapter.weights()
        adapter.detach()
        with pytest.raises(AdapterError) as caught:
            refuse_unstackable(weights, resolve_format(format, keys, chosen), keys, modules)
        assert any(way in str(caught.value.remedy) for way in WAYS_OUT)
        return

    without = model.predicted()
    adapter = AdapterSet.attach(model.denoiser, chosen, seed=5)
    generator = torch.Generator().manual_seed(6)
    for key, parameter in adapter.named_parameters().items():
        parameter.data += (0.02 if key.endswith("magnitude") else 0.1) * torch.randn(
            parameter.shape, generator=generator
        )
    expected, weights, path = model.predicted(), adapter.weights(), tmp_path / "a.safetensors"
    adapter.detach()
    write_adapter(
        path,
        weights,
        part=PARTS[name],
        keys=keys,
        modules=modules,
        format=format,
        dtype=torch.float32,
        metadata={},
    )
    told = verify_adapter(path, weights, model.denoiser, part=PARTS[name], keys=keys)
    assert told.format == format
    assert (expected - without).abs().max() > 0.01, "the adapter has no effect to compare"

    loads = kind in PLAIN or (kind == "dora" and told.format == "diffusers")
    loads &= (name, told.format) != ("flux", "comfy")
    try:
        with (
            nullcontext() if loads else suppress(ValueError, RuntimeError),
            as_released(model.denoiser, name),
        ):
            model.pipeline.load_lora_weights(tmp_path, weight_name=path.name)
        # What it cannot load whole changes nothing there, instead of doing something else.
        assert (model.predicted() - (expected if loads else without)).abs().max() <= 1e-4
    finally:
        model.pipeline.unload_lora_weights()
    assert torch.equal(model.predicted(), without)
