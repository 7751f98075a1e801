"""How often the 95 % intervals hold the truth, and how often a verdict sees harm where nothing changed: by simulation.

The bounds are 93 and 97 %, for coverage averaged over true values: counts are discrete, so at a single true share it
can lie outside (Agresti and Coull, Approximate is better than "exact" for interval estimation of binomial proportions,
1998). The worst of the true values has a bound of its own.

The formulas were chosen with other seeds, and those of measured means on normal, beta, gamma and exponential values
(Student's t alone covered 92 % of these at 8 images, Hall's 94 %). Here they are confirmed on other distributions and
on the changes of real images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import fdu
from fdu.comparison.front import Judged
from fdu.evaluation.drawing import Draws
from fdu.evaluation.intervals import (
    Average,
    Interval,
    difference_interval,
    lowest_interval,
    mean_interval,
    share_interval,
    wilson,
)
from fdu.evaluation.verdict import judge

IMAGES = (8, 32, 128)
SHARES = np.linspace(0.04, 0.96, 24)
Generator = np.random.Generator


def covered(intervals: Iterable[Interval], truth: float) -> float:
    """The share of intervals that hold the truth, but for rounding."""
    return float(np.mean([low - 1e-9 <= truth <= high + 1e-9 for low, high in intervals]))


def chances(generator: Generator, repeats: int, classes: int, images: int, shared: float) -> np.ndarray:
    """Uniform numbers [repeats, classes, images]; ``shared`` is the correlation of images that began as one noise."""
    own, common = (generator.standard_normal((repeats, count, images)) for count in (classes, 1))
    return stats.norm.cdf(np.sqrt(1 - shared) * own + np.sqrt(shared) * common)


def mean_of_shares(generator: Generator, classes: int, images: int, repeats: int, tops: np.ndarray) -> list[float]:
    """The coverage at each true mean: of classes that are alike and that differ, with and without a common noise."""
    found = []
    for top, shared, spread in product(tops, (0, 0.4), (0, 0.6)):
        shares = np.linspace(max(top - spread, 0.02), top, classes)
        seen = (chances(generator, repeats, classes, images, shared) < shares[:, None]).astype(float)
        found.append(covered([share_interval(Average.of_means(list(one))) for one in seen], shares.mean()))
    return found


def test_eight_images_are_enough_for_intervals_that_hold_the_truth() -> None:
    """Percentiles of a bootstrap of 8 images cover 87 % of means over classes and 85 % of measured means."""
    generator = np.random.default_rng(10)
    assert np.mean(mean_of_shares(generator, 10, 8, 40, SHARES[::4])) > 0.93
    values = generator.gamma(2, size=(1500, 8))
    assert covered([mean_interval(Average.of_means([one])) for one in values], 2.0) > 0.92


@pytest.mark.slow
@pytest.mark.parametrize("images", IMAGES)
def test_one_share(images: int) -> None:
    """Exact: over all counts, for 2,000 true shares."""
    true = (np.arange(2000) + 0.5) / 2000
    low, high = np.array([wilson(count / images, images) for count in range(images + 1)]).T[..., None]
    chance = stats.binom.pmf(np.arange(images + 1)[:, None], images, true)
    coverage = (chance * ((low <= true) & (true <= high))).sum(0)
    assert 0.945 < coverage.mean() < 0.96
    assert coverage.min() > 0.83  # at one edge, a share of 0.13 / images


@pytest.mark.slow
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("classes", [2, 10])
def test_a_mean_over_classes(images: int, classes: int) -> None:
    found = mean_of_shares(np.random.default_rng(11), classes, images, 60, SHARES)
    assert 0.93 < np.mean(found) < 0.97
    assert min(found) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("images", IMAGES)
def test_a_share_of_what_is_asked(images: int) -> None:
    """Every second prompt of two probes asks for two things, found together in two of three images."""
    generator, found = np.random.default_rng(12), []
    asked = [2.0 * (np.arange(images) % 2)] * 2
    for share in SHARES:
        luck = generator.random((120, 2, 2, images))
        luck[:, 1] = np.where(generator.random((120, 2, images)) < 2 / 3, luck[:, 0], luck[:, 1])
        hits = (luck < share).sum(1) * np.array(asked) / 2
        found.append(covered([share_interval(Average.of_ratio(list(one), asked)) for one in hits], share))
    assert 0.93 < np.mean(found) < 0.97
    assert min(found) > 0.8


def differences(generator: Generator, classes: int, images: int, pairs: Iterable[tuple[float, float]]) -> list[float]:
    """The coverage for each pair of true shares: images before and after are fresh, or 5 or 8 in 10 keep their luck."""
    found = []
    for (first, last), kept in product(pairs, (0, 0.5, 0.8)):
        luck = [chances(generator, 60, classes, images, 0.4 if classes > 1 else 0) for _ in range(2)]
        luck[1] = np.where(generator.random(luck[1].shape) < kept, *luck)
        before, after = ((one < share).astype(float) for one, share in zip(luck, (first, last), strict=True))
        apart = (Average.of_means(list(b)) - Average.of_means(list(a)) for a, b in zip(before, after, strict=True))
        found.append(covered(map(difference_interval, apart), last - first))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("classes", [1, 10])
def test_a_difference_of_shares(images: int, classes: int) -> None:
    """Of one class that nearly all of 8 images show, 99 % are covered: where none changes, a shorter interval would
    miss a drop of 20 points in 1 of 6 evaluations."""
    generator = np.random.default_rng(13)
    found = differences(generator, classes, images, product(SHARES[::4], SHARES[1::4]))
    assert 0.93 < np.mean(found) < 0.97
    assert min(found) > 0.75
    near = differences(generator, classes, images, [(first, first - 0.1) for first in (0.85, 0.92, 0.97, 0.99)])
    assert np.mean(near) > 0.92


MEASURED: dict[str, tuple[Callable[[Generator, tuple[int, ...]], np.ndarray], float]] = {
    "lognormal": (lambda generator, shape: generator.lognormal(0, 0.5, shape), np.exp(0.125)),
    "more skewed": (lambda generator, shape: generator.lognormal(0, 0.8, shape), np.exp(0.32)),
    "two humps": (
        lambda generator, shape: 3 * (generator.random(shape) < 0.5) + 0.5 * generator.normal(size=shape),
        1.5,
    ),
    "uneven humps": (
        lambda generator, shape: 3 * (generator.random(shape) < 0.2) + 0.5 * generator.normal(size=shape),
        0.6,
    ),
    "uniform": (lambda generator, shape: generator.random(shape), 0.5),
}
"""Distributions of measured values, with their means."""


@pytest.mark.slow
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("classes", [1, 10])
def test_a_mean_of_measured_values(images: int, classes: int) -> None:
    """The worst is one class of 8 images with a rare second hump: where none of them shows it, nothing tells of it."""
    generator, found = np.random.default_rng(14), {}
    for name, (values, truth) in MEASURED.items():
        drawn = values(generator, (600, classes, images))
        found[name] = covered([mean_interval(Average.of_means(list(one))) for one in drawn], truth)
    assert 0.93 < np.mean(list(found.values())) < 0.97, found
    assert min(found.values()) > (0.84 if images == 8 else 0.91), found


@pytest.mark.slow
@pytest.mark.parametrize("images", IMAGES)
def test_a_difference_of_measured_values(images: int) -> None:
    generator, found = np.random.default_rng(15), []
    for values, _ in MEASURED.values():
        before, fresh = (values(generator, (500, 3, images)) for _ in range(2))
        after = 0.5 * before + 0.5 * fresh
        apart = (Average.of_means(list(b)) - Average.of_means(list(a)) for a, b in zip(before, after, strict=True))
        found.append(covered(map(mean_interval, apart), 0.0))
    assert 0.93 < np.mean(found) < 0.97 and min(found) > 0.92, found


@pytest.mark.slow
@pytest.mark.parametrize("images", IMAGES)
def test_changes_of_real_images(images: int) -> None:
    """The pixel changes of the targets' images in the records of experiments/: images drawn from each record's 40 or
    96, whose mean is the truth. The median of their skewness is 0.6. Where one image in ten holds most of the change,
    as in classes that an erasure hardly touches, 8 images cover less: there 77 to 92 %."""
    records = Path(__file__).parents[2] / "experiments" / "results" / "study.jsonl"
    generator, found = np.random.default_rng(16), []
    values = [
        np.array(judged.change)
        for line in records.read_text().splitlines()
        for judged in map(Judged.from_dict, json.loads(line).get("judged", ()))
        if judged.role == "target" and judged.change and np.std(judged.change)
    ]
    for one in values[::10]:
        drawn = generator.choice(one, (60, images))
        found.append(covered([mean_interval(Average.of_means([own])) for own in drawn], one.mean()))
    assert len(found) > 50
    assert 0.93 < np.mean(found) < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("images", IMAGES)
def test_the_lowest_of_classes(images: int) -> None:
    """Of equal classes, of one that is far lower, and of classes spread out, from 1 to 30. An interval that holds for
    all of these is too wide for some: it covers 99 % of classes spread out. The interval of the class alone covers 40 %
    of 30 equal classes."""
    generator, found = np.random.default_rng(17), {}
    for classes in (1, 2, 4, 10, 30):
        shapes = {"equal": np.zeros(classes), "one": np.eye(classes)[0] * 0.35, "spread": np.linspace(0.25, 0, classes)}
        for shape, below in shapes.items():
            held = []
            for top in np.linspace(0.5, 0.98, 13):
                hits = generator.binomial(images, top - below, (60, classes))
                held.append(
                    covered([lowest_interval(one.tolist(), [images] * classes) for one in hits], min(top - below))
                )
            found[classes, shape] = float(np.mean(held))
    assert 0.93 < np.mean(list(found.values())) < 0.97, found
    assert min(found.values()) > 0.92, found


RETAINED = 8
LOOKS = [(images, share) for images in IMAGES for share in (0.7, 0.9, 0.98)]


def alarms(images: int, share: float, repeats: int) -> float:
    """The share of verdicts of certain harm where the target goes away and all others are drawn as before: with fresh
    noise, and where half of the images are the same."""

    def named(name: str) -> Callable[[Tensor], list[str]]:
        return lambda pictures: [name if one > 0.5 else "other" for one in pictures[:, 0, 0, 0].tolist()]

    def drawn(seen: np.ndarray) -> Draws:
        return Draws(
            [torch.from_numpy(one.astype(np.float32))[:, None, None, None].expand(-1, 3, 1, 1) for one in seen]
        )

    names = [f"class {place}" for place in range(RETAINED)]
    probes = [fdu.Probe("fox", ("a fox",), "target", named("fox"))]
    probes += [
        fdu.Probe(name, ("a",), "retained", named(name), ("near", "generic")[place % 2])
        for place, name in enumerate(names)
    ]
    generator, found = np.random.default_rng(19), []
    for repeat in range(repeats):
        before, after = (generator.random((1 + RETAINED, images)) < share for _ in range(2))
        if repeat % 2:
            after[:, ::2] = before[:, ::2]
        before[0], after[0] = True, False
        verdict = judge(fdu.evaluate(drawn(before), drawn(after), probes), probes)
        found.append(not verdict.kept)
    return float(np.mean(found))


def test_thirty_two_images_where_nothing_changed_seldom_show_harm() -> None:
    """Of the drops of eight classes, each beyond its own 95 % interval counted as harm in 1 of 5 verdicts."""
    assert alarms(32, 0.7, 100) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("images", "share"), LOOKS)
def test_no_verdict_of_harm_where_nothing_changed(images: int, share: float) -> None:
    assert alarms(images, share, 400) <= 0.05
