"""The sizes of images that a model can draw."""

from __future__ import annotations


def check_size(resolution: int, unit: int, native: tuple[int, int] | None) -> None:
    """Refuse a resolution in pixels that is not a positive multiple of ``unit``.

    Raises:
        ValueError: it is not; names the nearest one that is, and the model's own.
    """
    if resolution <= 0 or resolution % unit:
        hint = f"try {max(1, round(resolution / unit)) * unit}"
        hint += f"; the model's own is {native[0]} x {native[1]}" if native else ""
        raise ValueError(f"resolution must be a positive multiple of {unit} pixels, got {resolution}; {hint}")
