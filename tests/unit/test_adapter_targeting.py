"""Which modules get an adapter, and with what."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import ModuleChoice, adaptable_modules
from burnish.adapters.targeting import choose_modules
from burnish.config.method import Lora, LoraGroup
from burnish.errors import AdapterError
from burnish.family import TargetSet

TARGETS = {
    "attention": TargetSet(("*.attn.to_[qkv]",), "Attention."),
    "attention+mlp": TargetSet(("*.attn.to_[qkv]", "*.ff.*"), "Attention and feed-forward."),
    "all": TargetSet(("blocks.*",), "All."),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.ff = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 4)


def choose(**options: object) -> dict[str, ModuleChoice]:
    method = Lora(**options)  # type: ignore[arg-type]
    chosen = choose_modules(Denoiser(), TARGETS, "attention", method)
    assert all(choice.method is method for choice in chosen.values())
    return {name: replace(choice, method=Lora()) for name, choice in chosen.items()}


def test_the_family_s_set_is_the_default_and_order_is_that_of_the_model() -> None:
    chosen = choose(rank=4)
    assert list(chosen) == [f"blocks.{block}.attn.to_{letter}" for block in (0, 1) for letter in "qkv"]
    assert set(chosen.values()) == {ModuleChoice(4, 4.0, None)}


def test_include_adds_and_exclude_wins() -> None:
    chosen = choose(rank=4, include=["head", "blocks.1.ff.*"], exclude=["*.to_k", "blocks.1.ff.2"])
    assert list(chosen) == [
        "blocks.0.attn.to_q",
        "blocks.0.attn.to_v",
        "blocks.1.attn.to_q",
        "blocks.1.attn.to_v",
        "blocks.1.ff.0",
        "head",
    ]


def test_excluding_what_takes_no_adapter_is_fine() -> None:
    assert choose(rank=4, exclude=["*norm"]) == choose(rank=4)


def test_only_linear_and_ungrouped_convolutions_are_chosen() -> None:
    chosen = choose(rank=4, targets="all")
    assert len(chosen) == 2 * (3 + 2 + 2)
    assert not any("norm" in name or "depthwise" in name for name in chosen)


def test_large_kernels_take_the_convolution_rank() -> None:
    chosen = choose(rank=8, alpha=2, conv_rank=3, targets="all")
    assert chosen["blocks.0.conv"] == ModuleChoice(3, 3.0)
    assert chosen["blocks.0.shortcut"] == ModuleChoice(8, 2.0)
    assert choose(rank=8, alpha=2, conv_rank=3, conv_alpha=1.5, targets="all")["blocks.0.conv"].alpha == 1.5
    assert choose(rank=8, alpha=2, targets="all")["blocks.0.conv"] == ModuleChoice(8, 2.0)


def test_the_first_group_that_matches_wins() -> None:
    chosen = choose(
        rank=4,
        groups=[
            LoraGroup(match=["blocks.0.*.to_q"], rank=2, learning_rate=0.5),
            LoraGroup(match=["*.to_q", "*.to_k"], alpha=9),
        ],
    )
    assert chosen["blocks.0.attn.to_q"] == ModuleChoice(2, 2.0, 0.5)
    assert chosen["blocks.1.attn.to_q"] == ModuleChoice(4, 9.0, None)
    assert chosen["blocks.1.attn.to_v"] == ModuleChoice(4, 4.0, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": "atention"}, "Did you mean 'attention'"),
        ({"include": ["to_q"]}, "*to_q"),
        ({"exclude": ["*.attn.to_w"]}, "method.exclude"),
        ({"include": ["*.norm"]}, "LayerNorm"),
        ({"include": ["*depthwise"]}, "Conv2d"),
        ({"groups": [LoraGroup(match=["head"], rank=2)]}, "not trained"),
        ({"exclude": ["*"]}, "no module is left"),
        ({"include": ["head"], "rank": 8}, "head (rank 8, at most 4)"),
    ],
)
def test_what_has_no_effect_is_an_error_that_says_what_to_do(
    options: dict[str, object], expected: str
) -> None:
    with pytest.raises(AdapterError) as caught:
        choose(**{"rank": 4, **options})
    assert expected in str(caught.value)
    assert caught.value.remedy


def test_the_largest_rank_counts_the_whole_kernel() -> None:
    assert choose(rank=16, targets="all")["blocks.0.conv"].rank == 16
    with pytest.raises(AdapterError, match=r"at most 16"):
        choose(rank=17, targets="all")


def test_names_do_not_change_when_adapters_are_attached() -> None:
    denoiser = Denoiser()
    before = list(adaptable_modules(denoiser))
    AdapterSet.attach(denoiser, {"head": ModuleChoice(2, 2.0)}, dropout=0.0, seed=0)
    assert list(adaptable_modules(denoiser)) == before
    assert "head" in choose_modules(denoiser, TARGETS, "attention", Lora(rank=2, include=["head"]))


class Streams(nn.Module):
    """Two kinds of blocks, as in FLUX.1."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block()])
        self.single_transformer_blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 4)


def test_sets_that_follow_from_the_family_s_own() -> None:
    mlp = [f"blocks.{block}.ff.{layer}" for block in (0, 1) for layer in (0, 2)]
    assert list(choose(targets="mlp")) == mlp
    assert list(choose(targets="blocks")) == list(choose(targets="all"))
    with pytest.raises(AdapterError, match=r"no target set is called 'attention_out'\n.*'attention'"):
        choose(targets="attention_out")
    assert set(choose(include=["mlp"])) == {*choose(), *mlp}
    assert list(choose(targets="attention+mlp", exclude=["attention"])) == mlp


def test_blocks_of_one_stream_and_of_two() -> None:
    def names(**options: object) -> set[str]:
        return {
            name.split(".")[0] for name in choose_modules(Streams(), TARGETS, "attention", Lora(**options))
        }  # type: ignore[arg-type]

    assert (
        names(targets="single-blocks")
        == names(targets="single_transformer_blocks")
        == {"single_transformer_blocks"}
    )
    assert names(targets="double-blocks") == {"transformer_blocks"}
    assert names(exclude=["single-blocks"]) == {"transformer_blocks"}


def test_a_set_has_its_own_rank_alpha_and_rate() -> None:
    groups = [LoraGroup(match=["mlp"], rank=2, alpha=4.0, learning_rate=1e-5)]
    chosen = choose(targets="attention+mlp", groups=groups)
    for name, choice in chosen.items():
        expected = (2, 4.0, 1e-5) if ".ff." in name else (16, 16.0, None)
        assert (choice.rank, choice.alpha, choice.learning_rate) == expected
    with pytest.raises(AdapterError, match="the set 'mlp' has none of the modules that are trained"):
        choose(groups=groups)
