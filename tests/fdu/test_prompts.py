"""Concept sets: those of the package are whole, files of a user are read, and faults are named by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fdu.subjects.concept_sets
from fdu.subjects.concept_sets import concept_set, concept_sets, set_of_record

ANCHORS = {
    "van gogh": ("painting", 5),
    "monet": ("painting", 5),
    "r2d2": ("robot", 4),
    "snoopy": ("dog", 4),
    "grumpy cat": ("cat", 4),
    "nemo": ("fish", 4),
}
"""Anchor and number of hard negatives in the evaluation of concept ablation."""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    return path


def test_the_published_sets_are_there() -> None:
    assert set(concept_sets()) == set(ANCHORS)


@pytest.mark.parametrize("name", list(ANCHORS))
def test_a_published_set(name: str) -> None:
    concepts = concept_set(name)
    assert concepts.target.name == name
    assert (concepts.anchor.name, len(concepts.near)) == ANCHORS[name]
    assert concepts.unseen and len(concepts.generic) >= 3 and len(concepts.unrelated) >= 3
    assert len(concepts.anchor.prompts) == len(concepts.target.prompts)
    kept = [*concepts.near, *concepts.generic, *concepts.unrelated]
    for concept in (concepts.target, *kept):
        assert all(concept.name in prompt and "{}" not in prompt for prompt in concept.prompts)
    for concept in (concepts.anchor, *kept):
        assert not any(name in prompt for prompt in concept.prompts)
    assert not set(concepts.unseen) & set(concepts.target.prompts)
    assert not any("{}" in prompt for prompt in concepts.unseen)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "# mine\n[target] my cat\na photo of {}\nmy cat asleep\n\n[unseen]\nhere comes {}\n"
        "[anchor] cat\na photo of a cat\n"
        "[near] your cat\n[near] tiger\na tiger, striped\n[unrelated] tea\na cup of {}\n",
    )
    concepts = concept_set(path)
    assert concepts.target.prompts == ("a photo of my cat", "my cat asleep")
    assert concepts.unseen == ("here comes my cat",)
    assert [concept.prompts for concept in concepts.near] == [("a photo of your cat",), ("a tiger, striped",)]
    assert [concept.prompts for concept in concepts.unrelated] == [("a cup of tea",)]
    assert concepts.generic == ()


def test_a_file_without_subjects_gets_those_of_the_package(tmp_path: Path) -> None:
    concepts = concept_set(write(tmp_path, "[target] a\n{}\n[anchor] b\nb\n"))
    assert concepts.generic == concept_set("monet").generic and concepts.unrelated == concept_set("monet").unrelated


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a photo\n", "line 1: .*before.*first section"),
        ("[target] a\n{}\n[anker] b\n", r"line 3: \[anker\].*not one.*target, unseen"),
        ("[target] a\n{}\n[un-related] b\n", r"line 3: \[un-related\].*not one.*target, unseen"),
        ("[target] a\n{}\n[near b\n", r"line 3: '\[near b' lacks the \]"),
        ("[target] a\n{}\n", r"must hold one section \[anchor\], got 0"),
        ("[target] a\n{}\n[target] c\n{}\n[anchor] b\nb\n", r"must hold one section \[target\], got 2"),
        ("[target] a\n{}\n[anchor] b\nb\n[near]\nc\n", "a section without a name"),
        ("[target] a\n{}\n[anchor] b\nb\n[near] c\n[generic] c\n", "names 'c' twice"),
        ("[target] a\none\n[anchor] b\nb\n[near] c\n", "'c' has no prompts"),
    ],
)
def test_faults_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        concept_set(write(tmp_path, text))


def test_an_unknown_set() -> None:
    with pytest.raises(ValueError, match="no concept set 'van go'; choose one.*grumpy cat, monet"):
        concept_set("van go")
    with pytest.raises(FileNotFoundError, match=r"'gone\.txt'.*not exist"):
        concept_set("gone.txt")


def record(*names: tuple[str, str]) -> dict[str, Any]:
    return {
        "target": {"name": ", ".join(one for one, _ in names), "prompts": [f"a {one}" for one, _ in names] * 2},
        "anchor": {"name": ", ".join(one for _, one in names), "prompts": [f"a {one}" for _, one in names] * 2},
        "concepts": [list(pair) for pair in names],
    }


def test_the_record_of_an_erasure_gives_a_set() -> None:
    one = set_of_record(record(("lynx", "cat")), "lynx")
    assert (one.target.prompts, one.anchor.prompts, one.near) == (("a lynx",), ("a cat",), ())
    assert one.generic and one.unrelated
    two = set_of_record(record(("lynx", "cat"), ("wolf", "dog")), "wolf")
    assert (two.target.prompts, two.anchor.name, two.anchor.prompts) == (("a wolf",), "dog", ("a dog",))


def test_names_within_names_and_names_in_capitals_are_told_apart() -> None:
    both = record(("cat", "lynx"), ("grumpy cat", "dog"))
    assert set_of_record(both, "cat").target.prompts == ("a cat",)
    assert set_of_record(both, "cat").anchor.prompts == ("a lynx",)
    assert set_of_record(both, "grumpy cat").target.prompts == ("a grumpy cat",)
    assert "street" not in {one.name for one in set_of_record(record(("Street", "road")), "Street").generic}


def test_a_record_that_gives_none() -> None:
    with pytest.raises(ValueError, match="'fox'.*not erased.*record names lynx"):
        set_of_record(record(("lynx", "cat")), "fox")
    with pytest.raises(ValueError, match="the anchor.*'lynx'.*no name; add.*concept set.*--prompts"):
        set_of_record(record(("lynx", "")), "lynx")
    damaged = record(("lynx", "cat"))
    damaged["anchor"]["prompts"].pop()
    with pytest.raises(ValueError, match="the record.*damaged: 2 prompts.*target.*1.*anchor"):
        set_of_record(damaged, "lynx")


def test_what_was_erased_as_well_is_not_to_be_kept() -> None:
    concepts = concept_set("van gogh")
    left = concepts.without(["van gogh", " Monet", "STREET"])
    assert (left.target, left.anchor, left.unseen) == (concepts.target, concepts.anchor, concepts.unseen)
    assert [one.name for one in left.near] == [one.name for one in concepts.near if one.name != "monet"]
    assert {one.name for one in concepts.generic} - {one.name for one in left.generic} == {"street"}
    assert left.unrelated == concepts.unrelated


def test_the_documented_form_is_read_as_it_stands(tmp_path: Path) -> None:
    lines = [line[4:] for line in (fdu.subjects.concept_sets.__doc__ or "").splitlines() if line.startswith("    ")]
    concepts = concept_set(write(tmp_path, "\n".join(lines)))
    assert (concepts.target.name, concepts.anchor.name) == ("van gogh", "painting")
    assert [one.name for one in concepts.near] == ["monet", "salvador dali"]
    assert concepts.near[0].prompts == ("a painting of a cornfield in the style of monet",)
    assert concepts.unseen == ("van gogh style, a harbour at dusk",)
    assert [one.name for one in (*concepts.generic, *concepts.unrelated)] == ["street", "violin"]


def test_headings_may_hold_spaces(tmp_path: Path) -> None:
    concepts = concept_set(write(tmp_path, "[target ] a\n{}\n[ anchor] b\nb\n[near ] c\n"))
    assert [one.name for one in concepts.near] == ["c"] and concepts.target.prompts == ("a",)


@pytest.mark.parametrize("anchor", ["woman", "Woman"])
def test_a_shared_subject_can_be_anchor_or_neighbour(anchor: str, tmp_path: Path) -> None:
    text = f"[target] taylor swift\na photo of {{}}\n[anchor] {anchor}\na photo of a woman\n[near] violin\n"
    concepts = concept_set(write(tmp_path, text))
    names = [one.name for one in (*concepts.generic, *concepts.unrelated)]
    assert "woman" not in names and "violin" not in names and "house" in names
