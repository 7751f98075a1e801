"""A flipped bit in a checkpoint or in the cache never trains on: it is found, named and made good."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import fdu
from fdu.storage.integrity import read_sealed, sealed
from fdu.subjects.digits import pipeline as digits
from fdu.training.cache import Cache
from fdu.training.checkpoint import Checkpoints

STATE = {"trained": {"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3, dtype=torch.bfloat16)}, "last": 0.25}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def damaged(folder: Path, step: int, bit: int | None = None) -> Path:
    """A checkpoint with one bit of its last tensor, or another bit, flipped."""
    path = folder / f"checkpoint-{step}" / "state.safetensors"
    flip(path, 8 * path.stat().st_size - 1 if bit is None else bit)
    return path


def test_no_flipped_bit_of_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, {"config": {}})
    path = checkpoints.save(3, STATE) / "state.safetensors"
    whole = path.read_bytes()
    refused = 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 300):
        flip(path, bit)
        try:
            found = checkpoints.load(str(path.parent))
        except ValueError as error:
            assert "checkpoint-3" in str(error) and "older" in str(error)
            refused += 1
        else:
            assert found is not None and found[0] == 3 and same(found[1], STATE), f"bit {bit}"
        path.write_bytes(whole)
    assert refused > 250


def test_the_latest_is_the_newest_that_is_whole_and_the_damaged_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, 3, {"config": {}})
    for step in (1, 2, 3):
        checkpoints.save(step, STATE)
    damaged(tmp_path, 3)
    found = checkpoints.load("latest")
    assert found is not None and found[0] == 2 and same(found[1], STATE)
    assert "checkpoint-3" in caplog.text and "SHA-256" in caplog.text
    (tmp_path / "checkpoint-2" / "state.safetensors").unlink()
    damaged(tmp_path, 1)
    with pytest.raises(ValueError, match="no checkpoint in .*'checkpoint-3'.*scratch"):
        checkpoints.load("latest")
    with pytest.raises(ValueError, match="checkpoint-1'.*SHA-256.*older"):
        checkpoints.load(str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    "header",
    ["[" * 100_000, "[1]", '{"step": "1", "manifest": {}, "state": 1}', '{"step": 1, "manifest": [], "state": 1}',
     '{"step": 1, "manifest": {}, "state": {"tensor": "x"}}', '{"step": 1, "manifest": {}, "state": {"a": 1, "b": 2}}'],
    ids=["deep", "list", "step", "manifest", "absent", "kinds"],
)  # fmt: skip
def test_headers_of_another_kind(header: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    tensors = {"a": torch.zeros(1)}
    save_file(tensors, tmp_path / "checkpoint-1" / "state.safetensors", sealed(tensors, {"checkpoint": header}))
    with pytest.raises(ValueError, match="checkpoint-1' cannot be read"):
        Checkpoints(tmp_path, 2, {"config": {}}).load(str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_of_an_earlier_version_has_no_digest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, {"config": {}})
    path = checkpoints.save(3, STATE) / "state.safetensors"
    tensors, metadata = read_sealed(path)
    save_file(tensors, path, {"checkpoint": metadata["checkpoint"]})
    found = checkpoints.load("latest")
    assert found is not None and same(found[1], STATE)


def weights_of(pipeline: StableDiffusionPipeline, **settings: Any) -> dict[str, Tensor]:
    result = fdu.erase(pipeline, *digits.concepts("three", "eight"), **settings)
    return {name: parameter.detach().clone() for name, parameter in result.trainable.named_parameters().items()}


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(
    quick: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**quick, "max_train_steps": 4, "checkpointing_steps": 1, "checkpoint_dir": str(tmp_path)}
    whole = weights_of(digits.load_pipeline(), **settings)
    damaged(tmp_path, 4)
    resumed = weights_of(digits.load_pipeline(), **settings, resume_from_checkpoint="latest")
    assert "checkpoint-4" in caplog.text and same(resumed, whole)


def test_a_checkpoint_with_other_weights_is_refused_in_words(quick: dict[str, Any], tmp_path: Path) -> None:
    settings = {**quick, "max_train_steps": 2, "checkpointing_steps": 1, "checkpoint_dir": str(tmp_path)}
    weights_of(digits.load_pipeline(), **settings)
    path = tmp_path / "checkpoint-2" / "state.safetensors"
    tensors, metadata = read_sealed(path)
    name = next(name for name in tensors if name.startswith(".trained."))
    renamed = json.dumps(json.loads(metadata["checkpoint"])).replace(name.removeprefix(".trained."), "other")
    tensors = {one.replace(name.removeprefix(".trained."), "other"): tensor for one, tensor in tensors.items()}
    save_file(tensors, path, sealed(tensors, {"checkpoint": renamed}))
    pipeline = digits.load_pipeline()
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    with pytest.raises(ValueError, match="checkpoint after step 2 does not fit this run"):
        weights_of(pipeline, **settings, resume_from_checkpoint="latest")
    assert same(dict(pipeline.unet.state_dict()), before)


# The cache


def test_no_flipped_bit_of_the_cache_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path, {"base": 1}, Accelerator(cpu=True))
    tensors, made = {"wanted": torch.arange(20.0)}, []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return tensors

    assert same(cache.get("frozen", {"a": 1}, make), tensors) and same(cache.get("frozen", {"a": 1}, make), tensors)
    assert len(made) == 1 and not caplog.text
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 200):
        flip(path, bit)
        assert same(cache.get("frozen", {"a": 1}, make), tensors), f"bit {bit}"
        path.write_bytes(whole)
    assert len(made) > 150 and path.name in caplog.text and "made again" in caplog.text


@pytest.mark.parametrize("kind", ["lacking", "foreign", "unsealed"])
def test_an_entry_that_parses_but_is_none(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path, {"base": 1}, Accelerator(cpu=True))
    tensors = {"wanted": torch.ones(3), "other": torch.zeros(2)}
    cache.get("frozen", {"a": 1}, lambda: tensors)
    (path,) = tmp_path.iterdir()
    metadata = read_sealed(path)[1]
    if kind == "lacking":
        save_file({"wanted": torch.ones(3)}, path, metadata)
    elif kind == "foreign":
        other = {"wanted": torch.zeros(3), "other": torch.zeros(2)}
        save_file(other, path, sealed(other, {"key": "of other inputs"}))
    else:
        save_file({"wanted": torch.zeros(3)}, path)
    assert same(cache.get("frozen", {"a": 1}, lambda: tensors), tensors)
    assert path.name in caplog.text
    caplog.clear()
    assert same(cache.get("frozen", {"a": 1}, lambda: pytest.fail("it was made good")), tensors) and not caplog.text
    assert same(load_file(path), tensors)
