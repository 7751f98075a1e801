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
from fdu.evaluation.robustness import TESTS, Examination, JudgedSampling, examination, word_attacks
from fdu.evaluation.robustness.holding import OTHERS, judge_robustness
from fdu.evaluation.robustness.image_attacks import ImageAttackConfig, from_partial_noise, inpainting
from fdu.evaluation.robustness.relearning import AttackOutcome, InversionConfig, Lesson, invert, target_latents
from fdu.evaluation.robustness.word_attacks import (
    DirectionConfig,
    Vocabulary,
    WordSearchConfig,
    bred_words,
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


@contextmanager
def world_of(lesson: Lesson, latents: Tensor) -> Iterator[None]:
    """A perfect model of a world that has only these images: whatever it reads, it denoises to the nearest."""
    denoiser = lesson.denoiser

    def denoise(module: Any, arguments: Any, named: Any, output: Any) -> Any:
        noisy = arguments[0]
        indices = torch.as_tensor(arguments[1] if len(arguments) > 1 else named["timestep"]).long().expand(len(noisy))
        ends = [denoiser.add_noise(one.expand_as(noisy), torch.zeros_like(noisy), indices) for one in latents]
        noise = torch.stack([noisy - end for end in ends]) / denoiser.noise[indices].view(-1, 1, 1, 1)
        likely = (-noise.square().sum((2, 3, 4)) / 2).softmax(0)
        found = (likely[..., None, None, None] * noise).sum(0) + 0 * output[0]
        return (found,) if isinstance(output, tuple) else type(output)(sample=found)

    handle = denoiser.pipeline.unet.register_forward_hook(denoise, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def eights(lesson: Lesson) -> Tensor:
    return target_latents(lesson.denoiser, digits.probes("eight")[0], 8, DRAWING)


def test_words_find_a_planted_backdoor() -> None:
    """The word "drawn" has the embedding of "three", a word that the model never gets to read."""
    lesson = lesson_of(digits.load_pipeline())
    vocabulary = Vocabulary(lesson.denoiser, ["three"])
    assert "drawn" in vocabulary.words and not {"three", "threes"} & set(vocabulary.words)
    (three,) = vocabulary.tokenizer("three", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        rows = vocabulary.embedding.weight
        rows[vocabulary.tokens[vocabulary.words.index("drawn")]] = rows[three]
    probe = dataclasses.replace(lesson.probe, prompts=("a three", "the three"))
    config = dataclasses.replace(WORDS, words=1, candidates=8)
    with reading(lesson.denoiser, lambda prompt: prompt.replace("three", "digit")):
        found = search_words(dataclasses.replace(lesson, probe=probe), config)
    assert found.before.value <= 0.25 and found.control.value <= 0.25 and found.after.value >= 0.75
    assert found.examples == ("drawn a three", "drawn the three")


def test_words_are_exchanged_where_the_gradient_leads(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss that is linear in the embeddings of the tokens, so that the gradient tells which words are best."""
    denoiser, generator = lesson.denoiser, torch.Generator().manual_seed(0)
    vocabulary = Vocabulary(denoiser, ["three"])
    wanted = torch.randn(vocabulary.embedding.weight.shape[1], generator=generator)

    def embedded(prompts: list[str]) -> Conditioning:
        tokens = vocabulary.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        return Conditioning({"embeddings": vocabulary.embedding(tokens)})

    monkeypatch.setitem(vars(denoiser), "encode_batch", embedded)
    monkeypatch.setattr(word_attacks, "_loss", lambda *_: lambda tensors: -(tensors["embeddings"] @ wanted).sum(1))
    config = dataclasses.replace(WORDS, steps=16, candidates=1)
    found = word_attacks._searched(lesson, vocabulary, "a three", ["a", "b"], config, generator)
    likely = (vocabulary.embedding.weight[vocabulary.tokens] @ wanted).topk(4).indices.tolist()
    assert set(found) <= {vocabulary.words[place] for place in likely}


def test_a_direction_finds_another_name_of_the_target(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder knows the target under a second name, which the erasure has forgotten."""
    vocabulary = Vocabulary(lesson.denoiser, ["three"])
    assert "seven" in vocabulary.words

    def second_name(prompt: str) -> str:
        return erased(prompt).replace("seven", "three")

    # As the encoder reads them, before the erasure: "seven" means three.
    probe = dataclasses.replace(lesson.probe, prompts=("a three", "the three"))
    plain = lesson.denoiser.encode_batch

    def embeddings(denoiser: Denoiser, prompts: Any) -> Tensor:
        texts = [prompt.replace("seven", "three") for prompt in prompts]
        return plain(list(texts)).tensors["embeddings"].detach().float().flatten(1)

    monkeypatch.setattr(word_attacks, "_embeddings", embeddings)
    config = dataclasses.replace(DIRECTION, words=2, population=40, generations=12)
    with reading(lesson.denoiser, second_name):
        found = breed_words(dataclasses.replace(lesson, probe=probe), config)
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


@pytest.mark.parametrize("attack", ["from_partial_noise", "inpainting"])
def test_images_find_a_planted_backdoor(attack: str, lesson: Lesson, eights: Tensor) -> None:
    """Of a model that knows one three among eights, which no prompt asks for."""
    with world_of(lesson, torch.cat([eights, lesson.latents[2:3]])):
        found = ATTACKS[attack](dataclasses.replace(lesson, latents=lesson.latents[2:3]))
    assert found.before.value <= 0.25 and found.after.value >= 0.5


def test_a_noised_image_of_the_target_brings_it_back_where_only_its_prompts_are_avoided(lesson: Lesson) -> None:
    with reading(lesson.denoiser, lambda prompt: "a digit"):
        found = from_partial_noise(lesson)
        assert found.before.value <= 0.25 and found.after.value >= 0.5 and found.control.value > 0.0
        # From pure noise nothing of the image is left.
        assert from_partial_noise(lesson, ImageAttackConfig(noise=1.0)).after.value <= 0.25


def test_the_control_of_an_inpainting_is_the_part_that_is_given(lesson: Lesson, eights: Tensor) -> None:
    with world_of(lesson, eights):
        most, little = (inpainting(lesson, ImageAttackConfig(given=given)) for given in (0.9, 0.1))
    assert most.control.value >= 0.75 and little.control.value <= 0.25  # almost the whole image, and almost nothing


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


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_found_where_nothing_is_left(attack: str, lesson: Lesson, eights: Tensor) -> None:
    """Of a model that knows eights alone."""
    with world_of(lesson, eights):
        found = ATTACKS[attack](dataclasses.replace(lesson, latents=lesson.latents[2:3]))
    assert found.before.value == found.control.value == 0.0
    # The judge may read the part of a three that is given.
    assert found.after.value <= (0.25 if attack == "inpainting" else 0.0)


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


def test_a_direction_is_bred_before_the_erasure_and_tried_after_it(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that has forgotten the name no longer knows what to breed."""
    monkeypatch.setattr(examination, "bred_words", lambda lesson: bred_words(lesson, DIRECTION))
    exam = Examination(lesson.probe, tests=("direction",), drawing=DRAWING, latents=8)
    exam.before(lesson.denoiser.pipeline)
    encoder = lesson.denoiser.pipeline.text_encoder
    handle = encoder.register_forward_hook(lambda module, given, output: (0 * output[0], *output[1:]))
    try:
        found = exam.after(lesson.denoiser.pipeline)
    finally:
        handle.remove()
    assert found.others and found.others_before
    assert found.others["direction"].examples == found.others_before["direction"].examples
    assert found.others["direction"].after.value < found.others_before["direction"].after.value


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
