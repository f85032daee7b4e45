"""The stages: VAE and checker from nothing, then denoiser and text encoders, from nothing or from a folder.

Every stage runs a fixed number of steps from a fixed seed. Shape letters: B batch, S tokens, C channels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from .checker import save_checker, train_checker
from .drawing import draw
from .models import TextToVelocity, build_pipeline, fast_cpu_attention, load_pipeline
from .optim import MasterWeights, cosine_rate
from .pool import Pool, build_pool
from .tokenizers import tokenize
from .world import SIZE, Scenes, sample_scenes

Log = Callable[[str], None]
_HELD_OUT_SEED: Final = 990
_HELD_OUT_SCENES: Final = 256
_DRAWN_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class DenoiserRecipe:
    """Everything that decides how the denoiser is trained."""

    steps: int = 5000
    batch: int = 48
    scenes: int = 24_000
    seed: int = 101
    rate: float = 1.5e-3  # peak, of Muon and of AdamW
    text_rate: float = 0.5  # the text encoders' rate, as a share of it
    rate_floor: float = 0.0  # share of the peak at the last step
    stop_after: int = 0
    """Stop at this step of the schedule, for another run to go on from there; 0 runs all `steps`."""
    warmup: int = 50
    weight_decay: float = 0.02
    two_share: float = 0.3
    complete_share: float = 0.85
    focus: float = 3.0
    time_shift: float = 2.5
    """More than 1 trains more at the noisy end, where the sampler settles what is drawn and where."""
    caption_dropout: float = 0.05


def train(
    out: Path,
    *,
    recipe: DenoiserRecipe,
    vae_steps: int,
    checker_steps: int,
    pictures: int,
    device: torch.device,
    log: Log,
) -> None:
    """Everything from nothing, into `out` (a float32 pipeline) and `out/checker.safetensors`.

    Args:
        out: folder to write.
        recipe: of the denoiser; CLIP and T5 train with it.
        vae_steps: steps of 64 pictures; 4540 gave 33 dB.
        checker_steps: steps of 512 pictures; 1000 gave 98.8 %.
        pictures: drawn for the VAE and the checker; each takes 48 KiB of the device's memory.
        device: where to train.
        log: told about progress.
    """
    pipeline = build_pipeline()
    world = sample_scenes(1000, pictures)
    images_N3HW = _draw_bytes(world, device)
    log(f"drew {pictures} pictures")
    train_vae(pipeline.vae.to(device), images_N3HW, steps=vae_steps, batch=64, seed=0, log=log)
    checker = train_checker(images_N3HW, world, steps=checker_steps, batch=512, seed=7)
    out.mkdir(parents=True, exist_ok=True)
    save_checker(checker, out / "checker.safetensors")
    del images_N3HW
    _train_denoiser(pipeline, out, recipe, train_clip=True, device=device, log=log)


def tune(source: Path, out: Path, *, recipe: DenoiserRecipe, device: torch.device, log: Log) -> None:
    """Go on from a pipeline folder of any precision: denoiser and T5 train, VAE and CLIP stay as they are."""
    pipeline = load_pipeline(source)
    pipeline.vae.to(device)
    _train_denoiser(pipeline, out, recipe, train_clip=False, device=device, log=log)


def train_vae(
    vae: AutoencoderKL, images_N3HW: Tensor, *, steps: int, batch: int, seed: int, log: Log
) -> None:
    """Train on bytes, then measure the latents' scale and shift and store them in the VAE's config.

    The loss is L1, 0.6 of the L1 of the gradients (edges are what this world consists of) and a small KL.
    """
    torch.manual_seed(seed)
    vae.train()
    weights = MasterWeights(vae, rate=1e-3, weight_decay=1e-4, muon_names=frozenset(), average_limit=0.98)
    for step in range(steps):
        rows = torch.randint(len(images_N3HW), (batch,), device=images_N3HW.device)
        picture = images_N3HW[rows].float() / 127.5 - 1
        mean, log_variance = vae.encoder(picture.to(weights.dtype)).float().chunk(2, 1)
        log_variance = log_variance.clamp(-20, 10)
        latent = mean + torch.randn_like(mean) * (log_variance * 0.5).exp()
        decoded = vae.decoder(latent.to(weights.dtype)).float()
        edges = sum((decoded.diff(dim=d) - picture.diff(dim=d)).abs().mean() for d in (2, 3))
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        distance = (decoded - picture).abs().mean()
        weights.step(distance + 0.6 * edges + 3e-4 * kl, rate_factor=cosine_rate(step, steps, warmup=200))
        if (step + 1) % 100 == 0:
            log(f"vae step {step + 1} L1 {float(distance) / 2:.4f}")
    weights.finish()
    with torch.no_grad():
        latents = vae.encode(images_N3HW[:256].float() / 127.5 - 1).latent_dist.mean
    scale, shift = round(1 / float(latents.std()), 4), round(float(latents.mean()), 4)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)


def _train_denoiser(
    pipeline: FluxPipeline,
    out: Path,
    recipe: DenoiserRecipe,
    *,
    train_clip: bool,
    device: torch.device,
    log: Log,
) -> None:
    """Flow matching on settled scenes; the averaged weights go to `out` every 500 steps and at the end."""
    log(f"recipe {asdict(recipe)}")
    pipeline.save_pretrained(out)
    pool = _pool(pipeline, recipe, recipe.seed, recipe.scenes, device)
    held_out = _pool(pipeline, recipe, _HELD_OUT_SEED, _HELD_OUT_SCENES, device)
    log(f"encoded {len(pool)} scenes, latent std {float(pool.latents_NSC[:4096].float().std()):.3f}")
    torch.manual_seed(recipe.seed)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        part.to(device).eval().requires_grad_(False)
    module = TextToVelocity(pipeline, train_clip=train_clip)
    weights = MasterWeights(
        module,
        rate=recipe.rate,
        weight_decay=recipe.weight_decay,
        muon_names=_block_matrices(module),
        slow_prefixes=("t5", "clip"),
        slow_factor=recipe.text_rate,
    )
    objective = _Objective(pipeline, module, recipe, device)
    start, loss_sum = time.monotonic(), 0.0
    with fast_cpu_attention(device):
        for step in range(recipe.stop_after or recipe.steps):
            loss = objective.loss(pool, torch.randint(len(pool), (recipe.batch,), device=device))
            factor = cosine_rate(step, recipe.steps, warmup=recipe.warmup, floor=recipe.rate_floor)
            weights.step(loss, rate_factor=factor)
            loss_sum += float(loss.detach())
            if (step + 1) % 50 == 0:
                pace = (time.monotonic() - start) / (step + 1)
                log(f"step {step + 1} loss {loss_sum / 50:.4f} {1000 * pace:.0f} ms/step")
                loss_sum = 0.0
            if (step + 1) % 500 == 0:
                log(f"held-out loss {objective.held_out_loss(held_out):.4f}")
                _save_average(module, weights, out)
    _save_average(module, weights, out)
    weights.finish()
    log(f"done: {step + 1} steps in {time.monotonic() - start:.0f} s")


class _Objective:
    """Flow matching: `x_t = (1 - t) * data + t * noise`, target `noise - data`, weighted by token."""

    def __init__(
        self, pipeline: FluxPipeline, module: TextToVelocity, recipe: DenoiserRecipe, device: torch.device
    ) -> None:
        nothing = tokenize(pipeline.tokenizer, pipeline.tokenizer_2, [""])
        self._no_clip_ids = torch.from_numpy(nothing.clip_NS).to(device)
        self._no_t5_ids = torch.from_numpy(nothing.t5_NS).to(device)
        self._clip = pipeline.text_encoder
        self._module, self._recipe, self._device = module, recipe, device

    def loss(self, pool: Pool, rows: Tensor) -> Tensor:
        """Mean weighted squared error of a random batch, with some captions dropped."""
        count = len(rows)
        t_B = self._times((torch.arange(count) + torch.rand(count)) / count)  # stratified: a steadier loss
        dropped_B = torch.rand(count, 1, device=self._device) < self._recipe.caption_dropout
        noise = torch.randn(pool.latents_NSC[rows].shape, device=self._device)
        return self._error(pool, rows, t_B, noise, dropped_B)

    @torch.no_grad()
    def held_out_loss(self, pool: Pool) -> float:
        """The same with fixed times and noise and every caption, so that runs compare."""
        draw_noise = torch.Generator().manual_seed(5)
        noise_NSC = torch.randn(pool.latents_NSC.shape, generator=draw_noise).to(self._device)
        order = torch.randperm(len(pool), generator=draw_noise)
        t_N = self._times(((torch.arange(len(pool)) + 0.5) / len(pool))[order])
        kept = torch.zeros(len(pool), 1, dtype=torch.bool, device=self._device)
        errors = []
        for start in range(0, len(pool), 64):
            part = slice(start, start + 64)
            rows = torch.arange(len(pool), device=self._device)[part]
            errors.append(float(self._error(pool, rows, t_N[part], noise_NSC[part], kept[part])))
        return sum(errors) / len(errors)

    def _times(self, uniform: Tensor) -> Tensor:
        shift = self._recipe.time_shift
        return (shift * uniform / (1 + (shift - 1) * uniform)).to(self._device)

    def _error(self, pool: Pool, rows: Tensor, t_B: Tensor, noise_BSC: Tensor, dropped_B: Tensor) -> Tensor:
        data_BSC = pool.latents_NSC[rows].float()
        clip_ids = torch.where(dropped_B, self._no_clip_ids, pool.clip_ids_NS[rows])
        t5_ids = torch.where(dropped_B, self._no_t5_ids, pool.t5_ids_NS[rows])
        pooled_BD = self._clip(input_ids=clip_ids).pooler_output
        t = t_B.view(-1, 1, 1)
        velocity = self._module((1 - t) * data_BSC + t * noise_BSC, t_B, pooled_BD, t5_ids).float()
        error_BS = (velocity - (noise_BSC - data_BSC)).pow(2).mean(2)
        return (error_BS * pool.weight_NS[rows]).mean()


def _pool(
    pipeline: FluxPipeline, recipe: DenoiserRecipe, seed: int, scenes: int, device: torch.device
) -> Pool:
    return build_pool(
        pipeline,
        seed=seed,
        scenes=scenes,
        two_share=recipe.two_share,
        complete_share=recipe.complete_share,
        focus=recipe.focus,
        device=device,
    )


def _block_matrices(module: TextToVelocity) -> frozenset[str]:
    """Muon's share: the 2-D weights inside the denoiser's blocks, without the modulations."""
    named = [(name, weight) for name, weight in module.named_parameters() if name.startswith("denoiser.")]
    return frozenset(
        name
        for name, weight in named
        if "transformer_blocks" in name and "norm" not in name and weight.ndim == 2
    )


@torch.no_grad()
def _save_average(module: TextToVelocity, weights: MasterWeights, out: Path) -> None:
    """Write the averaged weights into the pipeline folder, in float32."""
    averaged = copy.deepcopy(module).float()
    averaged.load_state_dict(weights.average(), strict=False)  # tied names appear once in the average
    averaged.denoiser.save_pretrained(out / "transformer")
    averaged.t5.save_pretrained(out / "text_encoder_2")
    if averaged.clip is not None:
        averaged.clip.save_pretrained(out / "text_encoder")


def _draw_bytes(world: Scenes, device: torch.device) -> Tensor:
    """Pictures as bytes, shape (N, 3, 128, 128)."""
    images = torch.empty(len(world), 3, SIZE, SIZE, dtype=torch.uint8, device=device)
    for start in range(0, len(world), _DRAWN_AT_ONCE):
        part = slice(start, start + _DRAWN_AT_ONCE)
        images[part] = (draw(world.take(part), device) * 255 + 0.5).to(torch.uint8)
    return images
