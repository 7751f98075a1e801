"""Stopping early: where the erasure has come close enough to its target, and with a learning rate that has fallen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fdu
from fdu.subjects.digits import pipeline as digits
from fdu.training.loop import CHECK_EVERY, COOL_DOWN
from fdu.training.step import Stepper

STEADY = {"max_train_steps": 60, "lr_scheduler": "constant", "train_batch_size": 8, "num_latents": 16}


def erase(quick: dict[str, Any], **settings: Any) -> fdu.ErasureResult:
    return fdu.erase(digits.load_pipeline(), *digits.concepts("three", "eight"), **{**quick, **STEADY, **settings})


def weights(result: fdu.ErasureResult) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in result.trainable.named_parameters().items()}


def test_a_run_ends_once_it_is_close_enough(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = Stepper.step

    def noting(stepper: Stepper, number: int) -> Tensor:
        rates.append(stepper.optimizer.param_groups[0]["lr"])
        return step(stepper, number)

    monkeypatch.setattr(Stepper, "step", noting)
    result = erase(quick, stop_at=0.7)
    distances = result.history["distance"]
    steps = len(distances)
    assert CHECK_EVERY < steps < STEADY["max_train_steps"] and (steps - COOL_DOWN) % CHECK_EVERY == 1
    reached = torch.tensor(distances[: steps - COOL_DOWN])
    before = result.sigma**2 * result.config.s0
    assert reached[-CHECK_EVERY:].mean() < 0.85 * before  # sigma is calibrated on other batches than these
    assert set(rates[: steps - COOL_DOWN]) == {4e-3}
    falling = rates[steps - COOL_DOWN :]
    assert falling == pytest.approx([4e-3 * (1 - place / COOL_DOWN) for place in range(COOL_DOWN)])
    assert result.record()["config"]["max_train_steps"] == 60


def test_a_run_that_does_not_come_close_takes_all_steps_and_is_the_same(quick: dict[str, Any]) -> None:
    whole, asked = (erase(quick, max_train_steps=24, stop_at=share) for share in (0.0, 0.01))
    assert len(asked.history["loss"]) == 24
    assert all(torch.equal(one, weights(whole)[name]) for name, one in weights(asked).items())


def test_where_it_begins_does_not_count_but_the_original_model(quick: dict[str, Any]) -> None:
    """A warm start is close from the first step on."""
    result = erase(quick, stop_at=0.5, init="closed_form", learning_rate=1e-4, rank=16)
    assert len(result.history["loss"]) == CHECK_EVERY + 1 + COOL_DOWN


JUDGED: dict[str, Any] = {"validation_prompts": ["a three", "three"], "validation_steps": 4, "max_train_steps": 20}


def test_a_run_ends_once_a_judge_says_so(quick: dict[str, Any], tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def erased(images: Tensor) -> bool:
        seen.append(images)
        return True

    settings = {**JUDGED, "tracking_dir": str(tmp_path)}
    result = erase(quick, **settings, stop_when=erased)
    assert len(result.history["loss"]) == 4 + COOL_DOWN
    assert len(seen) == (4 + COOL_DOWN) // 4 + 1 and seen[0].shape[:2] == (2, 3) and 0 <= seen[0].min() <= 1
    assert len(list((tmp_path / "validation").iterdir())) == len(seen)
    whole, plain = erase(quick, **settings, stop_when=lambda _: False), erase(quick, **settings)
    assert whole.history == plain.history and len(plain.history["loss"]) == 20


def test_a_judge_that_fails_costs_no_training(quick: dict[str, Any], tmp_path: Path) -> None:
    def broken(images: Tensor) -> bool:
        raise ZeroDivisionError("no such class")

    settings = {**JUDGED, "tracking_dir": str(tmp_path)}
    result = erase(quick, **settings, stop_when=broken)
    assert len(result.history["loss"]) == 20
    with pytest.raises(ValueError, match="looks every 20 steps, and the training has 20; lower validation_steps"):
        erase(quick, **{**settings, "validation_steps": 20}, stop_when=broken)


def test_a_run_that_a_judge_ends_resumes_bit_for_bit(quick: dict[str, Any], tmp_path: Path) -> None:
    settings = {**JUDGED, "tracking_dir": str(tmp_path), "checkpoint_dir": str(tmp_path), "checkpointing_steps": 4}
    calls: list[int] = []

    def erased(_: Tensor) -> bool:
        calls.append(1)
        return len(calls) == 2

    whole = erase(quick, **settings, checkpoints_total_limit=99, stop_when=erased)
    for path in tmp_path.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > 8:  # the step after which the judge was content
            shutil.rmtree(path)
    resumed = erase(quick, **settings, stop_when=lambda _: False, resume_from_checkpoint="latest")
    assert resumed.history == whole.history and len(whole.history["loss"]) == 8 + COOL_DOWN


def test_a_judge_needs_something_to_look_at(quick: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="stop_when needs a training and validation_prompts"):
        erase(quick, stop_when=lambda _: True)
    others = {"adversarial_rounds": 1, "adversarial_order": "alternate"}
    with pytest.raises(ValueError, match="stop_when may end the training before the searches"):
        erase(quick, **JUDGED, **others, stop_when=lambda _: True)


def test_a_run_that_is_ending_resumes_bit_for_bit(quick: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        "stop_at": 0.9,
        "checkpoint_dir": str(tmp_path),
        "checkpointing_steps": 4,
        "checkpoints_total_limit": 99,
    }
    whole = erase(quick, **settings)
    steps = len(whole.history["loss"])
    assert steps < STEADY["max_train_steps"]
    ending = max(step for step in range(4, steps, 4))
    assert ending > steps - COOL_DOWN
    for path in tmp_path.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > ending:
            shutil.rmtree(path)
    resumed = erase(quick, **settings, resume_from_checkpoint="latest")
    assert resumed.history == whole.history
    assert all(torch.equal(one, weights(whole)[name]) for name, one in weights(resumed).items())


def test_a_run_that_is_ending_in_its_last_steps_resumes_too(quick: dict[str, Any], tmp_path: Path) -> None:
    settings = {"stop_at": 0.9, "max_train_steps": 16, "checkpoint_dir": str(tmp_path)}
    keeping = {"checkpointing_steps": 4, "checkpoints_total_limit": 99}
    whole = erase(quick, **settings, **keeping)
    assert len(whole.history["loss"]) == 16
    shutil.rmtree(tmp_path / "checkpoint-16")
    resumed = erase(quick, **settings, **keeping, resume_from_checkpoint="latest")
    assert all(torch.equal(one, weights(whole)[name]) for name, one in weights(resumed).items())


def test_it_needs_a_target_that_can_be_reached() -> None:
    with pytest.raises(ValueError, match="stop_at needs objective 'model'"):
        fdu.EraseConfig(stop_at=0.1, objective="noise")
    with pytest.raises(ValueError, match="stop_at must be"):
        fdu.EraseConfig(stop_at=1.0)
    with pytest.raises(ValueError, match="stop_at may end the training before the searches"):
        fdu.EraseConfig(stop_at=0.1, adversarial_rounds=1, adversarial_order="alternate")
    with pytest.raises(ValueError, match="stop_at has no effect"):
        fdu.EraseConfig(stop_at=0.1, train_method="closed_form")
