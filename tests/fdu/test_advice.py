"""What a report advises next: the right case, and command lines that the parser of fdu takes."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import PROBES, Page, by_brightness, found, make_record

import fdu
from fdu.cli.demo import WEIGHTS, Demo
from fdu.cli.erase import Erase
from fdu.cli.evaluate import Evaluate
from fdu.cli.program import parse
from fdu.evaluation.intervals import wilson
from fdu.evaluation.verdict import judge
from fdu.report import EvaluatedRun, render
from fdu.report.advice import DEMO_OUT, DEMO_WEIGHTS, NextStep, next_steps

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
    settings = {"learning_rate": 1e-4, "preservation_prompts": [], "preservation_weight": 1.0, **config}
    return make_record(**settings) | {"command": ERASE, "concepts": [["three", "eight"]]}


def parsed(step: NextStep) -> list[Any]:
    """The commands of a step as the parser of fdu reads them."""
    lines = [shlex.split(line) for line in step.commands]
    assert all(words[0] == "fdu" for words in lines)
    return [parse(words[1:]) for words in lines]


def test_a_target_that_is_left_is_trained_longer_then_faster() -> None:
    longer, faster = next_steps(run_of(0.1, 0.5, 0.9))
    assert "400" in longer.words and "200" in longer.words and "0.0002" in faster.words
    erase, evaluate = parsed(longer)
    assert isinstance(erase, Erase) and isinstance(evaluate, Evaluate)
    assert (erase.model, erase.target, erase.anchor, erase.overwrite) == ("./base", ("three",), ("eight",), False)
    assert (erase.settings.checked().max_train_steps, erase.settings.checked().learning_rate) == (400, 1e-4)
    assert (evaluate.base, evaluate.prompts) == ("./base", "set.txt")
    assert (str(erase.out), evaluate.erased, str(evaluate.out)) == ("runs/erased-2", "runs/erased-2", "judged-2")
    again, then = parsed(faster)
    assert (again.settings.checked().max_train_steps, again.settings.checked().learning_rate) == (400, 2e-4)
    assert (str(again.out), then.erased, str(then.out)) == ("runs/erased-3", "runs/erased-3", "judged-3")


def test_a_demo_is_made_again_elsewhere() -> None:
    assert (DEMO_OUT, DEMO_WEIGHTS) == (str(Demo().out), WEIGHTS)
    demo: dict[str, Any] = {"command": "fdu demo digits --max-train-steps 200 --seed 7 --device cpu"}
    step, *_ = next_steps(run_of(0.1, 0.5, 0.9, **demo))
    (again,) = parsed(step)
    assert isinstance(again, Demo) and str(again.out) == "demo-out-2" and step.commands[0].count("steps") == 1
    assert (again.settings.checked().max_train_steps, again.settings.checked().seed) == (400, 7)
    told = make_record(seed=7) | {"command": ""}
    step, _ = next_steps(run_of(0.5, 0.5, 0.9, record=told, **demo))
    (evaluate,) = parsed(step)
    assert isinstance(evaluate, Evaluate)
    assert (evaluate.base, evaluate.erased, str(evaluate.out)) == ("digits", "demo-out/erased", "demo-out-judged")
    assert (evaluate.seed, evaluate.device, evaluate.images_per_class, evaluate.robustness) == (7, "cpu", 64, ())


def test_broken_classes_are_preserved_with_their_prompts() -> None:
    first, then, fewer = next_steps(run_of(0.5, 0.5, 0.1, 0.9, probes=[*PROBES, ZERO]))
    assert "nine" in first.words and "zero" not in first.words
    erase, _ = parsed(first)
    # The anchor's prompts are preserved by default, and would not be beside others.
    assert erase.settings.checked().preservation_prompts == ("eight", "nine")
    again, _ = parsed(then)
    assert again.settings.checked().preservation_weight == 2.0
    assert again.settings.checked().preservation_prompts == ("eight", "nine")
    assert parsed(fewer)[0].settings.checked().max_train_steps == 100


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
    stronger, fewer = next_steps(run_of(0.5, 0.5, 0.1, record=record(preservation_prompts=["nine"])))
    erase, _ = parsed(stronger)
    assert erase.settings.checked().preservation_weight == 2.0 and "--preservation_prompts" not in stronger.commands[0]
    assert "100" in fewer.words
    off, *_ = next_steps(run_of(0.5, 0.5, 0.1, record=record(preservation_weight=0.0)))
    erase, _ = parsed(off)
    assert erase.settings.checked().preservation_weight == 1.0
    assert erase.settings.checked().preservation_prompts == ("eight", "nine")


def test_a_target_that_is_left_and_broken_classes_are_one_training() -> None:
    first, then = next_steps(run_of(0.1, 0.5, 0.1))
    for step, weight in ((first, 1.0), (then, 2.0)):
        config = parsed(step)[0].settings.checked()
        assert config.max_train_steps == 400 and config.preservation_prompts == ("eight", "nine")
        assert config.preservation_weight == weight


@pytest.mark.parametrize("images", [1, 6, 10])
def test_an_open_verdict_is_settled_by_the_images_advised(images: int) -> None:
    assert not judge(run_of(0.5, 0.5, 0.9, images=images).evaluation, PROBES).sure
    (step,) = next_steps(run_of(0.5, 0.5, 0.9, images=images))
    (evaluate,) = parsed(step)
    assert (evaluate.base, evaluate.erased, str(evaluate.out)) == ("./base", "runs/erased", "judged-2")
    assert str(evaluate.images_per_class) in step.words and evaluate.images_per_class <= 48
    assert judge(run_of(0.5, 0.5, 0.9, images=evaluate.images_per_class).evaluation, PROBES).good


def test_a_share_on_a_limit_may_stay_open() -> None:
    run = run_of(0.5, 0.5, 0.9)
    near = {"target_accuracy": wilson(0.15, 64)}
    after = dataclasses.replace(run.evaluation.after, target_accuracy=0.15, intervals=near)
    run = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, after=after))
    step = next_steps(run)[0]
    assert parsed(step)[0].images_per_class == 256 and "open" in step.words


def test_unseen_phrasings_are_trained_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = record(preservation_prompts=["a nine"])
    told["target"]["prompts"], told["anchor"]["prompts"] = ["three", "a 'three'"], ["eight", "an 'eight'"]
    probes = [PROBES[0], UNSEEN, *PROBES[1:]]
    (step,) = next_steps(run_of(0.5, 0.1, 0.5, 0.9, probes=probes, record=told))
    write, *lines = step.commands
    Path("runs/erased").mkdir(parents=True)
    Path("runs/erased/fdu.json").write_text(json.dumps(told))
    assert shlex.split(write)[:2] == ["python", "-c"]
    exec(shlex.split(write)[2], {})
    assert Path("three.txt").read_text() == "three\na 'three'\n" and Path("eight.txt").read_text().startswith("eight\n")
    with pytest.raises(FileExistsError):  # what is there may be the user's
        exec(shlex.split(write)[2], {})
    erase, _ = parsed(NextStep("", tuple(lines)))
    assert (erase.target, erase.anchor) == (("three.txt",), ("eight.txt",))
    assert erase.settings.checked().preservation_prompts == ("a nine",)
    told["command"] = ERASE.replace("three", "three.txt")
    (step,) = next_steps(run_of(0.5, 0.1, 0.5, 0.9, probes=probes, record=told))
    assert "three.txt" in step.words and parsed(step)[0].target == ("three.txt",)


def test_a_good_erasure_is_tested_and_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    test, use = next_steps(run_of(0.5, 0.5, 0.9))
    (evaluate,) = parsed(test)
    assert evaluate.robustness == () and (evaluate.erased, str(evaluate.out)) == ("runs/erased", "judged-2")
    assert next_steps(run_of(0.5, 0.5, 0.9, robustness=found(0.0))) == [use]
    made: list[Any] = []

    class Drawing:
        images = property(lambda self: [self])

        def __init__(self, prompt: str) -> None:
            made.append(prompt)

        def save(self, name: str) -> None:
            made.append(name)

    def load(name: str) -> Any:
        made.append(name)
        return Drawing

    monkeypatch.setattr(fdu, "load_pipeline", load)
    monkeypatch.setattr(fdu, "load_weights", lambda pipeline, path: made.append(path))
    exec(shlex.split(use.commands[0])[2], {})
    assert made == ["./base", "runs/erased", "three", "erased.png"]
    made.clear()
    (use,) = next_steps(run_of(0.5, 0.5, 0.9, record=record(train_method="full"), robustness=found(0.0)))
    exec(shlex.split(use.commands[0])[2], {})
    assert made == ["runs/erased", "three", "erased.png"]


def test_weights_that_erased_something_else_are_judged_by_it() -> None:
    told = record() | {"concepts": [["five", "eight"]]}
    (step,) = next_steps(run_of(0.1, 0.5, 0.9, record=told))
    (evaluate,) = parsed(step)
    assert evaluate.target == "five" and evaluate.prompts is None


def test_what_was_rarely_drawn_needs_other_prompts() -> None:
    probes = [dataclasses.replace(PROBES[0], judge=lambda images: ["eight"] * len(images)), *PROBES[1:]]
    (step,) = next_steps(run_of(0.1, 0.5, 0.9, probes=probes))
    assert "three" in step.words and "--prompts" in step.words and not step.commands
    blind = [
        PROBES[0],
        *(dataclasses.replace(probe, judge=lambda images: ["six"] * len(images)) for probe in PROBES[1:]),
    ]
    (step,) = next_steps(run_of(0.5, 0.5, 0.9, probes=blind))
    assert "retained" in step.words and not step.commands


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
