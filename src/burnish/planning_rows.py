"""The lines of the plan's table: what each phase of a run takes, and why."""

from __future__ import annotations

from pathlib import Path

from burnish.config.method import Full, TextualInversion, Vae, word_of
from burnish.config.schema import RunConfig
from burnish.errors import UserError
from burnish.planner.choose import NOTHING, Beside, Choice, Profiles, evaluate_settings, with_offload
from burnish.planner.lesson import passes_in_words
from burnish.planner.profile import step_of
from burnish.planner.rates import GIB, Card, Rates
from burnish.planner.recipe import Shape
from burnish.run_plan import CONTEXT, FRAGMENTED, Row


def training_rows(
    config: RunConfig,
    profiles: Profiles,
    best: Choice,
    rates: Rates,
    largest: Shape,
    beside: Beside = NOTHING,
    held: tuple[str, ...] = (),
    texts: str | None = None,
) -> tuple[Row, ...]:
    """The step, and what it is made of.

    Args:
        held: what is in memory besides, in words; its bytes are `beside.always`.
        texts: format of text encoders that the step holds; None where it holds none.
    """
    settings = best.settings
    used = profiles[settings.weights][settings.modes[0]]
    step = evaluate_settings(profiles[settings.weights], settings, rates, beside=Beside(always=beside.always))
    kept = ", ".join(f"{count} x {mode}" for mode, count in settings.kept.items())
    if isinstance(config.method, Vae):
        kept = settings.modes[0]  # as a whole
    if best.waiting:
        kept += f", {best.waiting / GIB:.1f} GiB of it in host memory until backward"
    weights = sum(used.weights) + used.weights_outside
    trained = sum(used.trained) + used.trained_outside
    where = "" if not best.host else f"; {best.host / GIB:.1f} GiB of them in host memory"
    besides = passes_in_words(used.passes, used.turns)
    encoders = "" if texts is None else f", and text encoders, {texts}"
    return (
        Row("  weights", weights - best.host, f"frozen, {settings.weights}{where}{encoders}"),
        Row("  trained", trained, trained_in_words(config)),
        Row(
            "  activations",
            max(0, step.peak - (weights - best.host) - trained - beside.always),
            f"{kept}; {_at_once(largest)} of {size_in_words(largest)}, gradients"
            + (f"; a step is {besides}" if besides else ""),
        ),
        Row("training", step.peak, "all of these" + "".join(f" and {one}" for one in held)),
    )


def _at_once(shape: Shape) -> str:
    return f"batch {shape.batch}" if shape.parts == 1 else f"{shape.parts} parts of a batch, {shape.batch}"


def trained_in_words(config: RunConfig) -> str:
    memory = config.memory
    what = "weights" if isinstance(config.method, Full | Vae) else "adapter"
    if word_of(config.method) is not None:
        what = (
            "a word's vectors" if isinstance(config.method, TextualInversion) else "adapter, a word's vectors"
        )
    average = ", their average" if config.train.ema is not None else ""
    return f"{what}{average}" + ("" if memory.offload_optimizer else ", the optimizer's state")


def sample_rows(
    profiles: Profiles, best: Choice, rates: Rates, beside: Beside, shape: Shape | None
) -> tuple[Row, ...]:
    """Samples are drawn between steps, when of a step only its fixed parts are there."""
    if shape is None:
        return ()
    settings = best.settings
    used = profiles[settings.weights][settings.modes[0]]
    alone = evaluate_settings(profiles[settings.weights], settings, rates)
    table = with_offload(profiles[settings.weights], settings.offload)
    streamed = step_of([table[mode] for mode in settings.modes]).peak - alone.peak
    level = used.resident + beside.between_steps + beside.always - streamed
    return (Row("samples", level, f"weights, the VAE and one of {size_in_words(shape)}"),)


def nothing_fits(card: Card, budget: int, most: tuple[int, str], largest: Shape, remedy: str) -> UserError:
    """Args:
    budget: what torch may allocate.
    most: the bytes that are taken at the least, and by what.
    """
    beside = CONTEXT + FRAGMENTED
    return UserError(
        f"nothing fits into {(budget + beside) / GIB:.1f} GiB on {card.title}: {most[1]} "
        f"take at least {(most[0] + beside) / GIB:.1f} GiB at {size_in_words(largest)}",
        remedy=remedy,
    )


def frozen_adapters(config: RunConfig) -> list[tuple[Path, str]]:
    """Those beside the weights; a base adapter is merged into weights that are kept as they are."""
    model = config.model
    found = [] if model.training_adapter is None else [(model.training_adapter, "the training adapter")]
    if model.base_adapter is not None and config.memory.weights != "native":
        found.append((model.base_adapter, "the base adapter"))
    return found


def size_in_words(shape: Shape) -> str:
    return f"{shape.height}x{shape.width}" + (f", {shape.frames} frames" if shape.frames > 1 else "")
