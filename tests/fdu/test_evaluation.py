"""Evaluation: the counting, the same seeds before and after, and the refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import fdu
from fdu.evaluation import Draws, Probe


def judge(images: Tensor) -> list[str]:
    """The class is written into the first pixel."""
    return [("cat", "dog", "cow")[int(image[0, 0, 0])] for image in images]


def image_of(*classes: int) -> Tensor:
    return torch.tensor(classes, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)


PROBES = [
    Probe("cat", ("a cat",), "target", judge),
    Probe("cat", ("one cat",), "unseen", judge),
    Probe("dog", ("a dog",), "retained", judge),
    Probe("cow", ("a cow",), "retained", judge),
]


def test_figures_count_what_the_judge_saw() -> None:
    before = Draws([image_of(0, 0, 0, 0), image_of(0, 0, 0, 1), image_of(1, 1, 1, 1), image_of(2, 2, 2, 2)])
    after = Draws([image_of(1, 1, 1, 0), image_of(2, 2, 2, 2), image_of(1, 1, 1, 1), image_of(2, 1, 2, 1)])
    result = fdu.evaluate(before, after, PROBES)
    assert (result.before.target_accuracy, result.before.unseen_accuracy) == (1.0, 0.75)
    assert (result.after.target_accuracy, result.after.unseen_accuracy) == (0.25, 0.0)
    assert result.after.retained_accuracy == 0.75
    assert (result.after.worst_retained_class, result.after.worst_retained_accuracy) == ("cow", 0.5)
    assert result.after.cross_domain_accuracy is None
    assert result.after.per_class == {"cat": 0.25, "dog": 1.0, "cow": 0.5}
    assert result.after.target_became == {"dog": 0.75, "cat": 0.25}
    assert result.change == {"target": 0.75, "unseen": pytest.approx(1.75), "retained": pytest.approx(0.25)}
    assert result.images_per_class == 4


def test_a_pipeline_compared_with_itself_has_not_changed(pipeline: StableDiffusionPipeline) -> None:
    probes = [
        Probe("three", ("three", "the digit three"), "target", lambda images: ["three"] * len(images)),
        Probe("eight", ("eight",), "retained", lambda images: ["eight"] * len(images)),
    ]
    settings: dict[str, Any] = {"images_per_class": 3, "num_inference_steps": 2}
    result = fdu.evaluate(pipeline, pipeline, probes, **settings)
    assert set(result.change.values()) == {0.0}


def test_images_do_not_depend_on_the_batch(pipeline: StableDiffusionPipeline) -> None:
    probes = [Probe("three", ("three", "a three", "the digit three"), "target", judge)]
    whole = fdu.draw(pipeline, probes, 5, num_inference_steps=2, batch_size=5).images[0]
    parts = fdu.draw(pipeline, probes, 5, num_inference_steps=2, batch_size=2).images[0]
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-4)
    assert whole.shape == (5, 3, 32, 32) and 0 <= whole.min() and whole.max() <= 1


def test_what_does_not_belong_together_is_refused(pipeline: StableDiffusionPipeline) -> None:
    draws = Draws([image_of(0), image_of(0), image_of(1), image_of(2)])
    with pytest.raises(ValueError, match="exactly one with role 'target'"):
        fdu.evaluate(draws, draws, PROBES[1:])
    with pytest.raises(ValueError, match="same number of images a probe"):
        fdu.evaluate(draws, Draws(draws.images[:3]), PROBES)
    with pytest.raises(ValueError, match="images_per_class must be >= 1, got 0"):
        fdu.draw(pipeline, PROBES, 0)
    with pytest.raises(ValueError, match="probes is empty"):
        fdu.draw(pipeline, [])
