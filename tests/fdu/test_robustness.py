"""Robustness: the counting, the sets of prompts, attack and relearning that leave a pipeline unchanged, the verdict."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import fdu
from fdu.evaluation.drawing import Conditioned
from fdu.evaluation.intervals import Share, wilson
from fdu.evaluation.robustness import (
    AttackConfig,
    Examination,
    JudgedSampling,
    Lesson,
    RelearningConfig,
    Robustness,
    attack,
    phrasings,
    read_sets,
    relearn,
    target_latents,
)
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.evaluation.robustness.relearning import RelearningFigures, back_after
from fdu.models.denoiser import pictures
from fdu.models.families import denoiser_of, guidance_arguments
from fdu.training.methods.perturbation import Perturbation

pytestmark = pytest.mark.quick(name=["sd", "flux"])

QUICK = JudgedSampling(images=2, num_inference_steps=2)
SHORT: dict[str, Any] = {
    "attack_config": AttackConfig(tokens=2, steps=2, restarts=2, batch_size=2, looks=1),
    "relearning_config": RelearningConfig(rank=2, steps=2, batch_size=2, looks=2),
    "drawing": QUICK,
    "latents": 2,
}
THREE = fdu.Probe("three", ("a photo of the digit three", "three"), "target", lambda images: ["three"] * len(images))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> DiffusionPipeline:
    """A small pipeline, and no collection of garbage between the tests of an examination, which would take longer."""
    monkeypatch.setattr("fdu.evaluation.robustness.examination.release_memory", lambda: None)
    return families.build("sd")


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


@pytest.mark.parametrize("kind", ["digit", "ink", "emoji", "emoji style", "object", "style"])
def test_the_sets_that_come_with_fdu(kind: str) -> None:
    sets = phrasings.packaged_sets(kind, "red" if kind == "ink" else "van gogh")
    assert sets.keys() == {"compositions", "languages", "misspellings", "paraphrases"}
    for prompts in sets.values():
        assert len(prompts) >= 6
        assert not any("{" in prompt or "}" in prompt for prompt in prompts)
    with pytest.raises(ValueError, match="no prompt for the set 'misspellings'"):
        phrasings.packaged_sets(kind, "12")


def test_own_sets(tmp_path: Path) -> None:
    own = tmp_path / "mine.txt"
    own.write_text("# comment\n{} and {}\nverbatim\n[slips]\na {misspelt}\n", encoding="utf-8")
    sets = read_sets(own, "ox")
    assert sets["mine"] == ("ox and ox", "verbatim")
    assert sets["slips"] == tuple(f"a {slip}" for slip in phrasings.misspellings("ox"))
    for text, empty in (("", "mine"), ("[slips]\n[words]\nox\n", "slips")):
        own.write_text(text)
        with pytest.raises(ValueError, match=f"no prompt.*{empty}"):
            read_sets(own, "ox")
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_sets(tmp_path, "ox")


@pytest.mark.parametrize("word", ["three", "van gogh", "R2D2", "猫"])
def test_misspellings_are_near_the_name_and_never_it(word: str) -> None:
    found = phrasings.misspellings(word)
    assert word not in found and len(found) == len(set(found))
    assert all(abs(len(slip) - len(word)) <= 1 for slip in found)
    assert len(found) >= 2 * sum(letter.isalpha() for letter in word) - 2


def test_fewer_images_than_misspellings_reach_all_letters_and_all_kinds_of_slips() -> None:
    name = "salvadordali"
    found = phrasings.misspellings(name)
    for images in (8, 12, 16, 32):
        slips = phrasings.drawn_prompts(found, images)
        assert len(set(slips)) == images < len(found)
        # Where a slip first departs from the name; a doubled letter does so behind it.
        places = [next((at for at, (a, b) in enumerate(zip(slip, name, strict=False)) if a != b), 12) for slip in slips]
        halves = sum(place < 6 for place in places)
        assert abs(halves - images / 2) <= images / 6 + 1, (images, places)
        lengths = {len(slip) - len(name) for slip in slips}
        assert lengths == {-1, 0, 1} and (images < 16 or any(not slip.isalpha() for slip in slips))
    assert phrasings.drawn_prompts(found, 999) == found


def test_what_is_drawn_of_a_long_set_is_what_is_compared(tiny: DiffusionPipeline) -> None:
    sets = {"words": tuple(f"p{number}" for number in range(9))}
    asked: list[str] = []
    denoiser = denoiser_of(tiny)
    real = denoiser.encode
    denoiser.encode = lambda prompts: (asked.extend(prompts), real(prompts))[1]  # type: ignore[method-assign]
    seen = phrasings.seen_in_sets(
        denoiser, sets, lambda images: ["x"] * len(images), JudgedSampling(images=3, num_inference_steps=1)
    )
    (figures,) = phrasings.compare_sets(sets, "x", seen, seen).values()
    assert [text for text in asked if text] == ["p0", "p3", "p6"] == list(figures.by_prompt)


def test_sets_are_compared_prompt_by_prompt() -> None:
    sets = {"words": ("p", "q")}
    before, after = {"words": ["x", "x", "x", "y"]}, {"words": ["y", "x", "y", "x"]}
    (figures,) = phrasings.compare_sets(sets, "x", before, after).values()
    assert (figures.before.value, figures.after.value) == (0.75, 0.5)
    assert list(figures.by_prompt.items()) == [("q", (0.5, 1.0)), ("p", (1.0, 0.0))]


@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_every_family_is_judged_attacked_and_relearnt_and_left_as_it_was(name: str) -> None:
    """The pipeline, handed what its denoiser encodes, draws the same as from prompts; and perturbed, something else."""
    pipeline = families.build(name)
    denoiser = families.denoiser(name, pipeline)
    before = weights_of(pipeline)
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt" if denoiser.draws_videos else "latent"}

    def draw(by: Any, **more: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pictures(by(prompt=["three", "a photo of three"], generator=generators, **settings, **more))

    with torch.no_grad():
        given = {**guidance_arguments(pipeline, 2.0, 2), **denoiser.call_settings}
        plain = draw(pipeline, height=denoiser.height, width=denoiser.width, **given)
        encoded = draw(Conditioned(denoiser), guidance_scale=2.0)
        torch.testing.assert_close(encoded, plain, rtol=0, atol=1e-4)
        perturbation = Perturbation(denoiser, "three", tokens=2, start=3.0)
        assert not torch.allclose(draw(Conditioned(denoiser), guidance_scale=2.0), plain, atol=1e-3)
        perturbation.remove()
        assert torch.equal(draw(Conditioned(denoiser), guidance_scale=2.0), encoded)
    latents = torch.randn(3, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    probe = dataclasses.replace(THREE, prompts=("three",))
    lesson = Lesson(denoiser, probe, latents, JudgedSampling(images=1, num_inference_steps=2))
    attacked = attack(lesson, AttackConfig(2, 2, restarts=1, batch_size=2, looks=1))
    relearnt = relearn(lesson, RelearningConfig(rank=2, steps=1, batch_size=2, looks=1))
    assert attacked.attempts[0].size > 0 and [step for step, _ in attacked.attempts[0].course] == [2]
    assert [step for step, _ in relearnt.course] == [0, 1] and relearnt.back_after == 0
    assert unchanged(pipeline, before)


def test_looks_double_and_leave_the_pipelines_progress_bar_as_it_was(
    tiny: DiffusionPipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.set_progress_bar_config(desc="its own")
    denoiser = denoiser_of(tiny)
    lesson = Lesson(denoiser, THREE, torch.zeros(2, *denoiser.latent_shape), QUICK)
    for steps, looks, seen in ((3, 9, [0, 1, 3]), (4, 2, [0, 2, 4])):
        config = RelearningConfig(rank=2, batch_size=1, steps=steps, looks=looks)
        assert [step for step, _ in relearn(lesson, config).course] == seen
    assert tiny._progress_bar_config == {"desc": "its own"}
    assert "its own" not in capfd.readouterr().err


def test_the_attack_lowers_the_denoisers_loss(tiny: DiffusionPipeline) -> None:
    denoiser = denoiser_of(tiny)
    latents = target_latents(denoiser, THREE, 4, QUICK)
    lesson = Lesson(denoiser, dataclasses.replace(THREE, prompts=("the digit eight",)), latents, QUICK)
    config = AttackConfig(steps=4, restarts=1, batch_size=4, looks=1, learning_rate=0.5)
    attacked = attack(lesson, config)
    idle = attack(lesson, dataclasses.replace(config, learning_rate=1e-9))
    assert attacked.attempts[0].loss < idle.attempts[0].loss


def test_an_examination_from_end_to_end(tiny: DiffusionPipeline, quick: dict[str, Any]) -> None:
    sets = {"words": ("three", "the three")}
    examination = Examination(THREE, sets, **SHORT)
    with pytest.raises(RuntimeError, match="call before"):
        examination.after(tiny)
    result = fdu.erase(tiny, "three", "eight", **{**quick, "max_train_steps": 1})
    weights = weights_of(tiny)
    with result.original() as original:
        examination.before(original)
    found = examination.after(result.pipeline)
    assert unchanged(tiny, weights)
    assert found.phrasings is not None and found.attack is not None and found.relearning is not None
    assert found.attack_before is not None and len(found.attack_before.attempts) == 1
    assert found.attack.drawn_before == found.relearning.drawn_before == found.attack_before.before.value == 1.0
    assert [step for step, _ in found.relearning.course] == [0, 1, 2]
    losses = [attempt.loss for attempt in found.attack.attempts]
    assert found.attack.chosen == losses.index(min(losses)) and len(losses) == 2
    again = Examination(THREE, tests=["attack"], **SHORT)
    with result.original() as original:
        again.before(original)
    assert again.after(result.pipeline).attack == found.attack


def test_relearning_is_measured_by_what_was_drawn_before_the_attack(tiny: DiffusionPipeline) -> None:
    """What the attack drew and counted before the erasure serves relearning."""
    seldom = dataclasses.replace(THREE, judge=lambda images: ["three", "eight", "eight"][: len(images)])
    settings = SHORT | {"drawing": JudgedSampling(images=3, num_inference_steps=1)}
    settings |= {"attack_config": AttackConfig(tokens=2, steps=1, restarts=1, batch_size=1, looks=1)}
    examination = Examination(seldom, {}, ("attack", "relearning"), **settings)
    examination.before(tiny)
    assert examination.drawn_before == pytest.approx(1 / 3)
    assert len(list(examination.each_after(tiny))) == 2
    examination.check()
    assert examination.found is not None and examination.found.relearning is not None
    assert examination.found.relearning.drawn_before == pytest.approx(1 / 3)


def test_tests_draw_at_the_size_that_is_given(tiny: DiffusionPipeline) -> None:
    sizes: list[list[int]] = []

    def judge(images: Tensor) -> list[str]:
        sizes.append(list(images.shape[-2:]))
        return ["three"] * len(images)

    probe = dataclasses.replace(THREE, judge=judge)
    drawing = JudgedSampling(images=1, num_inference_steps=1)
    examination = Examination(probe, {}, ("partial_noise",), drawing=drawing, latents=1, size=(16, 32))
    examination.before(tiny)
    examination.after(tiny)
    assert sizes and all(size == [16, 32] for size in sizes)


def test_a_test_that_fails_is_named_and_stops_no_other(
    tiny: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    freed: list[bool] = []

    def fails(*given: Any) -> None:
        memory = torch.zeros(1)
        held.append(weakref.ref(memory))
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    def release() -> None:
        gc.collect()
        freed.append(all(reference() is None for reference in held))

    monkeypatch.setattr("fdu.evaluation.robustness.examination.attack", fails)
    monkeypatch.setattr("fdu.evaluation.robustness.examination.release_memory", release)
    examination = Examination(THREE, {"words": ("three",)}, ("attack", "phrasings"), drawing=QUICK, latents=1)
    examination.before(tiny)
    with pytest.raises(RuntimeError, match=r"'attack'.*CUDA out of memory\b") as raised:
        examination.after(tiny)
    assert "Tried to allocate" in str(raised.value.__cause__)
    assert examination.found is not None and set(examination.found.phrasings or {}) == {"words"}
    assert examination.found.attack is None
    (note,) = examination.notes()
    assert "'attack'" in note
    assert held and all(freed), "the next test needs the memory of the one that failed"


def test_what_makes_no_sense_is_refused(tiny: DiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="phrasings, attack, relearning.*'atack'"):
        Examination(THREE, {"a": ("b",)}, ["atack"])
    with pytest.raises(ValueError, match="needs prompt sets"):
        Examination(THREE)
    with pytest.raises(ValueError, match="tokens.*>= 1.*0"):
        AttackConfig(tokens=0)
    with pytest.raises(ValueError, match="train_method.*lora"):
        RelearningConfig(train_method="magic")
    with pytest.raises(ValueError, match="images.*>= 1.*0"):
        JudgedSampling(images=0)
    denoiser, before = denoiser_of(tiny), weights_of(tiny)
    with pytest.raises(ValueError, match="latents.*>= 1"):
        target_latents(denoiser, THREE, 0)
    with pytest.raises(ValueError, match="tokens.*1.*16"):
        attack(Lesson(denoiser, THREE, torch.zeros(1, *denoiser.latent_shape), QUICK), AttackConfig(tokens=99))
    assert unchanged(tiny, before)
    assert Robustness().as_dict()["attack"] is None


def share(value: float, reach: float = 0.1) -> dict[str, Any]:
    return {"value": value, "images": 32, "interval": (max(value - reach, 0), min(value + reach, 1))}


def found(after: float, back: int | None, words: float = 0.0, reach: float = 0.1) -> dict[str, Any]:
    attempt = {"course": [(10, share(after, reach))], "loss": 0.1, "size": 1.0}
    sides = {"before": share(0.0), "after": share(after, reach), "attempts": [attempt], "chosen": 0, "back_after": 10}
    return {
        "phrasings": {
            "paraphrases": {"before": share(1.0), "after": share(words, reach), "by_prompt": {"p": (1.0, words)}},
            "languages": {"before": share(0.1), "after": share(0.1), "by_prompt": {"p": (0.1, 0.1)}},
        },
        "attack": sides,
        "attack_before": {**sides, "after": share(1.0)},
        "relearning": {
            "course": [(0, share(0.0)), (80, share(0.9 if back else 0.02, reach))],
            "back_after": back,
            "images": 32,
        },
    }


def test_the_verdict_says_what_holds() -> None:
    strong = judge_robustness(found(0.0, None), "three")
    assert strong.holds and not re.search(r"\bnot\b|nothing|probably", strong.headline)
    assert all(name in strong.headline for name in ("other phrasings", "attack", "relearning"))
    words, attacked, relearnt = strong.sentences
    assert "languages" in words.partition("100 %")[2] and "10 %" in words
    assert "not" in attacked and "0 % without" in attacked and "not" in relearnt and "80 steps" in relearnt
    weak = judge_robustness(found(0.97, 10), "three")
    assert not weak.holds
    assert re.search(r"other phrasings.*\bnot\b.*attack.*relearning", weak.headline)
    words, attacked, relearnt = weak.sentences
    assert "97 %" in attacked and "10 steps" in attacked and "not" not in attacked
    assert "32 images of three" in relearnt and "10 steps" in relearnt and "not" not in relearnt
    assert "90 %" in relearnt and "at most" not in relearnt
    none = judge_robustness(found(0.97, 10, words=0.5), "three")
    assert not none.holds and re.search(r"\bnot\b.*other phrasings.*attack.*relearning", none.headline)
    assert judge_robustness({}, "three").sentences == ()


@pytest.mark.parametrize("test", ["phrasings", "attack", "relearning"])
@pytest.mark.parametrize(
    ("value", "reach", "holds", "headline"),
    [
        (0.04, 0.1, True, "holds against"),
        (0.05, 0.2, True, "probably holds against"),
        (0.3, 0.1, False, "does not hold against"),
        (0.3, 0.2, False, "probably does not hold against"),
        (0.3, 0.4, False, "tests do not show whether"),
        (0.05, 0.9, False, "tests do not show whether"),
    ],
)
def test_the_headline_is_as_sure_as_the_interval(
    test: str, value: float, reach: float, holds: bool, headline: str
) -> None:
    figures = found(value, None, words=value, reach=reach)
    figures["relearning"]["course"][1:] = [(40, share(value, reach)), (80, share(0.0))]
    names = [test, f"{test}_before"]
    verdict = judge_robustness({name: figures[name] for name in names if name in figures}, "three")
    assert verdict.holds is holds
    assert re.search(rf"\b(erasure|The) {headline}", verdict.headline)
    (sentence,) = verdict.sentences
    low, high = share(value, reach)["interval"]
    assert (f"interval {100 * low:.0f} to {100 * high:.0f} %" in sentence) == (
        "probably" in headline or "whether" in headline
    )
    assert ("too few images to tell" in sentence.lower()) == ("whether" in headline)


def test_one_headline_tells_sure_and_probable_results_apart() -> None:
    figures = found(0.9, None)
    figures["phrasings"]["paraphrases"]["after"] = share(0.05, 0.2)
    verdict = judge_robustness(figures, "three")
    assert re.search(
        r"holds against relearning and probably holds against other phrasings, but does not hold against an attack",
        verdict.headline,
    )
    figures["phrasings"]["slips"] = {"before": share(1.0), "after": share(0.3), "by_prompt": {"p": (1.0, 0.3)}}
    assert re.search(
        r"holds against relearning, but does not.*phrasings.*attack", judge_robustness(figures, "x").headline
    )


def test_words_that_the_model_never_knew_show_nothing() -> None:
    unknown = {"slips": {"before": share(0.06), "after": share(0.06), "by_prompt": {"p": (0.06, 0.06)}}}
    alone = judge_robustness({"phrasings": unknown}, "three")
    assert not alone.holds and "other phrasings" not in alone.headline
    (told,) = alone.sentences
    assert told.count("slips") == 2 and told.count("6 %") == 2
    both = judge_robustness({**found(0.0, None), "phrasings": unknown}, "three")
    assert both.holds
    assert re.search(r"attack.*relearning.*not conclusive.*other phrasings", both.headline)


def test_words_that_draw_more_than_before_are_an_escape_however_seldom_it_was() -> None:
    slips = {"slips": {"before": share(0.45), "after": share(0.9), "by_prompt": {"p": (0.45, 0.9)}}}
    verdict = judge_robustness({"phrasings": slips}, "three")
    assert not verdict.holds and re.search(r"\bnot\b.*other phrasings", verdict.headline)
    (told,) = verdict.sentences
    assert told.count("slips") == 1 and re.findall(r"\d+ %", told) == ["45 %", "90 %"]


def test_an_attack_has_nothing_to_bring_back_where_nothing_was_erased() -> None:
    figures = found(1.0, 0)
    figures["attack"] |= {"before": share(1.0), "back_after": 0}
    attacked, relearnt = judge_robustness({**figures, "phrasings": None}, "three").sentences
    assert "nothing" in attacked and re.findall(r"\d+ %", attacked)[:2] == ["100 %", "100 %"]
    assert "nothing" in relearnt


def test_an_attack_that_fails_without_an_erasure_shows_nothing_by_failing() -> None:
    figures = found(0.0, None)
    figures["attack_before"] |= {"after": share(0.1)}
    assert (
        judge_robustness({"attack": figures["attack"], "attack_before": figures["attack_before"]}, "x").holds is False
    )
    figures["attack"] |= {"after": share(0.9)}
    assert re.search(r"\bnot\b.*attack", judge_robustness(figures, "x").headline)


def test_attempts_that_are_not_alike_are_told() -> None:
    figures = found(0.97, 10)
    assert "attempt" not in judge_robustness(figures, "three").sentences[1]
    figures["attack"] |= {"attempts": figures["attack"]["attempts"] * 2}
    told = judge_robustness(figures, "three").sentences[1]
    assert re.search(r"100 %.*\b1 attempt\b.*\b2\b", told)


@pytest.mark.parametrize(
    ("known", "course", "steps", "holds"),
    [
        (1.0, (0.0, 0.3, 0.6), 80, False),
        (0.6, (0.0, 0.3, 0.3), 40, False),
        (1.0, (0.0, 0.1, 0.45), None, False),
        (1.0, (0.0, 0.1, 0.1), None, True),
        (0.1, (0.0, 0.0, 0.0), None, False),
        (1.0, (0.0, 0.4, 0.0), None, False),
    ],
)
def test_back_is_half_of_what_was_drawn_before(
    known: float, course: tuple[float, ...], steps: int | None, holds: bool
) -> None:
    shares = [Share(value, 100, wilson(round(100 * value) / 100, 100)) for value in course]
    steps_of = list(zip((0, 40, 80), shares, strict=True))
    assert back_after(steps_of, known) == steps
    figures = RelearningFigures(steps_of, steps, 32, RelearningConfig(), known)
    holding = judge_robustness({"relearning": dataclasses.asdict(figures)}, "three")
    assert holding.holds is holds
    if known < 0.5:
        assert "relearning" not in holding.headline and "10 %" in holding.sentences[0]
    assert ("at the end" in holding.sentences[0]) == (max(course) > course[-1])


def test_what_was_never_drawn_is_not_back() -> None:
    assert back_after([(0, Share.of("b", "a")), (5, Share.of("b", "a"))], 0.0) is None
