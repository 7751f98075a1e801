"""Results: saved whole, and loaded by plain diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

import fdu
from fdu.storage import lora
from fdu.storage.writers import public_name
from fdu.subjects.digits import pipeline as digits


def picture(pipeline: DiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipeline("three", num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="pt").images


def test_lora_loads_with_plain_diffusers(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any], tmp_path: Path
) -> None:
    before = picture(pipeline)
    result = fdu.erase(pipeline, "three", "eight", train_method="lora", lora_alpha=2.0, **quick)
    assert result.save(tmp_path / "out") == tmp_path / "out"
    plain = StableDiffusionPipeline.from_pretrained(digits.PIPELINE_FOLDER, dtype=torch.float32)
    assert torch.equal(picture(plain), before)
    plain.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(picture(plain), picture(pipeline), rtol=0, atol=1e-5)
    assert not torch.allclose(picture(plain), before, atol=1e-4)


def test_full_weights_load_with_plain_diffusers(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any], tmp_path: Path
) -> None:
    result = fdu.erase(pipeline, "three", "eight", train_method="cross_attention", **quick)
    result.save(tmp_path / "out")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(picture(plain), picture(pipeline))


def test_no_file_of_a_result_tells_where_the_model_lay(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any], tmp_path: Path
) -> None:
    for method, save_as in (("lora", "lora"), ("lora", "pipeline"), ("full", "delta")):
        result = fdu.erase(pipeline, "three", "eight", train_method=method, cache_dir=str(tmp_path / "cache"), **quick)
        folder = result.save(tmp_path / f"{method}-{save_as}", save_as=save_as)
        result.trainable.remove()
        place, cache = str(digits.PIPELINE_FOLDER.parent).encode(), str(tmp_path).encode()
        assert not [
            file
            for file in folder.rglob("*")
            if file.is_file() and (place in file.read_bytes() or cache in file.read_bytes())
        ]
    plain = DiffusionPipeline.from_pretrained(tmp_path / "lora-pipeline", dtype=torch.float32)
    assert plain.unet.config.in_channels == 4


def test_the_record_beside_the_weights_tells_how_they_came(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any], tmp_path: Path
) -> None:
    result = fdu.erase(pipeline, ["the digit three"], ["the digit eight"], divergence="alpha:0.3", **quick)
    record = json.loads((result.save(tmp_path / "out") / "fdu.json").read_text())
    assert record["target"]["prompts"] == ["the digit three"]
    assert record["config"]["divergence"] == "alpha:0.3"
    assert fdu.EraseConfig(**{**record["config"], "preservation_prompts": ()}) == result.config
    assert len(record["history"]["loss"]) == quick["max_train_steps"]
    assert record["versions"]["torch"] == torch.__version__


def test_saving_does_not_overwrite_unasked(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any], tmp_path: Path
) -> None:
    result = fdu.erase(pipeline, "three", "eight", **quick)
    result.save(tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", overwrite=True)


def test_a_failure_while_saving_leaves_the_former_result(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = fdu.erase(pipeline, "three", "eight", **quick)
    result.save(tmp_path / "out")
    former = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora, "write", full)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path / "out", overwrite=True)
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()) == former
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_shared_does_not_tell_where_the_model_lay(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any]
) -> None:
    result = fdu.erase(pipeline, "three", "eight", **quick)
    assert result.record()["base"] == "pipeline"


@pytest.mark.parametrize(
    ("name", "base"), [("", ""), ("org/model", "org/model"), ("/home/me/sd", "sd"), ("models/sd", "sd"), (".", "here")]
)
def test_names_of_bases(name: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "models" / "sd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert public_name(name) == base


def test_a_record_that_is_not_finite_is_valid_json(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any], tmp_path: Path
) -> None:
    result = fdu.erase(pipeline, "three", "eight", **quick)
    result.history["distance"][1] = float("inf")
    text = (result.save(tmp_path / "out") / "fdu.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["history"]["distance"][1] is None


def test_report(pipeline: StableDiffusionPipeline, quick: dict[str, Any], tmp_path: Path) -> None:
    result = fdu.erase(pipeline, "three", "eight", **quick)
    probes = [
        fdu.Probe(name, (name,), role, lambda images, name=name: [name] * len(images))
        for name, role in (("three", "target"), ("eight", "retained"))
    ]
    draws = fdu.Draws([torch.rand(2, 3, 16, 16) for _ in probes])
    path = result.report(tmp_path / "page.html", fdu.evaluate(draws, draws, probes), probes, draws, draws)
    page = path.read_text(encoding="utf-8")
    assert "three → eight" in page and "<svg" in page and "max_train_steps" in page
