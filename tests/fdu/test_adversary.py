"""Robust erasure: what still draws a target is found, stays within its bound, and is erased too."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

import fdu
from fdu import cli
from fdu.cli import main
from fdu.models.denoiser import Conditioning
from fdu.models.families import denoiser_of
from fdu.subjects.digits import pipeline as digits
from fdu.training import adversary as adversary_file
from fdu.training.adversary import Adversary, from_keys, keys_of, search_steps
from fdu.training.cache import Cache
from fdu.training.examples import Found, prepare_examples, with_found
from fdu.training.methods.perturbation import Perturbation
from fdu.training.process_state import noticed
from fdu.training.step import Stepper

pytestmark = pytest.mark.quick(method=["lora", "token"], name=["sd", "sd3"])
FEW: dict[str, Any] = {"max_train_steps": 4, "adversarial_rounds": 1, "adversarial_steps": 2}


def erase(quick: dict[str, Any], **settings: Any) -> fdu.ErasureResult:
    return fdu.erase(digits.load_pipeline(), *digits.concepts("three", "eight"), **{**quick, **FEW, **settings})


def weights(result: fdu.ErasureResult) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in result.trainable.named_parameters().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def an_adversary(quick: dict[str, Any], **settings: Any) -> Adversary:
    """Of digits as they are."""
    denoiser = denoiser_of(digits.load_pipeline())
    config = fdu.EraseConfig(**{**quick, **FEW, "num_latents": 16, **settings})
    accelerator = Accelerator(cpu=True)
    pairs = [digits.concepts("three", "eight"), digits.concepts("red", "green")]
    examples = prepare_examples(denoiser, pairs, config, accelerator, Cache(None, {}, accelerator))
    return Adversary(accelerator, denoiser, pairs, config, examples, search_steps(config))


def test_a_search_lowers_the_loss_on_the_targets_images_and_leaves_the_model_as_it_is(quick: dict[str, Any]) -> None:
    adversary = an_adversary(quick, adversarial_steps=20, adversarial_conditionings=1, train_batch_size=8)
    denoiser = adversary.denoiser
    before = {name: parameter.clone() for name, parameter in denoiser.module.named_parameters()}
    encoded = denoiser.encode(["a three"])
    examples = adversary.search()
    assert [one.concept for one in adversary.found] == [0, 1]
    assert all(float(one.moves["embeddings"].abs().max()) > 0 for one in adversary.found)
    assert same(before, dict(denoiser.module.named_parameters()))
    assert torch.equal(denoiser.encode(["a three"]).tensors["embeddings"], encoded.tensors["embeddings"])

    @torch.no_grad()
    def loss(conditioning: Conditioning) -> float:
        generator = torch.Generator().manual_seed(5)
        latents = adversary.examples.latents[: adversary.examples.latents_per_concept // 2].repeat(16, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator)
        indices = torch.randint(len(denoiser.signal), (len(latents),), generator=generator)
        noisy, wanted = denoiser.add_noise(latents, noise, indices), denoiser.true_output(latents, noise, indices)
        found = denoiser.predict(noisy, indices, conditioning[torch.zeros(len(latents), dtype=torch.long)])
        return float((found - wanted).square().mean())

    eight = denoiser.encode(["an eight"])  # as an erased model reads "a three"
    assert loss(adversary.found[0].moved(encoded)) < loss(eight)
    count = len(examples.texts) - len(adversary.examples.texts)
    assert count == 2 * adversary_file.PHRASINGS and not adversary.due(10**6)


def test_what_is_found_stays_within_the_bound(quick: dict[str, Any]) -> None:
    denoiser = denoiser_of(digits.load_pipeline())
    generator = torch.Generator().manual_seed(0)
    moved = Perturbation(denoiser, "a three", 3, 5.0, generator, bound=0.5)
    try:
        size = moved.addends()["embeddings"].square().mean(-1).sqrt() / moved.units["embeddings"]
        torch.testing.assert_close(size, torch.full((3,), 0.5))
    finally:
        moved.remove()
    small = Perturbation(denoiser, "a three", 3, 0.1, generator, bound=0.5)
    try:
        torch.testing.assert_close(small.addends()["embeddings"], small.moves["embeddings"] * small.units["embeddings"])
    finally:
        small.remove()


def test_a_search_keeps_to_the_bound(quick: dict[str, Any]) -> None:
    adversary = an_adversary(quick, adversarial_bound=0.05)
    adversary.search()
    embeddings = adversary.examples.conditioning.tensors["embeddings"]
    unit = float(embeddings.square().mean((1, 2)).sqrt().max())
    sizes = [one.moves["embeddings"].square().mean(-1).sqrt() / unit for one in adversary.found]
    assert len(sizes) == 4 and all(0 < float(size.max()) < 0.0501 for size in sizes)


def found_with(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[Found]:
    """What the searches of an erasure find."""
    found: list[Found] = []
    extended = Adversary.extended

    def noting(adversary: Adversary) -> Any:
        found[:] = adversary.found
        return extended(adversary)

    with monkeypatch.context() as patched:
        patched.setattr(Adversary, "extended", noting)
        erase(quick, **settings)
    return found


@pytest.mark.parametrize("settings", [{"divergence": "pearson_chi2"}, {"sigma": 0.05}, {"s0": 30.0}])
@pytest.mark.parametrize("order", ["search_first", "alternate"])
def test_the_loss_of_the_erasure_decides_what_is_found(
    settings: dict[str, Any], order: str, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The searches attack a model that was trained with the divergence, sigma and s0 that were asked for."""
    plain, other = (found_with(quick, monkeypatch, adversarial_order=order, **one) for one in ({}, settings))
    assert not same(keys_of(plain), keys_of(other))


def test_what_was_found_is_erased_too(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With it, the model denoises nearer to what the original one denoises for the anchor."""
    settings = {"max_train_steps": 24, "train_batch_size": 8, "num_latents": 16, "learning_rate": 4e-3}
    found = found_with(quick, monkeypatch, **settings, adversarial_steps=12, adversarial_conditionings=1)
    assert len(found) == 1

    @torch.no_grad()
    def distance(result: fdu.ErasureResult) -> float:
        denoiser = denoiser_of(result.pipeline)
        three, eight = denoiser.encode(["a three"] * 16), denoiser.encode(["an eight"] * 16)
        noisy = torch.randn(16, *denoiser.latent_shape, generator=torch.Generator().manual_seed(7))
        indices = torch.linspace(100, len(denoiser.signal) - 1, 16).long()
        ours = denoiser.predict(noisy, indices, found[0].moved(three))
        with result.original():
            return float((ours - denoiser.predict(noisy, indices, eight)).square().mean())

    robust = distance(erase(quick, **settings, adversarial_steps=12, adversarial_conditionings=1))
    plain = distance(erase(quick, **settings, adversarial_rounds=0, adversarial_steps=60))
    assert robust < 0.8 * plain


@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_what_is_found_is_added_in_every_family(name: str, quick: dict[str, Any]) -> None:
    pipeline = families.build(name)
    denoiser = families.denoiser(name, pipeline)
    config = fdu.EraseConfig(**{**quick, "num_inference_steps": 2, **families.needed(name)})
    accelerator = Accelerator(cpu=True)
    pairs = [(fdu.Concept("a", ("an a", "some a")), fdu.Concept("b", ("a b", "some b")))]
    examples = prepare_examples(denoiser, pairs, config, accelerator, Cache(None, {}, accelerator))
    moved = Perturbation(denoiser, "an a", 2, 1.0, torch.Generator().manual_seed(0))
    found = Found(0, moved.addends())
    moved.remove()
    assert found.moves.keys() == {
        key for key, tensor in examples.conditioning.tensors.items() if tensor.is_floating_point()
    }
    extended = with_found(examples, [found], 1)
    last = Conditioning({key: tensor[-1:] for key, tensor in extended.conditioning.tensors.items()})
    plain = examples.conditioning[torch.tensor([examples.texts.index(extended.texts[-1])])]
    for key, tensor in last.tensors.items():
        difference = tensor.float() - plain.tensors[key].float()
        if key not in found.moves:
            assert not difference.any()
        elif tensor.ndim == 3:
            assert difference[:, :2].any() and not difference[:, 2:].any()
        else:
            torch.testing.assert_close(difference[0], found.moves[key], atol=1e-2, rtol=1e-2)
    assert extended.anchor[-1] == examples.anchor[0] and extended.added is not None


@pytest.mark.parametrize("order", ["search_first", "alternate"])
@pytest.mark.parametrize("method", sorted(fdu.config.TRAIN_METHODS))
def test_every_method_erases_what_was_found(method: str, order: str, quick: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"train_method": method, "adversarial_rounds": 2}
    if method == "closed_form":
        if order == "alternate":
            with pytest.raises(ValueError, match="adversarial_order has no effect"):
                fdu.EraseConfig(**settings, adversarial_order=order)
            return
        trains = ("max_train_steps", "rank")
        settings |= {"adversarial_steps": 2}
        plain = {name: value for name, value in quick.items() if name not in trains}
        computed = fdu.erase(digits.load_pipeline(), "three", "eight", **plain, **settings)
        without = fdu.erase(digits.load_pipeline(), "three", "eight", train_method=method)
        assert computed.edits[0].layers and computed.record()["config"]["adversarial_rounds"] == 2
        first, second = (next(iter(one.trainable.named_parameters().values())) for one in (computed, without))
        assert first.shape != second.shape or not torch.equal(first, second)
        return
    result = erase(quick, **settings, adversarial_order=order)
    plain = erase(quick, train_method=method, adversarial_rounds=0, adversarial_steps=60)
    assert not same(weights(result), weights(plain))
    with result.original() as pipeline:
        assert len(result.history["loss"]) == 4 and pipeline is result.pipeline


def test_the_order_decides_what_is_kept(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Search first: 4 steps thrown away, then 4 with all that was found from the first on. Alternate: 4 steps."""
    counts: list[int] = []
    step = Stepper.step

    def noting(stepper: Stepper, number: int) -> Tensor:
        if stepper.config.objective == "model":
            counts.append(len(stepper.examples.texts))
        return step(stepper, number)

    monkeypatch.setattr(Stepper, "step", noting)
    erase(quick, adversarial_rounds=2, adversarial_conditionings=1)
    base, more = counts[0], adversary_file.PHRASINGS
    assert counts == [base, base, base + more, base + more, *[base + 2 * more] * 4]
    counts.clear()
    erase(quick, adversarial_rounds=1, adversarial_conditionings=1, adversarial_order="alternate")
    assert counts == [base, base, base + more, base + more]


@pytest.mark.parametrize("order", ["search_first", "alternate"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(order: str, quick: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_train_steps": 8,
        "adversarial_order": order,
        "checkpointing_steps": 3,
        "checkpoints_total_limit": 99,
    }
    whole = erase(quick, **settings, checkpoint_dir=str(tmp_path))
    kept = tmp_path / "checkpoint-search" if order == "search_first" else tmp_path
    assert {path.name for path in kept.glob("checkpoint-*")} >= {"checkpoint-3", "checkpoint-6", "checkpoint-8"}
    for path in tmp_path.rglob("checkpoint-[0-9]*"):
        # Of the searches, the state just before the last one is left; of what follows, nothing.
        if path.parent != kept or int(path.name.rpartition("-")[2]) > (8 if order == "search_first" else 4):
            shutil.rmtree(path)
    for path in tmp_path.glob("adversary-*"):
        path.unlink()
    resumed = erase(quick, **settings, checkpoint_dir=str(tmp_path), resume_from_checkpoint="latest")
    assert same(weights(resumed), weights(whole)) and resumed.history == whole.history


def test_a_closed_form_that_was_interrupted_goes_on_with_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["erase", "digits", "--target", "three", "--anchor", "eight", "--train_method", "closed_form"]
    words += ["--adversarial_rounds", "3", "--adversarial_steps", "2", "--num_latents", "8", "--out"]
    assert main([*words, "whole"]) == cli.OK
    search, rounds = Adversary.search, []

    def failing(adversary: Adversary) -> Any:
        rounds.append(adversary.rounds)
        if rounds == [0, 1]:
            raise KeyboardInterrupt
        return search(adversary)

    monkeypatch.setattr(Adversary, "search", failing)
    assert main([*words, "out"]) == cli.INTERRUPTED
    assert "same command" in capsys.readouterr().err
    assert main([*words, "out"]) == cli.OK and rounds == [0, 1, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    one, other = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("whole", "out"))
    assert same(one, other)


def test_later_runs_take_what_was_found_from_the_cache(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = erase(quick, training_cache=str(tmp_path))

    def search(adversary: Adversary) -> None:
        raise AssertionError("it was found before")

    monkeypatch.setattr(Adversary, "search", search)
    assert same(weights(erase(quick, training_cache=str(tmp_path))), weights(first))


def test_a_search_denoises_each_image_with_its_own_prompt(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def noting(*given: Any, **named: Any) -> list[float]:
        seen.update(texts=given[3], latents=given[5], shown=given[6])
        return [0.0]

    monkeypatch.setattr(adversary_file, "learn_images", noting)
    adversary = an_adversary(quick, num_latents=40)
    adversary.search()
    examples, each = adversary.examples, adversary.examples.latents_per_concept
    prompts = [examples.texts[examples.target[pair]] for pair in examples.pair[each : each + each // 2]]
    assert [seen["texts"][place] for place in seen["shown"].tolist()] == prompts  # of the second concept, the last one
    assert torch.equal(seen["latents"], examples.latents[each : each + each // 2]) and len(prompts) > 2


def test_no_gradient_of_a_search_reaches_the_erasure(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step, found = Stepper.step, []

    def noting(stepper: Stepper, number: int) -> Tensor:
        if stepper.config.objective == "model":
            found.append(all(parameter.grad is None for parameter in stepper.parameters))
        return step(stepper, number)

    monkeypatch.setattr(Stepper, "step", noting)
    erase(quick, train_method="token", adversarial_rounds=1, adversarial_order="alternate")
    assert found == [True] * 4


def test_at_most_half_of_the_samples_are_of_what_was_found(quick: dict[str, Any]) -> None:
    adversary = an_adversary(quick)
    few = dataclasses.replace(
        adversary.examples, target=adversary.examples.target[:2], anchor=adversary.examples.anchor[:2],
        concept=torch.zeros(2, dtype=torch.long),
    )  # fmt: skip
    moves = {"embeddings": torch.ones(2, adversary.examples.conditioning.tensors["embeddings"].shape[-1])}
    extended = with_found(few, [Found(0, moves)] * 5, 2)
    assert (extended.target >= len(few.texts)).float().mean() == 0.5
    assert len(extended.target) == len(extended.anchor) == len(extended.concept)


def test_the_accelerator_forgets_the_searches(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step, counts = Stepper.step, []

    def noting(stepper: Stepper, number: int) -> Tensor:
        counts.append((stepper.config.objective, len(stepper.accelerator._optimizers)))
        return step(stepper, number)

    monkeypatch.setattr(Stepper, "step", noting)
    erase(quick, adversarial_rounds=2)
    assert {count for objective, count in counts if objective == "model"} == {1}


def test_a_signal_in_a_search_reaches_the_run_around_it() -> None:
    with noticed() as outer:
        with noticed() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.noted and not outer.noted
        assert outer.noted


def test_the_command_cleans_up_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["erase", "digits", "--target", "three", "--anchor", "eight", "--out", "out", "--adversarial_rounds", "1"]
    words += ["--adversarial_steps", "2", "--max_train_steps", "4", "--num_latents", "8", "--num_inference_steps", "1"]
    step = Stepper.step

    def failing(stepper: Stepper, number: int) -> Tensor:
        if stepper.config.objective == "model" and number == 3 and not Path("again").exists():
            signal.raise_signal(signal.SIGTERM)
        return step(stepper, number)

    monkeypatch.setattr(Stepper, "step", failing)
    assert main([*words, "--checkpointing_steps", "2"]) == cli.INTERRUPTED
    Path("again").touch()
    assert main([*words, "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]) == cli.OK
    assert {path.name for path in tmp_path.iterdir()} == {"again", "out"}
    assert main([*words, "--overwrite"]) == cli.OK


def test_a_pipeline_in_half_precision_is_searched_for_the_closed_form() -> None:
    pipeline = families.build("sd")
    pipeline.to(dtype=torch.bfloat16)
    settings = {"adversarial_rounds": 1, "adversarial_steps": 2, "num_latents": 4, "num_inference_steps": 2}
    result = fdu.erase(pipeline, "three", "eight", train_method="closed_form", train_batch_size=2, **settings)
    assert result.edits


def test_keys_round_trip() -> None:
    found = [Found(concept, {"embeddings": torch.randn(2, 3), "pooled": torch.randn(4)}) for concept in (1, 0)] * 6
    again = from_keys(keys_of(found), torch.device("cpu"))
    assert [one.concept for one in again] == [one.concept for one in found]
    assert all(same(one.moves, other.moves) for one, other in zip(again, found, strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adversarial_steps": 5}, "adversarial_steps has no effect without adversarial_rounds"),
        ({"adversarial_rounds": 1, "objective": "noise"}, "adversarial_rounds needs objective 'model'"),
        ({"adversarial_rounds": 1, "shard": True}, "adversarial_rounds does not work with shard"),
        (
            {"adversarial_rounds": 1, "frozen_batches": 4, "adversarial_order": "alternate"},
            "frozen_batches fixes the batches",
        ),
        ({"adversarial_rounds": 9, "max_train_steps": 17}, "needs at least 18 steps"),
        ({"adversarial_rounds": -1}, "adversarial_rounds must be"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fdu.EraseConfig(**settings)
