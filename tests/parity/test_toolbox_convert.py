"""Adapter files of other programs converted: what diffusers' own loader makes of them, and ComfyUI's rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import comfyui_rules
import diffusers_rules
import pytest
import toolbox_files as files
import torch
from diffusers.loaders import lora_conversion_utils
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from burnish.adapters.layer import adaptable_modules
from burnish.errors import AdapterError
from burnish.export.adapter_file import read_adapter
from burnish.families.registry import family_named
from burnish.family import ModelSource
from burnish.toolbox.convert import Carry, convert
from burnish.toolbox.source import AdapterSource

TinyFolder = Callable[[str], Path]
Deltas = Mapping[str, Tensor]


def shapes_of(folder: Path, part: str) -> dict[str, tuple[int, ...]]:
    """Of all weights with two axes or more."""
    found = {}
    for path in (folder / part).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            told = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        found |= {
            n.removesuffix(".weight"): s for n, s in told.items() if n.endswith(".weight") and len(s) > 1
        }
    return found


def converted(source: Path, to: Path, format: str = "auto", **options: object) -> Path:
    with AdapterSource(source, options.pop("family", None)) as opened:  # type: ignore[arg-type]
        convert(opened, to, Carry(**options), format=format)  # type: ignore[arg-type]
    return to


def assert_deltas(found: Deltas, expected: Deltas) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(
            found[name].reshape(one.shape), one, rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )


def attention(name: str) -> bool:
    return any(part in name for part in (".attn", ".attention.", "ff", "mlp"))


def unet_names(name: str) -> bool:
    return (
        attention(name)
        or "conv1" in name
        or name.endswith(("proj_in", "downsamplers.0.conv", "upsamplers.0.conv"))
    )


def native_kohya(model: str, found: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """sd-scripts' fused modules, written from the matrices of their parts by the rule of blocks: A stacked, B
    block-diagonal, alpha grown with the rank."""
    native = family_named(model).skeleton(1).export.native
    assert native is not None
    stacks: dict[str, list[str]] = {}
    for name in found:
        stacks.setdefault(native(name).name, []).append(name)
    tensors = {}
    for stack, parts in stacks.items():
        parts = [part for part in native(parts[0]).holds if part in found]
        down = torch.cat([found[part][0] for part in parts])
        up = torch.block_diag(*(found[part][1] for part in parts)) if len(parts) > 1 else found[parts[0]][1]
        tensors |= files.kohya({stack: (down, up)}, alpha * len(parts))
    return tensors


RANK, ALPHA = 3, 6.0
# model, part, layers, how another program writes them, strength of that
SPELLINGS = [
    ("sd15", "unet", unet_names, lambda m: files.dotted(m, "unet."), 1.0),
    ("sd15", "unet", attention, lambda m: files.dotted(m, "base_model.model."), 1.0),
    ("sdxl", "unet", unet_names, lambda m: native_kohya("sdxl", m, ALPHA), ALPHA / RANK),
    ("flux", "transformer", attention, lambda m: native_kohya("flux", m, ALPHA), ALPHA / RANK),
    ("flux", "transformer", attention, lambda m: files.kohya(m, ALPHA, "lora_transformer_"), ALPHA / RANK),
    ("z_image", "transformer", attention, lambda m: native_kohya("z_image", m, ALPHA), ALPHA / RANK),
    ("wan21", "transformer", attention, lambda m: files.dotted(m, "transformer."), 1.0),
]


@pytest.mark.parametrize(
    ("name", "part", "layers", "spell", "strength"),
    SPELLINGS,
    ids=[
        "sd15-peft",
        "sd15-bare-peft",
        "sdxl-sgm",
        "flux-sd-scripts",
        "flux-onetrainer",
        "z_image-musubi",
        "wan21-peft",
    ],
)
def test_files_of_other_programs_load_in_diffusers_after_conversion(
    tiny_folder: TinyFolder,
    tmp_path: Path,
    name: str,
    part: str,
    layers: Callable[[str], bool],
    spell: Callable[[Mapping[str, tuple[Tensor, Tensor]]], dict[str, Tensor]],
    strength: float,
) -> None:
    folder = tiny_folder(name)
    found = files.matrices(files.chosen(shapes_of(folder, part), layers), RANK)
    source = files.saved(tmp_path / "other.safetensors", spell(found))
    expected = {module: files.product(*one, strength) for module, one in found.items()}

    path = converted(source, tmp_path / "auto.safetensors", family=name)
    assert_deltas(diffusers_rules.loaded_deltas(folder, path, part=part), expected)

    # There and back, by every format of the family.
    for format in family_named(name).skeleton(1).export.formats:
        path = converted(path, tmp_path / f"{format}.safetensors", format, family=name)
        assert_deltas(read(path, name, folder, part), expected)


def read(path: Path, family: str, folder: Path, part: str) -> dict[str, Tensor]:
    """The changes of each of diffusers' modules, from whatever spelling."""
    found = {}
    widths = shapes_of(folder, part)
    with AdapterSource(path, family) as source:
        for target, entry in source.modules.items():
            shapes = [widths[module] for module in target.holds]
            delta = entry.load((sum(shape[0] for shape in shapes), *shapes[0][1:])).delta()
            assert not target.halves_swapped
            parts = torch.split(delta, [shape[0] for shape in shapes])
            found |= {m: one for m, one in zip(target.holds, parts, strict=True) if one.count_nonzero()}
    return found


@pytest.mark.parametrize("trained", ["all", "some parts of fused modules"])
def test_comfyui_reads_what_was_converted_for_it(
    tiny_folder: TinyFolder, tmp_path: Path, trained: str
) -> None:
    folder = tiny_folder("flux")
    weights = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        weights |= load_file(file)
    width = 2 * weights["x_embedder.weight"].shape[0] // 2
    layers = {k: s for k, s in shapes_of(folder, "transformer").items() if attention(k) or "norm_out" in k}
    if trained != "all":
        layers = {k: s for k, s in layers.items() if k.endswith(("to_k", "proj_mlp", "to_out.0", "linear"))}
    found = files.matrices(layers)
    source = files.saved(tmp_path / "peft.safetensors", files.dotted(found, "transformer."))
    file = load_file(converted(source, tmp_path / "comfy.safetensors", "comfy", family="flux"))

    native = comfyui_rules.flux_native(weights, width)
    deltas, lost = comfyui_rules.comfy_delta(file, {key: one.shape for key, one in native.items()})
    assert lost == []
    expected = comfyui_rules.flux_native(
        {
            f"{n}.weight": files.product(*found[n]) if n in found else torch.zeros(s)
            for n, s in shapes_of(folder, "transformer").items()
        },
        width,
    )
    changed = {name for name, one in expected.items() if one.count_nonzero()}
    assert_deltas(deltas, {name: expected[name] for name in changed})


def test_xflux_files_mean_what_diffusers_makes_of_them(tmp_path: Path) -> None:
    shapes = {
        "double_blocks.0.processor.qkv_lora1": (48, 16),
        "double_blocks.0.processor.proj_lora1": (16, 16),
        "double_blocks.0.processor.qkv_lora2": (48, 16),
        "double_blocks.1.processor.proj_lora2": (16, 16),
        "single_blocks.3.processor.qkv_lora": (48, 16),
        "single_blocks.3.processor.proj_lora": (16, 80),
    }
    tensors = {}
    for name, (down, up) in files.matrices(shapes).items():
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    source = files.saved(tmp_path / "xflux.safetensors", tensors)
    path = converted(source, tmp_path / "out.safetensors", "diffusers")
    theirs = lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    assert_deltas(products(load_file(path)), products(theirs))


def products(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stems = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {s: files.product(tensors[f"{s}.lora_A.weight"], tensors[f"{s}.lora_B.weight"]) for s in stems}


TEXT = "text_model.encoder.layers.0."


def test_text_encoders_come_along(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """From kohya's names to those with dots and back; diffusers loads both and puts them on the same layers."""
    folder = tiny_folder("sdxl")
    unet = files.matrices(files.chosen(shapes_of(folder, "unet"), lambda n: n.endswith("attn1.to_q")))
    tensors = files.kohya(unet, ALPHA)
    for number, width in ((1, 768), (2, 1280)):
        pieces = shapes_of(folder, "text_encoder" if number == 1 else "text_encoder_2")
        width = next(s[0] for n, s in pieces.items() if n.endswith("layers.0.self_attn.q_proj"))
        clip = files.matrices({f"{TEXT}self_attn.q_proj": (width, width)}, seed=number)
        tensors |= files.kohya(clip, ALPHA, f"lora_te{number}_")
    source = files.saved(tmp_path / "kohya.safetensors", tensors)
    there = converted(source, tmp_path / "dots.safetensors", "diffusers", family="sdxl")
    assert {key for key in load_file(there) if key.startswith(f"text_encoder_2.{TEXT}")} == {
        f"text_encoder_2.{TEXT}self_attn.q_proj.lora_{m}.weight" for m in "AB"
    }
    back = load_file(converted(there, tmp_path / "back.safetensors", "kohya", family="sdxl"))
    assert back.keys() == tensors.keys()
    for stem in ("lora_te1_", "lora_te2_"):
        stem += TEXT.replace(".", "_") + "self_attn_q_proj"
        scale = float(back[f"{stem}.alpha"]) / RANK
        torch.testing.assert_close(
            files.product(back[f"{stem}.lora_down.weight"], back[f"{stem}.lora_up.weight"], scale),
            files.product(
                tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"], ALPHA / RANK
            ),
        )
    without = load_file(
        converted(source, tmp_path / "unet.safetensors", family="sdxl", drop_text_encoders=True)
    )
    assert not [key for key in without if key.startswith("lora_te")]


def test_modules_that_a_format_would_lose_are_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    found = files.matrices({"add_embedding.linear_1": (8, 12), "conv_in": (8, 4, 3, 3)})
    source = files.saved(tmp_path / "a.safetensors", files.dotted(found, "unet."))
    with pytest.raises(
        AdapterError, match="1 modules would not load from a file in the kohya format: add_embedding"
    ):
        converted(source, tmp_path / "b.safetensors", family="sdxl")
    assert not (tmp_path / "b.safetensors").exists()
    converted(source, tmp_path / "b.safetensors", "diffusers", family="sdxl")

    stray = files.saved(
        tmp_path / "c.safetensors",
        files.dotted(found, "unet.")
        | {"unet.mystery.lora_A.weight": torch.ones(1, 2), "unet.mystery.lora_B.weight": torch.ones(2, 1)},
    )
    with pytest.raises(AdapterError, match="2 of 6 keys belong to no module"):
        converted(stray, tmp_path / "d.safetensors", "diffusers", family="sdxl")
    told = load_file(
        converted(stray, tmp_path / "d.safetensors", "diffusers", family="sdxl", drop_unknown=True)
    )
    assert len(told) == 4


def test_modules_that_readers_need_are_in_the_file(tmp_path: Path) -> None:
    """Of the released width, which is known without a model; of another it is refused."""
    model = family_named("lumina2").skeleton(1)
    parts = files.chosen({"layers.3.attn.to_q": (2304, 2304)}, lambda n: True)
    source = files.saved(tmp_path / "a.safetensors", files.dotted(files.matrices(parts, 1), "transformer."))
    file = load_file(converted(source, tmp_path / "b.safetensors", "comfy", family="lumina2"))
    assert model.export.complete
    assert file["diffusion_model.layers.3.attention.qkv.lora_B.weight"].shape == (2304 + 768 + 768, 1)
    assert file["diffusion_model.layers.25.feed_forward.w1.lora_B.weight"].count_nonzero() == 0
    small = files.matrices({"layers.3.attn.to_q": (24, 24)}, 1)
    source = files.saved(tmp_path / "c.safetensors", files.dotted(small, "transformer."))
    with pytest.raises(AdapterError, match="further modules, whose sizes are not known"):
        converted(source, tmp_path / "d.safetensors", "comfy", family="lumina2")


def test_sd_scripts_names_for_sdxl_are_read_for_training_and_drawing(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = tiny_folder("sdxl")
    found = files.matrices(files.chosen(shapes_of(folder, "unet"), unet_names), RANK)
    path = files.saved(tmp_path / "sgm.safetensors", native_kohya("sdxl", found, ALPHA))
    family = family_named("sdxl").load(
        ModelSource(str(folder)), frozenset({"denoiser"}), dtype=torch.float32, device="cpu"
    )
    modules = adaptable_modules(family.denoisers["unet"])
    read_back = read_adapter(path, modules, part="unet", keys=family.export)
    expected = {module: files.product(*one, ALPHA / RANK) for module, one in found.items()}
    assert_deltas({name: one.delta() for name, one in read_back.weights.items()}, expected)
