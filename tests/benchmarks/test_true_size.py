"""The run at the true size of Stable Diffusion 1.5: its script scaled down."""

from __future__ import annotations

import pytest
import shapes
import true_size


@pytest.mark.slow
def test_the_run_scaled_down_goes_the_whole_way() -> None:
    row = true_size.measure(shapes.SCALED, 128)
    assert row["planned_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1)
    assert row["image_changed_by"] > 0 and row["formats_differ_by"] < 1e-3
    assert all(size > 1000 for size in row["file_bytes"].values()) and len(row["loss"]) == 2
