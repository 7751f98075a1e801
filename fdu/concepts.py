"""Concepts as prompts: the prompts of the target, and those of the anchor that replaces it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fdu.config import Positive, check_number

ConceptType = Literal["object", "style"]

OBJECT_TEMPLATES = (
    "{}",
    "a {}",
    "a photo of {}",
    "a photo of a {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
)
"""Phrasings of an object; target and anchor are put into the same ones."""

STYLE_TEMPLATES = (
    "{anchor} in the style of {target}",
    "a {anchor} of a house in the style of {target}",
    "a {anchor} of a tree, in the style of {target}",
    "a {anchor} of a woman by {target}",
    "a {anchor} of a city street by {target}",
    "a {anchor} of a bowl of fruit, {target} style",
)
"""Phrasings of a style; the anchor's prompt is each phrasing without the style."""


@dataclasses.dataclass(frozen=True)
class Concept:
    """A concept: the name shown in reports, and its prompts. Without prompts, the name is put into templates."""

    name: str
    prompts: tuple[str, ...] = ()
    weight: float = dataclasses.field(default=1.0, repr=False)
    """How much a target counts beside the others that are erased with it, > 0; of an anchor it means nothing."""

    def __post_init__(self) -> None:
        check_number("weight", self.weight, Positive)

    @classmethod
    def from_file(cls, path: str | Path) -> Concept:
        """Read a text file with one prompt per line; empty lines and lines that start with # are skipped.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it holds no prompt, or is not UTF-8.
        """
        path = Path(path)
        prompts = tuple(line for _, line in read_lines(path))
        if not prompts:
            raise ValueError(f"concept file {str(path)!r} holds no prompt; write one prompt per line")
        return cls(path.stem, prompts)


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a text file with their numbers; empty lines and lines that start with # are skipped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"concept file {str(path)!r} does not exist; a name ending in .txt means a file of prompts"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"concept file {str(path)!r} is not text in UTF-8 ({error}); save it as UTF-8") from error
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


ConceptLike = str | Concept | Sequence[str]
"""A name, a ``.txt`` file of prompts, a :class:`Concept`, or prompts."""
Pair = tuple[Concept, Concept]
"""A target and its anchor, with prompts aligned one to one."""


def concept_pairs(
    target: ConceptLike | Sequence[Concept],
    anchor: ConceptLike | Sequence[Concept],
    concept_type: ConceptType | Sequence[ConceptType] = "object",
) -> tuple[Pair, ...]:
    """Each target with its anchor, their prompts aligned one to one.

    Args:
        target: the concept to erase: a name ("van gogh", put into the templates of ``concept_type``), a ``.txt`` file
            of prompts, a :class:`Concept`, a sequence of prompts, or a sequence of :class:`Concept` for several.
        anchor: the concept that replaces it, in the same forms. One serves all targets; a single prompt pairs with all
            prompts of a target.
        concept_type: "object" puts both names into the same phrasings; "style" uses the anchor ("painting") with and
            without the target's style. One for all targets, or a sequence, one per target.

    Raises:
        ValueError: numbers of concepts that do not match, a concept given twice, an empty concept, equal concepts, or
            prompts that do not pair.
        FileNotFoundError: a concept file does not exist.
    """
    targets: list[Any] = _several(target) or [target]
    anchors: list[Any] = _several(anchor) or [anchor] * len(targets)
    types = [concept_type] * len(targets) if isinstance(concept_type, str) else list(concept_type)
    for argument, given in (("anchor", anchors), ("concept_type", types)):
        if len(given) != len(targets):
            raise ValueError(
                f"target holds {len(targets)} concepts but {argument} {len(given)}; give one per target, or one for all"
            )
    pairs = tuple(_pair(*trio) for trio in zip(targets, anchors, types, strict=True))
    names = [pair[0].name for pair in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"target names {twice[0]!r} twice; remove one")
    return tuple((target, _away_from(pairs, anchor)) for target, anchor in pairs)


def _away_from(pairs: Sequence[Pair], anchor: Concept) -> Concept:
    """The anchor, with each prompt that another concept erases, or that names it, replaced by that one's anchor.

    With three towards eight and red towards black, "a three in red" becomes "an eight in black" either way. A name
    within an anchor's name is left alone: "a hot dog" stays, with dog towards wolf.
    """
    leads = {prompt: other for target, end in pairs for prompt, other in zip(target.prompts, end.prompts, strict=True)}

    ends = {end.name: end.name for _, end in pairs}
    names = {name: end for name, end in {**ends, **{target.name: end.name for target, end in pairs}}.items() if end}
    longest_first = sorted(names, key=len, reverse=True)
    named = re.compile(r"\b(?:(an?) )?(" + "|".join(map(re.escape, longest_first)) + r")\b")

    def rename(found: re.Match[str]) -> str:
        name = names[found[2]]
        if not found[1] or name == found[2]:
            return found[0].replace(found[2], name)
        return f"{'an' if _VOWEL.match(name) else 'a'} {name}"

    def renamed(prompt: str) -> str:
        return named.sub(rename, prompt) if longest_first else prompt

    def follow(prompt: str) -> str:
        seen = [prompt]
        while (following := leads.get(seen[-1], renamed(seen[-1]))) != seen[-1]:
            seen.append(following)
            if following in seen[:-1]:
                circle = " -> ".join(map(repr, seen))
                raise ValueError(f"the anchors form a cycle: {circle}; choose a different anchor for one of them")
        return seen[-1]

    return anchor if len(pairs) == 1 else Concept(anchor.name, tuple(follow(prompt) for prompt in anchor.prompts))


def joined(concepts: Sequence[Concept]) -> Concept:
    """Several concepts merged into one, for records and reports."""
    prompts = tuple(prompt for concept in concepts for prompt in concept.prompts)
    return Concept(", ".join(concept.name for concept in concepts), prompts)


def weighted(pairs: Sequence[Pair], weights: Sequence[float]) -> tuple[Pair, ...]:
    """The pairs with weights for their targets; none for those that they have.

    Raises:
        ValueError: not one per target, or a number that is no weight.
    """
    if weights and len(weights) != len(pairs):
        raise ValueError(f"weights must be one per target, {len(pairs)} in all; got {len(weights)}")
    given = weights or [target.weight for target, _ in pairs]
    return tuple((dataclasses.replace(one, weight=own), other) for (one, other), own in zip(pairs, given, strict=True))


def weights_of(pairs: Sequence[Pair]) -> list[float] | None:
    """The weights of the targets; None if all count the same."""
    weights = [target.weight for target, _ in pairs]
    return weights if len(set(weights)) > 1 else None


def read_concepts(names: Sequence[str | Concept]) -> ConceptLike | list[Concept]:
    """The concepts of a command line: one name, ``.txt`` file or concept of a table, or several."""
    if len(names) == 1:
        return names[0]
    return [
        one if isinstance(one, Concept) else Concept.from_file(one) if one.endswith(".txt") else Concept(one.strip())
        for one in names
    ]


def has_prompts(names: Sequence[str | Concept]) -> bool:
    """Whether some of these are prompts, of which a pipeline of fdu cannot know the meaning, and not names."""
    return any(one.prompts if isinstance(one, Concept) else one.endswith(".txt") for one in names)


def _several(value: ConceptLike | Sequence[Concept]) -> list[Concept]:
    """The concepts in a sequence of concepts; empty for anything else."""
    if isinstance(value, (str, Concept)) or not isinstance(value, Sequence):
        return []
    concepts = [concept for concept in value if isinstance(concept, Concept)]
    return concepts if len(concepts) == len(value) else []


def _pair(target: ConceptLike, anchor: ConceptLike, concept_type: ConceptType) -> Pair:
    """One target and its anchor."""
    if concept_type not in ("object", "style"):
        raise ValueError(f"concept_type must be 'object' or 'style', got {concept_type!r}")
    named_target, named_anchor = _read("target", target), _read("anchor", anchor)
    if not named_target.name:
        raise ValueError("target is empty; name the concept to erase, for example target='van gogh'")
    if named_target.name.casefold() == named_anchor.name.casefold() and named_target.prompts == named_anchor.prompts:
        raise ValueError(
            f"target and anchor are the same, {named_target.name!r}, so there is nothing to erase; "
            "choose another anchor, such as a superclass"
        )
    if not named_target.prompts:
        named_target, named_anchor = _expand(named_target, named_anchor, concept_type)
    elif not named_anchor.prompts:
        named_anchor = Concept(named_anchor.name, (named_anchor.name,))
    if len(named_anchor.prompts) == 1:
        named_anchor = Concept(named_anchor.name, named_anchor.prompts * len(named_target.prompts))
    if len(named_anchor.prompts) != len(named_target.prompts):
        raise ValueError(
            f"target has {len(named_target.prompts)} prompts but anchor has {len(named_anchor.prompts)}; "
            "give one anchor prompt per target prompt, in the same order, or a single one for all"
        )
    same = [prompt for prompt, other in zip(named_target.prompts, named_anchor.prompts, strict=True) if prompt == other]
    if same:
        raise ValueError(
            f"target and anchor share the prompt {same[0]!r}, so it has nothing to erase; change one of them"
        )
    return named_target, named_anchor


def _read(argument: str, value: ConceptLike) -> Concept:
    """A concept, its prompts still empty where only a name was given."""
    if isinstance(value, Concept):
        if not value.prompts:
            return dataclasses.replace(value, name=value.name.strip())
        concept = value
    elif isinstance(value, str):
        return Concept.from_file(value) if value.endswith(".txt") else Concept(value.strip(), ())
    elif isinstance(value, Sequence) and all(isinstance(prompt, str) for prompt in value):
        concept = Concept(value[0] if value else "", tuple(value))
    else:
        raise TypeError(
            f"{argument} must be a name, a .txt file, a Concept or a sequence of prompts, got {type(value).__name__}"
        )
    if not concept.prompts or not all(prompt.strip() for prompt in concept.prompts if argument == "target"):
        raise ValueError(f"{argument} has no prompt or an empty one; give a name or prompts")
    return concept


def _expand(target: Concept, anchor: Concept, concept_type: ConceptType) -> Pair:
    """Put the target's name into the templates, and the anchor's if it has no prompts."""
    if concept_type == "object":
        prompts = tuple(_with_article(template, target.name).format(target.name) for template in OBJECT_TEMPLATES)
        named = tuple(_with_article(template, anchor.name).format(anchor.name) for template in OBJECT_TEMPLATES)
        anchors = named if anchor.name else ("",)
    else:
        base = anchor.name or "picture"
        templates = [_with_article(template, base) for template in STYLE_TEMPLATES]
        prompts = tuple(template.format(anchor=base, target=target.name) for template in templates)
        anchors = tuple(_NAMED_STYLE.sub("", template).format(anchor=base) for template in templates)
    return dataclasses.replace(target, prompts=prompts), Concept(anchor.name, anchor.prompts or anchors)


_NAMED_STYLE = re.compile(r",? (in the style of \{target\}|by \{target\}|\{target\} style)$")
"""The end of a style template, which names the style."""
_VOWEL = re.compile(r"(?!uni[^mn]|us[eu]|uk[ue]|eu|ewe|one\b|once)[aeiou]|hour|honest|heir", re.IGNORECASE)


def _with_article(template: str, name: str) -> str:
    """The template with "an" for "a" before a name that begins with a vowel as it is spoken."""
    return re.sub(r"\ba (?=\{(?:anchor)?\})", "an ", template) if _VOWEL.match(name) else template
