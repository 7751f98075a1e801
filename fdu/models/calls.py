"""Switch off a pipeline's own progress bars where a longer one runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def silent(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within this context the pipeline draws without a progress bar of its own."""
    settings = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline._progress_bar_config = settings
