"""The technique of eval-unlearn, called as version 1.1.2 calls techniques: found by entry point, made, asked to draw.

eval-unlearn need not be installed; where it is, its own runner does the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from setuptools.config.pyprojecttoml import load_file

import fdu
from fdu.cli.eval_unlearn import Technique
from fdu.storage.lora import LORA_FILE
from fdu.subjects.digits import pipeline as digits

GROUP = "eval_unlearn.techniques"
PROMPTS = ["a photo of the digit three in red ink", "a photo of the digit five"]
DRAWING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}
BASE: dict[str, Any] = {"model_id": "digits", "device": "cpu", **DRAWING}
ERASING: dict[str, Any] = {**BASE, "erase_concept": "three", "anchor_concept": "eight"}
QUICK = {"max_train_steps": 4, "train_batch_size": 4, "num_latents": 8, "num_inference_steps": 2, "rank": 4}


def entry_point() -> EntryPoint:
    """As an installed fdu declares it."""
    declared = load_file(Path(__file__).parents[2] / "pyproject.toml")["project"]["entry-points"][GROUP]
    return EntryPoint("fdu", declared["fdu"], GROUP)


class Runner:
    """What the runners of eval-unlearn 1.1.2 do with a technique; its class SingleBenchmarkRunner, in short.

    The configuration comes from JSON; the factory is what the entry point loads; ``erase_concept`` is read as text for
    the report; a batch of prompts goes to ``generate(prompts=..., seed=...)``, and the images to a metric and, by their
    own ``save``, to disk.
    """

    def __init__(self, technique_config: dict[str, Any], output_dir: Path, seed: int | None) -> None:
        self.config = json.loads(json.dumps(technique_config))
        self.output_dir, self.seed = output_dir, seed
        self.factory = entry_point().load()

    def run(self, batches: list[list[str]]) -> tuple[dict[str, Any], list[Any]]:
        technique = self.factory(**self.config)
        images: list[Any] = []
        for prompts in batches:
            drawn = technique.generate(prompts=prompts, seed=self.seed)
            assert len(drawn) == len(prompts)
            for image in drawn:
                image.save(self.output_dir / f"{len(images)}.png")
                images.append(image)
        concept = self.config.get("erase_concept")
        return {"erase_concept": concept.lower() if concept else None}, images


def expected(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    """What the technique has to draw: free_run's noise."""
    return [
        pipeline(prompt, generator=torch.Generator().manual_seed(seed + index), **DRAWING).images[0]
        for index, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def erased() -> fdu.ErasureResult:
    torch.set_num_threads(1)
    pipeline = digits.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return fdu.erase(pipeline, "three", "eight", **QUICK)


@pytest.fixture(scope="module")
def wanted(erased: fdu.ErasureResult) -> list[Image.Image]:
    """The images of the erased pipeline."""
    return expected(erased.pipeline, PROMPTS, seed=5)


def test_the_benchmark_sees_what_fdu_erased(
    tmp_path: Path, erased: fdu.ErasureResult, wanted: list[Image.Image]
) -> None:
    with erased.original() as original:
        before = expected(original, PROMPTS[:1], seed=5)
    report, images = Runner({**ERASING, "settings": QUICK}, tmp_path, seed=5).run([PROMPTS, PROMPTS[:1]])
    assert report == {"erase_concept": "three"}
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images)
    assert images == [*wanted, wanted[0]]
    assert images[0] != before[0]
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "1.png", "2.png"}


def test_without_a_seed_images_differ_and_follow_torch(tmp_path: Path) -> None:
    technique = Technique(**ERASING, settings={"max_train_steps": 0, "num_latents": 2, "num_inference_steps": 1})
    first, second = (technique.generate(PROMPTS[:1])[0] for _ in range(2))
    assert first != second
    torch.manual_seed(3)
    third = technique.generate(PROMPTS[:1])
    torch.manual_seed(3)
    assert technique.generate(PROMPTS[:1]) == third
    assert technique.generate(PROMPTS[:1], seed=1, height=16, width=16)[0].size == (16, 16)


@pytest.mark.parametrize("save_as", ["lora", "pipeline"])
def test_a_saved_erasure_is_loaded(
    tmp_path: Path, erased: fdu.ErasureResult, wanted: list[Image.Image], save_as: str
) -> None:
    saved = erased.save(tmp_path / "erased", save_as=save_as)
    drawn = Technique(**BASE, load_path=str(saved), erase_concept="Three").generate(PROMPTS, seed=5)
    if save_as == "lora":
        assert drawn == wanted
    else:  # merged into the weights, which rounds differently
        for image, other in zip(drawn, wanted, strict=True):
            pixels = [torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).int() for one in (image, other)]
            assert (pixels[0] - pixels[1]).abs().max() <= 2


@pytest.mark.parametrize(("name", "argument"), [("wan", "guidance_scale"), ("qwenimage", "true_cfg_scale")])
def test_every_family_draws_as_its_pipeline_does(tmp_path: Path, name: str, argument: str) -> None:
    families.build(name).save_pretrained(tmp_path)
    settings = {**QUICK, "max_train_steps": 0, **families.needed(name)}
    frames = {"num_frames": 5} if name == "wan" else {}
    config = {**ERASING, "model_id": str(tmp_path), "guidance_scale": 4.0, "settings": settings, **frames}
    technique = Technique(**config)
    side = {"height": families.resolution(name), "width": families.resolution(name)}
    (image,) = technique.generate(PROMPTS[:1], seed=5, **side)
    (unguided,) = technique.generate(PROMPTS[:1], seed=5, **side, guidance_scale=1.0)
    plain = families.build(name)
    given = {**side, **frames, "num_inference_steps": 2, argument: 4.0, "negative_prompt": "", "output_type": "pil"}
    output = plain(PROMPTS[0], **given, generator=torch.Generator().manual_seed(5))
    assert image == (output.frames[0][2] if name == "wan" else output.images[0])
    assert image != unguided and image.size == (families.resolution(name),) * 2


def test_frames_are_for_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fdu, "erase", lambda *given, **named: pytest.fail("an erasure began"))
    few = {"max_train_steps": 0, "num_latents": 2, "num_inference_steps": 1}
    with pytest.raises(ValueError, match="num_frames.*videos.*StableDiffusionPipeline"):
        Technique(**ERASING, settings=few, num_frames=5)


def test_nothing_is_blacked_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = digits.load_pipeline()
    loaded.safety_checker = torch.nn.Identity()
    monkeypatch.setattr("fdu.cli.eval_unlearn.load_model", lambda *_: loaded)
    (tmp_path / "model_index.json").write_text("{}")
    technique = Technique(**BASE, load_path=str(tmp_path))
    assert technique.pipeline is loaded and loaded.safety_checker is None
    assert technique.generate(PROMPTS[:1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_steps": 3}, TypeError, "unknown key 'train_steps' .*keys.*erase_concept, anchor_concept"),
        ({"rank": 3}, TypeError, "rank.*setting.*erasure; put.*settings"),
        ({"settings": {"rnak": 3}}, TypeError, "unknown setting 'rnak'"),
        ({"settings": {"rank": 0}}, ValueError, "rank.*whole number >= 1"),
        ({"erase_concept": ""}, ValueError, "erase_concept is missing"),
        ({"anchor_concept": None}, ValueError, "anchor_concept is missing"),
        ({"anchor_concept": "three"}, ValueError, "target.*anchor.*same"),
        ({"concept_type": "person"}, ValueError, "concept_type.*'object'.*'style'"),
        ({"model_id": "/missing"}, FileNotFoundError, "model_id '/missing'.*not exist"),
        ({"load_path": "erased"}, ValueError, "leave.*anchor_concept.*settings"),
        ({"load_path": "erased", "anchor_concept": None}, FileNotFoundError, "'erased' does not exist"),
        ({"device": "abacus"}, ValueError, "device 'abacus' cannot.*used"),
        ({"dtype": "float8"}, ValueError, "dtype.*one.*auto, float32"),
        ({"dtype": "float16"}, ValueError, "dtype float16 needs mixed_precision"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps.*whole number >= 1"),
        ({"num_frames": 0}, ValueError, "num_frames.*whole number >= 1"),
        ({"guidance_scale": "7.5"}, ValueError, "guidance_scale.*finite number"),
    ],
)
def test_wrong_configurations_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fdu.cli.eval_unlearn.load_model", load)
    with pytest.raises(error, match=message):
        Technique(**{**ERASING, **changes})


def test_loading_the_entry_point_loads_nothing_heavy() -> None:
    """eval-unlearn loads every entry point there is, whatever technique is asked for."""
    module, _, name = entry_point().value.partition(":")
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "PIL"}
    code = f"import sys, {module} as m; m.{name}; print(sorted({heavy} & {{*sys.modules}}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.fixture
def registry() -> Iterator[Any]:
    """The registry of an eval-unlearn that is installed, with fdu's technique and a metric that keeps the images."""
    registry = pytest.importorskip("eval_unlearn.registry", reason="eval-unlearn is not installed")
    kept: list[Image.Image] = []

    class Keep:
        def load_dataset(self) -> list[Any]:
            return [SimpleNamespace(prompts=PROMPTS, metadata={"source": "two prompts"})]

        def update(self, images: list[Image.Image], prompts: list[str], metadata: dict[str, Any]) -> None:
            kept.extend(images)

        def compute(self) -> Any:
            return SimpleNamespace(name="keep", value=float(len(kept)), details={})

    registry.register_technique("fdu")(entry_point().load())
    registry.register_metric("keep")(Keep)
    yield kept


def test_its_own_runner(
    tmp_path: Path, registry: list[Image.Image], erased: fdu.ErasureResult, wanted: list[Image.Image]
) -> None:
    from eval_unlearn.runners import SingleBenchmarkRunner

    saved = erased.save(tmp_path / "erased")
    assert (saved / LORA_FILE).is_file()
    config = {**BASE, "load_path": str(saved), "erase_concept": "Three"}
    runner = SingleBenchmarkRunner("fdu", "keep", config, {}, str(tmp_path / "results"), seed=5)
    report = runner.run()
    assert report["erase_concept"] == "three" and report["metric_result"]["value"] == 2
    assert registry == wanted
    assert len(list((tmp_path / "results").rglob("*.png"))) == 2
