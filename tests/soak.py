"""Soak: kill ``fdu`` again and again, start it again, and compare what it leaves in the end with an undisturbed run.

``python tests/soak.py --kills 200 --record tests/soak.json`` prints a line per kill, writes the counts with seed,
device and versions, and ends with 1 if anything differs. Each command runs once undisturbed. Then it is killed at
random points, with SIGKILL, SIGTERM or SIGINT, until it has survived. Half of the points are moments, the others are
calls that change files, told by Python's audit events. Some processes have a clock that was set back by a day. The seed
fixes signals and points.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from in_processes import started
from safetensors import safe_open
from safetensors.torch import load_file

from fdu import cli
from fdu.config import PLACES
from fdu.storage.fingerprint import versions
from fdu.storage.loading import describe_device
from fdu.storage.output import PIPELINE_FILE, RECORD_FILE, write_json

PAIRS = {"digits": ("three", "eight"), "emoji": ("fox", "wolf")}
QUICK = [
    *("--train_batch_size", "2", "--num_latents", "8", "--num_inference_steps", "2", "--rank", "4"),
    *("--max_train_steps", "8"),
]
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]
LIVES = 12
"""Kills of one command at most, before it is left to end."""
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree", "fcntl.flock"}
"""Audit events that change files, beside open for writing."""
VOLATILE = {"seconds", "core_seconds", "time", "command", "versions", *PLACES}
"""Entries of records that differ from run to run."""
SECONDS = re.compile(r"\d+(\.\d+)?([eE][-+]?\d+)?(&nbsp;|\N{NO-BREAK SPACE}| )s\b")


class Command(NamedTuple):
    """A command line, and what has to be there before it."""

    name: str
    arguments: list[str]
    out: str
    needs: tuple[str, ...] = ()


def commands(model: str) -> list[Command]:
    """The commands that are killed, of one of fdu's own pipelines."""
    named = ["--target", PAIRS[model][0], "--anchor", PAIRS[model][1]]
    judged = ["--images_per_class", "2", "--num_inference_steps", "2"]
    resumed = ["--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]
    searched = ["--adversarial_rounds", "1", "--adversarial_steps", "2"]
    divergences = ["--divergences", "mse,squared_hellinger", "--s0", "1", "--seeds", "1", "--images_per_class", "2"]
    drawing = ["--judged_inference_steps", "2"]
    return [
        Command("erase", ["erase", model, *named, *QUICK, *resumed, "--out", "erased"], "erased"),
        Command("robust", ["erase", model, *named, *QUICK, *resumed, *searched, "--out", "robust"], "robust"),
        Command(
            "evaluate", ["evaluate", model, "erased", *judged, "--overwrite", "--out", "judged"], "judged", ("erased",)
        ),
        Command("report", ["report", "judged"], "judged", ("erased", "judged")),
        Command("compare", ["compare", model, *named, *QUICK, *divergences, *drawing, "--out", "compared"], "compared"),
    ]


def run_killed(folder: str, arguments: list[str], event: int | None, number: int, set_back: bool, told: str) -> None:
    """In a process of its own: run the command line, and send itself the signal at the event of that number.

    Writes the number of events to ``told``.
    """
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let processes in the background ignore it
    if set_back:
        real = time.time
        time.time = lambda: real() - 86400
    happened = 0

    def audit(name: str, given: tuple[Any, ...]) -> None:
        nonlocal happened
        writes = name == "open" and isinstance(given[1], str) and any(mode in given[1] for mode in "wax+")
        flags = given[2] if name == "open" and given[1] is None and isinstance(given[2], int) else 0
        opens = flags & (os.O_WRONLY | os.O_RDWR)
        if writes or opens or name in CHANGES:
            happened += 1
            if happened == event:
                os.kill(os.getpid(), number)

    sys.addaudithook(audit)
    code = cli.main(arguments)
    event = None
    Path(told).write_text(str(happened))
    sys.exit(code)


class Outcome(NamedTuple):
    """How a process ended: its exit code, seconds, events, and what it wrote to stderr."""

    code: int | None
    seconds: float
    events: int
    words: str


def once(
    folder: Path, command: Command, after: float | None, event: int | None, number: int, set_back: bool = False
) -> Outcome:
    """Run a command, and kill it after so many seconds, or at an event of that number."""
    told, errors = folder.with_suffix(".events"), folder.with_suffix(".stderr")
    told.unlink(missing_ok=True)
    errors.write_text("")  # it may be killed before it writes
    begun = time.monotonic()
    process = started(run_killed, str(folder), command.arguments, event, number, set_back, str(told), errors=errors)
    if after is not None:
        process.join(after)
        if process.is_alive():
            os.kill(process.pid, number)
    process.join(600)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{command.name} did not end within 600 s of signal {number}")
    events = int(told.read_text()) if told.exists() else 0
    return Outcome(process.exitcode, time.monotonic() - begun, events, errors.read_text())


def finished(folder: Path, command: Command) -> bool:
    """Whether the result is there, so that the command would refuse to replace it."""
    out = folder / command.out
    return command.arguments[0] == "erase" and ((out / RECORD_FILE).exists() or (out / PIPELINE_FILE).exists())


def content(folder: Path) -> Iterator[tuple[str, Any]]:
    """The files in a folder by name, without what differs from run to run."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            yield name, "folder"
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield f"{name} header", sorted((file.metadata() or {}).items())
            yield from ((f"{name} {key}", tensor.numpy().tobytes()) for key, tensor in sorted(load_file(path).items()))
        elif path.suffix in (".json", ".jsonl"):
            lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
            found = [stable(json.loads(line)) for line in lines]
            # Records come in the order in which they were made.
            yield name, sorted(found, key=json.dumps) if path.suffix == ".jsonl" else found
        elif path.suffix in (".md", ".html", ".svg"):
            yield name, SECONDS.sub("? s", path.read_text())
        else:
            yield name, path.read_bytes()


def stable(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {name: stable(item) for name, item in value.items() if name not in VOLATILE}
    return [stable(item) for item in value] if isinstance(value, list) else value


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Where the content of two folders differs."""
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def left_over(folder: Path) -> list[str]:
    """What killed runs left, and a run that ended well did not remove."""
    names = sorted(path.name for path in folder.iterdir())
    return [f"left over: {name}" for name in names if name.startswith(".") or name.endswith(".checkpoints")]


def still_running(folder: Path) -> list[str]:
    """Processes that work in a folder although their command has ended, 20 seconds later."""
    end = time.monotonic() + 20
    while True:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "cwd").readlink() == folder:
                    found.append(f"still running: {process.name}")
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how often a process is killed in all")
    parser.add_argument("--seed", type=int, default=0, help="of signals and points")
    parser.add_argument("--models", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--only", default="", help="commands whose name contains this")
    parser.add_argument("--record", type=Path, help="JSON file for the counts; those of other seeds in it stay")
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    killed, points = collections.Counter[str](), collections.Counter[str]()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fdu-soak-") as place:
        undisturbed: dict[tuple[str, str], tuple[Outcome, dict[str, Any]]] = {}
        for model in options.models:
            folder = Path(place) / model
            folder.mkdir()
            needs = {need for one in commands(model) if options.only in one.name for need in one.needs}
            for command in commands(model):
                if options.only not in command.name and command.out not in needs:
                    continue
                ended = once(folder, command, None, None, 0)
                if ended.code:
                    raise RuntimeError(f"{model} {command.name} fails undisturbed: {ended.words}")
                # Now: an evaluation goes on to fill in the card of the erasure.
                undisturbed[model, command.name] = ended, dict(content(folder / command.out))
                print(f"{model} {command.name}: {ended.seconds:.1f} s, {ended.events} changes of files", flush=True)
        for turn in range(10**9):
            model = options.models[turn % len(options.models)]
            chosen = [one for one in commands(model) if options.only in one.name]
            command = chosen[turn // len(options.models) % len(chosen)]
            whole, left = undisturbed[model, command.name]
            folder = Path(place) / f"{turn}"
            folder.mkdir()
            for needed in command.needs:
                copied(Path(place) / model / needed, folder / needed)
            for life in range(LIVES + 1):
                number = int(chance.choice(SIGNALS))
                moment, event = chance.uniform(0, whole.seconds), chance.randint(1, max(whole.events, 1))
                by_event, set_back = chance.random() < 0.5, chance.random() < 0.2
                if life == LIVES or killed.total() >= options.kills:
                    ended = once(folder, command, None, None, 0)
                elif by_event:
                    ended = once(folder, command, None, event, number, set_back)
                else:
                    ended = once(folder, command, moment, None, number, set_back)
                if ended.code == cli.OK or finished(folder, command):
                    break
                if ended.code not in (-number, cli.INTERRUPTED):
                    wrong.append(f"{model} {command.name} ended with {ended.code} after signal {number}: {ended.words}")
                    print(f"WRONG: {wrong[-1]}", flush=True)
                    break
                killed[f"{model} {command.name}"] += 1
                points[signal.Signals(number).name] += 1
                points["at a change of a file" if by_event else "at a moment"] += 1
                points["with a clock set back"] += set_back
                where = f"change {event}" if by_event else f"{moment:.1f} s"
                print(f"{killed.total():4} {model} {command.name}: signal {number} at {where}", flush=True)
            found = differences(dict(content(folder / command.out)), left) + still_running(folder.resolve())
            if ended.code == cli.OK:  # else it was killed between its result and its end
                found += left_over(folder)
            if found:
                wrong.append(f"{model} {command.name}, turn {turn}: {'; '.join(found)[:2000]}")
                print(f"WRONG: {wrong[-1]}", flush=True)
            if killed.total() >= options.kills:
                break
    for name, count in sorted(killed.items()):
        print(f"{name:16} {count:4} kills")
    print(f"{killed.total()} kills, {len(wrong)} wrong")
    if options.record:
        others = json.loads(options.record.read_text()) if options.record.exists() else []
        own = {"seed": options.seed, "kills": killed.total(), "wrong": wrong, "commands": dict(sorted(killed.items()))}
        own |= {"only": options.only, "models": options.models}
        own |= {"points": dict(sorted(points.items())), "device": describe_device("cpu"), "versions": versions()}
        write_json(options.record, [*(one for one in others if one["seed"] != options.seed), own])
    return int(bool(wrong))


def copied(source: Path, destination: Path) -> None:
    """Copy a folder."""
    for path in source.rglob("*"):
        if path.is_file():
            place = destination / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
