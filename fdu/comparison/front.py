"""Erased against retained: figures with intervals over seeds and images, and the Pareto front."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdu.comparison.plan import FEWEST_IMAGES, Candidate
from fdu.evaluation.intervals import LEVEL, reach_unseen

RESAMPLES = 2000
"""Of the bootstrap over images."""
DIGITS = 12
"""Decimal places of figures; beyond them is rounding error."""
FIGURES = ("erased", "retained", "change", "attributes", "held")
TARGET_ROLES = ("target", "unseen")
ATTACKED = "attacked"
"""The role of the target's images under an attack."""
FEW_IMAGES = 24
"""Fewer images of a class than this are too few for a bootstrap: of 8 it would cover 90 %."""
UNASKED = "-"
"""In records, the answer for an image whose prompt asks for nothing besides the target."""

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Judged:
    """The judge's view of one probe's images. Every list has one value per image."""

    role: str
    name: str
    hits: tuple[bool, ...]
    """Whether the judge saw the requested class."""
    change: tuple[float, ...] | None = None
    """Mean absolute difference from the same image before the erasure, in pixel range [0, 1]."""
    attributes: dict[str, tuple[bool | None, ...]] = dataclasses.field(default_factory=dict)
    """By attribute, whether the judge found what the target's prompt asks for besides the target; None where it asks
    for nothing. Empty in records of earlier versions, which did not judge it."""

    @property
    def answers(self) -> Array:
        """The attributes as numbers, [attributes, images]; NaN where the prompt asks for nothing."""
        return np.array(list(self.attributes.values()), float).reshape(-1, len(self.hits))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, and short: hits as "0110...", attributes as "01-1...", changes as "0.0123 0.0045 ..."."""
        change = None if self.change is None else " ".join(f"{value:.4f}" for value in self.change)
        found = {"role": self.role, "name": self.name, "hits": _digits(self.hits), "change": change}
        attributes = {name: _digits(answers) for name, answers in self.attributes.items()}
        return {**found, "attributes": attributes} if attributes else found

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Judged:
        """Undo :meth:`as_dict`."""
        change = None if saved["change"] is None else tuple(map(float, saved["change"].split()))
        attributes = {
            name: tuple(None if digit == UNASKED else digit == "1" for digit in answers)
            for name, answers in saved.get("attributes", {}).items()
        }
        return cls(saved["role"], saved["name"], tuple(hit == "1" for hit in saved["hits"]), change, attributes)


def _digits(answers: Sequence[bool | None]) -> str:
    return "".join(UNASKED if answer is None else str(int(answer)) for answer in answers)


Runs = Mapping[tuple[str, Candidate, int], Sequence[Judged]]
"""By target, candidate and seed: the judge's view of every probe, in one order for all runs of a target."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below 0, otherwise 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclasses.dataclass(frozen=True)
class Standing:
    """The figures of a candidate."""

    candidate: Candidate
    erased: Estimate
    """Share of the target's images, in seen and unseen phrasings, that do not show it."""
    retained: Estimate
    """Share of images that show the requested class, averaged over all other classes."""
    change: Estimate
    """Mean absolute change of the other classes' images, in pixel range [0, 1]: harm that the judge may not count."""
    attributes: Estimate
    """Share of what the targets' prompts, seen and unseen, ask for besides the target that the judges find; NaN if they
    ask for nothing, or if the records do not say."""
    held: Estimate
    """Share of the target's images that do not show it under an attack; NaN if there was none."""
    on_front: bool
    """No other candidate both erases and retains more."""
    front_share: float
    """Share of the resamples in which it is on the front."""


class Sample:
    """All figures of candidates that were run on the same targets with the same seeds, and their resamples.

    A resample is the figure plus two deviations from it. All candidates share seeds and noise, so they share the
    deviations, and differences between candidates are more certain than the figures.

    - Over images: a bootstrap of the initial noise. Image i of every class starts from the same noise, so all classes
      deviate together. It draws n - 1 of n images, which makes the spread of a mean right (McCarthy and Snowden, The
      bootstrap and finite population sampling, 1985). Fewer than ``FEW_IMAGES`` are treated like seeds.
    - Over seeds, of which there are few: Student's t with n - 1 degrees of freedom, times the standard error of the
      seeds' mean. The percentiles of a bootstrap of three seeds would lie within the three and cover less than 80 %.
      Trainings with one seed share their noise for every target, so all targets deviate with the same seeds. One seed
      cannot show the spread over seeds.

    "attributes" is a ratio, because only some prompts ask for something. Its deviation over images is that of its
    first-order expansion. A target whose prompts ask for nothing, or whose records do not all say, does not count.

    Noise of a single seed and image adds to both, so the intervals are too wide rather than too narrow (Owen, The
    pigeonhole bootstrap, 2007, has a third such term). Resamples of shares may leave [0, 1]; figures and intervals do
    not.

    Args:
        runs: the judge's view of every combination of target, candidate and seed.
        candidates: the candidates to compare, in the order of all arrays.

    Raises:
        ValueError: a combination is missing, runs were judged on different images, or a class has fewer images than
            ``FEWEST_IMAGES``.

    Attributes:
        values: [candidates] by the name of a figure, as in :class:`Standing`.
        resampled: [resamples, candidates] by the same names.
        images: how many images of a run each figure counts.
        seeds: the number of seeds of the target with the fewest.
    """

    def __init__(self, runs: Runs, candidates: Sequence[Candidate], resamples: int = RESAMPLES) -> None:
        self.candidates = tuple(candidates)
        targets = list(dict.fromkeys(target for target, _, _ in runs))
        if not targets or not self.candidates:
            raise ValueError("runs is empty; finish some first")
        deviations = _Deviations(resamples, np.random.default_rng(0))
        parts = [_Figures(runs, target, self.candidates, deviations) for target in targets]
        self.resampled: dict[str, Array] = {}
        self.values: dict[str, Array] = {}
        self.images: dict[str, int] = {}
        self.seeds = min(part.seeds for part in parts)
        for name in FIGURES:
            asking = [part.means[name] for part in parts if name not in ("attributes", "held") or part.images[name]]
            means = np.mean(asking or [parts[0].means[name]], axis=0)
            # Sums of weights are 1 up to rounding error, which must not decide who is on the front.
            self.values[name], self.resampled[name] = means[0].round(DIGITS), means[1:].round(DIGITS)
            self.images[name] = sum(part.images[name] for part in parts)

    def estimate(self, figure: str, candidate: Candidate) -> Estimate:
        """A candidate's figure with its interval."""
        place = self.candidates.index(candidate)
        found = interval(float(self.values[figure][place]), self.resampled[figure][:, place])
        highest = math.inf if figure == "change" else 1.0
        found = Estimate(found.value, max(found.low, 0.0), min(found.high, highest))
        # If all images agree, resampling cannot tell how rare exceptions are.
        if figure != "change" and found.low == found.high:
            reach = reach_unseen(self.images[figure])
            return Estimate(found.value, max(found.value - reach, 0.0), min(found.value + reach, 1.0))
        return found

    def difference(self, figure: str, one: Candidate, other: Candidate) -> Estimate:
        """The figure of ``one`` minus that of ``other``."""
        return self.contrast(figure, ((one, 1.0), (other, -1.0)))

    def contrast(self, figure: str, weights: Sequence[tuple[Candidate, float]]) -> Estimate:
        """A weighted sum of a figure over candidates."""
        row = np.zeros(len(self.candidates))
        for candidate, weight in weights:
            row[self.candidates.index(candidate)] += weight
        value, resampled = self.values[figure] @ row, self.resampled[figure] @ row
        return interval(round(float(value), DIGITS), resampled.round(DIGITS))

    def standings(self) -> list[Standing]:
        """All candidates, in their order."""
        on_front = undominated(self.values["erased"], self.values["retained"])
        shares = undominated(self.resampled["erased"], self.resampled["retained"]).mean(0)
        return [
            Standing(
                one, on_front=bool(on), front_share=float(share), **{name: self.estimate(name, one) for name in FIGURES}
            )
            for one, on, share in zip(self.candidates, on_front, shares, strict=True)
        ]


def complete(runs: Runs, candidates: Sequence[Candidate]) -> dict[tuple[str, Candidate, int], Sequence[Judged]]:
    """The runs of the targets and seeds that every candidate has."""
    blocks = list(dict.fromkeys((target, seed) for target, _, seed in runs))
    whole = [(target, seed) for target, seed in blocks if all((target, one, seed) in runs for one in candidates)]
    return {(target, one, seed): runs[target, one, seed] for target, seed in whole for one in candidates}


def undominated(erased: Array, retained: Array) -> Array:
    """Which points no other point dominates. A point dominates if it is no worse in both figures and better in one.

    Args:
        erased, retained: [..., candidates].

    Returns:
        Flags of the same shape. Of equal points, all are on the front or none is.
    """
    more_erased = erased[..., None, :] >= erased[..., :, None]
    more_retained = retained[..., None, :] >= retained[..., :, None]
    better = (erased[..., None, :] > erased[..., :, None]) | (retained[..., None, :] > retained[..., :, None])
    return np.logical_not((more_erased & more_retained & better).any(-1))


def interval(value: float, resampled: Array) -> Estimate:
    """A figure with the interval of its resamples [R], by percentiles."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(value, min(float(low), value), max(float(high), value))


class _Figures:
    """The figures of one target: means [1 + resamples, candidates], of all images first, then of each resample."""

    def __init__(self, runs: Runs, target: str, candidates: Sequence[Candidate], deviations: _Deviations) -> None:
        seeds = list(dict.fromkeys(seed for one, _, seed in runs if one == target))
        missing = [(one.label, seed) for one in candidates for seed in seeds if (target, one, seed) not in runs]
        if missing:
            raise ValueError(
                f"runs lacks {target!r} with {missing[0][0]}, seed {missing[0][1]}; filter the runs with complete()"
            )
        self.seeds = len(seeds)
        self.images = dict.fromkeys(FIGURES, 0)
        seed_weights = deviations.of_seeds(len(seeds))
        parts: dict[str, list[Array]] = {name: [] for name in FIGURES}
        asking: list[Sequence[Judged]] = []
        for judged in zip(*(runs[target, one, seed] for one in candidates for seed in seeds), strict=True):
            probe, images = judged[0], len(judged[0].hits)
            if len({(one.role, one.name, len(one.hits), one.change is None) for one in judged}) > 1:
                raise ValueError(f"the runs of {target!r} were judged on different images; run them again")
            if images < FEWEST_IMAGES:
                are = "is only 1 image" if images == 1 else f"are only {images} images"
                raise ValueError(f"there {are} of {probe.name!r} in runs; draw at least {FEWEST_IMAGES} per class")
            is_target, attacked = probe.role in TARGET_ROLES, probe.role == ATTACKED
            figure = "erased" if is_target else "held" if attacked else "retained"
            found = {figure: [one.hits for one in judged]}
            if probe.change is not None and figure == "retained":
                found["change"] = [one.change for one in judged]
            for name, values in found.items():
                grid = np.array(values, float).reshape(len(candidates), len(seeds), images)
                by_seed, by_image = grid.mean(2), grid.mean(1)
                mean = by_seed.mean(1)
                resampled = mean + seed_weights @ by_seed.T + deviations.of_images(images) @ by_image.T
                means = np.concatenate([mean[None], resampled])
                parts[name].append(1 - means if name in ("erased", "held") else means)
                self.images[name] += images
            if is_target:
                asking.append(judged)
        found_of = _attributes(asking, (len(candidates), len(seeds)), seed_weights, deviations)
        if found_of is not None:
            parts["attributes"], self.images["attributes"] = [found_of[0]], found_of[1]
        nothing = np.full((1 + deviations.resamples, len(candidates)), math.nan)
        self.means = {name: np.mean(found, axis=0) if found else nothing for name, found in parts.items()}


def _attributes(
    asking: Sequence[Sequence[Judged]], shape: tuple[int, int], seed_weights: Array, deviations: _Deviations
) -> tuple[Array, int] | None:
    """What was found of what else the target's prompts ask for, and in how many images of a run they ask for it.

    The first is a share, [1 + resamples, candidates]: of all images first, then of each resample. None if they ask for
    nothing, or if a record does not say.

    Args:
        asking: by probe of the target, the views of all candidates and seeds.
        shape: the numbers of candidates and seeds.
        seed_weights: the deviations of the seeds' weights.
        deviations: those of images.
    """
    found: list[Array] = []
    asked: list[Array] = []
    for judged in asking:
        # [runs, attributes, images], NaN where the prompt asks for nothing.
        if len({(tuple(one.attributes), np.isnan(one.answers).tobytes()) for one in judged}) > 1:
            return None
        answers = np.array([one.answers for one in judged])
        found.append(np.nansum(answers, axis=1).reshape(*shape, -1))
        asked.append(np.isfinite(answers[0]).sum(0))
    total = sum(int(one.sum()) for one in asked)
    if not total:
        return None
    by_seed = sum(one.sum(2) for one in found) / total
    mean = by_seed.mean(1)
    resampled = mean + seed_weights @ by_seed.T
    for one, counts in zip(found, asked, strict=True):
        # By how much more was found in each image than the mean share of what was asked.
        excess = (one.mean(1) - mean[:, None] * counts) * len(counts) / total
        resampled = resampled + deviations.of_images(len(counts)) @ excess.T
    return np.concatenate([mean[None], resampled]), sum(int(np.count_nonzero(counts)) for counts in asked)


class _Deviations:
    """How much the weights of images and seeds deviate from equal weights in each resample.

    They depend only on the number of images or seeds, because image i of every class starts from the same noise.
    """

    def __init__(self, resamples: int, generator: np.random.Generator) -> None:
        self.resamples = resamples
        self._generator = generator
        self.of_images, self.of_seeds = functools.cache(self._of_images), functools.cache(self._of_seeds)

    def _of_images(self, count: int) -> Array:
        """The weights of a bootstrap of ``count`` images, [resamples, count]; of few images, as of seeds."""
        if count < FEW_IMAGES:
            return self._of_seeds(count)
        drawn = count - 1
        return self._generator.multinomial(drawn, np.full(count, 1 / count), size=self.resamples) / drawn - 1 / count

    def _of_seeds(self, count: int) -> Array:
        """Weights [resamples, count] of sum 0 that turn the means of seeds into t times their mean's standard error.

        With z standard normal, sum z_i (m_i - mean) has the variance (n - 1) s^2, the mean has s^2/n, and a normal
        variable divided by the root of chi^2/(n - 1) is Student's t.
        """
        if count == 1:
            return np.zeros((self.resamples, 1))
        normal = self._generator.standard_normal((self.resamples, count))
        scale = np.sqrt(self._generator.chisquare(count - 1, size=(self.resamples, 1)) / (count - 1))
        return (normal - normal.mean(1, keepdims=True)) / (math.sqrt(count * (count - 1)) * scale)
