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
from fdu.cli import main
from fdu.concepts import Pair, concept_pairs, weighted
from fdu.config import EraseConfig
from fdu.evaluation.robustness.relearning import RelearningConfig
from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of
from fdu.storage.merging import merge
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.digits.vocabulary import DIGITS
from fdu.training import closed_form
from fdu.training.closed_form import alignment

pytestmark = pytest.mark.quick(
    name=["sd", "sdxl", "sana"], method=["lora", "cross_attention"], save_as=["lora", "delta"]
)

CONFIG = EraseConfig(train_method="closed_form", preservation_prompts=("a one", "a seven in red ink"))
NO_STEPS: dict[str, Any] = {"max_train_steps": 0, "num_latents": 2, "num_inference_steps": 1}
EXACT = EraseConfig(train_method="closed_form", rank_tolerance=0, preservation_weight=0.01)
PAIRS = concept_pairs("three", "an eight")


def least_squares(denoiser: Denoiser, name: str, config: EraseConfig) -> Tensor:
    """M, [d, d], from the inputs themselves, one row of a linear system each."""
    kept = ["", *config.preservation_prompts]
    rows, wanted = [], []
    for weight, before, after in closed_form._aligned(denoiser, PAIRS):
        rows.append(before[name] * weight**0.5)
        wanted.append((after[name] - before[name]) * weight**0.5)
    conditioning = denoiser.encode(kept)
    for row in range(len(kept)):
        inputs = denoiser.read_by_inputs(name, conditioning.tensors[name][row]).detach().double()
        if "mask" in conditioning.tensors:
            inputs = inputs[conditioning.tensors["mask"][row].bool()]
        rows.append(inputs.reshape(-1, inputs.shape[-1]) * (config.preservation_weight / len(kept)) ** 0.5)
        wanted.append(torch.zeros_like(rows[-1]))
    size = rows[0].shape[1]
    squares = sum(float(one.square().sum()) for one in rows)
    rows.append(torch.eye(size, dtype=torch.float64) * (config.ridge * squares / size) ** 0.5)
    wanted.append(torch.zeros(size, size, dtype=torch.float64))
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T


@pytest.fixture
def denoiser(name: str) -> Denoiser:
    return families.denoiser(name)


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


@pytest.mark.parametrize("name", ["pixart", "sana", "cogview4", "lumina2", "qwenimage", "zimage"])
def test_tokens_are_those_that_the_mask_shows(denoiser: Denoiser) -> None:
    prompts = ["three", "A photo of the digit EIGHT", "a seven", ""]
    (tokens,) = denoiser.tokens(prompts)
    assert [len(one) for one in tokens] == denoiser.encode(prompts).tensors["mask"].sum(1).tolist()


@pytest.mark.parametrize("name", ["sd", "sdxl", "sana", "cogview4", "lumina2", "qwenimage", "zimage"])
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
            assert edit.figures().error <= tolerance < edit.figures(edit.rank - 1).error
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
        ([1, 5, 6], [1], [0, 0, 0, 1, 2, 3]),  # without an end token, the last one there is
        ([5, 6], [], [0, 0, 0, 1, 2, 3]),
        ([], [5, 6], [2, 3, 4, 5, 5, 5]),
        ([1, 5, 5, 2], [1, 5, 2], [0, 1, 2, 2, 3, 4]),
    ],
)
def test_tokens_correspond(one: list[int], other: list[int], places: list[int]) -> None:
    assert alignment([(one, other)], [6]) == places


def test_tokens_of_several_tokenizers_follow_one_another() -> None:
    one = ([1, 5, 2], [1, 6, 7, 2])
    assert alignment([one, one], [5, 6]) == [0, 2, 3, 4, 4, 5, 7, 8, 9, 10, 10]


def test_a_prompt_longer_than_the_encoder_reads_is_cut() -> None:
    assert alignment([([1, 5, 5, 5, 5, 2], [1, 6, 2])], [4]) == [0, 1, 1, 1]


@torch.no_grad()
def prediction(denoiser: Denoiser, prompt: str = "a three") -> Tensor:
    noisy = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    return denoiser.predict(noisy, torch.tensor([len(denoiser.signal) // 2]), denoiser.encode([prompt]))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "sana"])
@pytest.mark.parametrize("method", ["lora", "dora", "text", "cross_attention", "attention", "full"])
def test_training_begins_at_the_edit(denoiser: Denoiser, name: str, method: str) -> None:
    before = prediction(denoiser)
    small = {"resolution": families.resolution(name)}
    pipeline, settings = denoiser.pipeline, CONFIG.as_dict() | {"rank_tolerance": 1e-6, **small}
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
    found = prediction(families.denoiser(name, loaded))
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
    for setting in ({"rank": 4}, {"adapter_layers": "attention"}, {"max_train_steps": 3}, {"report_to": "wandb"}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} has no effect with train_method 'closed_form'"):
            EraseConfig(train_method="closed_form", **setting)
    with pytest.raises(ValueError, match="ridge has no effect with train_method 'lora'; leave it out"):
        EraseConfig(ridge=0.1)
    with pytest.raises(ValueError, match="read target and anchor as the same"):
        fdu.erase(pipeline, ["three"], ["THREE"], config=CONFIG)
    with pytest.raises(ValueError, match="ridge must be a finite number > 0"):
        EraseConfig(train_method="closed_form", ridge=0)
    with pytest.raises(ValueError, match="train_method must be one of"):
        RelearningConfig(train_method="closed_form")


@torch.no_grad()
def test_a_layer_that_writes_nothing_is_left_as_it_is() -> None:
    pipeline = families.build("sd")
    for name, layer in parts.layers(pipeline.unet).items():
        if name.endswith("attn2.to_v"):
            layer.weight.zero_()
    result = fdu.erase(pipeline, *PAIRS[0], config=CONFIG)
    assert all(parameter.isfinite().all() for parameter in result.trainable.named_parameters().values())


def test_an_edit_repeats_bit_for_bit_and_leaves_the_random_state() -> None:
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        result = fdu.erase(families.build("sdxl"), *PAIRS[0], config=CONFIG)
        assert torch.equal(torch.get_rng_state(), before)
        found.append({name: one.clone() for name, one in result.trainable.named_parameters().items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_each_input_has_the_rank_of_its_own_edit() -> None:
    result = fdu.erase(families.build("sdxl"), *PAIRS[0], config=CONFIG)
    ranks = {figures.input: figures.rank for figures in result.edits}
    assert ranks["pooled"] < ranks["embeddings"]
    for name, parameter in result.trainable.named_parameters().items():
        if name.endswith("lora_A.weight"):
            assert len(parameter) == ranks["pooled" if "add_embedding" in name else "embeddings"]


def test_what_is_told_of_an_edit_is_what_is_in_place() -> None:
    settings = EraseConfig(init="closed_form", rank=2, **NO_STEPS)
    (figures,) = fdu.erase(families.build("sd"), *PAIRS[0], config=settings).edits
    (edit,) = closed_form.closed_form(denoiser_of(families.build("sd")), PAIRS, settings)
    assert figures == edit.figures(2) and figures.rank == 2 and figures.error > settings.rank_tolerance


def test_an_edit_that_fails_leaves_the_pipeline_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = families.build("sd")
    names = set(dict(pipeline.unet.named_modules()))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for method in ("lora", "cross_attention"):
        monkeypatch.setattr("fdu.training.methods.adapter.Adapter._begin_layer", fail)
        monkeypatch.setattr("fdu.training.methods.full_weights.parts.layers", fail)
        with pytest.raises(KeyboardInterrupt):
            fdu.erase(pipeline, *PAIRS[0], config=EraseConfig(train_method=method, init="closed_form", **NO_STEPS))
        monkeypatch.undo()
        assert set(dict(pipeline.unet.named_modules())) == names
        assert all(parameter.requires_grad for parameter in pipeline.unet.parameters())


def test_sd3_without_t5_exchanges_its_clip_embeddings() -> None:
    pipeline = families.build("sd3")
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    denoiser = denoiser_of(pipeline, families.resolution("sd3"))
    length = pipeline.tokenizer_max_length
    conditioning = denoiser.encode(["a seven", "a photo of the digit three"])
    assert conditioning.tensors["embeddings"].shape[1] > length
    pairs = concept_pairs(["a seven"], ["a photo of the digit three"])
    ((_, before, after),) = closed_form._aligned(denoiser, pairs)
    given = conditioning.tensors["embeddings"].double()
    assert torch.equal(after["embeddings"][length:], given[1, length:])
    assert torch.equal(before["embeddings"], given[0])
    assert all(one.any() for one in after["embeddings"][:length])


@pytest.mark.parametrize(("target", "anchor"), [("a three", ""), ("a seven, drawn by three", "a seven")])
@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_no_token_corresponds_to_a_hidden_one(denoiser: Denoiser, target: str, anchor: str) -> None:
    ((_, _, after),) = closed_form._aligned(denoiser, concept_pairs([target], [anchor]))
    conditioning = denoiser.encode([anchor])
    shown = conditioning.tensors["embeddings"][0][conditioning.tensors["mask"][0].bool()].double()
    if len(shown):
        assert all((shown == one).all(1).any() for one in after["embeddings"])


def test_sigma_is_that_of_the_original_model() -> None:
    settings: dict[str, Any] = {"max_train_steps": 1, "num_latents": 8, "num_inference_steps": 4, "rank": 64}
    three, eight = digits.concepts("three", "eight")
    plain = fdu.erase(digits.load_pipeline(), three, eight, config=EraseConfig(**settings))
    begun = fdu.erase(digits.load_pipeline(), three, eight, config=EraseConfig(init="closed_form", **settings))
    assert begun.history["distance"][0] < 0.5 * plain.history["distance"][0]
    assert begun.sigma is not None and plain.sigma is not None and 0.5 < begun.sigma / plain.sigma < 2


def test_pages_and_card_tell_of_an_edit(tmp_path: Path) -> None:
    pipeline = digits.load_pipeline()
    result = fdu.erase(pipeline, *digits.concepts("three", "eight"), train_method="closed_form")
    probes = digits.probes("three")[:3]
    draws = fdu.draw(pipeline, probes, 2, num_inference_steps=1)
    evaluation = fdu.evaluate(draws, draws, probes)
    page = result.report(tmp_path / "page.html", evaluation, probes, draws, draws).read_text(encoding="utf-8")
    assert "closed form of the embeddings" in page and "<dt>init</dt>" in page
    result.save(tmp_path / "out", evaluation=evaluation, probes=probes)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "in closed form" in card and "Method: closed form, without training." in card and "Divergence:" not in card


def test_the_command_line_edits_in_half_precision_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "erased")
    words = ["erase", "digits", "--target", "three", "--anchor", "eight", "--train_method", "closed_form", "--out", out]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "layers read the embeddings of the text; edited at rank" in shown and "Nothing was trained" not in shown
    assert main([*words, "--overwrite", "--weights", "2", "1"]) == 2
    assert "weights must be one per target" in capsys.readouterr().err
    several = [*words[:6], "--target", "four", "--anchor", "nine", *words[6:], "--overwrite", "--weights", "2", "1"]
    assert main(several) == 0 and json.loads((tmp_path / "erased" / "fdu.json").read_text())["weights"] == [2.0, 1.0]
    assert main(["compare", *words[1:8], "--out", str(tmp_path / "compared")]) == 2
    assert "closed_form" in capsys.readouterr().err


def test_many_concepts_are_read_in_fewer_phrasings(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [fdu.Concept(f"thing {number}") for number in range(100)]
    own = [fdu.Concept(f"other {number}") for number in range(100)]
    denoiser, plain, kept = denoiser_of(families.build("sd")), EraseConfig(), EraseConfig(preservation_prompts=("a",))
    few = list(concept_pairs(targets[:18], own[:18]))
    assert closed_form._thinned(few, plain) == few
    counts = {}
    for name, pairs, config in (
        ("shared", concept_pairs(targets, "nine"), plain),
        ("own", concept_pairs(targets, own), plain),
        ("own, kept", concept_pairs(targets[:50], own[:50]), kept),
    ):
        thinned = closed_form._thinned(pairs, config)
        counts[name] = {len(prompts.prompts) for pair in thinned for prompts in pair}
        for pair, thin in zip(pairs, thinned, strict=True):
            assert {*zip(*(one.prompts for one in thin), strict=True)} <= {
                *zip(*(one.prompts for one in pair), strict=True)
            }
    assert counts == {"shared": {2}, "own": {1}, "own, kept": {5}}
    read: list[str] = []
    plainly = denoiser.encode_batch

    def encode_batch(prompts: list[str]) -> Any:
        read.extend(prompts)
        return plainly(prompts)

    monkeypatch.setitem(vars(denoiser), "encode_batch", encode_batch)
    closed_form.closed_form(denoiser, concept_pairs(targets, own), plain)
    assert len(read) == 301  # targets, anchors, and these again with the empty prompt, to be preserved


def test_a_weight_says_how_much_a_concept_counts_beside_the_others() -> None:
    denoiser = denoiser_of(families.build("sd"))
    pairs = concept_pairs([fdu.Concept("three"), fdu.Concept("seven")], "nine")

    def edit(*weights: float) -> closed_form.Edit:
        return closed_form.closed_form(denoiser, weighted(pairs, weights), EXACT)[0]

    def left(found: closed_form.Edit, pair: Pair) -> float:
        """How far the edited keys of a prompt are from its anchor's."""
        layer, up = next(iter(found.ups.items()))
        weight = parts.layers(denoiser.module)[layer].weight.double()
        ((_, before, after),) = closed_form._aligned(denoiser, concept_pairs(pair[0].prompts[:1], pair[1].prompts[:1]))
        one, other = before["embeddings"], after["embeddings"]
        return float((one @ (weight + up @ found.down).T - other @ weight.T).norm())

    first, second = edit(99, 1), edit(1, 99)
    assert left(first, pairs[0]) < 0.8 * left(second, pairs[0]) and left(second, pairs[1]) < 0.8 * left(first, pairs[1])
    plain, twice = edit(), edit(2, 2)
    layer = next(iter(plain.ups))
    torch.testing.assert_close(twice.ups[layer] @ twice.down, plain.ups[layer] @ plain.down)


def test_a_thousand_concepts_are_erased_at_once() -> None:
    pipeline = families.build("sd")
    denoiser = denoiser_of(pipeline)
    targets = [fdu.Concept(f"thing {number}") for number in range(1000)]
    result = fdu.erase(pipeline, targets, "nine", train_method="closed_form", preservation_weight=0.1)
    with result.original():
        nine, before = prediction(denoiser, "nine"), [prediction(denoiser, one.name) for one in targets[::199]]
    pairs = zip(targets[::199], before, strict=True)
    left = [float((prediction(denoiser, one.name) - nine).norm() / (plain - nine).norm()) for one, plain in pairs]
    assert sum(left) / len(left) < 0.6
