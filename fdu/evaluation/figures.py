"""The figures of an evaluation: judged shares and metrics, before and after, each with its interval."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from torch import cat, nn

from fdu.evaluation.drawing import Draws, Group, Probe, Role, check_probes, draw, groups
from fdu.evaluation.features import Features, as_features
from fdu.evaluation.intervals import (
    FEWEST,
    Average,
    Interval,
    difference_interval,
    lowest_interval,
    mean_interval,
    share_interval,
    size_interval,
)
from fdu.evaluation.metrics.catalogue import metrics_of
from fdu.evaluation.metrics.metric import PairMetric, ScoreMetric, SetMetric, ShareMetric

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclasses.dataclass(frozen=True)
class Figures:
    """The judges' counts on one side of an erasure. Each accuracy is a share of images in [0, 1]."""

    target_accuracy: float
    """Share of images for a target's prompts that show it, averaged over the targets; lower is better after an
    erasure."""
    unseen_accuracy: float | None
    """The same for phrasings that the training never used; None if none were drawn."""
    retained_accuracy: float
    """Share of images that show the requested class, averaged over the retained classes."""
    worst_retained_accuracy: float
    """The lowest of these shares."""
    worst_retained_class: str
    """The class with that share."""
    cross_domain_accuracy: float | None
    """The same for classes of another kind (colours if a digit was erased); None if none were drawn."""
    per_class: dict[str, float]
    """Share of images that show the requested class, by class."""
    became: dict[str, dict[str, float]]
    """By target, the judge's answers on its images: shares by class, most frequent first."""
    retained_by_group: dict[str, float] = dataclasses.field(default_factory=dict)
    """Mean share of the retained classes of each group: "near", "generic", "unrelated"."""
    unseen_per_class: dict[str, float] = dataclasses.field(default_factory=dict)
    """By target, its share in phrasings that the training never used."""
    attribute_accuracy: float | None = None
    """Share of what the target's prompts, seen and unseen, ask for besides the target that the judges find. All images
    and attributes count together; None if the prompts ask for nothing else."""
    attributes: dict[str, float] = dataclasses.field(default_factory=dict)
    """The same by attribute: "style", "background"."""
    clip_score: dict[str, float] = dataclasses.field(default_factory=dict)
    """CLIPScore between images and the name of the requested class, by role and group; empty without a text encoder."""
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    """95 % intervals by figure: "target_accuracy", "per_class.three". CLIP scores need two images per class."""

    def value(self, name: str) -> float:
        """A figure by its name; a dot picks one of several: "per_class.three"."""
        field, _, part = name.partition(".")
        value = getattr(self, field)
        return value[part] if part else value


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures before and after an erasure, on images with the same prompts and seeds."""

    before: Figures
    after: Figures
    change: dict[str, float]
    """Mean absolute pixel difference of the images, in [0, 1], by role and group."""
    images_per_class: int
    difference: dict[str, float] = dataclasses.field(default_factory=dict)
    """After minus before, for accuracies and CLIP scores, by figure."""
    distances: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Distances in the space of ``features``, by role and group: "kid" and "cmmd" between the two sets, "perceptual"
    between each image and its counterpart. Empty without features."""
    unlearn_canvas: dict[str, float] = dataclasses.field(default_factory=dict)
    """UA, IRA and CRA after the erasure: see ``fdu/evaluation/metrics/unlearn_canvas.py``."""
    features: str = ""
    """Extractor of the distances and CLIP scores, which are comparable only for the same extractor."""
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    """95 % intervals of the figures of this object: "change.target", "difference.retained_accuracy",
    "distances.kid.retained", "unlearn_canvas.UA". Changes and distances need two images
    per class."""

    def measured(self, name: str) -> dict[str, float]:
        """The figures of a metric that compares images, by role and group; empty if it was not computed."""
        return self.change if name == "change" else self.distances.get(name.removeprefix("distances."), {})

    def as_dict(self) -> dict[str, Any]:
        """As a dict for JSON."""
        return dataclasses.asdict(self)


def evaluate(
    before: DiffusionPipeline | Draws,
    after: DiffusionPipeline | Draws,
    probes: Sequence[Probe],
    features: Features | nn.Module | str | None = None,
    **settings: Any,
) -> Evaluation:
    """Compare two pipelines, or images that :func:`draw` made with them, on the same probes.

    Args:
        before, after: pipelines, or images from :func:`draw`.
        probes: prompts and judges; at least one has the role "target", and one the role "retained".
        features: extractor for distances and, if it reads text, CLIP scores: an extractor, a module, a CLIP model's
            folder or hub id. None: judged shares and pixel changes only.
        settings: arguments of :func:`draw`.

    Raises:
        ValueError: as :func:`fdu.evaluation.drawing.check_probes`, or images that do not match.
    """
    check_probes(probes)
    extractor = as_features(features)
    drawn = [
        given if isinstance(given, Draws) else draw(given, probes, description=name, **settings)
        for name, given in (("before", before), ("after", after))
    ]
    counts = [[len(images) for images in one.images] for one in drawn]
    if counts[0] != counts[1] or len(counts[0]) != len(probes):
        raise ValueError(
            f"before and after must hold the same number of images per probe, got {counts[0]} and {counts[1]}"
        )
    found = _Found(groups(probes))
    pairs = list(zip(drawn[0].images, drawn[1].images, strict=True))
    # Pairs first: the features of their images are then known, also to judges with the same encoder.
    of_pairs = [one for one in metrics_of(PairMetric) if extractor or not one.needs_features]
    of_sets = metrics_of(SetMetric) if extractor else []
    for metric in of_pairs:
        found.means(metric.name, [metric.values(*pair, extractor).numpy() for pair in pairs])
    for one in of_sets:
        found.discrepancies(one, drawn, extractor)
    before, after = (_side(one, probes, extractor) for one in drawn)
    for name, (average, interval) in after.averages.items():
        # Which classes appear in a target's place differs before and after.
        if name in before.averages and not name.startswith("became."):
            found.keep(f"difference.{name}", average - before.averages[name][0], interval)
    for given in metrics_of(ShareMetric):
        if given.figure in after.figures:
            share = given.of(after.figures[given.figure], after.intervals[given.figure])
            found.figures[given.name], found.intervals[given.name] = share
    names = [metric.name for metric in (*of_pairs, *of_sets) if metric.name.startswith("distances.")]
    return Evaluation(
        before=before.side(probes),
        after=after.side(probes),
        change=found.under("change"),
        images_per_class=counts[0][0],
        difference=found.under("difference"),
        distances={name.removeprefix("distances."): found.under(name) for name in names},
        unlearn_canvas=found.under("unlearn_canvas"),
        features=extractor.name if extractor else "",
        intervals=found.intervals,
    )


class _Found:
    """Figures by name, their intervals, and the averages that their differences are made of."""

    def __init__(self, places: Mapping[str, Sequence[int]]) -> None:
        self.places = places
        self.figures: dict[str, float] = {}
        self.intervals: dict[str, Interval] = {}
        self.averages: dict[str, tuple[Average, Callable[[Average], Interval] | None]] = {}
        """Each with what makes the interval of a difference of two."""
        self.became: dict[str, dict[str, float]] = {}

    def keep(self, name: str, average: Average, interval: Callable[[Average], Interval] | None) -> None:
        """An average as a figure, with its interval unless that is None."""
        self.figures[name] = average.value
        if interval:
            self.intervals[name] = interval(average)

    def attributes(self, found: Mapping[int, Mapping[str, Sequence[bool | None]]]) -> None:
        """The share of what the prompts ask for besides the class that the judges find, in all and by attribute.

        Two answers for one image depend on each other, so the number of images that were asked about counts for the
        interval where all agree, not the number of answers.

        Args:
            found: by probe and name of the attribute, the output of :meth:`Attribute.found`.
        """
        names = list(dict.fromkeys(name for one in found.values() for name in one))
        for key, chosen in {"attribute_accuracy": names, **{f"attributes.{name}": [name] for name in names}}.items():
            hits, asked = [], []
            for one in found.values():
                # [attributes, images], NaN where the prompt asks for nothing.
                answers = np.array([one[name] for name in chosen if name in one], float)
                if len(answers):
                    hits.append(np.nansum(answers, axis=0))
                    asked.append(np.isfinite(answers).sum(0).astype(float))
            if any(one.any() for one in asked):
                self._share(key, Average.of_ratio(hits, asked))

    def under(self, name: str) -> dict[str, float]:
        """The figures whose names begin with this one, by the rest of the name."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self.figures.items() if key.startswith(start)}

    def share(self, name: str, hits: Sequence[np.ndarray]) -> None:
        """The mean over classes of the share of hits; an image is 1 or 0."""
        self._share(name, Average.of_means(hits))

    def _share(self, name: str, average: Average) -> None:
        self.keep(name, average, share_interval)
        self.averages[name] = average, difference_interval

    def means(self, name: str, values: Sequence[np.ndarray]) -> None:
        """The mean over classes of one value per image, by role and group."""
        for part, chosen in self.places.items():
            key, own = f"{name}.{part}", [values[place] for place in chosen]
            average, told = Average.of_means(own), min(map(len, own)) >= FEWEST
            self.averages[key] = average, mean_interval if told else None
            self.keep(key, average, size_interval if told else None)

    def discrepancies(self, metric: SetMetric, drawn: Sequence[Draws], extractor: Any) -> None:
        """The distance of two sets of features, by role and group; none if all images began as one noise."""
        for part, chosen in self.places.items():
            before, after = (cat([extractor(one.images[place]) for place in chosen]) for one in drawn)
            counts = [len(drawn[0].images[place]) for place in chosen]
            average = Average.of_pairs(metric.discrepancies(before, after).numpy(), counts)
            if not math.isnan(average.value):
                # Two noises make one pair, which does not tell how others would scatter.
                told = min(counts) >= FEWEST and max(counts) > FEWEST
                self.keep(f"{metric.name}.{part}", average, mean_interval if told else None)

    def side(self, probes: Sequence[Probe]) -> Figures:
        """The figures of one side of the erasure."""
        per_class = self.under("per_class")
        shares = ("target", "unseen", "retained", "worst_retained", "cross_domain", "attribute")
        tables = (
            "retained_by_group",
            "attributes",
            *(metric.name for metric in metrics_of(ScoreMetric)),
        )
        found: dict[str, Any] = {f"{name}_accuracy": self.figures.get(f"{name}_accuracy") for name in shares}
        found |= {name: self.under(name) for name in tables}
        return Figures(
            **found,
            became=self.became,
            per_class=per_class,
            unseen_per_class=self.under("unseen_per_class"),
            worst_retained_class=min((one.name for one in probes if one.role == "retained"), key=per_class.__getitem__),
            intervals=self.intervals,
        )


def _side(draws: Draws, probes: Sequence[Probe], extractor: Features | None) -> _Found:
    """The judges' counts and the scores on one side of the erasure."""
    found = _Found(groups(probes))
    seen = [np.array(probe.judge(images)) for probe, images in zip(probes, draws.images, strict=True)]
    hits = [(names == probe.name).astype(float) for probe, names in zip(probes, seen, strict=True)]
    shares = {f"{role}_accuracy": found.places.get(role, ()) for role in get_args(Role)}
    shares |= {f"retained_by_group.{group}": found.places.get(group, ()) for group in get_args(Group)}
    shares |= {f"per_class.{probe.name}": [place] for place, probe in enumerate(probes) if probe.role != "unseen"}
    shares |= {
        f"unseen_per_class.{probe.name}": [place] for place, probe in enumerate(probes) if probe.role == "unseen"
    }
    for name, chosen in shares.items():
        if chosen:
            found.share(name, [hits[place] for place in chosen])
    retained = [hits[place] for place in found.places["retained"]]
    found.figures["worst_retained_accuracy"] = float(min(one.mean() for one in retained))
    found.intervals["worst_retained_accuracy"] = lowest_interval(
        [int(one.sum()) for one in retained], [len(one) for one in retained]
    )
    for target in found.places["target"]:
        own = found.became[probes[target].name] = {}
        for name, _ in Counter(seen[target].tolist()).most_common():
            figure = f"became.{probes[target].name}.{name}"
            found.share(figure, [(seen[target] == name).astype(float)])
            own[name] = found.figures[figure]
    asking = [*found.places["target"], *found.places.get("unseen", ())]
    found.attributes(
        {place: {one.name: one.found(draws.images[place]) for one in probes[place].attributes} for place in asking}
    )
    texts = extractor.texts([probe.name for probe in probes]) if extractor else None
    if extractor is not None and texts is not None:
        for metric in metrics_of(ScoreMetric):
            pairs_of = zip(map(extractor, draws.images), texts, strict=True)
            found.means(metric.name, [metric.values(images, text[None]).numpy() for images, text in pairs_of])
    return found
