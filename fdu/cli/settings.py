"""The settings of an erasure as options, and what they must be before any work."""

from __future__ import annotations

from typing import Any

from fdu.config import EraseConfig


class Settings(EraseConfig):
    """Settings of the erasure, named as in diffusers' training examples."""

    def __post_init__(self) -> None:
        """Nothing: what was typed is checked when it becomes an EraseConfig, so that errors read alike everywhere."""

    def checked(self, **others: Any) -> EraseConfig:
        """The settings, checked, with ``others`` for those that were not given."""
        given = {name: getattr(self, name) for name in EraseConfig.field_names()}
        return EraseConfig(**{**given, **{name: value for name, value in others.items() if given[name] is None}})


def check_images(images_per_class: int) -> None:
    """Refuse a number of images that nothing can be counted on.

    Raises:
        ValueError: it is below 1.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be >= 1, got {images_per_class}")
