"""The Python API: its public names, and results as they are saved, with their record and card."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from families import ALPHA, CONTEXT, add_adapter, change_weights
from huggingface_hub import ModelCard
from torch import Tensor

import fdu
from fdu.config import EraseConfig
from fdu.report.card import write_card
from fdu.storage import lora
from fdu.storage.fingerprint import versions
from fdu.storage.formats import public_name, write
from fdu.subjects.digits import pipeline as digits

QUICK: dict[str, Any] = {"max_train_steps": 4, "train_batch_size": 4, "num_latents": 8, "num_inference_steps": 2}
QUICK |= {"rank": 4, "lora_alpha": 2.0}
PROBES = [
    fdu.Probe(name, (name,), role, lambda images, name=name: [name] * len(images))  # type: ignore[arg-type,misc]
    for name, role in (("three", "target"), ("eight", "retained"))
]


def test_every_public_name_is_there() -> None:
    for name in fdu.__all__:
        assert getattr(fdu, name).__name__ == name
    assert set(fdu.__all__) <= set(dir(fdu))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'fdu'.*no attribute 'eraser'"):
        fdu.eraser  # noqa: B018


@pytest.fixture(scope="module")
def result() -> fdu.ErasureResult:
    """An erasure with an adapter; its weights are not to be changed."""
    torch.set_num_threads(1)
    pipeline = digits.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return fdu.erase(pipeline, ["the digit three"], ["the digit eight"], divergence="alpha:0.3", **QUICK)


def picture(pipeline: DiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipeline("three", num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="pt").images


def test_lora_loads_with_plain_diffusers(result: fdu.ErasureResult, tmp_path: Path) -> None:
    with result.original() as original:
        before = picture(original)
    assert result.save(tmp_path / "out") == tmp_path / "out"
    plain = StableDiffusionPipeline.from_pretrained(digits.PIPELINE_FOLDER, dtype=torch.float32)
    assert torch.equal(picture(plain), before)
    plain.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(picture(plain), picture(result.pipeline), rtol=0, atol=1e-5)
    assert not torch.allclose(picture(plain), before, atol=1e-4)


def test_full_weights_load_with_plain_diffusers_and_no_file_names_a_folder(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    settings = {**QUICK, "train_method": "cross_attention", "training_cache": str(tmp_path / "cache")}
    result = fdu.erase(pipeline, "three", "eight", **settings)
    for save_as in ("pipeline", "delta"):
        names_no_folder(result.save(tmp_path / save_as, save_as=save_as), tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    assert torch.equal(picture(plain), picture(pipeline))


def test_no_file_of_an_adapter_names_a_folder(result: fdu.ErasureResult, tmp_path: Path) -> None:
    for save_as in ("lora", "kohya", "pipeline"):
        names_no_folder(result.save(tmp_path / save_as, save_as=save_as), tmp_path)
    assert result.record()["base"] == "pipeline"
    plain = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    assert plain.unet.config.in_channels == 4


def names_no_folder(saved: Path, working: Path) -> None:
    """Fail if a saved file contains the folder of the model or the working folder."""
    for file in filter(Path.is_file, saved.rglob("*")):
        content = file.read_bytes()
        assert str(digits.PIPELINE_FOLDER.parent).encode() not in content and str(working).encode() not in content, file


def test_the_record_is_complete_and_valid_json(result: fdu.ErasureResult, tmp_path: Path) -> None:
    history = {**result.history, "distance": [1.0, float("inf"), 1.0, 1.0]}
    saved = dataclasses.replace(result, history=history).save(tmp_path / "out")
    record = json.loads((saved / "fdu.json").read_text(), parse_constant=pytest.fail)
    assert record["target"]["prompts"] == ["the digit three"]
    assert record["config"]["divergence"] == "alpha:0.3"
    config = fdu.EraseConfig(**{**record["config"], "preservation_prompts": ()})
    assert config.as_dict() == result.config.as_dict()
    assert len(record["history"]["loss"]) == QUICK["max_train_steps"]
    assert record["history"]["distance"][1] is None
    assert record["versions"]["torch"] == torch.__version__


def test_a_failure_while_saving_leaves_the_former_result(
    result: fdu.ErasureResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", overwrite=True)
    former = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora, "write", full)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path / "out", overwrite=True)
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()) == former
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "base"), [("", ""), ("org/model", "org/model"), ("/home/me/sd", "sd"), ("models/sd", "sd"), (".", "here")]
)
def test_names_of_bases(name: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "models" / "sd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert public_name(name) == base


def test_report(result: fdu.ErasureResult, tmp_path: Path) -> None:
    draws = fdu.Draws([torch.rand(2, 3, 16, 16) for _ in PROBES])
    evaluation = fdu.evaluate(draws, draws, PROBES)
    page = result.report(tmp_path / "page.html", evaluation, PROBES, draws, draws).read_text(encoding="utf-8")
    assert "the digit three" in page and "<svg" in page and "max_train_steps" in page


def make_record(base: str = "org/base", **settings: Any) -> dict[str, Any]:
    return {
        "base": base,
        "target": {"name": "van gogh", "prompts": ["a picture by van gogh"]},
        "anchor": {"name": "painting", "prompts": ["a painting"]},
        "concepts": [["van gogh", "painting"]],
        "config": EraseConfig(**settings).as_dict(),
        "sigma": 0.123456,
        "seconds": 12.3,
        "history": {},
        "versions": versions(),
    }


def code_of(page: str) -> str:
    return page.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(
    ("form", "relation"), [("lora", "adapter"), ("kohya", "adapter"), ("pipeline", "finetune"), ("delta", "finetune")]
)
def test_the_hub_reads_the_front_matter(form: Any, relation: str, tmp_path: Path) -> None:
    card = ModelCard(write_card(tmp_path, form, families.build("sd"), make_record()).read_text(encoding="utf-8"))
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["base_model_relation"] == relation
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert {"concept-erasure", "machine-unlearning"} <= set(data["tags"]) and ("lora" in data["tags"]) == (
        relation == "adapter"
    )
    assert card.text.lstrip().startswith("# van gogh")
    assert "| van gogh | painting |" in card.text and "2509.21167" in card.text and "0.1235" in card.text
    assert "org/base" in card.text and "licence" in card.text


@pytest.mark.parametrize("form", ["lora", "kohya", "pipeline", "delta"])
def test_the_code_loads_what_was_written(form: Any, tmp_path: Path) -> None:
    pipeline = digits.load_pipeline()
    if form in ("lora", "kohya"):
        layers = {"unet": add_adapter(pipeline, "unet", CONTEXT["sd"])}
        write(tmp_path, form, pipeline, layers, lora_alpha=ALPHA)
    else:
        write(tmp_path, form, pipeline, changed_weights=change_weights(pipeline, "unet", CONTEXT["sd"]), base="digits")
    page = write_card(tmp_path, form, pipeline, make_record("pipeline")).read_text(encoding="utf-8")
    assert "base_model:" not in page and "digits pipeline" in page
    namespace: dict[str, Any] = {}
    exec(code_of(page).replace("path/to/this/folder", str(tmp_path)), namespace)
    inputs = torch.randn(1, 4, 8, 8), 10, torch.randn(1, 16, 64)
    with torch.no_grad():
        assert torch.allclose(namespace["pipeline"].unet(*inputs).sample, pipeline.unet(*inputs).sample, atol=1e-5)


def test_what_diffusers_cannot_read_is_loaded_by_fdu(tmp_path: Path) -> None:
    for name, settings in (("sd3", {}), ("flux", {}), ("sd", {"train_method": "dora"})):
        page = write_card(tmp_path, "kohya", families.build(name), make_record(**settings)).read_text()
        assert "load_weights(pipeline" in code_of(page) and "load_lora_weights" not in code_of(page)
    assert "LyCORIS" in page


def test_a_card_names_no_place_on_this_machine(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    pipeline.save_pretrained(tmp_path / "secret" / "base")
    loaded = type(pipeline).from_pretrained(tmp_path / "secret" / "base")
    places = {
        "training_cache": str(tmp_path / "secret"),
        "checkpoint_dir": str(tmp_path / "secret"),
        "tracking_dir": "secret",
    }
    page = write_card(tmp_path, "lora", loaded, make_record("base", **places)).read_text(encoding="utf-8")
    assert "secret" not in page and 'from_pretrained("path/to/the/base/model")' in page


def test_figures_stand_in_the_card(tmp_path: Path) -> None:
    draws = fdu.Draws([torch.rand(2, 3, 16, 16) for _ in PROBES])
    evaluation = fdu.evaluate(draws, draws, PROBES)
    page = write_card(tmp_path, "lora", families.build("sd"), make_record(), evaluation, PROBES).read_text()
    assert "| three | 100 % | 100 % |" in page and re.search(r"\b2 images", page) and "Not measured" not in page
    assert "Not measured" in write_card(tmp_path, "lora", families.build("sd"), make_record()).read_text()


def test_the_card_says_what_the_prompts_lost_and_how_sure_that_is(tmp_path: Path) -> None:
    def ink(images: Tensor) -> list[str]:
        return ["red" if image.mean() > 0.5 else "blue" for image in images]

    asks = fdu.Attribute("ink", ("red", "", "", "", "", "", "", ""), ink)
    target = fdu.Probe("three", ("three in red ink", *["three"] * 7), "target", PROBES[0].judge, attributes=(asks,))
    before, after = (fdu.Draws([torch.full((32, 3, 4, 4), level)] * 2) for level in (0.9, 0.1))
    evaluation = fdu.evaluate(before, after, [target, PROBES[1]])
    page = write_card(
        tmp_path, "lora", families.build("sd"), make_record(), evaluation, [target, PROBES[1]]
    ).read_text()
    assert "| what else its prompts ask for (ink) | 100 % | 0 % |" in page and "share before: ink" in page
    assert "at most 49 % either way" in page  # four of 32 images were asked for an ink: Wilson's, z^2 / (4 + z^2)


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    odd = make_record()
    odd["concepts"] = [["a|b\nc", ""]]
    odd["target"]["name"] = "a|b\nc"
    card = ModelCard(write_card(tmp_path, "lora", families.build("sd"), odd).read_text(encoding="utf-8"))
    assert "| a\\|b c | the empty prompt |" in card.text and card.data.to_dict()["library_name"] == "diffusers"
