"""Evaluation: the counting, the same seeds before and after, and the refusals."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import fdu
from fdu.evaluation import Draws, Probe
from fdu.evaluation.robustness.judging import JudgedSampling, count
from fdu.models.families import denoiser_of


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
    retained = pytest.approx(0.25)
    assert result.change == {"target": 0.75, "unseen": pytest.approx(1.75), "retained": retained, "near": retained}
    assert result.difference["retained_accuracy"] == -0.25 and result.difference["per_class.cat"] == -0.75
    assert result.unlearn_canvas == {"UA": 0.75, "IRA": 0.75}
    assert result.distances == {} and result.features == ""
    assert result.images_per_class == 4


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """Every number in nested dicts, by its name with dots."""
    if isinstance(value, dict):
        return {key: one for part in value for key, one in numbers(value[part], f"{name}.{part}".strip(".")).items()}
    return {name: value} if isinstance(value, float) else {}


def test_every_figure_has_an_interval_that_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = [torch.randint(0, 3, (12,), generator=generator).tolist() for _ in range(8)]
    before, after = (Draws([image_of(*one).clone() for one in side]) for side in (classes[:4], classes[4:]))
    module = torch.nn.Flatten()
    found = fdu.evaluate(before, after, PROBES, module).as_dict()
    sides = [found.pop("before"), found.pop("after")]
    for part in (*sides, found):
        intervals = part.pop("intervals")
        figures = numbers(part)
        assert set(figures) == set(intervals)
        for name, value in figures.items():
            low, high = intervals[name]
            # KID and CMMD scatter around their estimates, from which the resamples may lie off a little.
            slack = 0.1 * abs(value) if "kid" in name or "cmmd" in name else 1e-9
            assert low - slack <= value <= high + slack, name
    assert json.loads(json.dumps(found)) and set(found["distances"]) == {"kid", "cmmd", "perceptual"}
    again = fdu.evaluate(before, after, PROBES, module).as_dict()
    assert again["intervals"] == intervals


def test_retained_classes_are_told_by_group() -> None:
    probes = [*PROBES[:3], Probe("cow", ("a cow",), "retained", judge, "unrelated")]
    draws = Draws([image_of(0, 0), image_of(0, 0), image_of(1, 0), image_of(2, 2)])
    result = fdu.evaluate(draws, draws, probes)
    assert result.after.retained_by_group == {"near": 0.5, "unrelated": 1.0}
    assert result.after.retained_accuracy == 0.75 and result.unlearn_canvas["IRA"] == 0.5
    assert set(result.change) == {"target", "unseen", "retained", "near", "unrelated"}


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
    with pytest.raises(ValueError, match="exactly one.*role 'target'"):
        fdu.evaluate(draws, draws, PROBES[1:])
    with pytest.raises(ValueError, match="same number of images"):
        fdu.evaluate(draws, Draws(draws.images[:3]), PROBES)
    with pytest.raises(ValueError, match="name.*class 'dog' twice"):
        fdu.evaluate(draws, draws, [*PROBES[:3], PROBES[2]])
    with pytest.raises(ValueError, match="images_per_class.*>= 1, got 0"):
        fdu.draw(pipeline, PROBES, 0)
    with pytest.raises(ValueError, match="probes is empty"):
        fdu.draw(pipeline, [])


def test_none_leaves_a_setting_to_the_pipeline() -> None:
    seen: list[dict[str, Any]] = []

    class Pipeline:
        def set_progress_bar_config(self, **settings: Any) -> None: ...

        def __call__(self, prompts: list[str], **settings: Any) -> Any:
            seen.append(settings)
            return type("Output", (), {"images": torch.zeros(len(prompts), 3, 4, 4)})

    probe = fdu.Probe("a", ("a",), "target", lambda images: ["a"] * len(images))
    fdu.draw(Pipeline(), [probe], 1, num_inference_steps=None, guidance_scale=1.5)  # type: ignore[arg-type]
    assert "num_inference_steps" not in seen[0] and seen[0]["guidance_scale"] == 1.5


def test_the_interval_of_a_class_grows_with_its_share() -> None:
    """At 31 of 32 a bootstrap ends higher than the exact bound at 32 of 32 begins."""
    lows, highs = [], []
    for right in (0, 1, 2, 30, 31, 32):
        target = image_of(*[0] * right, *[1] * (32 - right))
        draws = Draws([target, image_of(0), image_of(1), image_of(2)])
        low, high = fdu.evaluate(draws, draws, PROBES).after.intervals["per_class.cat"]
        lows.append(low)
        highs.append(high)
    assert lows == sorted(set(lows)) and highs == sorted(set(highs))


def test_one_image_a_class_tells_nothing_of_how_images_scatter() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(images: int) -> Draws:
        return Draws([torch.rand(images, 3, 2, 2, generator=generator) for _ in PROBES])

    module = torch.nn.Flatten()
    one, two, three = (fdu.evaluate(drawn(images), drawn(images), PROBES, module) for images in (1, 2, 3))
    assert one.change["target"] > 0
    assert not {name for name in one.intervals if name.startswith(("change", "distances"))}
    assert "change.target" in two.intervals and "distances.perceptual.target" in two.intervals
    assert not one.distances["kid"] and {"target", "retained"} <= two.distances["kid"].keys()
    assert not {name for name in two.intervals if name.startswith("distances.kid")}
    assert {"distances.kid.target", "distances.kid.retained"} <= three.intervals.keys()


def test_a_class_without_prompts_is_refused(pipeline: StableDiffusionPipeline) -> None:
    probes = [*PROBES[:3], Probe("cow", (), "retained", judge)]
    draws = Draws([image_of(0), image_of(0), image_of(1), image_of(2)])
    for call in (lambda: fdu.evaluate(draws, draws, probes), lambda: fdu.draw(pipeline, probes)):
        with pytest.raises(ValueError, match="the class 'cow'.*no prompts"):
            call()


def test_a_safety_checker_blackens_nothing(pipeline: StableDiffusionPipeline) -> None:
    def blackens(images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
        return images * 0, [True] * len(images)

    def extractor(images: Any, return_tensors: str) -> Any:
        return SimpleNamespace(to=lambda device: SimpleNamespace(pixel_values=torch.zeros(1)))

    config = dict(pipeline.config)
    vars(pipeline).update(safety_checker=blackens, feature_extractor=extractor)
    probe = Probe("three", ("three",), "target", judge)
    assert pipeline(["three"], num_inference_steps=1, output_type="pt").nsfw_content_detected == [True]
    images = fdu.draw(pipeline, [probe], 2, num_inference_steps=1).images[0]
    assert all(image.std() > 0.01 for image in images)
    seen: list[float] = []
    looking = dataclasses.replace(
        probe, judge=lambda images: (seen.extend(images.flatten(1).std(1).tolist()), ["a"])[1]
    )
    count(denoiser_of(pipeline), looking, JudgedSampling(images=1, num_inference_steps=1))
    assert min(seen) > 0.01
    assert pipeline.safety_checker is blackens and dict(pipeline.config) == config
