"""fdu plan: its estimates against what an erasure allocates, its table, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fdu
from fdu import cli
from fdu.cli import main
from fdu.cli.planning import cheaper
from fdu.config import EraseConfig
from fdu.models.families import denoiser_of
from fdu.storage.shapes import load_shapes
from fdu.subjects.embedded import Digits, Emoji
from fdu.training.footprint import Footprint, footprint

pytestmark = pytest.mark.quick(case=["emoji lora", "digits full"])
FEW = {"max_train_steps": 2, "num_latents": 4, "num_inference_steps": 1, "sample_batch_size": 4}


def allocated(pipeline: Any, config: EraseConfig) -> int:
    """The largest number of bytes that an erasure holds beyond the weights, by PyTorch's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fdu.erase(pipeline, "three", "eight", config=config)
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
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_tenth_of_what_an_erasure_allocates(case: str, tmp_path: Path) -> None:
    name, settings = CASES[case]
    config = EraseConfig(**FEW, **settings)
    if name in ("emoji", "digits"):
        folder, resolution = {"emoji": Emoji, "digits": Digits}[name].data, None
        pipeline = fdu.load_pipeline(name)
    else:
        folder, resolution, pipeline = tmp_path, families.resolution(name), families.build(name)
        pipeline.save_pretrained(folder)
        config = EraseConfig(**FEW, **settings, resolution=resolution)
    found = footprint(denoiser_of(load_shapes(str(folder)), resolution), config)
    assert found.parameters == {
        part: sum(parameter.numel() for parameter in module.parameters())
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    assert beyond_weights(found) == pytest.approx(allocated(pipeline, config), rel=0.1)


NOT_SERVED = (
    "pixart",
    "auraflow",
    "chroma",
    "cogview4",
    "lumina2",
    "qwenimage",
    "zimage",
    "flux2",
    "flux2_klein",
    "wan",
)
"""Families whose pipelines look at the values of masks or lengths when they encode prompts."""


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILY_NAMES)
def test_every_family_is_estimated_or_refused_in_words(name: str, tmp_path: Path) -> None:
    families.build(name).save_pretrained(tmp_path)
    denoiser = families.denoiser(name, load_shapes(str(tmp_path)))
    if name in NOT_SERVED:
        with pytest.raises(ValueError, match="sees shapes alone.*does not serve it yet"):
            footprint(denoiser, EraseConfig(**FEW))
    else:
        assert footprint(denoiser, EraseConfig(**FEW)).training > 0


def test_every_proposal_needs_less_memory() -> None:
    folder = str(Digits.data)

    def estimate(config: EraseConfig) -> Footprint:
        dtype = "bfloat16" if config.mixed_precision == "bf16" else "float32"
        return footprint(denoiser_of(load_shapes(folder, dtype)), config)

    proposed = list(cheaper(EraseConfig(train_method="full")))
    assert proposed[0] == ("as given", EraseConfig(train_method="full"))
    sizes = [estimate(config).peak for _, config in proposed]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert "--gradient_checkpointing --mixed_precision bf16 --optimizer adamw_8bit" in proposed[3][0]


def test_the_table_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits", "--memory", "0.02"]) == cli.OK
    told = capsys.readouterr().out
    assert "unet" in told and "parameters (lora)" in told and "(fits)" in told
    assert "To fit in 0.02 GiB, add --gradient_checkpointing" in told
    assert main(["plan", "digits", "--memory", "100", "--train_method", "full"]) == cli.OK
    assert "This fits in 100 GiB." in capsys.readouterr().out
    assert main(["plan", "digits", "--preset", "esd-x"]) == cli.OK
    assert "parameters (cross_attention)" in capsys.readouterr().out
    assert main(["plan", "digits", "--tflops", "0.5", "--max_train_steps", "10"]) == cli.OK
    per_step, in_all = re.search(r"([\d.]+) s per step, ([\d.]+) s in all", capsys.readouterr().out).groups()
    assert float(in_all) == pytest.approx(10 * float(per_step), rel=0.01)
    assert main(["plan", "digits", "--memory", "0.0001"]) == cli.OK
    assert "Nothing above fits" in capsys.readouterr().out


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
