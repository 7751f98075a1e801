"""``fdu plan``: how much memory an erasure needs, before anything is downloaded or trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import OmitArgPrefixes, Positional, arg

from fdu.cli.cards import CARDS, REACHED, CardName
from fdu.cli.options import ModelOptions, Settings, described, grouped, words_of
from fdu.config import TRAIN_METHODS, EraseConfig, Positive, check_number
from fdu.presets import PresetName, check_preset
from fdu.storage.loading import Dtype, check_dtype, check_resolution, check_stored
from fdu.subjects.registry import subject_of

if TYPE_CHECKING:
    from fdu.models.denoiser import Denoiser

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))
GIGABYTE = 1 << 30
AS_GIVEN = "as given"


@dataclasses.dataclass
class Plan:
    """Estimate the memory of an erasure from the shapes of a model, and name settings that need less.

    Reads configs and tokenizers only.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "fdu plan emoji",
        "fdu plan org/model --memory 24 --resolution 512",
        "fdu plan org/model --preset fdmu --mixed_precision bf16 --card rtx-4090",
        "fdu plan org/model --train_method full --mixed_precision bf16 --gradient_checkpointing",
    )

    model: Positional[str]
    """A pipeline's folder, a .safetensors file, a hub id (org/name, or org/name@revision), "emoji" or "digits"."""
    card: CardName | None = None
    """Graphics card whose memory and speed to take, unless --memory or --tflops say otherwise. The speed holds for
    half precision."""
    memory: float | None = None
    """Memory of the device in GiB, > 0: marks what fits into nine tenths of it. Its context and allocator take some
    more than the estimate."""
    tflops: float | None = None
    """Speed that the device reaches, not that of its data sheet, in 10^12 floating-point operations per second, > 0:
    gives the time of the erasure, without the reading of prompts and weights."""
    preset: PresetName | None = None
    """Begin with settings of a published method, or for a kind of model, as for fdu erase."""
    config: Path | None = None
    """YAML file of settings, as for fdu erase."""
    dtype: Dtype = "auto"
    """Dtype of the weights. auto: float32, or the dtype of --mixed_precision."""
    loading: Annotated[OmitArgPrefixes[ModelOptions], arg(name="")] = dataclasses.field(
        default_factory=described(ModelOptions)
    )
    settings: Annotated[OmitArgPrefixes[Settings], arg(name="")] = dataclasses.field(default_factory=grouped())

    def prepare(self, command: str) -> Callable[[], None]:
        """Check the arguments and return the work."""
        from fdu.training.footprint import check_estimable

        if self.memory is not None:
            check_number("memory", self.memory, Positive)
        if self.tflops is not None:
            check_number("tflops", self.tflops, Positive)
        memory = CARDS[self.card].memory if self.card and self.memory is None else self.memory
        model, config = subject_of(self.loading.location(self.model)), self.settings.checked()
        check_estimable(config)
        check_resolution(model.folder, config.size)
        check_dtype(self.dtype, config.mixed_precision)
        check_stored(self.loading.quantization, self.loading.offload, config)

        def work() -> None:
            from fdu.erasure import check_suited
            from fdu.models.families import denoiser_of
            from fdu.models.quantization import quantize
            from fdu.storage.shapes import load_shapes
            from fdu.training.footprint import SHARE, Estimator

            refused: set[str] = set()

            def shapes(one: EraseConfig, quantization: str) -> Denoiser:
                pipeline = load_shapes(model.location, check_dtype(self.dtype, one.mixed_precision))
                quantize(pipeline, quantization)
                denoiser = denoiser_of(pipeline, one.size, one.num_frames)
                try:
                    check_suited(denoiser, config)
                    if self.preset is not None:
                        check_preset(self.preset, denoiser.family)
                except ValueError as error:
                    refused.add(str(error))
                return denoiser

            estimate = Estimator(shapes)
            as_given = Stored(self.loading.quantization, self.loading.offload)
            given = estimate(config, as_given.quantization, as_given.offload)
            for name, count in given.parameters.items():
                print(f"{name:16} {count:>15,} parameters")
            print(f"{'trained':16} {given.trained:>15,} parameters ({config.train_method})")
            for name, count in (("a step", given.flops), ("before the steps", given.preparation)):
                print(f"{name:16} {count / 1e12:>15,.3g} x 10^12 operations")
            tflops, note = self._speed(config.mixed_precision)
            if tflops is not None:
                step, before = (count / tflops / 1e12 for count in (given.flops, given.preparation))
                whole = before + config.max_train_steps * step
                print(f"{'time':16} {step:>15,.3g} s per step, {before:,.3g} s before, {whole:,.3g} s in all")
            print(f"{'':32} {note}\n" if note else "")
            lines: list[tuple[str, ...]] = [("weights", "trained", "step", "sampling", "peak", "settings")]
            fitting: str | None = None
            for words, one, stored in cheaper(config, as_given, bool(given.blocks)):
                found = given if words == AS_GIVEN else estimate(one, stored.quantization, stored.offload)
                sizes = (found.denoiser, found.states, found.step, found.sampling, found.peak)
                fits = memory is not None and found.peak <= SHARE * memory * GIGABYTE
                lines.append((*map(size, sizes), words + (" (fits)" if fits else "")))
                if fits and fitting is None:
                    fitting = words
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for *cells, words in lines:
                told = (cell.rjust(width) for cell, width in zip(cells, widths, strict=False))
                print("  ".join([*told, words]))
            if memory is not None:
                print(f"\n{verdict(memory, fitting, 1 - SHARE)}")
            for reason in refused:
                print(f"\nfdu erase would refuse these settings: {reason}")

        return work

    def _speed(self, mixed_precision: str) -> tuple[float | None, str]:
        """The speed that the device reaches, if it is known, and what there is to say about it."""
        card = CARDS[self.card] if self.card else None
        if card is None or self.tflops is not None:
            return self.tflops, ""
        if mixed_precision not in card.half:
            half = " or ".join(card.half)
            return None, f"time unknown: the speed of {self.card} is that of --mixed_precision {half}"
        return REACHED * card.tflops, f"at {REACHED:.0%} of the {card.tflops:g} TFLOPS of {self.card}"


@dataclasses.dataclass(frozen=True)
class Stored:
    """How the frozen weights are stored."""

    quantization: str = "none"
    offload: bool = False


def cheaper(config: EraseConfig, stored: Stored, has_blocks: bool = False) -> Iterator[tuple[str, EraseConfig, Stored]]:
    """The settings, and further ones that each need less memory than those before, with their options in words.

    ``has_blocks``: whether the model has blocks to offload.
    """
    yield AS_GIVEN, config, stored
    steps: list[dict[str, Any]] = []
    if not config.gradient_checkpointing:
        steps.append({"gradient_checkpointing": True})
    if config.mixed_precision == "no":
        steps.append({"mixed_precision": "bf16"})
    if config.optimizer == "adamw":
        steps.append({"optimizer": "adamw_8bit"})
    size = config.train_batch_size
    while size > 1:
        size = -(-size // 4)
        steps.append({"train_batch_size": size, "sample_batch_size": min(config.sample_batch_size, size)})
    changes: dict[str, Any] = {}
    for step in steps:
        changes |= step
        yield flags(changes), dataclasses.replace(config, **changes), stored
    method = TRAIN_METHODS[config.train_method]
    if method.result == "weights" or not method.trains:
        return
    smallest = dataclasses.replace(config, **changes)
    if stored.quantization == "none":
        stored = dataclasses.replace(stored, quantization="nf4")
        changes["quantization"] = "nf4"
        yield flags(changes), smallest, stored
    if has_blocks and not stored.offload:
        changes["offload"] = True
        yield flags(changes), smallest, dataclasses.replace(stored, offload=True)


def flags(changes: dict[str, Any]) -> str:
    """Settings as options of the command line.

    >>> flags({"offload": True, "train_batch_size": 1})
    '--offload --train_batch_size 1'
    """
    return " ".join(words_of(changes))


def size(count: float) -> str:
    """Bytes in a readable unit.

    >>> size(3 << 29), size(700)
    ('1.50 GiB', '700 B')
    """
    unit, name = next((unit, name) for unit, name in UNITS if count >= unit or unit == 1)
    return f"{count / unit:.3g} {name}" if unit == 1 else f"{count / unit:.2f} {name}"


def verdict(memory: float, fitting: str | None, free: float) -> str:
    """Whether the erasure fits, in a sentence. ``free``: the share of the memory that it leaves to others."""
    device = f"{memory:g} GiB and leaves {free:.0%} free"
    if fitting is None:
        return f"Nothing above fits in {device}: lower --resolution or --rank, or train fewer weights."
    if fitting == AS_GIVEN:
        return f"This fits in {device}."
    return f"With {fitting}, this fits in {device}."
