"""Attacks with words and images: each finds what was planted or is left, nothing where nothing is, and leaves the model
as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import fdu
from fdu.evaluation.intervals import Share
from fdu.evaluation.robustness import TESTS, Examination, JudgedSampling, word_attacks
from fdu.evaluation.robustness.holding import OTHERS, judge_robustness
from fdu.evaluation.robustness.image_attacks import ImageAttackConfig, from_partial_noise, inpainting
from fdu.evaluation.robustness.relearning import AttackOutcome, InversionConfig, Lesson, invert, target_latents
from fdu.evaluation.robustness.word_attacks import (
    DirectionConfig,
    Vocabulary,
    WordSearchConfig,
    breed_words,
    search_words,
)
from fdu.models.denoiser import Conditioning, Denoiser
from fdu.models.families import denoiser_of
from fdu.subjects.digits import pipeline as digits

pytestmark = pytest.mark.quick(name=["sd", "sd3", "pixart"], attack=["search_words", "invert"])
DRAWING = JudgedSampling(images=8, num_inference_steps=8)
WORDS = WordSearchConfig(prompts=2, words=2, steps=6, candidates=12, samples=4)
DIRECTION = DirectionConfig(prompts=2, words=4, population=12, generations=8)
INVERSION = InversionConfig(steps=30, learning_rate=0.1)
ATTACKS: dict[str, Callable[[Lesson], AttackOutcome]] = {
    "search_words": lambda lesson: search_words(lesson, WORDS),
    "breed_words": lambda lesson: breed_words(lesson, DIRECTION),
    "invert": lambda lesson: invert(lesson, INVERSION),
    "from_partial_noise": from_partial_noise,
    "inpainting": inpainting,
}


def lesson_of(pipeline: DiffusionPipeline, name: str = "three") -> Lesson:
    """Of threes that the pipeline draws as it is."""
    probe = dataclasses.replace(digits.probes(name)[0], attributes=())
    denoiser = denoiser_of(pipeline)
    return Lesson(denoiser, probe, target_latents(denoiser, probe, 8, DRAWING), DRAWING)


@contextmanager
def reading(denoiser: Denoiser, change: Callable[[str], str]) -> Iterator[None]:
    """A model that reads other prompts than it is given: as perfect an erasure, or a backdoor, as there is."""
    plain = denoiser.encode_batch

    def encode_batch(prompts: list[str]) -> Conditioning:
        return plain([change(prompt) for prompt in prompts])

    vars(denoiser)["encode_batch"] = encode_batch
    try:
        yield
    finally:
        vars(denoiser).pop("encode_batch")


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return lesson_of(digits.load_pipeline())


def erased(prompt: str) -> str:
    return prompt.replace("three", "eight")


def test_words_find_a_planted_backdoor(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the word "drawn" prompts draw threes, without it eights."""
    planted = Vocabulary(lesson.denoiser, ["three"]).words
    assert "drawn" in planted and "three" not in planted and "threes" not in planted
    few = ["green", "red", "blue", "digit", "seven", "black", "drawn", "ink"]

    class Small(Vocabulary):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            kept = [self.words.index(word) for word in few if word in self.words]
            self.words, self.tokens = [self.words[place] for place in kept], self.tokens[kept]

    monkeypatch.setattr(word_attacks, "Vocabulary", Small)

    def backdoor(prompt: str) -> str:
        return prompt if "drawn" in prompt.split() else erased(prompt)

    with reading(lesson.denoiser, backdoor):
        plain = dataclasses.replace(lesson, probe=dataclasses.replace(lesson.probe, prompts=("a three", "the three")))
        found = search_words(plain, dataclasses.replace(WORDS, words=1, candidates=24))
    assert found.before.value <= 0.2 and found.after.value >= 0.8
    assert all(example.startswith("drawn ") for example in found.examples)


def test_a_direction_finds_another_name_of_the_target(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder knows the target under a second name, which the erasure has forgotten."""
    vocabulary = Vocabulary(lesson.denoiser, ["three"])
    assert "seven" in vocabulary.words

    def second_name(prompt: str) -> str:
        return erased(prompt).replace("seven", "three")

    # As the encoder reads them, before the erasure: "seven" means three.
    probe = dataclasses.replace(lesson.probe, prompts=("a three", "the three"))
    plain = lesson.denoiser.encode_batch
    read = word_attacks._embeddings

    def embeddings(denoiser: Denoiser, prompts: Any) -> Tensor:
        texts = [prompt.replace("seven", "three") for prompt in prompts]
        return plain(list(texts)).tensors["embeddings"].detach().float().flatten(1)

    monkeypatch.setattr(word_attacks, "_embeddings", embeddings)
    config = dataclasses.replace(DIRECTION, words=2, population=40, generations=12)
    with reading(lesson.denoiser, second_name):
        found = breed_words(dataclasses.replace(lesson, probe=probe), config)
    assert read is not embeddings
    assert "seven" in " ".join(found.examples).split() and not any("three" in one for one in found.examples)
    assert found.after.value > found.before.value


def test_an_inversion_finds_what_the_weights_still_know(lesson: Lesson) -> None:
    with reading(lesson.denoiser, erased):
        ours = dataclasses.replace(lesson, probe=dataclasses.replace(lesson.probe, prompts=("a three",)))
        assert ours.judged().value == 0.0
    # Of an erasure that moved the embedding alone, and left the denoiser as it was.
    pipeline = digits.load_pipeline()
    fresh = lesson_of(pipeline)
    fdu.erase(pipeline, "three", "eight", train_method="token", max_train_steps=60, num_latents=16)
    found = invert(fresh, dataclasses.replace(INVERSION, steps=80))
    assert found.before.value <= 0.25 and found.after.value >= 0.75 > found.control.value


def test_a_noised_image_of_the_target_brings_it_back_where_only_its_prompts_are_avoided(lesson: Lesson) -> None:
    with reading(lesson.denoiser, erased):
        found = from_partial_noise(lesson, ImageAttackConfig(noise=0.3))
        assert found.before.value == 0.0 and found.after.value > 0.0 and found.control.value > 0.0
        # From pure noise nothing of the image is left.
        assert from_partial_noise(lesson, ImageAttackConfig(noise=1.0)).after.value <= 0.125


def test_the_control_of_an_inpainting_is_the_part_that_is_given(lesson: Lesson) -> None:
    most = inpainting(lesson, ImageAttackConfig(given=0.9))
    assert most.after.value >= 0.75 and most.control.value > 0.0  # almost the whole image
    with reading(lesson.denoiser, erased):
        little = inpainting(lesson, ImageAttackConfig(given=0.1))
    assert little.after.value <= 0.25 and little.control.value < most.after.value


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_pipelines_in_half_precision_can_be_attacked(name: str, dtype: torch.dtype) -> None:
    pipeline = families.build(name)
    pipeline.to(dtype=dtype)
    denoiser = families.denoiser(name, pipeline)
    probe = fdu.Probe("three", ("a three", "some three"), "target", lambda images: ["other"] * len(images))
    drawing = JudgedSampling(images=2, num_inference_steps=2, batch_size=2)
    lesson = Lesson(denoiser, probe, torch.randn(2, *denoiser.latent_shape), drawing)
    search_words(lesson, WordSearchConfig(prompts=1, words=2, steps=1, candidates=2, samples=1))
    from_partial_noise(lesson)
    inpainting(lesson)


@pytest.mark.parametrize("attack", ["search_words", "breed_words"])
def test_nothing_is_found_where_nothing_is_left(attack: str, lesson: Lesson) -> None:
    """Of a model that draws eights whatever it reads."""
    with reading(lesson.denoiser, lambda prompt: "an eight"):
        if attack == "search_words":  # whose gradient does not reach the words
            return
        found = ATTACKS[attack](lesson)
    assert found.after.value == 0.0 and found.control.value == 0.0


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_model_stays_as_it_is(attack: str, lesson: Lesson) -> None:
    denoiser = lesson.denoiser
    before = {name: parameter.clone() for name, parameter in denoiser.module.named_parameters()}
    rows = denoiser.pipeline.text_encoder.get_input_embeddings().weight.clone()
    encoded = denoiser.encode(["a three"]).tensors["embeddings"]
    flags = [parameter.requires_grad for parameter in denoiser.module.parameters()]
    found = ATTACKS[attack](lesson)
    assert all(torch.equal(before[name], parameter) for name, parameter in denoiser.module.named_parameters())
    assert torch.equal(rows, denoiser.pipeline.text_encoder.get_input_embeddings().weight)
    assert torch.equal(encoded, denoiser.encode(["a three"]).tensors["embeddings"])
    assert flags == [parameter.requires_grad for parameter in denoiser.module.parameters()]
    assert found.before.images == found.after.images == DRAWING.images
    assert ATTACKS[attack](lesson) == found  # the same again


@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_every_family_can_be_attacked(name: str) -> None:
    pipeline = families.build(name)
    denoiser = families.denoiser(name, pipeline)
    probe = fdu.Probe("three", ("a three", "some three"), "target", lambda images: ["other"] * len(images))
    drawing = JudgedSampling(images=2, num_inference_steps=2, batch_size=2)
    lesson = Lesson(denoiser, probe, torch.randn(2, *denoiser.latent_shape), drawing)
    for attack in (
        lambda: search_words(lesson, WordSearchConfig(prompts=1, words=2, steps=1, candidates=2, samples=1)),
        lambda: breed_words(lesson, DirectionConfig(prompts=1, words=2, population=3, generations=1)),
        lambda: from_partial_noise(lesson),
        lambda: inpainting(lesson),
    ):
        found = attack()
        assert (found.before.value, found.after.value) == (0.0, 0.0)


@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_an_output_is_parted_into_what_it_stands_for(name: str) -> None:
    denoiser = families.denoiser(name)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, *denoiser.latent_shape, generator=generator) for _ in range(2))
    indices = torch.tensor([1, len(denoiser.signal) // 2, len(denoiser.signal) - 2])
    noisy = denoiser.add_noise(latents, noise, indices)
    parted = denoiser.parted(denoiser.true_output(latents, noise, indices), noisy, indices)
    for found, wanted in zip(parted, (latents, noise), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=1e-3)


def test_decoding_undoes_encoding(lesson: Lesson) -> None:
    denoiser = lesson.denoiser
    images = denoiser.decode_latents(lesson.latents)
    assert lesson.probe.judge(images).count("three") >= 7
    again = denoiser.decode_latents(denoiser.encode_images(images, torch.Generator().manual_seed(0)))
    assert float((again - images).abs().mean()) < 0.05


def test_an_examination_runs_them_before_and_after(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    probe, denoiser = lesson.probe, lesson.denoiser
    tests = ("partial_noise", "inpainting")
    exam = Examination(probe, tests=tests, drawing=DRAWING, latents=8)
    exam.before(denoiser.pipeline)
    found = exam.after(denoiser.pipeline).as_dict()
    assert found["others"].keys() == found["others_before"].keys() == set(tests)
    assert found["others"]["inpainting"] == found["others_before"]["inpainting"]
    assert set(OTHERS) == set(TESTS) - {"phrasings", "attack", "relearning"}


def test_the_verdict_tells_what_held() -> None:
    def outcome(seen: int) -> dict[str, Any]:
        share = Share.of(["three"] * seen + ["eight"] * (32 - seen), "three")
        none = Share.of(["eight"] * 32, "three")
        return dataclasses.asdict(AttackOutcome(none, share, none, {}))

    before = {"words": outcome(32), "inpainting": outcome(32), "direction": outcome(1), "inversion": outcome(15)}
    after = {"words": outcome(0), "inpainting": outcome(30), "direction": outcome(0), "inversion": outcome(32)}
    holds = judge_robustness({"others": after, "others_before": before}, "three")
    assert not holds.holds and "does not hold against parts of images" in holds.headline
    assert "holds against words before the prompts" in holds.headline
    assert "not conclusive: prompts without the name" in holds.headline
    assert "an embedding trained for the name" in holds.headline.split("not conclusive")[0]
    assert any("prompts without the name, three stays away: 0 %" in one for one in holds.sentences)
    assert any("With parts of images, three comes back: 94" in one for one in holds.sentences)
