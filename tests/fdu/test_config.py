"""Settings: each wrong value is refused by its name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import fdu_kernels
from fdu import EraseConfig


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("divergence", "helinger", "squared_hellinger|hellinger"),
        ("divergence", "alpha:0", "reverse_kl"),
        ("sigma", 0.0, "sigma.*> 0.*0.0"),
        ("sigma", float("inf"), "sigma.*> 0"),
        ("sigma", True, "sigma.*> 0"),
        ("adam_beta1", 1.5, "adam_beta1.*< 1.*1.5"),
        ("adam_beta2", -0.1, "adam_beta2.*>= 0"),
        ("preservation_prompts", ("a", 3), "preservation_prompts.*strings"),
        ("sigma", "median", "sigma"),
        ("s0", 0, "s0.*> 0.*0"),
        ("s0", float("nan"), "s0.*finite"),
        ("distance", "max", "distance.*mean, sum.*'max'"),
        ("train_method", "unet", "train_method.*lora, dora, cross_attention"),
        ("rank", 0, "rank.*whole number >= 1.*0"),
        ("max_train_steps", -1, "max_train_steps.*whole number >= 0"),
        ("max_train_steps", 1.5, "max_train_steps.*whole number >= 0"),
        ("train_batch_size", True, "train_batch_size.*whole number >= 1"),
        ("learning_rate", 0.0, "learning_rate.*finite number > 0"),
        ("learning_rate", float("inf"), "learning_rate.*finite number > 0"),
        ("lr_scheduler", "cosin", "lr_scheduler.*constant"),
        ("preservation_weight", -1.0, "preservation_weight.*>= 0"),
        ("preservation_prompts", "a digit", "preservation_prompts.*sequence"),
        ("num_latents", 1, "num_latents.*whole number >= 2"),
        ("mixed_precision", "fp8", "mixed_precision.*no, fp16, bf16"),
        ("seed", "0", "seed.*whole number >= 0"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        EraseConfig(**{name: value})


@pytest.mark.parametrize("typed", ["alpha=0.3", "alpha 0.3", "alpha(0.3)", "alpha0.3", "Alpha:a=0.3", "alpha:=0.3"])
def test_a_parameter_typed_in_another_way_is_a_near_miss(typed: str) -> None:
    with pytest.raises(ValueError, match=r"mean alpha:0\.3\?"):
        EraseConfig(divergence=typed)


@pytest.mark.parametrize("typed", ["kl=0.3", "alpha=1", "alpha=x", "nothing=0.3"])
def test_no_near_miss_is_made_up(typed: str) -> None:
    with pytest.raises(ValueError) as refused:
        EraseConfig(divergence=typed)
    assert "mean" not in str(refused.value)


def test_the_names_that_diffusers_uses_are_kept() -> None:
    shared = {
        "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler",
        "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
        "mixed_precision", "seed", "rank",
    }  # fmt: skip
    assert shared <= {field.name for field in dataclasses.fields(EraseConfig)}


def test_a_divergence_of_the_users_own_is_recorded_by_name() -> None:
    own = fdu_kernels.Divergence.from_generator(lambda u: (u - 1) ** 2, name="mine")
    assert json.loads(json.dumps(EraseConfig(divergence=own).as_dict()))["divergence"] == "mine"
