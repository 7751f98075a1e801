"""The versions a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("fdu", "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Name to version of Python and of every installed package that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
