"""Trainings on an NVIDIA GPU: what only one can show. Without a GPU every test is skipped by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import fdu
from fdu.subjects.digits import pipeline as digits
from fdu.training.step import Stepper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

QUICK: dict[str, Any] = {
    "max_train_steps": 12, "train_batch_size": 4, "num_latents": 8, "num_inference_steps": 2, "rank": 4,
}  # fmt: skip


def erase(**settings: Any) -> fdu.ErasureResult:
    """ "three" towards "eight" on a pipeline of its own on the GPU."""
    return fdu.erase(digits.load_pipeline().to("cuda"), *digits.concepts("three", "eight"), **{**QUICK, **settings})


def weights(result: fdu.ErasureResult) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in result.trainable.named_parameters().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_method": "full", "learning_rate": 1e-5, "mixed_precision": "bf16"},
        {"mixed_precision": "fp16", "timestep_sampling": "importance"},
        {"train_method": "text_encoder"},
        {"variational": True, "divergence": "kl", "critic_warmup_steps": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_deterministic_run_resumes_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "deterministic": True}
    whole = weights(erase(**settings))
    assert same(weights(erase(**settings)), whole)
    kept = {"checkpoint_dir": str(tmp_path), "checkpointing_steps": 5}
    with monkeypatch.context() as patch:
        real = Stepper.step

        def stopped(self: Stepper, number: int) -> Tensor:
            if number == 8:
                raise KeyboardInterrupt
            return real(self, number)

        patch.setattr(Stepper, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            erase(**settings, **kept)
    assert same(weights(erase(**settings, **kept, resume_from_checkpoint="latest")), whole)


def test_frozen_batches_are_those_that_were_drawn(tmp_path: Path) -> None:
    """They go to the host and back, and the cache finds them again by their contents."""
    settings = {"frozen_batches": 12, "sample_batch_size": 2, "deterministic": True, "cache_dir": str(tmp_path)}
    first = weights(erase(**settings))
    found = {path.name for path in tmp_path.iterdir()}
    assert same(weights(erase(**settings)), first)
    assert {path.name for path in tmp_path.iterdir()} == found
    assert same(weights(erase(**{**settings, "frozen_batches": 0})), first)


def test_overflows_leave_the_schedule_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Stepper] = []
    real = Stepper.__post_init__

    def noted(self: Stepper) -> None:
        real(self)
        made.append(self)

    monkeypatch.setattr(Stepper, "__post_init__", noted)
    scale, scaled = torch.amp.GradScaler.scale, []

    def overflowing(self: Any, loss: Tensor) -> Tensor:
        scaled.append(scale(self, loss))
        return scaled[-1] * (math.inf if len(scaled) <= 2 else 1.0)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflowing)
    erase(mixed_precision="fp16")
    (stepper,) = made
    assert stepper.optimizer.defaults["fused"]  # type: ignore[attr-defined]
    assert {float(moment["step"]) for moment in stepper.optimizer.state.values()} == {10.0}  # type: ignore[attr-defined]
    assert stepper.schedule.last_epoch == 10 and len(scaled) == 12


@pytest.mark.parametrize("method", ["lora", "text_encoder", "token"])
def test_a_step_does_not_wait_for_the_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = Stepper.step, []

    def watched(self: Stepper, number: int) -> Tensor:
        if number < 10:  # calibration, and first uses
            return real(self, number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.append(number)
            return real(self, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "step", watched)
    erase(train_method=method, timestep_sampling="uniform")
    assert steps == [10, 11]
