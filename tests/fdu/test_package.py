"""The package gives its public names at first use, and ``fdu.erase`` is always the function."""

from __future__ import annotations

import importlib
import sys

import pytest

import fdu


def test_every_public_name_is_there() -> None:
    for name in fdu.__all__:
        assert getattr(fdu, name).__name__ == name
    assert set(fdu.__all__) <= set(dir(fdu))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'fdu' has no attribute 'eraser'"):
        fdu.eraser  # noqa: B018


def test_importing_the_file_erase_does_not_hide_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fdu.erase", raising=False)
    file = importlib.import_module("fdu.erase")
    assert fdu.erase is not file
    assert callable(fdu.erase)
