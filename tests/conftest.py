"""For all tests: which of them ``make test`` leaves to ``make test-all``, and which stay in one process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what ``quick`` does not name, and keep together what shares a fixture of its module."""
    in_parallel = config.pluginmanager.hasplugin("xdist")
    for item in items:
        if not _is_quick(item):
            item.add_marker(pytest.mark.slow)
        fixtures = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
        costly = [name for name, (*_, last) in fixtures.items() if last.scope == "module" and name != "own_cache"]
        if costly and in_parallel:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


def _is_quick(item: pytest.Item) -> bool:
    """Whether the parameters of a test are among those that its marks ``quick`` name; the closest mark counts."""
    given: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    wanted: dict[str, Iterable[Any]] = {}
    for mark in item.iter_markers("quick"):
        for name, values in mark.kwargs.items():
            wanted.setdefault(name, values)
    for mark in item.own_markers:
        if mark.name == "quick" and not set(mark.kwargs) <= set(given):
            raise pytest.UsageError(
                f"{item.nodeid}: quick names {set(mark.kwargs) - set(given)}, which are no parameters"
            )
    return all(_name(given[name]) in list(values) for name, values in wanted.items() if name in given)


def _name(value: Any) -> Any:
    """A parameter; of a row of a table, its name."""
    return value[0] if isinstance(value, tuple) and value and isinstance(value[0], str) else value
