"""The training benchmark: the reference does what its page says, and both loops get the same task."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import bench_training
import families
import pytest
import records
import reference_loop
import shapes
import torch

import fdu_kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")


def tiny(**settings: Any) -> Any:
    small = {"num_images": 4, "num_inference_steps": 2, "sample_batch_size": 2, "max_train_steps": 2}
    return reference_loop.Settings(**{**small, **settings})


def test_the_reference_encodes_every_batch_and_asks_a_copy_for_the_frozen_output(tmp_path: Path) -> None:
    loop, pipeline, calls = reference_loop, families.build("sd"), Counter[str]()
    settings = tiny()
    loop.sample_images(pipeline, ["a photo"], tmp_path, settings)
    assert len(list(tmp_path.glob("*.jpg"))) == settings.num_images

    encode = pipeline.vae.encode
    pipeline.vae.encode = lambda pixels: calls.update(["images encoded"]) or encode(pixels)
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.update(["prompts encoded"]))
    # The copy of the denoiser carries the hook with it.
    pipeline.unet.register_forward_hook(
        lambda part, *_: calls.update(["trained" if part is pipeline.unet else "frozen"])
    )
    loop.train(pipeline, "van gogh", ["a photo"], tmp_path, settings)
    batches = settings.max_train_steps * settings.gradient_accumulation_steps
    assert calls == {
        "images encoded": batches,
        "prompts encoded": 2 * batches,
        "trained": batches,
        "frozen": batches,
    }


def test_the_reference_trains_keys_and_values_of_cross_attention_alone(tmp_path: Path) -> None:
    loop, pipeline = reference_loop, families.build("sd")
    before = {name: weight.clone() for name, weight in pipeline.unet.named_parameters()}
    settings = tiny(preservation_weight=1.0)
    loop.sample_images(pipeline, ["a photo"], tmp_path, settings)
    losses = loop.train(pipeline, "van gogh", ["a photo"], tmp_path, settings)
    changed = {name for name, weight in pipeline.unet.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "attn2.to_k" in name or "attn2.to_v" in name}
    assert len(losses) == 2 and all(map(torch.isfinite, map(torch.tensor, losses)))


def test_the_reference_minimises_the_loss_that_fdu_minimises() -> None:
    predicted, wanted = torch.randn(2, 3, 4, 8, 8)
    gradients = []
    for loss in (reference_loop.squared_hellinger, fdu_kernels.gaussian_divergence):
        leaf = predicted.clone().requires_grad_(True)
        loss(leaf, wanted).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


PROPORTIONS = records.read(records.RECORD)["training"]["proportions"]


@pytest.mark.parametrize(
    "name, scale", [pytest.param("1", shapes.FULL, marks=pytest.mark.slow), ("scaled", shapes.SCALED)]
)
def test_the_record_has_the_proportions_of_the_models(name: str, scale: shapes.Scale) -> None:
    assert shapes.proportions(scale) == PROPORTIONS[name]


def test_no_part_of_the_scaled_model_is_heavier_beside_its_denoiser_than_in_stable_diffusion() -> None:
    full, scaled = PROPORTIONS["1"], PROPORTIONS["scaled"]
    assert full["denoiser, M parameters"] == pytest.approx(859.52, abs=0.01)
    assert full["autoencoder, M parameters"] == pytest.approx(83.65, abs=0.01)
    assert full["text encoder, M parameters"] == pytest.approx(123.06, abs=0.01)
    for name in ("encoder, GFLOP", "decoder, GFLOP", "text encoder, GFLOP"):
        shares = [found[name] / found["denoiser, GFLOP"] for found in (full, scaled)]
        assert shares[1] == pytest.approx(shares[0], rel=0.1 if name.startswith("text") else 0.02)
        assert shares[1] <= shares[0] or name.startswith("text")
    for name in ("autoencoder", "text encoder"):
        shares = [found[f"{name}, M parameters"] / found["denoiser, M parameters"] for found in (full, scaled)]
        assert shares[1] == pytest.approx(shares[0], rel=0.25)


def test_both_loops_get_the_same_task() -> None:
    runs = bench_training
    for run in runs.RUNS.values():
        config, shared = run.config(), run.shared
        for field in dataclasses.fields(shared):
            if field.name not in bench_training.REFERENCE_ONLY:
                assert getattr(config, field.name) == getattr(shared, field.name)
        assert config.train_method == "cross_attention" and config.lr_scheduler == "constant"
        assert config.mixed_precision == "no" and not config.compile
    jobs = [runs.RUNS[name] for name in ("reference job", "fdu job")]
    assert jobs[0].shared == jobs[1].shared
    assert jobs[1].config().num_inference_steps == jobs[0].shared.num_inference_steps == 25
    # The scaled job keeps the published proportions.
    assert jobs[0].shared.num_images * 500 == jobs[0].shared.max_train_steps * 1000
    assert jobs[1].config().frozen_batches == 0


@pytest.mark.parametrize("name", ["reference", "fdu, frozen outputs kept", "fdu job"])
def test_a_run_measures_its_steps_and_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = bench_training
    monkeypatch.setattr(shapes, "sd15", lambda: families.build("sd"))
    run = runs.RUNS[name]
    figures = runs.measure(run)
    for unit in ("wall", "cores"):
        assert 0 < figures[f"{unit}_step"] < figures[f"{unit}_training"]
        assert figures[f"{unit}_sampling"] > 0
    assert figures["highest"] >= figures["peak"]
