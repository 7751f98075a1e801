"""What a run can be told to do: objectives, several concepts, weightings, caches, memory, trackers."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMParallelScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

import fdu
import fdu_kernels
from fdu import erasure
from fdu.concepts import Pair, joined, weighted
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of
from fdu.subjects.digits import pipeline as digits
from fdu.training import examples, loop, objective, process_state, step, tracking
from fdu.training.cache import Cache
from fdu.training.timesteps import TimestepSampler
from fdu_kernels.kernels.native import CpuBackend

pytestmark = pytest.mark.quick(name=["sd", "sd3", "flux", "pixart"])

TINY: dict[str, Any] = {
    "max_train_steps": 2, "train_batch_size": 1, "num_latents": 2, "num_inference_steps": 2, "rank": 2,
}  # fmt: skip
"""For the tiny pipelines of families.py."""


def trained(result: fdu.ErasureResult) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in result.trainable.named_parameters().items()}


def erase(settings: dict[str, Any], **others: Any) -> fdu.ErasureResult:
    """ "three" towards "eight" on a pipeline of its own."""
    return fdu.erase(digits.load_pipeline(), *digits.concepts("three", "eight"), **{**settings, **others})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "others",
    [
        {"objective": "noise"},
        {"negative_guidance": 1.0},
        {"gradient_surgery": True},
        {"weighting": "posterior"},
        {"timestep_sampling": "importance"},
        {"timestep_sampling": "inference", "frozen_batches": 2},
        {"noisy_latents": "trajectory", "negative_guidance": 1.0, "frozen_batches": 2},
        {"train_method": "dora"},
        {"train_method": "full"},
        {"train_method": "text_encoder"},
        {"train_method": "token"},
        {"variational": True, "divergence": "kl", "critic_warmup_steps": 1},
        {"variational": True, "divergence": "jensen_shannon", "critic_warmup_steps": 1, "gradient_surgery": True},
    ],
    ids=lambda others: "-".join(map(str, others.values())),
)
def test_every_way_trains_and_comes_back(
    quick: dict[str, Any], plain: dict[str, Tensor], others: dict[str, Any]
) -> None:
    pipeline = digits.load_pipeline()
    state = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    result = fdu.erase(pipeline, *digits.concepts("three", "eight"), **{**quick, **others})
    assert all(value == value and abs(value) < 1e6 for values in result.history.values() for value in values)
    assert any(bool(tensor.any()) for tensor in trained(result).values())
    with result.original() as original:
        names = {name: tensor for name, tensor in original.unet.state_dict().items() if name in state}
        assert all(torch.equal(tensor, state[name]) for name, tensor in names.items())
    assert not same(trained(result), plain)


def prepare(denoiser: Denoiser, config: fdu.EraseConfig, *pairs: Pair) -> examples.Examples:
    accelerator = Accelerator(cpu=True)
    return examples.prepare_examples(denoiser, pairs, config, accelerator, Cache(None, {}, accelerator))


def a_batch(denoiser: Denoiser, prepared: examples.Examples, config: fdu.EraseConfig) -> examples.Batch:
    sampler = TimestepSampler(config.timestep_sampling, len(denoiser.signal))
    return examples.draw_batch(denoiser, prepared, config, sampler, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("count", "steps", "each"), [(2, 120, 6), (12, 120, 6), (12, 1, 1)])
def test_many_concepts_have_enough_latents_each(
    pipeline: StableDiffusionPipeline, count: int, steps: int, each: int
) -> None:
    config = fdu.EraseConfig(train_batch_size=3, num_latents=16, num_inference_steps=1, max_train_steps=steps)
    names = [f"{number}" for number in range(count)]
    pairs = [(fdu.Concept(name, (f"a {name}",)), fdu.Concept("eight", ("an eight",))) for name in names]
    prepared = prepare(denoiser_of(pipeline), config, *pairs)
    assert prepared.latents_per_concept == each


def test_a_trajectory_gives_every_x_t(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    config = fdu.EraseConfig(train_batch_size=20, num_latents=8, num_inference_steps=4, noisy_latents="trajectory")
    denoiser, accelerator = denoiser_of(pipeline), Accelerator(cpu=True)
    pair = fdu.Concept("three", ("a three", "some three")), fdu.Concept("eight", ("an eight", "some eight"))
    prepared, again = (
        examples.prepare_examples(denoiser, [pair], config, accelerator, Cache(tmp_path, {}, accelerator))
        for _ in range(2)
    )
    assert prepared.trajectories is not None and prepared.steps is not None and again.trajectories is not None
    assert prepared.trajectories.shape == (8, 4, *denoiser.latent_shape)
    # Read from the cache the second time.
    assert torch.equal(prepared.trajectories, again.trajectories) and torch.equal(prepared.steps, again.steps)
    # Those of the target show its prompts alone: drawn with the same seeds, the anchor's are others.
    conditioning = denoiser.encode(["a three", "some three", "an eight", ""])
    for prompts, equal in (([0, 1] * 3, True), ([2] * 6, False)):
        own = denoiser.draw_latents(conditioning, prompts, 3, 4, config.sampling_guidance, range(6), 32)
        assert torch.allclose(own, prepared.latents[:6], atol=1e-4) == equal
    batch = a_batch(denoiser, prepared, config)
    passed, seen = prepared.trajectories, set()
    for row, (noisy, index) in enumerate(zip(batch.noisy, batch.indices, strict=True)):
        (place,) = (prepared.steps == index).nonzero().flatten().tolist()
        (chosen,) = (passed[:, place] == noisy).flatten(1).all(1).nonzero().flatten().tolist()
        assert chosen < prepared.latents_per_concept or row >= batch.size
        seen.add((chosen, place))
    assert {place for _, place in seen} == {0, 1, 2, 3} and len({chosen for chosen, _ in seen}) == 8


def test_few_step_models_are_trained_at_their_own_timesteps(pipeline: StableDiffusionPipeline) -> None:
    pipeline.scheduler.register_to_config(timestep_spacing="trailing")
    config = fdu.EraseConfig(train_batch_size=40, num_latents=8, num_inference_steps=4, timestep_sampling="inference")
    denoiser = denoiser_of(pipeline)
    prepared = prepare(denoiser, config, (fdu.Concept("three", ("a three",)), fdu.Concept("eight", ("an eight",))))
    assert prepared.trajectories is None
    assert prepared.steps is not None and prepared.steps.tolist() == [999, 749, 499, 249]
    batch = a_batch(denoiser, prepared, config)
    assert set(batch.indices.tolist()) == {999, 749, 499, 249} and batch.timestep_weight is None


@pytest.mark.parametrize("others", [{}, {"negative_guidance": 2.0}, {"objective": "noise"}])
def test_what_is_wanted_of_the_trained_denoiser(pipeline: StableDiffusionPipeline, others: dict[str, Any]) -> None:
    config = fdu.EraseConfig(train_batch_size=3, num_latents=8, num_inference_steps=2, **others)
    denoiser = denoiser_of(pipeline)
    prepared = prepare(denoiser, config, digits.concepts("three", "eight"))
    batch = a_batch(denoiser, prepared, config)
    wanted = objective.Objective(denoiser, config).wanted(denoiser, prepared, batch)
    with torch.no_grad():
        anchor = denoiser.predict(batch.noisy, batch.indices, prepared.conditioning[batch.anchors])
        target = denoiser.predict(batch.noisy[:3], batch.indices[:3], prepared.conditioning[batch.reads[:3]])
    expected = {0.0: anchor[:3], 2.0: anchor[:3] + 2 * (anchor[:3] - target)}[config.negative_guidance]
    if config.objective == "noise":
        assert batch.noise is not None
        clean = batch.noisy[:3] - denoiser.noise[batch.indices[:3]].view(-1, 1, 1, 1) * batch.noise
        expected = batch.noise
        latents = clean / denoiser.signal[batch.indices[:3]].view(-1, 1, 1, 1)
        assert latents.std() == pytest.approx(1.0, abs=0.5)  # the digits pipeline's latents are standardised
    torch.testing.assert_close(wanted[:3], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wanted[3:], anchor[3:], rtol=1e-4, atol=1e-5)
    texts = [[prepared.texts[index] for index in side] for side in (batch.reads.tolist(), batch.anchors.tolist())]
    assert all("three" in text for text in texts[0][:3]) and all("eight" in text for text in texts[1][:3])
    assert texts[0][3:] == texts[1][3:]


def test_noise_is_paired_with_the_prompt_it_was_drawn_with(pipeline: StableDiffusionPipeline) -> None:
    config = fdu.EraseConfig(objective="noise", num_latents=40, num_inference_steps=1, max_train_steps=40)
    denoiser, drawn = denoiser_of(pipeline), []
    real = denoiser.draw_latents
    denoiser.draw_latents = lambda given, chosen, *rest: (drawn.extend(chosen), real(given, chosen, *rest))[1]  # type: ignore
    prepared = prepare(denoiser, config, digits.concepts("three", "eight"))
    assert prepared.anchor[prepared.pair].tolist() == drawn[: len(prepared.pair)]


def test_several_concepts_share_steps_and_latents(pipeline: StableDiffusionPipeline) -> None:
    pairs = (digits.concepts("three", "eight"), digits.concepts("red", "black"))
    config = fdu.EraseConfig(num_latents=32, num_inference_steps=1, train_batch_size=64, preservation_weight=0.0)
    denoiser = denoiser_of(pipeline)
    prepared = prepare(denoiser, config, *pairs)
    assert prepared.latents_per_concept == 16 and len(prepared.latents) == 32
    numbered = torch.arange(32.0).view(-1, 1, 1, 1).expand(prepared.latents.shape)
    denoiser.signal, denoiser.noise = torch.ones(1000), torch.zeros(1000)
    batch = a_batch(denoiser, dataclasses.replace(prepared, latents=numbered), config)
    texts, drawn = [prepared.texts[index] for index in batch.reads], batch.noisy[:, 0, 0, 0].tolist()
    only = [set(one[0].prompts) - set(other[0].prompts) for one, other in (pairs, pairs[::-1])]
    for latent, text in zip(drawn, texts, strict=True):
        assert latent < 16 or text not in only[0]
        assert latent >= 16 or text not in only[1]
    assert 10 < sum(latent < 16 for latent in drawn) < 54


def test_importance_sampling_leaves_preservation_as_it_is(pipeline: StableDiffusionPipeline) -> None:
    config = fdu.EraseConfig(
        timestep_sampling="importance", train_batch_size=4000, num_latents=8, num_inference_steps=1
    )
    denoiser = denoiser_of(pipeline)
    prepared = prepare(denoiser, config, digits.concepts("three", "eight"))
    sampler = TimestepSampler("importance", len(denoiser.signal))
    places = torch.arange(1000)
    sampler.observe(places, (places / 1000.0) ** 3)
    batch = examples.draw_batch(denoiser, prepared, config, sampler, torch.Generator().manual_seed(0))
    erasing, preserving = batch.indices[:4000].float(), batch.indices[4000:].float()
    assert erasing.mean() > 650 and preserving.mean() == pytest.approx(500, abs=20)
    assert batch.timestep_weight is not None and batch.timestep_weight.shape == (4000,)
    assert (batch.timestep_weight * erasing).mean() == pytest.approx(500, abs=25)


@pytest.mark.parametrize("objective", ["model", "noise"])
def test_a_concept_is_drawn_as_often_as_its_weight_says(objective: str, pipeline: StableDiffusionPipeline) -> None:
    config = fdu.EraseConfig(objective=objective, train_batch_size=2000, num_latents=16, num_inference_steps=1)
    denoiser, pairs = denoiser_of(pipeline), (digits.concepts("three", "eight"), digits.concepts("red", "black"))
    odds, reads = [], []
    for weights in ((), (2.0, 2.0), (3.0, 1.0)):
        prepared = prepare(denoiser, config, *weighted(pairs, weights))
        reads.append(a_batch(denoiser, prepared, config).reads[:2000])
        first = set(prepared.target[prepared.concept == 0].tolist())
        count = sum(read in first for read in reads[-1].tolist())
        odds.append(count / (2000 - count))
    assert odds[2] / odds[0] == pytest.approx(3, rel=0.2)
    assert torch.equal(reads[0], reads[1])


def test_weights_must_fit() -> None:
    pair = digits.concepts("three", "eight")
    with pytest.raises(ValueError, match="weights must be one per target, 1 in all; got 2"):
        weighted([pair], (1.0, 2.0))
    with pytest.raises(ValueError, match="weight must be a finite number > 0"):
        fdu.Concept("three", weight=0.0)


def test_two_concepts_at_once_are_recorded(quick: dict[str, Any], tmp_path: Path) -> None:
    targets, anchors = [fdu.Concept("three"), fdu.Concept("red")], [fdu.Concept("eight"), fdu.Concept("black")]
    settings = {**quick, "max_train_steps": 0, "concept_type": ["object", "style"]}
    result = fdu.erase(digits.load_pipeline(), targets, anchors, **settings)
    record = result.record()
    assert record["target"]["name"] == "three, red" and record["anchor"]["name"] == "eight, black"
    assert record["concepts"] == [["three", "eight"], ["red", "black"]] and record["weights"] is None


def test_no_more_latents_are_drawn_than_the_steps_can_use(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        type(denoiser_of(pipeline)),
        "sample",
        lambda self, *given: calls.extend(given[-1]) or torch.zeros(len(given[-1]), 4, 8, 8),
    )
    fdu.erase(pipeline, "three", "eight", max_train_steps=1, train_batch_size=2, num_latents=500, rank=4)
    assert len(calls) == 4


def test_frozen_outputs_computed_beforehand_change_nothing(quick: dict[str, Any]) -> None:
    # One batch per pass in both, or they would round differently.
    others = {"train_method": "cross_attention", "gradient_accumulation_steps": 2, "sample_batch_size": 1}
    settings = {**quick, **others, "max_train_steps": 2}
    assert same(trained(erase(settings)), trained(erase(settings, frozen_batches=100)))


class OnDevice(Tensor):
    """A tensor that stands for one on a GPU: a copy to the CPU without waiting lands after it has been read."""

    def to(self, *args: Any, non_blocking: bool = False, **options: Any) -> Tensor:
        copy = self.as_subclass(Tensor).clone()
        return copy.zero_() if non_blocking else copy


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_read_on_the_host_has_landed(
    quick: dict[str, Any], cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen outputs are computed from copies of the batches on the CPU, and cached under a hash of them."""
    settings = {**quick, "frozen_batches": 3, **({"training_cache": str(tmp_path)} if cached else {})}
    plain, real, batches = trained(erase(settings)), step.Stepper._draw, []

    def draw(self: step.Stepper) -> examples.Batch:
        batches.append(real(self))
        return batches[-1]._with(lambda tensor: tensor.as_subclass(OnDevice))

    found = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(step.Stepper, "_draw", draw)
    assert same(trained(erase(settings)), plain) and len(batches) == 3
    assert {path.name for path in tmp_path.iterdir()} == found


def test_only_copies_to_the_cpu_make_the_host_wait(pipeline: StableDiffusionPipeline) -> None:
    denoiser, config = denoiser_of(pipeline), fdu.EraseConfig(train_batch_size=1, num_latents=2, num_inference_steps=1)
    batch = a_batch(denoiser, prepare(denoiser, config, digits.concepts("three", "eight")), config)
    waits: list[tuple[str, bool]] = []

    class Noting(Tensor):
        def to(self, device: Any, non_blocking: bool = False) -> Tensor:
            waits.append((torch.device(device).type, not non_blocking))
            return self

    for device in ("cpu", "cuda"):
        batch._with(lambda tensor: tensor.as_subclass(Noting)).to(device)
    assert set(waits) == {("cpu", True), ("cuda", False)}


def test_frozen_batches_are_used_in_turn(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = step.Stepper._predict

    def predict(self: step.Stepper, batch: examples.Batch, part: slice) -> Tensor:
        seen.append(float(batch.noisy.sum()))
        return real(self, batch, part)

    monkeypatch.setattr(step.Stepper, "_predict", predict)
    erase(quick, frozen_batches=2, max_train_steps=4)
    assert len(set(seen)) == 2 and seen[0] == seen[2] and seen[1] == seen[3]


def test_the_cache_serves_other_runs(quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**quick, "max_train_steps": 2, "training_cache": str(tmp_path), "frozen_batches": 2}
    first = trained(erase(settings))
    assert same(first, trained(erase(settings, training_cache=None)))
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["frozen", "latents", "prompts"]
    denoiser = type(denoiser_of(digits.load_pipeline()))
    with monkeypatch.context() as patch:
        for name in ("sample", "encode_batch"):
            patch.setattr(denoiser, name, lambda *_: pytest.fail("the cache has it"))
        patch.setattr(objective.Objective, "wanted", lambda *_: pytest.fail("the cache has it"))
        assert same(trained(erase(settings)), first)
        assert not same(trained(erase(settings, divergence="pearson_chi2", learning_rate=1e-3)), first)
    # The same prompts as one concept or two, another sampler, another seed or another model are other entries.
    erase(settings, seed=1)
    pipeline = digits.load_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1)
    fdu.erase(pipeline, *digits.concepts("three", "eight"), **settings)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("latents")]) == 3
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    assert same(trained(erase(settings)), first)


def test_the_cache_tells_groups_of_prompts_and_samplers_apart(quick: dict[str, Any], tmp_path: Path) -> None:
    pairs = [digits.concepts("three", "eight"), digits.concepts("four", "nine")]
    targets, anchors = ([pair[side] for pair in pairs] for side in (0, 1))
    cached = {**quick, "max_train_steps": 1, "frozen_batches": 1, "training_cache": str(tmp_path / "cache")}

    def kept() -> dict[str, int]:
        kinds = [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    fdu.erase(digits.load_pipeline(), targets, anchors, **cached)
    one = [joined(targets), joined(anchors)]
    again = fdu.erase(digits.load_pipeline(), *one, **cached)
    uncached = fdu.erase(digits.load_pipeline(), *one, **{**cached, "training_cache": None})
    assert same(trained(again), trained(uncached))
    before = kept()
    pipeline = digits.load_pipeline()
    pipeline.scheduler = DDIMParallelScheduler.from_config(pipeline.scheduler.config)
    fdu.erase(pipeline, *one, **cached)
    assert kept()["latents"] == before["latents"] + 1


def test_a_cache_that_cannot_be_written_costs_the_entries_only(
    quick: dict[str, Any], plain: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    result = erase(quick, training_cache=str(tmp_path / "file" / "cache"))
    assert same(trained(result), plain)
    assert "cache entry" in caplog.text and "could not be written" in caplog.text


def test_the_cache_tells_stacked_erasures_apart(quick: dict[str, Any], tmp_path: Path) -> None:
    pipeline = digits.load_pipeline()
    settings = {**quick, "max_train_steps": 1, "training_cache": str(tmp_path), "learning_rate": 0.1}
    fdu.erase(pipeline, *digits.concepts("three", "eight"), **settings)
    fdu.erase(pipeline, *digits.concepts("four", "nine"), **settings)
    before = len(list(tmp_path.iterdir()))
    fdu.erase(digits.load_pipeline(), *digits.concepts("four", "nine"), **settings)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("latents")]) == 3
    assert len(list(tmp_path.iterdir())) > before


def test_checkpointed_activations_give_the_same_weights(quick: dict[str, Any], plain: dict[str, Tensor]) -> None:
    pipeline = digits.load_pipeline()
    result = fdu.erase(pipeline, *digits.concepts("three", "eight"), gradient_checkpointing=True, **quick)
    assert not pipeline.unet.is_gradient_checkpointing
    for name, tensor in trained(result).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_denoiser_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tracing and the graphs of either model are the question here; code generation would take minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings: dict[str, Any] = {"max_train_steps": 3, "train_batch_size": 2, "num_latents": 4, "num_inference_steps": 2}
    ends = [
        trained(fdu.erase(families.build("sd"), "three", "eight", compile=compiled, learning_rate=1e-3, **settings))
        for compiled in (False, True)
    ]
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_mask_leaves_out_what_it_hides(pipeline: StableDiffusionPipeline, quick: dict[str, Any]) -> None:
    mask = torch.zeros(32, 32)
    mask[:, 16:] = 1
    settings = {**quick, "max_train_steps": 1, "preservation_weight": 0.0, "sigma": 1.0}
    whole = fdu.erase(digits.load_pipeline(), "three", "eight", **settings).history["distance"]
    right = fdu.erase(digits.load_pipeline(), "three", "eight", mask=mask, **settings).history["distance"]
    left = fdu.erase(digits.load_pipeline(), "three", "eight", mask=1 - mask, **settings).history["distance"]
    assert right != left
    assert fdu.erase(pipeline, "three", "eight", mask=torch.ones(8, 8), **settings).history[
        "distance"
    ] == pytest.approx(whole)


def test_settings_that_contradict_each_other_are_refused(pipeline: StableDiffusionPipeline) -> None:
    for settings, message in (
        ({"objective": "noise", "negative_guidance": 1.0}, "negative_guidance.*'model'"),
        ({"variational": True, "divergence": "mse"}, "'mse' has no generator f"),
        ({"gradient_surgery": True, "preservation_weight": 0.0}, "gradient_surgery needs preservation"),
        ({"adapter_layers": "attention", "train_method": "full"}, "adapter_layers needs train_method 'lora' or 'dora'"),
        ({"frozen_batches": 2, "timestep_sampling": "importance"}, "frozen_batches.*timestep_sampling"),
        ({"logit_std": 0.5}, "logit_std needs weighting_scheme 'logit_normal'"),
        ({"weighting_scheme": "mode", "weighting": "p2"}, "weighting_scheme takes the place of weighting"),
        ({"noisy_latents": "trajectory", "objective": "noise"}, "noisy_latents.*needs objective 'model'"),
        ({"noisy_latents": "trajectory", "timestep_sampling": "importance"}, "noisy_latents.*fixes the timesteps"),
        ({"noisy_latents": "trajectory", "weighting_scheme": "mode"}, "noisy_latents.*fixes the timesteps"),
        ({"weighting_scheme": "mode"}, "weighting_scheme is for flow models.*Stable Diffusion"),
        ({"embedded_guidance": 3.5}, "embedded_guidance.*not guidance-distilled"),
        (
            {"lr_warmup_steps": 5, "lr_scheduler": "constant"},
            "lr_warmup_steps needs lr_scheduler 'constant_with_warmup'",
        ),
        ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint needs checkpoint_dir"),
    ):
        with pytest.raises(ValueError, match=message):
            fdu.erase(pipeline, "three", "eight", **settings)


def test_guidance_and_weighting_schemes_reach_a_flow_model() -> None:
    settings = {**TINY, "resolution": families.resolution("flux_guidance")}

    def losses(**more: Any) -> list[float]:
        pipeline = families.build("flux_guidance")
        told: list[float] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            told.append(float(kwargs["guidance"][0]))

        pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
        found = fdu.erase(pipeline, "three", "eight", **settings, **more).history["loss"]
        trained = more.get("embedded_guidance", 1.0)
        # It samples first, with the guidance of a user, and then trains.
        assert told[0] not in (1.0, trained) and set(told) == {told[0], trained} and told[-1] == trained
        return found

    given: list[dict[str, Any]] = [
        {},
        {"embedded_guidance": 3.5},
        *({"weighting_scheme": name} for name in ("sigma_sqrt", "cosmap", "logit_normal", "mode")),
        *({"weighting_scheme": "logit_normal", **shape} for shape in ({"logit_mean": -1.0}, {"logit_std": 0.5})),
        {"weighting_scheme": "mode", "mode_scale": 0.5},
    ]
    found = [losses(**one) for one in given]
    assert len({tuple(one) for one in found}) == len(given)
    assert losses(weighting_scheme="logit_normal") == found[4]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(
    pipeline: StableDiffusionPipeline, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match=f"report_to '{tracker}' needs {tracker}; pip install {tracker}"):
        fdu.erase(pipeline, "three", "eight", report_to=tracker)


NEW_OPTIMIZERS: dict[str, Any] = {
    **{"train_batch_size": 2, "num_latents": 4, "num_inference_steps": 1, "seed": 0},
}


def test_prodigy_takes_the_steps_at_the_learning_rate_that_suits_it(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    prodigyopt = pytest.importorskip("prodigyopt")
    made: list[Any] = []

    class Watched(prodigyopt.Prodigy):  # type: ignore[misc, name-defined]
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            made.append(self)

    monkeypatch.setattr(prodigyopt, "Prodigy", Watched)
    result = fdu.erase(pipeline, "three", "eight", optimizer="prodigy", **NEW_OPTIMIZERS, max_train_steps=8)
    (group,) = made[0].param_groups
    assert group["k"] == 8 and group["initial_lr"] == result.config.peak_learning_rate == 1.0
    assert all(map(math.isfinite, result.history["loss"]))


def test_without_a_schedule_the_averaged_weights_are_kept(pipeline: StableDiffusionPipeline) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    with pytest.raises(ValueError, match="'schedule_free' needs lr_scheduler 'constant'"):
        fdu.EraseConfig(optimizer="schedule_free")
    seen: list[tuple[bool, float]] = []

    class Watched(schedulefree.AdamWScheduleFree):  # type: ignore[misc, name-defined]
        def step(self, *given: Any) -> Any:
            (group,) = self.param_groups
            seen.append((group["train_mode"], float(group["params"][0].norm())))
            return super().step(*given)

        def eval(self) -> None:
            super().eval()
            (group,) = self.param_groups
            seen.append((group["train_mode"], float(group["params"][0].norm())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedulefree, "AdamWScheduleFree", Watched)
        settings = {**NEW_OPTIMIZERS, "max_train_steps": 3, "optimizer": "schedule_free", "lr_scheduler": "constant"}
        result = fdu.erase(pipeline, "three", "eight", **settings)
    assert [moving for moving, _ in seen] == [True] * 3 + [False]
    first = next(iter(result.trainable.named_parameters().values()))
    assert float(first.norm()) == seen[-1][1]


def test_an_optimizer_that_is_not_installed_is_refused(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises((ImportError, ValueError), match="optimizer 'adamw_8bit' needs (bitsandbytes|a GPU)"):
        fdu.erase(pipeline, "three", "eight", optimizer="adamw_8bit")


def test_the_course_and_pictures_go_to_the_tracker(
    quick: dict[str, Any], plain: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    settings = {**quick, "validation_prompts": ("three", "four"), "validation_steps": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = erase(settings, report_to="tensorboard", tracking_dir=str(tmp_path))
    assert same(trained(result), plain), "looking at a run must not change it"
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["step-000002.png", "step-000003.png"]
    read = events.EventAccumulator(str(tmp_path / "fdu"))
    read.Reload()
    logged = [event.value for event in read.Scalars("loss")]
    assert logged[-1] == pytest.approx(result.history["loss"][-1], rel=1e-5) and len(logged) == 2
    assert "validation" in read.Tags()["images"]


@pytest.mark.parametrize(("name", "method"), [("sd", "cross_attention"), ("flux", "lora")])
def test_a_half_precision_pipeline_draws_its_validation_prompts(name: str, method: str, tmp_path: Path) -> None:
    pipeline = families.build(name)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.bfloat16)
    settings = {**TINY, "mixed_precision": "bf16", "train_method": method, **families.needed(name)}
    fdu.erase(
        pipeline, "three", "eight", **settings, validation_prompts=["three"], validation_steps=1, tracking_dir=tmp_path
    )
    assert (tmp_path / "validation" / "step-000002.png").is_file()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_last_validation_draws_what_the_pipeline_draws_afterwards(
    quick: dict[str, Any], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, real = [], tracking.draw_validation
    monkeypatch.setattr(tracking, "draw_validation", lambda *given: drawn.append(real(*given)) or drawn[-1])
    settings = {**quick, "validation_prompts": ("three",), "mixed_precision": precision, "tracking_dir": str(tmp_path)}
    result = erase(settings)
    assert torch.equal(drawn[-1], real(denoiser_of(result.pipeline), result.config))


def test_a_second_run_computes_in_the_first_ones_precision(quick: dict[str, Any]) -> None:
    """accelerate takes a module that it has had for done, and would leave it out."""
    pipeline, seen = digits.load_pipeline(), []

    class Watched(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            output = super().forward(images)
            seen.append((output.dtype, torch.is_grad_enabled()))
            return output

    pipeline.unet.conv_out.__class__ = Watched
    for method in ("lora", "text_encoder", "lora"):
        seen.clear()
        settings = {**quick, "max_train_steps": 1, "mixed_precision": "bf16", "train_method": method}
        fdu.erase(pipeline, "three", "eight", **settings)
        assert (torch.bfloat16, True) in seen and (torch.float32, True) not in seen
        assert not {"_is_accelerate_prepared", "_original_forward", "forward"} & set(vars(pipeline.unet))


def test_two_runs_on_a_half_precision_pipeline() -> None:
    pipeline = families.build("sd").to(torch.bfloat16)
    for target in ("three", "eight"):
        result = fdu.erase(pipeline, target, "digit", **TINY, mixed_precision="bf16")
        assert all(math.isfinite(loss) for loss in result.history["loss"])
        assert any(bool(weight.any()) for name, weight in trained(result).items() if "lora_B" in name)
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "sana"])
def test_text_encoders_may_be_of_another_type_than_the_denoiser(name: str) -> None:
    pipeline = families.build(name)
    for encoder in families.denoiser(name, pipeline).text_encoders.values():
        encoder.to(torch.bfloat16)
    result = fdu.erase(pipeline, "three", "eight", **TINY, **families.needed(name))
    assert result.history["loss"] and all(math.isfinite(loss) for loss in result.history["loss"])
    read = families.denoiser(name, pipeline).text_encoders.values()
    assert all(encoder.dtype == torch.bfloat16 for encoder in read)


def test_an_adapter_is_not_stored_in_eight_bits() -> None:
    pipeline = families.build("sd")
    pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ValueError, match="stored.*torch.float8_e4m3fn; load.*pipeline without.*layerwise casting"):
        fdu.erase(pipeline, "three", "eight", **TINY, train_method="cross_attention")
    result = fdu.erase(pipeline, "three", "eight", **TINY)
    assert {parameter.dtype for parameter in result.trainable.named_parameters().values()} == {torch.float32}
    pipeline("three", num_inference_steps=1, height=16, width=16, output_type="latent")


@pytest.mark.skipif(fdu_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
def test_a_step_computes_s_once(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In its kernel: log, importance sampling and sigma read no predictions."""
    real, found, calls = step.Stepper.step, [], []

    def watched(self: step.Stepper, number: int) -> Tensor:
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profile:
            values = real(self, number)
        found.append([(event.name, event.input_shapes[:1]) for event in profile.events()])
        return values

    def noted(self: CpuBackend, *given: Any, kernel: Callable[..., Any]) -> Any:
        calls.append(kernel.__name__)
        return kernel(self, *given)

    for kernel in (CpuBackend.gaussian_forward, CpuBackend.gaussian_value_and_grad):
        monkeypatch.setattr(CpuBackend, kernel.__name__, functools.partialmethod(noted, kernel=kernel))
    monkeypatch.setattr(step.Stepper, "step", watched)
    erase(quick, sigma=0.3, timestep_sampling="importance", train_batch_size=3)
    # The loss and the preservation of each step.
    assert calls == ["gaussian_value_and_grad"] * 2 * quick["max_train_steps"]
    erasing = [3, *denoiser_of(digits.load_pipeline()).latent_shape]
    eager = {"aten::sub", "aten::mul", "aten::square", "aten::pow", "aten::sum", "aten::mean"}
    for events in found:
        assert any(shapes == [erasing] for _, shapes in events)  # the loss is among what was seen
        assert not [name for name, shapes in events if name in eager and shapes == [erasing]]


@pytest.mark.parametrize("fails", [False, True])
def test_deterministic_algorithms_are_those_of_the_run(
    quick: dict[str, Any], plain: dict[str, Tensor], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> tuple[Any, ...]:
        filling = torch.utils.deterministic.fill_uninitialized_memory
        variable = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        return torch.get_deterministic_debug_mode(), filling, torch.backends.cudnn.benchmark, variable

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.set_deterministic_debug_mode("warn")
    before, within, real = state(), [], step.Stepper.step

    def noted(self: step.Stepper, number: int) -> Tensor:
        within.append(state())
        if fails:
            raise ArithmeticError
        return real(self, number)

    monkeypatch.setattr(step.Stepper, "step", noted)
    try:
        with pytest.raises(ArithmeticError) if fails else nullcontext():
            assert same(trained(erase(quick, deterministic=True)), plain)
        assert set(within) == {(2, False, False, ":4096:8")} and state() == before
    finally:
        torch.set_deterministic_debug_mode("default")


def test_cublas_that_cannot_be_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise RuntimeError("not deterministic")

    monkeypatch.setattr(Tensor, "__matmul__", refuse)
    refused = pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8.*start again")
    with refused, process_state.deterministic(True, torch.device("cpu")):
        pytest.fail("it was entered")
    assert torch.get_deterministic_debug_mode() == 0


class Overflowing(torch.amp.GradScaler):
    """Gradients of the first batches are infinite, as those of losses that are scaled too far."""

    def __init__(self, batches: int) -> None:
        super().__init__("cpu", init_scale=256.0)
        self.batches = batches

    def scale(self, outputs: Any) -> Any:
        self.batches -= 1
        return super().scale(outputs) * (math.inf if self.batches >= 0 else 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_leave_the_schedule_where_it_is(
    quick: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused AdamW, which only GPUs get by default, skips a step by itself."""
    real, adamw = erasure.own_accelerator, torch.optim.AdamW
    made: list[step.Stepper] = []

    @contextmanager
    def scaling(*arguments: Any) -> Iterator[Accelerator]:
        with real(*arguments) as accelerator:
            accelerator.scaler = Overflowing(2)
            yield accelerator

    class Noted(step.Stepper):
        def __post_init__(self) -> None:
            super().__post_init__()
            made.append(self)

    monkeypatch.setattr(erasure, "own_accelerator", scaling)
    monkeypatch.setattr(erasure, "Stepper", Noted)
    monkeypatch.setattr(torch.optim, "AdamW", lambda given, **options: adamw(given, **{**options, "fused": fused}))
    result = erase(quick, max_train_steps=5)
    (stepper,) = made
    assert stepper.accelerator.scaler.get_scale() == 64.0
    moments = stepper.optimizer.state.values()  # type: ignore[attr-defined]
    assert {float(moment["step"]) for moment in moments} == {3.0} and stepper.schedule.last_epoch == 3
    assert all(bool(tensor.isfinite().all()) for tensor in trained(result).values())


def test_accumulated_batches_share_their_frozen_pass(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    real = objective.Objective.wanted

    def wanted(self: objective.Objective, denoiser: Denoiser, given: Any, batch: examples.Batch) -> Tensor:
        passes.append(len(batch.noisy))
        return real(self, denoiser, given, batch)

    monkeypatch.setattr(objective.Objective, "wanted", wanted)
    settings = {**quick, "gradient_accumulation_steps": 3, "max_train_steps": 2}
    runs = []
    for most, expected in ((6, [12, 12]), (4, [8, 4, 8, 4]), (1, [4] * 6)):
        passes.clear()
        runs.append(trained(erase(settings, sample_batch_size=most)))
        assert passes == expected
    for other in runs[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, runs[0][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("what", [{"objective": "noise"}, {"negative_guidance": 1.0}, {}], ids=str)
def test_joined_batches_part_again(pipeline: StableDiffusionPipeline, what: dict[str, Any], weight: float) -> None:
    config = fdu.EraseConfig(
        num_latents=8, num_inference_steps=1, train_batch_size=2, preservation_weight=weight, **what
    )
    denoiser = denoiser_of(pipeline)
    prepared = prepare(denoiser, config, digits.concepts("three", "eight"))
    goal = objective.Objective(denoiser, config)
    generator, sampler = torch.Generator().manual_seed(0), TimestepSampler("uniform", len(denoiser.signal))
    batches = [examples.draw_batch(denoiser, prepared, config, sampler, generator) for _ in range(3)]
    joined = examples.Batch.joined(batches)
    together = joined.parted(goal.wanted(denoiser, prepared, joined), 3)
    for batch, wanted in zip(batches, together, strict=True):
        torch.testing.assert_close(wanted, goal.wanted(denoiser, prepared, batch), rtol=1e-4, atol=1e-5)


def test_a_validation_that_fails_costs_the_pictures_only(
    quick: dict[str, Any], plain: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "validation").touch()
    result = erase(quick, validation_prompts=("three",), validation_steps=2, tracking_dir=str(tmp_path))
    assert same(trained(result), plain)
    assert caplog.text.count("validation after step") == 2


@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_every_family_draws_its_validation_prompts(name: str) -> None:
    config = fdu.EraseConfig(validation_prompts=("three", "eight"), num_inference_steps=2)
    denoiser = families.denoiser(name)
    images = tracking.draw_validation(denoiser, config)
    assert images.shape == (2, 3, families.resolution(name), families.resolution(name))
    guided = tracking.draw_validation(denoiser, dataclasses.replace(config, sampling_guidance=9.0))
    assert torch.equal(guided, images) != (denoiser.guided_by_empty or denoiser.reads_guidance)


def test_an_erasure_of_images_that_are_not_square(quick: dict[str, Any]) -> None:
    settings = {**quick, "height": 16, "width": 32, "noisy_latents": "trajectory"}
    result = fdu.erase(families.build("sd"), "three", "eight", mask=torch.ones(16, 32), **settings)
    assert result.denoiser.latent_shape == (4, 8, 16)
    config = result.record()["config"]
    assert (config["resolution"], config["height"], config["width"]) == (None, 16, 32)
    images = tracking.draw_validation(result.denoiser, fdu.EraseConfig(validation_prompts=("three",)))
    assert images.shape == (1, 3, 16, 32)
    with pytest.raises(ValueError, match="width must be a positive multiple of 8"):
        fdu.erase(families.build("sd"), "three", "eight", height=16, width=12)


def test_what_a_tracker_hears_names_no_place(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: heard.append(config))
    settings = {**quick, "max_train_steps": 0, "report_to": "tensorboard", "training_cache": str(tmp_path)}
    erase(settings, checkpoint_dir=str(tmp_path / "kept"))
    assert heard[0]["learning_rate"] == 4e-3 and str(tmp_path) not in str(heard)


def test_the_users_own_forward_stays(quick: dict[str, Any]) -> None:
    pipeline = digits.load_pipeline()
    real = pipeline.unet.forward

    def forward(*given: Any, **named: Any) -> Any:
        return real(*given, **named)

    pipeline.unet.forward = forward
    fdu.erase(pipeline, *digits.concepts("three", "eight"), **{**quick, "max_train_steps": 1})
    assert vars(pipeline.unet)["forward"] is forward


def test_what_the_launcher_says_must_fit(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any], plain: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert same(trained(erase(quick)), plain)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="accelerate launch.*mixed_precision 'bf16'.*'no'"):
        fdu.erase(pipeline, "three", "eight", **quick)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed.*not supported"):
        fdu.erase(pipeline, "three", "eight", **quick)
