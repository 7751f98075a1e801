"""A made-up record of the GPU suite that keeps every promise, for the tests of what reads records."""

from __future__ import annotations

from typing import Any

FULL, LATENT = [512, 16, 128, 128], [1, 4, 64, 64]


def losses(shape: list[int], figure: str, times: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of every kind that the promises speak of."""
    rows = []
    for form in ("gaussian", "variational"):
        for dtype, width in (("float32", 1), ("bfloat16", 2)):
            for candidate, taken in times.items():
                row = {"shape": [shape[0] * width, *shape[1:]], "dtype": dtype, "form": form, "candidate": candidate}
                row.update({"cold_us": taken, figure: taken, "extra_bytes": 0})
                if "value_and_grad" in candidate:
                    row["share_of_copy"] = 0.95 if candidate.startswith("cuda") else 0.5
                rows.append(row)
    return rows


def a_record() -> dict[str, Any]:
    """A record that keeps every promise."""
    ours = {"cuda value_and_grad": 10.0, "triton value_and_grad": 20.0}
    step = {"model": "sd15", "batch": 2, "precision": "bf16", "images_per_s": 1.0, "loss_us": 1.0, "kept": False}
    return {
        "large": {"rows": losses(FULL, "cold_us", {"clone": 8.0, "eager": 31.0, "compiled": 14.0, **ours})},
        "latents": {"rows": losses(LATENT, "wall_us", {"clone": 8.0, "eager": 51.0, "compiled": 21.0, **ours})},
        "sd15": {
            "rows": [
                {**step, "name": "reference", "loop": "reference", "step_s": 3.1, "peak_mib": 100.0},
                {**step, "name": "fdu", "loop": "fdu", "step_s": 0.5, "peak_mib": 90.0},
                {**step, "name": "fdu, sparing", "loop": "fdu", "step_s": 1.0, "peak_mib": 55.0},
            ]
        },
        "tests": {"exit": 0, "tail": ["9 passed"]},
        "sanitizer": {"exit": 0, "tail": ["ERROR SUMMARY: 0 errors"]},
    }
