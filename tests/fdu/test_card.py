"""The card says what was done, the hub can read it, its code runs, and it names no place on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import ALPHA, CONTEXT, add_adapter, change_weights
from huggingface_hub import ModelCard

from fdu.config import EraseConfig
from fdu.evaluation import Draws, Probe, evaluate
from fdu.report.card import write_card
from fdu.storage.fingerprint import versions
from fdu.storage.writers import write
from fdu.subjects.digits import pipeline as digits


def record(base: str = "org/base", **settings: Any) -> dict[str, Any]:
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
    card = ModelCard(write_card(tmp_path, form, families.build("sd"), record()).read_text(encoding="utf-8"))
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
        write(
            tmp_path, form, pipeline, changed_weights=change_weights(pipeline, "unet", CONTEXT["sd"]), base="embedded"
        )
    page = write_card(tmp_path, form, pipeline, record("pipeline")).read_text(encoding="utf-8")
    assert "base_model:" not in page and "embedded pipeline" in page
    namespace: dict[str, Any] = {}
    exec(code_of(page).replace("path/to/this/folder", str(tmp_path)), namespace)
    inputs = torch.randn(1, 4, 8, 8), 10, torch.randn(1, 16, 64)
    with torch.no_grad():
        assert torch.allclose(namespace["pipeline"].unet(*inputs).sample, pipeline.unet(*inputs).sample, atol=1e-5)


def test_what_diffusers_cannot_read_is_loaded_by_fdu(tmp_path: Path) -> None:
    for name, settings in (("sd3", {}), ("sd", {"train_method": "dora"})):
        page = write_card(tmp_path, "kohya", families.build(name), record(**settings)).read_text()
        assert "load_weights(pipeline" in code_of(page) and "load_lora_weights" not in code_of(page)
    assert "LyCORIS" in page


def test_a_card_names_no_place_on_this_machine(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    pipeline.save_pretrained(tmp_path / "secret" / "base")
    loaded = type(pipeline).from_pretrained(tmp_path / "secret" / "base")
    places = {
        "cache_dir": str(tmp_path / "secret"),
        "checkpoint_dir": str(tmp_path / "secret"),
        "logging_dir": "secret",
    }
    page = write_card(tmp_path, "lora", loaded, record("base", **places)).read_text(encoding="utf-8")
    assert "secret" not in page and 'from_pretrained("path/to/the/base/model")' in page


def test_figures_stand_in_the_card(tmp_path: Path) -> None:
    probes = [
        Probe(name, (name,), role, lambda images, name=name: [name] * len(images))
        for name, role in (("three", "target"), ("eight", "retained"))
    ]
    draws = Draws([torch.rand(2, 3, 16, 16) for _ in probes])
    evaluation = evaluate(draws, draws, probes)
    page = write_card(tmp_path, "lora", families.build("sd"), record(), evaluation, probes).read_text()
    assert "| three | 100 % | 100 % |" in page and re.search(r"\b2 images", page) and "Not measured" not in page
    assert "Not measured" in write_card(tmp_path, "lora", families.build("sd"), record()).read_text()


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    odd = record()
    odd["concepts"] = [["a|b\nc", ""]]
    odd["target"]["name"] = "a|b\nc"
    card = ModelCard(write_card(tmp_path, "lora", families.build("sd"), odd).read_text(encoding="utf-8"))
    assert "| a\\|b c | the empty prompt |" in card.text and card.data.to_dict()["library_name"] == "diffusers"
