"""Robustness: the counting, the sets of prompts, and attack and relearning on a pipeline that nobody may change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from scipy import stats
from torch import Tensor

import fdu
from fdu import embedded
from fdu.denoisers import denoiser_of
from fdu.robustness import (
    AttackConfig,
    Drawing,
    Examination,
    RelearningConfig,
    Robustness,
    Share,
    attack,
    phrasings,
    read_sets,
    relearn,
    target_latents,
)
from fdu.robustness.shares import wilson
from fdu.robustness.subject import Conditioned, count, spaced
from fdu.robustness.verdict import judge_robustness
from fdu.trainable.perturbation import Perturbation

QUICK = Drawing(images=2, num_inference_steps=2)
THREE = fdu.Probe("three", ("a photo of the digit three", "three"), "target", lambda images: ["three"] * len(images))


def weights_of(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": parameter.detach().clone()
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for name, parameter in module.named_parameters()
    }


def unchanged(pipeline: DiffusionPipeline, weights: dict[str, Tensor]) -> bool:
    now = weights_of(pipeline)
    return now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("count", "images"), [(0, 32), (1, 7), (16, 32), (31, 32), (32, 32)])
def test_the_interval_is_that_of_scipy(count: int, images: int) -> None:
    expected = stats.binomtest(count, images).proportion_ci(method="wilson")
    assert wilson(count, images) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_shares_count() -> None:
    share = Share.of(["a", "b", "a", "a"], "a")
    assert (share.value, share.images) == (0.75, 4)
    with pytest.raises(ValueError, match="at least one image"):
        Share.of([], "a")


def test_looks_double_up_to_the_last_step() -> None:
    assert spaced(60, 4) == (7, 15, 30, 60)
    assert spaced(3, 6) == (1, 3)


@pytest.mark.parametrize("folder", sorted(path.name for path in phrasings.SETS.iterdir()))
def test_the_sets_that_come_with_fdu(folder: str) -> None:
    sets = read_sets(phrasings.SETS / folder, "red" if folder == "ink" else "van gogh")
    assert sets.keys() == {"compositions", "languages", "misspellings", "paraphrases"}
    for prompts in sets.values():
        assert len(prompts) >= 6
        assert not any("{" in prompt or "}" in prompt for prompt in prompts)


def test_own_sets(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("# comment\n{} and {}\nverbatim\n", encoding="utf-8")
    (tmp_path / "slips.txt").write_text("a {misspelt}\n", encoding="utf-8")
    sets = read_sets(tmp_path, "ox")
    assert sets["mine"] == ("ox and ox", "verbatim")
    assert sets["slips"] == tuple(f"a {slip}" for slip in phrasings.misspellings("ox"))
    with pytest.raises(FileNotFoundError, match="no folder with .txt files"):
        read_sets(tmp_path / "none", "ox")


@pytest.mark.parametrize("name", ["three", "van gogh", "R2D2", "猫"])
def test_misspellings_are_near_the_name_and_never_it(name: str) -> None:
    found = phrasings.misspellings(name)
    assert name not in found and len(found) == len(set(found))
    assert all(abs(len(slip) - len(name)) <= 1 for slip in found)
    assert len(found) >= 2 * sum(letter.isalpha() for letter in name) - 2


def test_sets_are_compared_prompt_by_prompt() -> None:
    sets = {"words": ("p", "q")}
    before, after = {"words": ["x", "x", "x", "y"]}, {"words": ["y", "x", "y", "x"]}
    (figures,) = phrasings.compare_sets(sets, "x", before, after).values()
    assert (figures.before.value, figures.after.value) == (0.75, 0.5)
    assert list(figures.by_prompt.items()) == [("q", (0.5, 1.0)), ("p", (1.0, 0.0))]
    with pytest.raises(ValueError, match="as many images of every set"):
        phrasings.compare_sets(sets, "x", before, {"words": ["x"]})


@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_a_conditioning_draws_what_its_prompt_draws(name: str) -> None:
    """In every family the pipeline, handed what its denoiser encodes, draws the same; and perturbed, something else."""
    pipeline = families.build(name)
    denoiser = denoiser_of(pipeline, families.resolution(name))
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}

    def draw(by: Any, **more: Any) -> Tensor:
        return by(["three", "a photo of three"], generator=torch.Generator().manual_seed(1), **settings, **more).images

    with torch.no_grad():
        plain = draw(pipeline, height=denoiser.height, width=denoiser.width, **denoiser.call_settings)
        torch.testing.assert_close(draw(Conditioned(denoiser)), plain, rtol=0, atol=1e-4)
        perturbation = Perturbation(denoiser, "three", tokens=2, start=3.0)
        assert not torch.allclose(draw(Conditioned(denoiser)), plain, atol=1e-3)
        perturbation.remove()
        assert torch.equal(draw(Conditioned(denoiser)), draw(Conditioned(denoiser)))
        torch.testing.assert_close(draw(Conditioned(denoiser)), plain, rtol=0, atol=1e-4)


def test_counting_leaves_the_pipelines_progress_bar_as_it_was(
    pipeline: StableDiffusionPipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline.set_progress_bar_config(desc="its own")
    count(denoiser_of(pipeline), THREE, QUICK)
    assert pipeline._progress_bar_config == {"desc": "its own"}
    assert "its own" not in capfd.readouterr().err


@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_attack_and_relearning_leave_every_family_as_it_was(name: str) -> None:
    pipeline = families.build(name)
    denoiser = denoiser_of(pipeline, families.resolution(name))
    before = weights_of(pipeline)
    latents = torch.randn(3, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    drawing = Drawing(images=1, num_inference_steps=2)
    probe = fdu.Probe("three", ("three",), "target", lambda images: ["three"])
    attacked = attack(denoiser, probe, latents, AttackConfig(2, 2, restarts=1, batch_size=2, looks=1), drawing)
    relearnt = relearn(denoiser, probe, latents, RelearningConfig(rank=2, steps=1, batch_size=2, looks=1), drawing)
    assert attacked.attempts[0].size > 0 and [step for step, _ in attacked.attempts[0].course] == [2]
    assert [step for step, _ in relearnt.course] == [0, 1] and relearnt.back_after == 0
    assert unchanged(pipeline, before)


def test_the_attack_lowers_the_denoisers_loss(pipeline: StableDiffusionPipeline) -> None:
    """Towards an eight, from a prompt that asks for a one."""
    denoiser = denoiser_of(pipeline)
    eight = fdu.Probe("eight", ("the digit eight",), "target", lambda images: ["eight"] * len(images))
    latents = target_latents(denoiser, eight, 4, QUICK)
    one = fdu.Probe("eight", ("the digit one",), "target", lambda images: ["one"] * len(images))
    config = AttackConfig(steps=16, restarts=1, batch_size=8, looks=1)
    attacked = attack(denoiser, one, latents, config, QUICK)
    idle = attack(denoiser, one, latents, dataclasses.replace(config, learning_rate=1e-9), QUICK)
    assert attacked.attempts[0].loss < 0.9 * idle.attempts[0].loss


def test_an_examination_from_end_to_end(pipeline: StableDiffusionPipeline, quick: dict[str, Any]) -> None:
    sets = {"words": ("three", "the three")}
    settings: dict[str, Any] = {
        "attack_config": AttackConfig(steps=2, restarts=2, batch_size=2, looks=1),
        "relearning_config": RelearningConfig(steps=2, batch_size=2, looks=2),
        "drawing": QUICK,
        "latents": 2,
    }
    examination = Examination(THREE, sets, **settings)
    with pytest.raises(RuntimeError, match="call before"):
        examination.after(pipeline)
    result = fdu.erase(pipeline, *embedded.concepts("three", "eight"), **quick)
    weights = weights_of(pipeline)
    with result.original() as original:
        examination.before(original)
    found = examination.after(result.pipeline)
    assert unchanged(pipeline, weights)
    assert found.phrasings is not None and found.attack is not None and found.relearning is not None
    assert found.attack_before is not None and len(found.attack_before.attempts) == 1
    assert [step for step, _ in found.relearning.course] == [0, 1, 2]
    losses = [attempt.loss for attempt in found.attack.attempts]
    assert found.attack.chosen == losses.index(min(losses)) and len(losses) == 2
    again = Examination(THREE, sets, **settings)
    with result.original() as original:
        again.before(original)
    assert again.after(result.pipeline).as_dict() == found.as_dict()


def share(value: float) -> dict[str, Any]:
    return {"value": value, "images": 32, "interval": (max(value - 0.1, 0), min(value + 0.1, 1))}


def found(after: float, back: int | None, words: float = 0.0) -> dict[str, Any]:
    attempt = {"course": [(10, share(after))], "loss": 0.1, "size": 1.0}
    sides = {"before": share(0.0), "after": share(after), "attempts": [attempt], "chosen": 0, "back_after": 10}
    return {
        "phrasings": {
            "paraphrases": {"before": share(1.0), "after": share(words), "by_prompt": {"p": (1.0, words)}},
            "languages": {"before": share(0.1), "after": share(0.1), "by_prompt": {"p": (0.1, 0.1)}},
        },
        "attack": sides,
        "attack_before": {**sides, "after": share(1.0)},
        "relearning": {"course": [(0, share(0.0)), (80, share(0.9))], "back_after": back, "images": 32},
    }


def test_the_verdict_says_what_holds() -> None:
    strong = judge_robustness(found(0.0, None), "three")
    assert strong.holds and strong.headline == "It holds against other words, an attack with the weights and relearning"
    assert "the model hardly drew it for languages either" in strong.sentences[0]
    assert "does not bring it back" in strong.sentences[1] and "do not bring it back" in strong.sentences[2]
    weak = judge_robustness(found(0.97, 10), "three")
    assert not weak.holds
    assert weak.headline == "It holds against other words, but not against an attack with the weights and relearning"
    assert "brings it back: 0 % without it, 97 % with it" in weak.sentences[1]
    assert "within 10 steps" in weak.sentences[2]
    none = judge_robustness(found(0.97, 10, words=0.5), "three")
    assert none.headline.startswith("It does not hold against other words")


def test_what_makes_no_sense_is_refused(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="must name tests among phrasings, attack, relearning; got 'atack'"):
        Examination(THREE, {"a": ("b",)}, ["atack"])
    with pytest.raises(ValueError, match="needs prompt sets"):
        Examination(THREE)
    with pytest.raises(ValueError, match="tokens must be a whole number >= 1, got 0"):
        AttackConfig(tokens=0)
    with pytest.raises(ValueError, match="train_method must be one of lora"):
        RelearningConfig(train_method="magic")
    with pytest.raises(ValueError, match="number of latents must be >= 1"):
        target_latents(denoiser_of(pipeline), THREE, 0)
    with pytest.raises(ValueError, match="images must be >= 1, got 0"):
        Drawing(images=0)
    before = weights_of(pipeline)
    denoiser = denoiser_of(pipeline)
    with pytest.raises(ValueError, match="tokens must be from 1 to 16"):
        attack(denoiser, THREE, torch.zeros(1, *denoiser.latent_shape), AttackConfig(tokens=17), QUICK)
    assert unchanged(pipeline, before)
    assert Robustness().as_dict()["attack"] is None
