"""From folders to samples: every picture and clip decoded once, every caption read, and nothing left out in silence."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from burnish.config.data import Captions, Folder
from burnish.data.buckets import fit, fits, wanted_bucket
from burnish.data.caption_rules import TRIGGER, CaptionRules
from burnish.data.captions import (
    OTHER_EXTENSIONS,
    BadCaption,
    Caption,
    normalised,
    read_caption,
    read_caption_list,
)
from burnish.data.companion_folders import CompanionFolders
from burnish.data.contrasts import contrasted, fixed_caption
from burnish.data.folder import Listing, Outcome, list_folder, printable
from burnish.data.loss_masks import counts_of, preserved, refuse_without_alpha
from burnish.data.pictures import BadPicture
from burnish.data.probe import Facts, Probe, Progress, probe_all
from burnish.data.report import DataReport, Reduced, SourceReport, listed
from burnish.data.samples import Sample
from burnish.data.windows import Window, Windows
from burnish.errors import DataError
from burnish.family import Capabilities, Family


@dataclass(frozen=True, slots=True)
class PreparedData:
    samples: tuple[Sample, ...]
    report: DataReport


def prepare_samples(
    sources: Sequence[Folder],
    *,
    pixel_multiple: int,
    family: Family | None = None,
    trigger: str | None = None,
    cache_folder: Path | None = None,
    report_path: Path | None = None,
    ignore: Sequence[Path] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Samples of all sources, in the order of sources and names, and the report on how they came about.

    Args:
        pixel_multiple: sides of buckets are multiples of this and of the source's `bucket_step`.
        family: what is trained, no part of it loaded; None for one of still pictures without references.
        cache_folder: where decoded pictures are remembered by content; None decodes anew.
        report_path: written whether this succeeds or not.
        ignore: folders below the sources that hold no data, such as the run's own.

    Raises:
        DataError: captions that must be mended, too many pictures skipped, or none left; names the files.
    """
    report = DataReport()
    samples: list[Sample] = []
    for index, source in enumerate(sources):
        try:
            step = math.lcm(pixel_multiple, source.bucket_step)
            samples += _Source(index, source, trigger, step, family).read(
                report, cache_folder, ignore, threads, progress
            )
        except BadCaption as error:  # the list of captions of a whole source
            report.sources[-1].errors.append(Outcome("", error.message, error.remedy))
    report.describe(samples)
    _warn_without_trigger(samples, trigger, report)
    if report_path is not None:
        report.write(report_path)
    _refuse(sources, report)
    _refuse_silence(samples, report, family)
    return PreparedData(tuple(samples), report)


def _refuse(sources: Sequence[Folder], report: DataReport) -> None:
    if report.errors:
        problems = len(report.errors)
        raise DataError(
            f"{problems} problem{'s' if problems > 1 else ''} in the data:\n{listed(report.errors)}",
            remedy="Mend these, and start again.",
        )
    for source, found in zip(sources, report.sources, strict=True):
        if not found.used:
            why = f":\n{listed(found.skipped)}" if found.skipped else ""
            raise DataError(
                f"{source.path}: no picture that can be used, of {found.found} found{why}",
                remedy="jpg, jpeg, jfif, png and webp files (mp4, mov, webm, mkv, avi and gif too for video models) "
                "with captions are needed; check data.path.",
            )
        if len(found.skipped) > found.skips_allowed(source.max_skip_fraction):
            raise DataError(
                f"{source.path}: {len(found.skipped)} of {found.found} pictures would be skipped, more than "
                f"max_skip_fraction ({source.max_skip_fraction:g}) allows:\n{listed(found.skipped)}",
                remedy="Mend or remove these files, or raise max_skip_fraction.",
            )


def _refuse_silence(samples: Sequence[Sample], report: DataReport, family: Family | None) -> None:
    if family is None or family.audio is None or any(sample.audio for sample in samples):
        return
    silent = [outcome for source in report.sources for outcome in source.silent]
    raise DataError(
        f"model.audio is set, and no clip has sound to train on{':' if silent else '.'}\n{listed(silent)}".rstrip(),
        remedy="Use clips with sound, or take model.audio out.",
    )


def _warn_without_trigger(samples: Sequence[Sample], trigger: str | None, report: DataReport) -> None:
    taught = [sample for sample in samples if sample.role == "train"]
    if trigger and taught and not any(trigger in s.rules.prefix or trigger in s.caption for s in taught):
        report.warnings.append(
            f"the trigger {trigger!r} is in no caption; set data.captions.prefix: '[trigger], ' to put it there"
        )


def windows_of(source: Folder, family: Family | None) -> Windows | None:
    """What is taken of this source's clips; None for a family of still pictures.

    Raises:
        DataError: a number of frames that the family does not take.
    """
    if family is not None and family.capabilities.video:
        return Windows.of(family, source.frames, source.fps, source.clips, source.spread)
    if source.frames is not None and set(source.frames) != {1}:
        raise DataError(
            f"{source.path}: frames is {source.frames}, and this model learns from still pictures",
            remedy="Take frames out, or train a video model (`burnish families`).",
        )
    return None


@dataclass(frozen=True, slots=True)
class _Source:
    """One folder on its way to samples."""

    index: int
    config: Folder
    trigger: str | None
    step: int  # sides of buckets are multiples of this, in pixels
    family: Family | None

    def read(
        self,
        report: DataReport,
        cache_folder: Path | None,
        ignore: Sequence[Path],
        threads: int | None,
        progress: Progress | None,
    ) -> list[Sample]:
        config = self.config
        found = SourceReport(printable(str(config.path)), config.role)
        report.sources.append(found)
        hears = self.family is not None and self.family.audio is not None
        probe = Probe(cache_folder, config.background, config.max_megapixels, audio=hears)
        windows = windows_of(config, self.family)
        companions = CompanionFolders.of(config, self.family, probe)
        listing = list_folder(
            config.path,
            recursive=config.recursive,
            ignore=[*ignore, *config.folders_beside],
            clips=windows is not None,
        )
        found.found = len(listing.pictures) + len(listing.skipped)
        found.skipped += listing.skipped
        found.warnings += listing.warnings

        captions = _Captions(
            listing, config.captions, config.role == "regularization", self.trigger, fixed_caption(config)
        )
        found.warnings += captions.orphans()
        found.errors += captions.ambiguous()
        paths = [config.path / name for name in listing.pictures]
        samples: list[Sample] = []
        content: dict[str, str] = {}
        for name, facts in zip(
            listing.pictures, probe_all(probe, paths, threads=threads, progress=progress), strict=True
        ):
            made = self._samples_of(name, facts, captions, windows, companions, found)
            samples += made + preserved(made, config, self.trigger)
            found.used += bool(made)
            found.clips += bool(made) and made[0].is_clip
            if isinstance(facts, Facts) and made:
                twin = content.setdefault(facts.sha256, name)
                if twin != name:
                    found.warnings.append(f"{name!r} has the same content as {twin!r}")
        if found.silent:
            found.warnings.append(
                f"{len(found.silent)} clip(s) or parts of clips train without sound:\n{listed(found.silent)}"
            )
        return samples

    def _samples_of(
        self,
        name: str,
        facts: Facts | BadPicture,
        captions: _Captions,
        windows: Windows | None,
        companions: CompanionFolders | None,
        found: SourceReport,
    ) -> list[Sample]:
        """A sample per resolution, of a clip per window too; none where it is skipped or its caption must be mended."""
        try:
            if isinstance(facts, BadPicture):
                raise facts
            self._check_size(facts)
            refuse_without_alpha(self.config, facts)
            placed = fits(
                facts.height, facts.width, self.config.resolutions, self.step, self.config.max_aspect
            )
            if not placed:
                raise BadPicture(
                    f"{facts.height} x {facts.width} is smaller than the smallest bucket, {self.step} x {self.step}",
                    remedy="Use a larger picture, or lower bucket_step.",
                )
            parts = [Window(1, 0.0)]
            if facts.duration is not None and windows is not None:
                parts = windows.within(facts.duration)
            beside = companions.of_picture(name, facts) if companions is not None else None
            caption = captions.of(name)
        except BadCaption as error:
            found.errors.append(Outcome(name, error.message, error.remedy))
            return []
        except BadPicture as error:
            found.skipped.append(Outcome(name, error.message, error.remedy))
            return []
        found.fixed += [Outcome(name, fix) for fix in facts.fixes]
        found.fixed += [Outcome(name, f"caption {note}") for note in caption.notes]
        self._note_lost_resolution(name, facts, found)
        config, can = self.config, self.family.capabilities if self.family is not None else Capabilities()
        fps = windows.fps if facts.duration is not None and windows is not None else 0.0
        heard = {part: self._hears(name, facts, part, fps, found) for part in parts}
        # A model that also sees other pictures, such as a control picture, learns without holes unless given some.
        holes = can.masks and (can.references == 1 or config.masks is not None)
        made = [
            Sample(
                picture_id=f"{self.index}/{name}",
                path=config.path / name,
                source=self.index,
                role=config.role,
                sha256=facts.sha256,
                fit=placing,
                resolution=resolution,
                caption=caption.text,
                rules=captions.rules,
                background=config.background,
                flip=config.flip,
                weight=config.weight,
                repeats=config.repeats,
                frames=part.frames,
                start=part.start,
                fps=fps,
                references=beside.references(placing) if beside is not None else (),
                mask=beside.mask(placing) if beside is not None else None,
                sees_itself=holes or can.first_frame,
                sees_end=can.last_frame,
                fills_holes=holes,
                audio=heard[part],
                counts=counts_of(config, beside, placing),
            )
            for resolution, placing in placed
            for part in parts
        ]
        return [contrasted(sample, config, beside) for sample in made]

    def _hears(self, name: str, facts: Facts, part: Window, fps: float, found: SourceReport) -> bool:
        """Whether the sound of a part of a clip is trained; where there is none, that is noted."""
        if self.family is None or self.family.audio is None or not fps or part.frames == 1:
            return False
        sound, seconds = facts.sound, part.frames / fps
        if sound is not None and sound.covers(part.start, seconds):
            return True
        reason = "it has no sound"
        if sound is not None:
            reason = (
                f"its sound lasts from {sound.start:.2f} to {sound.end:.2f} s, the frames from {part.start:.2f} to "
                f"{part.start + seconds:.2f} s"
            )
        found.silent.append(Outcome(name, reason))
        return False

    def _check_size(self, facts: Facts) -> None:
        if min(facts.height, facts.width) < self.config.min_side:
            raise BadPicture(
                f"{facts.height} x {facts.width}: a side is below min_side ({self.config.min_side})",
                remedy="Use a larger picture.",
            )

    def _note_lost_resolution(self, name: str, facts: Facts, found: SourceReport) -> None:
        config, size = self.config, (facts.height, facts.width)
        for resolution in sorted(set(config.resolutions)):
            wanted = wanted_bucket(*size, resolution, self.step, config.max_aspect)
            got = fit(*size, resolution, self.step, config.max_aspect)
            if wanted is not None and (got is None or got.bucket.area < wanted.area):
                found.resolution_lost.append(
                    Reduced(name, f"{size[0]}x{size[1]}", str(wanted), str(got.bucket) if got else None)
                )


class _Captions:
    """Which caption belongs to which picture of a folder."""

    def __init__(
        self, listing: Listing, config: Captions, regularization: bool, trigger: str | None, fixed: str | None
    ) -> None:
        """Args:
        fixed: the caption of all, whatever the files say.
        """
        self.listing, self.config, self.fixed = listing, config, fixed
        self.regularization, self.trigger = regularization, trigger
        self.rules = CaptionRules.of(config, trigger=trigger, regularization=regularization)
        self.list_path = self._list_path()
        self.by_name = read_caption_list(self.list_path, config.encoding) if self.list_path else None

    def of(self, name: str) -> Caption:
        """The caption of a picture, with `[trigger]` replaced.

        Raises:
            BadPicture: it has none and is to be skipped.
            BadCaption: it has one that must be mended.
        """
        if self.fixed is not None:
            return Caption(self.fixed)
        caption = self._listed(name) if self.by_name is not None else self._beside(name)
        if caption is None or not caption.text:
            caption = self._missing(name, caption)
        if TRIGGER not in caption.text:
            return caption
        if self.regularization or self.trigger is None:
            why = "this is a regularization source" if self.regularization else "no trigger is set"
            raise BadCaption(f"the caption says [trigger], and {why}", remedy="Take it out, or set trigger.")
        return Caption(caption.text.replace(TRIGGER, self.trigger), caption.notes)

    def ambiguous(self) -> list[Outcome]:
        """Pictures that share one caption file, as a.png and a.jpg share a.txt."""
        if self.by_name is not None or self.fixed is not None:
            return []
        sharing: dict[str, list[str]] = defaultdict(list)
        for name in self.listing.pictures:
            path = self.listing.find(os.path.splitext(name)[0], self.config.extension)
            if path is not None:
                sharing[path].append(name)
        return [
            Outcome(
                names[0], f"{', '.join(names[1:])} has the same caption file, {path}", "Rename one of them."
            )
            for path, names in sharing.items()
            if len(names) > 1
        ]

    def orphans(self) -> list[str]:
        """Captions whose picture is not there."""
        if self.fixed is not None:
            return []
        if self.by_name is not None:
            pictures = {normalised(name) for name in self.listing.pictures}
            pictures |= {normalised(outcome.file) for outcome in self.listing.skipped}
            return [
                f"{self.list_path} names {name!r}, which is not there"
                for name in self.by_name
                if name not in pictures
            ]
        files = [*self.listing.pictures, *(outcome.file for outcome in self.listing.skipped)]
        stems = {normalised(os.path.splitext(name)[0]) for name in files}
        return [
            f"caption {name!r} has no picture"
            for name in sorted(self.listing.others)
            if name.lower().endswith(self.config.extension.lower())
            and normalised(name[: -len(self.config.extension)]) not in stems
        ]

    def _list_path(self) -> Path | None:
        """As given, or else relative to the folder."""
        path = self.config.jsonl
        return path if path is None or path.exists() else self.listing.root / path

    def _listed(self, name: str) -> Caption | None:
        assert self.by_name is not None
        return self.by_name.get(normalised(name))

    def _beside(self, name: str) -> Caption | None:
        stem = os.path.splitext(name)[0]
        path = self.listing.find(stem, self.config.extension)
        if path is not None:
            return read_caption(self.listing.root / path, self.config.encoding)
        for extension in OTHER_EXTENSIONS:
            if (other := self.listing.find(stem, extension)) is not None:
                raise BadCaption(
                    f"no {self.config.extension} caption, but {other} is there",
                    remedy=f"Rename it, or set captions.extension: {extension} for the whole source.",
                )
        return None

    def _missing(self, name: str, caption: Caption | None) -> Caption:
        if self.config.default is not None:
            used = ("missing: the default is used",) if self.config.default else ()
            return Caption(self.config.default, used)
        reason = "no caption" if caption is None else "an empty caption"
        remedy = "Write one, or set captions.default."
        if self.config.on_missing == "error":
            raise BadCaption(reason, remedy=remedy)
        raise BadPicture(reason, remedy=remedy)
