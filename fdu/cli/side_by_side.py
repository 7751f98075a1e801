"""Before and after an erasure, drawn by one pipeline from the same noise: what the page of ``fdu studio`` shows."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fdu
from fdu.config import Natural, check_number
from fdu.evaluation.drawing import Sampling
from fdu.models import parts
from fdu.models.families import guidance_argument_of
from fdu.storage import delta, lora
from fdu.storage.loading import check_erased, erased_pairs, load_model, loading, read_record
from fdu.storage.output import PIPELINE_FILE
from fdu.storage.readers import read_weights
from fdu.subjects.subject import Subject

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

STRONGEST = 1.5
"""The largest strength on the page; 1 is the trained erasure, 0 none."""
ASKED, KEPT = 4, 6
"""Example prompts of the erased concepts, and of what should stay."""
NAMED_PAIRS = 2
"""Concepts that the name of an erasure lists; more are counted."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """An erasure to try, checked; nothing is loaded yet."""

    path: str
    record: Mapping[str, Any] | None
    """What ``fdu erase`` noted, if it did."""

    @classmethod
    def of(cls, path: str) -> Tried:
        """The erasure in a folder or file.

        Raises:
            FileNotFoundError, ValueError: it holds no weights, several, or a damaged record.
        """
        from fdu.report import check_record

        check_erased(path)
        record = read_record(path)
        if record is not None:
            check_record(record, f"ERASED {path!r}: record")
        return cls(path, record)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Targets and anchors, as far as they are known."""
        return erased_pairs(self.record) if self.record else []

    @property
    def name(self) -> str:
        """In a few words.

        >>> Tried("runs/a", {"concepts": [["fox", "wolf"]]}).name, Tried("a.safetensors", None).name
        ('fox → wolf (a)', 'a.safetensors')
        """
        told = [f"{target} → {anchor or 'nothing'}" for target, anchor in self.pairs]
        if len(told) > NAMED_PAIRS:
            told[NAMED_PAIRS - 1 :] = [f"{len(told) - NAMED_PAIRS + 1} more"]
        folder = Path(self.path).resolve().name
        return f"{', '.join(told)} ({folder})" if told else folder


@dataclasses.dataclass(frozen=True)
class Suggestions:
    """Prompts to try."""

    asked: tuple[str, ...] = ()
    """Of the erased concepts, first in the words of the training, then in others."""
    kept: tuple[str, ...] = ()
    """Of neighbours and of other classes, which should stay as they are."""


def suggestions(subject: Subject, tried: Tried) -> Suggestions:
    """Prompts to try on an erasure; none where neither its record nor the model tells them."""
    targets = [target for target, _ in tried.pairs]
    asked, kept = list[str](), list[str]()
    for target in targets[:ASKED]:
        try:
            prompts = subject.exam(target, targets, record=tried.record).prompts()
        except ValueError:  # the record has no prompt of it
            continue
        share = max(1, ASKED // len(targets))
        asked += [*prompts["target"][: max(1, share - 1)], *prompts["unseen"][: share // 2]][:share]
        kept += prompts["retained"]
    return Suggestions(tuple(dict.fromkeys(asked)), tuple(dict.fromkeys(kept))[:KEPT])


@dataclasses.dataclass(frozen=True)
class _Switch:
    """How a loaded erasure comes and goes: as an adapter, or as values of weights."""

    adapter: str | None = None
    changes: tuple[delta.Change, ...] = ()
    replaces: bool = False
    """Whether the values hold the adapters of the base, which must then be off."""


class SideBySide:
    """A pipeline with erasures of which at most one counts at a time. One drawing runs at a time.

    Args:
        pipeline: the pipeline before.
        erasures: what to try on it.
        sampling: steps and guidance by default; None: the pipeline's.
        size: arguments ``height`` and ``width`` of the images; none for the pipeline's own.

    Raises:
        OSError: an erasure cannot be loaded.
        ValueError: an erasure of another model.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        erasures: Sequence[Tried],
        sampling: Sampling,
        size: Mapping[str, int] | None = None,
    ) -> None:
        self.pipeline, self.erasures, self.size = pipeline, list(erasures), dict(size or {})
        self.sampling = drawn_by(pipeline, sampling)
        self._lock = threading.Lock()
        self._former: tuple[Any, Image] | None = None
        self._own = self._adapters_on()
        self._switches = [self._load(one) for one in self.erasures]

    def draw(
        self,
        prompt: str,
        erasure: int = 0,
        strength: float = 1.0,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> tuple[Image, Image]:
        """The images of a prompt before and after an erasure. Between two calls that differ only in the erasure and its
        strength, the image before is kept.

        Args:
            prompt: the prompt.
            erasure: which one, by its place.
            strength: factor on the change, in [0, STRONGEST]; 1 is the trained erasure.
            seed: of the noise.
            steps, guidance: None: the defaults.

        Raises:
            ValueError: no prompt, no such erasure, or a number out of range.
        """
        prompt = prompt.strip()
        if not prompt:
            raise ValueError("prompt is empty; type what to draw")
        if not 0 <= erasure < len(self.erasures):
            raise ValueError(f"erasure must be a number from 0 to {len(self.erasures) - 1}, got {erasure}")
        if not 0 <= strength <= STRONGEST:
            raise ValueError(f"strength must be in [0, {STRONGEST:g}], got {strength:g}")
        check_number("seed", seed, Natural)
        steps = self.sampling.num_inference_steps if steps is None else steps
        guidance = self.sampling.guidance_scale if guidance is None else guidance
        asked = (prompt, seed, Sampling(num_inference_steps=steps, guidance_scale=guidance, batch_size=1))
        with self._lock:
            if self._former is None or self._former[0] != asked:
                self._former = asked, self._image(*asked, "before")
            with self._on(self._switches[erasure], float(strength)):
                after = self._image(*asked, "after")
            return self._former[1], after

    def _image(self, prompt: str, seed: int, sampling: Sampling, side: str) -> Image:
        from fdu.report.pictures import to_pil

        probe = fdu.Probe(prompt, (prompt,), "target", list)
        drawn = fdu.draw(self.pipeline, [probe], 1, seed, **sampling.settings(), description=side, **self.size)
        return to_pil(drawn.images[0][0])

    def _load(self, tried: Tried) -> _Switch:
        """Load an erasure and leave it switched off."""
        if (Path(tried.path) / PIPELINE_FILE).is_file():
            return _Switch(changes=self._differences(tried.path), replaces=True)
        with loading(tried.path, "weights"):
            found = read_weights(self.pipeline, tried.path)
            if found.updates is None:
                return _Switch(changes=tuple(found.changes), replaces=bool((tried.record or {}).get("adapters")))
            name = lora.attach(self.pipeline, found.updates, None, 1.0)
        self._restore()
        return _Switch(adapter=name)

    def _differences(self, path: str) -> tuple[delta.Change, ...]:
        """What differs in the pipeline of a folder, of which no more is kept."""
        own = parts.weights(self.pipeline)
        other = parts.weights(load_model(path, str(self.pipeline.dtype).removeprefix("torch.")))
        if own.keys() != other.keys():
            odd = sorted(own.keys() ^ other.keys())[0]
            raise ValueError(
                f"ERASED {path!r} is another model than BASE: only one of them has {odd}; give its own base"
            )
        changed = {
            name: weight.detach()
            for name, weight in other.items()
            if weight.shape != own[name].shape or not weight.equal(own[name].to("cpu"))
        }
        with loading(path, "weights"):
            return tuple(delta.changes(self.pipeline, changed))

    @contextmanager
    def _on(self, switch: _Switch, strength: float) -> Iterator[None]:
        """Within this context the erasure counts. Afterwards the pipeline is as before, bit for bit."""
        try:
            if switch.adapter is not None:
                for layer, names in self._adapters_on().items():
                    layer.set_adapter([*names, switch.adapter], inference_mode=True)
                    layer.set_scale(switch.adapter, strength)
            elif switch.replaces:
                self._restore({})
            with delta.applied(self.pipeline, [*switch.changes], strength) if switch.changes else nullcontext():
                yield
        finally:
            self._restore()

    def _adapters_on(self) -> dict[Any, list[str]]:
        """The active adapters of each layer that carries any."""
        models = parts.models(self.pipeline).values()
        return {layer: list(layer.active_adapters) for model in models for layer in parts.adapted(model)}

    def _restore(self, wanted: Mapping[Any, list[str]] | None = None) -> None:
        """Leave only these adapters on; by default those of the pipeline itself."""
        wanted = self._own if wanted is None else wanted
        for layer in self._adapters_on():
            layer.set_adapter(wanted.get(layer, []), inference_mode=True)


def drawn_by(pipeline: DiffusionPipeline, sampling: Sampling) -> Sampling:
    """The sampling with the pipeline's own defaults where it names none, as far as the pipeline's call states them."""
    stated = inspect.signature(type(pipeline).__call__).parameters
    arguments = {"num_inference_steps": "num_inference_steps", "guidance_scale": guidance_argument_of(pipeline)}
    own = {name: stated[argument].default for name, argument in arguments.items() if argument in stated}
    missing = [
        name for name, value in own.items() if getattr(sampling, name) is None and isinstance(value, (int, float))
    ]
    return dataclasses.replace(sampling, **{name: own[name] for name in missing})
