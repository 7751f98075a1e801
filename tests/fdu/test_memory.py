"""Pipelines whose frozen weights are quantized or offloaded: they train, draw and save as others do."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

import fdu
from fdu import cli
from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.models.offloading import MARK, blocks_of, drawable, offload_blocks
from fdu.models.quantization import QuantizedLinear, quantization_of, quantize
from fdu.storage.loading import check_quantization

FEW: dict[str, Any] = {"max_train_steps": 3, "num_latents": 4, "num_inference_steps": 2, "train_batch_size": 2}
ERRORS = {"nf4": 0.15, "int8": 0.01, "fp8": 0.04}
"""The largest relative error of a weight of normal noise."""
CHANGES = {"nf4": 0.6, "int8": 0.1, "fp8": 0.25}
"""The largest relative distance of what a LoRA changes in the outputs, from that of a LoRA over the whole weights."""
BF16_CHANGE = 0.4
"""The same of nf4 from bf16, as docs/guides/low-memory.md states it."""
UNETS = ("sd", "sd_v", "sdxl")


def has_bitsandbytes() -> bool:
    try:
        check_quantization("nf4")
    except ImportError:
        return False
    return True


bare = pytest.mark.skipif(not has_bitsandbytes(), reason="bitsandbytes is not installed")
KINDS = [pytest.param(kind, marks=bare if kind == "nf4" else ()) for kind in ERRORS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_is_close_and_passes_gradients(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    nn.init.normal_(layer.weight)
    quantized = QuantizedLinear(layer, kind)
    assert (quantized.weight - layer.weight).norm() / layer.weight.norm() < ERRORS[kind]
    given = torch.randn(5, 128, requires_grad=True)
    output = quantized(given)
    expected = given @ quantized.weight.T + layer.bias
    torch.testing.assert_close(output, expected)
    (gradient,) = torch.autograd.grad(output.square().sum(), given)
    torch.testing.assert_close(gradient, 2 * expected.detach() @ quantized.weight)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_layer_keeps_eight_bits_for_the_backward_pass(kind: str) -> None:
    quantized = QuantizedLinear(nn.Linear(256, 256), kind)
    kept: list[Tensor] = []
    given = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        quantized(given)
    assert 256 * 256 <= sum(one.nbytes for one in kept) < 256 * 256 * 1.1
    assert quantized.bfloat16().stored.itemsize == 1  # a cast of the model leaves it alone


@pytest.mark.parametrize(
    "kind, dtype",
    [
        pytest.param("nf4", "bfloat16", marks=bare),
        *(pytest.param(kind, "float32", marks=bare if kind == "nf4" else ()) for kind in ERRORS),
    ],
)
def test_a_lora_over_a_quantized_base_is_close_to_the_one_over_the_whole(kind: str, dtype: str, tmp_path: Path) -> None:
    """Both are loaded over the whole weights, and compared by what they change in the outputs there."""
    settings = {**FEW, "max_train_steps": 20, "train_batch_size": 8, "num_latents": 16}
    settings["mixed_precision"] = "bf16" if dtype == "bfloat16" else "no"

    def trained(quantization: str) -> tuple[Tensor, float]:
        pipeline = fdu.load_pipeline("digits", dtype, quantization=quantization)
        assert quantization_of(pipeline) == quantization
        result = fdu.erase(pipeline, "three", "eight", seed=0, **settings)
        assert result.record()["quantization"] == quantization
        whole = fdu.load_pipeline("digits")
        whole.load_lora_weights(str(result.save(tmp_path / quantization)))
        config = whole.unet.config
        torch.manual_seed(1)
        noisy = torch.randn(4, config.in_channels, config.sample_size, config.sample_size)
        read = whole.encode_prompt(["three"] * 4, "cpu", 1, False)[0]
        given = (noisy, torch.tensor([300, 500, 700, 900]), read)
        with torch.no_grad():
            after = whole.unet(*given).sample
            whole.disable_lora()
            return after - whole.unet(*given).sample, result.history["distance"][-1]

    (plain, plain_end), (over, over_end) = trained("none"), trained(kind)
    distance = float((over - plain).norm() / plain.norm())
    assert 0 < distance < (CHANGES[kind] if dtype == "float32" else BF16_CHANGE)
    assert over_end == pytest.approx(plain_end, rel=0.25)


def replaced_linears(pipeline: Any, make: Any) -> Any:
    """The pipeline with other linear layers in the blocks of its transformer, as libraries quantize it."""
    for name, parent in list(pipeline.transformer.named_modules()):
        for place, layer in list(parent.named_children()):
            if "blocks" in name and type(layer) is nn.Linear:
                quantized = make(layer)
                quantized.load_state_dict(layer.state_dict())
                setattr(parent, place, quantized.requires_grad_(False))
    pipeline.transformer.to("cpu")  # at which bitsandbytes quantizes
    return pipeline


def by_bitsandbytes(kind: str) -> Any:
    """The tiny FLUX pipeline as bitsandbytes quantizes it."""
    import bitsandbytes

    def make(layer: nn.Linear) -> Any:
        given = (layer.in_features, layer.out_features, layer.bias is not None)
        if kind == "nf4":
            return bitsandbytes.nn.Linear4bit(*given, compute_dtype=torch.float32, quant_type="nf4")
        return bitsandbytes.nn.Linear8bitLt(*given, has_fp16_weights=False)

    return replaced_linears(families.build("flux"), make)


def by_torchao(kind: str) -> Any:
    """The tiny FLUX pipeline as torchao quantizes it."""
    quantization = pytest.importorskip("torchao.quantization")
    pipeline = families.build("flux")
    quantization.quantize_(pipeline.transformer, quantization.Int8WeightOnlyConfig())
    return pipeline


def by_casting(kind: str) -> Any:
    """The tiny FLUX pipeline with diffusers' layerwise casting."""
    pipeline = families.build("flux")
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return pipeline


USERS = {
    "bitsandbytes nf4": (by_bitsandbytes, "nf4"),
    "bitsandbytes int8": (by_bitsandbytes, "int8"),
    "torchao int8": (by_torchao, "int8"),
    "layerwise casting": (by_casting, "fp8"),
}
"""Pipelines that users have quantized themselves."""


@pytest.mark.parametrize("user", [pytest.param(user, marks=bare if user.startswith("bits") else ()) for user in USERS])
def test_a_lora_is_trained_over_weights_that_the_user_quantized(user: str, tmp_path: Path) -> None:
    build, kind = USERS[user]
    settings = {**FEW, **families.needed("flux")}
    result = fdu.erase(build(kind), "three", "eight", init="closed_form", **settings)
    assert all(map(math.isfinite, result.history["loss"]))
    saved = result.save(tmp_path / "lora")
    given = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}

    def drawn(pipeline: Any) -> Any:
        return torch.from_numpy(pipeline("three", generator=torch.Generator().manual_seed(0), **given).images)

    after = drawn(result.pipeline)
    with result.original() as pipeline:
        assert not torch.equal(drawn(pipeline), after)
    again = build(kind)
    fdu.load_weights(again, saved)
    torch.testing.assert_close(drawn(again), after)
    whole = families.build("flux")
    whole.load_lora_weights(str(saved))
    assert (drawn(whole) - after).abs().mean() < 0.05
    for save_as in ("pipeline", "delta"):
        with pytest.raises(ValueError, match="would merge the adapter into quantized weights"):
            result.save(tmp_path / save_as, save_as=save_as)
    with pytest.raises(ValueError, match="stored as .*without quantization, layerwise casting.*train_method 'lora'"):
        fdu.erase(build(kind), "three", "eight", train_method="full", **settings)


def test_what_cannot_be_quantized_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="quantization must be one of none, nf4"):
        fdu.load_pipeline("digits", quantization="int3")
    pipeline = fdu.load_pipeline("digits", quantization="int8")
    with pytest.raises(ValueError, match="stored as torch.int8.*train_method 'lora'"):
        fdu.erase(pipeline, "three", "eight", train_method="full", **FEW)
    result = fdu.erase(pipeline, "three", "eight", **FEW)
    with pytest.raises(ValueError, match='save_as "pipeline" would merge.*without quantization'):
        result.save(tmp_path / "whole", save_as="pipeline")
    command = ["erase", "digits", "--target", "three", "--anchor", "eight", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--quantization", "fp8", "--train_method", "full"]) == cli.USAGE
    assert "quantization 'fp8' needs train_method 'lora'" in capsys.readouterr().err


def test_without_bitsandbytes_nf4_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes, or choose 'int8' or 'fp8'"):
        fdu.load_pipeline("digits", quantization="nf4")


def test_large_text_encoders_are_quantized_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = families.build("sd3")
    sizes = {name: model.num_parameters() for name, model in parts.models(pipeline).items()}
    assert sizes["text_encoder_3"] < sizes["text_encoder"] == sizes["text_encoder_2"]
    monkeypatch.setattr("fdu.models.quantization.LARGE", sizes["text_encoder"])
    quantize(pipeline, "int8")
    layers = {name: {type(layer) for layer in model.modules()} for name, model in parts.models(pipeline).items()}
    assert {name for name, found in layers.items() if QuantizedLinear in found} == {
        *("transformer", "text_encoder", "text_encoder_2")
    }
    images = pipeline("three", num_inference_steps=1, height=16, width=16, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


@pytest.mark.quick(name=["flux"])
@pytest.mark.parametrize("name", [name for name in families.FAMILY_NAMES if name not in UNETS])
def test_offloaded_blocks_train_the_same_weights(name: str) -> None:
    """Bit for bit, with nothing but numbers that are none left of a block that is away."""

    def losses(offload: bool) -> list[float]:
        pipeline = families.build(name)
        if offload:
            offload_blocks(pipeline, "cpu")
            offloading = vars(pipeline.transformer)[MARK]
            first = next(pipeline.transformer.parameters())
            assert all(first is not weight for weight in homes_of(offloading))  # its device is the model's
            ruin_what_leaves(offloading)
        settings = {**FEW, "gradient_checkpointing": True, **families.needed(name)}
        return fdu.erase(pipeline, "three", "eight", **settings).history["loss"]

    assert losses(offload=True) == losses(offload=False)


def homes_of(offloading: Any) -> list[nn.Parameter]:
    return [weight for homes in offloading.homes.values() for _, _, weight in homes]


def ruin_what_leaves(offloading: Any) -> None:
    """A copy that was on the device holds no numbers once the block has left and nothing needs its gradients."""
    leave = offloading.leave

    def ruin() -> None:
        copies = []
        if offloading.here is not None and not torch.is_grad_enabled():
            copies = [part._parameters[place] for part, place, _ in offloading.homes[offloading.here]]
        leave()
        for copy in copies:
            copy.data.fill_(float("nan")) if copy.is_floating_point() else copy.data.zero_()

    offloading.leave = ruin


def test_one_block_at_a_time_is_on_the_device() -> None:
    pipeline = families.build("flux")
    blocks = blocks_of(pipeline.transformer)
    offload_blocks(pipeline, "cpu")
    offloading = vars(pipeline.transformer)[MARK]
    homes = set(map(id, homes_of(offloading)))
    found: list[int] = []

    def count(*_: Any) -> None:
        found.append(sum(any(id(weight) not in homes for weight in block.parameters()) for block in blocks))

    for block in blocks:
        block.register_forward_hook(count)
    pipeline("three", num_inference_steps=2, height=16, width=16, output_type="latent")
    assert found == [1] * 2 * len(blocks)
    offloading.leave()
    count()
    assert found[-1] == 0


def test_what_draws_beside_offloaded_blocks_comes_to_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A device without numbers stands for an accelerator: it shows where things go."""
    pipeline = families.build("flux")
    saved = fdu.erase(pipeline, "three", "eight", **FEW, **families.needed("flux")).save(tmp_path / "lora")
    pipeline = families.build("flux")
    offload_blocks(pipeline, "cpu")
    vars(pipeline.transformer)[MARK].device = torch.device("meta")
    moved: list[tuple[str, str]] = []
    for name in ("vae", "text_encoder", "text_encoder_2"):
        monkeypatch.setattr(getattr(pipeline, name), "to", lambda to, name=name: moved.append((name, str(to))))
    monkeypatch.setattr(pipeline.transformer, "to", lambda to: pytest.fail("its blocks would follow"))
    others = {"vae", "text_encoder", "text_encoder_2"}
    pipeline.image_encoder = nn.Identity()  # a part without weights
    with drawable(pipeline):
        assert set(moved) == {(name, "meta") for name in others}
    assert set(moved[3:]) == {(name, "cpu") for name in others}
    monkeypatch.undo()
    fdu.load_weights(pipeline, saved)
    adapters = [one for name, one in pipeline.transformer.named_parameters() if "lora_" in name]
    assert adapters and all(one.is_meta for one in adapters)
    whole = families.build("flux")
    with drawable(whole):
        assert whole.vae.device.type == "cpu"


@pytest.mark.quick(name=["flux"])
@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("offload", [True, False])
def test_beside_offloaded_blocks_nothing_else_comes_to_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, offload: bool
) -> None:
    """cpu:0, which is the CPU by another name, stands for an accelerator."""
    pipeline = families.build(name)
    expected = fdu.erase(families.build(name), "three", "eight", **FEW, **families.needed(name)).history
    if offload:
        offload_blocks(pipeline, "cpu")
    moved: list[tuple[str, str]] = []
    read: list[str] = []
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module) and part != "transformer":
            monkeypatch.setattr(module, "to", lambda to, part=part: moved.append((part, str(to))))
    encode = pipeline.encode_prompt
    monkeypatch.setattr(pipeline, "encode_prompt", lambda *a, **k: read.append(str(k["device"])) or encode(*a, **k))
    monkeypatch.setattr(Denoiser, "device", torch.device("cpu:0"))
    settings = {**FEW, **families.needed(name), "gradient_checkpointing": True}
    assert fdu.erase(pipeline, "three", "eight", **settings).history == expected
    encoders = {part for part, to in moved if to == "cpu:0" and "text" in part}
    assert encoders == (set() if offload else {part for part in pipeline.components if "text_encoder" in part})
    assert {to for part, to in moved if part == "vae"} <= {"cpu"}
    assert set(read) == {"cpu"}


def test_what_cannot_be_offloaded_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="offload serves transformers"):
        fdu.load_pipeline("digits", offload=True)
    families.build("flux_guidance").save_pretrained(tmp_path / "flux")
    pipeline = fdu.load_pipeline(tmp_path / "flux", offload=True)
    with pytest.raises(ValueError, match="saves memory only with gradient_checkpointing; add that"):
        fdu.erase(pipeline, "three", "eight", resolution=16, **FEW)
    with pytest.raises(ValueError, match="only adapters can be trained"):
        fdu.erase(pipeline, "three", "eight", resolution=16, train_method="full", **FEW)
    out = tmp_path / "out"
    command = ["erase", str(tmp_path / "flux"), "--target", "three", "--anchor", "eight", "--out", str(out)]
    few = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
    further = ["--resolution", "16", "--offload", "--gradient_checkpointing", "--quantization", "int8"]
    assert cli.main([*command, *few, *further]) == cli.OK
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert cli.main([*command, "--offload", "--overwrite"]) == cli.USAGE  # before anything is loaded
    assert "saves memory only with gradient_checkpointing; add that" in capsys.readouterr().err
    assert cli.main([*command, "--offload", "--train_method", "closed_form", "--overwrite"]) == cli.USAGE
    assert "offload needs train_method 'lora' or 'dora'" in capsys.readouterr().err
