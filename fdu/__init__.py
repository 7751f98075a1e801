"""Concept erasure for diffusers pipelines by f-divergence minimisation (Novello et al. 2026, arXiv 2509.21167).

>>> import fdu
>>> result = fdu.erase(pipeline, target="van gogh", anchor="painting", concept_type="style")  # doctest: +SKIP
>>> result.save("erased/")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdu.concepts import Concept
    from fdu.config import EraseConfig
    from fdu.erasure import erase
    from fdu.evaluation import Attribute, Draws, Evaluation, Figures, Probe, draw, evaluate
    from fdu.presets import preset
    from fdu.result import ErasureResult
    from fdu.storage.readers import load_weights
    from fdu.subjects.registry import load_pipeline

__version__ = "0.1.0"

__all__ = [
    "Attribute",
    "Concept",
    "Draws",
    "EraseConfig",
    "ErasureResult",
    "Evaluation",
    "Figures",
    "Probe",
    "draw",
    "erase",
    "evaluate",
    "load_pipeline",
    "load_weights",
    "preset",
]

_HOMES = {
    "Concept": "fdu.concepts",
    "EraseConfig": "fdu.config",
    "ErasureResult": "fdu.result",
    "erase": "fdu.erasure",
    "load_pipeline": "fdu.subjects.registry",
    "load_weights": "fdu.storage.readers",
    "preset": "fdu.presets",
    **dict.fromkeys(("Attribute", "Draws", "Evaluation", "Figures", "Probe", "draw", "evaluate"), "fdu.evaluation"),
}
"""Where each public name is defined. Imported at first use: diffusers takes seconds, `fdu --help` should not."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fdu' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
