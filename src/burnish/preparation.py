"""From sources to what training reads: checked pictures and clips, a plan, a full cache, encoded sample prompts.

Text encoders and VAE are loaded here, one after the other, and are gone when this is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from burnish.config.data import Captions, Folder, Generated
from burnish.config.method import Vae, trains_text
from burnish.config.schema import RunConfig, SamplePrompt, Size
from burnish.data.batch import Batch
from burnish.data.cache import Cache, CacheKeys, DiskCache, RamCache
from burnish.data.loader import batches, pixel_batches
from burnish.data.loss_masks import encode_masks
from burnish.data.plan import BatchPlan
from burnish.data.preflight import PreparedData, prepare_samples
from burnish.data.prepare import EncodeCounts, encode_captions, encode_latents, encode_seen_captions, flips
from burnish.data.samples import Sample, all_captions, hold_out
from burnish.events import Listener
from burnish.families.sources import user_cache_folder
from burnish.family import Family
from burnish.model import ChosenModel, choose_model
from burnish.placement import Part
from burnish.prior import drawn_folder, missing_count, own_folder
from burnish.refusals import refuse_unreadable, refuse_unsaid_word, refuse_unseen_references
from burnish.run_folder import RunFolder
from burnish.sampling.sampler import EncodedRequest, PictureRequest, encode_requests, with_references


@dataclass(frozen=True, slots=True)
class Prepared:
    """What training needs from its data; nothing of it holds a model part."""

    model: ChosenModel
    family: Family  # without parts: it describes pictures and knows shapes
    plan: BatchPlan
    held_out: BatchPlan | None
    cache: Cache
    keys: CacheKeys
    requests: list[EncodedRequest]
    tag_frequency: Mapping[str, Mapping[str, int]]  # by source: how often each tag stands in the captions
    config_hash: str
    # Where prompts are encoded in the step, because text encoders are trained: what to draw, not encoded yet.
    encoded: bool = True
    asked: Sequence[PictureRequest] = ()

    pixels: Vae | None = None  # the VAE itself trains, on pixels

    @property
    def parts(self) -> tuple[Part, ...]:
        """What training loads."""
        if self.pixels is not None:
            return ("vae",)
        text: tuple[Part, ...] = () if self.encoded else ("text_encoders",)
        return ("denoiser", "vae", *text) if self.requests or self.asked else ("denoiser", *text)

    def batches(self, start: int, *, workers: int, plan: BatchPlan | None = None) -> Iterator[Batch]:
        """Batches of micro-step `start` and all after it, without end."""
        if self.pixels is not None:
            crop = self.pixels.crop
            return pixel_batches(plan or self.plan, self.family, crop=crop, start=start, workers=workers)
        return batches(
            plan or self.plan,
            self.cache,
            self.keys,
            self.family,
            start=start,
            workers=workers,
            encoded=self.encoded,
        )


def check_data(
    config: RunConfig,
    sources: Sequence[Folder],
    family: Family,
    folder: RunFolder,
    progress: Listener,
    *,
    tell: bool = True,
) -> PreparedData:
    """Decode every picture once, read every caption, write data_report.json (rule R8); `tell` a summary.

    Raises:
        DataError: captions to be mended, too many pictures skipped, or none left.
    """
    if isinstance(config.method, Vae):
        nothing_said = Captions(default="")
        sources = [source.model_copy(update={"captions": nothing_said}) for source in sources]
    prepared = prepare_samples(
        sources,
        pixel_multiple=family.latents.pixel_multiple,
        family=family,
        trigger=config.trigger,
        cache_folder=config.memory.cache_folder or user_cache_folder(),
        report_path=folder.data_report,
        ignore=[config.save.folder],
        progress=partial(progress.phase, "checking pictures"),
    )
    for line in summary(prepared) if tell else ():
        progress.warned(line)
    return prepared


def split(config: RunConfig, samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """What is trained on, and what is held out: the latter as it is, once, with its own caption.

    Raises:
        DataError: too few pictures to hold any out.
    """
    if config.train.validation is None:
        return samples, ()
    trained, held = hold_out(samples, config.train.validation.pictures, config.seed)
    as_is = [
        replace(
            one, flip=False, repeats=1, rules=replace(one.rules, dropout=0.0, shuffle_tags=False, keep_tags=0)
        )
        for one in held
    ]
    return trained, as_is


def summary(prepared: PreparedData) -> list[str]:
    """What a user should know about the pictures, in a few lines; data_report.json has the rest."""
    report = prepared.report
    lines = [f"skipped {outcome.file}: {outcome.reason}" for outcome in report.skipped[:5]]
    if len(report.skipped) > 5:
        lines.append(f"skipped {len(report.skipped) - 5} more pictures; data_report.json lists them")
    if report.fixed:
        lines.append(f"{len(report.fixed)} picture(s) or caption(s) put right; data_report.json lists them")
    lost = [reduced for source in report.sources for reduced in source.resolution_lost]
    if lost:
        lines.append(f"{len(lost)} picture(s) smaller than their bucket train at a smaller size")
    return lines + report.all_warnings()


def folders(config: RunConfig) -> list[Folder]:
    """The sources that are there already."""
    there = [source if isinstance(source, Folder) else own_folder(source) for source in config.data]
    return [source for source in there if source is not None]


def prepare(
    config: RunConfig,
    config_hash: str,
    folder: RunFolder,
    device: torch.device,
    dtype: torch.dtype,
    events: Listener,
) -> Prepared:
    """Everything before the denoiser loads.

    Raises:
        ModelError, DataError, MachineError: as the parts say.
    """
    model = choose_model(config.model, config.memory)
    family = model.load(dtype=dtype, device=device)
    refuse_unreadable(config, family)
    if any(isinstance(source, Generated) for source in config.data):
        # The user's own pictures first: a mistake there should not wait for minutes of drawing.
        check_data(config, folders(config), family, folder, events, tell=False)
    sources = all_folders(config, folder.path / "prior", family, events)
    checked = check_data(config, sources, family, folder, events)
    samples = checked.samples
    trained, held = split(config, samples)
    if config.train.objective.guided_target is not None:
        trained = [replace(sample, unprompted=True) for sample in trained]
    refuse_unsaid_word(config, trained)
    refuse_unseen_references(config, family, samples)
    if config.train.loader_workers and config.memory.cache == "ram":
        events.warned("train.loader_workers has no effect with memory.cache: ram, which is read in the loop")

    cache: Cache = RamCache()
    if config.memory.cache == "disk":
        cache = DiskCache(config.memory.cache_folder or user_cache_folder())
    keys = CacheKeys.of(family, dtype)
    seen = [picture for sample in (*trained, *held) for picture in sample.pictures]
    encode_masks(seen, family.latents, cache, keys)
    in_step, pixels = trains_text(config.method), isinstance(config.method, Vae)
    requests = []
    if not in_step and not pixels:
        requests = encode_texts(config, model, checked, seen, folder, cache, keys, device, dtype, events)
    if not pixels:
        requests = encode(model, seen, requests, cache, keys, device, dtype, events)
    return Prepared(
        model=model,
        family=family,
        plan=BatchPlan(trained, config.train.batch_size, config.seed),
        held_out=BatchPlan(held, config.train.batch_size, config.seed) if held else None,
        cache=cache,
        keys=keys,
        requests=requests,
        tag_frequency=tag_frequency(samples, [*config.data, *sources[len(config.data) :]]),
        config_hash=config_hash,
        encoded=not in_step,
        asked=sample_requests(config) if in_step else (),
        pixels=config.method if isinstance(config.method, Vae) else None,
    )


def all_folders(config: RunConfig, place: Path, family: Family, events: Listener) -> list[Folder]:
    """Every source as a folder, in the config's order; what is missing of generated ones is drawn.

    Behind them stand the user's own pictures of generated sources of which some were drawn.
    """
    in_order, behind = list[Folder](), list[Folder]()
    for source in config.data:
        if isinstance(source, Folder):
            in_order.append(source)
            continue
        own, missing = own_folder(source), missing_count(source)
        if own is not None and not missing:
            in_order.append(own)
            continue
        wanted = source.model_copy(update={"count": missing})
        in_order.append(draw_source(config, wanted, place, family, events))
        if own is not None:
            behind.append(own)
    return in_order + behind


def draw_source(
    config: RunConfig, source: Generated, place: Path, family: Family, events: Listener
) -> Folder:
    return drawn_folder(
        source,
        place,
        config.model,
        config.memory,
        family.identity("denoiser") + family.identity("text_encoders") + family.identity("vae"),
        device=config.memory.device,
        precision=config.train.precision,
        progress=partial(events.phase, "drawing prior pictures"),
    )


def encode_texts(
    config: RunConfig,
    model: ChosenModel,
    checked: PreparedData,
    samples: Sequence[Sample],
    folder: RunFolder,
    cache: Cache,
    keys: CacheKeys,
    device: torch.device,
    dtype: torch.dtype,
    events: Listener,
) -> list[EncodedRequest]:
    """Fill the cache with captions and encode the sample prompts; what nothing asks for is not loaded."""
    captions = all_captions([sample for sample in samples if not keys.sees(sample)], config.seed)
    requests: list[EncodedRequest] = []
    if config.sample.prompts or any(
        cache.get("captions", key) is None for key in caption_keys(samples, config.seed, keys)
    ):
        events.phase("loading the text encoders", 0, 0)
        encoder = model.load("text_encoders", dtype=dtype, device=device)
        note_long_captions(checked, config.seed, encoder, folder, events)
        counts = encode_captions(
            captions, encoder, cache, keys, progress=partial(events.phase, "encoding captions")
        )
        say_repaired(counts, "captions", events.warned)
        counts = encode_seen_captions(
            samples,
            config.seed,
            encoder,
            cache,
            keys,
            progress=partial(events.phase, "encoding captions with references"),
        )
        say_repaired(counts, "captions", events.warned)
        requests = encode_requests(encoder, sample_requests(config))
        encoder.release("text_encoders")
    return requests


def encode(
    model: ChosenModel,
    samples: Sequence[Sample],
    requests: list[EncodedRequest],
    cache: Cache,
    keys: CacheKeys,
    device: torch.device,
    dtype: torch.dtype,
    events: Listener,
) -> list[EncodedRequest]:
    """Fill the cache with latents, and give requests what the denoiser is told about their references."""
    shown = any(one.request.references for one in requests)
    if shown or any(
        cache.get("latents", key) is None for sample in samples for key in latent_keys(sample, keys)
    ):
        events.phase("loading the VAE", 0, 0)
        encoder = model.load("vae", dtype=dtype, device=device)
        counts = encode_latents(
            samples,
            encoder,
            cache,
            keys,
            device=device,
            progress=partial(events.phase, "encoding pictures"),
        )
        say_repaired(counts, "latents", events.warned)
        requests = with_references(encoder, requests, device=device)
        encoder.release("vae")
    return requests


def note_long_captions(
    checked: PreparedData, seed: int, family: Family, folder: RunFolder, events: Listener
) -> None:
    """Say which captions the text encoder cuts off, and add it to data_report.json."""
    report = checked.report
    if report.count_tokens(checked.samples, seed, family.count_tokens, family.prompt_limit):
        events.warned(report.warnings[-1])
    report.write(folder.data_report)


def latent_keys(sample: Sample, keys: CacheKeys) -> list[str]:
    return [keys.latents(sample, flip=flip) for flip in flips(sample)]


def caption_keys(samples: Sequence[Sample], seed: int, keys: CacheKeys) -> Iterator[str]:
    """Of every caption that training can draw, as it is encoded for its sample; some more than once."""
    for sample in samples:
        for flip in flips(sample) if keys.sees(sample) else (False,):
            yield from (keys.caption(text, sample, flip=flip) for text in sample.captions(seed))


def say_repaired(counts: EncodeCounts, what: str, warn: Callable[[str], None]) -> None:
    if counts.repaired:
        warn(f"{counts.repaired} damaged cache entries of {what} were encoded again")


def sample_requests(config: RunConfig) -> list[PictureRequest]:
    """The config's sample prompts, each with its own seed and size."""
    section, requests = config.sample, []
    for index, entry in enumerate(section.prompts):
        one = SamplePrompt(prompt=entry) if isinstance(entry, str) else entry
        height, width = as_pair(one.size or section.size)
        requests.append(
            PictureRequest(
                prompt=one.prompt,
                negative=one.negative,
                seed=section.seed + index if one.seed is None else one.seed,
                height=height,
                width=width,
                steps=section.steps,
                guidance=section.guidance,
                reference_guidance=section.reference_guidance,
                frames=one.frames or section.frames,
                references=tuple(one.references),
                mask=one.mask,
                strength=one.strength,
            )
        )
    return requests


def as_pair(size: Size | None) -> tuple[int | None, int | None]:
    """(height, width), or two Nones for the family's default."""
    if size is None:
        return None, None
    return (size, size) if isinstance(size, int) else size


def tag_frequency(
    samples: Sequence[Sample], sources: Sequence[Folder | Generated]
) -> dict[str, dict[str, int]]:
    """Per training source, by its folder's name, how often each tag stands in its captions."""
    captions = {(sample.source, sample.picture_id): sample for sample in samples if sample.role == "train"}
    counted: dict[str, Counter[str]] = {}
    for (index, _), sample in captions.items():
        source = sources[index]
        name = f"{source.repeats}_{source.path.name}" if isinstance(source, Folder) else f"generated {index}"
        tags = [tag.strip() for tag in sample.caption.split(sample.rules.separator)]
        counted.setdefault(name, Counter()).update(tag for tag in tags if tag)
    return {name: dict(counter) for name, counter in counted.items()}
