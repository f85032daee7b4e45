"""Did you mean: near names, and the section that a misplaced key belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from burnish.config.section import Section
from burnish.config.shape import all_sections

NEAR = 0.8  # so near that the same section is meant whatever else has the name
FAR = 0.55  # one letter of four wrong

# What other trainers call it.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "unet_lr": "learning_rate",
    "dim": "rank",
    "network_dim": "rank",
    "linear": "rank",
    "linear_alpha": "alpha",
    "network_alpha": "alpha",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "conv_dim": "conv_rank",
    "network_dropout": "dropout",
    "lora_dropout": "dropout",
    "use_dora": "dora",
    "dora_wd": "dora",
    "weight_decompose": "dora",
    "use_rslora": "rs_scaling",
    "rs_lora": "rs_scaling",
    "loraplus_lr_ratio": "b_learning_rate_ratio",
    "loraplus_unet_lr_ratio": "b_learning_rate_ratio",
    "init_lora_weights": "start",
    "use_tucker": "tucker",
    "use_cp": "tucker",
    "lokr_factor": "factor",
    "decompose_factor": "factor",
    "lokr_full_rank": "full_rank",
    "full_matrix": "full_rank",
    "only_if_contains": "include",
    "target_modules": "include",
    "ignore_if_contains": "exclude",
    "assistant_lora_path": "training_adapter",
    "base_weights": "base_adapter",
    "ema_decay": "decay",
    "sigma_rel": "width",
    "max_train_steps": "steps",
    "gradient_accumulation": "accumulate",
    "gradient_accumulation_steps": "accumulate",
    "gradient_checkpointing": "activations",
    "checkpointing": "activations",
    "resolution": "resolutions",
    "num_repeats": "repeats",
    "trigger_word": "trigger",
    "folder_path": "path",
    "name_or_path": "path",
    "caption_ext": "extension",
    "caption_extension": "extension",
    "caption_dropout_rate": "dropout",
    "output_dir": "folder",
    "save_every": "every",
    "sample_every": "every",
    "keep_tokens": "keep_tags",
    "shuffle_caption": "shuffle_tags",
    "neg": "negative",
    "guidance_scale": "guidance",
    "sample_steps": "steps",
    "mixed_precision": "precision",
    "lr_warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_share",
    "num_cycles": "cycles",
    "lr_scheduler_num_cycles": "cycles",
    "lr_scheduler_power": "power",
    "min_lr_ratio": "end_factor",
    "class": "class_path",
    "optimizer_args": "arguments",
    "optimizer_kwargs": "arguments",
    "stochastic_rounding": "rounding",
    "use_kahan_summation": "rounding",
    "min_snr_gamma": "weighting",
    "snr_gamma": "weighting",
    "loss_type": "loss",
    "multires_noise_iterations": "multires",
    "ip_noise_gamma": "input_perturbation",
    "timestep_bias_strategy": "emphasis",
    "debiased_estimation_loss": "weighting",
    "huber_c": "delta",
    "masked_loss": "loss_masks",
    "alpha_mask": "loss_masks",
    "mask_path": "loss_masks",
    "diff_output_preservation": "preserve",
    "text_encoder_lr": "text_encoders",
    "text_encoder_lr1": "text_encoders",
    "text_encoder_lr2": "text_encoders",
    "te_lr": "text_encoders",
    "train_text_encoder": "text_encoders",
    "network_train_text_encoder": "text_encoders",
    "target_class": "target",
    "positive_prompt": "positive",
    "negative_prompt": "negative",
    "unconditional": "negative",
    "guidance_strength": "guidance",
    "attributes": "preserve",
    "concept_slider": "slider",
    "dpo": "preference",
    "beta_dpo": "beta",
    "dpo_beta": "beta",
    "loser": "rejected",
    "do_guidance_loss": "guided_target",
    "guidance_loss_target": "guided_target",
    "class_prompt": "prompts",
    "class_data_dir": "path",
    "num_class_images": "count",
    "prior_loss_weight": "weight",
    "instance_data_dir": "path",
    "instance_prompt": "default",
    "is_reg": "role",
    "placeholder_token": "token",
    "placeholder": "token",
    "token_string": "token",
    "initializer_token": "initial",
    "init_word": "initial",
    "initial_embedding_text": "initial",
    "num_vectors": "vectors",
    "num_vectors_per_token": "vectors",
    "token_count": "vectors",
}


def nearest(word: str, choices: Iterable[str], cutoff: float = FAR) -> str | None:
    """The choice most like `word`, or None where nothing is; case, `-` and spaces do not count."""
    best = max(
        ((likeness(word, choice), choice) for choice in choices), default=(0.0, ""), key=lambda pair: pair[0]
    )
    return best[1] if best[0] >= cutoff else None


def likeness(word: str, choice: str) -> float:
    """0 for nothing in common, 1 for the same.

    difflib's ratio counts a swap of neighbours as a loss of one letter, so the letters sorted are compared as
    well, at a discount: `esp` is as near to `eps` as one wrong letter would be.
    """
    word, choice = _plain(word), _plain(choice)
    if word == choice:
        return 1.0
    in_order = SequenceMatcher(None, word, choice, autojunk=False).ratio()
    reversed_too = SequenceMatcher(None, choice, word, autojunk=False).ratio()
    shuffled = SequenceMatcher(None, sorted(word), sorted(choice), autojunk=False).ratio()
    return max(in_order, reversed_too, 0.9 * shuffled if word[:1] == choice[:1] or len(word) < 5 else 0.0)


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")


def called_elsewhere(key: str) -> str:
    """Our name for what another trainer calls `key`; `key` itself where none does."""
    return _OTHER_NAMES.get(_plain(key), key)


def unknown_key_hint(key: str, own_keys: Sequence[str], root: type[Section], prefix: str) -> str:
    """What the user may have meant by `key` in the section at `prefix`, or the keys that section has."""
    other_name = _OTHER_NAMES.get(_plain(key), "")
    own = nearest(key, own_keys)
    if other_name in own_keys:
        return f"no such option; did you mean {other_name}?"
    if own and likeness(key, own) >= NEAR:
        return f"no such option; did you mean {own}?"
    for name in (key, other_name):
        homes = _homes(name, root, prefix)
        if homes:
            return f"no such option here; {name} belongs to {_either(homes)}"
    if own:
        return f"no such option; did you mean {own}?"
    everywhere = {name for place in all_sections(root) for name in place.section.model_fields} - {"kind"}
    elsewhere = nearest(key, everywhere, NEAR)
    if elsewhere:
        return f"no such option here; did you mean {elsewhere} of {_either(_homes(elsewhere, root, prefix))}?"
    where = f"`{prefix}`" if prefix else "the top level"
    return f"no such option; {where} has {', '.join(own_keys)}"


def _homes(key: str, root: type[Section], prefix: str) -> list[str]:
    """Where `key` is an option, beginning with what is nearest to the section at `prefix`."""
    places = [
        place for place in all_sections(root) if key and key != "kind" and key in place.section.model_fields
    ]
    places.sort(key=lambda place: -_common(place.prefix, prefix))
    return list(dict.fromkeys(f"`{place.prefix}`" if place.prefix else "the top level" for place in places))


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _common(one: str, other: str) -> int:
    """How many sections two prefixes share, from the top."""
    pairs = list(zip(one.rstrip(".").split("."), other.rstrip(".").split("."), strict=False))
    return next((index for index, (left, right) in enumerate(pairs) if left != right), len(pairs))
