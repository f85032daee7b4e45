"""The config tree of a run. Each option is declared here and nowhere else.

Lengths are in pixels as (height, width) or one number for both; learning rates are per optimizer step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from burnish.config.data import DataSource
from burnish.config.method import AnyMethod, Lora
from burnish.config.section import Section
from burnish.config.train import Train

Size = (
    Annotated[int, Field(ge=16, le=8192)]
    | tuple[Annotated[int, Field(ge=16, le=8192)], Annotated[int, Field(ge=16, le=8192)]]
)


class Model(Section):
    """Which weights to train on."""

    path: str = Field(
        min_length=1,
        description="A diffusers folder, a .safetensors or .gguf file, a Hub id such as `owner/name`, or `demo` "
        "for the tiny model that ships with Burnish.",
    )
    family: str | None = Field(
        None, description="The architecture (`burnish families`); detected from the weights when absent."
    )
    vae: Path | None = Field(None, description="VAE file, for a checkpoint that holds the denoiser alone.")
    text_encoders: list[Path] = Field(
        [],
        description="Text-encoder files, for a checkpoint that holds the denoiser alone; or folders of weights, of a "
        "tokenizer, or both.",
    )
    denoisers: list[str] = Field(
        [],
        description="Of a model with several denoisers (Wan 2.2 14B: `transformer` for high noise, `transformer_2` "
        "for low) those to train, all if empty; of a single file, which one it holds.",
    )
    audio: bool = Field(
        False,
        description="Of a model that makes sound with its clips (LTX-2): train and draw it, too. Clips without sound, "
        "and pictures, then train the frames alone.",
    )
    first_frame: bool = Field(
        False,
        description="Of a model that draws clips with a first frame or without one (LTX-Video, Wan 2.2 5B): go on from "
        "first frames. Image-to-video releases always do.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id.")
    offline: bool = Field(False, description="Never reach for the network, not even for a Hub id.")
    zero_terminal_snr: bool = Field(
        False,
        description="Stretch the noise schedule so that it ends in pure noise (arXiv 2305.08891), for a denoiser that "
        "predicts v: very dark and very bright pictures. Models released so say it themselves.",
    )
    prediction: Literal["velocity", "epsilon", "v"] | None = Field(
        None, description="What the denoiser predicts, where a fine-tune differs from its family."
    )
    base_adapter: Path | None = Field(
        None,
        description="Adapter that is merged into the model first and stays: what is trained goes on from it, does not "
        "hold it, and is used together with it.",
    )
    base_adapter_strength: float = Field(1.0, ge=-10, le=10, description="Strength of that one.")
    training_adapter: Path | None = Field(
        None,
        description="Adapter that is active while training and off while sampling, as distilled models "
        "such as FLUX.1-schnell need.",
    )


class SamplePrompt(Section):
    """One picture to draw."""

    prompt: str = Field(description="What to draw; [trigger] and [name] are replaced.")
    negative: str = Field("", description="What to steer away from, with classifier-free guidance.")
    seed: int | None = Field(None, ge=0, description="Overrides `sample.seed`.")
    size: Size | None = Field(None, description="Overrides `sample.size`.")
    frames: int | None = Field(None, ge=1, le=1025, description="Overrides `sample.frames`.")
    references: list[Path] = Field(
        [], max_length=16, description="Pictures that the model is shown beside the prompt."
    )
    mask: Path | None = Field(
        None, description="Where a model that fills holes fills the first of `references`: white."
    )
    strength: float = Field(
        1.0, ge=-10, le=10, description="Of the adapter that trains: a slider shows what it does at several."
    )


class Sample(Section):
    """Pictures drawn while training, always with the same seeds."""

    every: int = Field(250, ge=0, description="Optimizer steps between samples; 0 draws only at the end.")
    at_start: bool = Field(True, description="Also before the first step, to compare with.")
    prompts: list[str | SamplePrompt] = Field([], description="What to draw; a text or a full entry.")
    steps: int | None = Field(
        None, ge=1, le=1000, description="Denoising steps; the family's default if absent."
    )
    guidance: float | None = Field(
        None, ge=0, le=50, description="Guidance scale; the family's default if absent."
    )
    reference_guidance: float | None = Field(
        None,
        ge=0,
        le=50,
        description="How closely a picture keeps to its references, for a family that has such a scale; its default if "
        "absent.",
    )
    size: Size | None = Field(None, description="Height and width; the family's default if absent.")
    frames: int | None = Field(
        None, ge=1, le=1025, description="Frames of a video model's clips; the family's default if absent."
    )
    seed: int = Field(0, ge=0, description="Seed of the first prompt; each further prompt takes the next.")
    batch_size: int = Field(1, ge=1, le=256, description="Pictures drawn at once.")


class Save(Section):
    """Checkpoints to resume from, and adapters or models to use."""

    folder: Path = Field(Path("runs"), description="Run folders are made in here, one per name.")
    every: int = Field(250, ge=1, description="Optimizer steps between checkpoints.")
    keep: int = Field(3, ge=2, le=1000, description="Newest checkpoints kept; the best is kept besides.")
    adapters: Literal["auto", "all", "last"] = Field(
        "auto",
        description="Keep the result of every save, or the last and the best only; `auto` keeps all adapters, and of "
        "whole models the last and the best.",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "bfloat16", description="Number type of what is exported; checkpoints keep that of training."
    )
    format: Literal["auto", "kohya", "diffusers", "comfy"] = Field(
        "auto",
        description="Key names of the adapter; `auto` loads in ComfyUI and diffusers alike. Of whole models: a part "
        "of a diffusers folder, a single file in the names of the release, or with `auto` both where such names exist.",
    )
    on_disk_full: Literal["stop", "wait"] = Field(
        "stop", description="Stop with exit code 3, or wait until space is free."
    )


class Memory(Section):
    """Where things live."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="What to train on.")
    cache: Literal["disk", "ram"] = Field("disk", description="Where cached latents and captions are kept.")
    cache_folder: Path | None = Field(
        None, description="Shared cache; by default `~/.cache/burnish`, or $BURNISH_CACHE."
    )
    budget: str = Field(
        "auto",
        pattern=r"^(auto|\d+(\.\d+)?\s*GiB)$",
        description="What the run may take of the GPU in all, such as `22GiB`; `auto` is what is free. Whatever is "
        "`auto` below is chosen to fit it (`burnish plan`); on a CPU without a budget nothing has to.",
    )
    activations: (
        Literal["auto", "keep", "keep-matmul", "keep-attention", "recompute"]
        | Annotated[float, Field(ge=0, le=1)]
        | dict[
            Literal["keep", "keep-matmul", "keep-attention", "recompute"],
            Annotated[int, Field(ge=0, le=10000)],
        ]
    ) = Field(
        "auto",
        description="What blocks keep for backward, from the fastest to the least memory: all; outputs of attention "
        "and matrix products; of attention alone; their inputs, about a third slower. A number is the share of blocks "
        "to recompute, `{recompute: 20, keep: 37}` numbers of blocks; `auto` chooses block by block.",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Compile the model's repeated blocks: faster steps after a few minutes of compiling, which the "
        "cache saves a second run.",
    )
    attention: Literal[
        "auto", "torch", "flash", "cudnn", "efficient", "flex", "math", "flash3", "flash4", "sage"
    ] = Field(
        "auto",
        description="The kernel for attention. `auto` measures those that are here at the run's own shapes and takes "
        "the fastest that is right, on a CPU torch's own; `sage` draws samples only.",
    )
    weights: Literal["auto", "native", "fp8", "int8", "nf4", "int4"] = Field(
        "auto",
        description="How the large layers of the denoiser's blocks are kept: in the number type of `train.precision`; "
        "in half of it, with 8-bit matrix products (fp8 from Ada and Hopper on, int8 before); in a quarter, slower.",
    )
    text_encoder_weights: Literal["auto", "native", "fp8", "int8", "nf4", "int4"] = Field(
        "auto", description="The same for text encoders, which run once per caption."
    )
    stream: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto",
        description="Share of the denoiser's block weights that stay in host memory and come to the GPU while "
        "other blocks compute: hardly slower where a step takes long, as with large pictures and clips.",
    )
    offload_activations: Literal["auto"] | bool = Field(
        "auto",
        description="What blocks keep for backward waits in host memory; for clips, with `recompute`.",
    )
    batch_parts: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto",
        description="Parts of a batch that are learned one after the other, their gradients added up: the memory of a "
        "smaller batch, and what is learned is the same. Pairs and sliders stay whole.",
    )
    gradient_release: bool = Field(
        False,
        description="Each weight moves in backward, as soon as its gradient is there, which is then let go: no more "
        "than a few gradients are in memory. `train.max_grad_norm` then clips each weight's gradient by itself.",
    )
    offload_optimizer: bool = Field(
        False,
        description="The optimizer's state waits in host memory and comes to the GPU weight by weight.",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads for torch; its own choice if absent."
    )

    @property
    def steps_singly(self) -> bool:
        """Whether weights are stepped one by one."""
        return self.gradient_release or self.offload_optimizer


class RunConfig(Section):
    """One run: data in, adapter out."""

    name: str = Field(
        min_length=1,
        max_length=120,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run, its folder and its adapter file.",
    )
    trigger: str | None = Field(
        None, min_length=1, description="Word that calls the concept; replaces [trigger]."
    )
    seed: int = Field(42, ge=0, lt=2**63, description="Everything random follows from it.")
    model: Model = Field(description="Which weights to train on.")
    method: AnyMethod = Field(default_factory=lambda: Lora(kind="lora"), description="What is trained.")
    data: list[DataSource] = Field(min_length=1, description="Where the pictures come from.")
    train: Train = Field(default_factory=Train, description="How long and how fast.")
    sample: Sample = Field(default_factory=Sample, description="Pictures drawn on the way.")
    save: Save = Field(default_factory=Save, description="Checkpoints, and adapters or models.")
    memory: Memory = Field(default_factory=Memory, description="Where things live.")

    @model_validator(mode="after")
    def needs_something_to_learn(self) -> Self:
        if all(source.role == "regularization" for source in self.data):
            raise ValueError("every source is `regularization`; at least one must be `train`")
        return self
