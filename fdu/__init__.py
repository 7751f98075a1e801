"""Concept erasure for diffusers pipelines by f-divergence minimisation (Novello et al. 2026, arXiv 2509.21167).

>>> import fdu
>>> result = fdu.erase(pipeline, target="van gogh", anchor="painting", concept_type="style")  # doctest: +SKIP
>>> result.save("erased/")  # doctest: +SKIP
"""

from fdu.concepts import Concept
from fdu.config import EraseConfig
from fdu.erase import erase
from fdu.evaluation import Draws, Evaluation, Figures, Probe, draw, evaluate
from fdu.result import ErasureResult

__version__ = "0.1.0"

__all__ = [
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
]
