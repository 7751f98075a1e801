"""The plan of a comparison: the alpha grid, which divergences train alike, names, and what a run depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fdu_kernels as fk
from fdu.comparison import runs as runs_file
from fdu.comparison.plan import Candidate, Comparison, Drawing, Run, alpha_divergences, distinct, read_alpha
from fdu.config import EraseConfig


def comparison(**others: Any) -> Comparison:
    given = {"model": "embedded", "pairs": (("three", "eight"),), "candidates": (Candidate("mse"),), **others}
    return Comparison(**given)


def test_alpha_is_a_grid_with_its_limits() -> None:
    names = ["alpha:-1", "alpha:-0.5", "reverse_kl", "alpha:0.5", "kl", "alpha:1.5", "alpha:2"]
    assert read_alpha("-1:2:7") == names
    assert alpha_divergences(0.1, 0.3, 3) == ["alpha:0.1", "alpha:0.2", "alpha:0.3"]
    assert alpha_divergences(0.7, 1.3, 7)[3] == "kl"  # 0.7 + 3 * 0.1 is not 1 in binary
    assert read_alpha("3:3:1") == ["alpha:3"]
    for name in names:
        fk.get_divergence(name)


@pytest.mark.parametrize("text", ["-1:2", "a:b:c", "0:1:2.5", "2:-1:7", "0:1:0", "0:1:1", "1:1:2"])
def test_other_alphas_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="alpha.*low:high:count"):
        read_alpha(text)


def test_divergences_that_train_alike_are_run_once() -> None:
    kept, alike = distinct(["mse", *read_alpha("-1:2:7"), "squared_hellinger", "pearson_chi2", "le_cam"])
    assert kept == ["mse", "alpha:-1", "alpha:-0.5", "alpha:0.5", "le_cam"]
    assert alike == {
        "reverse_kl": "mse",
        "kl": "mse",
        "alpha:1.5": "alpha:-0.5",
        "alpha:2": "alpha:-1",
        "squared_hellinger": "alpha:0.5",
        "pearson_chi2": "alpha:-1",
    }


def test_alike_are_those_whose_gradients_are_multiples() -> None:
    """Against the losses themselves."""
    names = [str(fk.get_divergence(name)) for name in fk.divergences()]
    kept, alike = distinct(names)
    target = torch.zeros(12, 1, dtype=torch.float64)
    pred = torch.logspace(-1, 0.9, 12, dtype=torch.float64)[:, None]
    gradient = {name: fk.gaussian_divergence_value_and_grad(pred, target, name)[1] for name in names}

    def multiple(one: str, other: str) -> bool:
        ratio = gradient[one] / gradient[other]
        return torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-6)

    assert all(multiple(name, run) for name, run in alike.items())
    assert not any(multiple(one, other) for place, one in enumerate(kept) for other in kept[:place])


def test_with_a_critic_every_generator_trains_its_own() -> None:
    assert distinct(["kl", "reverse_kl", "kl"], variational=True) == (["kl", "reverse_kl"], {})
    with pytest.raises(ValueError, match="helinger"):
        distinct(["helinger"])


def test_runs_are_candidates_times_targets_times_seeds_with_names_of_their_own() -> None:
    plan = comparison(
        pairs=(("three", "eight"), ("red", "green")),
        candidates=(Candidate("alpha:0.3", 10.0), Candidate("kl", 1.0, (("variational", True),))),
        seeds=(0, 1, 2),
    )
    runs = plan.runs()
    assert len(runs) == 12 and len({run.name for run in runs}) == 12
    assert runs[0].name == "three_eight_divergence=alpha-0.3_s0=10_seed=0"
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert runs[1].candidate.label == "kl (s0 1, variational)"
    assert Run("van gogh", "", Candidate("mse"), 0).name == "van-gogh_nothing_divergence=mse_s0=1_seed=0"


def test_what_cannot_be_compared_is_refused() -> None:
    for name in ("pairs", "candidates", "seeds"):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            comparison(**{name: ()})
    with pytest.raises(ValueError, match="candidates.*duplicate"):
        comparison(candidates=(Candidate("mse"), Candidate("mse")))
    with pytest.raises(ValueError, match="s0.*sigma"):
        comparison(candidates=(Candidate("mse", 1.0), Candidate("mse", 2.0)), base=EraseConfig(sigma=0.1))
    with pytest.raises(ValueError, match="s0.*> 0"):
        comparison(candidates=(Candidate("mse", -1.0),))
    with pytest.raises(ValueError, match="unknown divergence"):
        comparison(candidates=(Candidate("helinger"),))
    with pytest.raises(ValueError, match="two runs"):
        comparison(pairs=(("a b", "c"), ("a?b", "c")))
    with pytest.raises(ValueError, match="images_per_class.*>= 2.*1"):
        comparison(drawing=Drawing(images_per_class=1))
    with pytest.raises(ValueError, match="images_of_target.*>= 2"):
        comparison(drawing=Drawing(images_of_target=1))


def test_settings_are_those_of_the_candidate_and_batches_are_shared_where_that_changes_nothing() -> None:
    plan = comparison(base=EraseConfig(max_train_steps=30, gradient_accumulation_steps=2, divergence="kl", seed=9))
    (run,) = plan.runs()[:1]
    config = plan.config(run)
    assert (config.divergence, config.s0, config.seed, config.frozen_batches) == ("mse", 1.0, 0, 60)
    for kept in (
        EraseConfig(timestep_sampling="importance"),
        EraseConfig(objective="noise", preservation_weight=0.0),
        EraseConfig(max_train_steps=300),
        EraseConfig(variational=True),
    ):
        candidates = (Candidate("kl"),)
        assert comparison(base=kept, candidates=candidates).config(Run("a", "b", candidates[0], 0)).frozen_batches == 0
    assert comparison(base=EraseConfig(frozen_batches=5)).config(run).frozen_batches == 5


def test_a_runs_identity_is_all_but_where_its_files_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_file, "weights", lambda *model: "0123456789abcdef")

    def identity(**changes: Any) -> dict[str, Any]:
        plan = comparison(**changes)
        return runs_file.identity_of(plan, plan.runs()[0])

    assert identity() == identity(base=EraseConfig(cache_dir="elsewhere"))
    assert identity() != identity(base=EraseConfig(learning_rate=1.0))
    assert identity() != identity(drawing=Drawing(num_inference_steps=7))
    assert identity()["settings"]["divergence"] == "mse" and identity()["target"] == "three"
