"""The page of the theory: formulas against simulation, and the page as it is written."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fdu_kernels as fk

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import theory


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["mse", "squared_hellinger", "pearson_chi2", "alpha:0.3", "alpha:1.5", "le_cam"])
def test_the_flow_takes_the_time_of_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "FLOW_TO", 1.0)
    exact, simulated = theory.flow(fk.get_divergence(name))
    assert simulated == pytest.approx(exact, rel=1e-3)


def test_closed_forms_of_the_time_agree_with_quadrature() -> None:
    for name in ("kl", "squared_hellinger", "pearson_chi2"):
        divergence = fk.get_divergence(name)
        s = torch.logspace(math.log10(0.04), math.log10(4.0), 20001)
        slopes = 1 / (4 * s * theory.slope(divergence, s))
        assert theory.flow_time(divergence, 4.0, 0.04) == pytest.approx(float(torch.trapezoid(slopes, s)), rel=1e-6)


def test_a_fitted_critic_is_never_below_the_true_one_on_its_samples() -> None:
    divergence = fk.get_divergence("jensen_shannon")
    p, q = theory.draw(256, torch.Generator().manual_seed(1))
    true = theory.true_critic()
    fitted = theory.fit(true, p, q, divergence)
    assert theory.bound(fitted, p, q, divergence) > theory.bound(true, p, q, divergence)


def test_the_page_in_docs_is_that_of_the_script() -> None:
    page = (Path(theory.__file__).parents[1] / "docs" / "theory.md").read_text(encoding="utf-8")
    assert theory.gradient_table() in page and theory.local_table() in page and theory.gradient_order() in page
    for figure in ("gradient", "flow", "estimate"):
        assert (Path(theory.__file__).parents[1] / "docs" / "theory" / f"{figure}.svg").is_file()


def test_help_needs_no_computation() -> None:
    ran = subprocess.run([sys.executable, theory.__file__, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "docs/theory.md" in ran.stdout
