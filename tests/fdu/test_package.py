"""The package gives its public names at first use, and ``fdu.erase`` is always the function."""

from __future__ import annotations

import pytest

import fdu


def test_every_public_name_is_there() -> None:
    for name in fdu.__all__:
        assert getattr(fdu, name).__name__ == name
    assert set(fdu.__all__) <= set(dir(fdu))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'fdu'.*no attribute 'eraser'"):
        fdu.eraser  # noqa: B018
