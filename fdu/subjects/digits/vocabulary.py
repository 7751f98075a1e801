"""The words of the digits pipeline: digits, inks, pencil and their phrasings."""

from __future__ import annotations

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("black", "red", "green", "blue")
NAMES = (*DIGITS, *INKS)
"""What can be erased."""
MEDIA = (*INKS, "pencil")
"""The four inks, and pencil: the medium of most digits whose prompt names no medium."""
UNNAMED_INK = 0.05
"""The share of each ink in the training images whose prompt names no medium; the others are in pencil."""

FRAMES = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "a scan of {}")
DIGIT_NOUNS = ("{}", "a {}", "the digit {}", "the number {}", "a handwritten {}")
GENERIC_NOUNS = ("digit", "a digit", "the digit", "a number", "a handwritten digit")
INK_PHRASES = ("in {} ink", "written in {} ink", "drawn with {} ink")
PENCIL_PHRASES = ("in pencil", "written in pencil", "drawn with pencil")


def medium_phrases(medium: str) -> tuple[str, ...]:
    """Every way the pipeline was taught to name a medium ("red" -> "in red ink", ...)."""
    if medium == "pencil":
        return PENCIL_PHRASES
    return tuple(phrase.format(medium) for phrase in INK_PHRASES)


def all_phrases() -> tuple[str, ...]:
    """The phrases of all media, and the empty one, which names none."""
    return ("", *(phrase for medium in MEDIA for phrase in medium_phrases(medium)))


def prompt(noun: str, frame: str = "a photo of {}", medium_phrase: str = "") -> str:
    """One prompt: ``prompt("the digit three", medium_phrase="in red ink")``."""
    return f"{frame.format(noun)} {medium_phrase}".strip()


def corpus() -> list[str]:
    """Every prompt the pipeline can be given, for the tokenizer's merges."""
    nouns = [noun.format(digit) for noun in DIGIT_NOUNS for digit in DIGITS] + list(GENERIC_NOUNS)
    return [prompt(noun, frame, phrase) for noun in nouns for frame in FRAMES for phrase in all_phrases()]
