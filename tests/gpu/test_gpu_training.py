"""Trainings and evaluations on an NVIDIA GPU. Without a GPU every test is skipped by name, but in a rehearsal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_testing import DEVICE, REHEARSAL, anywhere, on_a_gpu
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import fdu
from fdu.subjects.digits import pipeline as digits
from fdu.training.step import Stepper

pytestmark = anywhere

STEPS, SAVED, STOPPED, BATCH = (3, 1, 2, 1) if REHEARSAL else (12, 5, 8, 4)
"""Steps of a run; after which it keeps a checkpoint; at which it is stopped; samples of a batch."""
BF16 = "no" if REHEARSAL else "bf16"
"""Many CPUs compute in bf16 so slowly that a rehearsal would take minutes."""
QUICK: dict[str, Any] = {
    "max_train_steps": STEPS, "train_batch_size": BATCH, "num_latents": 2 * BATCH, "num_inference_steps": 2, "rank": 4,
}  # fmt: skip


def erase(device: str = DEVICE, **settings: Any) -> fdu.ErasureResult:
    """ "three" towards "eight" on a pipeline of its own."""
    settings = settings if settings.get("train_method") == "closed_form" else {**QUICK, **settings}
    return fdu.erase(digits.load_pipeline().to(device), *digits.concepts("three", "eight"), **settings)


def weights(result: fdu.ErasureResult) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in result.trainable.named_parameters().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_method": "full", "learning_rate": 1e-5, "mixed_precision": BF16},
        pytest.param({"mixed_precision": "fp16", "timestep_sampling": "importance"}, marks=on_a_gpu),
        {"timestep_sampling": "importance", "mixed_precision": BF16},
        {"gradient_surgery": True, "mixed_precision": BF16},
        {"train_method": "text_encoder"},
        {"train_method": "token"},
        {"variational": True, "divergence": "kl", "critic_warmup_steps": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_deterministic_run_resumes_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "deterministic": True}
    whole = weights(erase(**settings))
    # A CPU adds in one order anyway.
    assert REHEARSAL or same(weights(erase(**settings)), whole)
    kept = {"checkpoint_dir": str(tmp_path), "checkpointing_steps": SAVED}
    with monkeypatch.context() as patch:
        real = Stepper.step

        def stopped(self: Stepper, number: int) -> Tensor:
            if number == STOPPED:
                raise KeyboardInterrupt
            return real(self, number)

        patch.setattr(Stepper, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            erase(**settings, **kept)
    assert same(weights(erase(**settings, **kept, resume_from_checkpoint="latest")), whole)


def test_frozen_batches_are_those_that_were_drawn(tmp_path: Path) -> None:
    """They go to the host and back, and the cache finds them again by their contents."""
    # One batch per pass, or they would round differently.
    settings = {"frozen_batches": STEPS, "sample_batch_size": 1, "deterministic": True, "training_cache": str(tmp_path)}
    first = weights(erase(**settings))
    found = {path.name for path in tmp_path.iterdir()}
    assert same(weights(erase(**settings)), first)
    assert {path.name for path in tmp_path.iterdir()} == found
    assert same(weights(erase(**{**settings, "frozen_batches": 0})), first)


@on_a_gpu
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


@on_a_gpu
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


def test_an_erasure_is_drawn_and_judged_as_on_the_cpu() -> None:
    probes = [probe for probe in digits.probes("three", anchor="eight") if probe.name in ("three", "eight")]
    settings: dict[str, Any] = {"images_per_class": 2, "num_inference_steps": 4, "guidance_scale": 3.0}
    settings["batch_size"] = 16
    drawn = []
    for device in (DEVICE, "cpu"):
        result = erase(device, train_method="closed_form")
        with result.original() as pipeline:
            before = fdu.draw(pipeline, probes, **settings)
        drawn += [before, fdu.draw(result.pipeline, probes, **settings)]
    found = fdu.evaluate(*drawn[:2], probes)
    assert found.change["target"] > 2 * found.change["retained"] > 0
    for here, there in zip(drawn[:2], drawn[2:], strict=True):
        differences = [(one - other).abs().mean() for one, other in zip(here.images, there.images, strict=True)]
        assert max(differences) < 0.02  # cuDNN's convolutions round their inputs to TF32
