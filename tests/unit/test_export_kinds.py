"""Files of every kind: verified, read back, computed by ComfyUI's rules, refused where nothing reads them, and what is
wrong with one is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from parity.comfyui_kinds import changed_weight
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import AdapterWeights, adaptable_modules
from burnish.adapters.targeting import choose_modules
from burnish.config.method import AdapterMethod, Boft, Loha, Lokr, Lora, Oft
from burnish.errors import AdapterError, ExportError
from burnish.export.adapter_file import read_adapter, write_adapter
from burnish.export.formats import refuse_unstackable, resolve_format
from burnish.export.metadata import _network
from burnish.export.verify import Verification, verify_adapter
from burnish.export_keys import ExportKeys, NativeModule
from burnish.family import TargetSet

STACK = ("to_q", "to_k", "to_v")
NAMES = {
    **dict.fromkeys(STACK, ("attn.qkv", STACK)),
    "out": ("attn.proj", ("out",)),
    "conv": ("patch", ("conv",)),
}


class Denoiser(nn.Module):
    """Query, key and value are one layer of the release, of 16 + 8 + 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {
                "to_q": nn.Linear(8, 16),
                "to_k": nn.Linear(8, 8),
                "to_v": nn.Linear(8, 8),
                "out": nn.Linear(16, 8),
                "norm": nn.Linear(8, 16),
                "conv": nn.Conv2d(8, 16, 3),
            }
        )


def native(name: str) -> NativeModule:
    inner = name.removeprefix("block.")
    if inner == "norm":
        return NativeModule("ada", (name,), halves_swapped=True)
    module, holds = NAMES[inner]
    return NativeModule(module, tuple(f"block.{part}" for part in holds))


KOHYA = ExportKeys("kohya", ("kohya", "diffusers"), "stable-diffusion-v1", "sd_v1")
FLUX = ExportKeys("diffusers", ("diffusers", "comfy"), "flux-1-dev", "flux1", native=native)
FUSED = ExportKeys("comfy", ("comfy", "diffusers"), "lumina-2", "lumina2", native=native)
FLUX2 = replace(FUSED, lokr="lycoris_")
Z_IMAGE = replace(FLUX, lokr="diffusion_model.")
SCRIPTS = replace(FLUX, formats=("diffusers", "comfy", "kohya"), native_kohya=("ComfyUI", "diffusers"))
KEYS = {"scripts": SCRIPTS, "kohya": KOHYA, "flux": FLUX, "fused": FUSED, "flux2": FLUX2, "z_image": Z_IMAGE}
METHODS: Mapping[str, AdapterMethod] = {
    "lora": Lora(rank=4, alpha=6.0),
    "tucker": Lora(rank=4, alpha=6.0, tucker=True),
    "pissa": Lora(rank=4, alpha=6.0, start="pissa"),
    "dora": Lora(rank=4, alpha=6.0, dora=True),
    "loha": Loha(kind="loha", rank=3, alpha=2.0),
    "loha, tucker": Loha(kind="loha", rank=3, tucker=True),
    "lokr": Lokr(kind="lokr", factor=4),
    "lokr, thin": Lokr(kind="lokr", factor=2, full_rank=False, rank=1, alpha=3.0, tucker=True),
    "dokr": Lokr(kind="lokr", factor=4, dora=True),
    "dokr, thin": Lokr(kind="lokr", factor=2, full_rank=False, rank=1, alpha=3.0, tucker=True, dora=True),
    "oft": Oft(kind="oft", block_size=4),
    "boft": Boft(kind="boft", block_size=4),
}
# Kinds that stack, and those with a way around it.
FILES = [
    *((kind, "kohya", "auto") for kind in METHODS),
    *((kind, "flux", "auto") for kind in METHODS),
    *((kind, "flux", "comfy") for kind in METHODS if "ok" not in kind and kind != "boft"),
    *((kind, "scripts", "kohya") for kind in ("lora", "tucker", "dora", "loha", "oft")),
    *((kind, "fused", "auto") for kind in ("dora", "loha", "oft", "pissa")),
    *((kind, keys, "auto") for kind in METHODS if "ok" in kind for keys in ("flux2", "z_image")),
    ("dora", "fused", "diffusers"),
    ("dora", "kohya", "diffusers"),
]


def trained(
    kind: str, *, without: tuple[str, ...] = ("*norm",)
) -> tuple[Denoiser, dict[str, AdapterWeights]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser()
    method = METHODS[kind].model_copy(update={"exclude": list(without)})
    chosen = choose_modules(denoiser, {"all": TargetSet(("*",), "")}, "all", method)
    adapter = AdapterSet.attach(denoiser, chosen, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter.named_parameters().items():
        spread = 0.05 if name.endswith("magnitude") else 0.3
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return denoiser, adapter.weights()


def write(
    path: Path,
    denoiser: nn.Module,
    weights: Mapping[str, AdapterWeights],
    keys: ExportKeys,
    format: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Path:
    modules = adaptable_modules(denoiser)
    return write_adapter(
        path, weights, part="transformer", keys=keys, modules=modules, format=format, dtype=dtype, metadata={}
    )


def verify(
    path: Path, denoiser: nn.Module, weights: Mapping[str, AdapterWeights], keys: ExportKeys
) -> Verification:
    return verify_adapter(path, weights, denoiser, part="transformer", keys=keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "family", "format"), FILES)
def test_it_is_verified_and_read_back(
    tmp_path: Path, kind: str, family: str, format: str, dtype: torch.dtype
) -> None:
    denoiser, weights = trained(kind)
    path = write(tmp_path / "a.safetensors", denoiser, weights, KEYS[family], format, dtype)
    facts = verify(path, denoiser, weights, KEYS[family])
    exact = dtype == torch.float32
    assert (facts.modules, facts.dtype) == (5, str(dtype).removeprefix("torch."))
    assert facts.max_relative_difference < (1e-5 if exact else 0.02)
    read = read_adapter(path, adaptable_modules(denoiser), part="transformer", keys=KEYS[family])
    assert read.notes == ()
    assert read.weights.keys() == weights.keys()
    for name, one in read.weights.items():
        weight = adaptable_modules(denoiser)[name].weight
        tolerance = 1e-5 if exact else 0.1
        torch.testing.assert_close(
            one.delta(weight), weights[name].delta(weight), rtol=tolerance, atol=tolerance
        )
    AdapterSet.from_weights(Denoiser(), read.weights)


@pytest.mark.parametrize(("kind", "family", "format"), [one for one in FILES if one[2] != "diffusers"])
def test_comfyui_computes_the_trained_weights(tmp_path: Path, kind: str, family: str, format: str) -> None:
    denoiser, weights = trained(kind)
    keys = KEYS[family]
    tensors = safetensors.torch.load_file(write(tmp_path / "a.safetensors", denoiser, weights, keys, format))
    modules = adaptable_modules(denoiser)
    base = {name: module.weight.detach() for name, module in modules.items()}
    expected = {name: base[name] + one.delta(base[name]) for name, one in weights.items()}
    starts = {f"lora_unet_{name.replace('.', '_')}": name for name in modules}
    starts |= {f"{prefix}{name}": name for name in modules for prefix in ("transformer.", "diffusion_model.")}
    starts |= {f"lycoris_{name.replace('.', '_')}": name for name in modules}
    if family in ("fused", "scripts") or format == "comfy":
        parts = {f"diffusion_model.{native(name).name}": native(name).holds for name in modules}
        if format == "kohya":
            parts = {
                f"lora_unet_{native(name).name.replace('.', '_')}": native(name).holds for name in modules
            }
        starts = {start: start for start in parts}
        base = {start: torch.cat([base[part] for part in holds]) for start, holds in parts.items()}
        expected = {
            start: torch.cat([expected[part] for part in holds])
            for start, holds in parts.items()
            if holds[0] in expected
        }
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        start = next(start for start in starts if key.startswith(f"{start}."))
        found.setdefault(starts[start], {})[key.removeprefix(f"{start}.")] = tensor
    assert found.keys() == expected.keys()
    for name, pieces in found.items():
        changed = changed_weight(pieces, base[name])
        assert changed is not None, name
        torch.testing.assert_close(changed, expected[name], rtol=1e-5, atol=1e-5)


def test_halves_that_the_release_swaps(tmp_path: Path) -> None:
    for kind in ("dora", "loha", "oft"):
        denoiser, weights = trained(kind, without=())
        path = write(tmp_path / f"{kind}.safetensors", denoiser, weights, FUSED)
        assert verify(path, denoiser, weights, FUSED).modules == 6
        own = {
            key.removeprefix("diffusion_model.ada."): one
            for key, one in safetensors.torch.load_file(path).items()
            if ".ada." in key
        }
        weight = denoiser.block["norm"].weight.detach()
        changed = changed_weight(own, torch.cat(weight.chunk(2)[::-1]))
        assert changed is not None
        expected = weight + weights["block.norm"].delta(weight)
        torch.testing.assert_close(torch.cat(changed.chunk(2)[::-1]), expected, rtol=1e-5, atol=1e-5)
        read = read_adapter(path, adaptable_modules(denoiser), part="transformer", keys=FUSED).weights
        found = weight + read["block.norm"].delta(weight)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_was_not_trained_of_a_stack_stays(tmp_path: Path) -> None:
    for kind in ("dora", "loha", "oft"):
        denoiser, weights = trained(kind, without=("*norm", "*to_k"))
        path = write(tmp_path / f"{kind}.safetensors", denoiser, weights, FUSED)
        assert verify(path, denoiser, weights, FUSED).modules == 4
        tensors = safetensors.torch.load_file(path)
        rows = slice(16, 24)
        for key in tensors:
            if key.endswith(("qkv.dora_scale", "qkv.hada_w1_a", "qkv.hada_w2_a")):
                tensors[key][rows] += 0.2
            if key.endswith("qkv.oft_blocks"):
                tensors[key][4] += torch.randn(4, 4)
        safetensors.torch.save_file(tensors, path)
        with pytest.raises(ExportError, match=r"for others|dora_scale"):
            verify(path, denoiser, weights, FUSED)


Tensors = dict[str, Tensor]


def scaled(tensors: Tensors, ending: str) -> None:
    for key in tensors:
        if key.endswith(ending):
            tensors[key] *= 1.05


def dropped(tensors: Tensors, word: str) -> None:
    for key in [key for key in tensors if word in key]:
        del tensors[key]


def renamed(tensors: Tensors, old: str, new: str) -> None:
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


def transposed(tensors: Tensors, ending: str) -> None:
    for key in tensors:
        if key.endswith(ending) and "to_v" in key:
            tensors[key] = tensors[key].mT.contiguous()


FACTORS = {
    "dora": ("lora_up.weight", "lora_up.weight"),
    "loha": ("hada_w2_a", "hada_w1_a"),
    "lokr": ("lokr_w2", "lokr_w2"),
    "lokr, thin": ("lokr_w1", "lokr_w2_a"),
    "dokr": ("lokr_w2", "lokr_w2"),
    "dokr, thin": ("lokr_w1", "lokr_w2_a"),
    "oft": ("oft_blocks", "oft_blocks"),
    "boft": ("oft_blocks", "oft_blocks"),
}
BREAKS: dict[str, Callable[[Tensors, str], None]] = {
    "delta x 1.05": lambda t, kind: scaled(t, FACTORS[kind][0]),
    "transposed": lambda t, kind: transposed(t, FACTORS[kind][1]),
    "alpha is missing": lambda t, kind: dropped(t, ".alpha"),
    "a module is missing": lambda t, kind: dropped(t, "to_v"),
    "prefix": lambda t, kind: renamed(t, "lora_unet_", "lora_transformer_"),
    "name": lambda t, kind: renamed(t, "to_q", "q"),
    "alpha halved": lambda t, kind: [t[key].mul_(0.5).sub_(0.5) for key in t if key.endswith("alpha")],  # type: ignore[dict-item]
    "a piece is missing": lambda t, kind: dropped(t, f"to_v.{FACTORS[kind][0]}"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("kind", FACTORS)
def test_what_readers_would_get_wrong_is_found(
    tmp_path: Path, kind: str, broken: str, dtype: torch.dtype
) -> None:
    denoiser, weights = trained(kind)
    path = write(tmp_path / "a.safetensors", denoiser, weights, KOHYA, dtype=dtype)
    verify(path, denoiser, weights, KOHYA)
    tensors = safetensors.torch.load_file(path)
    BREAKS[broken](tensors, kind)
    safetensors.torch.save_file(tensors, path)
    if kind in ("lokr", "dokr") and broken == "alpha halved":
        verify(path, denoiser, weights, KOHYA)  # nobody reads it where both factors are whole
        return
    with pytest.raises(ExportError):
        verify(path, denoiser, weights, KOHYA)


def start_of(key: str) -> str:
    return next(key.removesuffix(ending) for ending in (".weight", "") if key.endswith(ending)).rpartition(
        "."
    )[0]


def doubled(tensors: Tensors, kind: str) -> None:
    """The effect of one module, 1.05 times what it was."""
    factors = {
        "lora": "lora_up lora_B",
        "loha": "hada_w1_a",
        "lok": "lokr_w1",
        "dok": "lokr_w1",
        "oft": "oft_blocks",
    }
    ends = factors[next((one for one in factors if one in kind), "lora")].split()
    tensors[next(key for key in tensors if any(end in key for end in ends))] *= 1.05


def without_first(tensors: Tensors, kind: str) -> None:
    first = start_of(next(iter(tensors)))
    for key in [key for key in tensors if start_of(key) == first]:
        del tensors[key]


def other_alpha(tensors: Tensors, kind: str) -> None:
    """One is missing; in formats without any, one is there."""
    present = [key for key in tensors if key.endswith(".alpha")]
    if present:
        del tensors[present[0]]
    else:
        tensors[f"{start_of(next(iter(tensors)))}.alpha"] = torch.tensor(2.0)


def turned(tensors: Tensors, kind: str) -> None:
    key = next(
        key
        for key, one in tensors.items()
        if one.dim() > 1 and one.shape[-1] > 1 and not torch.equal(one, one.mT) and "dora" not in key
    )
    tensors[key] = tensors[key].mT.contiguous()


EVERYWHERE: dict[str, Callable[[Tensors, str], None]] = {
    "alpha": other_alpha,
    "prefix": lambda t, kind: [t.__setitem__(f"x_{key}", t.pop(key)) for key in list(t)],  # type: ignore[dict-item]
    "transposed": turned,
    "dropped module": without_first,
    "delta x 1.05": doubled,
}


@pytest.mark.parametrize("broken", EVERYWHERE)
@pytest.mark.parametrize(("kind", "family", "format"), FILES)
def test_broken_files_of_every_kind_and_format_are_found(
    tmp_path: Path, kind: str, family: str, format: str, broken: str
) -> None:
    denoiser, weights = trained(kind)
    path = write(tmp_path / "a.safetensors", denoiser, weights, KEYS[family], format)
    verify(path, denoiser, weights, KEYS[family])
    tensors = safetensors.torch.load_file(path)
    EVERYWHERE[broken](tensors, kind)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ExportError):
        verify(path, denoiser, weights, KEYS[family])


TO_Q = "transformer.block.to_q"


def as_lycoris(tensors: Tensors) -> None:
    """The lengths as LyCORIS means them, which ComfyUI takes otherwise."""
    magnitude = next(one for key, one in tensors.items() if key.startswith(TO_Q) and "magnitude" in key)
    tensors[f"{TO_Q}.dora_scale"] = magnitude[:, None].clone()


def flat(tensors: Tensors) -> None:
    tensors[f"{TO_Q}.dora_scale"] = tensors[f"{TO_Q}.dora_scale"].flatten()


@pytest.mark.parametrize(
    ("break_file", "expected"),
    [
        (lambda t: dropped(t, "to_q.dora_scale"), "dora_scale"),
        (lambda t: dropped(t, "_magnitude_vector"), "magnitude_vector"),
        (lambda t: scaled(t, "to_q.dora_scale"), "another weight"),
        (lambda t: scaled(t, "_magnitude_vector"), r"another lo\w+_magnitude_vector"),
        (flat, "shape"),
        (as_lycoris, "another weight"),
    ],
)
@pytest.mark.parametrize("kind", ["dora", "dokr"])
def test_lengths_that_readers_would_get_wrong_are_found(
    tmp_path: Path, kind: str, break_file: Callable[[Tensors], None], expected: str
) -> None:
    denoiser, weights = trained(kind)
    path = write(tmp_path / "a.safetensors", denoiser, weights, FLUX)
    tensors = safetensors.torch.load_file(path)
    break_file(tensors)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ExportError, match=expected):
        verify(path, denoiser, weights, FLUX)


@pytest.mark.parametrize(
    ("kind", "keys", "format", "expected"),
    [
        ("loha", KOHYA, "diffusers", "save.format: kohya"),
        ("lokr", FLUX, "comfy", "Kronecker"),
        ("lokr", FUSED, "auto", "Kronecker"),
        ("oft", replace(KOHYA, comfyui=False), "auto", "no program loads OFT"),
        ("lokr", replace(FLUX, comfyui=False), "diffusers", "burnish adapter convert"),
    ],
)
def test_what_nothing_reads_is_refused_with_a_way_out(
    kind: str, keys: ExportKeys, format: str, expected: str
) -> None:
    chosen = choose_modules(Denoiser(), {"all": TargetSet(("*",), "")}, "all", METHODS[kind])
    with pytest.raises(AdapterError) as caught:
        resolve_format(format, keys, chosen)
    assert expected in f"{caught.value} {caught.value.remedy}"
    assert "burnish adapter convert" in str(caught.value.remedy)


def test_halves_read_the_other_way_round_are_refused() -> None:
    chosen = choose_modules(Denoiser(), {"all": TargetSet(("*",), "")}, "all", METHODS["dora"])
    with pytest.raises(AdapterError, match="the other way round"):
        resolve_format("auto", FLUX, chosen)
    assert resolve_format("comfy", FLUX, chosen) == "comfy"
    del chosen["block.norm"]
    assert resolve_format("auto", FLUX, chosen) == "diffusers"


def test_where_only_diffusers_reads_dora_that_is_written() -> None:
    chosen = choose_modules(Denoiser(), {"all": TargetSet(("*",), "")}, "all", METHODS["dora"])
    assert resolve_format("auto", replace(KOHYA, comfyui=False), chosen) == "diffusers"
    assert resolve_format("auto", KOHYA, chosen) == "kohya"


def test_metadata_name_the_kind() -> None:
    assert _network(trained("lokr")[1]) == {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "lokr"}',
    }
    told = _network(trained("dora")[1])
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "6")
    assert '"dora_wd": "True"' in told["ss_network_args"]


def test_blocks_that_do_not_stack_are_known_before_training() -> None:
    method = Boft(kind="boft", block_size=4, exclude=["*norm"])
    denoiser = Denoiser()
    chosen = choose_modules(denoiser, {"all": TargetSet(("*",), "")}, "all", method)
    assert resolve_format("auto", FUSED, chosen) == "comfy"
    weights = AdapterSet.attach(denoiser, chosen, seed=0).weights()
    with pytest.raises(AdapterError, match="not of one size"):
        refuse_unstackable(weights, "comfy", FUSED, adaptable_modules(denoiser))
