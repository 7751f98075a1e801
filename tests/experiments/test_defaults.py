"""The choice of the defaults: the rule, and that its page says what hand-made records say."""

from __future__ import annotations

from pathlib import Path

import defaults
import pytest
from experiment import Suite
from handmade import Seen, write_records

from fdu.comparison import runs as runs_file
from fdu.comparison.plan import Run
from fdu.comparison.sweep import Records
from fdu.config import EraseConfig

RESULTS = Path(defaults.__file__).parent / "results"
SUITES = [one for model in defaults.SEEN for one in defaults.suites(model).values()]


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_file, "weights", lambda *model: "0123456789abcdef")


def chosen(folder: Path, **figures: Seen) -> str:
    """What the rule chooses, in words, if runs have these figures; all others are as the former defaults."""
    path = folder / "defaults.jsonl"
    write_records(
        path, SUITES, lambda suite, run: figures.get(defaults.words(run.candidate), Seen(0.95, 1.0, 0.04, 0.9))
    )
    found = [defaults.suites(model)["finalists"].results(Records(path)) for model in defaults.SEEN]
    return defaults.words(defaults.choose([one for one in found if one is not None]))


def test_the_defaults_are_the_choice() -> None:
    assert {name: EraseConfig().as_dict()[name] for name in defaults.CHOSEN} == defaults.CHOSEN
    assert defaults.CHOSEN in defaults.FINALISTS


def test_the_rule_chooses_them_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    records = Records(RESULTS / "defaults.jsonl")
    found = [defaults.suites(model)["finalists"].results(records) for model in defaults.SEEN]
    assert defaults.choose([one for one in found if one is not None]) == defaults.candidate(defaults.CHOSEN)


def test_targets_of_the_confirmation_are_new() -> None:
    for model in defaults.SEEN:
        assert not {pair[0] for pair in defaults.SEEN[model]} & {pair[0] for pair in defaults.HELD_OUT[model]}


def test_among_equals_the_smallest_change_is_chosen(tmp_path: Path) -> None:
    assert chosen(tmp_path, **{"s0 10.0": Seen(0.95, 1.0, 0.03, 0.9)}) == "s0 10.0"


def test_attributes_count_more_than_change(tmp_path: Path) -> None:
    figures = {"s0 10.0": Seen(0.95, 1.0, 0.01, 0.8), "learning_rate 0.004": Seen(0.95, 1.0, 0.06, 1.0)}
    assert chosen(tmp_path, **figures) == "learning_rate 0.004"


def test_what_erases_less_of_a_target_is_not_chosen(tmp_path: Path) -> None:
    assert chosen(tmp_path, **{"s0 10.0": Seen(0.9, 1.0, 0.0, 1.0)}) != "s0 10.0"
    assert chosen(tmp_path, **{"s0 10.0": Seen(0.94, 1.0, 0.0, 1.0)}) == "s0 10.0"  # within the tolerance


def test_the_page_shows_differences_to_the_former_defaults(tmp_path: Path) -> None:
    def figures(suite: Suite, run: Run) -> Seen:
        return Seen(0.9, 1.0, 0.02) if defaults.words(run.candidate) == "rank 4" else Seen(0.5, 1.0, 0.04)

    write_records(tmp_path / "defaults.jsonl", SUITES, figures)
    defaults.write_page(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "defaults.md").read_text()
    assert page.count("| former defaults | 50.0 (") == 6 and page.count("| rank 4 | 40.0 (") == 2
    assert f"(all {len({(one.name, run.name) for one in SUITES for run in one.comparison.runs()})} runs;" in page


def test_without_a_round_there_is_no_page(tmp_path: Path) -> None:
    write_records(tmp_path / "defaults.jsonl", SUITES, lambda suite, run: None if suite.name == "digits" else Seen(0.5))
    defaults.write_page(tmp_path, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
