"""What a report advises next: the right case, and command lines that the parser of fdu takes."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_report import PROBES, Page, by_brightness, found, make_record

import fdu
from fdu.cli.demo import Demo
from fdu.cli.erase import Erase
from fdu.cli.evaluate import Evaluate
from fdu.cli.program import parse
from fdu.evaluation.verdict import State, judge
from fdu.report import EvaluatedRun, render
from fdu.report.advice import NextStep, help_pages, next_lines, next_steps
from fdu.subjects.embedded import Digits

HELP = Path(fdu.__file__).parents[1] / "docs" / "help"
ERASE = "fdu erase ./base --target three --anchor eight --learning_rate=1e-4 --out runs/erased --overwrite"
EVALUATE = "fdu evaluate ./base runs/erased --prompts set.txt --out judged"
UNSEEN = fdu.Probe("three", ("an unheard of three",), "unseen", by_brightness)
ZERO = fdu.Probe("zero", ("a zero", "a zero beside a three", "zero"), "retained", lambda images: ["zero"] * len(images))


def draws(levels: tuple[float, ...], images: int) -> fdu.Draws:
    return fdu.Draws([torch.full((images, 3, 4, 4), level) for level in levels])


def run_of(*levels: float, images: int = 64, probes: list[fdu.Probe] = PROBES, **told: Any) -> EvaluatedRun:
    """A run whose images were of the requested classes before, and have these brightnesses after."""
    names = {"three": 0.1, "eight": 0.5, "nine": 0.9, "zero": 0.3}
    before, after = draws(tuple(names[probe.name] for probe in probes), images), draws(levels, images)
    told = {"record": record(), "command": EVALUATE, **told}
    return EvaluatedRun.of(fdu.evaluate(before, after, probes), probes, before, after, **told)


def record(**config: Any) -> dict[str, Any]:
    settings = {"learning_rate": 1e-4, "preservation_prompts": [], "preservation_weight": 4.0, **config}
    return make_record(**settings) | {"command": ERASE, "concepts": [["three", "eight"]]}


def parsed(step: NextStep) -> list[Any]:
    """The commands of a step as the parser of fdu reads them."""
    lines = [shlex.split(line) for line in step.commands]
    assert all(words[0] == "fdu" for words in lines)
    return [parse(words[1:]) for words in lines]


def with_shares(run: EvaluatedRun, before: dict[str, Any] | None = None, **after: Any) -> EvaluatedRun:
    """The run with other figures."""
    evaluation = run.evaluation
    sides = {
        "before": dataclasses.replace(evaluation.before, **before or {}),
        "after": dataclasses.replace(evaluation.after, **after),
    }
    return dataclasses.replace(run, evaluation=dataclasses.replace(evaluation, **sides))


def without_ink(run: EvaluatedRun) -> EvaluatedRun:
    """The run, whose prompts ask for an ink that the images no longer have."""
    before = {"attributes": {"ink": 1.0}, "attribute_accuracy": 1.0}
    return with_shares(run, before, attributes={"ink": 0.5}, attribute_accuracy=0.5)


def folders(steps: Sequence[NextStep]) -> list[str]:
    """The output folders of all commands."""
    return [str(command.out) for step in steps for command in parsed(step)]


def test_a_target_that_is_left_is_trained_longer_then_faster() -> None:
    (longer,) = next_steps(run_of(0.1, 0.5, 0.9))
    assert "400" in longer.words and "200" in longer.words and "0.0002" in longer.words
    erase, evaluate = parsed(longer)
    assert isinstance(erase, Erase) and isinstance(evaluate, Evaluate)
    assert (erase.model, erase.target, erase.anchor, erase.overwrite) == ("./base", ("three",), ("eight",), False)
    assert (erase.settings.checked().max_train_steps, erase.settings.checked().learning_rate) == (400, 1e-4)
    assert (evaluate.base, evaluate.prompts) == ("./base", "set.txt")
    assert str(erase.out) == evaluate.erased == "judged-2-erased" and str(evaluate.out) == "judged-2"


def test_a_demo_is_made_again_elsewhere() -> None:
    demo: dict[str, Any] = {"command": "fdu demo digits --max-train-steps 200 --seed 7 --device auto"}
    step, *_ = next_steps(run_of(0.1, 0.5, 0.9, **demo))
    (again,) = parsed(step)
    assert isinstance(again, Demo) and str(again.out) == "demo-out-2" and step.commands[0].count("steps") == 1
    assert (again.settings.checked().max_train_steps, again.settings.checked().seed) == (400, 7)
    told = make_record(seed=7) | {"command": ""}
    step, _ = next_steps(run_of(0.5, 0.5, 0.9, record=told, **demo))
    (evaluate,) = parsed(step)
    assert isinstance(evaluate, Evaluate)
    assert (evaluate.base, evaluate.erased, str(evaluate.out)) == ("digits", "demo-out/erased", "demo-out-2")
    assert (evaluate.seed, evaluate.device, evaluate.images_per_class, evaluate.robustness) == (7, "auto", 64, ())
    step, _ = next_steps(run_of(0.5, 0.5, 0.9, record=told, command="fdu demo digits"))
    assert parsed(step)[0].device == Demo().device


@pytest.mark.parametrize("command", ["fdu demo --seed 7 digits", "fdu demo digits", "fdu demo --target three"])
def test_the_pipeline_of_a_demo_is_the_one_that_knows_the_target(command: str) -> None:
    step, _ = next_steps(run_of(0.5, 0.5, 0.9, command=command))
    assert parsed(step)[0].base == "digits"


def test_of_two_pipelines_that_know_the_target_the_demo_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Digits):
        name = "other"

    monkeypatch.setattr("fdu.report.advice.EMBEDDED", (Other, Digits))
    for command, name in (("fdu demo", "other"), ("fdu demo --seed 7 digits", "digits")):
        step, _ = next_steps(run_of(0.5, 0.5, 0.9, command=command))
        assert shlex.split(step.commands[0])[2] == name


@pytest.mark.parametrize("demo", [True, False])
def test_two_pages_never_name_the_same_folder(demo: bool) -> None:
    """From page to page, following every command."""
    known, pages = {"demo-out" if demo else "judged"}, ["demo-out" if demo else "judged"]
    for page in pages:
        command = f"fdu demo digits --out {page}/" if demo else EVALUATE.replace("judged", page)
        found = folders(next_steps(run_of(0.5, 0.5, 0.1, command=command)))
        assert len(found) == len(set(found)) and not known & {*found}
        assert all(name.startswith(f"{page}-") for name in found)
        known |= {*found}
        pages += [name for name in found if not name.endswith("erased") and name.count("-") < 3]
    assert "demo-out-2-2" in known or "judged-2-2" in known


def test_a_verdict_names_the_pages_that_help_and_the_next_command() -> None:
    """In the terminal and in the report; each page has the name that is shown."""
    left, broken, good = run_of(0.1, 0.5, 0.9), run_of(0.5, 0.5, 0.1), run_of(0.5, 0.5, 0.9)
    pages = {"not-erased": left, "neighbours": broken}
    for name, run in pages.items():
        (page,) = help_pages(run)
        assert page.endswith(f"(docs/help/{name}.md)")
        assert (HELP / f"{name}.md").read_text().startswith(f"# {page.partition(' (')[0]}\n")
        assert page in render(run) and page in next_lines(run)
        assert next_steps(run)[0].commands[0] in next_lines(run)
    assert len(help_pages(run_of(0.1, 0.5, 0.1))) == 2
    assert not help_pages(good) and "docs/help" not in render(good) and "fdu evaluate" in next_lines(good)


def test_each_page_of_help_has_a_figure_to_look_at_and_a_command() -> None:
    pages = sorted(path for path in HELP.glob("*.md") if path.name != "README.md")
    assert len(pages) == 4
    for page in pages:
        text = page.read_text()
        assert "**Look first**" in text and "## Causes" in text and "```console\nfdu " in text
        assert f"]({page.name})" in (HELP / "README.md").read_text()
    sources = "".join(path.read_text() for path in Path(fdu.__file__).parent.rglob("*.py"))
    for name, file in re.findall(r"Help: ([\w ]+?)[\s\"]*\(docs/help/([\w-]+\.md)\)", sources):
        assert (HELP / file).read_text().startswith(f"# {name.strip()}\n")
    assert sources.count("Help: ") == 2


def test_broken_classes_are_preserved_with_their_prompts() -> None:
    first, fewer = next_steps(run_of(0.5, 0.5, 0.1, 0.9, probes=[*PROBES, ZERO]))
    assert "nine" in first.words and "zero" not in first.words and "double preservation_weight" in first.words
    erase, _ = parsed(first)
    # The anchor's prompts are preserved by default, and would not be beside others.
    assert erase.settings.checked().preservation_prompts == ("eight", "nine")
    assert erase.settings.checked().preservation_weight == 4.0
    assert parsed(fewer)[0].settings.checked().max_train_steps == 100
    assert folders([first, fewer]) == ["judged-2-erased", "judged-2", "judged-3-erased", "judged-3"]


def test_prompts_that_name_the_target_are_not_preserved_and_those_given_stay() -> None:
    def lost(images: torch.Tensor) -> list[str]:
        return ["zero" if image.mean() < 0.35 else "nine" for image in images]

    probes = [*PROBES, dataclasses.replace(ZERO, judge=lost)]
    told = record(preservation_prompts=["a ten", "zero"])
    told["command"] = f"{ERASE} --preservation_prompts 'a ten' zero"
    first, *_ = next_steps(run_of(0.5, 0.5, 0.9, 0.9, probes=probes, record=told))
    erase, _ = parsed(first)
    assert erase.settings.checked().preservation_prompts == ("a ten", "zero", "a zero")
    assert (erase.target, erase.anchor) == (("three",), ("eight",))


def test_classes_that_were_preserved_in_vain_are_preserved_more_strongly() -> None:
    told = record(preservation_prompts=["nine"]) | {"command": f"{ERASE} --preservation_prompts=nine"}
    stronger, fewer = next_steps(run_of(0.5, 0.5, 0.1, record=told))
    erase, _ = parsed(stronger)
    assert erase.settings.checked().preservation_weight == 8.0
    assert erase.settings.checked().preservation_prompts == ("nine",)
    assert "100" in fewer.words
    off, *_ = next_steps(run_of(0.5, 0.5, 0.1, record=record(preservation_weight=0.0)))
    erase, _ = parsed(off)
    assert erase.settings.checked().preservation_weight == 4.0
    assert erase.settings.checked().preservation_prompts == ("eight", "nine")


def test_the_prompts_that_a_pipeline_of_fdu_preserves_by_itself_are_not_listed() -> None:
    told = record(preservation_prompts=[f"prompt {number}" for number in range(98)])
    for command in (EVALUATE, "fdu demo digits"):
        stronger, _ = next_steps(run_of(0.5, 0.5, 0.1, record=told, command=command))
        again = parsed(stronger)[0]
        assert "--preservation_prompts" not in stronger.commands[0] and "--preservation_weight" in stronger.commands[0]
        assert again.settings.checked().preservation_weight == 8.0


def test_a_target_that_is_left_and_broken_classes_are_one_training() -> None:
    (step,) = next_steps(run_of(0.1, 0.5, 0.1))
    config = parsed(step)[0].settings.checked()
    assert config.max_train_steps == 400 and config.preservation_prompts == ("eight", "nine")
    assert config.preservation_weight == 4.0


def test_lost_attributes_need_more_steps_or_any_preservation() -> None:
    (longer,) = next_steps(without_ink(run_of(0.5, 0.5, 0.9)))
    assert "to keep what else" in longer.words and "rarely" not in longer.words
    config = parsed(longer)[0].settings.checked()
    assert (config.preservation_weight, config.max_train_steps) == (4.0, 400)
    (preserved,) = next_steps(without_ink(run_of(0.5, 0.5, 0.9, record=record(preservation_weight=0.0))))
    config = parsed(preserved)[0].settings.checked()
    assert config.preservation_weight == 4.0 and "Turn preservation on, to keep what else" in preserved.words
    (both,) = next_steps(without_ink(run_of(0.1, 0.5, 0.9)))
    config = parsed(both)[0].settings.checked()
    assert (config.preservation_weight, config.max_train_steps) == (4.0, 400)
    (words,) = next_steps(without_ink(run_of(0.5, 0.5, 0.9, record=None)))
    assert words.words == "Train for more steps."


def test_what_was_computed_is_computed_again_or_trained_on() -> None:
    erase = ERASE.replace("--learning_rate=1e-4", "--train_method closed_form")
    edits = [{"input": "embeddings", "layers": 14, "rank": rank, "error": 1e-3} for rank in (37, 5)]
    told = record(train_method="closed_form", learning_rate=None) | {"command": erase, "edits": edits}
    (weaker,) = next_steps(run_of(0.1, 0.5, 0.9, record=told))
    config = parsed(weaker)[0].settings.checked()
    assert (config.train_method, config.preservation_weight) == ("closed_form", 1.0)
    (stronger,) = next_steps(without_ink(run_of(0.5, 0.5, 0.9, record=told)))
    config = parsed(stronger)[0].settings.checked()
    assert (config.train_method, config.preservation_weight) == ("closed_form", 8.0)
    (trained,) = next_steps(without_ink(run_of(0.1, 0.5, 0.9, record=told)))
    config = parsed(trained)[0].settings.checked()
    assert (config.train_method, config.init, config.preservation_weight) == ("lora", "closed_form", 4.0)
    assert config.rank == 37


def test_a_class_that_dropped_by_chance_is_not_blamed_for_lost_attributes() -> None:
    run = without_ink(run_of(0.5, 0.5, 0.9))
    run = with_shares(run, per_class={**run.evaluation.after.per_class, "nine": 0.9})
    assert not any("nine" in step.words for step in next_steps(run))


@pytest.mark.parametrize("images", [1, 6, 10])
def test_an_open_verdict_needs_more_images(images: int) -> None:
    assert not judge(run_of(0.5, 0.5, 0.9, images=images).evaluation, PROBES).sure
    (step,) = next_steps(run_of(0.5, 0.5, 0.9, images=images))
    (evaluate,) = parsed(step)
    assert (evaluate.base, evaluate.erased, str(evaluate.out)) == ("./base", "runs/erased", "judged-2")
    assert str(evaluate.images_per_class) in step.words and evaluate.images_per_class == 4 * images


def test_a_target_that_is_surely_left_needs_no_more_images() -> None:
    run = run_of(0.1, 0.5, 0.9, images=6)
    assert not judge(run.evaluation, PROBES).sure
    (step,) = next_steps(run)
    assert (
        "images_per_class" not in " ".join(step.commands) and parsed(step)[0].settings.checked().max_train_steps == 400
    )


def test_unseen_phrasings_are_trained_from_a_file_and_broken_classes_are_preserved() -> None:
    probes = [PROBES[0], UNSEEN, *PROBES[1:]]
    (step,) = next_steps(run_of(0.5, 0.1, 0.5, 0.9, probes=probes))
    assert "phrasings" in step.words and "--target" in step.words and "fdu.json" in step.words and not step.commands
    (step,) = next_steps(run_of(0.5, 0.1, 0.5, 0.9, probes=probes, record=None))
    assert "fdu.json" not in step.words
    write, preserve = next_steps(run_of(0.5, 0.1, 0.5, 0.1, probes=probes))
    assert write.words.startswith("three is erased only in") and "nine" in preserve.words
    config = parsed(preserve)[0].settings.checked()
    assert config.preservation_prompts == ("eight", "nine") and "--max_train_steps" not in preserve.commands[0]


def test_a_good_erasure_is_tested_and_used() -> None:
    test, use = next_steps(run_of(0.5, 0.5, 0.9))
    (evaluate,) = parsed(test)
    assert evaluate.robustness == () and (evaluate.erased, str(evaluate.out)) == ("runs/erased", "judged-2")
    assert next_steps(run_of(0.5, 0.5, 0.9, robustness=found(0.0))) == [use]
    assert "README.md" in use.words and not use.commands
    (use,) = next_steps(run_of(0.5, 0.5, 0.9, record=None, robustness=found(0.0)))
    assert "load_weights" in use.words


def test_weights_that_erased_something_else_are_judged_by_it() -> None:
    told = record() | {"concepts": [["five", "eight"]]}
    (step,) = next_steps(run_of(0.1, 0.5, 0.9, record=told))
    (evaluate,) = parsed(step)
    assert evaluate.target == () and evaluate.prompts is None


def test_what_was_rarely_drawn_needs_other_prompts() -> None:
    probes = [dataclasses.replace(PROBES[0], judge=lambda images: ["eight"] * len(images)), *PROBES[1:]]
    (step,) = next_steps(run_of(0.1, 0.5, 0.9, probes=probes))
    assert "three" in step.words and "--prompts" in step.words and not step.commands
    (step,) = next_steps(run_of(0.1, 0.5, 0.9, probes=probes, command="fdu evaluate digits erased --out judged"))
    assert "The digits pipeline" in step.words and "--prompts" not in step.words
    blind = [
        PROBES[0],
        *(dataclasses.replace(probe, judge=lambda images: ["six"] * len(images)) for probe in PROBES[1:]),
    ]
    (step,) = next_steps(run_of(0.5, 0.5, 0.9, probes=blind))
    assert "retained" in step.words and not step.commands


STATES: dict[State, tuple[float, float, float]] = {
    "erased": (1.0, 0.0, 0.02),
    "partly erased": (1.0, 0.4, 0.02),
    "not erased": (1.0, 0.9, 0.02),
    "rarely drawn before": (0.3, 0.0, 0.02),
    "cannot be told": (1.0, 0.3, 0.4),
}
"""Shares of the target before and after, and how far its interval reaches."""


@pytest.mark.parametrize("state", get_args(State))
@pytest.mark.parametrize("sure", [True, False])
@pytest.mark.parametrize(
    ("command", "nine", "ink", "retained"),
    [
        (EVALUATE, 0.9, False, 1.0),
        (EVALUATE, 0.1, False, 0.3),
        (EVALUATE, 0.9, True, 1.0),
        ("fdu demo", 0.1, True, 1.0),
    ],
)
def test_every_verdict_has_a_step_and_every_command_parses(
    state: State, sure: bool, command: str, nine: float, ink: bool, retained: float
) -> None:
    first, last, reach = STATES[state]
    told = make_record() | {"command": "" if command == "fdu demo" else ERASE}
    run = run_of(0.5, 0.5, nine, record=told, command=command, images=64 if sure else 6)
    ends = (max(last - reach, 0.0), min(last + reach, 1.0))
    intervals = {**run.evaluation.after.intervals, "target_accuracy": ends}
    before = {"target_accuracy": first, "retained_accuracy": retained}
    run = with_shares(without_ink(run) if ink else run, before, target_accuracy=last, intervals=intervals)
    verdict, steps = judge(run.evaluation, run.asked), next_steps(run)
    assert verdict.erased == state and steps and all(step.words for step in steps)
    commands = [one for step in steps for one in parsed(step)]
    assert len({*folders(steps)}) == len(commands)
    more = any("four times" in step.words for step in steps)
    assert more == (state in ("erased", "cannot be told") and not verdict.sure)
    assert any("rarely drew" in step.words for step in steps) == (state == "rarely drawn before" or retained < 0.5)


def test_a_command_of_an_earlier_version_is_proposed_with_todays_names() -> None:
    told = record() | {"command": f"{ERASE} --guidance-scale 2 --cache_dir=cache"}
    steps = next_steps(run_of(0.1, 0.5, 0.9, record=told, command=EVALUATE))
    commands = [one for step in steps for one in parsed(step)]
    assert commands and "--sampling_guidance 2 --training_cache=cache" in " ".join(
        command for step in steps for command in step.commands
    )


@pytest.mark.parametrize("command", ["", "fdu evaluate --out x base erased", "fdu 'evaluate", "other evaluate a b"])
def test_without_a_known_command_line_there_are_words(command: str) -> None:
    told = record() | {"command": ""}
    for levels in ((0.1, 0.5, 0.9), (0.5, 0.5, 0.1), (0.1, 0.5, 0.1), (0.5, 0.5, 0.9)):
        for one in (told, None):
            steps = next_steps(run_of(*levels, record=one, command=command))
            assert steps and all(step.words and not step.commands for step in steps)
    assert "400" in next_steps(run_of(0.1, 0.5, 0.9, record=told, command=""))[0].words


def test_the_page_tells_the_steps_after_the_verdict() -> None:
    run = run_of(0.1, 0.5, 0.9)
    page = Page(render(run))
    assert not page.open
    steps = next_steps(run)
    places = [page.text.index(words) for step in steps for words in (step.words, *step.commands)]
    assert places == sorted(places) and max(places) < page.text.index("Before and after")
    assert len([one for one in page.all("li")]) == len(steps)
