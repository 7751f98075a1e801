"""The embedded pipeline, loaded afresh for every test that changes it, and settings small enough for a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fdu.subjects.digits import pipeline as digits


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    loaded = digits.load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def quick() -> dict[str, Any]:
    """Settings of an erasure that takes about a second."""
    return {"max_train_steps": 4, "train_batch_size": 4, "num_latents": 8, "num_inference_steps": 2, "rank": 4}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors are slower on several threads, and much slower where tests run side by side."""
    torch.set_num_threads(1)
