"""OmniGen2 once more, from the equations of arXiv 2506.18871 (Lumina-Image 2.0's blocks, Omni-RoPE).

Plain functions over the released weights by name, one sample, one head and one picture at a time, and the released
way of sampling.

Nothing here is shared with the family under test. `velocity` is data - noise at a time that is 0 for noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

Weights = Mapping[str, Tensor]
Config = Mapping[str, Any]
SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    out = torch.einsum("...i,oi->...o", x, w[f"{name}.weight"])
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def rotated(x: Tensor, places: Tensor, shares: Sequence[int]) -> Tensor:
    """One head (N, E), each pair of neighbours turned; `places` (N, 3)."""
    out, begin = x.clone(), 0
    for axis, share in enumerate(shares):
        for pair in range(share // 2):
            angle = places[:, axis].double() / 10_000 ** (2 * pair / share)
            cos, sin = angle.cos().float(), angle.sin().float()
            one, other = x[:, begin + 2 * pair], x[:, begin + 2 * pair + 1]
            out[:, begin + 2 * pair] = one * cos - other * sin
            out[:, begin + 2 * pair + 1] = one * sin + other * cos
        begin += share
    return out


def attention(w: Weights, name: str, config: Config, x: Tensor, places: Tensor) -> Tensor:
    heads, shared = config["num_attention_heads"], config["num_kv_heads"]
    size, shares = config["hidden_size"] // heads, config["axes_dim_rope"]
    q, k, v = (linear(w, f"{name}.to_{one}", x) for one in "qkv")
    found = []
    for head in range(heads):
        own, its = slice(head * size, (head + 1) * size), head // (heads // shared)
        common = slice(its * size, (its + 1) * size)
        query = rotated(rms(q[:, own], w[f"{name}.norm_q.weight"], 1e-5), places, shares)
        key = rotated(rms(k[:, common], w[f"{name}.norm_k.weight"], 1e-5), places, shares)
        share = torch.softmax(torch.einsum("ie,je->ij", query, key) / size**0.5, dim=-1)
        found.append(torch.einsum("ij,je->ie", share, v[:, common]))
    return linear(w, f"{name}.to_out.0", torch.cat(found, dim=-1))


def feed_forward(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(
        w, f"{name}.linear_2", silu(linear(w, f"{name}.linear_1", x)) * linear(w, f"{name}.linear_3", x)
    )


def block(
    w: Weights, name: str, config: Config, x: Tensor, places: Tensor, time: Tensor | None = None
) -> Tensor:
    epsilon = config["norm_eps"]
    if time is None:
        normed = rms(x, w[f"{name}.norm1.weight"], epsilon)
        gate = gate_after = scale_after = None
    else:
        scale, gate, scale_after, gate_after = linear(w, f"{name}.norm1.linear", silu(time)).chunk(4)
        normed = rms(x, w[f"{name}.norm1.norm.weight"], epsilon) * (1 + scale)
    attended = rms(attention(w, f"{name}.attn", config, normed, places), w[f"{name}.norm2.weight"], epsilon)
    x = x + (attended if gate is None else gate.tanh() * attended)
    inner = rms(x, w[f"{name}.ffn_norm1.weight"], epsilon)
    inner = inner if scale_after is None else inner * (1 + scale_after)
    fed = rms(feed_forward(w, f"{name}.feed_forward", inner), w[f"{name}.ffn_norm2.weight"], epsilon)
    return x + (fed if gate_after is None else gate_after.tanh() * fed)


def embedded_time(w: Weights, config: Config, time: float) -> Tensor:
    waves = [
        getattr(torch, kind)(
            torch.tensor(time * config["timestep_scale"] * 10_000 ** (-step / 128), dtype=torch.float64)
        )
        for kind in ("cos", "sin")
        for step in range(128)
    ]
    inner = "time_caption_embed.timestep_embedder"
    return linear(w, f"{inner}.linear_2", silu(linear(w, f"{inner}.linear_1", torch.stack(waves).float())))


def patches(latents: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """Of latents (C, H, W): patches of 2x2 and where they are."""
    _, height, width = latents.shape
    at = [(row, column) for row in range(height // 2) for column in range(width // 2)]
    cut = [latents[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].permute(1, 2, 0).flatten() for r, c in at]
    return torch.stack(cut), at


def velocity(
    w: Weights, config: Config, latents: Tensor, time: float, words: Tensor, references: Sequence[Tensor] = ()
) -> Tensor:
    """Of one sample: latents (C, H, W), words (S, D) without padding, references (C, H, W) each."""
    temb = embedded_time(w, config, time)
    places = torch.tensor([[number] * 3 for number in range(len(words))])
    caption = linear(
        w,
        "time_caption_embed.caption_embedder.1",
        rms(words, w["time_caption_embed.caption_embedder.0.weight"], config["norm_eps"]),
    )
    for number in range(config["num_refiner_layers"]):
        caption = block(w, f"context_refiner.{number}", config, caption, places)
    sequence, everywhere, free = [caption], [places], len(words)
    for index, reference in enumerate(references):
        cut, at = patches(reference)
        its = torch.tensor([[free, row, column] for row, column in at])
        x = linear(w, "ref_image_patch_embedder", cut) + w["image_index_embedding"][index]
        for number in range(config["num_refiner_layers"]):
            x = block(w, f"ref_image_refiner.{number}", config, x, its, temb)
        sequence.append(x)
        everywhere.append(its)
        free += max(reference.shape[1:]) // 2
    cut, at = patches(latents)
    its = torch.tensor([[free, row, column] for row, column in at])
    x = linear(w, "x_embedder", cut)
    for number in range(config["num_refiner_layers"]):
        x = block(w, f"noise_refiner.{number}", config, x, its, temb)
    joined, everything = torch.cat([*sequence, x]), torch.cat([*everywhere, its])
    for number in range(config["num_layers"]):
        joined = block(w, f"layers.{number}", config, joined, everything, temb)
    last = joined[-len(at) :]
    last = (last - last.mean(-1, keepdim=True)) / (last.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    last = linear(w, "norm_out.linear_2", last * (1 + linear(w, "norm_out.linear_1", silu(temb))))
    out = torch.empty_like(latents)
    for (row, column), patch in zip(at, last, strict=True):
        out[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.reshape(2, 2, -1).permute(2, 0, 1)
    return out


def times(steps: int, height: int, width: int) -> list[float]:
    """From noise at 0 to data at 1 for latents of this size; the more latents, the longer at the noise."""
    shift = (height * width) ** 0.5 / 40
    even = [step / steps for step in range(steps)]
    return [*(t / (shift - shift * t + t) for t in even), 1.0]


class Drawn:
    def __init__(self, images: Tensor) -> None:
        self.images = images


class OmniGen2Pipeline:
    """The folder of the release, and how it samples with guidance by text (the scale of references left at 1)."""

    def __init__(
        self,
        transformer: Weights,
        config: Config,
        vae: AutoencoderKL,
        mllm: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
    ) -> None:
        self.transformer, self.config, self.vae = transformer, config, vae
        self.mllm, self.tokenizer = mllm, tokenizer

    def save_pretrained(self, folder: Path) -> None:
        (folder / "transformer").mkdir(parents=True)
        (folder / "scheduler").mkdir()
        save_file(dict(self.transformer), folder / "transformer" / "diffusion_pytorch_model.safetensors")
        written: dict[str, Config] = {
            "transformer/config.json": {"_class_name": "OmniGen2Transformer2DModel", **self.config},
            "scheduler/scheduler_config.json": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "dynamic_time_shift": True,
                "num_train_timesteps": 1000,
            },
            "model_index.json": {
                "_class_name": "OmniGen2Pipeline",
                "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
                "processor": ["transformers", "Qwen2_5_VLProcessor"],
                "scheduler": [
                    "scheduling_flow_match_euler_discrete_time_shifting",
                    "FlowMatchEulerDiscreteScheduler",
                ],
                "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
        }
        for name, content in written.items():
            (folder / name).write_text(json.dumps(content))
        self.vae.save_pretrained(folder / "vae")
        self.mllm.save_pretrained(folder / "mllm")
        self.tokenizer.save_pretrained(folder / "processor")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        return cls(
            load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"),
            json.loads((folder / "transformer" / "config.json").read_text()),
            AutoencoderKL.from_pretrained(folder / "vae"),
            Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "mllm").eval(),
            Qwen2Tokenizer.from_pretrained(folder / "processor"),
        )

    def set_progress_bar_config(self, *, disable: bool) -> None:
        """There is none."""

    def words(self, prompt: str) -> Tensor:
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        states: Tensor = self.mllm(ids, output_hidden_states=True).hidden_states[-1]
        return states[0]

    def encoded(self, pixels: Tensor) -> Tensor:
        """Of a picture (3, H, W) in [-1, 1]."""
        mode: Tensor = self.vae.encode(pixels[None]).latent_dist.mode()[0]
        return (mode - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str],
        negative_prompt: Sequence[str],
        height: int,
        width: int,
        num_inference_steps: int,
        generator: Sequence[torch.Generator],
        text_guidance_scale: float,
        output_type: str,
        references: Sequence[Tensor] = (),
    ) -> Drawn:
        drawn = []
        for one, against, dice in zip(prompt, negative_prompt, generator, strict=True):
            x = torch.randn((1, 16, height // 8, width // 8), generator=dice)[0]
            words, others = self.words(one), self.words(against)
            seen = [self.encoded(pixels) for pixels in references]
            steps = times(num_inference_steps, *x.shape[1:])
            for now, after in pairwise(steps):
                v = velocity(self.transformer, self.config, x, now, words, seen)
                if text_guidance_scale > 1:
                    without = velocity(self.transformer, self.config, x, now, others)
                    v = without + text_guidance_scale * (v - without)
                x = x + (after - now) * v
            drawn.append(x)
        latents = torch.stack(drawn)
        if output_type == "latent":
            return Drawn(latents)
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return Drawn((self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
