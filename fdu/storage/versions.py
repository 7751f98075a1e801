"""The versions a result depends on."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import fdu

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Name to version of fdu, Python and every installed package that a result depends on."""
    found = {"fdu": fdu.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
