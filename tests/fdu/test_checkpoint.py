"""Checkpoints: a run that was killed goes on bit for bit, and nothing that was saved is lost."""

from __future__ import annotations

import os
import re
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from in_processes import erase_with_checkpoints, started
from torch import Tensor

import fdu
from fdu.subjects.digits import pipeline as digits
from fdu.training import checkpoint as checkpoint_file
from fdu.training.checkpoint import Checkpoints
from fdu.training.step import Stepper


def start(folder: Path, **settings: Any) -> BaseProcess:
    """A run in a process of its own, which does not live to its end."""
    folder.mkdir(exist_ok=True)
    return started(erase_with_checkpoints, str(folder), settings, errors=folder / "stderr")


def finished(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """The same in this process."""
    result = fdu.erase(digits.load_pipeline(), "three", "eight", checkpoint_dir=str(folder / "checkpoints"), **settings)
    weights = {name: parameter.detach() for name, parameter in result.trainable.named_parameters().items()}
    history = {name: torch.tensor(values) for name, values in result.history.items()}
    return {**weights, **history, "sigma": torch.tensor(result.sigma)}


def kill_at(process: BaseProcess, folder: Path, step: int, number: signal.Signals) -> str:
    """Send the signal once the checkpoint of a step is there; the last words of the process."""
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / f"checkpoint-{step}").exists():
        assert process.is_alive() and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(200)
    return (folder / "stderr").read_text()


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"gradient_accumulation_steps": 2},
    "cross_attention": {"train_method": "cross_attention", "timestep_sampling": "importance", "weighting": "min_snr"},
    "critic": {"variational": True, "divergence": "jensen_shannon", "critic_warmup_steps": 3},
    "token": {"train_method": "token", "gradient_surgery": True},
    "cached": {"frozen_batches": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_bit_for_bit(quick: dict[str, Any], tmp_path: Path, variant: str) -> None:
    settings = {**quick, "max_train_steps": 14, "checkpointing_steps": 5, **VARIANTS[variant]}
    whole = finished(tmp_path / "whole", **settings)
    killed = start(tmp_path / "killed", **settings)
    kill_at(killed, tmp_path / "killed", 5, signal.SIGKILL)
    assert killed.exitcode == -signal.SIGKILL
    resumed = finished(tmp_path / "killed", **settings, resume_from_checkpoint="latest")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_where_the_run_is(quick: dict[str, Any], tmp_path: Path, number: signal.Signals) -> None:
    settings = {**quick, "max_train_steps": 60, "checkpointing_steps": 5}
    process = start(tmp_path / "run", **settings)
    words = kill_at(process, tmp_path / "run", 5, number)
    assert process.exitcode != 0 and words.rstrip().endswith("KeyboardInterrupt")
    kept = Checkpoints(tmp_path / "run" / "checkpoints", 2, {}).all()
    assert int(kept[-1].name.removeprefix("checkpoint-")) > 5


@pytest.fixture
def run(quick: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings with a checkpoint after every second step."""
    return {**quick, "checkpoint_dir": str(tmp_path / "kept"), "checkpointing_steps": 2, "max_train_steps": 6}


def test_a_run_keeps_its_newest_checkpoints_and_clears_away_unfinished_ones(
    pipeline: StableDiffusionPipeline, run: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "kept" / ".checkpoint-2-abc").mkdir(parents=True)
    result = fdu.erase(pipeline, "three", "eight", **run, resume_from_checkpoint="latest")
    assert len(result.history["loss"]) == 6, "without a checkpoint the run starts from scratch"
    names = sorted(path.name for path in (tmp_path / "kept").glob("*checkpoint*"))
    assert names == ["checkpoint-4", "checkpoint-6"]
    files = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors"}, "no pickles"


def test_another_runs_checkpoints_are_refused_before_any_work(run: dict[str, Any], tmp_path: Path) -> None:
    fdu.erase(digits.load_pipeline(), "three", "eight", **run)
    with pytest.raises(FileExistsError, match="checkpoint_dir.*'latest'"):
        fdu.erase(digits.load_pipeline(), "three", "eight", **run)
    again = {**run, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"learning_rate 0\.004.*0\.1"):
        fdu.erase(digits.load_pipeline(), "three", "eight", **again, learning_rate=0.1)
    with pytest.raises(ValueError, match="another run.*concepts"):
        fdu.erase(digits.load_pipeline(), "four", "eight", **again)
    other = digits.load_pipeline()
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 1
    with pytest.raises(ValueError, match="another run.*base"):
        fdu.erase(other, "three", "eight", **again)
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint.*none'.*state.safetensors"):
        fdu.erase(digits.load_pipeline(), "three", "eight", **{**run, "resume_from_checkpoint": str(tmp_path / "none")})
    newest = tmp_path / "kept" / "checkpoint-6" / "state.safetensors"
    this = {**run, "resume_from_checkpoint": str(newest.parent)}
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match="checkpoint-6'.*older"):
        fdu.erase(digits.load_pipeline(), "three", "eight", **this)
    (tmp_path / "kept" / "checkpoint-4").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no checkpoint .*'checkpoint-6'.*scratch"):
        fdu.erase(digits.load_pipeline(), "three", "eight", **again)
    (tmp_path / "elsewhere").rename(tmp_path / "kept" / "checkpoint-4")
    older = {**run, "resume_from_checkpoint": str(tmp_path / "kept" / "checkpoint-4")}
    assert len(fdu.erase(digits.load_pipeline(), "three", "eight", **older).history["loss"]) == 6


def test_a_checkpoint_may_have_former_names_of_settings(tmp_path: Path) -> None:
    Checkpoints(tmp_path, 2, {"config": {"guidance_scale": 2.0, "snr_gamma": 5.0}}).save(1, {})
    now = {"sampling_guidance": 2.0, "snr_gamma": None}
    assert Checkpoints(tmp_path, 2, {"config": now}).load("latest") == (1, {})
    with pytest.raises(ValueError, match=r"with sampling_guidance 2\.0, this run has 3\.0"):
        Checkpoints(tmp_path, 2, {"config": {"sampling_guidance": 3.0}}).load("latest")


def test_a_run_with_other_weights_is_another_run(run: dict[str, Any]) -> None:
    targets = [fdu.Concept("three"), fdu.Concept("four")]
    fdu.erase(digits.load_pipeline(), targets, "eight", **run)
    targets[0] = fdu.Concept("three", weight=2.0)
    with pytest.raises(ValueError, match="another run.*weights"):
        fdu.erase(digits.load_pipeline(), targets, "eight", **run, resume_from_checkpoint="latest")


def test_what_was_just_written_is_not_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, {"config": {}})
    for step in (300, 400, 200):
        assert checkpoints.save(step, {}).is_dir()
    assert [path.name for path in checkpoints.all()] == ["checkpoint-200", "checkpoint-400"]


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    pipeline: StableDiffusionPipeline, run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    real, calls = checkpoint_file.save_file, []

    def full(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
        calls.append(1)
        real(tensors, path, header)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_file, "save_file", full)
    result = fdu.erase(pipeline, "three", "eight", **run)
    assert len(result.history["loss"]) == 6
    assert re.search("step 4.*No space left on device", caplog.text)
    assert sorted(path.name for path in (tmp_path / "kept").glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-6"]


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    pipeline: StableDiffusionPipeline, run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Stepper.step

    def broken(self: Stepper, number: int) -> Tensor:
        if number == 4:
            self.parameters[0].data.fill_(float("nan"))
        return real(self, number)

    monkeypatch.setattr(Stepper, "step", broken)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    with pytest.raises(RuntimeError, match="nan at step 4.*checkpoint-4'"):
        fdu.erase(pipeline, "three", "eight", **run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert [path.name for path in Checkpoints(tmp_path / "kept", 2, {}).all()][-1] == "checkpoint-4"
    monkeypatch.setattr(Stepper, "step", real)
    resumed = fdu.erase(pipeline, "three", "eight", **run, resume_from_checkpoint="latest")
    assert all(value == value for value in resumed.history["loss"])


def test_keys_and_kinds_survive(tmp_path: Path) -> None:
    state = {"a": {0: torch.ones(2), "1": [1, (2.5, None)]}, "b": True, "c": torch.tensor(3, dtype=torch.int64)}
    checkpoints = Checkpoints(tmp_path, 1, {"config": {}})
    checkpoints.save(3, state)
    found = checkpoints.load("latest")
    assert found is not None and found[0] == 3
    assert found[1]["a"][0].tolist() == [1, 1] and found[1]["a"]["1"] == [1, (2.5, None)]
    assert found[1]["b"] is True and found[1]["c"].dtype == torch.int64
    with pytest.raises(TypeError, match="cannot hold a set"):
        checkpoints.save(4, {"a": {1, 2}})
    assert [path.name for path in checkpoints.all()] == ["checkpoint-3"]
