"""The cache: nothing stale, nothing mixed up, nothing torn, and only what changed is encoded again."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import caption, hidden_colour, scene
from PIL import Image, ImageOps
from safetensors.torch import save as save_tensors

from burnish.conditioning import Conditioning
from burnish.config.data import Captions, Folder
from burnish.data.cache import Cache, CacheKeys, DiskCache, RamCache, pack, unpack
from burnish.data.preflight import prepare_samples
from burnish.data.prepare import LATENTS, EncodeCounts, encode_captions, encode_latents
from burnish.data.samples import Sample, all_captions
from burnish.errors import DataError, DiskFull, ModelError
from burnish.families.sd15 import StableDiffusion15
from burnish.family import Family, ModelSource

LANCZOS = Image.Resampling.LANCZOS


@pytest.fixture(scope="module")
def family(tiny_sd15: Path) -> StableDiffusion15:
    return StableDiffusion15.load(
        ModelSource(str(tiny_sd15)), frozenset({"vae", "text_encoders"}), dtype=torch.float32, device="cpu"
    )


def folder_of(path: Path, count: int = 4) -> Path:
    """`count` square pictures without compression, so that all files have one size."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        scene(number, 96, 96).save(path / f"{number}.png", compress_level=0)
        caption(path / f"{number}.png", f"a sks thing, number {number}")
    return path


def samples_of(*folders: Path, trigger: str | None = None, **options: object) -> tuple[Sample, ...]:
    options = {"resolutions": [96], "bucket_step": 32, **options}
    sources = [Folder(path=folder, **options) for folder in folders]
    return prepare_samples(sources, pixel_multiple=8, trigger=trigger).samples


def keys_of(family: Family, **changes: object) -> CacheKeys:
    values = {"vae": family.identity("vae"), "text_encoders": family.identity("text_encoders")}
    return CacheKeys(**{**values, "dtype": torch.float32, **changes})


def encode(
    samples: Sequence[Sample], family: Family, cache: Cache, keys: CacheKeys | None = None
) -> tuple[EncodeCounts, EncodeCounts]:
    """Counts of latents and captions."""
    keys = keys or keys_of(family)
    return (
        encode_latents(samples, family, cache, keys, device="cpu"),
        encode_captions(all_captions(samples, 0), family, cache, keys),
    )


def assert_fresh(
    samples: Sequence[Sample], family: Family, cache: Cache, keys: CacheKeys | None = None
) -> None:
    """What the cache gives for each sample is what the files hold now, by Pillow and the family alone."""
    keys = keys or keys_of(family)
    for sample in samples:
        with Image.open(sample.path) as opened:
            assert opened.size == (96, 96)
            upright = opened.convert("RGB").resize((sample.bucket.width, sample.bucket.height), LANCZOS)
        for flip in (False, True) if sample.flip else (False,):
            picture = ImageOps.mirror(upright) if flip else upright
            pixels_HW3 = torch.from_numpy(np.asarray(picture).astype(np.float32)) / 127.5 - 1
            with torch.no_grad():
                expected = family.encode_pixels(pixels_HW3.permute(2, 0, 1)[None])[0]
            entry = cache.get("latents", keys.latents(sample, flip=flip))
            assert entry is not None
            torch.testing.assert_close(entry[LATENTS], expected, atol=1e-5, rtol=1e-5)
        for text in sample.captions(0):
            entry = cache.get("captions", keys.caption(text))
            assert entry is not None
            expected_tokens = family.encode_prompts([text])["tokens_BSD"]
            torch.testing.assert_close(entry["tokens_BSD"], expected_tokens)


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_everything_is_encoded_once_and_found_again(family: Family, tmp_path: Path, kind: str):
    cache: Cache = DiskCache(tmp_path / "cache") if kind == "disk" else RamCache()
    samples = samples_of(folder_of(tmp_path / "a"), flip=True, captions=Captions(dropout=0.1))
    steps: list[tuple[int, int]] = []
    counts = encode_latents(
        samples, family, cache, keys_of(family), device="cpu", progress=lambda *step: steps.append(step)
    )
    assert counts == EncodeCounts(hits=0, encoded=8, repaired=0)
    assert steps == [(done, 8) for done in range(1, 9)]
    assert "" in all_captions(samples, 0)
    assert encode(samples, family, cache) == (EncodeCounts(8, 0, 0), EncodeCounts(0, 5, 0))
    assert encode(samples, family, cache) == (EncodeCounts(8, 0, 0), EncodeCounts(5, 0, 0))
    assert_fresh(samples, family, cache)
    if kind == "disk":
        assert encode(samples, family, DiskCache(tmp_path / "cache")) == (
            EncodeCounts(8, 0, 0),
            EncodeCounts(5, 0, 0),
        )


def test_several_at_once_give_the_same_entries(family: Family, tmp_path: Path):
    samples = samples_of(folder_of(tmp_path / "a"), folder_of(tmp_path / "b", 3), resolutions=[96, 64])
    cache, keys = RamCache(), keys_of(family)
    counts = encode_latents(samples, family, cache, keys, device="cpu", batch_size=3)
    assert counts.encoded == 8  # 14 samples; b holds copies of three pictures of a
    encode_captions(all_captions(samples, 0), family, cache, keys, batch_size=3)
    for sample in samples:
        alone = RamCache()
        encode([sample], family, alone)
        for kind, key in (
            ("latents", keys.latents(sample, flip=False)),
            ("captions", keys.caption(sample.caption)),
        ):
            one, many = alone.get(kind, key), cache.get(kind, key)
            assert one is not None
            assert many is not None
            for name in one:
                torch.testing.assert_close(many[name], one[name], atol=1e-5, rtol=1e-5)


def test_an_edited_caption_encodes_one_caption(family: Family, tmp_path: Path):
    folder, cache = folder_of(tmp_path / "a"), DiskCache(tmp_path / "cache")
    encode(samples_of(folder), family, cache)
    caption(folder / "1.png", "something else")
    samples = samples_of(folder)
    assert encode(samples, family, cache) == (EncodeCounts(4, 0, 0), EncodeCounts(3, 1, 0))
    assert_fresh(samples, family, cache)


def test_a_replaced_picture_of_the_same_name_size_and_time_is_encoded_again(family: Family, tmp_path: Path):
    folder, cache = folder_of(tmp_path / "a"), DiskCache(tmp_path / "cache")
    encode(samples_of(folder), family, cache)
    path = folder / "1.png"
    before = path.stat()
    scene(99, 96, 96).save(path, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    samples = samples_of(folder)
    assert encode(samples, family, cache) == (EncodeCounts(3, 1, 0), EncodeCounts(4, 0, 0))
    assert_fresh(samples, family, cache)


def test_a_renamed_picture_is_not_encoded_again(family: Family, tmp_path: Path):
    folder, cache = folder_of(tmp_path / "a"), DiskCache(tmp_path / "cache")
    encode(samples_of(folder), family, cache)
    for ending in (".png", ".txt"):
        (folder / f"1{ending}").rename(folder / f"new{ending}")
    assert encode(samples_of(folder), family, cache) == (EncodeCounts(4, 0, 0), EncodeCounts(4, 0, 0))


def test_another_encoder_another_trigger_another_size(family: Family, tmp_path: Path):
    folder, cache = folder_of(tmp_path / "a"), DiskCache(tmp_path / "cache")
    rules = Captions(prefix="[trigger],")
    samples = samples_of(folder, trigger="sks", captions=rules)
    every, none = EncodeCounts(0, 4, 0), EncodeCounts(4, 0, 0)
    assert encode(samples, family, cache) == (every, every)
    assert encode(samples, family, cache, keys_of(family, vae="another")) == (every, none)
    assert encode(samples, family, cache, keys_of(family, text_encoders="another")) == (none, every)
    assert encode(samples, family, cache, keys_of(family, dtype=torch.bfloat16)) == (every, every)
    retold = samples_of(folder, trigger="ohwx", captions=rules)
    assert encode(retold, family, cache) == (none, every)
    smaller = samples_of(folder, trigger="sks", captions=rules, resolutions=[64])
    assert encode(smaller, family, cache) == (every, none)
    mirrored = samples_of(folder, trigger="sks", captions=rules, flip=True)
    assert encode(mirrored, family, cache) == (EncodeCounts(4, 4, 0), none)
    assert encode(samples, family, cache) == (none, none)
    for changed in (samples, retold, mirrored, smaller):
        assert_fresh(changed, family, cache)


def test_another_cut_or_background_is_another_entry(family: Family, tmp_path: Path):
    scene(1, 64, 128).save(tmp_path / "wide.png")
    hidden_colour().save(tmp_path / "alpha.png")
    for name in ("wide", "alpha"):
        caption(tmp_path / f"{name}.png")
    keys = keys_of(family)
    seen = set()
    for options in ({}, {"max_aspect": 1.0}, {"background": "#000000"}):
        seen |= {keys.latents(s, flip=False) for s in samples_of(tmp_path, bucket_step=16, **options)}
    assert len(seen) == 6


def test_files_of_one_name_stay_apart(family: Family, tmp_path: Path):
    root, cache = tmp_path / "root", DiskCache(tmp_path / "cache")
    names = ["a/b.png", "a_b.png", "x/same.png", "y/same.png", "a.b.png", "a/b.c.png"]
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        scene(seed, 96, 96).save(root / name)
        caption(root / name, f"this is {name}")
    other = folder_of(tmp_path / "other", 1)
    (other / "a_b.png").write_bytes((other / "0.png").read_bytes())
    caption(other / "a_b.png", "this is another")
    samples = samples_of(root, other)
    assert len({sample.id for sample in samples}) == len(samples) == 8
    assert {sample.caption for sample in samples if sample.source == 0} == {
        f"this is {name}" for name in names
    }
    encode(samples, family, cache)
    assert_fresh(samples, family, cache)
    latents = [cache.get("latents", keys_of(family).latents(s, flip=False)) for s in samples if s.source == 0]
    assert len({entry[LATENTS].numpy().tobytes() for entry in latents if entry}) == 6


def test_torn_entries_are_encoded_again(family: Family, tmp_path: Path):
    samples, cache = samples_of(folder_of(tmp_path / "a")), DiskCache(tmp_path / "cache")
    encode(samples, family, cache)
    paths = [cache.path("latents", keys_of(family).latents(sample, flip=False)) for sample in samples]
    sound = paths[0].read_bytes()
    damaged = [sound[:cut] for cut in (0, 5, 8, 40, len(sound) // 2, len(sound) - 1)]
    flips = (0, 3, 9, 20, len(sound) - 1, len(sound) - 300)
    damaged += [sound[:at] + bytes([sound[at] ^ 0x40]) + sound[at + 1 :] for at in flips]
    damaged.append(paths[1].read_bytes())  # another entry in its place
    damaged.append(save_tensors({LATENTS: torch.zeros(4, 8, 8)}))  # no metadata
    for content in damaged:
        paths[0].write_bytes(content)
        reopened = DiskCache(tmp_path / "cache")
        assert encode(samples, family, reopened)[0] == EncodeCounts(hits=3, encoded=1, repaired=1)
        assert_fresh(samples, family, DiskCache(tmp_path / "cache"))
    paths[0].unlink()
    paths[0].mkdir()
    with pytest.raises(DiskFull):
        encode(samples, family, DiskCache(tmp_path / "cache"))


def test_packed_tensors_come_back_bit_for_bit():
    entry = {
        "tokens_BSD": torch.randn(1, 3, 5).to(torch.bfloat16),
        "mask_BS": torch.tensor([[True, False]]),
        "ids": torch.arange(4).view(1, 2, 2).transpose(1, 2),
        "scalar": torch.tensor(float("nan")),
        "empty": torch.zeros(1, 0, 4),
    }
    back = unpack(pack(entry, "key"), "key")
    assert back is not None
    assert set(back) == set(entry)
    for name, tensor in entry.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].nan_to_num(7.0), tensor.nan_to_num(7.0))
    assert unpack(pack(entry, "key"), "other") is None


WRITER = """
import os, random, signal, sys, time, torch
from pathlib import Path
from burnish.data.cache import DiskCache, unpack

def write(folder, first, count):
    cache = DiskCache(folder, remembered_bytes=0)
    for number in range(first, first + count):
        key = f"{number % 64:048x}"
        cache.put("latents", key, {"latents": torch.full((16, 64, 64), float(number % 64))})
        entry = cache.get("latents", key)
        assert entry is not None and (entry["latents"] == number % 64).all()
    return cache.repaired
"""

SHARE = """
print("repaired", write(Path(sys.argv[1]), int(sys.argv[2]), 192))
"""

KILL = """
left = 0
for attempt in range(20):
    child = os.fork()
    if not child:
        write(Path(sys.argv[1]), attempt, 10**9)
    time.sleep(random.Random(attempt).uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left += len(list(Path(sys.argv[1], "scratch").iterdir()))
print("half written", left)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def assert_all_sound(folder: Path) -> int:
    """Whatever stands under a final name is whole; how many there are."""
    found = 0
    for number in range(64):
        key = f"{number:048x}"
        path = DiskCache(folder).path("latents", key)
        if path.exists():
            entry = unpack(path.read_bytes(), key)
            assert entry is not None
            assert (entry["latents"] == number).all()
            found += 1
    return found


def test_killed_while_writing_leaves_whole_entries_only(tmp_path: Path):
    process = start(KILL, tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert int(output.split()[-1]) > 0  # some kills hit a write
    assert assert_all_sound(tmp_path) > 20
    assert list((tmp_path / "scratch").iterdir()) == []  # swept by who opened the cache next


def test_two_processes_share_a_cache(tmp_path: Path):
    for process in [start(SHARE, tmp_path, first) for first in (0, 7)]:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert output.strip() == "repaired 0"
    assert assert_all_sound(tmp_path) == 64


def test_another_version_of_the_code_is_another_entry(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    samples, cache = samples_of(folder_of(tmp_path / "a")), DiskCache(tmp_path / "cache")
    every, none = EncodeCounts(0, 4, 0), EncodeCounts(4, 0, 0)
    assert encode(samples, family, cache) == (every, every)
    monkeypatch.setattr("burnish.data.pictures.CODE_VERSION", -1)
    assert encode(samples, family, cache) == (every, none)
    monkeypatch.setattr("burnish.data.cache.ENCODING_VERSION", -1)
    assert encode(samples, family, cache) == (every, every)


def test_a_file_size_limit_is_told_as_a_full_disk(tmp_path: Path):
    cache = DiskCache(tmp_path)
    cache.put("latents", "a" * 48, {"latents": torch.zeros(4, 64, 64)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskFull, match=r"cannot write .* needed, .* free") as raised:
            cache.put("latents", "b" * 48, {"latents": torch.zeros(4, 64, 64)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.exit_code == 3
    assert cache.get("latents", "a" * 48) is not None
    assert cache.get("latents", "b" * 48) is None
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_was_read_last_stays_in_memory_within_its_limit(tmp_path: Path):
    entry = {"latents": torch.zeros(4, 8, 8)}  # 1 KiB
    cache = DiskCache(tmp_path, remembered_bytes=3 << 10)
    keys = [f"{number:048x}" for number in range(5)]
    for key in keys:
        cache.put("latents", key, entry)
        assert cache.get("latents", key) is not None
    for key in keys:
        cache.path("latents", key).unlink()
    assert [cache.get("latents", key) is not None for key in keys] == [False, False, True, True, True]


def test_a_file_that_changes_after_the_check_stops_the_encoding(family: Family, tmp_path: Path):
    folder = folder_of(tmp_path / "a")
    samples = samples_of(folder)
    scene(77, 96, 96).save(folder / "2.png")
    with pytest.raises(DataError, match=r"2\.png changed"):
        encode(samples, family, RamCache())
    (folder / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png.*since it was checked"):
        encode(samples, family, RamCache())


def test_nothing_that_is_not_finite_is_cached(family: StableDiffusion15, tmp_path: Path):
    class Overflowing(StableDiffusion15):
        def __init__(self) -> None:
            pass

        def encode_pixels(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
            return family.encode_pixels(pixels_B3HW) * float("inf")

        def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
            return Conditioning({"tokens_BSD": family.encode_prompts(prompts)["tokens_BSD"] * float("nan")})

    samples, cache = samples_of(folder_of(tmp_path / "a", 1)), DiskCache(tmp_path / "cache")
    with pytest.raises(ModelError, match=r"0\.png"):
        encode_latents(samples, Overflowing(), cache, keys_of(family), device="cpu")
    with pytest.raises(ModelError, match="number 0"):
        encode_captions(all_captions(samples, 0), Overflowing(), cache, keys_of(family))
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_no_file_of_the_user_is_touched(family: Family, tmp_path: Path):
    folder = folder_of(tmp_path / "a")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_mode) for p in folder.rglob("*")}
    encode(samples_of(folder, flip=True), family, DiskCache(tmp_path / "cache"))
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_mode) for p in folder.rglob("*")}
    assert after == before
