"""The packages of fdu import downwards only, no name stands twice, and ``__init__.py`` files hold no logic."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fdu

ROOT = Path(fdu.__file__).parent
LAYERS = (
    ("concepts", "config"),
    ("models",),
    ("storage",),
    ("training",),
    ("evaluation",),
    ("subjects",),
    ("report",),
    ("result",),
    ("erasure",),
    ("comparison",),
    ("cli",),
)
"""The API's files and the packages, lowest first. What stands in one line may import one another."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def module_of(file: Path) -> str:
    """The dotted name of a file, and of a package's ``__init__.py``."""
    parts = file.with_suffix("").parts
    return ".".join(("fdu", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_of(file) for file in FILES}


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of fdu that a file imports anywhere, also within functions and by their name as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and (node.module == "fdu" or node.module.startswith("fdu.")):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name == "fdu" or alias.name.startswith("fdu."))


def test_every_file_has_its_place() -> None:
    top = {file.parts[0].removesuffix(".py") for file in FILES} - {"__init__", "__main__"}
    assert top == set(RANK)
    assert sum((ROOT / name).is_dir() for name in RANK) <= 8


def test_imports_point_downwards() -> None:
    upwards = []
    for file, tree in FILES.items():
        here = file.parts[0].removesuffix(".py")
        for module in imported(tree):
            there = module.split(".")[1] if "." in module else ""
            if here in RANK and there and RANK[there] > RANK[here]:
                upwards.append(f"{file}: {module}")
    assert not upwards


def test_no_module_imports_itself_through_others() -> None:
    arrows = {module_of(file): {name for name in imported(tree) if name != "fdu"} for file, tree in FILES.items()}

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = list(arrows[start])
        while ahead:
            module = ahead.pop()
            if module not in found:
                found.add(module)
                ahead += arrows.get(module, ())
        return found

    circles = [module for module in arrows if module != "fdu" and module in reached(module)]
    assert not circles


def test_no_name_stands_twice() -> None:
    files = Counter(file.stem for file in FILES if file.stem not in ("__init__", "__main__"))
    classes = Counter(node.name for tree in FILES.values() for node in tree.body if isinstance(node, ast.ClassDef))
    twice = [name for name, count in (files + classes).items() if count > 1]
    assert not twice


def test_packages_hold_no_logic() -> None:
    for file, tree in FILES.items():
        if file.name == "__init__.py" and file.parent != Path("."):
            kinds = {type(node) for node in tree.body}
            assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, f"{file} does more than import"
