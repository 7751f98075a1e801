"""Erased against retained: figures with intervals over seeds and images, and the Pareto front."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fdu.comparison.judged import Judged
from fdu.comparison.plan import FEWEST_IMAGES, Candidate
from fdu.evaluation.intervals import LEVEL, RESAMPLES, reach_unseen

DIGITS = 12
"""Of figures; the rest is rounding."""
FIGURES = ("erased", "retained", "change")
TARGET_ROLES = ("target", "unseen")

Array = np.ndarray
Runs = Mapping[tuple[str, Candidate, int], Sequence[Judged]]
"""By target, candidate and seed: what the judge saw of every probe, in one order for all runs of a target."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is all above or all below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a candidate stands."""

    candidate: Candidate
    erased: Estimate
    """The share of the target's images, in seen and unseen phrasings, that do not show it."""
    retained: Estimate
    """The mean over all other classes of the share that shows what was asked for."""
    change: Estimate
    """Mean absolute change of the other classes' images, of pixel range [0, 1]: harm that no judge counts yet."""
    on_front: bool
    """No other candidate both erases and retains more."""
    front_share: float
    """In what share of the resamples that is so."""


class Sample:
    """All figures of candidates that were run on the same targets with the same seeds, and their resamples.

    A resample is the figure plus two deviations from it, the same for every candidate: they share seeds and noise, so
    differences between candidates are more certain than the figures are.

    - Over images, a bootstrap of the noise that image i of every class began as: what befalls one befalls the others.
      Of n it draws n - 1, which makes the spread of a mean right (McCarthy and Snowden, The bootstrap and finite
      population sampling, 1985).
    - Over seeds, of which there are few, Student's t with n - 1 degrees of freedom, times the standard error of the
      seeds' mean: percentiles of a bootstrap of three lie within the three and cover less than 80 %. Trainings of one
      seed share their noise whatever the target, so all targets deviate with the same seeds. One seed says nothing of
      the spread over seeds.

    What is a matter of one seed and one image adds to both, so that intervals are rather too wide than too narrow
    (Owen, The pigeonhole bootstrap, 2007, who has a third such term). Resamples of shares may leave [0, 1]; so do no
    figures and no intervals.

    Args:
        runs: what the judge saw; every combination of target, candidate and seed.
        candidates: those to compare, in the order of all arrays.

    Raises:
        ValueError: a combination that is missing, runs that were judged on different images, or a class of fewer than
            ``FEWEST_IMAGES``.

    Attributes:
        values: [candidates] by the name of a figure: "erased", "retained", "change", as :class:`Standing` has them.
        resampled: [resamples, candidates] by the same names.
        images: how many images of a run each figure counts.
        seeds: of the target with the fewest.
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
            means = np.mean([part.means[name] for part in parts], axis=0)
            # Sums of weights are 1 but for rounding, which must decide no front.
            self.values[name], self.resampled[name] = means[0].round(DIGITS), means[1:].round(DIGITS)
            self.images[name] = sum(part.images[name] for part in parts)

    def estimate(self, figure: str, candidate: Candidate) -> Estimate:
        """A candidate's figure with its interval."""
        place = self.candidates.index(candidate)
        found = interval(float(self.values[figure][place]), self.resampled[figure][:, place])
        highest = math.inf if figure == "change" else 1.0
        found = Estimate(found.value, max(found.low, 0.0), min(found.high, highest))
        # Where all images show the same, resampling cannot tell how rare exceptions are.
        if figure != "change" and found.low == found.high and found.value in (0.0, 1.0):
            reach = reach_unseen(self.images[figure])
            return Estimate(found.value, 0.0, reach) if found.value == 0 else Estimate(found.value, 1 - reach, 1.0)
        return found

    def difference(self, figure: str, one: Candidate, other: Candidate) -> Estimate:
        """By how much ``one`` has more of a figure than ``other``."""
        return self.contrast(figure, ((one, 1.0), (other, -1.0)))

    def contrast(self, figure: str, weights: Sequence[tuple[Candidate, float]]) -> Estimate:
        """A sum of a figure over candidates, each with a weight."""
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
                candidate,
                self.estimate("erased", candidate),
                self.estimate("retained", candidate),
                self.estimate("change", candidate),
                bool(on_front[place]),
                float(shares[place]),
            )
            for place, candidate in enumerate(self.candidates)
        ]


def complete(runs: Runs, candidates: Sequence[Candidate]) -> dict[tuple[str, Candidate, int], Sequence[Judged]]:
    """The runs of those targets and seeds of which every candidate has one, so that like is compared with like."""
    blocks = list(dict.fromkeys((target, seed) for target, _, seed in runs))
    whole = [(target, seed) for target, seed in blocks if all((target, one, seed) in runs for one in candidates)]
    return {(target, one, seed): runs[target, one, seed] for target, seed in whole for one in candidates}


def undominated(erased: Array, retained: Array) -> Array:
    """Which points no other one dominates, by being no worse in both figures and better in one.

    Args:
        erased, retained: [..., candidates].

    Returns:
        Flags of the same shape. Equal points are all on the front, or none is.
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

    def __init__(
        self,
        runs: Runs,
        target: str,
        candidates: Sequence[Candidate],
        deviations: _Deviations,
    ) -> None:
        seeds = list(dict.fromkeys(seed for one, _, seed in runs if one == target))
        missing = [(one.label, seed) for one in candidates for seed in seeds if (target, one, seed) not in runs]
        if missing:
            raise ValueError(
                f"runs lacks {target!r} with {missing[0][0]}, seed {missing[0][1]}; filter them with complete()"
            )
        self.seeds = len(seeds)
        grid = [[runs[target, one, seed] for seed in seeds] for one in candidates]
        seed_weights = deviations.of_seeds(len(seeds))
        parts: dict[str, list[Array]] = {name: [] for name in FIGURES}
        self.images = dict.fromkeys(FIGURES, 0)
        for place, probe in enumerate(grid[0][0]):
            judged = [[run[place] for run in row] for row in grid]
            alike = {(one.role, one.name, len(one.hits), one.change is None) for row in judged for one in row}
            if len(alike) > 1:
                raise ValueError(f"the runs of {target!r} were judged on different images; run them again")
            if len(probe.hits) < FEWEST_IMAGES:
                raise ValueError(
                    f"runs has {len(probe.hits)} image of {probe.name!r}; draw at least {FEWEST_IMAGES} per class"
                )
            weights = deviations.of_images(len(probe.hits))

            def mean(values: list[list[Sequence[float]]], weights: Array = weights) -> Array:
                """Over seeds and images of [candidates, seeds, images]."""
                found = np.asarray(values, float)
                by_seed, by_image = found.mean(2), found.mean(1)
                resampled = by_seed.mean(1) + seed_weights @ by_seed.T + weights @ by_image.T
                return np.concatenate([by_seed.mean(1)[None], resampled])

            hits = mean([[one.hits for one in row] for row in judged])
            if probe.role in TARGET_ROLES:
                self._add(parts, "erased", 1 - hits, len(probe.hits))
                continue
            self._add(parts, "retained", hits, len(probe.hits))
            if probe.change is not None:
                self._add(parts, "change", mean([[one.change or () for one in row] for row in judged]), len(probe.hits))
        nothing = np.full((1 + deviations.resamples, len(candidates)), math.nan)
        self.means = {name: np.mean(found, axis=0) if found else nothing for name, found in parts.items()}

    def _add(self, parts: dict[str, list[Array]], name: str, means: Array, images: int) -> None:
        parts[name].append(means)
        self.images[name] += images


class _Deviations:
    """By how much the weights of images and seeds differ from equal ones in each resample; by their number, always the
    same, as image i of whatever class began as the same noise."""

    def __init__(self, resamples: int, generator: np.random.Generator) -> None:
        self.resamples = resamples
        self._generator = generator
        self._images: dict[int, Array] = {}
        self._seeds: dict[int, Array] = {}

    def of_images(self, count: int) -> Array:
        """Of a bootstrap of ``count`` images, [resamples, count]."""
        if count not in self._images:
            drawn = count - 1
            counts = self._generator.multinomial(drawn, np.full(count, 1 / count), size=self.resamples)
            self._images[count] = counts / drawn - 1 / count
        return self._images[count]

    def of_seeds(self, count: int) -> Array:
        """Weights [resamples, count] of sum 0 that make, of the means of seeds, t times their mean's standard error.

        With z standard normal, sum z_i (m_i - mean) has the variance (n - 1) s^2, that of the mean is s^2/n, and a
        normal variable over the root of chi^2/(n - 1) is Student's t.
        """
        if count not in self._seeds:
            self._seeds[count] = np.zeros((self.resamples, count))
            if count > 1:
                normal = self._generator.standard_normal((self.resamples, count))
                scale = np.sqrt(self._generator.chisquare(count - 1, size=(self.resamples, 1)) / (count - 1))
                centred = normal - normal.mean(1, keepdims=True)
                self._seeds[count] = centred / (math.sqrt(count * (count - 1)) * scale)
        return self._seeds[count]
