"""For all tests: which of them ``make test`` leaves to ``make test-all``, and which stay in one process."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what ``quick`` does not name; a test whose mark names what does not exist fails."""
    # Otherwise some items of a test may be missing.
    complete = not config.getoption("lf", False) and not any("::" in argument for argument in config.args)
    stale = _stale_marks(items) if complete else {}
    for item in items:
        if item in stale:
            item.runtest = functools.partial(pytest.fail, stale[item], pytrace=False)
        elif not _is_quick(item):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests of a file that has a fixture per module to one process, which makes the fixture once.

    pytest-xdist 3.8 would do this with ``--dist loadgroup``, but not beside pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def has_module_fixture(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text()

    class FixtureScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if has_module_fixture(file) else nodeid

    return FixtureScheduling(config, log) if config.getoption("dist") == "load" else None


def _is_quick(item: pytest.Item) -> bool:
    """Whether the parameters of a test are among those that its marks ``quick`` name; the closest mark counts."""
    given = _parameters(item)
    wanted: dict[str, Iterable[Any]] = {}
    for mark in item.iter_markers("quick"):
        for name, values in mark.kwargs.items():
            wanted.setdefault(name, values)
    return all(given[name] in list(values) for name, values in wanted.items() if name in given)


def _stale_marks(items: list[pytest.Item]) -> dict[pytest.Item, str]:
    """What is wrong with marks ``quick``, by an item below them: every value that they name must be one of an item.

    The mark of a module may name a parameter that no test has on this machine; the mark of a test may not.
    """
    marks: dict[int, tuple[pytest.Mark, pytest.Item]] = {}
    seen: dict[tuple[int, str], list[Any]] = {}
    for item in items:
        given = _parameters(item)
        for mark in item.iter_markers("quick"):
            marks[id(mark)] = mark, item
            for name in set(mark.kwargs) & set(given):
                seen.setdefault((id(mark), name), []).append(given[name])
    wrong = {}
    for key, (mark, item) in marks.items():
        for name, values in mark.kwargs.items():
            found = seen.get((key, name), [] if mark in item.own_markers else list(values))
            if stale := [value for value in values if value not in found]:
                wrong[item] = f"{item.nodeid}: quick names {name}={stale}, which no test has"
    return wrong


def _parameters(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a test; of a row of a table, its name."""
    given: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    return {
        name: value[0] if isinstance(value, tuple) and value and isinstance(value[0], str) else value
        for name, value in given.items()
    }
