"""Every family from the erasure to an image: erase, save, load in plain diffusers, draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import fdu
from fdu.storage.readers import load_weights

pytestmark = pytest.mark.quick(name=["sd", "sd3", "flux", "pixart"], method=["dora"])

NAMES = families.FAMILY_NAMES
LORA_NAMES = [name for name in NAMES if name != "pixart"]
"""diffusers has no LoRA files for PixArt; its adapters are saved merged."""
KOHYA_NAMES = [name for name in LORA_NAMES if name not in ("sana", "sd3")]
"""Families whose kohya files plain diffusers reads."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipelines in diffusers' folder format."""
    place = tmp_path_factory.mktemp("families")
    for name in NAMES:
        families.build(name).save_pretrained(place / name)
    return place


def load(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: DiffusionPipeline, name: str, prompt: str = "a photo of three") -> Tensor:
    size = families.resolution(name)
    settings: dict[str, Any] = {"use_resolution_binning": False} if name in ("pixart", "sana") else {}
    return pipeline(
        prompt,
        height=size,
        width=size,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **settings,
    ).images


def erase(pipeline: DiffusionPipeline, name: str, **settings: Any) -> fdu.ErasureResult:
    quick = {"max_train_steps": 2, "train_batch_size": 2, "num_latents": 4, "num_inference_steps": 2, "rank": 2}
    return fdu.erase(
        pipeline,
        "three",
        "eight",
        **{**quick, "learning_rate": 0.2, "resolution": families.resolution(name), **settings},
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_erasure_changes_the_target_and_comes_off(folders: Path, name: str) -> None:
    pipeline = load(folders / name)
    before = picture(pipeline, name)
    result = erase(pipeline, name)
    assert not torch.allclose(picture(pipeline, name), before, atol=1e-3)
    with result.original():
        assert torch.equal(picture(pipeline, name), before)


@pytest.mark.parametrize("name", LORA_NAMES)
def test_lora_weights_load_in_plain_diffusers(folders: Path, tmp_path: Path, name: str) -> None:
    erased = load(folders / name)
    erase(erased, name).save(tmp_path / "out", save_as="lora")
    plain = load(folders / name)
    before = picture(plain, name)
    plain.load_lora_weights(tmp_path / "out", adapter_name="erasure")
    torch.testing.assert_close(picture(plain, name), picture(erased, name), rtol=0, atol=1e-4)
    assert not torch.allclose(picture(plain, name), before, atol=1e-3)
    plain.unload_lora_weights()
    assert torch.equal(picture(plain, name), before)


@pytest.mark.parametrize("name", KOHYA_NAMES)
def test_kohya_files_load_in_plain_diffusers(folders: Path, tmp_path: Path, name: str) -> None:
    erased = load(folders / name)
    erase(erased, name).save(tmp_path / "out", save_as="kohya")
    plain = load(folders / name)
    plain.load_lora_weights(tmp_path / "out", weight_name="kohya_lora.safetensors")
    torch.testing.assert_close(picture(plain, name), picture(erased, name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_full_weights_load_in_plain_diffusers(folders: Path, tmp_path: Path, name: str) -> None:
    erased = load(folders / name)
    before = picture(erased, name)
    result = erase(erased, name, train_method="cross_attention", learning_rate=0.05)
    after = picture(erased, name)
    assert not torch.allclose(after, before, atol=1e-3)
    result.save(tmp_path / "pipeline")
    torch.testing.assert_close(picture(load(tmp_path / "pipeline"), name), after, rtol=0, atol=1e-5)
    result.save(tmp_path / "delta", save_as="delta")
    plain = load(folders / name)
    load_weights(plain, tmp_path / "delta")
    torch.testing.assert_close(picture(plain, name), after, rtol=0, atol=1e-5)
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / form).rglob("*.safetensors")) for form in ("delta", "pipeline")
    ]
    assert sizes[0] < sizes[1] / 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["dora", "attention", "text_encoder", "token"])
def test_every_method_on_every_family(folders: Path, name: str, method: str) -> None:
    pipeline = load(folders / name)
    before = picture(pipeline, name)
    result = erase(pipeline, name, train_method=method, weighting="posterior", max_train_steps=3)
    assert all(value == value and abs(value) < 1e6 for value in result.history["loss"])
    assert not torch.equal(picture(pipeline, name), before)
    with result.original():
        assert torch.equal(picture(pipeline, name), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_resumes_bit_for_bit(folders: Path, tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"max_train_steps": 4, "learning_rate": 1e-2, "negative_guidance": 0.5}
    whole = erase(load(folders / name), name, **settings)
    kept = {"checkpoint_dir": str(tmp_path), "checkpointing_steps": 2, "checkpoints_total_limit": 3}
    erase(load(folders / name), name, **settings, **kept)
    again = erase(load(folders / name), name, **settings, **kept, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ends = [result.trainable.named_parameters() for result in (whole, again)]
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())
    assert again.history == whole.history


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_with_autocast(folders: Path, name: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folders / name, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    result = erase(pipeline, name, mixed_precision="bf16", gradient_checkpointing=True)
    assert all(value == value for value in result.history["loss"])
    assert all(tensor.dtype == torch.bfloat16 for tensor in result.trainable.named_parameters().values())
