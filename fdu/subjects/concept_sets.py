"""Concept sets: the prompts that judge the erasure of a concept, as text that can be replaced.

    # Lines that begin with # are for the reader.
    [target] van gogh
    a painting of a cornfield in the style of {}
    # Version and source of the set.
    [source] 1 of 2026-11-30
    Neighbours: concept ablation. Phrasings: our own.
    # The target in phrasings that the training never used.
    [unseen]
    {} style, a harbour at dusk
    # The anchor that replaces the target, and against which it is judged.
    [anchor] painting
    a painting of a cornfield
    # Neighbours to retain; without their own prompts they use the target's.
    [near] monet
    [near] salvador dali
    # An everyday subject to retain.
    [generic] street
    a photo of a busy street
    # An unrelated subject to retain.
    [unrelated] violin
    a violin on a chair

A section [source], with a version behind the heading and a line about where the set comes from, is noted in reports
and records; so are the name of a file and the SHA-256 of its content.

``{}`` stands for the name of the class, and an image-text encoder reads that name. A file with neither generic nor
unrelated subjects gets those of the package, except the ones that it names itself. ``prompts.txt`` holds the sets of
the package one after another.

A ``.csv`` file with a column ``prompt``, such as I2P's, holds the target's prompts alone. Each may have its own seed
(``evaluation_seed``, or ``sd_seed``) and guidance scale (``evaluation_guidance``, or ``sd_guidance_scale``).
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fdu.concepts import Concept, read_lines

SHARED = ("generic", "unrelated")
"""The groups that the sets of the package share."""
SECTIONS = ("target", "unseen", "anchor", "near", *SHARED, "source")
HEADING = re.compile(r"\[([^\]]*)\]\s*(.*)")
PROMPT, SEEDS, SCALES = (
    "prompt",
    ("evaluation_seed", "sd_seed"),
    ("evaluation_guidance", "sd_guidance_scale", "sd_guidance"),
)
"""Columns of a table of prompts; of several, the first that is there counts."""
Sections = list[tuple[str, Concept]]
"""The sections of a text in their order: kind, name and prompts as they stand."""


@dataclasses.dataclass(frozen=True)
class ConceptSet:
    """A concept to erase, its anchor, and the classes to retain."""

    target: Concept
    anchor: Concept
    unseen: tuple[str, ...] = ()
    near: tuple[Concept, ...] = ()
    generic: tuple[Concept, ...] = ()
    unrelated: tuple[Concept, ...] = ()
    # Not in repr, by which comparisons tell the prompts of one file from those of another.
    seeds: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    """The seed of each of the target's prompts; empty: as for the other classes."""
    guidance: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    """The guidance scale of each of the target's prompts; empty: as for the other classes."""
    origin: str = dataclasses.field(default="", repr=False)
    """Name, version and source in words, for reports and records."""

    def without(self, names: Iterable[str]) -> ConceptSet:
        """The set without these names among the classes to retain, since they were erased too."""
        gone = {_folded(name) for name in names}
        kept: dict[str, Any] = {
            group: tuple(concept for concept in getattr(self, group) if _folded(concept.name) not in gone)
            for group in ("near", *SHARED)
        }
        return dataclasses.replace(self, **kept)


def concept_sets() -> tuple[str, ...]:
    """The names of the sets in the package: those of concept ablation (Kumari et al. 2023, arXiv 2303.13516)."""
    return tuple(sorted(name for name in _package() if name))


def concept_set(name: str | Path) -> ConceptSet:
    """The set of that name, or in that ``.txt`` file.

    Raises:
        ValueError: neither a name of a set nor a file, or a file that is not UTF-8 or not a set; the message names the
            line or section.
        FileNotFoundError: there is no such file.
    """
    shown = f"concept set {str(name)!r}"
    if str(name).endswith(".txt"):
        return _set_of(_sections(name, shown), shown, _named_file(name))
    folded = _folded(str(name)).replace("_", " ")
    if folded not in concept_sets():
        raise ValueError(f"there is no {shown}; choose one of {', '.join(concept_sets())}, or give a .txt file")
    return _set_of(_package()[folded], shown, f"concept set {folded!r} of fdu")


def prompt_table(path: str | Path, target: str, record: Mapping[str, Any] | None = None) -> ConceptSet:
    """A set with the target's prompts, and perhaps their seeds and guidance scales, from a ``.csv`` file.

    The anchor is that of the record, if it has a name there; everyday and unrelated subjects are those of the package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a table; the message names the line.
    """
    shown = f"prompts {str(path)!r}"
    prompts, seeds, scales = _prompt_rows(Path(path), shown)
    try:
        anchor = set_of_record(record, target).anchor if record else Concept("")
    except ValueError:  # the record knows no name or prompts of an anchor, without which a judge of its own can do
        anchor = Concept("")
    own = [name for name, values in (("seeds", seeds), ("guidance scales", scales)) if values]
    origin = f"{len(prompts)} prompts of {_named_file(path)}" + (f", with their own {' and '.join(own)}" if own else "")
    shared: dict[str, Any] = {group: shared_concepts(group) for group in SHARED}
    found = ConceptSet(Concept(target, prompts), anchor, **shared, seeds=seeds, guidance=scales, origin=origin)
    return found.without([target, anchor.name])


def _prompt_rows(path: Path, shown: str) -> tuple[tuple[str, ...], tuple[int, ...], tuple[float, ...]]:
    """Prompts, seeds and guidance scales of a table; the latter two are empty without a column."""
    if not path.is_file():
        raise FileNotFoundError(f"{shown} does not exist; give a .csv file with a column {PROMPT!r}")
    prompts, seeds, scales = [], [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            header = rows.fieldnames or []
            seed, scale = (next((name for name in names if name in header), None) for names in (SEEDS, SCALES))
            if PROMPT not in header:
                raise ValueError(f"the first line names no column {PROMPT!r}, got {', '.join(header) or 'nothing'}")
            for row in rows:
                try:
                    prompt = " ".join((row[PROMPT] or "").split())
                    if not prompt:
                        raise ValueError("the prompt is empty")
                    prompts.append(prompt)
                    if seed:
                        seeds.append(_number(row[seed], seed, int))
                    if scale:
                        scales.append(_number(row[scale], scale, float))
                except ValueError as error:
                    raise ValueError(f"line {rows.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown} is not text in UTF-8 ({error}); save it as UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{shown}: {error}") from error
    if not prompts:
        raise ValueError(f"{shown} holds no prompt; write one per line below the first")
    return tuple(prompts), tuple(seeds), tuple(scales)


def _number(text: str | None, column: str, kind: type[int] | type[float]) -> Any:
    """A seed or a guidance scale; tables of pandas write whole numbers with a point if a cell is empty."""
    try:
        value = float(text or "")
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 << 63 or (kind is int and not value.is_integer()):
        raise ValueError(f"{column} must be a{' whole' if kind is int else ''} number >= 0, got {text!r}")
    return int(text or "") if kind is int and (text or "").strip().isdecimal() else kind(value)


def _named_file(path: str | Path) -> str:
    """A file by its name, without the folder, and the digest of its content."""
    return f"{Path(path).name}, SHA-256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]}"


def choose_set(
    target: str | None, prompts: str | Path | None = None, record: Mapping[str, Any] | None = None
) -> ConceptSet:
    """The set to judge an erasure by: the one named, else that of the target's name, else the training's prompts.

    Args:
        target: the erased concept; None takes that of ``prompts``.
        prompts: an argument of :func:`concept_set`, if the user named a set.
        record: an argument of :func:`set_of_record`, if there is a record of the training.

    Raises:
        ValueError: ``prompts`` is the set of another target; or there is nothing to judge by.
    """
    if str(prompts).endswith(".csv"):
        erased = [name for name, _ in (record or {}).get("concepts") or ()]
        if target is None and len(erased) != 1:
            raise ValueError(f"target is missing: prompts {str(prompts)!r} does not name what it draws; add --target")
        return prompt_table(str(prompts), target or erased[0], record)
    if prompts is not None:
        found = concept_set(prompts)
        if target is not None and _folded(target) != _folded(found.target.name):
            raise ValueError(
                f"prompts {str(prompts)!r} is the set of {found.target.name!r}, not of {target!r}; name that target, "
                "or another set"
            )
        return found
    if target is None:
        raise ValueError("target is missing; name it, or a concept set")
    if _folded(target) in concept_sets():
        return concept_set(target)
    if record is None:
        raise ValueError(
            f"prompts is missing: there is no concept set {target!r} in the package, and no record of a training; "
            "write a set and give it with --prompts"
        )
    return set_of_record(record, target)


@functools.cache
def _package() -> dict[str, Sections]:
    """The sections of each set of the package by the name of its target; under "" those that all sets share."""
    found: dict[str, Sections] = {}
    target = ""
    for kind, concept in _sections(Path(__file__).parent / "prompts.txt", "prompts.txt"):
        target = concept.name if kind == "target" else target
        found.setdefault(target, []).append((kind, concept))
    return found


def _set_of(sections: Sections, shown: str, origin: str) -> ConceptSet:
    """The set of these sections, with the names filled in; ``shown`` names it in errors, ``origin`` in reports."""
    found = {kind: [concept for own, concept in sections if own == kind] for kind in SECTIONS}
    for kind in ("target", "anchor"):
        if len(found[kind]) != 1:
            raise ValueError(f"{shown} must hold one section [{kind}], got {len(found[kind])}")
    (target,), (anchor,) = found["target"], found["anchor"]
    kept = {group: found[group] for group in ("near", *SHARED)}
    if not any(kept[group] for group in SHARED):
        own = {_folded(concept.name) for concept in (target, anchor, *kept["near"])}
        kept |= {group: [one for one in shared_concepts(group) if _folded(one.name) not in own] for group in SHARED}
    names = [concept.name for concepts in ([target, anchor], *kept.values()) for concept in concepts]
    if not all(names):
        raise ValueError(f"{shown} has a section without a name")
    counts = Counter(map(_folded, names))
    twice = [name for name in names if counts[_folded(name)] > 1]
    if twice:
        raise ValueError(f"{shown} names {twice[0]!r} twice")
    unseen = tuple(prompt.replace("{}", target.name) for section in found["unseen"] for prompt in section.prompts)

    def filled(one: Concept) -> Concept:
        prompts = one.prompts or tuple(prompt for prompt in target.prompts if "{}" in prompt)
        if not prompts:
            raise ValueError(
                f"{shown}: {one.name!r} has no prompts, and those of the target do not hold {{}} to put the name into"
            )
        return Concept(one.name, tuple(prompt.replace("{}", one.name) for prompt in prompts))

    groups: dict[str, Any] = {group: tuple(map(filled, members)) for group, members in kept.items()}
    return ConceptSet(filled(target), filled(anchor), unseen, **groups, origin=origin + _source(sections))


def _source(sections: Sections) -> str:
    """Version and source that the sections state; empty if they state none."""
    return "".join(
        (f", version {one.name}" if one.name else "") + (f" ({' '.join(one.prompts)})" if one.prompts else "")
        for kind, one in sections
        if kind == "source"
    )


def shared_concepts(group: str) -> tuple[Concept, ...]:
    """The everyday ("generic") or "unrelated" subjects of the package."""
    return tuple(
        Concept(one.name, tuple(prompt.replace("{}", one.name) for prompt in one.prompts))
        for kind, one in _package()[""]
        if kind == group
    )


def set_of_record(record: Mapping[str, Any], target: str) -> ConceptSet:
    """A set for what ``fdu erase`` noted: the prompts of the training, and the subjects of the package; no neighbours.

    Args:
        record: as returned by :meth:`fdu.ErasureResult.record`.
        target: which of the erased concepts.

    Raises:
        ValueError: it was not erased, its anchor has no name, of several concepts no prompt names it, or the numbers
            of prompts differ.
    """
    anchors = dict(record.get("concepts") or [[record["target"]["name"], record["anchor"]["name"]]])
    if target not in anchors:
        raise ValueError(f"target {target!r} was not erased; the record names {', '.join(anchors)}")
    sides = [record[side]["prompts"] for side in ("target", "anchor")]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"the record is damaged: {len(sides[0])} prompts of the target and {len(sides[1])} of the anchor; erase "
            "again, or give a concept set with --prompts"
        )
    pairs = list(zip(*sides, strict=True))
    if len(anchors) > 1:
        longer = [name for name in anchors if name != target and _names(name, target)]
        own = [_names(pair[0], target) and not any(_names(pair[0], name) for name in longer) for pair in pairs]
        pairs = list(itertools.compress(pairs, own))
    if not anchors[target] or not pairs:
        what = f"no prompt names {target!r}" if anchors[target] else f"the anchor of {target!r} has no name"
        raise ValueError(f"the record gives nothing to judge by, since {what}; add a concept set with --prompts")
    prompts = [tuple(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1)]
    shared: dict[str, Any] = {group: shared_concepts(group) for group in SHARED}
    ends = Concept(target, prompts[0]), Concept(anchors[target], prompts[1])
    origin = f"prompts of the training; subjects of fdu{_source(_package()[''])}"
    return ConceptSet(*ends, **shared, origin=origin).without([target, anchors[target]])


def _names(text: str, name: str) -> bool:
    """Whether a text holds a name as words of its own."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def _folded(name: str) -> str:
    """A name as names are compared."""
    return name.strip().casefold()


def _sections(path: str | Path, shown: str) -> Sections:
    """The sections of a file."""
    found: list[tuple[str, str, list[str]]] = []
    for number, line in read_lines(path):
        heading = HEADING.fullmatch(line)
        if heading:
            kind = heading[1].strip()
            if kind not in SECTIONS:
                raise ValueError(f"{shown}, line {number}: [{kind}] is not one of {', '.join(SECTIONS)}")
            found.append((kind, heading[2], []))
        elif line.startswith("["):
            raise ValueError(f"{shown}, line {number}: {line!r} lacks the ] of a section, such as [target] name")
        elif not found:
            raise ValueError(f"{shown}, line {number}: a prompt comes before the first section, such as [target] name")
        else:
            found[-1][2].append(line)
    return [(kind, Concept(name, tuple(prompts))) for kind, name, prompts in found]
