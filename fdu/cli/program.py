"""Parse the arguments, run the command, and turn its outcome into an exit code."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import tyro

import fdu
from fdu.cli.compare import Compare
from fdu.cli.demo import Demo
from fdu.cli.divergences import Divergences
from fdu.cli.doctor import Doctor
from fdu.cli.erase import Erase
from fdu.cli.evaluate import Evaluate, Report
from fdu.cli.names import Names, complete
from fdu.cli.options import check_typed, described, expanded, in_own_case, option_names
from fdu.cli.planning import Plan
from fdu.cli.studio import Studio
from fdu.storage.loading import MissingPackage

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""The exit codes: done; a run failed; wrong arguments, nothing was done; Ctrl-C."""


class Command(Protocol):
    """A subcommand: a dataclass whose fields are its arguments and whose docstring is its help."""

    examples: ClassVar[tuple[str, ...]]
    """Command lines at the end of the help."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Check all arguments of the command line ``command`` and return a function that does the work."""


COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "erase": Erase,
    "evaluate": Evaluate,
    "report": Report,
    "studio": Studio,
    "compare": Compare,
    "plan": Plan,
    "names": Names,
    "divergences": Divergences,
    "doctor": Doctor,
}
DESCRIPTION = "Concept erasure for diffusers pipelines by f-divergence minimisation."
EXAMPLES = (
    "fdu demo",
    "fdu erase org/model --target 'van gogh' --anchor painting --concept_type style --out erased",
    "fdu doctor",
)
"""Command lines at the end of the help of ``fdu`` itself."""
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MissingPackage)
"""Errors that a user can cause, shown in one or two lines. Any other error is a bug and keeps its traceback."""

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory")
NEEDS_LESS = (
    "fdu: `fdu plan MODEL --memory GIB`, with the settings of the erasure, names options that need less memory; an "
    "evaluation takes a smaller --batch_size and --robustness_batch_size. Help: It ran out of memory "
    "(docs/help/out-of-memory.md)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (of the process, if None) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("FDU_DEBUG", "0") not in ("", "0")
    given = [argument for argument in given if argument != "--debug"]
    if given[:1] == ["--version"]:
        print(f"fdu {fdu.__version__}")
        return OK
    if given[:1] == ["names"] and complete(COMMANDS):
        return OK
    _quiet()
    phase = USAGE
    try:
        command = parse(given or ["--help"])
        processes = os.environ.get("WORLD_SIZE", "1") if "LOCAL_RANK" in os.environ else "1"
        if processes != "1" and not isinstance(command, Erase):
            raise ValueError(
                f"fdu {given[0]} runs in one process, not in {processes}; start it without accelerate launch"
            )
        work = command.prepare(shlex.join(["fdu", *_without_push(given)]))
        phase = FAILED
        work()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK
    except KeyboardInterrupt:
        print("\nfdu: interrupted; the output folder holds nothing half written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe, so the rest of the output is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        print(f"fdu: error: {error}", file=sys.stderr)
        if NO_MEMORY.search(str(error)):
            print(NEEDS_LESS, file=sys.stderr)
        if phase == FAILED and not debug:
            print("fdu: add --debug for the traceback", file=sys.stderr)
        return phase
    return OK


def parse(arguments: list[str]) -> Command:
    """The command that the arguments describe.

    Raises:
        ValueError: an unknown command or option.
        SystemExit: after the help, which ends with examples, or after the message for wrong usage.
    """
    arguments = in_own_case(arguments)
    if arguments[0] in ("erase", "plan"):
        arguments = expanded(arguments, option_names(COMMANDS[arguments[0]])[0])
    check_typed(arguments, COMMANDS)
    config = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    typed, *rest = arguments
    try:
        if typed in COMMANDS:
            kind = described(COMMANDS[typed])
            return tyro.cli(kind, prog=f"fdu {typed}", args=rest, use_underscores=True, config=config)
        return tyro.extras.subcommand_cli_from_dict({**COMMANDS}, prog="fdu", description=DESCRIPTION, args=arguments)
    except SystemExit as stop:
        if stop.code in (OK, None):
            examples = COMMANDS[arguments[0]].examples if arguments[0] in COMMANDS else EXAMPLES
            print("examples:", *(f"  {example}" for example in examples), sep="\n")
            print("\n--debug, or FDU_DEBUG=1, shows the traceback of an error; fdu --version prints the version.")
        raise


def _without_push(arguments: Sequence[str]) -> list[str]:
    """The arguments without the options of a push: what is recorded must not hold a token, nor push when it is run."""
    words, rest = [], iter(arguments)
    for word in rest:
        name, equals, _ = word.partition("=")
        name = name[2:].replace("-", "_") if name.startswith("--") else ""
        if name in ("hub_model_id", "hub_token"):
            if not equals:
                next(rest, None)
        elif name not in ("push_to_hub", "push_unevaluated", "hub_private_repo"):
            words.append(word)
    return words


def _quiet() -> None:
    """Silence only the warnings of transformers and diffusers that come at every start and need no action."""
    silenced = ("requires torchvision", "You have disabled the safety checker")

    for name in (
        "transformers.utils.import_utils",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.pipelines.pipeline_utils",
    ):
        logging.getLogger(name).addFilter(lambda record: not any(words in record.getMessage() for words in silenced))
    warnings.filterwarnings("ignore", message=".*torchvision.*")
