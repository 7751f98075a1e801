"""What to do next after an evaluation: the next steps that the verdict suggests, each with its command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fdu.config import EraseConfig
from fdu.evaluation import Evaluation
from fdu.evaluation.intervals import LEVEL, Interval, reach_unseen, wilson
from fdu.evaluation.verdict import Verdict, broken_classes, joined, judge, state_of
from fdu.report.run import EvaluatedRun
from fdu.storage.formats import choose_format
from fdu.storage.output import RECORD_FILE
from fdu.subjects.embedded import EMBEDDED

DEMO_OUT, DEMO_WEIGHTS = "demo-out", "erased"
"""Where ``fdu demo`` writes by default, and its folder of weights in there."""
LISTS = ("preservation_prompts", "validation_prompts", "robustness")
"""Options that take several values."""
FLAGS = ("overwrite",)
"""Options without a value."""
ROUND, MOST_IMAGES = 8, 512
"""Images per class are advised in multiples of ``ROUND``, up to ``MOST_IMAGES``."""
MOST_CLASSES, MOST_PROMPTS = 6, 3
"""Most broken classes to preserve, worst first, and prompts of each."""
ANCHOR_PROMPTS = 8
"""Most prompts of the anchor to preserve, which an erasure preserves unless it is given others."""


@dataclasses.dataclass(frozen=True)
class NextStep:
    """One thing to do."""

    words: str
    commands: tuple[str, ...] = ()
    """Command lines, in order; empty if the run does not know the command line that it came from."""


def next_steps(run: EvaluatedRun) -> list[NextStep]:
    """What to do after this run, first things first; every case of the verdict has at least one step."""
    verdict, lines = judge(run.evaluation, run.asked), _Lines(run)
    if run.erased and run.anchor is None:
        names = [name for name, _ in run.erased]
        words = f"Judge what the weights erased, {joined(names)}, instead of {run.target}."
        return [NextStep(words, lines.evaluate(target=names[0], prompts=None))]
    if verdict.good:
        return _good(run, lines)
    share = run.evaluation.after.target_accuracy
    low, _ = run.evaluation.after.intervals.get("target_accuracy", (share, share))
    before = run.evaluation.before
    steps = []
    open_now = not verdict.sure and state_of(before.target_accuracy, low) == "erased"
    if verdict.erased == "rarely drawn before":
        steps.append(NextStep(_other_prompts(f"{run.target} was")))
    elif open_now:
        steps.append(_more_images(run, lines))
    if verdict.erased == "partly erased" and state_of(before.target_accuracy, share) == "erased":
        steps.append(_other_phrasings(run, lines))
    else:
        steps += _train(run, lines, verdict)
    if not verdict.sure and not open_now:
        steps.append(_more_images(run, lines))
    return steps or [NextStep(_other_prompts("The retained classes were"))]


def _good(run: EvaluatedRun, lines: _Lines) -> list[NextStep]:
    steps = []
    if run.robustness is None:
        words = "Test whether the erasure holds: other phrasings, an attack with the weights, and relearning."
        steps.append(NextStep(words, lines.evaluate(robustness=[])))
    words = "Use the result: fdu.load_weights(pipeline, path) applies the weights."
    if lines.use():
        words = (
            "Use the result: this draws an image with it. README.md beside the weights shows other ways to load them."
        )
    return [*steps, NextStep(words, lines.use())]


def _other_prompts(what: str) -> str:
    return (
        f"{what} rarely drawn before the erasure, so the images after it show little. Write a concept set whose "
        "prompts the model draws, and evaluate with --prompts."
    )


def _more_images(run: EvaluatedRun, lines: _Lines) -> NextStep:
    images, enough = images_needed(run)
    words = f"Draw {images} images per class instead of {run.evaluation.images_per_class}. "
    words += (
        "If the shares stay as they are, the 95 % intervals then settle the verdict."
        if enough
        else "A share is so close to a limit of the verdict that even these may leave it open."
    )
    return NextStep(words, lines.evaluate(images_per_class=images))


def images_needed(run: EvaluatedRun) -> tuple[int, bool]:
    """Images per class at which the intervals would leave one verdict if the shares stay; whether there are such."""
    drawn = run.evaluation.images_per_class
    for images in range(drawn // ROUND * ROUND + ROUND, MOST_IMAGES + 1, ROUND):
        if judge(_with_images(run.evaluation, images), run.asked).sure:
            return images, True
    return 4 * drawn, False


def _with_images(evaluation: Evaluation, images: int) -> Evaluation:
    """The evaluation with the intervals that the verdict reads as they would be on more images with these shares."""
    before, after = evaluation.before, evaluation.after
    shares = {"target_accuracy": after.target_accuracy, "unseen_accuracy": after.unseen_accuracy}
    judged = {name: wilson(share, images) for name, share in shares.items() if share is not None}
    differences = {
        name: _narrowed(after.value(figure) - before.value(figure), interval, images / evaluation.images_per_class)
        for name, interval in evaluation.intervals.items()
        for start, _, figure in [name.partition(".")]
        if start == "difference"
    }
    side = dataclasses.replace(after, intervals={**after.intervals, **judged})
    return dataclasses.replace(evaluation, after=side, intervals={**evaluation.intervals, **differences})


def _narrowed(value: float, interval: Interval, times: float) -> Interval:
    """The interval of a difference on so many times the images, narrower by the root of that.

    Where all images agreed, it reached as far as :func:`reach_unseen` of their number, and will again.
    """
    reach, factor = max(value - interval[0], interval[1] - value), times**-0.5
    if 0 < reach < 1:
        counted = round(math.log((1 - LEVEL) / 2) / math.log1p(-reach))
        if math.isclose(reach, reach_unseen(counted)):
            factor = reach_unseen(round(counted * times)) / reach
    return value - factor * (value - interval[0]), value + factor * (interval[1] - value)


def _other_phrasings(run: EvaluatedRun, lines: _Lines) -> NextStep:
    """The target's prompts as files, to add phrasings to."""
    files, commands = lines.prompt_files()
    words = f"{run.target} is erased only in the phrasings of the training, so train with more of them. "
    if not files:
        words += f"Write phrasings into {run.target}.txt, one per line, and give that file as the target."
    elif commands[0].startswith("python"):
        words += f"The first command writes the prompts of the training into {joined(files)}. Add your own phrasings"
        words += ", in the same lines of both files." if len(files) > 1 else ", one per line."
    else:
        words += f"Add phrasings to {joined(files)}, one per line."
    return NextStep(words + " Leave out those of the evaluation, so that they stay unseen.", commands)


def _train(run: EvaluatedRun, lines: _Lines, verdict: Verdict) -> list[NextStep]:
    """Longer for a target that is still drawn, and with more preserved for classes that lost accuracy."""
    left = verdict.erased in ("partly erased", "not erased")
    broken = broken_classes(run.evaluation, run.asked) if not verdict.kept else []
    if run.record is None:
        told = ["Train for more steps."] if left else []
        told += [f"Train with {joined(broken[:MOST_CLASSES])} preserved (preservation_prompts)."] if broken else []
        return [NextStep(" ".join(told))] if told else []
    config = {**EraseConfig().as_dict(), **run.record["config"]}
    steps, rate, weight = (config[name] for name in ("max_train_steps", "learning_rate", "preservation_weight"))
    longer = {"max_train_steps": 2 * steps or EraseConfig.max_train_steps} if left else {}
    stronger = {"preservation_weight": f"{2 * weight or EraseConfig.preservation_weight:g}"}
    told = [f"Train for {longer['max_train_steps']} steps instead of {steps}."] if left else []
    weighed = f"preservation_weight {stronger['preservation_weight']} instead of {weight:g}"
    if not broken:
        if not left:
            return []
        faster = f"{2 * rate:g}"
        words = f"If {run.target} is still drawn then, double the learning rate too: {faster} instead of {rate:g}."
        return [
            NextStep(told[0], lines.erase(**longer)),
            NextStep(words, lines.erase(**longer, learning_rate=faster)),
        ]
    preserved = config["preservation_prompts"] or [*filter(None, run.record["anchor"]["prompts"])][:ANCHOR_PROMPTS]
    added = [prompt for prompt in _prompts_of(run, broken) if prompt not in preserved]
    more: dict[str, Any] = {"preservation_prompts": [*dict.fromkeys([*preserved, *added])]} if added else {}
    found = []
    if added:
        told.append(f"Preserve {joined(broken[:MOST_CLASSES])} too. The evaluation draws these prompts as well.")
        changes = {**longer, **more, **({} if weight else stronger)}
        found.append(NextStep(" ".join(told), lines.erase(**changes)))
        told = ["If they still lose accuracy, preserve them more strongly:"]
    else:
        told.append("Preserve the other classes more strongly:")
    if weight or not added:
        found.append(NextStep(" ".join([*told, f"{weighed}."]), lines.erase(**longer, **more, **stronger)))
    if verdict.erased == "erased" and steps > 1:
        words = f"Or train for fewer steps, {steps // 2} instead of {steps}, if {run.target} is erased by then."
        found.append(NextStep(words, lines.erase(max_train_steps=steps // 2)))
    return found


def _prompts_of(run: EvaluatedRun, names: Sequence[str]) -> list[str]:
    """The first prompts of these classes, worst class first, without those that name an erased concept."""
    erased = "|".join(re.escape(name) for name in (run.target, *(target for target, _ in run.erased)))
    named = re.compile(rf"(?<!\w)(?:{erased})(?!\w)", re.IGNORECASE)
    by_name = {one.name: one.prompts for one in run.probes if one.role in ("retained", "cross_domain")}
    found = [
        [prompt for prompt in by_name[name] if not named.search(prompt)][:MOST_PROMPTS] for name in names[:MOST_CLASSES]
    ]
    return list(dict.fromkeys(prompt for prompts in found for prompt in prompts))


class _Lines:
    """The command lines of a run with some options changed. Each writes into a folder of its own: OUT-2, OUT-3, ..."""

    def __init__(self, run: EvaluatedRun) -> None:
        self.run, self.config = run, (run.record or {}).get("config", {})
        self.evaluated = _words(run.command, "evaluate")
        if len(self.evaluated) < 4 or any(word.startswith("-") for word in self.evaluated[2:4]):
            self.evaluated = []  # its names may be anywhere among the options
        self.weights = self.evaluated[3] if self.evaluated else ""
        self.trained = _words((run.record or {}).get("command", ""), "erase")
        if demo := _words(run.command, "demo"):
            out = _value(demo, "out", DEMO_OUT)
            self.trained, self.weights = demo, str(PurePath(out) / DEMO_WEIGHTS)
            given = {"seed": self.config.get("seed") or None, "device": _value(demo, "device", "") or None}
            options = {"images_per_class": run.evaluation.images_per_class, **given, "out": f"{out}-judged"}
            named = demo[2] if len(demo) > 2 and not demo[2].startswith("-") else EMBEDDED[0].name
            self.evaluated = shlex.split(_changed(["fdu", "evaluate", named, self.weights], options))
        self.taken = {_value(self.trained, "out", DEMO_OUT), *([] if demo else [_value(self.evaluated, "out", "")])}

    def erase(self, **changes: Any) -> tuple[str, ...]:
        """The erasure with these settings, and its evaluation, which `fdu demo` includes."""
        if not self.trained:
            return ()
        out = self._new(_value(self.trained, "out", DEMO_OUT))
        first = _changed(self.trained, {"overwrite": None, "resume_from_checkpoint": None, **changes, "out": out})
        if self.trained[1] == "demo" or not self.evaluated:
            return (first,)
        return first, self._judged([*self.evaluated[:3], out, *self.evaluated[4:]], {})

    def evaluate(self, **changes: Any) -> tuple[str, ...]:
        """The evaluation with these options."""
        return (self._judged(self.evaluated, changes),) if self.evaluated else ()

    def _judged(self, words: Sequence[str], changes: Mapping[str, Any]) -> str:
        return _changed(words, {"overwrite": None, **changes, "out": self._new(_value(words, "out", "evaluation"))})

    def _new(self, folder: str) -> str:
        """The folder, or the first of FOLDER-2, FOLDER-3, ... that no command line writes."""
        while folder in self.taken:
            stem, number = re.fullmatch(r"(.*?)(?:-(\d+))?/*", folder).groups()  # type: ignore[union-attr]
            folder = f"{stem}-{int(number or 1) + 1}"
        self.taken.add(folder)
        return folder

    def prompt_files(self) -> tuple[list[str], tuple[str, ...]]:
        """The files for the prompts of target and anchor; the command lines that write them and erase with them.

        Empty if there are several targets, or names that no file can have.
        """
        names = self.run.erased[0] if len(self.run.erased) == 1 else ()
        sides = {side: name for side, name in zip(("target", "anchor"), names, strict=False) if name}
        if not self.trained or not self.weights or not sides or any("/" in name for name in sides.values()):
            return [], ()
        files = {side: f"{name}.txt" for side, name in sides.items()}
        given = {side: _value(self.trained, side, "") for side in sides}
        if given["target"].endswith(".txt"):
            return [name for name in given.values() if name.endswith(".txt")], self.erase()
        record = json.dumps(str(PurePath(self.weights) / RECORD_FILE), ensure_ascii=False)
        code = f'import json; r = json.load(open({record})); [open(r[s]["name"] + ".txt", "x").write('
        code += f'"\\n".join(r[s]["prompts"]) + "\\n") for s in {json.dumps(list(files))}]'
        preserved = self.config.get("preservation_prompts")  # the digits pipeline knows them from names only
        changes = {**files, **({"preservation_prompts": preserved} if preserved else {})}
        return list(files.values()), (shlex.join(["python", "-c", code]), *self.erase(**changes))

    def use(self) -> tuple[str, ...]:
        """The command line that draws an image with the result."""
        if not self.weights or not self.config:
            return ()
        try:
            format = choose_format(
                _value(self.trained, "save_as", "auto"), self.config.get("train_method", EraseConfig.train_method)
            )
        except (KeyError, ValueError):  # of another version
            return ()
        texts = (self.evaluated[2], self.weights, self.run.probes[0].prompts[0])
        base, weights, prompt = (json.dumps(text, ensure_ascii=False) for text in texts)
        loaded = f"fdu.load_pipeline({weights if format == 'pipeline' else base})"
        load = "" if format == "pipeline" else f"fdu.load_weights(pipeline, {weights}); "
        code = f'import fdu; pipeline = {loaded}; {load}pipeline({prompt}).images[0].save("erased.png")'
        return (shlex.join(["python", "-c", code]),)


def _words(line: str, command: str) -> list[str]:
    """The words of a command line of fdu; empty if it is another command."""
    try:
        words = shlex.split(line)
    except ValueError:
        return []
    return words if words[:2] == ["fdu", command] else []


def _option(word: str) -> str:
    """The name of the option that a word gives; empty for other words."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def _value(words: Sequence[str], name: str, default: str) -> str:
    """The value of an option on a command line; the first one of several."""
    for word, following in itertools.pairwise([*words, default]):
        if _option(word) == name:
            return word.partition("=")[2] if "=" in word else following
    return default


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
