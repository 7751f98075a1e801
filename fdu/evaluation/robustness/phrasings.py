"""Other phrasings of the target: paraphrases, misspellings, other languages, compositions; do they still draw it?

A prompt set is a text file of one prompt a line. In a line, ``{}`` stands for the target's name, and ``{misspelt}``
makes a prompt of every misspelling of it. A folder of such files, each a set of its own name, can take the place of
those that come with fdu.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdu.concepts import Concept
from fdu.evaluation import JUDGED_SEED, Judge, Probe, draw
from fdu.evaluation.robustness.judging import Conditioned, JudgedSampling
from fdu.evaluation.robustness.shares import Share
from fdu.models.denoiser import Denoiser

SETS = Path(__file__).parent / "prompts"
"""The folders of sets that come with fdu, by type of concept."""
NAME, MISSPELT = "{}", "{misspelt}"
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LOOKALIKES = {"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"}

PromptSets = dict[str, tuple[str, ...]]
"""Prompts by the name of their set."""


def read_sets(folder: str | Path, target: str) -> PromptSets:
    """The prompt sets of a folder, with the target's name in them.

    Raises:
        FileNotFoundError: there is no such folder, or no .txt file in it.
        ValueError: a file is not text in UTF-8, or holds no prompt.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"prompt sets {str(folder)!r}: no folder with .txt files; write one prompt per line")
    return {file.stem: _read(file, target) for file in files}


def _read(file: Path, target: str) -> tuple[str, ...]:
    prompts: list[str] = []
    for line in Concept.from_file(file).prompts:
        names = misspellings(target) if MISSPELT in line else (target,)
        prompts += [line.replace(MISSPELT, name).replace(NAME, target) for name in names]
    return tuple(dict.fromkeys(prompts))


def misspellings(name: str) -> tuple[str, ...]:
    """Slips of the hand and of the wilful: each word in turn with a letter left out, doubled, exchanged with the next,
    hit beside its key, or replaced by a digit that looks like it.

    >>> misspellings("one")
    ('ne', 'oone', 'noe', 'ine', '0ne', 'onne', 'oen', 'obe', 'oe', 'onw', 'on3', 'on', 'onee')
    """
    found: dict[str, None] = {}
    letters = [(place, letter) for place, letter in enumerate(name) if letter.isalpha()]
    for number, (place, letter) in enumerate(letters):
        before, after = name[:place], name[place + 1 :]
        slips = [before + after, before + 2 * letter + after]
        if after[:1].isalpha() and after[0] != letter:
            slips.append(before + after[0] + letter + after[1:])
        slips += [before + wrong + after for wrong in (_beside(letter), LOOKALIKES.get(letter.lower())) if wrong]
        # Each letter begins with another kind of slip: an even choice among them all is of all kinds then.
        turn = number % len(slips)
        found.update(dict.fromkeys(slips[turn:] + slips[:turn]))
    return tuple(slip for slip in found if slip.strip() and slip != name)


def _beside(letter: str) -> str | None:
    """The key to the left of a letter's, or to the right at the edge; None for letters of other keyboards."""
    for row in KEYBOARD:
        place = row.find(letter.lower())
        if place >= 0:
            return row[place - 1] if place else row[1]
    return None


@dataclasses.dataclass(frozen=True)
class SetFigures:
    """One prompt set, drawn before and after."""

    before: Share
    """The share of images that show the target, drawn by the pipeline before the erasure. Where it is low, the model
    does not know these words, and the set says little."""
    after: Share
    by_prompt: dict[str, tuple[float, float]]
    """The shares before and after of every prompt that was drawn, those that still draw the target most first."""

    def __post_init__(self) -> None:
        if not self.by_prompt:
            raise ValueError("by_prompt must hold at least one prompt")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def seen_in_sets(denoiser: Denoiser, sets: PromptSets, judge: Judge, drawing: JudgedSampling) -> dict[str, list[str]]:
    """What a judge sees in the images of each set, which its :func:`drawn_prompts` take in turn."""
    probes = [Probe(name, drawn_prompts(prompts, drawing.images), "unseen", judge) for name, prompts in sets.items()]
    drawn = draw(
        Conditioned(denoiser),
        probes,
        drawing.images,
        drawing.seed + JUDGED_SEED,
        **drawing.settings(),
        description="phrasings",
    )
    return {probe.name: judge(images) for probe, images in zip(probes, drawn.images, strict=True)}


def drawn_prompts(prompts: Sequence[str], images: int) -> tuple[str, ...]:
    """The prompts of a set that so many images are drawn of: all, or as many as images, evenly spread over the set.

    >>> drawn_prompts("abcdefgh", 3)
    ('a', 'c', 'f')
    """
    number = min(images, len(prompts))
    return tuple(prompts[place * len(prompts) // number] for place in range(number))


def compare_sets(
    sets: PromptSets, target: str, before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]
) -> dict[str, SetFigures]:
    """The figures of every set from what was seen in its images before and after.

    Raises:
        ValueError: before and after do not hold the same sets and numbers of images.
    """
    counts = [{name: len(seen.get(name, ())) for name in sets} for seen in (before, after)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"before and after must hold the same number of images per set, got {counts[0]} and {counts[1]}"
        )
    return {name: _compare(prompts, target, before[name], after[name]) for name, prompts in sets.items()}


def _compare(prompts: Sequence[str], target: str, before: Sequence[str], after: Sequence[str]) -> SetFigures:
    drawn = drawn_prompts(prompts, len(after))
    shares = {}
    for place, prompt in enumerate(drawn):
        own = [seen[place :: len(drawn)] for seen in (before, after)]
        shares[prompt] = tuple(sum(one == target for one in seen) / len(seen) for seen in own)
    ordered = sorted(shares, key=lambda prompt: -shares[prompt][1])
    by_prompt = {prompt: (shares[prompt][0], shares[prompt][1]) for prompt in ordered}
    return SetFigures(Share.of(before, target), Share.of(after, target), by_prompt)
