"""What the preflight found, as data_report.json: every skip and every fix, with file, reason and remedy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from burnish.atomic import atomic_write_text
from burnish.data.buckets import Bucket
from burnish.data.folder import Outcome
from burnish.data.samples import Sample, all_captions

SHOWN = 20  # lines of one kind in a message; the report holds all


@dataclass(frozen=True, slots=True)
class Reduced:
    """A picture that is too small for the bucket its shape asks for. Sizes as `HEIGHTxWIDTH`."""

    file: str
    size: str
    wanted: str
    used: str | None  # None: not even the smallest bucket fits inside it


@dataclass(slots=True)
class SourceReport:
    """One source. `skipped` and `errors` keep a picture out, `fixed` do not."""

    path: str
    role: str
    found: int = 0  # pictures, clips, and files that were meant as such
    used: int = 0
    clips: int = 0  # of those used
    silent: list[Outcome] = field(
        default_factory=list
    )  # clips trained without sound by a model that makes it
    skipped: list[Outcome] = field(default_factory=list)
    fixed: list[Outcome] = field(default_factory=list)
    errors: list[Outcome] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    resolution_lost: list[Reduced] = field(default_factory=list)

    def skips_allowed(self, fraction: float) -> int:
        """One may always be skipped, unless none may."""
        return max(1, int(fraction * self.found + 1e-9)) if fraction > 0 else 0


@dataclass(slots=True)
class DataReport:
    sources: list[SourceReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    buckets: list[dict[str, Any]] = field(default_factory=list)
    captions: dict[str, Any] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return sum(source.used for source in self.sources)

    @property
    def skipped(self) -> list[Outcome]:
        return [outcome for source in self.sources for outcome in source.skipped]

    @property
    def fixed(self) -> list[Outcome]:
        return [outcome for source in self.sources for outcome in source.fixed]

    @property
    def errors(self) -> list[Outcome]:
        return [outcome for source in self.sources for outcome in source.errors]

    def all_warnings(self) -> list[str]:
        return [*self.warnings, *(line for source in self.sources for line in source.warnings)]

    def describe(self, samples: Sequence[Sample]) -> None:
        """Fill in the counts of buckets and captions."""
        pictures = Counter(_kind(sample) for sample in samples)
        draws: Counter[object] = Counter()
        for sample in samples:
            draws[_kind(sample)] += sample.repeats
        self.buckets = [
            {
                "height": bucket.height,
                "width": bucket.width,
                **({"frames": frames} if frames else {}),
                "pictures" if not frames else "clips": pictures[bucket, frames],
                "draws_per_epoch": draws[bucket, frames],
            }
            for bucket, frames in sorted(pictures)
        ]
        texts = {sample.picture_id: sample.caption for sample in samples}
        words = sorted(len(text.split()) for text in texts.values())
        self.captions |= {
            "pictures": len(texts),
            "different": len(set(texts.values())),
            "empty": sum(not text for text in texts.values()),
            "words_median": words[len(words) // 2] if words else 0,
            "words_longest": words[-1] if words else 0,
        }

    def count_tokens(
        self, samples: Sequence[Sample], seed: int, count: Callable[[str], int], limit: int
    ) -> int:
        """Note every caption of more than `limit` tokens by `count`; how many there are.

        What is over the limit is cut by the text encoder and never seen by the model.
        """
        over = [text for text in all_captions(samples, seed) if count(text) > limit]
        self.captions |= {"token_limit": limit, "over_token_limit": len(over)}
        if over:
            self.warnings.append(
                f"{len(over)} caption(s) have more than {limit} tokens; the rest is not seen: {over[0][:80]!r}"
            )
        return len(over)

    def to_json(self) -> dict[str, Any]:
        return {"version": 1, "used": self.used, **asdict(self)}

    def write(self, path: Path) -> None:
        """Replace `path` by this report.

        Raises:
            DiskFull: it cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        atomic_write_text(path, text)


def _kind(sample: Sample) -> tuple[Bucket, int]:
    """Bucket and frames; 0 for a picture."""
    return sample.bucket, sample.frames if sample.is_clip else 0


def listed(outcomes: Sequence[Outcome]) -> str:
    """One line per file for a message, the first few of many."""
    lines = []
    for outcome in outcomes[:SHOWN]:
        where = f"{outcome.file!r}: " if outcome.file else ""
        lines.append(f"  {where}{outcome.reason}" + (f". {outcome.remedy}" if outcome.remedy else ""))
    if len(outcomes) > SHOWN:
        lines.append(f"  and {len(outcomes) - SHOWN} more")
    return "\n".join(lines)
