"""The estimate for several GPUs: counts that are known, collectives by their formulas, a page that is the script's."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import scaling_estimate as estimate
import torch

PAGE = Path(estimate.__file__).parents[1] / "docs" / "scaling.md"


@functools.cache
def counts(model: int, method: str) -> estimate.Counts:
    return estimate.count(estimate.MODELS[model], method)


def test_parameters_are_those_of_the_published_models() -> None:
    for model, millions in enumerate((859.52, 2567.46)):
        lora = counts(model, "lora")
        assert lora.parameters / 1e6 == pytest.approx(millions, abs=0.01)
        assert 0 < lora.trained < 0.01 * lora.parameters
    # Keys and values that read the prompt: 768 wide into every width of the denoiser's blocks.
    blocks = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
    assert counts(0, "cross_attention").trained == sum(2 * 768 * width for width in blocks)
    assert counts(0, "lora").trained == sum(2 * 16 * (768 + width) for width in blocks)


def test_operations_agree_with_a_layer_counted_by_hand() -> None:
    lora = counts(0, "lora")
    # The published figure for a forward pass at 64x64 latents is 0.8 * 10^12.
    assert lora.forward == pytest.approx(0.80e12, rel=0.02)
    cross = counts(0, "cross_attention")
    assert cross.forward == pytest.approx(lora.forward, rel=0.01)
    assert lora.forward < lora.backward < 1.2 * lora.forward
    assert cross.flops(kept=True) == cross.forward + cross.backward
    assert cross.flops() == 2 * cross.forward + cross.backward


def test_a_ring_moves_what_its_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "LATENCY", dataclasses.replace(estimate.LATENCY, value=0.0))
    inside = estimate.NVLINK.value * estimate.LINKS.value
    between = estimate.INFINIBAND.value * estimate.LINKS.value
    assert estimate.all_reduce(8e9, 1) == 0
    assert estimate.all_reduce(8e9, 8) == pytest.approx(2 * 7 / 8 * 8e9 / inside)
    assert estimate.all_reduce(8e9, 64) == pytest.approx(2 * 7 / 8 * 8e9 / inside + 2 * 7 / 8 * 1e9 / between)
    assert estimate.gather(8e9, 64) == pytest.approx(estimate.all_reduce(8e9, 64) / 2)
    # In buckets nothing but latency is added.
    assert estimate.bucketed(8e9, 64, estimate.all_reduce) == pytest.approx(estimate.all_reduce(8e9, 64))


def test_latency_counts_for_every_bucket() -> None:
    size = 4 * estimate.BUCKET.value
    whole, pieces = estimate.all_reduce(size, 8), estimate.bucketed(size, 8, estimate.all_reduce)
    assert pieces - whole == pytest.approx(3 * 2 * 7 * estimate.LATENCY.value)


def made_up(method: str = "full", trained: int = 100) -> estimate.Counts:
    return estimate.Counts("made up", method, 100, trained, 10**12, 2 * 10**12)


def test_communication_takes_over_where_computing_is_shorter() -> None:
    one = estimate.computing(made_up(), 1, share=0.5)
    assert one == pytest.approx(4e12 / (estimate.PEAK.value * 0.5))
    assert estimate.takes_over(made_up(), 2.5 * one, share=0.5) == 3
    assert estimate.takes_over(made_up(), 0.1 * one, share=0.5) == 1


def test_shards_divide_the_state_of_what_is_sharded() -> None:
    assert estimate.state_bytes(made_up(), 8, sharded=True) == estimate.state_bytes(made_up(), 8, sharded=False) / 8
    lora = made_up("lora", trained=1)
    assert estimate.state_bytes(lora, 8, sharded=False) == 2 * 100 + 16
    assert estimate.state_bytes(lora, 8, sharded=True) == 2 * 100 / 8 + 16


def test_a_gpu_record_replaces_the_assumed_share(tmp_path: Path) -> None:
    counted = [counts(0, "cross_attention")]
    assert estimate.measured_share(tmp_path, counted) == estimate.SHARE
    row = (
        '{"model": "sd15", "loop": "fdu", "precision": "bf16", "batch": 2, "kept": true, "step_s": 0.01, '
        '"images_per_s": 200.0}'
    )
    (tmp_path / "h100.json").write_text(f'{{"machine": {{"device": "X"}}, "sd15": {{"rows": [{row}]}}}}')
    found = estimate.measured_share(tmp_path, counted)
    assert found.value == pytest.approx(200 * counted[0].flops(kept=True) / estimate.PEAK.value)
    assert "measured on X, h100.json" in found.source


def test_what_a_million_kept_outputs_take_on_disk() -> None:
    rows = estimate.cache_rows([counts(0, "lora"), counts(1, "lora")], share=0.35)
    for row, model in zip(rows[::2], estimate.MODELS, strict=True):
        assert row[:2] == [model.name, "fp32"]
        output = torch.empty(model.latent).nbytes
        assert float(row[2]) == output / 1024 and float(row[3]) == math.floor(output / 1e3 + 0.5)


def test_the_page_in_docs_is_that_of_the_script() -> None:
    page = PAGE.read_text(encoding="utf-8")
    records = Path(estimate.__file__).parent / "results" / "gpu"
    share = estimate.measured_share(records, [counts(model, "cross_attention") for model in (0, 1)])
    assert estimate.markdown(["constant", "value", "source"], estimate.constant_rows(share)) in page
    for row in estimate.count_rows([counts(0, "lora"), counts(1, "full")]):
        assert "| " + " | ".join(row) + " |" in page
