"""What holds: steps of relearning between two looks, and which goals an erasure reaches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import experiment
import pytest
import robustness

from fdu.comparison.sweep import Records

RESULTS = experiment.HERE / "results"


def share(value: float) -> dict[str, Any]:
    return {"value": value, "images": 32, "interval": (0.0, 1.0)}


def row(back: tuple[float, ...], retained: float = 0.9, **attacks: float) -> dict[str, Any]:
    """An examined erasure: shares with the target after 0, 10, 20, 40 and 80 steps, and what attacks reach."""
    reached = {"words": 0.0, "inversion": 0.0, "partial_noise": 0.0, "inpainting": 0.0, "attack": 0.0} | attacks
    course = [[step, share(value)] for step, value in zip((0, 10, 20, 40, 80), back, strict=True)]
    others = {name: {"after": share(value)} for name, value in reached.items() if name != "attack"}
    return {
        "retained": retained,
        "attack": {"after": share(reached["attack"])},
        "relearning": {"course": course, "drawn_before": 1.0},
        "others": others,
    }


def test_steps_of_relearning_lie_between_two_looks() -> None:
    assert robustness.back_at(row((0.0, 0.25, 0.75, 1.0, 1.0))) == pytest.approx(15)
    assert robustness.back_at(row((0.6, 0.6, 0.6, 0.6, 0.6))) == 0
    assert robustness.back_at(row((0.0, 0.0, 0.0, 0.0, 0.4))) == math.inf
    assert robustness.steps_back(row((0.0, 0.0, 0.0, 0.0, 0.4))) == "> 80"


def test_the_goals_compare_with_what_was_never_known_and_with_the_plain_erasure() -> None:
    aim = robustness.FOX
    erasures = {
        "lora": row((0.0, 0.5, 1.0, 1.0, 1.0), inversion=0.9),
        "full": row((0.0, 0.0, 0.0, 0.5, 1.0), words=0.15, attack=0.9),
        "token": row((0.0, 0.0, 0.0, 0.0, 0.0), retained=0.84, inpainting=0.17),
    }
    rows = {
        robustness.KEPT_BEFORE.format(aim.target, aim.anchor): {"retained": 0.9},
        robustness.NEVER_KNOWN.format("zebra"): row((0.0,) * 5, words=0.05),
        robustness.NEVER_KNOWN.format("koala"): row((0.0,) * 5, inpainting=0.06),
        **erasures,
    }
    lines = {line.split(" | ")[0]: line.split(" | ") for line in robustness.goals(rows).splitlines()}
    assert lines["| lora"][1:] == ["-0.05", "+0.90", "+0.00", "-0.06", "+0.00", "1.00", "10 (1.00)", "retained |"]
    # 0.15 is 0.1 above 0.05, which is still allowed; the attack that its searches use is no goal.
    assert lines["| full"][5:] == ["+0.90", "1.00", "40 (4.00)", "attacks, retained, relearning |"]
    assert lines["| token"][4:] == ["+0.11", "+0.00", "0.93", "> 80 (> 8.00)", "relearning |"]
    assert robustness.best(rows) == "This reaches all three for the fox: full."
    del rows["lora"]
    assert robustness.goals(rows) == "" and robustness.best(rows) == robustness.NOT_MEASURED


def test_before_they_are_measured_nothing_is_claimed() -> None:
    erasures = {"lora": row((0.0, 0.5, 1.0, 1.0, 1.0))}
    (line,) = robustness.goals(erasures).splitlines()[2:]
    assert line.endswith("| none |")


def test_every_row_on_robustness_shows_its_figures_and_a_missing_row_is_counted() -> None:
    found = Records(RESULTS / "robustness.jsonl").found
    foxes = [robustness.NOT_ERASED, *map(robustness.NEVER_KNOWN.format, ("zebra", "koala")), *robustness.ERASURES]
    rows = {name: found[name] for name in foxes if name in found}
    rows["lora"] = {**rows["not erased"], "retained": 0.25}
    rows["lora"]["attack"] = {**rows["lora"]["attack"], "back_after": None}
    page = robustness.page(rows)
    for name, row in rows.items():
        line, others = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert f"{row['others']['inpainting']['after']['value']:.2f} (" in others
        assert f"{row['attack']['after']['value']:.2f} (" in line
        assert ("| never |" in line and "| 0.25 |" in line) or name != "lora"
    page = robustness.page({name: row for name, row in rows.items() if not name.startswith("never known")})
    assert 'The rows "never known" are not measured yet.' in page


def test_means_over_targets_and_seeds_are_shown_once_all_are_there() -> None:
    whole = Records(RESULTS / "robustness.jsonl").found["not erased"]
    names = {row.name for row in robustness.rows()} | set(map(robustness.NEVER_KNOWN.format, robustness.UNKNOWN))
    names |= {robustness.KEPT_BEFORE.format(row.aim.target, row.anchor) for row in robustness.rows()}
    assert {job.name for job in robustness.jobs(Path())} == names
    kept = dict.fromkeys(["lora", "fox/lora, seed 1"], 0.5)
    rows = {name: {**whole, "retained": kept.get(name, 1.0)} for name in names}
    back = {**whole["relearning"], "course": [[0, share(0.0)], [80, share(0.25)]]}
    rows["cat/lora, seed 1"] = {**rows["cat/lora, seed 1"], "relearning": back}

    def lines(page: str) -> dict[str, str]:
        table = page.partition("## Other targets and seeds")[2].splitlines()
        return {line.split(" | ")[0].strip("| "): line for line in table if line.startswith("|")}

    shown = lines(robustness.page(rows))
    assert set(shown) - {"erasure", "---"} == {"not erased", "never known", *robustness.REPEATED}
    assert f"| {(2 * 0.5 + 4 * 1.0) / 6:.2f} |" in shown["lora"]
    counted = "attacks 1 of 1, retained 1 of 1, relearning 0 of 1"
    assert shown["lora"].endswith(f"| 0, 0, 0, 0, 0, > 80 | +0.00 | 0.0 | {counted} |")
    del rows["orange/lora, seed 1"]
    assert "lora" not in lines(robustness.page(rows))


def test_the_interval_of_a_mean_is_students_and_where_all_agree_wilsons() -> None:
    # t(0.975, 1) = 12.706; the standard error of 0 and 0.02 is 0.01.
    assert robustness.mean([share(0.0), share(0.02)]) == "0.01 (0.00 to 0.14)"
    low, high = robustness.wilson(0.0, 64)
    assert robustness.mean([share(0.0), share(0.0)]) == f"0.00 ({low:.2f} to {high:.2f})"
    assert robustness.mean([]) == ""
