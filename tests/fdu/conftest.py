"""The digits pipeline, loaded for every test that changes it, and erasures small enough for a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import fdu
from fdu.subjects.digits import pipeline as digits


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    loaded = digits.load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="session")
def quick() -> dict[str, Any]:
    """Settings of an erasure that takes half a second."""
    return {"max_train_steps": 3, "train_batch_size": 2, "num_latents": 4, "num_inference_steps": 1, "rank": 4}


@pytest.fixture(scope="session")
def plain(quick: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that an erasure of "three" towards "eight" trains with these settings and no others."""
    torch.set_num_threads(1)
    result = fdu.erase(digits.load_pipeline(), *digits.concepts("three", "eight"), **quick)
    return {name: parameter.detach().clone() for name, parameter in result.trainable.named_parameters().items()}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors are slower on several threads, and much slower where tests run side by side."""
    torch.set_num_threads(1)
