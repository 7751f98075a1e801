"""What to do next after an evaluation: the next steps that the verdict suggests, each with its command line."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fdu.config import RENAMED, EraseConfig, trains
from fdu.evaluation.verdict import DRAWN_BEFORE, Verdict, broken_classes, joined, judge, loses_attributes, state_of
from fdu.report.run import EvaluatedRun
from fdu.storage.output import DEMO_FOLDER, RECORD_FILE, WEIGHTS_FOLDER
from fdu.subjects.embedded import EMBEDDED

LISTS, FLAGS = ("preservation_prompts", "robustness"), ("overwrite",)
"""Changed options that take several values, and those that take none."""
ONCE = ("overwrite", "resume_from_checkpoint", "save_config")
"""Options that belong to one run."""
MOST_CLASSES, MOST_PROMPTS = 6, 3
"""Most broken classes to preserve, worst first, and prompts of each."""
LOWEST_WEIGHT = 0.05
"""The closed form is not computed again with less than a quarter of this preservation weight."""
ANCHOR_PROMPTS = 8
"""Most prompts of the anchor to preserve, which an erasure preserves unless it is given others."""


@dataclasses.dataclass(frozen=True)
class NextStep:
    """One thing to do."""

    words: str
    commands: tuple[str, ...] = ()
    """Command lines, in order; empty if words suffice, or if the run does not know the command line it came from."""


def next_steps(run: EvaluatedRun) -> list[NextStep]:
    """What to do after this run, first things first; every verdict has at least one step."""
    verdict, lines = judge(run.evaluation, run.asked), _Lines(run)
    if run.erased and run.anchor is None:
        names = [name for name, _ in run.erased]
        words = f"Judge what the weights erased, {joined(names)}, instead of {run.target}."
        return [NextStep(words, lines.evaluate(target=None, prompts=None))]
    if verdict.good:
        return _good(run, lines)
    before, after = run.evaluation.before, run.evaluation.after
    steps = []
    rare = [run.target] if verdict.erased == "rarely drawn before" else []
    rare += ["the retained classes"] if before.retained_accuracy < DRAWN_BEFORE else []
    if rare:
        words = f"Before the erasure, the model rarely drew {joined(rare)}, so the images after it show little. "
        words += (
            f"{lines.embedded.capitalize()} has prompts of its own, so erase another concept."
            if lines.embedded
            else "Write a concept set whose prompts the model draws, and evaluate with --prompts."
        )
        steps.append(NextStep(words))
    if verdict.erased in ("erased", "cannot be told") and not verdict.sure:
        images = 4 * run.evaluation.images_per_class
        words = f"Draw four times as many images, {images} per class: the intervals become half as wide."
        steps.append(NextStep(words, lines.evaluate(images_per_class=images)))
    left = verdict.erased in ("partly erased", "not erased")
    states = {state_of(before.per_class[name], after.per_class[name]) for name in run.targets}
    if left and states <= {"erased", "rarely drawn before"}:
        left = False
        words = f"{run.target} {_are(run)} erased only in the phrasings of the training, so train with more of them. "
        words += "Write them into a .txt file, one per line, and give it as the target (--target FILE). "
        if run.record is not None:
            words += f"The prompts of the training are in {RECORD_FILE} beside the weights. "
        steps.append(NextStep(words + "Leave out the phrasings of the evaluation, so that they stay unseen."))
    return steps + _train(run, lines, verdict, left)


def help_pages(run: EvaluatedRun) -> list[str]:
    """The pages of the documentation that list more causes of what went wrong, by name and file."""
    verdict = judge(run.evaluation, run.asked)
    pages = {
        "It did not erase (docs/help/not-erased.md)": verdict.erased not in ("erased", "cannot be told"),
        "It broke neighbours (docs/help/neighbours.md)": not verdict.kept,
    }
    return [name for name, fits in pages.items() if fits]


def next_lines(run: EvaluatedRun) -> str:
    """The first next step with its commands, and the pages that help, as lines for a terminal."""
    step, *_ = next_steps(run)
    lines = [f"next     {step.words}", *(f"         {line}" for line in step.commands)]
    return "\n".join([*lines, *(f"help     {page}" for page in help_pages(run))])


def _good(run: EvaluatedRun, lines: _Lines) -> list[NextStep]:
    steps = []
    if run.robustness is None:
        words = "Test whether the erasure holds: other phrasings, an attack with the weights, and relearning."
        one: dict[str, Any] = {"target": run.targets[0]} if len(run.targets) > 1 else {}
        words += " They test one concept at a time." if one else ""
        steps.append(NextStep(words, lines.evaluate(robustness=[], **one)))
    how = "README.md beside the weights shows how" if run.record else "fdu.load_weights(pipeline, path) applies it"
    return [*steps, NextStep(f"Use the result: {how}.")]


def _train(run: EvaluatedRun, lines: _Lines, verdict: Verdict, left: bool) -> list[NextStep]:
    """Longer for a target that is ``left``; with more preserved, or shorter, if something else was lost."""
    broken = broken_classes(run.evaluation, run.asked)
    lost = broken or loses_attributes(run.evaluation)
    named = joined(broken[:MOST_CLASSES]) if broken else ""
    if run.record is None:
        told = ["Train for more steps."] if left or (lost and not broken) else []
        told += [f"Train with {named} preserved (preservation_prompts)."] if broken else []
        return [NextStep(" ".join(told))] if told else []
    config = {**EraseConfig().as_dict(), **run.record["config"]}
    steps, rate, weight = (config[name] for name in ("max_train_steps", "learning_rate", "preservation_weight"))
    taken = len(run.record["history"].get("loss", ()))
    stopped = config.get("stop_at", 0.0) and taken < steps
    steps = taken if stopped else steps
    changes: dict[str, Any] = {}
    told = []
    computed = not trains(config["train_method"])
    if computed and left and (lost or weight < LOWEST_WEIGHT):
        # A smaller rank would leave a part of the edit out.
        rank = max((edit["rank"] for edit in run.record.get("edits", ())), default=EraseConfig.rank)
        words = f"The closed form cannot do more. Train from it: train_method lora, init closed_form, rank {rank}."
        return [NextStep(words, lines.erase(train_method="lora", init="closed_form", rank=rank))]
    if computed and left:
        words = f"Preserve less strongly: preservation_weight {weight / 4:g} instead of {weight:g}."
        return [NextStep(words, lines.erase(preservation_weight=f"{weight / 4:g}"))]
    # More steps keep more of the style and background; a stronger preservation does not (docs/erasure.md).
    short = bool(lost and not broken and weight and not computed)
    purpose = "" if left or broken else f", to keep what else prompts for {run.target} ask for"
    if (left or short) and stopped:
        changes["stop_at"] = f"{config['stop_at'] / 2:g}"
        told.append(f"Stop later: stop_at {changes['stop_at']} instead of {config['stop_at']:g}{purpose}.")
    elif left or short:
        changes["max_train_steps"] = 2 * steps or EraseConfig.max_train_steps
        told.append(f"Train for {changes['max_train_steps']} steps instead of {steps}{purpose}.")
    added = [] if lines.preserves_by_itself else _prompts_of(run, broken)
    preserved = config["preservation_prompts"] or [*filter(None, run.record["anchor"]["prompts"])][:ANCHOR_PROMPTS]
    if not set(added) <= set(preserved):
        changes["preservation_prompts"] = [*dict.fromkeys([*preserved, *added])]
        told.append(f"Preserve {named} too. The evaluation draws these prompts as well.")
        told += ["If they still lose accuracy, double preservation_weight."] if weight else []
    if lost and not short and not ("preservation_prompts" in changes and weight):
        changes["preservation_weight"] = f"{2 * weight or EraseConfig.preservation_weight:g}"
        what = "the same prompts" if config["preservation_prompts"] else "the anchor's prompts"
        how = f"Preserve {what} more strongly{purpose}" if weight else f"Turn preservation on{purpose}"
        told.append(f"{how}: preservation_weight {changes['preservation_weight']} instead of {weight:g}.")
    if left and rate:
        told.append(
            f"If {run.target} {_are(run)} still drawn then, double the learning rate too: {2 * rate:g}, not {rate:g}."
        )
    found = [NextStep(" ".join(told), lines.erase(**changes))] if told else []
    if broken and verdict.erased == "erased" and steps > 1 and not computed:
        words = (
            f"Or train for fewer steps, {steps // 2} instead of {steps}, if {run.target} {_are(run)} erased by then."
        )
        found.append(NextStep(words, lines.erase(max_train_steps=steps // 2)))
    return found


def _prompts_of(run: EvaluatedRun, names: Sequence[str]) -> list[str]:
    """The first prompts of these classes, worst class first, without those that name an erased concept."""
    erased = "|".join(re.escape(name) for name in (*run.targets, *(target for target, _ in run.erased)))
    named = re.compile(rf"(?<!\w)(?:{erased})(?!\w)", re.IGNORECASE)
    by_name = {one.name: one.prompts for one in run.probes if one.role in ("retained", "cross_domain")}
    found = [
        [prompt for prompt in by_name[name] if not named.search(prompt)][:MOST_PROMPTS] for name in names[:MOST_CLASSES]
    ]
    return list(dict.fromkeys(prompt for prompts in found for prompt in prompts))


def _are(run: EvaluatedRun) -> str:
    """The verb for what was erased."""
    return "is" if len(run.targets) == 1 else "are"


class _Lines:
    """The command lines of a run with some options changed.

    Each writes into a folder named after the run's own: OWN-2, OWN-3, ..., weights into OWN-2-erased. Two runs in
    different folders thus never name the same one.
    """

    def __init__(self, run: EvaluatedRun) -> None:
        self.evaluated, demo = _words(run.command, "evaluate"), _words(run.command, "demo")
        if len(self.evaluated) < 4 or any(word.startswith("-") for word in self.evaluated[2:4]):
            self.evaluated = []  # its names may be anywhere among the options
        config = (run.record or {}).get("config", {})
        self.trained = demo or _words((run.record or {}).get("command", ""), "erase")
        self.own = PurePath(_value(self.evaluated, "out") or _value(self.trained, "out") or DEMO_FOLDER)
        self.folders = 1
        self.preserves_by_itself = bool(
            self.trained
            and config.get("preservation_prompts")
            and not any(_value(self.trained, name) for name in ("preservation_prompts", "config"))
        )
        """Whether the preserved prompts are those of a pipeline of fdu, which adds them if the command names none."""
        models = [one.name for one in EMBEDDED if set(run.targets) <= one().known]
        if demo and models:
            model = next((name for name in models if name in demo[2:]), models[0])
            options = {"images_per_class": run.evaluation.images_per_class, "seed": config.get("seed") or None}
            options["device"] = _value(demo, "device") or "cpu"
            self.evaluated = shlex.split(_changed(["fdu", "evaluate", model, str(self.own / WEIGHTS_FOLDER)], options))
        self.embedded = next((one.title for one in EMBEDDED if one.name in self.evaluated[2:3]), "")
        """The pipeline of fdu that was judged, in words; empty for others."""

    def erase(self, **changes: Any) -> tuple[str, ...]:
        """The erasure with these settings, and its evaluation, which `fdu demo` includes."""
        if not self.trained:
            return ()
        folder, changes = self._new(), {**dict.fromkeys(ONCE), **changes}
        if self.trained[1] == "demo" or not self.evaluated:
            return (_changed(self.trained, {**changes, "out": folder}),)
        weights, (fdu, evaluate, base, _, *options) = f"{folder}-{WEIGHTS_FOLDER}", self.evaluated
        judged = _changed([fdu, evaluate, base, weights, *options], {"overwrite": None, "out": folder})
        return _changed(self.trained, {**changes, "out": weights}), judged

    def evaluate(self, **changes: Any) -> tuple[str, ...]:
        """The evaluation with these options."""
        if not self.evaluated:
            return ()
        return (_changed(self.evaluated, {"overwrite": None, **changes, "out": self._new()}),)

    def _new(self) -> str:
        self.folders += 1
        return f"{self.own}-{self.folders}"


def _words(line: str, command: str) -> list[str]:
    """The words of a command line of fdu; empty if it is another command."""
    try:
        words = shlex.split(line)
    except ValueError:
        return []
    if words[:2] != ["fdu", command]:
        return []
    return words if command == "evaluate" else list(map(_renamed, words))


def _renamed(word: str) -> str:
    """The word with today's name of a setting, where an earlier version wrote it."""
    name, equals, value = _option(word), *word.partition("=")[1:]
    return f"--{RENAMED[name]}{equals}{value}" if name in RENAMED else word


def _option(word: str) -> str:
    """The name of the option that a word gives; empty for other words."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def _value(words: Sequence[str], name: str) -> str:
    """The value of an option on a command line; the last one of several, empty if there is none."""
    given = [pair for pair in itertools.pairwise([*words, ""]) if _option(pair[0]) == name]
    return (given[-1][0].partition("=")[2] or given[-1][1]) if given else ""


def _changed(words: Sequence[str], changes: Mapping[str, Any]) -> str:
    """The command line with other values of some options; None leaves an option out."""
    kept, skipped = [], 0.0
    for word in words:
        name = _option(word)
        if name in changes:
            most = math.inf if name in LISTS else 1.0
            skipped = 0.0 if "=" in word or name in FLAGS else most
        elif name or not skipped:
            skipped = 0.0
            kept.append(word)
        else:
            skipped -= 1
    for name, value in changes.items():
        if value is not None:
            kept += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return shlex.join(kept)
