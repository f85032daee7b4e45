"""What is learned: noise, time, target and loss, put together from the parts in `diffusion/`.

An objective sees a batch and a family and gives one loss per sample. Noise and time are pure functions of
(seed, micro-step, sample id), so that workers, ranks and resumes cannot change them (law L1).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.config.objective import (
    AnyLoss,
    AnyWeighting,
    Multires,
    Objective,
    SigmoidTimesteps,
    Squared,
    UniformTimesteps,
)
from burnish.data.batch import Batch, Direction, Opposites, Preference
from burnish.diffusion.contrasts import guided, preference_loss, preference_margin, slider_target, told_apart
from burnish.diffusion.distance import delta_at, mean_distance, squared_error
from burnish.diffusion.mixing import noisy_and_target
from burnish.diffusion.noise import noise_of
from burnish.diffusion.times import Timesteps
from burnish.diffusion.weights import weight_at
from burnish.family import Family
from burnish.hardware import sent
from burnish.noise_schedule import ResolutionShift, Schedule, TokenShift
from burnish.randomness import torch_generator

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
Streams = tuple[Tensor, ...]  # of the frames, and of the sound where there is some
At = Callable[[float], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Turn:
    """What is learned at one time; most batches are one turn."""

    batch: Batch
    loss_B: Tensor
    t_B: Tensor
    weight_B: Tensor  # of each row in the loss of the step
    told_apart_B: Tensor | None = None  # of pairs: 1 where the model favours the right one


@dataclass(frozen=True, slots=True)
class Noised:
    """Noise and times of a batch, and what comes of them."""

    noisy: Streams
    targets: Streams
    t_B: Tensor


@dataclass(frozen=True, slots=True)
class Denoising:
    """Predict the velocity, the noise or v from noisy latents."""

    schedule: Schedule
    timesteps: Timesteps = field(default_factory=Timesteps)
    shift: float | TokenShift = 1.0
    sampler_steps: int = 50  # what a shift that depends on the number of steps is told
    weighting: AnyWeighting | None = None
    loss: AnyLoss = field(default_factory=Squared)
    noise_offset: float = 0.0
    multires: Multires | None = None
    input_perturbation: float = 0.0
    guidance: float | None = 1.0  # value fed to a guidance embedding; None bypasses it
    guided_target: float | None = (
        None  # scale of guidance that the target is to have, where batches say how without
    )
    # Within it the family predicts as before training; None where it cannot, which no such batch is then given to.
    frozen: Callable[[], AbstractContextManager[None]] | None = None
    # Within it the adapters that train are at this strength, none at 0; None where none train, as with `frozen`.
    strength: At | None = None

    @classmethod
    def of(cls, section: Objective, family: Family) -> Self:
        """Fill what the section leaves to the family."""
        first, last = family.schedule.times
        low, high = (first + (last - first) * time for time in section.range)
        law = section.timesteps
        if law is None:
            law = SigmoidTimesteps(kind="sigmoid") if family.schedule.is_flow else UniformTimesteps()
        shift: float | TokenShift
        match section.shift:
            case "family":
                shift = family.schedule.shift
            case "resolution":
                released = family.schedule.shift
                shift = ResolutionShift() if isinstance(released, float | int) else released
            case number:
                shift = number
        return cls(
            schedule=family.schedule,
            timesteps=Timesteps(law, low, high, tuple(section.emphasis)),
            shift=shift,
            sampler_steps=family.defaults.steps,
            weighting=section.weighting,
            loss=section.loss,
            noise_offset=section.noise_offset,
            multires=section.multires,
            input_perturbation=section.input_perturbation,
            guidance=None if section.guidance == "bypass" else section.guidance,
            guided_target=section.guided_target,
        )

    def comparable(self) -> Self:
        """Plain squared error at all times alike: what held-out losses are counted in, whatever trains. Where there
        are masks it is that of the places that count; where a difference is learned it is its own loss, of squares."""
        plain = replace(self.timesteps, emphasis=())
        return replace(self, loss=Squared(), weighting=None, timesteps=plain, frozen=None, guided_target=None)

    def held_out(self, family: Family, batch: Batch, times: Sequence[float], seed: int) -> Tensor:
        """Comparable losses of every sample at each time, with noise that depends on the sample and the time alone."""
        plain = self.comparable()
        begin, end = family.schedule.times
        losses = []
        for t in times:
            noise = held_noise(seed, "validation", batch.latents_BCHW.shape[1:], batch.sample_ids, t)
            audio_noise = None
            if batch.audio_BCLF is not None:
                shape = batch.audio_BCLF.shape[1:]
                audio_noise = held_noise(seed, "validation audio", shape, batch.sample_ids, t)
            t_B = torch.full((len(noise),), begin + (end - begin) * t)
            turns = plain.turns_at(family, batch, noise, t_B, audio_noise_BCLF=audio_noise)
            losses += [turn.loss_B.flatten() for turn in turns]
        return torch.cat(losses)

    def losses(
        self, family: Family, batch: Batch, seed: int, predict: Predict | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss per sample in float32, shape (B,), and the times drawn, shape (B,); of batches that are one turn.

        `predict` stands in for `family.predict` where a caller wraps it (autocast).
        """
        (turn,) = self.turns(family, batch, seed, predict)
        return turn.loss_B, turn.t_B

    def turns(
        self, family: Family, batch: Batch, seed: int, predict: Predict | None = None
    ) -> Generator[Turn, None, None]:
        """What is learned of a batch, one after the other, at noise and times that are drawn.

        The adapters are at a turn's strength until the next is asked for: backward has to come before, since blocks may
        be computed again in it.
        """
        noise_BCHW = self.draw_noise(batch, seed)
        t_B = self.draw_times(batch, seed, family.latents.tokens(batch.latents_BCHW.shape))
        audio_noise_BCLF = self.draw_audio_noise(batch, seed)
        mixed_BCHW = None
        if self.input_perturbation:
            further_BCHW = plain_noise(batch, seed, "perturbation", batch.latents_BCHW.shape[1:])
            mixed_BCHW = noise_BCHW + self.input_perturbation * further_BCHW
        yield from self.turns_at(family, batch, noise_BCHW, t_B, predict, audio_noise_BCLF, mixed_BCHW)

    @staticmethod
    def turn_count(batch: Batch) -> int:
        return 2 if isinstance(batch.contrast, Opposites | Direction) else 1

    def turns_at(
        self,
        family: Family,
        batch: Batch,
        noise_BCHW: Tensor,
        t_B: Tensor,
        predict: Predict | None = None,
        audio_noise_BCLF: Tensor | None = None,
        mixed_BCHW: Tensor | None = None,
    ) -> Generator[Turn, None, None]:
        """As `turns`, at given noise and times."""
        if batch.contrast is None:
            loss_B = self.losses_at(family, batch, noise_BCHW, t_B, predict, audio_noise_BCLF, mixed_BCHW)
            yield Turn(batch, loss_B, t_B, batch.weight_B)
            return
        if isinstance(batch.contrast, Opposites):
            half = len(batch.sample_ids) // 2
            for strength, rows in ((1.0, slice(0, half)), (-1.0, slice(half, None))):
                end, mixed = batch.rows(rows), None if mixed_BCHW is None else mixed_BCHW[rows]
                with self._at(strength):
                    loss_B = self.losses_at(family, end, noise_BCHW[rows], t_B[rows], predict, None, mixed)
                    yield Turn(end, loss_B, t_B[rows], end.weight_B)
            return
        told = self._told(family, batch, batch.conditioning, t_B)
        noised = self._noised(batch, noise_BCHW, t_B, audio_noise_BCLF, mixed_BCHW)
        say = partial(self._said, family, noised, predict=predict)
        if isinstance(batch.contrast, Direction):
            yield from self._both_ways(family, batch, batch.contrast, noised, say)
            return
        with torch.no_grad(), self._at(0.0):
            before_B = self._distances(say(told), noised.targets, t_B)
        with self._at(1.0):
            error_B = self._distances(say(told), noised.targets, t_B)
            yield self._preferred(batch, batch.contrast, error_B, before_B, t_B)

    def _both_ways(
        self, family: Family, batch: Batch, direction: Direction, noised: Noised, say: Callable[..., Streams]
    ) -> Iterator[Turn]:
        """At strength 1 towards the positive prompt, at -1 towards the negative one."""
        told = self._told(family, batch, batch.conditioning, noised.t_B)
        ends = (direction.positive, direction.negative)
        with torch.no_grad(), self._at(0.0):
            before = say(told)
            positive, negative = (say(self._told(family, batch, one, noised.t_B)) for one in ends)
        for strength in (1.0, -1.0):
            targets = tuple(
                slider_target(*three, direction.guidance_B, strength)
                for three in zip(before, positive, negative, strict=True)
            )
            with self._at(strength):
                loss_B = self._weighted(self._distances(say(told), targets, noised.t_B), noised.t_B)
                yield Turn(batch, loss_B, noised.t_B, batch.weight_B / 2)

    def _preferred(
        self, batch: Batch, preference: Preference, error_B: Tensor, before_B: Tensor, t_B: Tensor
    ) -> Turn:
        """Each pair's loss stands in both of its rows."""
        half_B = t_B[: len(preference.beta_B)]
        beta_B = preference.beta_B * (1 - half_B) ** (2 * preference.decays_B)
        margin_B = preference_margin(error_B, before_B, sent(beta_B, error_B.device))
        loss_B = self._weighted(preference_loss(margin_B).repeat(2), t_B)
        return Turn(batch, loss_B, t_B, batch.weight_B, told_apart(margin_B.detach()))

    def _at(self, strength: float) -> AbstractContextManager[None]:
        assert self.strength is not None, "a batch that teaches a difference is given to adapters alone"
        return self.strength(strength)

    def losses_at(
        self,
        family: Family,
        batch: Batch,
        noise_BCHW: Tensor,
        t_B: Tensor,
        predict: Predict | None = None,
        audio_noise_BCLF: Tensor | None = None,
        mixed_BCHW: Tensor | None = None,
    ) -> Tensor:
        """Loss per sample at given noise and times: what validation holds fixed.

        Times that are on the CPU stay there for all that is computed of them alone: no device is asked.

        Args:
            mixed_BCHW: noise that is mixed in, where it is another than the one that is learned.
        """
        noised = self._noised(batch, noise_BCHW, t_B, audio_noise_BCLF, mixed_BCHW)
        told = self._told(family, batch, batch.conditioning, t_B)
        predicted = partial(self._said, family, noised, told, predict=predict)
        targets = noised.targets
        if batch.unprompted is not None and self.guided_target is not None:
            unprompted = self._told(family, batch, batch.unprompted, t_B)
            with torch.no_grad():
                without = self._said(family, noised, unprompted, predict)
            both = zip(targets, without, strict=True)
            targets = tuple(guided(target, said, self.guided_target) for target, said in both)
        return self._weighted(self._loss(batch, targets, predicted, t_B), t_B)

    def _noised(
        self,
        batch: Batch,
        noise_BCHW: Tensor,
        t_B: Tensor,
        audio_noise_BCLF: Tensor | None,
        mixed_BCHW: Tensor | None,
    ) -> Noised:
        device = batch.latents_BCHW.device
        noisy_BCHW, target_BCHW = noisy_and_target(
            self.schedule,
            batch.latents_BCHW.float(),
            sent(noise_BCHW, device),
            t_B,
            None if mixed_BCHW is None else sent(mixed_BCHW, device),
        )
        if batch.audio_BCLF is None:
            return Noised((noisy_BCHW,), (target_BCHW,), t_B)
        assert audio_noise_BCLF is not None, "sound has noise of its own"
        sound = noisy_and_target(self.schedule, batch.audio_BCLF.float(), sent(audio_noise_BCLF, device), t_B)
        return Noised((noisy_BCHW, sound[0]), (target_BCHW, sound[1]), t_B)

    def _said(
        self, family: Family, noised: Noised, told: Conditioning, predict: Predict | None = None
    ) -> Streams:
        """What the family says, told so."""
        noisy, t_B = noised.noisy, sent(noised.t_B, noised.noisy[0].device)
        if len(noisy) == 1:
            return ((predict or family.predict)(noisy[0], t_B, told),)
        assert family.audio is not None, "a batch has sound for a family with sound"
        return family.audio.predict(noisy[0], noisy[1], t_B, told)

    def _distances(self, said: Streams, targets: Streams, t_B: Tensor) -> Tensor:
        """Added up over the streams, (B,)."""
        delta_B = delta_at(self.loss, self.schedule, t_B)
        found = [mean_distance(self.loss, *both, delta_B) for both in zip(said, targets, strict=True)]
        return found[0] if len(found) == 1 else found[0] + found[1]

    def _weighted(self, loss_B: Tensor, t_B: Tensor) -> Tensor:
        """By what the times count for."""
        if self.weighting is not None:
            loss_B = loss_B * sent(weight_at(self.weighting, self.schedule, t_B), loss_B.device)
        if self.timesteps.emphasis:
            loss_B = loss_B * sent(self.timesteps.weight(t_B), loss_B.device)
        return loss_B

    def _told(self, family: Family, batch: Batch, conditioning: Conditioning, t_B: Tensor) -> Conditioning:
        if family.capabilities.guidance_embedding and self.guidance is not None:
            guidance_B = torch.full(
                t_B.shape, self.guidance, dtype=t_B.dtype, device=batch.latents_BCHW.device
            )
            conditioning = conditioning.merged({"guidance_B": guidance_B})
        if family.capabilities.picks_by_time:
            conditioning = conditioning.merged({"time_B": t_B})
        return conditioning

    def _loss(self, batch: Batch, targets: Streams, predicted: Callable[[], Streams], t_B: Tensor) -> Tensor:
        """As LTX-2's trainer does: errors of frames and sound, which are at one time, are added up."""
        if batch.counted is None and isinstance(self.loss, Squared):
            errors = [squared_error(*both) for both in zip(predicted(), targets, strict=True)]
            return errors[0] if len(errors) == 1 else errors[0] + errors[1]
        kept = self._kept(batch, predicted)
        delta_B = delta_at(self.loss, self.schedule, t_B)
        said = predicted()
        loss_B = mean_distance(self.loss, said[0], targets[0], delta_B, batch.counted)
        if kept is not None:
            loss_B = loss_B + mean_distance(self.loss, said[0], kept[0].float(), delta_B, batch.kept)
        if len(said) == 1:
            return loss_B
        if batch.counted is None or kept is None:
            return loss_B + mean_distance(self.loss, said[1], targets[1], delta_B)
        # Masks are of frames; a sample whose frames are not learned at all has sound that is to stay as well.
        learned_B = batch.counted.flatten(1).amax(1) > 0
        target = torch.where(learned_B.view(-1, 1, 1, 1), targets[1], kept[1].float())
        return loss_B + mean_distance(self.loss, said[1], target, delta_B)

    def _kept(self, batch: Batch, predicted: Callable[[], Streams]) -> Streams | None:
        """What the model said before training, where some place of the batch is to stay at that."""
        if batch.kept is None or self.frozen is None:
            return None
        with torch.no_grad(), self.frozen():
            return predicted()

    def draw_noise(self, batch: Batch, seed: int) -> Tensor:
        """Noise (B, C, H, W) on the CPU: see `noise_of`."""
        shape = batch.latents_BCHW.shape[1:]
        rows = []
        for sample_id in batch.sample_ids:
            generator = torch_generator(seed, "noise", batch.position, sample_id)
            rows.append(noise_of(shape, generator, self.noise_offset, self.multires))
        return torch.stack(rows)

    def draw_audio_noise(self, batch: Batch, seed: int) -> Tensor | None:
        """Standard normal noise (B, C, L, F) on the CPU; None without sound."""
        if batch.audio_BCLF is None:
            return None
        return plain_noise(batch, seed, "audio noise", batch.audio_BCLF.shape[1:])

    def draw_times(self, batch: Batch, seed: int, tokens: int) -> Tensor:
        """Times in [0, 1], shape (B,), float32 on the CPU."""
        generators = [torch_generator(seed, "time", batch.position, one) for one in batch.sample_ids]
        return self.timesteps.draw(self.schedule, self.shift_at(tokens), generators)

    def shift_at(self, tokens: int) -> float:
        if isinstance(self.shift, float | int):
            return self.shift
        return self.shift.factor(tokens, self.sampler_steps)


def held_noise(seed: int, what: str, shape: Sequence[int], sample_ids: Sequence[str], t: float) -> Tensor:
    """Noise (B, *shape) that depends on the sample and the time alone."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch_generator(seed, what, sample_id, str(t)))
            for sample_id in sample_ids
        ]
    )


def plain_noise(batch: Batch, seed: int, what: str, shape: torch.Size) -> Tensor:
    """Standard normal noise on the CPU, a row of `shape` for each sample."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch_generator(seed, what, batch.position, sample_id))
            for sample_id in batch.sample_ids
        ]
    )
