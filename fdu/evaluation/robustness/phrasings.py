"""Other phrasings of the target: paraphrases, misspellings, other languages, compositions; do they still draw it?

Prompt sets are sections of a text file: a heading such as [paraphrases], then one prompt per line. In a line, ``{}``
is the target's name, and ``{misspelt}`` makes a prompt of every misspelling of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from fdu.concepts import read_lines
from fdu.evaluation.drawing import Judge, JudgedSampling, Probe, seen_by_judge
from fdu.evaluation.intervals import Share
from fdu.models.denoiser import Denoiser

PACKAGED = Path(__file__).with_name("phrasings.txt")
"""The sets that come with fdu. Their names begin with the type of concept: [digit: paraphrases]."""
NAME, MISSPELT = "{}", "{misspelt}"
BESIDE = {
    letter: row[place - 1] if place else row[1]
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for place, letter in enumerate(row)
}
"""The key to the left of a letter's, or to the right at the edge."""
LOOKALIKES = {"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"}

PromptSets = dict[str, tuple[str, ...]]
"""Prompts by the name of their set."""


def read_sets(file: str | Path, target: str, kind: str = "") -> PromptSets:
    """The prompt sets of a file, with the target's name filled in. Prompts before any heading form a set
    named like the file.

    With a ``kind``, the sets are those whose heading begins with "kind: ", under the rest of the heading.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text in UTF-8, or a set has no prompt.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"phrasings {str(file)!r} is not a file; give a text file with one prompt per line, in sections such as "
            "[paraphrases]"
        )
    sets: dict[str, list[str]] = {}
    name = file.stem
    for _, line in read_lines(file):
        if line.startswith("[") and line.endswith("]") and line[1:-1].strip():
            name = line[1:-1].strip()
            sets.setdefault(name, [])
            continue
        words = misspellings(target) if MISSPELT in line else (target,)
        sets.setdefault(name, []).extend(line.replace(MISSPELT, word).replace(NAME, target) for word in words)
    if kind:
        sets = {name.removeprefix(f"{kind}: "): sets[name] for name in sets if name.startswith(f"{kind}: ")}
    empty = [name for name, prompts in sets.items() if not prompts] or ([] if sets else [kind or name])
    if empty:
        raise ValueError(f"phrasings {str(file)!r} has no prompt for the set {empty[0]!r}; write one prompt per line")
    return {name: tuple(dict.fromkeys(prompts)) for name, prompts in sets.items()}


def packaged_sets(kind: str, target: str) -> PromptSets:
    """The prompt sets of fdu for a type of concept: "object", "style", "digit", "ink", "emoji" or "emoji style"."""
    return read_sets(PACKAGED, target, kind)


def misspellings(name: str) -> tuple[str, ...]:
    """The name with one letter left out, doubled, swapped with the next one, mistyped as a neighbouring key, or
    replaced by a digit that looks like it.

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
        slips += [before + keys[letter.lower()] + after for keys in (BESIDE, LOOKALIKES) if letter.lower() in keys]
        # Each letter begins with another kind of slip, so that evenly spread choices hold all kinds.
        turn = number % len(slips)
        found.update(dict.fromkeys(slips[turn:] + slips[:turn]))
    return tuple(slip for slip in found if slip.strip() and slip != name)


@dataclasses.dataclass(frozen=True)
class SetFigures:
    """One prompt set, drawn before and after."""

    before: Share
    """The share of images that show the target, drawn by the pipeline before the erasure. Where it is low, the model
    does not know these words, and the set says little."""
    after: Share
    by_prompt: dict[str, tuple[float, float]]
    """The shares before and after of every prompt that was drawn; the prompts that still draw the target most often
    come first."""

    def __post_init__(self) -> None:
        if not self.by_prompt:
            raise ValueError("by_prompt must hold at least one prompt")


def seen_in_sets(denoiser: Denoiser, sets: PromptSets, judge: Judge, drawing: JudgedSampling) -> dict[str, list[str]]:
    """The judge's answers for the images of each set; the set's :func:`drawn_prompts` take turns."""
    probes = [Probe(name, drawn_prompts(prompts, drawing.images), "unseen", judge) for name, prompts in sets.items()]
    return dict(zip(sets, seen_by_judge(denoiser, probes, drawing, "phrasings"), strict=True))


def drawn_prompts(prompts: Sequence[str], images: int) -> tuple[str, ...]:
    """The prompts of a set for a number of images: all of them, or as many as images, evenly spread over the set.

    >>> drawn_prompts("abcdefgh", 3)
    ('a', 'c', 'f')
    """
    number = min(images, len(prompts))
    return tuple(prompts[place * len(prompts) // number] for place in range(number))


def compare_sets(
    sets: PromptSets, target: str, before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]
) -> dict[str, SetFigures]:
    """The figures of every set from what :func:`seen_in_sets` saw before and after."""
    found = {}
    for name, prompts in sets.items():
        drawn = drawn_prompts(prompts, len(after[name]))
        by_prompt = {}
        for place, prompt in enumerate(drawn):
            sides = [Share.of(seen[name][place :: len(drawn)], target).value for seen in (before, after)]
            by_prompt[prompt] = sides[0], sides[1]
        by_prompt = dict(sorted(by_prompt.items(), key=lambda item: -item[1][1]))
        found[name] = SetFigures(Share.of(before[name], target), Share.of(after[name], target), by_prompt)
    return found
