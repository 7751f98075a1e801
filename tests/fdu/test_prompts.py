"""Concept sets: those of the package are whole, files of a user are read, and faults are named by line."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import fdu
import fdu.subjects.concept_sets
from fdu.subjects.concept_sets import choose_set, concept_set, concept_sets, prompt_table, set_of_record
from fdu.subjects.digits import pipeline as digits

ANCHORS = {
    "van gogh": ("painting", 5),
    "monet": ("painting", 5),
    "r2d2": ("robot", 4),
    "snoopy": ("dog", 4),
    "grumpy cat": ("cat", 4),
    "nemo": ("fish", 4),
}
"""Anchor and number of hard negatives in the evaluation of concept ablation."""
VERSIONS = {
    "van gogh": ("1 of 2026-11-30", "cc9d3d2a43fd"),
    "monet": ("1 of 2026-11-30", "c16df25e72cd"),
    "r2d2": ("1 of 2026-11-30", "d5715594b603"),
    "snoopy": ("1 of 2026-11-30", "88996fb2410e"),
    "grumpy cat": ("1 of 2026-11-30", "b07f6b0b06c7"),
    "nemo": ("1 of 2026-11-30", "56b1a054117f"),
}
"""Version of each set, and the digest of what it holds: a set that changes gets a new version."""


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


@pytest.mark.parametrize("name", list(ANCHORS))
def test_a_published_set_states_its_version_and_source(name: str) -> None:
    concepts = concept_set(name)
    content = hashlib.sha256(repr(concepts).encode()).hexdigest()[:12]
    version = concepts.origin.split(", version ")[1].partition(" (")[0]
    assert VERSIONS[name] == (version, content)
    assert (
        concepts.origin.startswith(f"concept set {name!r} of fdu, version ") and "arXiv 2303.13516" in concepts.origin
    )
    assert "subjects of fdu, version" in set_of_record(record(("lynx", "cat")), "lynx").origin


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    text = "[target] a\n{}\n[anchor] b\nb\n"
    path = write(tmp_path, text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert concept_set(path).origin == f"mine.txt, SHA-256 {digest}"
    path = write(tmp_path, f"[source] 3\nA diary.\n{text}")
    assert concept_set(path).origin.endswith(", version 3 (A diary.)") and digest not in concept_set(path).origin


def table(tmp_path: Path, text: str) -> Path:
    (tmp_path / "mine.csv").write_text(text)
    return tmp_path / "mine.csv"


def test_a_table_of_prompts_may_have_seeds_and_scales(tmp_path: Path) -> None:
    path = table(
        tmp_path, '\ufeffcase,prompt,sd_seed,sd_guidance_scale\n0,"a cat,\nasleep",3954688283,7\n1,a cat,5.0,7.5\n'
    )
    found = prompt_table(path, "cat", record(("cat", "dog")))
    assert found.target.prompts == ("a cat, asleep", "a cat") and found.anchor.prompts == ("a dog",)
    assert found.seeds == (3954688283, 5) and found.guidance == (7.0, 7.5) and found.generic and found.unrelated
    assert found.without(["street"]).seeds == found.seeds
    plain = choose_set("cat", str(table(tmp_path, "prompt\na cat\n")))
    assert plain.seeds == plain.guidance == () and plain.anchor.name == ""
    assert plain.origin.startswith("1 prompts of mine.csv, SHA-256 ") and str(tmp_path) not in plain.origin
    assert choose_set(None, str(path), record(("cat", ""))).target.name == "cat"
    with pytest.raises(ValueError, match="--target"):
        choose_set(None, str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\na\n", "mine.csv.*no column 'prompt', got text"),
        ("prompt\n", "holds no prompt"),
        ("prompt,evaluation_seed\na,1\n,2\n", "line 3: the prompt is empty"),
        ("prompt,evaluation_seed\na,one\n", "line 2: evaluation_seed must be a whole number.*'one'"),
        ("prompt,evaluation_seed\na,1.5\n", "line 2: evaluation_seed"),
        ("prompt,evaluation_guidance\na,nan\n", "line 2: evaluation_guidance.*'nan'"),
        ("prompt,evaluation_guidance\na\n", "line 2: evaluation_guidance.*None"),
    ],
)
def test_faults_of_a_table_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_table(table(tmp_path, text), "cat")


def test_images_have_the_seeds_and_scales_of_their_prompts() -> None:
    pipeline = digits.load_pipeline()

    def probe(*prompts: str, **own: Any) -> fdu.Probe:
        return fdu.Probe("three", prompts, "target", lambda images: ["three"] * len(images), **own)

    def drawn(one: fdu.Probe, images: int, **settings: Any) -> torch.Tensor:
        return fdu.draw(pipeline, [one], images_per_class=images, num_inference_steps=2, **settings).images[0]

    own = probe("three", "a three in red ink", seeds=(7, 3), guidance=(1.0, 4.0))
    found = drawn(own, 3, batch_size=2, seed=99, guidance_scale=2.0)
    wanted = [("three", 7, 1.0), ("a three in red ink", 3, 4.0), ("three", 8, 1.0)]
    alone = [drawn(probe(prompt), 1, seed=seed, guidance_scale=scale)[0] for prompt, seed, scale in wanted]
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-4, rtol=0)
    assert not torch.allclose(found[0], found[2], atol=1e-2)
    with pytest.raises(ValueError, match="seeds of the class 'three'.*2 prompts, got 1"):
        probe("a", "b", seeds=(1,))
