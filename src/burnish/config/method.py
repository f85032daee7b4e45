"""Config of what is trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from burnish.config.section import Section, default_kind


class LoraGroup(Section):
    """Modules that get their own rank, alpha or learning rate; the first group that matches wins."""

    match: list[str] = Field(
        min_length=1, description="Patterns over module names, such as `*attn.to_q`, or named sets."
    )
    rank: int | None = Field(None, ge=1, le=4096, description="Instead of the method's rank.")
    alpha: float | None = Field(None, gt=0, le=65536, description="Instead of the method's alpha.")
    learning_rate: float | None = Field(None, gt=0, le=10, description="Instead of the optimizer's rate.")


class RateGroup(Section):
    """Modules that get their own learning rate; the first group that matches wins."""

    match: list[str] = Field(
        min_length=1, description="Patterns over module names, such as `*attn.to_q`, or named sets."
    )
    learning_rate: float = Field(gt=0, le=10, description="Instead of the optimizer's rate.")


class TextEncoders(Section):
    """Adapters on CLIP text encoders beside those of the denoiser, of the same kind, rank and alpha."""

    which: list[Literal["clip_l", "clip_g", "clip_h"]] = Field(
        [], description="Those to train, such as `clip_l`; all that the model has if empty."
    )
    targets: Literal["attention", "attention+mlp"] = Field(
        "attention+mlp", description="Linear layers of their attention, or those of the feed-forward as well."
    )
    learning_rate: float | None = Field(
        None, gt=0, le=10, description="Instead of the optimizer's rate; half of it or less is usual."
    )


class WholeTextEncoders(Section):
    """CLIP text encoders whose own weights train beside the denoiser's."""

    which: list[Literal["clip_l", "clip_g", "clip_h"]] = Field(
        [], description="Those to train, such as `clip_l`; all that the model has if empty."
    )
    learning_rate: float | None = Field(
        None, gt=0, le=10, description="Instead of the optimizer's rate; half of it or less is usual."
    )


class Word(Section):
    """A new word in the vocabularies of the text encoders (arXiv 2208.01618)."""

    token: str = Field(
        min_length=1,
        max_length=60,
        description="The word, which captions and sample prompts say; one that the model does not know, such as "
        "`<my-cat>`. `[trigger]` is replaced.",
    )
    vectors: int = Field(
        1,
        ge=1,
        le=64,
        description="Vectors of the word; a prompt of CLIP has room for 75 in all. More hold more, and bend less to "
        "the rest of the prompt.",
    )
    initial: str | None = Field(
        None,
        min_length=1,
        description="Words to begin with, such as `cat`; drawn as the vocabulary's vectors are spread if absent.",
    )
    lengths: Literal["vocabulary", "free"] = Field(
        "vocabulary",
        description="Keep each vector as long as those of the vocabulary (its inner 98%), or let them grow.",
    )

    @field_validator("token")
    @classmethod
    def one_lower_case_word(cls, token: str) -> str:
        if any(letter.isspace() or letter == "," for letter in token):
            raise ValueError(f"token must be one word, without spaces and commas; got {token!r}")
        if token != token.lower():
            raise ValueError(
                f"token must be lower case, which prompts are read in; got {token!r}, write {token.lower()!r}"
            )
        return token


class PivotalWord(Word):
    """A new word that trains together with adapters (pivotal tuning)."""

    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Instead of the optimizer's rate; ten to fifty times an adapter's is usual.",
    )


class Adapter(Section):
    """What every kind of adapter has."""

    text_encoders: TextEncoders | None = Field(
        None,
        description="Adapters on text encoders as well; they then stay in memory and read captions in each step.",
    )

    word: PivotalWord | None = Field(
        None,
        description="A new word for the text encoders that trains with the adapters, in a file of its own.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of an adapter's inputs dropped while training."
    )
    rank_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share that is left out of each adapter, drawn for each layer and step: of LoRA's ranks, of the "
        "outputs of LoHa and LoKr, of the blocks of OFT and BOFT.",
    )
    module_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapters that are left out as a whole, drawn for each step.",
    )
    targets: str | None = Field(
        None,
        description="Named set: attention, attention-out, mlp, attention+mlp, all, or a stack of blocks by its name; "
        "the family's default if absent.",
    )
    include: list[str] = Field([], description="Patterns of further modules to train, or named sets.")
    exclude: list[str] = Field(
        [], description="Patterns of modules to leave out, or named sets; wins over everything."
    )


class LowRank(Adapter):
    """Kinds made of thin matrices, with a scale of alpha / rank."""

    groups: list[LoraGroup] = Field([], description="Modules with their own rank, alpha or learning rate.")
    rank: int = Field(16, ge=1, le=4096, description="Rank of linear layers.")
    alpha: float | None = Field(
        None,
        gt=0,
        le=65536,
        description="Scale is alpha / rank; alpha = rank if absent, which is a scale of 1.",
    )
    conv_rank: int | None = Field(
        None, ge=1, le=4096, description="Rank of convolutions larger than 1x1; the linear rank if absent."
    )
    conv_alpha: float | None = Field(
        None, gt=0, le=65536, description="Alpha of those; `conv_rank` if absent."
    )
    rs_scaling: bool = Field(
        False,
        description="Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732): an alpha that suits one rank suits all.",
    )
    tucker: bool = Field(
        False,
        description="Convolutions larger than 1x1 in Tucker form: thin matrices and a core of rank x rank.",
    )

    @model_validator(mode="after")
    def scaling_needs_alpha(self) -> Self:
        if self.rs_scaling and self.alpha is None:
            raise ValueError("rs_scaling scales by alpha / sqrt(rank), so alpha must be set")
        return self


class Lora(LowRank):
    """Low-rank adapter (arXiv 2106.09685): W + alpha / rank * B A."""

    kind: Literal["lora"] = Field("lora", description="Which kind of adapter.")
    dora: bool = Field(
        False,
        description="Train the lengths of the weight's rows apart from their directions (DoRA, arXiv 2402.09353).",
    )
    start: Literal["zero", "pissa", "olora"] = Field(
        "zero",
        description="What the matrices begin with: B zero, or the main part of the base weight by its singular values "
        "(pissa) or its QR decomposition (olora). The base stays as it is; files are of twice the rank.",
    )
    b_learning_rate_ratio: float = Field(
        1.0, gt=0, le=1024, description="Learning rate of B over that of A (LoRA+, arXiv 2402.12354)."
    )

    @model_validator(mode="after")
    def one_form(self) -> Self:
        if self.tucker and self.start != "zero":
            raise ValueError(f"tucker has no start but zero; got start: {self.start}")
        return self


class Loha(LowRank):
    """Two low-rank products, multiplied entry by entry (FedPara, arXiv 2108.06098): a higher rank for the same size."""

    kind: Literal["loha"]
    rank: int = Field(
        8, ge=1, le=512, description="Rank of both products; the adapter's is up to its square."
    )


class Lokr(Adapter):
    """A Kronecker product of a small and a larger matrix (LyCORIS, arXiv 2309.14859): small files, full rank."""

    kind: Literal["lokr"]
    groups: list[LoraGroup] = Field([], description="Modules with their own rank, alpha or learning rate.")
    factor: int = Field(
        8,
        ge=-1,
        le=4096,
        description="Rows and columns of the small matrix; -1 makes both about equally large.",
    )
    full_rank: bool = Field(
        True, description="Keep the larger matrix whole instead of two thin ones of `rank`."
    )
    rank: int = Field(16, ge=1, le=4096, description="Rank of the thin matrices, where there are any.")
    alpha: float | None = Field(
        None, gt=0, le=65536, description="Scale of thin matrices is alpha / rank; 1 if absent."
    )
    decompose_both: bool = Field(
        False, description="Thin matrices for the small one as well, where it is large enough."
    )
    tucker: bool = Field(
        False, description="Thin matrices of convolutions larger than 1x1 in Tucker form, with a core."
    )
    dora: bool = Field(
        False,
        description="Train the lengths of the weight's rows apart from their directions (DoRA, arXiv 2402.09353).",
    )

    @model_validator(mode="after")
    def options_must_have_effect(self) -> Self:
        if self.factor == 0:
            raise ValueError("factor must be -1 or at least 1; got 0")
        thin = [name for name in ("decompose_both", "tucker") if getattr(self, name)]
        if self.full_rank and (thin or self.alpha is not None):
            raise ValueError(
                f"{thin[0] if thin else 'alpha'} has no effect with full_rank; set full_rank: false"
            )
        return self


class Turning(Adapter):
    """Kinds that turn a layer's outputs in blocks."""

    block_size: int = Field(
        32,
        ge=2,
        le=256,
        description="Outputs that are turned together; the largest divisor of a layer's width up to it.",
    )
    groups: list[RateGroup] = Field([], description="Modules with their own learning rate.")


class Oft(Turning):
    """Orthogonal fine-tuning (arXiv 2306.07280): outputs are turned in blocks, so that what the model knows keeps its
    angles; steady, and slow to overfit."""

    kind: Literal["oft"]


class Boft(Turning):
    """Butterfly orthogonal fine-tuning (arXiv 2311.06243): turns in several stages, each with other partners."""

    kind: Literal["boft"]
    block_size: int = Field(16, ge=2, le=256, description="Largest block, an even number.")
    stages: int | None = Field(
        None, ge=1, le=16, description="How many; as many as let every output move every other if absent."
    )


class WeightGroup(Section):
    """Weights that get their own learning rate; the first group that matches wins."""

    match: list[str] = Field(min_length=1, description="Patterns over names of modules or weights.")
    learning_rate: float = Field(gt=0, le=10, description="Instead of the optimizer's rate.")


class Full(Section):
    """Full fine-tuning: the denoiser's own weights train, in the number type of `train.precision`."""

    kind: Literal["full"]
    targets: str | None = Field(
        None,
        description="Named set of modules whose weights train: attention, attention+mlp or all (of the blocks). "
        "Without it and without `include`, every weight does.",
    )
    include: list[str] = Field(
        [],
        description="Patterns of modules or weights to train, beside those of `targets`: `*norm*`, `blocks.7`.",
    )
    exclude: list[str] = Field(
        [], description="Patterns of modules or weights to leave as they are; wins over everything."
    )
    groups: list[WeightGroup] = Field([], description="Weights with their own learning rate.")
    text_encoders: WholeTextEncoders | None = Field(
        None,
        description="Train CLIP text encoders as well; they then stay in memory and read captions in each step.",
    )


class TextualInversion(Word):
    """A new word (arXiv 2208.01618): only its vectors in the text encoders train; the model stays as it is."""

    kind: Literal["textual_inversion"]


class Vae(Section):
    """The VAE between pictures and latents: its decoder learns to show what the encoder kept, with float32 weights."""

    kind: Literal["vae"]
    encoder: bool = Field(
        False,
        description="Train the encoder, too. Latents change with it, and no denoiser fits them until it is trained on "
        "them.",
    )
    crop: int | None = Field(
        256,
        ge=64,
        le=4096,
        multiple_of=8,
        description="Side of the square that is cut from each picture in each step, at chance; null takes all of it.",
    )
    mse: float = Field(1.0, ge=0, le=1000, description="Weight of the squared error of pixels.")
    l1: float = Field(0.0, ge=0, le=1000, description="Weight of their absolute error.")
    edges: float = Field(
        0.1,
        ge=0,
        le=1000,
        description="Weight of the absolute error of what stands out from its surroundings, at four scales: sharpness.",
    )
    kl: float = Field(
        1e-6,
        ge=0,
        le=1,
        description="Of a trained encoder: weight of how far latents are from a normal distribution (as in arXiv "
        "2112.10752).",
    )

    @model_validator(mode="after")
    def something_is_learned(self) -> Self:
        if not (self.mse or self.l1 or self.edges):
            raise ValueError("mse, l1 and edges are all 0; give one of them a weight")
        return self


AdapterMethod = Lora | Loha | Lokr | Oft | Boft
AnyMethod = Annotated[
    Lora | Loha | Lokr | Oft | Boft | Full | TextualInversion | Vae,
    Field(discriminator="kind"),
    default_kind("lora"),
]


def word_of(method: AnyMethod) -> Word | None:
    """The new word that trains, alone or with adapters."""
    if isinstance(method, TextualInversion):
        return method
    return None if isinstance(method, Full | Vae) else method.word


def trains_whole_text(method: AnyMethod) -> bool:
    """Whether text encoders' own weights train."""
    return isinstance(method, Full) and method.text_encoders is not None


def trains_text(method: AnyMethod) -> bool:
    """Whether anything of the text encoders trains, so that captions are encoded in each step."""
    return word_of(method) is not None or (
        isinstance(method, Adapter | Full) and method.text_encoders is not None
    )
