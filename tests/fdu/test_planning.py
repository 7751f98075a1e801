"""fdu plan: its estimates against what an erasure allocates, its table, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import shapes
import torch
import vram
from diffusers import FluxTransformer2DModel
from torch.profiler import ProfilerActivity, profile

import fdu
from fdu import cli
from fdu.cli import main
from fdu.cli.cards import CARDS, REACHED
from fdu.cli.planning import Stored, cheaper
from fdu.config import EraseConfig
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of
from fdu.models.quantization import quantize
from fdu.storage.shapes import PROMPT, conditioning_shapes, load_shapes
from fdu.subjects.embedded import Digits, Emoji
from fdu.training.footprint import Estimator, Footprint, footprint

pytestmark = pytest.mark.quick(case=["emoji lora", "digits full"])
FEW = {"max_train_steps": 2, "num_latents": 4, "num_inference_steps": 1, "sample_batch_size": 4}


def allocated(pipeline: Any, config: EraseConfig) -> int:
    """The largest number of bytes that an erasure holds beyond the weights, by PyTorch's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fdu.erase(pipeline, "three", "eight", config=config)
    return largest(recorded)


def largest(recorded: profile) -> int:
    """The largest number of bytes in a record of PyTorch's."""
    events = [one for one in recorded.profiler.kineto_results.events() if one.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def beyond_weights(found: Footprint) -> int:
    return max(found.states + found.step, found.sampling)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "emoji lora": ("emoji", {"train_batch_size": 4}),
    "emoji lora checkpointed": ("emoji", {"train_batch_size": 16, "gradient_checkpointing": True}),
    "emoji full": ("emoji", {"train_batch_size": 8, "train_method": "full"}),
    "emoji text_encoder": ("emoji", {"train_batch_size": 4, "train_method": "text_encoder"}),
    "emoji without preservation": ("emoji", {"train_batch_size": 8, "preservation_weight": 0.0}),
    "digits full": ("digits", {"train_batch_size": 8, "train_method": "full"}),
    "digits dora": ("digits", {"train_batch_size": 8, "train_method": "dora"}),
    "sd3 lora": ("sd3", {"train_batch_size": 32}),
    "sdxl lora": ("sdxl", {"train_batch_size": 32}),
    "sdxl scaled": ("sdxl scaled", {"train_batch_size": 1}),  # of its own widths and sides a fraction
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_tenth_of_what_an_erasure_allocates(case: str, tmp_path: Path) -> None:
    name, settings = CASES[case]
    folder, resolution = tmp_path, None
    if name in ("emoji", "digits"):
        folder, pipeline = {"emoji": Emoji, "digits": Digits}[name].data, fdu.load_pipeline(name)
    elif name == "sdxl scaled":
        pipeline = shapes.sdxl(shapes.SCALED, "cpu")
        pipeline.set_progress_bar_config(disable=True)
    else:
        resolution, pipeline = families.resolution(name), families.build(name)
    if folder == tmp_path:
        pipeline.save_pretrained(folder)
    config = EraseConfig(**FEW, **settings, resolution=resolution)
    found = footprint(denoiser_of(load_shapes(str(folder)), resolution), config)
    assert found.parameters == {
        part: sum(parameter.numel() for parameter in module.parameters())
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    assert beyond_weights(found) == pytest.approx(allocated(pipeline, config), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_every_family_is_estimated(name: str, tmp_path: Path) -> None:
    """Also those whose pipelines look at the values of masks or lengths when they encode prompts."""
    families.build(name).save_pretrained(tmp_path)
    denoiser = families.denoiser(name, load_shapes(str(tmp_path)))
    assert footprint(denoiser, EraseConfig(**FEW)).training > 0
    read = conditioning_shapes(denoiser, 2).tensors
    real = families.denoiser(name).encode([PROMPT] * 2).tensors
    assert {key: (one.shape, one.dtype) for key, one in read.items()} == {
        key: (one.shape, one.dtype) for key, one in real.items()
    }


def test_a_text_encoder_that_trains_behind_values_is_refused(tmp_path: Path) -> None:
    families.build("pixart").save_pretrained(tmp_path)
    denoiser = denoiser_of(load_shapes(str(tmp_path)), 16)
    with pytest.raises(ValueError, match="fdu plan does not serve train_method 'text_encoder'"):
        footprint(denoiser, EraseConfig(train_method="text_encoder", **FEW))


@pytest.mark.parametrize("name", ["emoji", "qwenimage"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_shapes_that_are_found_once_are_those_of_every_operation(
    name: str, mixed_precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "emoji":
        families.build(name).save_pretrained(tmp_path)
    folder, resolution = (Emoji.data, None) if name == "emoji" else (tmp_path, families.resolution(name))
    settings = EraseConfig(
        **FEW | {"sample_batch_size": 1},
        train_batch_size=3,
        gradient_checkpointing=True,
        mixed_precision=mixed_precision,
    )

    def estimate() -> Footprint:
        return footprint(denoiser_of(load_shapes(str(folder)), resolution), settings)

    found = estimate()
    monkeypatch.setattr("fdu.training.footprint._is_pure", lambda function: False)
    # With checkpointing, a peak is known to a hundredth.
    assert found == dataclasses.replace(estimate(), step=pytest.approx(found.step, rel=0.01))


@pytest.mark.slow
def test_checkpointed_blocks_of_a_transformer_leave_nothing_but_their_inputs(tmp_path: Path) -> None:
    """A block more costs what it is given, [2 N, tokens, width], and not what it computes again."""

    def step(blocks: int) -> int:
        pipeline = families.build("flux")
        config = {**pipeline.transformer.config, "num_single_layers": blocks}
        pipeline.register_modules(transformer=FluxTransformer2DModel.from_config(config))
        pipeline.save_pretrained(tmp_path / str(blocks))
        settings = EraseConfig(**FEW, train_batch_size=4, gradient_checkpointing=True)
        return footprint(denoiser_of(load_shapes(str(tmp_path / str(blocks))), 128), settings).step

    tokens, width = (128 // 4) ** 2 + 512, 32
    assert (step(8) - step(4)) / 4 == pytest.approx(8 * tokens * width * 4, rel=0.05)


@pytest.mark.parametrize("name", ["flux2-klein-base-4b"])
def test_a_model_is_planned_without_its_tokenizer(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = vram.unpack(name, tmp_path)
    assert main(["plan", str(folder), "--resolution", "256", *vram.LEAST]) == cli.OK
    told = capsys.readouterr().out
    assert re.search(r"transformer +3,87\d,", told) and "(lora)" in told


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_published_models_are_planned_in_seconds_and_little_memory() -> None:
    """All eleven, one after another in a process of their own: its memory stays below 2 GB."""
    published = {
        **{"sd15": 0.86e9, "sd21": 0.87e9, "sdxl": 2.57e9, "sd35-medium": 2.5e9, "sd35-large": 8.1e9},
        **{"flux1-dev": 12e9, "flux1-schnell": 12e9, "flux2-dev": 32e9, "flux2-klein-base-4b": 4e9},
        **{"qwen-image": 20e9, "z-image": 6e9},
    }
    done = subprocess.run([sys.executable, vram.__file__, "--check"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] < 1.5e9
    assert found["models"].keys() == published.keys()
    for name, (parameters, seconds) in found["models"].items():
        assert parameters == pytest.approx(published[name], rel=0.12) and seconds < 20  # of the CPU; 8 on an idle core


def test_every_proposal_needs_less_memory() -> None:
    folder = str(Digits.data)

    def estimate(config: EraseConfig) -> Footprint:
        dtype = "bfloat16" if config.mixed_precision == "bf16" else "float32"
        return footprint(denoiser_of(load_shapes(folder, dtype)), config)

    proposed = list(cheaper(EraseConfig(train_method="full"), Stored()))
    assert proposed[0] == ("as given", EraseConfig(train_method="full"), Stored())
    sizes = [estimate(config).peak for _, config, _ in proposed]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert "--gradient_checkpointing --mixed_precision bf16 --optimizer adamw_8bit" in proposed[3][0]


def test_quantized_and_offloaded_weights_need_less(tmp_path: Path) -> None:
    pipeline = families.build("zimage")
    pipeline.save_pretrained(tmp_path)
    config = EraseConfig(**FEW, gradient_checkpointing=True)
    sizes, traced = [], []

    def shapes(one: EraseConfig, quantization: str) -> Denoiser:
        traced.append(quantization)
        made = load_shapes(str(tmp_path), "bfloat16")
        quantize(made, quantization)
        return denoiser_of(made, 16)

    estimate = Estimator(shapes)
    for _, one, stored in list(cheaper(config, Stored(), has_blocks=True))[-3:]:
        found = estimate(one, stored.quantization, stored.offload)
        assert found.parameters["transformer"] == pipeline.transformer.num_parameters() and found.blocks
        sizes.append(found.denoiser)
    assert sizes[0] > sizes[1] > sizes[2]
    assert found.peak == max(found.denoiser + found.sampling, found.training)  # the encoders stay on the CPU
    assert traced == ["none", "nf4"]  # neither the optimizer nor offloading changes the operations of a step
    with pytest.raises(ValueError, match="offload serves transformers"):
        footprint(denoiser_of(load_shapes(str(Digits.data))), config).offloaded()


def test_the_table_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits", "--memory", "0.02"]) == cli.OK
    told = capsys.readouterr().out
    assert "unet" in told and "parameters (lora)" in told and "(fits)" in told
    assert re.search(r"With --gradient_checkpointing[-\w ]*, this fits in 0.02 GiB and leaves 10% free", told)
    assert main(["plan", "digits", "--memory", "100", "--train_method", "full"]) == cli.OK
    assert "This fits in 100 GiB and leaves 10% free." in capsys.readouterr().out
    assert main(["plan", "digits", "--preset", "esd-x"]) == cli.OK
    assert "parameters (cross_attention)" in capsys.readouterr().out
    assert main(["plan", "digits", "--memory", "0.0001"]) == cli.OK
    assert "Nothing above fits" in capsys.readouterr().out


def seconds(options: str, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """What the plan for the digits says of the time: per step, before them, in all."""
    assert main(["plan", "digits", "--max_train_steps", "10", *options.split()]) == cli.OK
    line = re.search(r"time +([\d.e-]+) s per step, ([\d.e-]+) s before, ([\d.e-]+) s in all", capsys.readouterr().out)
    assert line is not None
    return [float(one) for one in line.groups()]


def test_the_time_counts_the_steps_and_what_comes_before_them(capsys: pytest.CaptureFixture[str]) -> None:
    step, before, whole = seconds("--tflops 0.5", capsys)
    assert whole == pytest.approx(10 * step + before, rel=0.01)
    # 96 latents in 15 steps of two predictions; a training step predicts 32 samples, frozen and trained, and the
    # gradients of the second take about as long again.
    assert before / step == pytest.approx(96 * 15 * 2 / (3 * 32), rel=0.1)
    assert seconds("--tflops 0.5 --num_inference_steps 5", capsys)[1] == pytest.approx(before / 3, rel=0.01)
    assert seconds("--tflops 0.5 --sampling_guidance 1", capsys)[1] == pytest.approx(before / 2, rel=0.01)
    frozen = seconds("--tflops 0.5 --frozen_batches 4", capsys)
    assert frozen[0] == pytest.approx(step * 2 / 3, rel=0.1)
    # A batch that is frozen in advance costs what its step saves; four batches can use 128 of the latents.
    assert frozen[1] == pytest.approx(before + 4 * (step - frozen[0]), rel=0.01)
    assert seconds("--tflops 0.5 --negative_guidance 1", capsys)[0] == pytest.approx(step * 7 / 6, rel=0.05)


def test_a_card_gives_memory_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    half, card = "--mixed_precision bf16", CARDS["rtx-4090"]
    by_card = seconds(f"{half} --card rtx-4090", capsys)
    assert by_card == pytest.approx(seconds(f"{half} --tflops {REACHED * card.tflops}", capsys), rel=0.01)
    assert seconds(f"{half} --card rtx-4090 --tflops 1", capsys)[0] > by_card[0]
    assert main(["plan", "digits", "--card", "t4"]) == cli.OK
    told = capsys.readouterr().out
    assert "This fits in 15 GiB" in told and "the speed of t4 is that of --mixed_precision fp16" in told
    assert main(["plan", "digits", "--card", "t4", "--memory", "4"]) == cli.OK
    assert "This fits in 4 GiB" in capsys.readouterr().out
    assert all(one.source and one.memory > 0 < one.tflops for one in CARDS.values())


@pytest.mark.quick(name=["zimage", "qwenimage"])
@pytest.mark.parametrize("name", ["sd", "zimage", "qwenimage", "flux"])
def test_guidance_is_counted_as_the_pipeline_guides(name: str, tmp_path: Path) -> None:
    """Above its own scale without guidance, in one batch or in turn; FLUX.1 is guided by an input."""
    families.build(name).save_pretrained(tmp_path)

    def estimate(guidance: float) -> tuple[int, int]:
        denoiser = families.denoiser(name, load_shapes(str(tmp_path)))
        found = footprint(denoiser, EraseConfig(**FEW, sampling_guidance=guidance, train_batch_size=4))
        return found.sampling, found.preparation

    denoiser = families.denoiser(name)
    scale = denoiser.unguided_scale
    (plain, once), (guided, twice) = estimate(scale), estimate(scale + 0.5)
    assert twice / once == pytest.approx(2 if denoiser.guided_by_empty else 1)
    assert (guided > 1.5 * plain) == (denoiser.guided_by_empty and not denoiser.guides_in_turn)
    read = denoiser.encode([PROMPT, ""])

    def drawn(guidance_scale: float) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            denoiser.draw_latents(read, [0] * 4, 1, 1, guidance_scale, range(4), 4, progress=False)
        return largest(recorded)

    drawn(scale)  # at the first call some tables are made
    assert drawn(scale + 0.5) / drawn(scale) == pytest.approx(guided / plain, rel=0.15)


def test_what_fits_leaves_a_tenth_free(capsys: pytest.CaptureFixture[str]) -> None:
    peak = footprint(denoiser_of(load_shapes(str(Digits.data))), EraseConfig()).peak / (1 << 30)
    for share, fits in ((0.89, True), (0.91, False)):
        assert main(["plan", "digits", "--memory", str(peak / share)]) == cli.OK
        assert ("This fits" in capsys.readouterr().out) == fits


def test_the_plan_says_what_an_erasure_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.build("flux").save_pretrained(tmp_path)
    plan = ["plan", str(tmp_path), "--resolution", "32", "--train_batch_size", "1", "--sample_batch_size", "1"]
    assert main(plan) == cli.OK
    assert "would refuse these settings: pipeline seems to be distilled to few steps" in capsys.readouterr().out
    assert main([*plan, "--timestep_sampling", "inference"]) == cli.OK
    assert "refuse" not in capsys.readouterr().out


def test_what_cannot_be_estimated_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    denoiser = denoiser_of(load_shapes(str(Digits.data)))
    with pytest.raises(ValueError, match="'closed_form' trains nothing"):
        footprint(denoiser, EraseConfig(train_method="closed_form"))
    with pytest.raises(ValueError, match="variational is not part of the estimate"):
        footprint(denoiser, EraseConfig(variational=True, divergence="kl"))
    with pytest.raises(ValueError, match="objective 'noise' is not part of the estimate"):
        footprint(denoiser, EraseConfig(objective="noise"))
    assert main(["plan", "digits", "--gradient_surgery"]) == cli.USAGE
    assert "gradient_surgery is not part of the estimate" in capsys.readouterr().err
    assert main(["plan", "digits", "--memory", "0"]) == cli.USAGE
    assert "memory must be a finite number > 0" in capsys.readouterr().err
    assert main(["plan", str(tmp_path)]) == cli.USAGE
    assert "not the folder of a diffusers pipeline" in capsys.readouterr().err


def test_shapes_hold_no_weights_and_leave_pytorch_as_it_was() -> None:
    attention, linear = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.linear
    pipeline = load_shapes(str(Digits.data), "bfloat16")
    assert all(one.is_meta and one.dtype == torch.bfloat16 for one in pipeline.unet.parameters())
    footprint(denoiser_of(pipeline), EraseConfig(mixed_precision="bf16", **FEW))
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert torch.nn.functional.linear is linear


@pytest.mark.slow
def test_stable_diffusion_at_its_true_size(tmp_path: Path) -> None:
    """The published configs of Stable Diffusion 1.5: 860 million parameters of the denoiser, in seconds."""
    families.build("sd").save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    unet = {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        **{"cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2, "sample_size": 64},
        "norm_num_groups": 32,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    for part, settings in (("unet", unet), ("text_encoder", text)):
        file = tmp_path / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    found = footprint(denoiser_of(load_shapes(str(tmp_path)), 128), EraseConfig())
    assert found.parameters["unet"] == 859_520_964
    assert found.trained == 792_576 and 3.1 < found.denoiser / (1 << 30) < 3.3
    # Per image 0.34 x 10^12 multiplications and additions by the layers (Kim et al. 2023, arXiv 2305.15798) and 0.06 by
    # the attention between pixels. A step has a frozen pass, a trained one and a backward pass that costs about as
    # much, each of 16 erasing and 16 preserving samples.
    assert found.flops == pytest.approx(3 * 32 * 2 * 0.40e12, rel=0.1)
