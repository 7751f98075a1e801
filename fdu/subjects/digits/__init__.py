"""The embedded pipeline: a latent text-to-image pipeline of handwritten digits in coloured ink, and its judge."""

from __future__ import annotations

from fdu.subjects.digits.pipeline import (
    JUDGE,
    NOTES,
    PIPELINE_FOLDER,
    SUPERCLASS,
    concepts,
    features,
    judges,
    load_classifier,
    load_pipeline,
    preserved,
    probes,
    with_preserved,
)

__all__ = [
    "JUDGE",
    "NOTES",
    "PIPELINE_FOLDER",
    "SUPERCLASS",
    "concepts",
    "features",
    "judges",
    "load_classifier",
    "load_pipeline",
    "preserved",
    "probes",
    "with_preserved",
]
