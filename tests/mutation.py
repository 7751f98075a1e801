"""Mutation check: change a core file in one place at a time and count the changes that its tests notice.

``python tests/mutation.py`` prints a table and the changes that survived, and ends with 1 if less than MINIMUM of those
of a file are killed. A change is an operator, a number, a name in quotes, a condition or a call without a result;
sentences, annotations and assertions stay. Each runs in a fork of one process that has imported the libraries.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import gc
import importlib
import importlib.machinery
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "fdu_kernels/functional.py": ["tests/fdu_kernels/test_functional.py"],
    "fdu/training/objective.py": ["tests/fdu/test_objective.py", "--noconftest"],
    "fdu/evaluation/verdict.py": ["tests/fdu/test_verdict.py", "--noconftest"],
    "fdu/evaluation/intervals.py": ["tests/fdu/test_metrics.py", "--noconftest"],
}
"""Each core file and the tests that must notice its changes. What these need no conftest.py for starts faster."""
MINIMUM = 0.8
TIMEOUT = 120.0
"""Seconds after which a change that makes the tests hang counts as killed."""
LIBRARIES = ("torch", "diffusers", "peft", "scipy.stats", "sklearn.metrics.pairwise", "hypothesis")
"""Imported before the forks, where they are installed. Nothing of this project."""

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "all": "any", "any": "all", "ones": "zeros", "zeros": "ones"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of a file."""

    place: int
    """Its number among the nodes of the tree."""
    kind: str
    line: int
    before: str
    after: str
    tree: ast.Module = dataclasses.field(repr=False, compare=False)


def changed(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may take a node's place, with its kind."""
    made: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        made.ops = [SWAPS[type(node.ops[0])]()]
        yield "comparison", made
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
        made.op = SWAPS[type(node.op)]()
        yield "operator", made
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield "operator", made.operand
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        made.test = ast.UnaryOp(ast.Not(), made.test)
        yield "condition", made
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        made.value = not node.value
        yield "constant", made
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        made.value = node.value + 1
        yield "number", made
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        made.value = f"{node.value}_"
        yield "name", made
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call", ast.Pass()
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        made.func.id = NAMES[node.func.id]
        yield "function", made


def untouched(tree: ast.AST) -> set[int]:
    """Nodes that stay: annotations, decorators, docstrings, assertions, imports for types, sentences."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            parts.append(node.annotation)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts += [node.returns, *node.decorator_list]
        if isinstance(node, ast.ClassDef):
            parts += node.decorator_list
        if isinstance(node, ast.JoinedStr):  # the sentence, not what stands in it
            parts += [part for part in node.values if isinstance(part, ast.Constant)]
        if isinstance(node, ast.FormattedValue):
            parts.append(node.format_spec)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):  # State = Literal[...]
            parts.append(node.value)
        if isinstance(node, (ast.Assert, ast.Import, ast.ImportFrom)):
            parts.append(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            parts.append(node)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            parts.append(node)
        for part in parts:
            if part is not None:
                skipped |= {id(one) for one in ast.walk(part)}
    return skipped


def mutants(source: str) -> list[Mutant]:
    """Every change of a source, in its order."""
    found = []
    tree = ast.parse(source)
    skipped = untouched(tree)
    for place, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        for kind, other in changed(node):
            whole = copy.deepcopy(tree)
            twin = next(one for number, one in enumerate(ast.walk(whole)) if number == place)
            _Replace(twin, other).visit(whole)
            ast.fix_missing_locations(whole)
            first = [ast.unparse(one).splitlines()[0] for one in (node, other)]
            found.append(Mutant(place, kind, getattr(node, "lineno", 0), *first, whole))
    return sorted(found, key=lambda one: (one.line, one.place))


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        if node is self.old:
            return ast.copy_location(self.new, node)
        return self.generic_visit(node)


def run(path: Path, tree: ast.Module | None, tests: Sequence[str]) -> int:
    """In a fork: the exit code of the tests with the file changed; a process that hangs is ended."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgrp()
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            if tree is not None:
                _put(path, tree)
            import pytest

            options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
            code = int(pytest.main([*options, *tests]))
        finally:
            os._exit(code)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def _put(path: Path, tree: ast.Module) -> None:
    """From now on the file is imported as the tree."""
    real = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, fullname: str) -> Any:
        if Path(self.path).resolve() == path:
            return compile(tree, str(path), "exec")
        return real(self, fullname)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the changes of one file."""

    file: str
    mutants: int
    survivors: tuple[Mutant, ...]

    @property
    def score(self) -> float:
        return 1 - len(self.survivors) / self.mutants if self.mutants else 1.0


def check(file: str, tests: Sequence[str], sample: int = 0) -> Outcome:
    """Run the tests on every change of a file, or on ``sample`` of them.

    Raises:
        RuntimeError: the tests fail on the file as it is.
    """
    path = Path(file).resolve()
    found = mutants(path.read_text(encoding="utf-8"))
    if 0 < sample < len(found):
        found = random.Random(0).sample(found, sample)
    if run(path, None, tests) != 0:
        raise RuntimeError(f"{' '.join(tests)} fail before {file} is changed: run pytest on them first")
    return Outcome(file, len(found), tuple(one for one in found if run(path, one.tree, tests) == 0))


def report(outcomes: Sequence[Outcome]) -> str:
    """The table, and what survived."""
    lines = [f"{'file':30} {'mutants':>8} {'killed':>7} {'share':>7}"]
    for one in outcomes:
        killed = one.mutants - len(one.survivors)
        lines.append(f"{one.file:30} {one.mutants:8} {killed:7} {100 * one.score:6.0f} %")
    for one in outcomes:
        lines += [
            f"survived  {one.file}:{mutant.line}  {mutant.kind}: {mutant.before}  ->  {mutant.after}"
            for mutant in one.survivors
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--tests", nargs="+", help="the tests of a file that is none of these")
    parser.add_argument("--sample", type=int, default=0, help="at most so many changes of a file. Default: all")
    given = parser.parse_args(arguments)
    importlib.import_module("pytest")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no test of these files needs a plugin
    if not given.tests:
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for name in LIBRARIES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()  # pytest collects garbage at its end: not that of the libraries
    outcomes = [check(file, given.tests or TARGETS[file], given.sample) for file in given.files or TARGETS]
    print(report(outcomes))
    return int(any(one.score < MINIMUM for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
