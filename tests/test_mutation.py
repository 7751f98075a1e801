"""The mutation check itself, on a file of two lines: what it changes, and which changes it calls killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mutation

SOURCE = '''"""A docstring is no code."""
def larger(a: "float", b: "float") -> "float":
    return a if a > b else b
def never_tested(a):
    return -a
'''
TEST = """
from sample import larger
def test_larger():
    assert larger(1, 2) == 2 and larger(2, 1) == 2
"""


def test_every_change_is_one_place_of_the_code() -> None:
    found = mutation.mutants(SOURCE)
    assert [(one.line, one.kind) for one in found] == [(3, "condition"), (3, "comparison"), (5, "operator")]
    assert [(one.before, one.after) for one in found[1:]] == [("a > b", "a >= b"), ("-a", "a")]
    namespace: dict[str, object] = {}
    exec(compile(found[0].tree, "changed", "exec"), namespace)
    assert namespace["larger"](1, 2) == 1  # type: ignore[operator]


def test_the_table_counts_the_killed_and_lists_the_survivors(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(SOURCE)
    (tmp_path / "test_sample.py").write_text(TEST)
    command = [sys.executable, mutation.__file__, "sample.py", "--tests", "test_sample.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    table, *survivors = ran.stdout.splitlines()[1:]
    assert ran.returncode == 1 and table.split() == ["sample.py", "3", "1", "33", "%"], ran.stderr
    assert [line.split("sample.py:")[1][0] for line in survivors] == ["3", "5"]
