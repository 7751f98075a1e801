"""The words of the emoji pipeline: objects with their synonyms and superclasses, styles, backgrounds, and prompts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

STYLES = ("noto", "twemoji", "fluent", "ink")
"""The sets that every object is drawn in; "ink" is the black outline of Fluent's high contrast."""
BACKGROUNDS = ("white", "blue", "green", "yellow", "pink")
"""The colours behind an object; white is that of prompts that name none."""

FRAMES = ("{}", "a picture of {}", "an image of {}", "an emoji of {}", "a drawing of {}", "an icon of {}")
STYLE_PHRASES = ("in {} style", "drawn in {} style", "in the {} style")
BACKGROUND_PHRASES = ("on a {} background", "on {}", "with a {} background")
ADJECTIVES = ("cute", "single")

MANY, HELD_OUT = "(many)", "(held out)"
"""The marks of a name in ``objects.txt``."""
LINE = re.compile(r"([^=;]+)(?:=([^;]+))?(?:;(.+))?")
HEADING = re.compile(r"\[(.+) > (.+)\]")


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object that emoji show."""

    name: str
    icon: str
    """Its name in the packages of emoji."""
    synonyms: tuple[str, ...]
    superclasses: tuple[str, str]
    """What it is in a narrow and in a wide sense: "mammal" and "animal"."""
    held_out: bool
    """Whether only the judge has seen it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its synonyms."""
        return (self.name, *self.synonyms)


def read(text: str) -> tuple[tuple[Thing, ...], frozenset[str]]:
    """The objects that a text in the format of ``objects.txt`` lists, and the names that take no article."""
    things: list[Thing] = []
    many: set[str] = set()
    superclasses = ("", "")

    def plain(name: str) -> str:
        stem = name.replace(MANY, "").replace(HELD_OUT, "").strip()
        if MANY in name:
            many.add(stem)
        return stem

    for line in filter(None, map(str.strip, text.splitlines())):
        heading, entry = HEADING.fullmatch(line), LINE.fullmatch(line)
        if heading:
            superclasses = (plain(heading[2]), plain(heading[1]))
        elif entry and not line.startswith("#"):
            name, icon, synonyms = plain(entry[1]), entry[2], (entry[3] or "").split(",")
            icon = icon.strip() if icon else name.replace(" ", "-")
            names = tuple(plain(word) for word in synonyms if word)
            things.append(Thing(name, icon, names, superclasses, HELD_OUT in entry[1]))
    return tuple(things), frozenset(many)


ALL_THINGS, WITHOUT_ARTICLE = read((Path(__file__).parent / "objects.txt").read_text(encoding="utf-8"))
"""Every object that the judge knows, and the names that take no article, as "grapes" and "food"."""
THINGS = tuple(thing for thing in ALL_THINGS if not thing.held_out)
"""The objects that the pipeline was trained on."""
BY_NAME = {thing.name: thing for thing in ALL_THINGS}
SUPERCLASSES = tuple(dict.fromkeys(thing.superclasses[level] for level in (0, 1) for thing in THINGS))
"""The superclasses, the narrow ones first."""
NAMES = (*(thing.name for thing in THINGS), *SUPERCLASSES, *STYLES)
"""What can be erased."""


def members(superclass: str) -> tuple[Thing, ...]:
    """The trained objects of a superclass."""
    return tuple(thing for thing in THINGS if superclass in thing.superclasses)


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def nouns(name: str) -> tuple[str, ...]:
    """Every way a prompt names an object or a superclass: "a fox", "the fox", "fox", "a cute fox", "a single fox"."""
    described = [name, *(f"{adjective} {name}" for adjective in ADJECTIVES)]
    bare, *others = described if name in WITHOUT_ARTICLE else map(_with_article, described)
    return (bare, f"the {name}", name, *others)


def prompt(noun: str, style: str = "", background: str = "", frame: str = FRAMES[1]) -> str:
    """One prompt of a noun and phrases: ``prompt("a fox", "in ink style", "on a blue background")``."""
    return " ".join(filter(None, (frame.format(noun), style, background)))


def style_phrases(style: str) -> tuple[str, ...]:
    """Every way the pipeline was taught to name a style ("ink" -> "in ink style", ...)."""
    return tuple(phrase.format(style) for phrase in STYLE_PHRASES)


def background_phrases(background: str) -> tuple[str, ...]:
    """Every way the pipeline was taught to name a background ("blue" -> "on a blue background", ...)."""
    return tuple(phrase.format(background) for phrase in BACKGROUND_PHRASES)


def corpus() -> list[str]:
    """Every noun in every frame, with the phrases of styles and backgrounds in turn: the tokenizer's text."""
    names = [*(name for thing in THINGS for name in thing.names), *SUPERCLASSES]
    wanted = [noun for name in names for noun in dict.fromkeys(nouns(name))]
    styles = ["", *(phrase for style in STYLES for phrase in style_phrases(style))]
    backgrounds = ["", *(phrase for background in BACKGROUNDS for phrase in background_phrases(background))]
    texts = (frame.format(noun) for noun in wanted for frame in FRAMES)
    return [
        f"{text} {styles[place % len(styles)]} {backgrounds[place % len(backgrounds)]}".strip()
        for place, text in enumerate(texts)
    ]
