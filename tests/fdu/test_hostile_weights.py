"""Malformed weights: refused in words and soon, with nothing changed."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline
from families import ALPHA, CONTEXT, RANK, add_adapter, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdu.models import parts
from fdu.storage import delta
from fdu.storage.formats import write
from fdu.storage.readers import load_weights

FIRST = "unet.conv_in.weight"
"""A weight before those that the malformed files name."""
EMBEDDING = "text_encoder.embeddings.token_embedding.weight"
KEY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
SOON = 20.0
"""Seconds: what does not end takes years."""


@pytest.fixture
def sd() -> DiffusionPipeline:
    return families.build("sd")


@pytest.fixture(scope="module")
def good_lora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The tensors of a LoRA by the format."""
    pipeline = families.build("sd")
    layers = {"unet": add_adapter(pipeline, "unet", CONTEXT["sd"], dora=True)}
    folder = tmp_path_factory.mktemp("good")
    return {form: load_file(write(folder, form, pipeline, layers, lora_alpha=ALPHA)) for form in ("lora", "kohya")}  # type: ignore[arg-type]


def assert_refused(pipeline: DiffusionPipeline, file: Path, match: str, **settings: Any) -> None:
    """The file is refused in words and soon, and the pipeline is as before."""
    before = {name: weight.detach().clone() for name, weight in parts.weights(pipeline).items()}
    began = time.monotonic()
    with pytest.raises(ValueError, match=match) as caught:
        load_weights(pipeline, file, **settings)
    assert time.monotonic() - began < SOON
    assert repr(str(file)) in str(caught.value), "the message names the file"
    assert all(torch.equal(weight, before[name]) for name, weight in parts.weights(pipeline).items())
    assert not any(parts.adapted(model) for model in parts.models(pipeline).values())


def expanded(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:1].clone().expand(tensor.numel()).view(tensor.shape)


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


# Pickles


def test_nested_dicts_that_are_shared_deep_or_circular(sd: DiffusionPipeline, tmp_path: Path) -> None:
    shared: Any = {"weight": torch.zeros(1)}
    for _ in range(45):
        shared = {"a": shared, "b": shared}
    wide: Any = {"weight": torch.zeros(1)}
    for _ in range(6):
        wide = dict.fromkeys(map(str, range(20)), wide)
    circular: dict[str, Any] = {"weight": torch.zeros(1)}
    circular["again"] = circular
    for content, match in (
        (shared, "nest deeper than"),
        (circular, "nest deeper than"),
        (wide, "more than .* entries"),
    ):
        torch.save(content, tmp_path / "delta.bin")
        assert_refused(sd, tmp_path / "delta.bin", match)


def test_dicts_deeper_than_python_writes_any(sd: DiffusionPipeline, tmp_path: Path) -> None:
    plain, depth = io.BytesIO(), 100_000
    torch.save({}, plain)
    nested = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"}" + b"s" * depth + b"."
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "delta.bin", "w") as deep:
        for name in source.namelist():
            deep.writestr(name, nested if name.endswith("data.pkl") else source.read(name))
    assert_refused(sd, tmp_path / "delta.bin", "nest deeper than")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({(1, 2): torch.zeros(1)}, "key of type tuple"),
        ({"unet": {10**30: torch.zeros(1)}}, "key of type int"),
        ({"\x1b[2J": torch.zeros(1)}, r"name '\\x1b\[2J'"),
        ({"a" * 5000: torch.zeros(1)}, "name 'aaa.*longer"),
        ({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, "'a.b' twice"),
    ],
    ids=["tuple", "number", "escape", "long", "twice"],
)
def test_names_that_are_none(names: Any, match: str, sd: DiffusionPipeline, tmp_path: Path) -> None:
    torch.save(names, tmp_path / "delta.bin")
    assert_refused(sd, tmp_path / "delta.bin", match)


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (lambda weight: weight.to_sparse(), "sparse"),
        (lambda weight: weight.to("meta"), "without content"),
        (quantized, "quantized"),
        (lambda weight: weight.to(torch.int32), "int32"),
        (lambda weight: weight.to(torch.complex64), "complex64"),
        (expanded, "more elements than it stores"),
        (lambda weight: weight.index_fill(1, torch.tensor([2]), torch.nan), "not finite"),
        (lambda weight: weight.index_fill(1, torch.tensor([2]), torch.inf), "not finite"),
        (lambda weight: weight.double() * 1e300, "float64.*float32"),
        (lambda weight: weight.flatten()[0], r"shape \(\)|\(\) \("),
    ],
    ids=["sparse", "meta", "quantized", "integer", "complex", "expanded", "nan", "inf", "overflow", "0-dim"],
)
def test_a_second_weight_that_is_none_leaves_the_first_alone(
    second: Callable[[Tensor], Tensor], match: str, sd: DiffusionPipeline, tmp_path: Path
) -> None:
    own = tensors_of(sd.unet)
    name = KEY.removeprefix("unet.")
    weights = {"conv_in.weight": own["conv_in.weight"] + 1, name: second(own[name] + 1)}
    torch.save({"unet": weights}, tmp_path / "delta.bin")
    assert_refused(sd, tmp_path / "delta.bin", f"to_k.weight.*({match})|({match}).*to_k.weight")


def test_one_storage_in_many_tensors_counts_for_each(
    sd: DiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdu.storage.readers.SPARE_BYTES", 1 << 10)
    whole = torch.zeros(10_000)
    torch.save({"unet": {f"a.{index}": whole[index:] for index in range(200)}}, tmp_path / "delta.bin")
    assert_refused(sd, tmp_path / "delta.bin", "takes .* in memory")


def test_a_file_that_unpacks_to_more_than_it_holds(sd: DiffusionPipeline, tmp_path: Path) -> None:
    plain = io.BytesIO()
    torch.save({FIRST: torch.zeros(1 << 22)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert_refused(sd, tmp_path / "bomb.pt", "compressed")


# Deltas


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        (torch.tensor([1.0, 2.0]), "float32"),
        (torch.tensor([1, 2], dtype=torch.int8), "int8"),
        (torch.tensor([True, False]), "bool"),
        (torch.tensor([[1, 2]]), r"\(1, 2\)"),
        (torch.tensor(1), r"\(\)"),
        (torch.tensor([1, 1]), "more than once"),
        (torch.tensor([1, -2]), "beyond"),
        (torch.tensor([1, 1 << 40]), "beyond"),
        (torch.tensor([1, 2, 3]), "has shape"),
        (None, "lacks"),
    ],
    ids=["float", "int8", "bool", "2-d", "0-d", "repeated", "negative", "large", "long", "none"],
)
def test_indices_that_are_none_leave_the_first_weight_alone(
    indices: Tensor | None, match: str, sd: DiffusionPipeline, tmp_path: Path
) -> None:
    own = parts.weights(sd)
    tensors = {FIRST: own[FIRST].detach() + 1, EMBEDDING + delta.ROWS: own[EMBEDDING].detach()[[1, 2]].clone()}
    if indices is not None:
        tensors[EMBEDDING + delta.INDICES] = indices
    save_file(tensors, tmp_path / "delta.safetensors", {delta.FORMAT_KEY: delta.FORMAT})
    assert_refused(sd, tmp_path / "delta.safetensors", f"token_embedding.*{match}", check_base=False)


def test_indices_without_rows(sd: DiffusionPipeline, tmp_path: Path) -> None:
    tensors = {FIRST: parts.weights(sd)[FIRST].detach() + 1, EMBEDDING + delta.INDICES: torch.tensor([1])}
    save_file(tensors, tmp_path / "delta.safetensors", {delta.FORMAT_KEY: delta.FORMAT})
    assert_refused(sd, tmp_path / "delta.safetensors", "token_embedding.*indices without rows", check_base=False)


def test_rows_of_a_weight_that_has_none(sd: DiffusionPipeline, tmp_path: Path) -> None:
    pipeline = families.build("sd")
    pipeline.unet.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.0)))
    tensors = {"unet.scale" + delta.ROWS: torch.ones(1), "unet.scale" + delta.INDICES: torch.tensor([0])}
    save_file(tensors, tmp_path / "delta.safetensors", {delta.FORMAT_KEY: delta.FORMAT})
    assert_refused(pipeline, tmp_path / "delta.safetensors", "unet.scale.*has no rows", check_base=False)
    save_file({"unet.scale": torch.tensor(3.0)}, tmp_path / "delta.safetensors", {delta.FORMAT_KEY: delta.FORMAT})
    load_weights(pipeline, tmp_path, check_base=False)
    assert pipeline.unet.scale.item() == 3


def test_a_weight_under_two_names(sd: DiffusionPipeline, tmp_path: Path) -> None:
    weight = parts.weights(sd)[FIRST].detach()
    save_file({FIRST: weight + 1, "conv_in.weight": weight + 2}, tmp_path / "delta.safetensors")
    assert_refused(sd, tmp_path / "delta.safetensors", "conv_in.weight twice")


def test_weights_that_are_stored_in_integers_or_elsewhere(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    weight = parts.weights(pipeline)[FIRST].detach()
    save_file({FIRST: weight + 1}, tmp_path / "delta.safetensors")
    for data, match in ((weight.to("meta"), "not in memory"), (weight.to(torch.int8), "torch.int8.*quantization")):
        pipeline.unet.conv_in.weight = torch.nn.Parameter(data, requires_grad=False)
        with pytest.raises(ValueError, match=match):
            load_weights(pipeline, tmp_path)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_failure_while_the_second_weight_is_written_takes_the_first_back(
    strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = families.build("sd")
    # One weight under two names: to be taken back in reverse order.
    pipeline.unet.twin = torch.nn.Conv2d(1, 1, 1)
    pipeline.unet.twin.weight = pipeline.unet.conv_in.weight
    before = tensors_of(pipeline.unet)
    names = (FIRST, "unet.twin.weight", KEY)
    tensors = {name: parts.weights(pipeline)[name].detach() + 1 + index for index, name in enumerate(names)}
    save_file(tensors, tmp_path / "delta.safetensors")

    failures = iter([torch.OutOfMemoryError("out of memory")])

    def full(tensor: Tensor, index: Any, value: Any) -> None:
        if tensor.shape == tensors[KEY].shape and (failure := next(failures, None)):
            raise failure
        original(tensor, index, value)

    original = Tensor.__setitem__
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__setitem__", full)
        with pytest.raises(torch.OutOfMemoryError):
            load_weights(pipeline, tmp_path, strength=strength)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(pipeline.unet).items())
    load_weights(pipeline, tmp_path, strength=strength)
    assert not torch.equal(pipeline.unet.conv_in.weight, before["conv_in.weight"])


def test_a_strength_that_no_weight_can_hold(sd: DiffusionPipeline, tmp_path: Path) -> None:
    weight = parts.weights(sd)[FIRST].detach()
    save_file({FIRST: weight + 100}, tmp_path / "delta.safetensors")
    assert_refused(sd, tmp_path / "delta.safetensors", "conv_in.weight.*strength", strength=1e38)


def test_what_the_metadata_say_is_shown_without_control_characters(sd: DiffusionPipeline, tmp_path: Path) -> None:
    known = {delta.FORMAT_KEY: delta.FORMAT, delta.BASE_KEY: "\x1b[2J", delta.FINGERPRINT_KEY: "\x1b[2J"}
    save_file({FIRST: parts.weights(sd)[FIRST].detach() + 1}, tmp_path / "delta.safetensors", known)
    with pytest.raises(ValueError, match="check_base=False") as caught:
        load_weights(sd, tmp_path)
    assert "\x1b" not in str(caught.value)


# LoRA


@pytest.mark.parametrize("form", ["lora", "kohya"])
@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("down", lambda tensor: tensor[0, 0], "matrix"),
        ("down", lambda tensor: tensor[0], "matrix|does not fit"),
        ("down", lambda tensor: tensor[:0], "rank 0|does not fit"),
        ("down", lambda tensor: tensor.to(torch.int8), "int8"),
        ("down", lambda tensor: tensor.index_fill(0, torch.tensor([1]), torch.nan), "not finite"),
        ("down", expanded, "more elements than it stores"),
        ("down", lambda tensor: tensor.to_sparse(), "sparse"),
        ("down", lambda tensor: tensor.to("meta"), "without content"),
        ("up", lambda tensor: tensor[0, 0], "matrix"),
        ("up", lambda tensor: tensor[:, 0], "matrix|does not fit"),
        ("up", lambda tensor: tensor[..., None], "does not fit"),
        ("up", lambda tensor: tensor.bool(), "bool"),
        ("magnitude", lambda tensor: tensor.flatten()[0], "magnitude"),
        ("magnitude", lambda tensor: tensor.int(), "int32"),
        ("magnitude", lambda tensor: tensor * torch.inf, "not finite"),
        ("alpha", lambda _: torch.ones(2), "alpha.*one number"),
        ("alpha", lambda _: torch.ones(0), "alpha.*one number"),
        ("alpha", lambda _: torch.tensor(torch.nan), "not finite"),
        ("alpha", lambda _: torch.tensor(True), "alpha.*bool"),
        ("alpha", lambda _: torch.tensor(1j), "alpha.*complex64"),
        ("alpha", lambda _: torch.ones(1, device="meta"), "without content"),
    ],
)
def test_parts_of_an_update_that_are_none(
    form: str,
    part: str,
    change: Callable[[Tensor], Tensor],
    match: str,
    sd: DiffusionPipeline,
    good_lora: dict[str, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    ends = {
        "lora": {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"},
        "kohya": {"down": ".lora_down.weight", "up": ".lora_up.weight", "magnitude": ".dora_scale"},
    }
    tensors = dict(good_lora[form])
    end = {**ends[form], "alpha": ".alpha"}[part]
    layer = next(name for name in tensors if name.endswith(ends[form]["down"])).removesuffix(ends[form]["down"])
    tensors[layer + end] = change(tensors.get(layer + end, torch.ones(1)))
    torch.save(tensors, tmp_path / "lora.bin")
    assert_refused(sd, tmp_path / "lora.bin", match)


def test_an_update_of_a_huge_rank_in_a_small_file(sd: DiffusionPipeline, tmp_path: Path) -> None:
    layer = KEY.removesuffix(".weight")
    outputs, inputs = parts.weights(sd)[KEY].shape
    one, rank = torch.ones(1), 1 << 20
    tensors = {
        f"{layer}.lora_A.weight": one.expand(rank, inputs),
        f"{layer}.lora_B.weight": one.expand(outputs, rank),
    }
    torch.save(tensors, tmp_path / "lora.bin")
    assert_refused(sd, tmp_path / "lora.bin", "more elements than it stores")


def test_numbers_that_the_weights_cannot_hold(tmp_path: Path) -> None:
    pipeline = families.build("sd").to(torch.float16)
    layer = KEY.removesuffix(".weight")
    outputs, inputs = parts.weights(pipeline)[KEY].shape
    tensors = {f"{layer}.lora_A.weight": torch.full((1, inputs), 1e6), f"{layer}.lora_B.weight": torch.ones(outputs, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_refused(pipeline, tmp_path / "lora.safetensors", "to_k.*float32.*float16")


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ("[" * 100_000, "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"unet.lora_alpha": 1' + "0" * 5000 + "}", "not valid JSON|alpha"),
        ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "alpha"),
        ('{"unet.lora_alpha": NaN}', "nan as the alpha"),
        ('{"unet.lora_alpha": Infinity}', "inf as the alpha"),
        ('{"unet.lora_alpha": true}', "True as the alpha"),
        ('{"unet.lora_alpha": [1]}', r"\[1\] as the alpha"),
        ('{"unet.alpha_pattern": [1]}', "alpha_pattern"),
        ('{"unet.use_rslora": "no"}', "use_rslora"),
    ],
)
def test_metadata_of_a_lora_that_are_none(
    metadata: str, match: str, sd: DiffusionPipeline, good_lora: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    save_file(good_lora["lora"], tmp_path / "lora.safetensors", {"lora_adapter_metadata": metadata})
    assert_refused(sd, tmp_path / "lora.safetensors", match)


def test_metadata_that_name_an_alpha_for_a_layer(
    sd: DiffusionPipeline, good_lora: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    pattern = {"attn2.to_k": float("nan")}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": pattern})}
    save_file(good_lora["lora"], tmp_path / "lora.safetensors", metadata)
    assert_refused(sd, tmp_path / "lora.safetensors", "nan as the alpha of .*attn2.to_k")


@pytest.mark.parametrize("layer", ["unet.conv_norm_out", "text_encoder.embeddings.token_embedding"])
def test_layers_that_carry_no_lora(layer: str, sd: DiffusionPipeline, tmp_path: Path) -> None:
    shape = parts.weights(sd)[f"{layer}.weight"].shape
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(RANK, *shape[1:]),
        f"{layer}.lora_B.weight": torch.ones(shape[0], RANK),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_refused(sd, tmp_path / "lora.safetensors", f"{layer.partition('.')[2]}.*(carry no LoRA|matrix)")


def test_parts_of_an_update_under_two_names(
    sd: DiffusionPipeline, good_lora: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    lora, kohya = (dict(good_lora[form]) for form in ("lora", "kohya"))
    down = next(name for name in lora if name.endswith(".lora_A.weight"))
    text = "text_model_encoder_layers_0_self_attn_q_proj"
    width = sd.text_encoder.config.hidden_size
    twice = {
        f"{prefix}_{text}.lora_{part}.weight": torch.ones(shape)
        for prefix in ("lora_te", "lora_te1")
        for part, shape in (("down", (1, width)), ("up", (width, 1)))
    }
    for tensors, match in (
        ({**lora, down.replace(".lora_A.weight", ".lora.down.weight"): lora[down]}, "twice"),
        ({**lora, down.removeprefix("unet."): lora[down]}, "twice"),
        ({**kohya, **twice}, "twice"),
    ):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
        assert_refused(sd, tmp_path / "lora.safetensors", match)


def test_an_adapter_name_that_no_module_can_have(
    sd: DiffusionPipeline, good_lora: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    save_file(good_lora["lora"], tmp_path / "lora.safetensors")
    for name in ("a.b", ""):
        with pytest.raises(ValueError, match=f"adapter_name '{name}'"):
            load_weights(sd, tmp_path, adapter_name=name)
