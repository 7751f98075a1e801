"""The closed form: the exact minimiser, tokens that correspond, and what is saved of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import fdu
from fdu.concepts import concept_pairs
from fdu.config import EraseConfig
from fdu.evaluation.robustness.relearning import RelearningConfig
from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of
from fdu.storage.merging import merge
from fdu.subjects.digits.vocabulary import DIGITS
from fdu.training import closed_form
from fdu.training.closed_form import alignment

CONFIG = EraseConfig(train_method="closed_form", preservation_prompts=("a one", "a seven in red ink"))
NO_STEPS: dict[str, Any] = {"max_train_steps": 0, "num_latents": 2, "num_inference_steps": 1}
PAIRS = concept_pairs("three", "an eight")


def least_squares(denoiser: Denoiser, name: str, config: EraseConfig) -> Tensor:
    """M, [d, d], from the inputs themselves, one row of a linear system each."""
    ((_, anchor),) = PAIRS
    kept = list(dict.fromkeys(["", *config.preservation_prompts, *anchor.prompts]))
    rows, wanted = [], []
    for weight, before, after in closed_form._aligned(denoiser, PAIRS):
        rows.append(before[name] * weight**0.5)
        wanted.append((after[name] - before[name]) * weight**0.5)
    conditioning = denoiser.encode(kept)
    for row in range(len(kept)):
        inputs = conditioning.tensors[name][row].double()
        if "mask" in conditioning.tensors:
            inputs = inputs[conditioning.tensors["mask"][row].bool()]
        rows.append(inputs.reshape(-1, inputs.shape[-1]) * (config.preservation_weight / len(kept)) ** 0.5)
        wanted.append(torch.zeros_like(rows[-1]))
    size = rows[0].shape[1]
    rows.append(torch.eye(size, dtype=torch.float64) * config.ridge**0.5)
    wanted.append(torch.zeros(size, size, dtype=torch.float64))
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T


@pytest.fixture
def denoiser(name: str) -> Denoiser:
    return denoiser_of(families.build(name), families.resolution(name))


EVERY_FAMILY = pytest.mark.parametrize("name", families.FAMILY_NAMES)


@EVERY_FAMILY
def test_the_edit_is_the_least_squares_solution(denoiser: Denoiser) -> None:
    config = dataclasses.replace(CONFIG, rank_tolerance=0)
    edits = closed_form.closed_form(denoiser, PAIRS, config)
    assert len(edits) == len(denoiser.text_inputs)
    layers = parts.layers(denoiser.module)
    for name, edit in zip(denoiser.text_inputs, edits, strict=True):
        change = least_squares(denoiser, name, config)
        for layer, up in edit.ups.items():
            weight = layers[layer].weight.double()[:, : len(change)]
            assert torch.allclose(up @ edit.down, weight @ change, atol=1e-7)


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_tokens_are_those_that_the_mask_shows(denoiser: Denoiser) -> None:
    prompts = ["three", "A photo of the digit EIGHT", "a seven", ""]
    (tokens,) = denoiser.tokens(prompts)
    assert [len(one) for one in tokens] == denoiser.encode(prompts).tensors["mask"].sum(1).tolist()


@pytest.mark.parametrize("name", ["sd", "sdxl", "sana"])
def test_a_token_stands_where_its_embedding_does(denoiser: Denoiser) -> None:
    """These encoders read from left to right, so embeddings differ from the first token that does."""
    prompts = ["a picture of three", "a picture of eight"]
    (one, other), *_ = denoiser.tokens(prompts)
    first = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    embeddings = denoiser.encode(prompts).tensors["embeddings"]
    apart = (embeddings[0] - embeddings[1]).norm(dim=1) > 1e-6
    assert int(apart.nonzero()[0]) == first > 0


@EVERY_FAMILY
def test_the_rank_is_the_smallest_within_the_tolerance(denoiser: Denoiser) -> None:
    whole = closed_form.closed_form(denoiser, PAIRS, dataclasses.replace(CONFIG, rank_tolerance=0))
    for tolerance in (0.3, 0.01):
        cut = closed_form.closed_form(denoiser, PAIRS, dataclasses.replace(CONFIG, rank_tolerance=tolerance))
        for edit, exact in zip(cut, whole, strict=True):
            assert edit.error(edit.rank) <= tolerance < edit.error(edit.rank - 1)
            for layer, up in edit.ups.items():
                assert torch.allclose(up, exact.ups[layer][:, : edit.rank])


@EVERY_FAMILY
def test_every_text_input_of_the_denoiser_is_edited(denoiser: Denoiser) -> None:
    """Where all inputs of two prompts are exchanged, the outputs are, so no way into the denoiser is left out."""
    noisy = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def output(prompt: str) -> Tensor:
        return denoiser.predict(noisy, torch.tensor([len(denoiser.signal) // 2]), denoiser.encode([prompt]))

    lengths = [len(tokens) for tokens in denoiser.tokens(DIGITS)[-1]]
    one, other = next(pair for pair in itertools.combinations(range(10), 2) if len({lengths[i] for i in pair}) == 1)
    target, anchor = output(DIGITS[one]), output(DIGITS[other])
    config = EraseConfig(train_method="closed_form", preservation_weight=1e-9, ridge=1e-9)
    result = fdu.erase(denoiser.pipeline, [DIGITS[one]], [DIGITS[other]], config=config)
    assert (output(DIGITS[one]) - anchor).norm() < 0.05 * (target - anchor).norm()
    with result.original():
        assert torch.equal(output(DIGITS[one]), target)
    result.trainable.remove()
    assert torch.equal(output(DIGITS[one]), target)


@pytest.mark.parametrize(
    ("one", "other", "places"),
    [
        ([1, 5, 2], [1, 6, 2], [0, 1, 2, 3, 4, 5]),
        ([1, 5, 2], [1, 6, 7, 2], [0, 2, 3, 4, 5, 5]),  # the last token of the name to the last one
        ([1, 5, 6, 7, 2], [1, 8, 9, 2], [0, 1, 2, 2, 3, 4]),
        ([1, 5, 6, 7, 2], [1, 8, 2], [0, 1, 1, 1, 2, 3]),
        ([1, 3, 5, 2], [1, 3, 2], [0, 1, 2, 2, 3, 4]),  # the other lacks the name: its next token
        ([1, 2], [1, 5, 2], [0, 2, 3, 4, 5, 5]),
        ([1, 5, 5, 2], [1, 5, 2], [0, 1, 2, 2, 3, 4]),
    ],
)
def test_tokens_correspond(one: list[int], other: list[int], places: list[int]) -> None:
    assert alignment([(one, other)], [6]) == places


def test_tokens_of_several_tokenizers_follow_one_another() -> None:
    one = ([1, 5, 2], [1, 6, 7, 2])
    assert alignment([one, one], [5, 6]) == [0, 2, 3, 4, 4, 5, 7, 8, 9, 10, 10]


def test_a_prompt_longer_than_the_encoder_reads_is_cut() -> None:
    assert alignment([([1, 5, 5, 5, 5, 2], [1, 6, 2])], [4]) == [0, 1, 2, 2]


@torch.no_grad()
def prediction(denoiser: Denoiser, prompt: str = "a three") -> Tensor:
    noisy = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    return denoiser.predict(noisy, torch.tensor([len(denoiser.signal) // 2]), denoiser.encode([prompt]))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "sana"])
@pytest.mark.parametrize("method", ["lora", "dora", "cross_attention", "attention", "full"])
def test_training_begins_at_the_edit(denoiser: Denoiser, method: str) -> None:
    before = prediction(denoiser)
    pipeline, settings = denoiser.pipeline, CONFIG.as_dict() | {"rank_tolerance": 1e-6}
    edited = fdu.erase(pipeline, *PAIRS[0], config=EraseConfig.from_settings(settings))
    wanted, rank = prediction(denoiser), max(edit.rank for edit in edited.edits)
    edited.trainable.remove()
    begun = settings | {"train_method": method, "init": "closed_form", "rank": rank} | NO_STEPS
    result = fdu.erase(pipeline, *PAIRS[0], config=EraseConfig.from_settings(begun))
    assert (prediction(denoiser) - wanted).norm() < 1e-3 * (wanted - before).norm()
    with result.original():
        assert torch.equal(prediction(denoiser), before)


@pytest.mark.parametrize("name", ["sd"])
def test_a_smaller_rank_begins_at_the_first_ranks_of_the_edit(denoiser: Denoiser) -> None:
    before = prediction(denoiser)
    (edit,) = closed_form.closed_form(denoiser, PAIRS, CONFIG)
    moved = []
    for rank in (1, 2, 4, edit.rank):
        config = EraseConfig(init="closed_form", rank=rank, **NO_STEPS)
        result = fdu.erase(denoiser.pipeline, *PAIRS[0], config=config)
        moved.append(prediction(denoiser) - before)
        result.trainable.remove()
    errors = [float((one - moved[-1]).norm() / moved[-1].norm()) for one in moved[:-1]]
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < 1


@pytest.mark.parametrize("name", ["sd"])
def test_training_goes_on_from_the_edit(denoiser: Denoiser) -> None:
    settings = NO_STEPS | {"max_train_steps": 2, "train_batch_size": 2}
    config = EraseConfig(init="closed_form", rank=4, **settings)
    result = fdu.erase(denoiser.pipeline, *PAIRS[0], config=config)
    assert len(result.history["loss"]) == 2
    start = dataclasses.replace(config, max_train_steps=0)
    fresh = denoiser_of(families.build("sd"))
    fdu.erase(fresh.pipeline, *PAIRS[0], config=start)
    assert not torch.equal(prediction(denoiser), prediction(fresh))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "sana"])
@pytest.mark.parametrize("save_as", ["lora", "kohya", "delta", "pipeline"])
def test_every_format_holds_the_edit(denoiser: Denoiser, name: str, save_as: str, tmp_path: Path) -> None:
    if (save_as in ("lora", "kohya") and name == "pixart") or (save_as, name) == ("kohya", "sana"):
        pytest.skip("the family does not have this format")
    before = prediction(denoiser)
    result = fdu.erase(denoiser.pipeline, *PAIRS[0], config=CONFIG)
    after = prediction(denoiser)
    result.save(tmp_path / "out", save_as=save_as)
    if save_as == "pipeline":
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    else:
        loaded = families.build(name)
        fdu.load_weights(loaded, tmp_path / "out")
    found = prediction(denoiser_of(loaded, families.resolution(name)))
    assert (found - after).norm() < 1e-3 * (after - before).norm()
    record = json.loads((tmp_path / "out" / "fdu.json").read_text())
    assert record["sigma"] is None and record["history"] == {}
    assert [one["error"] <= CONFIG.rank_tolerance for one in record["edits"]] == [True] * len(denoiser.text_inputs)


@pytest.mark.parametrize("name", ["sd"])
def test_a_second_edit_counts_the_first_as_part_of_the_model(denoiser: Denoiser) -> None:
    """Two edits one after the other are those of the model with the first one merged."""
    pairs = concept_pairs("seven", "a nine")
    fdu.erase(denoiser.pipeline, *PAIRS[0], config=CONFIG)
    fdu.erase(denoiser.pipeline, *pairs[0], config=CONFIG)
    other = denoiser_of(families.build("sd"))
    fdu.erase(other.pipeline, *PAIRS[0], config=CONFIG)
    merge(other.pipeline)
    fdu.erase(other.pipeline, *pairs[0], config=CONFIG)
    plain = prediction(denoiser_of(families.build("sd")), "a seven")
    found, wanted = prediction(denoiser, "a seven"), prediction(other, "a seven")
    assert (found - wanted).norm() < 1e-3 * (wanted - plain).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines_are_edited_as_they_are(dtype: torch.dtype) -> None:
    pipeline = families.build("sd").to(dtype)
    result = fdu.erase(pipeline, *PAIRS[0], config=CONFIG)
    assert all(parameter.dtype == dtype for parameter in result.trainable.named_parameters().values())


def test_settings_that_make_no_sense_are_refused(pipeline: DiffusionPipeline) -> None:
    for method in ("text_encoder", "token", "closed_form"):
        with pytest.raises(ValueError, match="init 'closed_form' needs a train_method .* leave init out"):
            EraseConfig(train_method=method, init="closed_form")
    with pytest.raises(ValueError, match="mask has no effect with train_method 'closed_form'; leave it out"):
        fdu.erase(pipeline, "three", "eight", mask=torch.ones(8, 8), config=CONFIG)
    with pytest.raises(ValueError, match="ridge must be a finite number > 0"):
        EraseConfig(ridge=0)
    with pytest.raises(ValueError, match="train_method must be one of"):
        RelearningConfig(train_method="closed_form")
