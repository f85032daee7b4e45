"""Which reference and which mask belong to a picture or clip: those of the same name in folders of their own."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from burnish.config.data import Folder, FolderMasks
from burnish.data.buckets import Bucket, Fit, cover
from burnish.data.companions import Companion
from burnish.data.folder import list_folder
from burnish.data.pictures import BadPicture
from burnish.data.probe import Facts, Probe
from burnish.errors import DataError
from burnish.family import Capabilities, Family


@dataclass(frozen=True, slots=True)
class Beside:
    """What one picture or clip has beside it, checked."""

    target: Facts
    shown: tuple[tuple[Path, Facts], ...]
    holes: tuple[Path, Facts] | None
    family: Family | None
    counted: tuple[Path, Facts] | None = None
    opposed: tuple[Path, Facts] | None = None

    def references(self, fit: Fit) -> tuple[Companion, ...]:
        """As a sample with this fit sees them; the family decides their size."""
        bucket = (fit.bucket.height, fit.bucket.width)
        placed = []
        for path, facts in self.shown:
            assert self.family is not None, "one without a family is shown nothing"
            size = bucket if _same_size(facts, self.target) else (facts.height, facts.width)
            placed.append(self._placed(path, facts, fit, self.family.reference_size(*size, bucket)))
        return tuple(placed)

    def mask(self, fit: Fit) -> Companion | None:
        if self.holes is None:
            return None
        return self._placed(*self.holes, fit, (fit.bucket.height, fit.bucket.width))

    def loss_mask(self, fit: Fit) -> Companion | None:
        if self.counted is None:
            return None
        return self._placed(*self.counted, fit, (fit.bucket.height, fit.bucket.width))

    def other_side(self, fit: Fit) -> Companion | None:
        """The other picture of the pair."""
        if self.opposed is None:
            return None
        return self._placed(*self.opposed, fit, (fit.bucket.height, fit.bucket.width))

    def _placed(self, path: Path, facts: Facts, fit: Fit, size: tuple[int, int]) -> Companion:
        """One of the target's size takes the target's way, so that both still lie over one another.

        Others are scaled to cover their size and cut in the middle.
        """
        if _same_size(facts, self.target):
            return Companion(path, facts.sha256, fit, size)
        return Companion(path, facts.sha256, cover(facts.height, facts.width, Bucket(*size)), size)


def _same_size(one: Facts, other: Facts) -> bool:
    return (one.height, one.width) == (other.height, other.width)


@dataclass(frozen=True, slots=True)
class CompanionFolders:
    """The folders of references and masks of one source."""

    family: Family | None
    probe: Probe
    folders: tuple[_ByStem, ...]
    masks: _ByStem | None
    loss_masks: _ByStem | None = None
    opposed: _ByStem | None = None

    @classmethod
    def of(cls, source: Folder, family: Family | None, probe: Probe) -> CompanionFolders | None:
        """None where the source has none.

        Raises:
            DataError: the family has no use for them, or a folder cannot be read.
        """
        section = source.loss_masks
        if not source.folders_beside:
            return None
        can = family.capabilities if family is not None else Capabilities()
        _refuse_unused(source, can, family.title if family is not None else "this model")
        folders = tuple(_ByStem.of(folder, source.recursive) for folder in source.references)
        masks = _ByStem.of(source.masks, source.recursive) if source.masks is not None else None
        counted = _ByStem.of(section.path, source.recursive) if isinstance(section, FolderMasks) else None
        other = source.other_side
        opposed = _ByStem.of(other, source.recursive) if other is not None else None
        return cls(family, probe, folders, masks, counted, opposed)

    def of_picture(self, name: str, target: Facts) -> Beside:
        """What belongs to the picture or clip `name`.

        Raises:
            BadPicture: a reference or mask is missing or damaged.
        """
        shown = tuple(self._checked(folder, name, "reference") for folder in self.folders)
        holes = self._checked(self.masks, name, "mask") if self.masks is not None else None
        counted = None
        if self.loss_masks is not None:
            counted = self._checked(self.loss_masks, name, "mask of the loss")
        opposed = None
        if self.opposed is not None:
            if target.duration is not None:
                raise BadPicture("a clip, and pairs are of pictures", remedy="Move it elsewhere.")
            opposed = self._checked(self.opposed, name, "other picture of the pair")
            if opposed[1].sha256 == target.sha256:
                raise BadPicture(
                    f"the same picture as {opposed[0]}",
                    remedy="A pair is of two pictures; take it out of both.",
                )
        return Beside(target, shown, holes, self.family, counted, opposed)

    def _checked(self, folder: _ByStem, name: str, what: str) -> tuple[Path, Facts]:
        path = folder.find(name)
        if path is None:
            stem = os.path.splitext(name)[0]
            raise BadPicture(
                f"no {what} in {folder.root}", remedy=f"Put a picture {stem}.png there, or remove this one."
            )
        try:
            return path, self.probe.facts(path)
        except BadPicture as error:
            raise BadPicture(f"its {what} {path}: {error.message}", remedy=error.remedy) from error


@dataclass(frozen=True, slots=True)
class _ByStem:
    root: Path
    names: dict[str, str]

    @classmethod
    def of(cls, folder: Path, recursive: bool) -> _ByStem:
        listing = list_folder(folder, recursive=recursive)
        names: dict[str, str] = {}
        for name in listing.pictures:
            other = names.setdefault(_stem(name), name)
            if other != name:
                raise DataError(
                    f"{listing.root}: {other} and {name} belong to the same picture",
                    remedy="Remove one of them.",
                )
        return cls(listing.root, names)

    def find(self, name: str) -> Path | None:
        found = self.names.get(_stem(name))
        return self.root / found if found is not None else None


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def _refuse_unused(source: Folder, can: Capabilities, title: str) -> None:
    own = can.own_references
    most = max(can.references - own, 0)
    if len(source.references) > most:
        besides = " besides the picture itself" if own else ""
        has = f"sees at most {most}{besides}" if most else f"sees none{besides}"
        raise DataError(
            f"{source.path}: {len(source.references)} folder(s) of references, and {title} {has}",
            remedy="Take out references, or train a model that edits pictures (`burnish families`).",
        )
    if source.masks is not None and not can.masks:
        raise DataError(
            f"{source.path}: masks is set, and {title} fills no holes",
            remedy="Take out masks, or train a model that fills holes (`burnish families`).",
        )
