"""Fifty erasures: the choice of targets and anchors, and whether what is left or comes back shows on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import many
import pytest
from handmade import CONDITIONS

import fdu
from fdu.comparison.sweep import Records
from fdu.subjects.emoji.emoji_pipeline import relatives


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded to tell whose records these are."""
    monkeypatch.setattr(many, "weights", lambda model: "0123456789abcdef")


def figures(shares: dict[str, float], **more: Any) -> dict[str, Any]:
    names = ("target_accuracy", "unseen_accuracy", "retained_accuracy", "attribute_accuracy", "retained_by_group.near")
    per_class = dict.fromkeys(many.TARGETS, 0.0) | dict.fromkeys(many.ANCHORS, 1.0) | shares
    became = {name: {"wolf": 1 - per_class[name], name: per_class[name]} for name in many.TARGETS}
    return {
        "shares": {name: [0.5, 0.25, 0.75] for name in names},
        "per_class": per_class,
        "became": became,
        "change": 0.0123,
        **more,
        **CONDITIONS,
    }


def page_of(folder: Path, rows: dict[str, dict[str, Any]]) -> str:
    records = Records(folder / "many.jsonl")
    identities = {job.name: job.identity for job in many.jobs(Path())}
    for name, row in rows.items():
        records.found[name] = {"identity": identities[name], **row}
    records.write([])
    many.write_page(folder, folder / "docs")
    return (folder / "docs" / "many.md").read_text()


def test_no_anchor_is_erased_and_all_are_neighbours() -> None:
    assert len(set(many.TARGETS)) == 50 and not {*many.TARGETS} & {*many.ANCHORS}
    for target, anchor in many.PAIRS:
        assert anchor in {one.name for one in relatives(target)}


def test_what_is_left_and_what_comes_back_are_on_the_page(tmp_path: Path) -> None:
    first, second = many.TARGETS[:2]
    gone = dict.fromkeys(many.TARGETS, 0.0)
    page = page_of(tmp_path, {
        "before": figures(dict.fromkeys(many.TARGETS, 1.0)),
        many.SHOWN: figures({first: 0.25}, seconds=31.4),
        "in turn/closed_form seed 1": figures({first: 0.5, second: 1.0}, at_once={**gone, second: 1.0}, seconds=7.0),
    })  # fmt: skip
    (once,) = [line for line in page.splitlines() if line.startswith("| text_encoder, 480 steps | 0 |")]
    assert once.endswith(f"| 1.23 | {first} 25 | 31.4 |") and "50.0 (25.0 to 75.0)" in once
    (turn,) = [line for line in page.splitlines() if line.startswith("| closed_form | 1 |")]
    # The second was never gone, so it does not come back.
    assert turn.endswith(f"| {second} 100, {first} 50 | 7.0 | {first} 50 |")
    assert "| none |" in page and "many/became.svg" in page
    assert f"{first}, itself: 25 %" in (tmp_path / "docs" / "many" / "became.svg").read_text()


def test_the_goals_are_means_over_seeds_and_divergences_are_paired(tmp_path: Path) -> None:
    erased = figures({}, seconds=1.0)
    for name in ("target_accuracy", "unseen_accuracy"):
        erased["shares"][name] = [0.04, 0.0, 0.1]
    worse = {name: 0.2 if place % 2 else 0.4 for place, name in enumerate(many.TARGETS)}
    name = "text_encoder, 480 steps"
    page = page_of(tmp_path, {
        "before": figures(dict.fromkeys(many.TARGETS, 1.0)),
        f"once/{name} seed 0": erased,
        f"once/{name} seed 1": erased,
        f"once/{name}, mse seed 1": {**erased, "per_class": erased["per_class"] | worse},
        "in turn/closed_form seed 0": {**erased, "at_once": dict.fromkeys(many.TARGETS, 0.0)},
        "in turn/closed_form seed 1": {
            **erased,
            "at_once": dict.fromkeys(many.TARGETS, 0.0),
            "per_class": erased["per_class"] | {many.TARGETS[0]: 0.125},
        },
    })  # fmt: skip
    assert f"| {name} | once | 0.0 | 4.0 | 100.0 | yes |" in page
    assert f"| {name}, mse | once | 30.0 | 4.0 | 100.0 | no |" in page
    assert "| closed_form | in turn | 0.1 | 4.0 | 100.0 | no |" in page  # one came back
    assert "| squared_hellinger minus mse | -30.0 (-32.9 to -27.1) | 0.0 (0.0 to 0.0) |" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["closed_form", "text_encoder, 40 steps each"])
def test_erasures_in_turn_build_on_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "IMAGES", 4)
    if "text_encoder" in name:
        few = {"train_method": "text_encoder", "max_train_steps": 20, "learning_rate": 1e-2}
        monkeypatch.setitem(many.IN_TURN, name, few)
    pipeline = fdu.load_pipeline(many.MODEL)
    pairs = (("fox", "wolf"), ("orange", "lemon"))
    told = many.erased_in_turn(pipeline, name, 0, pairs)
    assert set(told["at_once"]) == {"fox", "orange"} and told["seconds"] > 0
    first = many.emoji_pipeline.probes("fox", anchor="wolf")[0]
    (images,) = many.drawn(pipeline, [first]).images
    assert first.judge(images).count("fox") == 0  # the second erasure kept the first
    assert not pipeline.get_active_adapters()


def test_without_records_there_is_no_page(tmp_path: Path) -> None:
    many.write_page(tmp_path, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
