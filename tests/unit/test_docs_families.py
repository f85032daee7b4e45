"""Tables of docs/families.md and docs/interop.md against the code: each family once, what it writes and reads."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from burnish.adapters.targeting import choose_modules
from burnish.config.method import Lora
from burnish.export.formats import key_prefix, spelled_name
from burnish.export.stacking import native_module
from burnish.families.registry import BUILT_IN, family_named
from burnish.families.slots import Slot, not_in_files
from burnish.family import Family

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("families.md", "interop.md")
NO_TOKENIZER_IN_FILES = Slot.__dataclass_fields__["tokenizer_in_file"].default


def rows(page: str) -> list[list[str]]:
    """Cells of the first table whose rows begin with a name in backticks."""
    text = (DOCS / page).read_text(encoding="utf-8")
    start = next(line for line in text.splitlines() if re.match(r"\| `?(model\.)?family`? \|", line))
    table = text[text.index(start) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table if "---" not in line]


def names(page: str) -> list[str]:
    return [cells[0].strip("`") for cells in rows(page)[1:]]


def listed(mark: str) -> set[str]:
    """Names in backticks of the item of docs/families.md that begins with `mark`."""
    text = (DOCS / "families.md").read_text(encoding="utf-8")
    item = text[text.index(f"- **{mark}**") :].split("\n- ")[0].split("\n\n")[0]
    return {name for name in re.findall(r"`([a-z0-9_]+)`", item) if name in BUILT_IN}


@cache
def skeleton(name: str) -> Family:
    return family_named(name).skeleton(depth=1)


@pytest.mark.parametrize("page", PAGES)
def test_every_family_has_exactly_one_row(page: str) -> None:
    assert sorted(names(page)) == sorted(BUILT_IN)


@pytest.mark.parametrize("page", PAGES)
def test_every_row_has_every_cell(page: str) -> None:
    head, *body = rows(page)
    assert [cells[0] for cells in body if len(cells) != len(head) or not all(cells)] == []


def test_the_format_of_adapters_is_that_of_the_code() -> None:
    defaults = {name: family_named(name).export.default for name in BUILT_IN}
    assert {cells[0].strip("`"): cells[-1].split("`")[1] for cells in rows("families.md")[1:]} == defaults


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_row_of_interop_is_what_the_code_writes(name: str) -> None:
    _, default, key, alpha, _, others, _ = next(c for c in rows("interop.md") if c[0] == f"`{name}`")
    family = skeleton(name)
    export = family.export
    part, denoiser = next(iter(family.denoisers.items()))
    chosen = choose_modules(denoiser, family.targets, family.default_targets, Lora(rank=4))
    spelled = {native_module(export, one).name if export.default == "comfy" else one for one in chosen}
    prefix = key_prefix(export.default, part, export)
    assert default == f"`{export.default}`"
    assert key.strip("`") in {prefix + spelled_name(export.default, one) for one in spelled}
    assert alpha == ("a key" if export.default == "kohya" else "folded")
    assert set(re.findall(r"`(kohya|diffusers|comfy)`:", others)) == {*export.formats} - {export.default}


def slots_of(name: str) -> tuple[Slot, ...]:
    return getattr(family_named(name), "slots", ())


def mute(name: str) -> list[Slot]:
    """Text encoders whose tokenizer does not ship."""
    return [slot for slot in slots_of(name) if slot.tokenizer and slot.ship_tokenizer is None]


def test_families_that_take_a_folder_are_listed() -> None:
    without = {n for n in BUILT_IN for s in slots_of(n) if s.find is not_in_files and not s.optional}
    assert listed("Folder or Hub id only.") == without


def test_families_whose_tokenizer_has_to_be_named_are_listed() -> None:
    needy = {n for n in BUILT_IN for s in mute(n) if s.tokenizer_in_file is NO_TOKENIZER_IN_FILES}
    assert listed("A tokenizer beside the files.") == needy - listed("Folder or Hub id only.")


def test_families_whose_tokenizer_lies_in_the_file_are_listed() -> None:
    inside = {n for n in BUILT_IN for s in mute(n) if s.tokenizer_in_file is not NO_TOKENIZER_IN_FILES}
    assert listed("ComfyUI's own text encoder.") == inside - listed("Folder or Hub id only.")


def test_families_that_take_clips_are_listed() -> None:
    assert listed("Clips.") == {name for name in BUILT_IN if skeleton(name).capabilities.video}


def test_families_that_take_sound_are_listed() -> None:
    assert listed("The sound of clips.") == {name for name in BUILT_IN if skeleton(name).capabilities.audio}


@pytest.mark.parametrize("field", ["references", "masks", "first_frame"])
def test_families_that_always_take_pictures_beside_the_prompt_are_listed(field: str) -> None:
    mark = {"references": "Reference pictures.", "masks": "Masks.", "first_frame": "First frames."}[field]
    known = {name for name in BUILT_IN if getattr(skeleton(name).capabilities, field)}
    if field == "references":  # of which a first frame is one
        known = {name for name in known if not skeleton(name).capabilities.first_frame}
    assert known <= listed(mark)
