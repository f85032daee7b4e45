"""Merging and extracting against what diffusers, peft and LyCORIS make of the same files."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import comfyui_rules
import diffusers_rules
import pytest
import toolbox_files as files
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from lycoris import utils as lycoris_utils
from lycoris.functional import boft, diag_oft, loha, lokr
from lycoris.functional.general import weight_decompose
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from test_toolbox_convert import assert_deltas, attention, read, shapes_of, unet_names
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "family"))
import original_layout

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules
from burnish.adapters.lora import LoraWeights
from burnish.adapters.targeting import choose_modules
from burnish.config.method import AdapterMethod, Boft, Loha, Lokr, Lora, Oft
from burnish.errors import AdapterError, ExportError, ModelError
from burnish.export.adapter_file import write_adapter
from burnish.families.registry import family_named
from burnish.family import TargetSet
from burnish.toolbox.base import Base
from burnish.toolbox.combine import Combination
from burnish.toolbox.convert import Carry, convert
from burnish.toolbox.extract import Extraction, extract
from burnish.toolbox.low_rank import RankChoice, factored
from burnish.toolbox.merge import Weighted, merge_adapters, merge_into
from burnish.toolbox.pieces import ModuleAdapter
from burnish.toolbox.source import AdapterSource
from burnish.toolbox.writing import AdapterWriter

TinyFolder = Callable[[str], Path]


def unet_adapters(folder: Path, to: Path) -> list[Path]:
    """Two that overlap: other ranks, strengths and layers."""
    shapes = shapes_of(folder, "unet")
    first = files.matrices(files.chosen(shapes, unet_names), 3, seed=1)
    second = files.matrices(files.chosen(shapes, lambda n: n.endswith(("to_q", "conv1", "conv2"))), 2, seed=2)
    return [
        files.saved(to / "one.safetensors", files.kohya(first, 6.0)),
        files.saved(to / "two.safetensors", files.kohya(second, 1.0)),
    ]


def merged_into(
    base: Path, adapters: Mapping[Path, float], to: Path, family: str, combination: Combination | None = None
) -> Path:
    opened = [Weighted(AdapterSource(path, family), weight) for path, weight in adapters.items()]
    with Base(base, family_named(family)) as weights:
        merge_into(weights, opened, to, combination or Combination(), Carry(base=weights))
    for one in opened:
        one.source.file.close()
    return to


def merged(
    adapters: Mapping[Path, float],
    to: Path,
    family: str,
    combination: Combination | None = None,
    **options: object,
) -> Path:
    opened = [Weighted(AdapterSource(path, family), weight) for path, weight in adapters.items()]
    merge_adapters(opened, to, combination or Combination(), Carry(**options))  # type: ignore[arg-type]
    for one in opened:
        one.source.file.close()
    return to


def unet_of(folder: Path) -> dict[str, Tensor]:
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    return {name: tensor.clone() for name, tensor in loaded.unet.state_dict().items()}


def test_merging_into_a_model_is_what_diffusers_fuses(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("sd15")
    one, two = unet_adapters(folder, tmp_path)
    theirs = DiffusionPipeline.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of a second adapter on the same layers
        for name, path in (("one", one), ("two", two)):
            theirs.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    theirs.set_adapters(["one", "two"], [0.7, -0.4])
    theirs.fuse_lora(components=["unet"], adapter_names=["one", "two"])
    theirs.unload_lora_weights()

    ours = merged_into(folder, {one: 0.7, two: -0.4}, tmp_path / "merged", "sd15")
    found, expected = unet_of(ours), theirs.unet.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )
    other = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.parent.name != "unet"]
    assert all((ours / p).read_bytes() == (folder / p).read_bytes() for p in other)


def test_a_single_file_keeps_its_names_types_and_what_is_not_changed(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = tiny_folder("sd15")
    one, _ = unet_adapters(folder, tmp_path)
    before = unet_of(folder)
    native = original_layout.unet_in_original_names(before, 4, 2)
    single = {f"model.diffusion_model.{name}": tensor.half() for name, tensor in native.items()}
    single["first_stage_model.mystery"] = torch.arange(6, dtype=torch.int32)
    save_file(single, tmp_path / "base.safetensors", {"note": "kept"})

    path = merged_into(tmp_path / "base.safetensors", {one: 1.0}, tmp_path / "out.safetensors", "sd15")
    found = load_file(path)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in single.items()
    }
    deltas = read(one, "sd15", folder, "unet")
    changed = {
        name: t + deltas.get(name.removesuffix(".weight"), torch.zeros(())) for name, t in before.items()
    }
    expected = original_layout.unet_in_original_names(changed, 4, 2)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[f"model.diffusion_model.{name}"].float(), tensor, rtol=2e-3, atol=1e-3
        )
    assert torch.equal(found["first_stage_model.mystery"], single["first_stage_model.mystery"])


def test_the_sum_of_adapters_loads_in_diffusers_as_their_sum(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("sd15")
    one, two = unet_adapters(folder, tmp_path)
    path = merged({one: 0.7, two: -1.5}, tmp_path / "sum.safetensors", "sd15")
    parts = [(0.7, read(one, "sd15", folder, "unet")), (-1.5, read(two, "sd15", folder, "unet"))]
    expected: dict[str, Tensor] = {}
    for weight, deltas in parts:
        for name, delta in deltas.items():
            expected[name] = expected.get(name, 0) + weight * delta
    assert_deltas(diffusers_rules.loaded_deltas(folder, path, part="unet"), expected)
    # All ranks together are enough, so that nothing is rounded off; LoRAs of fused modules and of parts add up, too.
    smaller = merged({one: 0.7, two: -1.5}, tmp_path / "five.safetensors", "sd15", rank=RankChoice(rank=5))
    assert_deltas(read(smaller, "sd15", folder, "unet"), expected)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ties_and_dare_are_those_of_peft(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    changes = [torch.randn(16, 24, generator=generator) for _ in range(3)]
    combination = Combination(method, density=0.4, seed=7)  # type: ignore[arg-type]
    weights = torch.ones(3)
    if method == "ties":
        expected = merge_utils.ties(changes, weights, 0.4)
    else:
        # The same entries are left out; what is done with the others is peft's.
        drawn = iter([combination._thinned("a", n, torch.ones_like(c)) * 0.4 for n, c in enumerate(changes)])
        monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(drawn))
        expected = merge_utils.dare_linear(changes, weights, 0.4)
    torch.testing.assert_close(combination.combined("a", changes), expected)
    other = Combination(method, density=0.4, seed=8).combined("a", changes)  # type: ignore[arg-type]
    assert torch.equal(other, combination.combined("a", changes)) == (method == "ties")


def test_a_single_file_of_fused_and_turned_modules_is_changed_where_the_parts_lie(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """The release's layout, as written by the tests: q, k, v in one, and the last modulation the other way round."""
    folder = tiny_folder("flux")
    before = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        before |= load_file(file)
    width = before["x_embedder.weight"].shape[0]
    layers = files.chosen(
        shapes_of(folder, "transformer"), lambda n: n.endswith(("to_k", "proj_mlp", "norm_out.linear"))
    )
    found = files.matrices(layers)
    adapter = files.saved(tmp_path / "a.safetensors", files.dotted(found, "transformer."))
    save_file(comfyui_rules.flux_native(before, width), tmp_path / "base.safetensors")
    path = merged_into(tmp_path / "base.safetensors", {adapter: 0.5}, tmp_path / "out.safetensors", "flux")
    after = dict(before) | {
        f"{name}.weight": before[f"{name}.weight"] + 0.5 * files.product(*one) for name, one in found.items()
    }
    expected = comfyui_rules.flux_native(after, width)
    written = load_file(path)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            written[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize("wrong", ["strength", "module", "rows"])
def test_a_file_with_another_effect_than_its_source_is_not_accepted(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    folder = tiny_folder("flux")
    found = files.matrices(files.chosen(shapes_of(folder, "transformer"), attention))
    path = files.saved(tmp_path / "a.safetensors", files.dotted(found, "transformer."))
    written, count = AdapterWriter.lora, iter(range(10**6))

    def spoilt(self: AdapterWriter, name: str, weights: LoraWeights, **lengths: Tensor) -> None:
        if next(count) == 3:
            if wrong == "module":
                return
            up = 1.05 * weights.up if wrong == "strength" else weights.up.flip(0)
            weights = LoraWeights(weights.down, up, weights.alpha)
        written(self, name, weights, **lengths)

    monkeypatch.setattr(AdapterWriter, "lora", spoilt)
    with AdapterSource(path, "flux") as source, pytest.raises(ExportError, match=r"its effect on .* is off"):
        convert(source, tmp_path / "b.safetensors", Carry(), format="comfy")
    assert not (tmp_path / "b.safetensors").exists()


def test_an_adapter_of_another_width_is_not_loaded(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("flux")
    name = "transformer_blocks.0.attn.to_out.0"
    found = files.matrices({name: (24, 40)})
    tensors = files.dotted(found, "transformer.") | {f"transformer.{name}.dora_scale": torch.ones(24, 1)}
    path = files.saved(tmp_path / "a.safetensors", tensors)
    with (
        AdapterSource(path, "flux") as source,
        Base(folder, family_named("flux")) as base,
        pytest.raises(AdapterError, match="changes a weight of 24 rows and 40 columns"),
    ):
        convert(source, tmp_path / "b.safetensors", Carry(RankChoice(rank=2), base))


@pytest.mark.parametrize("name", ["sd15", "flux", "z_image", "wan21"])
def test_extracting_what_was_merged_gives_it_back(tiny_folder: TinyFolder, tmp_path: Path, name: str) -> None:
    """Within 1e-5 of the largest entries, for float32 weights and the rank that was merged."""
    folder, part = tiny_folder(name), "unet" if name == "sd15" else "transformer"
    found = files.matrices(
        files.chosen(shapes_of(folder, part), unet_names if name == "sd15" else attention), 3
    )
    spelled = files.kohya(found, 6.0) if name == "sd15" else files.dotted(found, "transformer.")
    adapter = files.saved(tmp_path / "a.safetensors", spelled)
    tuned = merged_into(folder, {adapter: 0.5}, tmp_path / "tuned", name)
    outcome = extract(
        folder,
        tuned,
        tmp_path / "b.safetensors",
        Extraction("locon", RankChoice(rank=3)),
        family=name,
        dtype=torch.float32,
    )
    assert outcome.losses.relative < 1e-5
    assert outcome.notes == []
    expected = {m: 0.5 * delta for m, delta in read(adapter, name, folder, part).items()}
    assert_deltas(diffusers_rules.loaded_deltas(folder, tmp_path / "b.safetensors", part=part), expected)


KINDS: Mapping[str, AdapterMethod] = {
    "tucker": Lora(rank=2, alpha=3.0, tucker=True),
    "dora": Lora(rank=2, alpha=3.0, dora=True),
    "loha": Loha(kind="loha", rank=2, alpha=3.0),
    "lokr": Lokr(kind="lokr", factor=4),
    "dokr": Lokr(kind="lokr", factor=4, dora=True),
    "oft": Oft(kind="oft", block_size=4),
    "boft": Boft(kind="boft", block_size=16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_extracting_what_was_merged_gives_every_kind_back(
    tiny_folder: TinyFolder, tmp_path: Path, kind: str
) -> None:
    """As a LoRA of full rank: within 1e-5, for float32 weights, on linear layers and convolutions."""
    folder = tiny_folder("sd15")
    unet = StableDiffusionPipeline.from_pretrained(folder).unet.requires_grad_(False)
    family = family_named("sd15")
    picked = TargetSet(("mid_block.*.attn1.to_q", "mid_block.resnets.0.conv1"), "")
    adapter = AdapterSet.attach(unet, choose_modules(unet, {"some": picked}, "some", KINDS[kind]), seed=1)
    draw = torch.Generator().manual_seed(2)
    for parameter in adapter.named_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    weights = adapter.weights()
    adapter.detach()
    modules = adaptable_modules(unet)
    expected = {name: one.delta(modules[name].weight) for name, one in weights.items()}
    path = write_adapter(
        tmp_path / "a.safetensors",
        weights,
        part="unet",
        keys=family.export,
        modules=modules,
        dtype=torch.float32,
        metadata={},
    )
    if kind == "dora":
        as_trained = write_adapter(
            tmp_path / "c.safetensors",
            weights,
            part="unet",
            keys=family.export,
            modules=modules,
            format="diffusers",
            dtype=torch.float32,
            metadata={},
        )
        with AdapterSource(path, "sd15") as source:
            convert(source, tmp_path / "d.safetensors", Carry(), format="diffusers")
        found = load_file(tmp_path / "d.safetensors")
        for key, one in load_file(as_trained).items():
            torch.testing.assert_close(found[key], one)
    tuned = merged_into(folder, {path: 1.0}, tmp_path / "tuned", "sd15")
    whole = Extraction("locon", RankChoice(energy=1 - 1e-12))
    outcome = extract(folder, tuned, tmp_path / "b.safetensors", whole, dtype=torch.float32)
    assert outcome.modules == len(expected) == 2
    assert_deltas(diffusers_rules.loaded_deltas(folder, tmp_path / "b.safetensors", part="unet"), expected)


def test_an_extracted_layer_is_what_lycoris_extracts(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("sd15")
    before = unet_of(folder)
    generator = torch.Generator().manual_seed(5)
    chosen = [
        n for n in before if n.endswith(("attn1.to_q.weight", "conv1.weight", "norm1.weight", "norm1.bias"))
    ]
    after = dict(before) | {
        n: before[n] + 0.1 * torch.randn(before[n].shape, generator=generator) for n in chosen
    }
    for path, weights in ((tmp_path / "a.safetensors", before), (tmp_path / "b.safetensors", after)):
        save_file(
            original_layout.prefixed(
                original_layout.unet_in_original_names(weights, 4, 2), "model.diffusion_model."
            ),
            path,
        )

    path = tmp_path / "out.safetensors"
    wanted = Extraction("locon", RankChoice(rank=2), biases=True)
    outcome = extract(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", path, wanted, dtype=torch.float32
    )
    file = load_file(path)
    for name in chosen:
        stem = "lora_unet_" + name.rpartition(".")[0].replace(".", "_")
        difference = after[name] - before[name]
        if difference.dim() == 1:
            kind = "diff" if name.endswith("weight") else "diff_b"
            torch.testing.assert_close(file[f"{stem}.{kind}"], difference)
            continue
        take = lycoris_utils.extract_conv if difference.dim() == 4 else lycoris_utils.extract_linear
        (down, up, _), mode = take(difference, "fixed", 2)
        assert mode == "low rank"
        expected = files.product(down, up)
        found = files.product(file[f"{stem}.lora_down.weight"], file[f"{stem}.lora_up.weight"])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert outcome.notes == []
    again = merged_into(tmp_path / "a.safetensors", {path: 1.0}, tmp_path / "again.safetensors", "sd15")
    untouched, wished = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    found = load_file(again)
    small = [n for n, one in wished.items() if one.dim() == 1 and not torch.equal(one, untouched[n])]
    assert len(small) == sum("norm" in name for name in chosen)
    for name in small:
        torch.testing.assert_close(found[name], wished[name])
    without = Extraction("lora", RankChoice(rank=2))
    outcome = extract(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors", without
    )
    assert "tensors changed that this adapter does not hold" in outcome.notes[0]


def test_an_extracted_kronecker_product_is_found_again(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("flux")
    generator = torch.Generator().manual_seed(4)
    name = "transformer_blocks.0.ff.net.0.proj"
    out, into = shapes_of(folder, "transformer")[name]
    first, second = (
        torch.randn(4, 4, generator=generator),
        torch.randn(out // 4, into // 4, generator=generator),
    )
    tensors = {
        f"lycoris_{name.replace('.', '_')}.lokr_w1": first,
        f"lycoris_{name.replace('.', '_')}.lokr_w2": second,
    }
    adapter = files.saved(tmp_path / "a.safetensors", tensors)
    tuned = merged_into(folder, {adapter: 1.0}, tmp_path / "tuned", "flux")
    wanted = Extraction("lokr", RankChoice(rank=1), factor=4)
    extract(
        folder, tuned, tmp_path / "b.safetensors", wanted, family="flux", dtype=torch.float32, format="comfy"
    )
    assert_deltas(
        read(tmp_path / "b.safetensors", "flux", folder, "transformer"), {name: torch.kron(first, second)}
    )


def random_pieces(kind: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    out, into = shape[0], shape[1]
    volume = int(torch.tensor(shape[2:]).prod()) if shape[2:] else 1

    def drawn(*size: int) -> Tensor:
        return 0.3 * torch.randn(*size, generator=generator)

    match kind:
        case "loha":
            pieces = {f"hada_w{n}_a": drawn(out, 3) for n in (1, 2)}
            return pieces | {f"hada_w{n}_b": drawn(3, into * volume) for n in (1, 2)}
        case "lokr":
            return {
                "lokr_w1": drawn(4, 2),
                "lokr_w2_a": drawn(out // 4, 3),
                "lokr_w2_b": drawn(3, into // 2 * volume),
            }
        case "oft":
            return {"oft_blocks": drawn(out // 4, 4, 4)}
        case "boft":
            return {"oft_blocks": drawn(2, out // 4, 4, 4)}
    raise AssertionError(kind)


@pytest.mark.parametrize("shape", [(16, 12), (16, 8, 3, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("kind", ["loha", "lokr", "oft", "boft"])
def test_other_kinds_change_weights_as_in_lycoris_and_become_the_best_lora(
    tmp_path: Path, kind: str, shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pieces = random_pieces(kind, shape)
    match kind:
        case "loha":
            given = [pieces[f"hada_w1_{x}"] for x in "ba"] + [pieces[f"hada_w2_{x}"] for x in "ba"]
            expected = loha.diff_weight(*given, None, None, gamma=5.0 / 3).reshape(shape)
        case "lokr":
            whole = lokr.diff_weight(
                pieces["lokr_w1"], None, None, None, pieces["lokr_w2_a"], pieces["lokr_w2_b"], None, gamma=5.0
            )
            expected = whole.reshape(shape)
        case "oft":
            expected = diag_oft.diff_weight(weight, pieces["oft_blocks"], None)
        case _:
            expected = boft.diff_weight(weight, pieces["oft_blocks"], None)
    adapter = ModuleAdapter(kind, pieces, shape, None if "oft" in kind else 5.0)  # type: ignore[arg-type]
    torch.testing.assert_close(adapter.delta(weight), expected, rtol=1e-4, atol=1e-5)

    values = torch.linalg.svdvals(expected.flatten(1))
    low = factored(expected.flatten(1), RankChoice(rank=4))
    assert low.squared_error == pytest.approx(float(values[4:].square().sum()), rel=1e-3)


def test_a_lokr_becomes_a_lora_with_the_error_that_is_told(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("flux")
    name = "transformer_blocks.0.attn.to_q"  # which the release keeps in one module with others
    shape = shapes_of(folder, "transformer")[name]
    pieces = random_pieces("lokr", shape)
    stem = f"lycoris_{name.replace('.', '_')}"
    tensors = {f"{stem}.{piece}": one for piece, one in pieces.items()} | {f"{stem}.alpha": torch.tensor(5.0)}
    path = files.saved(tmp_path / "lokr.safetensors", tensors)
    expected = ModuleAdapter("lokr", pieces, shape, 5.0).delta()
    with AdapterSource(path, "flux") as source:
        with pytest.raises(AdapterError, match=r"lokr of .* cannot be carried over.*\n.*--as lora"):
            convert(source, tmp_path / "a.safetensors", Carry(), format="comfy")
        outcome = convert(source, tmp_path / "b.safetensors", Carry(rank=RankChoice(rank=4)))
    found = diffusers_rules.loaded_deltas(folder, tmp_path / "b.safetensors")[name]
    error = float((found - expected).norm() / expected.norm())
    assert outcome.losses.relative == pytest.approx(error, rel=1e-3)
    values = torch.linalg.svdvals(expected)
    assert error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-3)


def test_a_loha_of_a_fused_module_is_taken_apart_exactly(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("flux")
    parts = [f"single_transformer_blocks.1.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    shapes = shapes_of(folder, "transformer")
    rows = [shapes[part][0] for part in parts]
    pieces = random_pieces("loha", (sum(rows), shapes[parts[0]][1]))
    stem = "lora_unet_single_blocks_1_linear1"
    tensors = {f"{stem}.{piece}": one for piece, one in pieces.items()} | {f"{stem}.alpha": torch.tensor(2.0)}
    path = files.saved(tmp_path / "loha.safetensors", tensors)
    with AdapterSource(path, "flux") as source:
        assert convert(source, tmp_path / "b.safetensors", Carry()).readers == ("ComfyUI",)
    whole = ModuleAdapter("loha", pieces, (sum(rows), shapes[parts[0]][1]), 2.0).delta()
    expected = dict(zip(parts, torch.split(whole, rows), strict=True))
    assert_deltas(read(tmp_path / "b.safetensors", "flux", folder, "transformer"), expected)


def test_dora_of_peft_has_the_same_weights_in_comfyui(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """ComfyUI's rule: m' (W + dW) / ||W||, rows (`weight_decompose`); peft and LyCORIS divide by ||W + dW||."""
    folder = tiny_folder("flux")
    name = "transformer_blocks.0.attn.to_out.0"
    shape = shapes_of(folder, "transformer")[name]
    down, up = files.matrices({name: shape})[name]
    with Base(folder, family_named("flux")) as base:
        weight = base.read(f"{name}.weight")
        magnitude = weight.norm(dim=1) * torch.linspace(0.5, 1.5, shape[0])
        tensors = files.dotted({name: (down, up)}, "transformer.")
        tensors[f"transformer.{name}.lora_magnitude_vector"] = magnitude
        path = files.saved(tmp_path / "peft.safetensors", tensors)
        expected = weight_decompose(weight + files.product(down, up), magnitude[:, None])
        with AdapterSource(path, "flux") as source:
            with pytest.raises(AdapterError, match=r"depends on the base model\n.*--base"):
                convert(source, tmp_path / "a.safetensors", Carry(), format="comfy")
            convert(source, tmp_path / "a.safetensors", Carry(base=base), format="comfy")
            convert(source, tmp_path / "b.safetensors", Carry(base=base), format="diffusers")
            convert(source, tmp_path / "c.safetensors", Carry(RankChoice(energy=0.999999), base))
    comfy = load_file(tmp_path / "a.safetensors")
    stem = "diffusion_model.double_blocks.0.img_attn.proj"
    scale = comfy[f"{stem}.dora_scale"]
    assert scale.shape == (shape[0], 1)
    merged = scale * (weight + files.product(*(comfy[f"{stem}.lora_{m}.weight"] for m in "AB")))
    torch.testing.assert_close(merged / weight.norm(dim=1, keepdim=True), expected, rtol=1e-5, atol=1e-5)
    both = load_file(tmp_path / "b.safetensors")
    torch.testing.assert_close(both[f"transformer.{name}.lora_magnitude_vector"], magnitude)
    torch.testing.assert_close(both[f"transformer.{name}.dora_scale"], scale)
    plain = read(tmp_path / "c.safetensors", "flux", folder, "transformer")[name]
    torch.testing.assert_close(weight + plain, expected, rtol=1e-2, atol=1e-2)
    fused = merged_into(folder, {path: 1.0}, tmp_path / "merged", "flux")
    (file,) = (fused / "transformer").glob("*.safetensors")
    torch.testing.assert_close(load_file(file)[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_lengths_of_rows_stay_as_they_were_trained(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """In float32 whatever the matrices are kept in, both where a file tells both, and with the readers named that read
    what is there."""
    folder = tiny_folder("flux")
    name = "transformer_blocks.0.attn.to_out.0"
    shape = shapes_of(folder, "transformer")[name]
    stem = f"transformer.{name}"
    tensors = files.dotted(files.matrices({name: shape}), "transformer.")
    tensors = {key: one.bfloat16() for key, one in tensors.items()}
    lengths = {
        f"{stem}.lora_magnitude_vector": 1 + torch.rand(shape[0]),
        f"{stem}.dora_scale": 1 + torch.rand(shape[0], 1),
    }
    with AdapterSource(files.saved(tmp_path / "both.safetensors", tensors | lengths), "flux") as source:
        for format, start in (
            ("diffusers", stem),
            ("comfy", "diffusion_model.double_blocks.0.img_attn.proj"),
        ):
            path = tmp_path / f"{format}.safetensors"
            outcome = convert(source, path, Carry(), format=format)
            assert "ComfyUI" in (outcome.readers or ())
            found = load_file(path)
            assert found[f"{start}.lora_A.weight"].dtype == torch.bfloat16
            for key, one in lengths.items():
                assert torch.equal(found[start + key.removeprefix(stem)], one)
    del lengths[f"{stem}.dora_scale"]
    with AdapterSource(files.saved(tmp_path / "peft.safetensors", tensors | lengths), "flux") as source:
        outcome = convert(source, tmp_path / "c.safetensors", Carry())
    assert outcome.readers == ("diffusers",)
    assert "--base" in outcome.notes[0]


def test_a_base_of_another_model_is_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    one, _ = unet_adapters(tiny_folder("sd15"), tmp_path)
    with AdapterSource(one, "sd15") as source:
        with pytest.raises(ModelError, match=r"is not Stable Diffusion 1\.5"):
            Base(tiny_folder("sdxl"), source.model.family if source.model else None)
        with (
            Base(tiny_folder("sdxl")) as base,
            pytest.raises(AdapterError, match=r"has no module|changes a weight of"),
        ):
            merge_into(base, [Weighted(source, 1.0)], tmp_path / "x", Combination(), Carry())
    with pytest.raises(ModelError, match=r"is not FLUX\.1"):
        extract(tiny_folder("flux"), tiny_folder("sd15"), tmp_path / "x.safetensors", Extraction())
