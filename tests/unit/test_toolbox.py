"""`burnish adapter` on small files: what is told, what is refused, and that nothing half-written is left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import toolbox_files as files
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from burnish.cli.main import app
from burnish.errors import UserError
from burnish.toolbox.low_rank import RankChoice, factored
from burnish.toolbox.stream import Planned, Spool, TensorFile, write_stream
from tools.benchmarks import extract as benchmark

Q, MLP = "transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.ff.net.2"
SHAPES = {Q.format(0): (3072, 3072), MLP.format(3): (3072, 12288)}
STEM = "transformer.transformer_blocks.0.attn.to_q"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["adapter", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """As ai-toolkit writes it, of the released widths."""
    return files.saved(tmp_path / "flux.safetensors", files.dotted(files.matrices(SHAPES, 2), "transformer."))


def test_inspect_tells_what_a_file_is(tmp_path: Path) -> None:
    tensors = files.kohya(files.matrices(SHAPES, 2), 4.0, "lora_transformer_")
    clip = files.matrices({"text_model.encoder.layers.0.mlp.fc1": (3072, 768)}, 4)
    tensors |= files.kohya(clip, 4.0, "lora_te1_")
    path = files.saved(tmp_path / "a.safetensors", tensors, {"modelspec.title": "a style"})
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["family"] == "flux"
    assert (found["modules"], found["text_encoder_modules"]) == (2, 1)
    assert found["kinds"] == {"lora": 3}
    assert found["ranks"] == {"2": 2, "4": 1}
    assert found["alphas"] == {"4": 3}
    expected = {
        f"transformer_blocks.{n}": float(files.product(*files.matrices(SHAPES, 2)[name], 2.0).double().norm())
        for n, name in ((0, Q.format(0)), (3, MLP.format(3)))
    }
    assert {k: v for k, v in found["norms"].items() if k in expected} == pytest.approx(expected, rel=1e-4)
    assert [reader["loads"] for reader in found["readers"]] == [False]
    text = run("inspect", path).stdout
    assert "FLUX.1 (flux)" in text
    assert "a style" in text
    assert "burnish adapter convert" in text


def test_inspect_tells_what_a_word_is(tmp_path: Path) -> None:
    vectors = {"clip_l": torch.zeros(2, 768), "clip_g": torch.ones(2, 1280)}
    vectors["clip_l"][0, :2] = torch.tensor([3.0, 4.0])
    path = files.saved(tmp_path / "my-cat.safetensors", vectors, {"modelspec.trigger_phrase": "<my-cat>"})
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["word"] == "<my-cat>"
    assert [(one["encoder"], one["vectors"], one["width"]) for one in found["encoders"]] == [
        ("clip_g", 2, 1280),
        ("clip_l", 2, 768),
    ]
    assert (found["encoders"][1]["shortest"], found["encoders"][1]["longest"]) == (0, 5)
    assert found["spelled"] == {
        "burnish generate": "<my-cat>",
        "ComfyUI": "embedding:my-cat",
        "A1111, Forge": "my-cat",
    }
    text = run("inspect", path).stdout
    assert "new word" in text
    assert "2 x 768, lengths 0 to 5" in text
    t5 = files.saved(tmp_path / "t5.safetensors", {"t5xxl": torch.ones(1, 4096)})
    assert "A1111" not in run("inspect", t5).stdout
    assert "embedding:t5" in run("inspect", t5).stdout
    umt5 = files.saved(tmp_path / "umt5.safetensors", {"umt5xxl": torch.ones(1, 4096)})
    assert "ComfyUI" not in run("inspect", umt5).stdout  # whose tokenizer for it is not told of the folder
    assert "new word" in run("scale", path, 0.5, "-o", tmp_path / "b.safetensors", code=2).stderr


def test_inspect_knows_who_cannot_load_a_file(flux: Path, tmp_path: Path) -> None:
    def loads(path: Path) -> dict[str, tuple[bool, str]]:
        readers = json.loads(run("inspect", path, "--json").stdout)["readers"]
        return {one["name"]: (one["loads"], one["why"]) for one in readers}

    assert {name: one[0] for name, one in loads(flux).items()} == {"ComfyUI": True, "diffusers": True}
    config = json.dumps({"transformer.lora_alpha": 8, "transformer.r": 2})
    told = files.saved(tmp_path / "told.safetensors", load_file(flux), {"lora_adapter_metadata": config})
    assert loads(told)["diffusers"][0]
    assert "alpha that is in the metadata" in loads(told)["ComfyUI"][1]
    dora = load_file(flux) | {f"{STEM}.dora_scale": torch.ones(3072, 1)}
    assert "drops `dora_scale`" in loads(files.saved(tmp_path / "dora.safetensors", dora))["diffusers"][1]
    unet = files.matrices({"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320)})
    path = files.saved(tmp_path / "sd.safetensors", files.dotted(unet, "unet."))
    assert {name: one[0] for name, one in loads(path).items()} == {"ComfyUI": False, "diffusers": True}


def test_a_convolution_of_another_program_tells_its_family_and_kind(tmp_path: Path) -> None:
    shapes = {
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k": (320, 768),
        "input_blocks.1.0.in_layers.2": (320, 320, 3, 3),
    }
    tensors = files.kohya(files.matrices(shapes), 1.0)
    found = json.loads(run("inspect", files.saved(tmp_path / "a.safetensors", tensors), "--json").stdout)
    assert found["family"] == "sd15"
    assert found["kinds"] == {"lora": 1, "locon": 1}
    readers = {one["name"]: one["loads"] for one in found["readers"]}
    assert readers == {"ComfyUI": True, "diffusers": False}  # which knows such names of SDXL alone
    output = tmp_path / "b.safetensors"
    run("convert", tmp_path / "a.safetensors", "-o", output)
    assert "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight" in load_file(output)


def test_scale_multiplies_the_effect_under_the_same_keys(tmp_path: Path) -> None:
    shapes = {"mid_block.attentions.0.proj_in": (8, 8, 1, 1)}
    tensors = files.kohya(files.matrices(shapes), 6.0)
    stem = "lycoris_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(4, 4, generator=generator) for _ in range(2))
    tensors |= {f"{stem}.lokr_w1": one, f"{stem}.lokr_w2": two, f"{stem}.alpha": torch.tensor(1.0)}
    source = files.saved(
        tmp_path / "a.safetensors", tensors, {"ss_network_dim": "3", "sshs_legacy_hash": "12345678"}
    )
    output = tmp_path / "b.safetensors"
    run("scale", source, "-0.5", "-o", output, "--family", "sd15")
    found = load_file(output)
    assert found.keys() == tensors.keys()
    torch.testing.assert_close(
        torch.kron(found[f"{stem}.lokr_w1"], found[f"{stem}.lokr_w2"]), -0.5 * torch.kron(one, two)
    )
    key = "lora_unet_mid_block_attentions_0_proj_in.lora_"
    product = files.product(found[f"{key}down.weight"], found[f"{key}up.weight"])
    torch.testing.assert_close(
        product, -0.5 * files.product(tensors[f"{key}down.weight"], tensors[f"{key}up.weight"])
    )
    with TensorFile(output) as file:
        raw = output.read_bytes()
        payload = raw[8 + int.from_bytes(raw[:8], "little") :]
        assert file.metadata == {
            "ss_network_dim": "3",
            "sshs_model_hash": hashlib.sha256(payload).hexdigest(),
        }


def test_the_strength_in_the_metadata_is_not_lost(flux: Path, tmp_path: Path) -> None:
    config = json.dumps({"transformer.lora_alpha": 8})
    told = files.saved(tmp_path / "told.safetensors", load_file(flux), {"lora_adapter_metadata": config})
    before = load_file(flux)
    for command in (["scale", told, "1"], ["convert", told], ["resize", told, "--rank", "2"]):
        output = tmp_path / f"{command[0]}.safetensors"
        run(*command, "-o", output)
        after = load_file(output)
        found, expected = (
            files.product(one[f"{STEM}.lora_A.weight"], one[f"{STEM}.lora_B.weight"])
            for one in (after, before)
        )
        torch.testing.assert_close(found, 4.0 * expected, rtol=1e-4, atol=1e-4)
        with TensorFile(output) as file:
            assert "lora_adapter_metadata" not in file.metadata


@pytest.mark.parametrize("wanted", [["--rank", "2"], ["--energy", "0.9"], ["--threshold", "1.5"]])
def test_resize_keeps_the_largest_directions(tmp_path: Path, wanted: list[str]) -> None:
    shapes = {"mid_block.resnets.0.conv1": (12, 8, 3, 3)}
    tensors = files.kohya(files.matrices(shapes, 6), 3.0)
    source = files.saved(tmp_path / "a.safetensors", tensors)
    stem = "lora_unet_mid_block_resnets_0_conv1"
    whole = files.product(
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"], 3.0 / 6
    ).flatten(1)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    energy = s.square().cumsum(0) / s.square().sum()
    rank = {"--rank": 2, "--energy": int((energy < 0.9).sum()) + 1, "--threshold": int((s > 1.5).sum())}[
        wanted[0]
    ]
    assert 1 <= rank < 6
    output = tmp_path / "b.safetensors"
    result = run("resize", source, "-o", output, *wanted, "--family", "sd15")
    found = load_file(output)
    assert found[f"{stem}.lora_down.weight"].shape == (rank, 8, 3, 3)
    assert found[f"{stem}.alpha"] == 3.0
    product = files.product(
        found[f"{stem}.lora_down.weight"], found[f"{stem}.lora_up.weight"], 3.0 / rank
    ).flatten(1)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close(product, best, rtol=1e-4, atol=1e-5)
    assert f"rounded off: {float((1 - energy[rank - 1]) ** 0.5):.3%}" in result.stdout


@pytest.mark.parametrize("shape", [(700, 900), (900, 700)])
def test_large_matrices_are_decomposed_as_well_as_by_the_exact_way(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(shape[0], 5, generator=generator) @ torch.randn(5, shape[1], generator=generator)
    matrix = strong + 0.5 * torch.randn(shape, generator=generator)
    values = torch.linalg.svdvals(matrix)
    for choice, rank in ((RankChoice(rank=12), 12), (RankChoice(energy=0.9), None)):
        found = factored(matrix, choice)
        best = float(values[found.rank :].square().sum())
        assert rank in (None, found.rank)
        assert best * (1 - 1e-5) <= found.squared_error <= best * 1.003
        torch.testing.assert_close(
            float((matrix - found.up @ found.down).square().sum()), found.squared_error, rtol=1e-3, atol=0
        )
    held = values.square().cumsum(0) / values.square().sum()
    assert factored(matrix, RankChoice(energy=0.9)).rank == int((held < 0.9).sum()) + 1


def test_the_mean_of_saves_of_a_run(tmp_path: Path) -> None:
    made = [{"a.weight": torch.full((2, 2), float(n)).bfloat16(), "step": torch.tensor(7)} for n in (1, 2, 6)]
    paths = [files.saved(tmp_path / f"{n}.safetensors", one, {"n": str(n)}) for n, one in enumerate(made)]
    run("average", *paths, "-o", tmp_path / "mean.safetensors")
    found = load_file(tmp_path / "mean.safetensors")
    assert torch.equal(found["a.weight"], torch.full((2, 2), 3.0).bfloat16())
    run("average", *paths, "-o", tmp_path / "mean.safetensors", "--weights", "1,0,3", "--force")
    assert torch.equal(
        load_file(tmp_path / "mean.safetensors")["a.weight"], torch.full((2, 2), 4.75).bfloat16()
    )
    other = files.saved(
        tmp_path / "other.safetensors", {"a.weight": torch.zeros(2, 3), "step": torch.tensor(7)}
    )
    assert "adapter merge" in run("average", paths[0], other, "-o", tmp_path / "x.safetensors", code=2).stderr
    stepped = files.saved(tmp_path / "s.safetensors", made[0] | {"step": torch.tensor(8)})
    run("average", paths[0], stepped, "-o", tmp_path / "x.safetensors", code=2)
    assert not [one for one in tmp_path.iterdir() if one.name.startswith((".tmp", "x."))]


def test_what_is_no_adapter_is_refused(flux: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"

    def refused(*arguments: object) -> str:
        text = run(*arguments, code=2).stderr
        assert not output.exists()
        assert not [one for one in tmp_path.iterdir() if one.name.startswith(".tmp")]
        return text

    checkpoint = files.saved(
        tmp_path / "model.safetensors", {f"a.{n}.weight": torch.ones(2, 2) for n in range(3)}
    )
    assert "burnish adapter extract BASE TUNED" in refused("convert", checkpoint, "-o", output)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(flux.read_bytes()[:-100])
    assert "cut off" in refused("convert", cut, "-o", output)
    pickle = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1)}, pickle)
    assert "can run any code" in refused("inspect", pickle)
    assert "No such file" in refused("inspect", tmp_path / "none.safetensors")
    strange = files.dotted(files.matrices({"mystery.block": (4, 4)}), "transformer.")
    assert "no family" in refused("convert", files.saved(tmp_path / "s.safetensors", strange), "-o", output)
    broken = load_file(flux)
    broken[f"{STEM}.lora_A.weight"][0, 0] = float("nan")
    assert "NaN" in refused("convert", files.saved(tmp_path / "n.safetensors", broken), "-o", output)
    unet = {"down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1)}
    sd15 = files.saved(tmp_path / "u.safetensors", files.kohya(files.matrices(unet), 4.0))
    assert "have no comfy format" in refused(
        "convert", sd15, "-o", output, "--family", "sd15", "--format", "comfy"
    )
    assert "knows none" in refused("convert", flux, "-o", output, "--family", "sd15")
    assert "no rank was given" in refused("resize", flux, "-o", output)
    assert "Add --rank or --energy" in refused("merge", flux, flux, "-o", output, "--method", "ties")
    wide = files.saved(
        tmp_path / "w.safetensors", files.dotted(files.matrices({Q.format(0): (64, 64)}), "transformer.")
    )
    assert "of one size" in refused("merge", flux, wide, "-o", output)


def test_nothing_is_overwritten_unless_told(flux: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    assert "exists already" in run("convert", flux, "-o", output, code=2).stderr
    assert output.read_bytes() == b"mine"
    run("convert", flux, "-o", output, "--force", "--dtype", "bfloat16")
    assert {one.dtype for one in load_file(output).values()} == {torch.bfloat16}


def test_a_file_is_written_as_planned_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "half": torch.randn(3, 5).half(),
        "byte": torch.arange(7, dtype=torch.uint8),
        "wide": torch.randn(2, 2, dtype=torch.float64),
        "one": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
    }
    plan = [Planned(name, one.dtype, tuple(one.shape)) for name, one in tensors.items()]
    write_stream(path, plan, {"note": "grüße"}, lambda name: tensors[name])
    assert all(torch.equal(one, tensors[name]) for name, one in load_file(path).items())
    with TensorFile(path) as file:
        assert file.metadata == {"note": "grüße"}
        assert torch.equal(file.rows("half", 1, 3), tensors["half"][1:3])
        assert all(one.begin % one.dtype.itemsize == 0 for one in file.tensors.values())
    with pytest.raises(UserError, match="is not finite"):
        write_stream(path, plan[:1], {}, lambda name: tensors[name] / 0)
    with pytest.raises(UserError, match="came out as"):
        write_stream(path, plan[:1], {}, lambda name: tensors[name][:2])
    assert "wide" in load_file(path)
    with Spool(path) as spool:
        spool.add("later", torch.ones(2))
        spool.add("a", torch.zeros(1, dtype=torch.float64))
        spool.finish({})
    assert load_file(path).keys() == {"later", "a"}
    assert list(tmp_path.iterdir()) == [path]
    save_file({}, tmp_path / "empty.safetensors")


def test_an_extraction_reads_layer_by_layer(tmp_path: Path) -> None:
    base, tuned = benchmark.write_pair(tmp_path, depth=1, narrow=24)
    result = run("extract", base, tuned, "-o", tmp_path / "a.safetensors", "--rank", "16", "--family", "flux")
    megabytes = round((base.stat().st_size + tuned.stat().st_size) / 1e6)
    assert f"{megabytes} MB read" in result.stderr
    assert "rounded off: " in result.stdout
    found = benchmark.measured(base, tuned, tmp_path / "b.safetensors", 16, None)
    assert found["relative_error"] < 0.05  # rounding to bfloat16 of the files
    run("extract", base, base, "-o", tmp_path / "c.safetensors", code=2)
