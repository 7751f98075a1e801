"""The run at the true size of Stable Diffusion 1.5: its script scaled down."""

from __future__ import annotations

import json

import pytest
import records
import shapes
import true_size


@pytest.mark.slow
def test_the_run_scaled_down_goes_the_whole_way() -> None:
    row = true_size.measure(shapes.SCALED, 128)
    assert row["planned_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1)
    assert row["image_changed_by"] > 0 and row["formats_differ_by"] < 1e-3
    assert all(size > 1000 for size in row["file_bytes"].values()) and len(row["loss"]) == 2


def test_the_record_is_of_the_true_size_and_the_page_tells_its_figures() -> None:
    row = json.loads(true_size.RECORD.read_text(encoding="utf-8"))["true_size"]
    assert row["parameters"] == 859_520_964 and row["settings"] == true_size.SETTINGS  # as Stable Diffusion 1.5
    assert row["planned_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1)
    assert row["image_changed_by"] > 0 and row["formats_differ_by"] < 1e-3
    told = (records.HERE.parent / "docs" / "guides" / "low-memory.md").read_text(encoding="utf-8")
    for name in ("measured_bytes", "planned_bytes"):
        assert f"{row[name] / 1e6:.0f} MB" in told
