"""Every family on tiny random pipelines: the denoiser against diffusers' own, and an erasure from start to image."""

from __future__ import annotations

import copy
import functools
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import families
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fdu
from fdu.evaluation.drawing import Conditioned, Probe, draw
from fdu.models import parts, staging
from fdu.models.denoiser import Conditioning, Denoiser, Trajectories
from fdu.models.families import FAMILIES, denoiser_of, guidance_arguments
from fdu.models.noise_schedules import shifted_sigmas
from fdu.models.patches import pack, position_ids, unpack
from fdu.storage.readers import load_weights
from fdu.storage.shapes import load_shapes
from fdu.training.examples import Found
from fdu.training.methods.perturbation import Perturbation

pytestmark = pytest.mark.quick(name=["sd", "sd3", "flux", "pixart"], method=["dora"])

PROMPT = "the digit three"
PROMPTS = [PROMPT, "a painting in the style of van gogh", ""]
UNITS = {
    "sd": 8,
    "sdxl": 8,
    "sd3": 4,
    "flux": 4,
    "pixart": 8,
    "sana": 32,
    "auraflow": 4,
    "chroma": 4,
    "cogview4": 16,
    "lumina2": 16,
    "wan": 16,
}
"""Pixels that a side must be a multiple of."""
NO_LORA = ("pixart",)
"""Families whose pipelines and transformers load no LoRA in diffusers; their adapters are saved merged."""
NO_KOHYA = (*NO_LORA, "sana", "cogview4")
"""Families without kohya files."""
READ_BY_DIFFUSERS = ("sd", "sd_v", "sdxl", "qwenimage", "zimage", "flux2", "flux2_klein")
"""Families whose kohya files plain diffusers reads whole; the others are for ComfyUI and fdu."""
NEGATED = ("Lumina2Pipeline", "ZImagePipeline")
"""Pipelines that change the sign of what their module returns."""
ONE_STREAM = ("cogview4",)
"""Families whose attention projects text and image by the same layers, so that the text's own come before it."""
REGISTERS = {"auraflow": 8}
"""Tokens of their own that a model puts before those of the prompt."""
GUIDED = dict.fromkeys(("chroma", "cogview4", "lumina2", "qwenimage", "flux2_klein", "wan"), ([PROMPT], [""])) | {
    "zimage": ([PROMPT, ""],)
}
"""The prompts of the calls that a family makes in each step of guidance, where it is not one call of both."""
DIFFUSION = ("sd", "sd_v", "sdxl", "pixart")
"""Families that add noise as DDPM does; the others follow a rectified flow."""
UNGUIDED = ("flux", "flux_guidance", "flux2")
"""Families that make one prediction per step."""
SIZES = {"zimage": 1024} | dict.fromkeys(("flux", "flux_guidance", "chroma", "qwenimage", "flux2", "flux2_klein"), 256)
"""Pixels that a pipeline draws, whatever the model."""
EVERY_FAMILY = pytest.mark.parametrize("name", families.FAMILY_NAMES)


@pytest.fixture
def denoiser(name: str) -> Denoiser:
    return families.denoiser(name)


def recorded(denoiser: Denoiser, guidance_scale: float, steps: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x_t, timestep and output of every call of the module while the pipeline samples, as the module has them."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        noisy = args[0] if args else kwargs["hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        # Z-Image takes and returns lists of images, as videos of one frame.
        noisy, returned = (
            torch.stack(some)[:, :, 0] if isinstance(some, list) else some for some in (noisy, output[0])
        )
        calls.append((noisy.clone(), timestep.clone(), returned.clone()))

    hook = denoiser.module.register_forward_hook(record, with_kwargs=True)
    sampled(denoiser, PROMPT, guidance_scale, steps)
    hook.remove()
    return calls


def sampled(denoiser: Denoiser, prompt: str, guidance_scale: float, steps: int, seed: int = 0) -> Tensor:
    """The latent [1, C, H, W] that the pipeline itself makes of a prompt."""
    latent = denoiser.pipeline(
        prompt=prompt,
        height=denoiser.height,
        width=denoiser.width,
        num_inference_steps=steps,
        **guidance_arguments(denoiser.pipeline, guidance_scale, 1),
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **denoiser.call_settings,
    )[0]
    # Klein's pipeline returns what its autoencoder decodes.
    klein = type(denoiser.pipeline).__name__ == "Flux2KleinPipeline"
    return denoiser.standardised(latent) if klein else denoiser.unpacked(latent)


def drawn(denoiser: Denoiser, prompts: list[str], guidance_scale: float, seeds: list[int], batch_size: int) -> Tensor:
    conditioning = denoiser.encode([*prompts, ""])
    chosen = range(len(prompts))
    return denoiser.draw_latents(conditioning, chosen, len(prompts), 2, guidance_scale, seeds, batch_size)


def repeat(denoiser: Denoiser, noisy: Tensor, timestep: Tensor, prompts: list[str]) -> Tensor:
    """What the denoiser predicts for the x_t and the timestep that the pipeline gave its module."""
    count = len(prompts)
    timestep = timestep[:, 0] if timestep.ndim == 2 else timestep  # the same at every token of Wan 2.2
    timestep, noisy = timestep.expand(count), denoiser.unpacked(noisy)
    # The pipelines encode each alone, and text encoders round batches of other sizes differently.
    conditioning = Conditioning.cat([denoiser.encode([prompt]) for prompt in prompts])
    if denoiser.prediction_type != "flow":
        return denoiser.predict(noisy, timestep.long(), conditioning)
    # A sampler's timesteps lie between those of the grid.
    denoiser._timesteps = timestep.float()  # type: ignore[attr-defined]
    return denoiser.predict(noisy, torch.arange(count), conditioning)


def compare(denoiser: Denoiser, guidance_scale: float, *each_step: list[str]) -> None:
    """Compare the predictions of three steps, each of which calls the module for these prompts in turn."""
    calls = recorded(denoiser, guidance_scale)
    assert len(calls) == 3 * len(each_step)
    for (noisy, timestep, output), prompts in zip(calls, 3 * each_step, strict=True):
        assert len(noisy) == len(prompts)
        predicted = repeat(denoiser, noisy, timestep, prompts)
        expected = denoiser.unpacked(output)[:, : predicted.shape[1]]
        expected = -expected if type(denoiser.pipeline).__name__ in NEGATED else expected
        assert expected.std() > 0.01
        assert torch.equal(predicted, expected)


@EVERY_FAMILY
@torch.no_grad()
def test_predict_is_what_the_pipeline_computes(denoiser: Denoiser, name: str) -> None:
    # To a guidance-distilled module the scale is told; to the others it would mean guidance by two predictions.
    assert denoiser.reads_guidance == (name in ("flux_guidance", "flux2"))
    denoiser.embedded_guidance = 3.5
    compare(denoiser, 3.5 if denoiser.reads_guidance else denoiser.unguided_scale, [PROMPT])


@pytest.mark.parametrize("name", [name for name in families.FAMILY_NAMES if name not in UNGUIDED])
@torch.no_grad()
def test_the_empty_prompt_is_the_unconditional_of_guidance(denoiser: Denoiser, name: str) -> None:
    calls = GUIDED.get(name, (["", PROMPT],))
    assert denoiser.guides_in_turn == (len(calls) > 1)
    compare(denoiser, 2.0, *calls)


@torch.no_grad()
def test_pixart_is_told_the_size_of_the_image_where_it_reads_it() -> None:
    denoiser = denoiser_of(families.build("pixart", sample_size=128), resolution=32)
    compare(denoiser, 1.0, [PROMPT])
    wider = torch.randn(1, 4, 8, 16)
    predicted = denoiser.predict(wider, torch.tensor([5]), denoiser.encode([PROMPT]))
    assert predicted.shape == wider.shape


@torch.no_grad()
def test_wan_is_told_a_timestep_per_token_where_it_reads_them() -> None:
    denoiser = families.denoiser("wan", expand_timesteps=True)
    compare(denoiser, 1.0, [PROMPT])
    denoiser = families.denoiser("wan", expand_timesteps=True)
    seen: list[Tensor] = []
    denoiser.module.register_forward_pre_hook(lambda *given: seen.append(given[-1]["timestep"]), with_kwargs=True)
    longer = torch.randn(2, 4, 3, 8, 12)
    predicted = denoiser.predict(longer, torch.tensor([5, 900]), denoiser.encode([PROMPT, ""]))
    assert predicted.shape == longer.shape
    assert seen[0].shape == (2, 3 * 4 * 6)


def test_a_number_of_frames_that_does_not_suit_the_model_is_refused() -> None:
    pipeline = families.build("wan")
    assert denoiser_of(pipeline, 32).latent_shape == (4, 21, 8, 8)  # of the pipeline's own 81 frames
    assert denoiser_of(pipeline, 32, 1).latent_shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match="num_frames.*multiple of 4, got 8; try 9"):
        denoiser_of(pipeline, 32, 8)
    with pytest.raises(ValueError, match="num_frames.*Stable Diffusion 1.x.*draws images; leave it out"):
        denoiser_of(families.build("sd"), 16, 3)


def test_a_wan_of_two_transformers_is_refused() -> None:
    pipeline = families.build("wan")
    pipeline.register_modules(transformer_2=copy.deepcopy(pipeline.transformer))
    pipeline.register_to_config(boundary_ratio=0.9)
    with pytest.raises(ValueError, match="one transformer for noisy timesteps and another.*; erase from.*Wan 2.1"):
        denoiser_of(pipeline, 32, 5)


def test_a_pipeline_that_makes_videos_from_videos_is_refused() -> None:
    parts = {name: part for name, part in families.build("wan").components.items() if name != "transformer_2"}
    with pytest.raises(ValueError, match="WanVideoToVideoPipeline, which takes video; "):
        denoiser_of(diffusers.WanVideoToVideoPipeline(**parts), 32, 5)


@torch.no_grad()
def test_sd3_works_without_t5() -> None:
    pipeline = families.build("sd3")
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    denoiser = denoiser_of(pipeline)
    assert set(denoiser.text_encoders) == {"text_encoder", "text_encoder_2"}
    compare(denoiser, 1.0, [PROMPT])


@EVERY_FAMILY
@torch.no_grad()
def test_a_latent_depends_on_its_prompt_and_its_seed_alone(denoiser: Denoiser) -> None:
    together = drawn(denoiser, [PROMPT, "a painting", PROMPT], 2.0, [0, 1, 2], batch_size=3)
    assert together.shape == (3, *denoiser.latent_shape)
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    alone = drawn(denoiser, ["a painting"], 2.0, [1], batch_size=1)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())
    other = drawn(denoiser, [PROMPT], 2.0, [1], batch_size=1)
    assert not torch.allclose(other, alone, rtol=1e-3)


@EVERY_FAMILY
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.quick(guidance_scale=[3.0])
@torch.no_grad()
def test_latents_are_the_pipelines_own_and_need_the_denoiser_alone(denoiser: Denoiser, guidance_scale: float) -> None:
    pipeline = denoiser.pipeline
    expected = torch.cat([sampled(denoiser, PROMPT, guidance_scale, steps=2, seed=seed) for seed in (3, 4)])
    conditioning = denoiser.encode(["", "a painting", PROMPT])
    components, config = dict(pipeline.components), dict(pipeline.config)
    for name, part in components.items():
        if isinstance(part, nn.Module) and part is not denoiser.module:
            part.to("meta")  # whoever asks it fails
            assert getattr(pipeline, name) is part
    latents = denoiser.draw_latents(conditioning, [2, 2], 0, 2, guidance_scale, [3, 4], batch_size=2)
    torch.testing.assert_close(latents, expected.float(), rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert pipeline.components == components and dict(pipeline.config) == config


@EVERY_FAMILY
@pytest.mark.quick(name=["sd", "sdxl", "flux", "zimage"])
@torch.no_grad()
def test_a_trajectory_is_what_the_module_is_given_at_each_step(denoiser: Denoiser) -> None:
    passed, plain = Trajectories(keeps_noisy=True), Trajectories(keeps_noisy=False)
    conditioning = denoiser.encode(["a painting", PROMPT, ""])
    given = (conditioning, [0, 1, 1], 2, 3, 2.0, [7, 8, 0], 2)
    latents = denoiser.draw_latents(*given, trajectories=passed)
    assert torch.equal(latents, denoiser.draw_latents(*given, trajectories=plain))
    assert plain.indices == passed.indices and not plain.noisy.numel()
    calls = {float(timestep.flatten()[0]): noisy for noisy, timestep, _ in reversed(recorded(denoiser, 2.0))}
    assert passed.noisy.shape == (3, len(calls), *denoiser.latent_shape) and len(calls) == len(passed.indices) == 3
    scheduler = denoiser.pipeline.scheduler
    for place, (told, noisy) in enumerate(reversed(calls.items())):
        torch.testing.assert_close(passed.noisy[2, place], denoiser.unpacked(noisy)[0], rtol=1e-4, atol=1e-4)
        at = passed.indices[place]
        if denoiser.prediction_type == "flow":
            near = torch.tensor([max(at - 1, 0), at, min(at + 1, 999)])
            between = (denoiser.timesteps(near) - told, denoiser.noise[near] - scheduler.sigmas[place])
            # Some samplers round the timesteps that they tell, and thus sigma to a thousandth.
            rounded = 0.0 if scheduler.timesteps.is_floating_point() else 1e-3
            for off, least in zip(between, (0.0, rounded), strict=True):
                assert off[1].abs() <= 0.51 * off.diff().abs().max() + least
        else:
            assert at == round(told)
    assert passed.indices == sorted(passed.indices, reverse=True) and passed.indices[0] > 600


def test_a_model_is_known_by_its_name_in_a_plan_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = families.build("sd")
    for name in ("sd-turbo", "models--org--sd-turbo/snapshots/0a1b", "snapshots/0a1b"):
        pipeline.save_pretrained(tmp_path / name)
        monkeypatch.chdir(tmp_path)
        known = denoiser_of(load_shapes(name)).few_steps
        assert (known is not None) == ("turbo" in name) == (denoiser_of(fdu.load_pipeline(name)).few_steps is not None)


def test_few_steps_are_told_by_the_folder() -> None:
    turbo = families.build("sd")
    assert denoiser_of(turbo).few_steps is None
    for name in ("sd_v", "emoji"):  # whose schedules end in noise alone
        pipeline = families.build(name) if name == "sd_v" else fdu.load_pipeline(name)
        pipeline.scheduler.register_to_config(timestep_spacing="trailing")
        assert denoiser_of(pipeline).few_steps is None
    klein = families.build("flux2_klein")
    klein.register_to_config(is_distilled=True)
    lcm = families.build("sd")
    lcm.scheduler = diffusers.LCMScheduler.from_config(lcm.scheduler.config)
    turbo.scheduler.register_to_config(timestep_spacing="trailing")
    z_turbo = families.build("zimage")
    z_turbo.scheduler.register_to_config(shift=3.0)
    for pipeline, shown in (
        (z_turbo, "shift 3, as that of Z-Image Turbo"),
        (turbo, "timestep_spacing 'trailing', as those of Turbo"),
        (lcm, "an? LCMScheduler"),
        (families.build("flux"), "reads no guidance, as that of FLUX.1 schnell"),
        (klein, "is_distilled"),
    ):
        with pytest.raises(
            ValueError, match=f"few steps: .*{shown}.*timestep_sampling 'inference', num_inference_steps"
        ):
            fdu.erase(pipeline, "three", "eight", resolution=16)
    fdu.erase(turbo, "three", "eight", train_method="closed_form")
    for name in ("flux_guidance", "flux2", "zimage"):
        assert denoiser_of(families.build(name), 16).few_steps is None


@pytest.mark.parametrize(
    ("name", "few"),
    [
        *((name, True) for name in ("org/sd-3.5-large-turbo", "x/DreamShaperXL_Lightning.safetensors", "SDXLTurbo")),
        ("/cache/models--org--sd3-turbo/snapshots/0123", True),
        *((name, False) for name in ("/home/turbo/sd3", "org/hyperrealism", "org/Z-Image-De-Turbo", "", "turbot")),
    ],
)
def test_few_steps_are_told_by_the_name(name: str, few: bool) -> None:
    pipeline = families.build("sd3")
    pipeline.register_to_config(_name_or_path=name)
    found = denoiser_of(pipeline).few_steps
    assert (found is not None) == few
    if found is not None:
        assert repr("models--org--sd3-turbo" if "snapshots" in name else Path(name).name) in found


def test_few_steps_are_told_by_an_active_adapter() -> None:
    pipeline = families.build("sd3")
    for name in ("ink", "Hyper-SD3-8steps"):
        families.add_adapter(pipeline, "transformer", ("attn.to_q",), adapter_name=name)
    pipeline.set_adapters(["ink", "Hyper-SD3-8steps"])
    with pytest.raises(ValueError, match="few steps: its adapter 'Hyper-SD3-8steps' is active"):
        fdu.erase(pipeline, "three", "eight", resolution=16)
    pipeline.set_adapters("ink")
    assert denoiser_of(pipeline).few_steps is None


@torch.no_grad()
def test_a_distilled_klein_is_drawn_without_a_second_prediction() -> None:
    denoiser = families.denoiser("flux2_klein")
    denoiser.pipeline.register_to_config(is_distilled=True)
    compare(denoiser, 4.0, [PROMPT])
    (latent,) = drawn(denoiser, [PROMPT], 4.0, [0], 1)
    expected = sampled(denoiser, PROMPT, 4.0, steps=2)[0]
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_compiled_module_is_refused_with_the_remedy() -> None:
    pipeline = families.build("sd")
    pipeline.unet = torch.compile(pipeline.unet)
    with pytest.raises(TypeError, match="pipeline.unet.*compiled; set pipeline.unet = pipeline.unet._orig_mod"):
        denoiser_of(pipeline)


def test_group_offloading_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    pipeline = families.build("flux")
    pipeline.save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    pipeline.transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    with pytest.raises(ValueError, match="load it again without, or by fdu.load_pipeline.*offload=True"):
        denoiser_of(pipeline, 16)
    remedied = fdu.load_pipeline(tmp_path, offload=True)
    assert losses(remedied, gradient_checkpointing=True) == losses(fdu.load_pipeline(tmp_path))


@torch.no_grad()
def test_the_pipeline_has_all_its_parts_again_after_an_error() -> None:
    denoiser = denoiser_of(families.build("sd"))
    components = dict(denoiser.pipeline.components)
    wrong = Conditioning({"embeddings": torch.zeros(1, 2)})
    with pytest.raises(Exception):  # noqa: B017  whatever diffusers says
        denoiser.draw_latents(wrong, [0], 0, 2, 1.0, [0], 1)
    assert denoiser.pipeline.components == components


@EVERY_FAMILY
@torch.no_grad()
def test_predict_depends_on_every_tensor_of_the_conditioning(denoiser: Denoiser) -> None:
    noisy, indices = torch.randn(1, *denoiser.latent_shape), torch.tensor([500])
    both = denoiser.encode([PROMPT, "a painting in the style of van gogh, in oil on old canvas"])
    first, second = both[:1], both[1:]
    predicted = denoiser.predict(noisy, indices, first)
    for tensor in first.tensors:
        mixed = Conditioning({**first.tensors, tensor: second.tensors[tensor]})
        assert not torch.equal(denoiser.predict(noisy, indices, mixed), predicted), tensor


@pytest.mark.parametrize("name", ["cogview4", "qwenimage", "zimage"])
@torch.no_grad()
def test_prompts_of_several_lengths_are_predicted_and_drawn_together(denoiser: Denoiser) -> None:
    prompts = [PROMPT, "a painting in the style of van gogh, in oil on old canvas", "", "a photo"]
    conditioning = denoiser.encode(prompts)
    assert len(conditioning.tensors["mask"].sum(1).unique()) > 1
    noisy, indices = torch.randn(4, *denoiser.latent_shape), torch.tensor([100, 700, 300, 900])
    together = denoiser.predict(noisy, indices, conditioning)
    for row, prompt in enumerate(prompts):
        own = slice(row, row + 1)
        alone = denoiser.predict(noisy[own], indices[own], denoiser.encode([prompt]))
        torch.testing.assert_close(together[own], alone, rtol=1e-5, atol=1e-5)
    seeds = [0, 1, 2]
    drawn = denoiser.draw_latents(conditioning, [0, 1, 3], 2, 2, 3.0, seeds, batch_size=3)
    for latent, prompt, seed in zip(drawn, (prompts[0], prompts[1], prompts[3]), seeds, strict=True):
        own = sampled(denoiser, prompt, 3.0, steps=2, seed=seed)
        torch.testing.assert_close(latent, own[0].float(), rtol=1e-4, atol=1e-4 * own.abs().max().item())
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    images = Conditioned(denoiser)(prompts, [torch.Generator().manual_seed(5) for _ in prompts], **settings).images
    for image, prompt in zip(images, prompts, strict=True):
        given = guidance_arguments(denoiser.pipeline, settings["guidance_scale"], 1)
        given |= {"height": denoiser.height, "width": denoiser.width, "num_inference_steps": 2, "output_type": "pt"}
        own = denoiser.pipeline(prompt=prompt, **given, generator=torch.Generator().manual_seed(5)).images
        torch.testing.assert_close(image, own[0], rtol=1e-4, atol=1e-4)


def test_conditionings_of_any_shape_are_joined_and_parted() -> None:
    def of(length: int, second: int = 4) -> Conditioning:
        return Conditioning(
            {
                "embeddings": torch.randn(1, length, 6),
                "stacked": torch.randn(1, length, 2, 6),  # of several layers of an encoder
                "pooled": torch.randn(1, 9),
                "ids": torch.randint(1, 9, (1, length)),
                "mask": torch.ones(1, length, dtype=torch.long),
                "second": torch.randn(1, second, 8),  # of another encoder
                "second_ids": torch.randint(1, 9, (1, second, 3)),
                "second_mask": torch.ones(1, second, dtype=torch.long),
            }
        )

    parts = [of(3), of(5), of(3), of(3, second=7)]
    joined = Conditioning.cat(parts)
    assert joined.tensors["stacked"].shape == (4, 5, 2, 6) and joined.tensors["pooled"].shape == (4, 9)
    assert joined.tensors["ids"].shape == (4, 5) and joined.tensors["second_ids"].shape == (4, 7, 3)
    masks = {name: joined.mask_of(name) for name in joined.tensors}
    assert {name for name, mask in masks.items() if mask == "second_mask"} == {"second", "second_ids", "second_mask"}
    assert {name for name, mask in masks.items() if mask == "mask"} == {"embeddings", "stacked", "ids", "mask"}
    groups = joined.by_length()
    assert [rows.tolist() for rows, _ in groups] == [[0, 2], [3], [1]]
    for rows, own in groups:
        for place, row in enumerate(rows.tolist()):
            for name, tensor in parts[row].tensors.items():
                assert torch.equal(own[place : place + 1].tensors[name], tensor)


@pytest.mark.parametrize("name", ["cogview4", "qwenimage", "zimage"])
@torch.no_grad()
def test_moves_of_more_embeddings_than_a_prompt_has_are_cut(denoiser: Denoiser) -> None:
    plain = denoiser.encode(["a photo"])
    assert plain.tensors["embeddings"].shape[1] < 20
    perturbation = Perturbation(denoiser, "a painting, in oil on old canvas, of three birds", tokens=20, start=3.0)
    moved = denoiser.encode(["a photo"]).tensors["embeddings"]
    found = Found(0, perturbation.addends())
    perturbation.remove()
    assert not torch.allclose(moved, plain.tensors["embeddings"], atol=0.1)
    torch.testing.assert_close(found.moved(plain).tensors["embeddings"], moved)


@EVERY_FAMILY
@torch.no_grad()
def test_conditionings_are_cut_and_joined(denoiser: Denoiser) -> None:
    prompts = [PROMPT, "", "a photo of the digit eight"]
    encoded = denoiser.encode(prompts)
    assert len(encoded) == 3
    joined = Conditioning.cat([encoded[1:], encoded[torch.tensor([0])]])
    for tensor, values in denoiser.encode([*prompts[1:], prompts[0]]).tensors.items():
        torch.testing.assert_close(joined.tensors[tensor], values, rtol=1e-5, atol=1e-5)


@EVERY_FAMILY
def test_encoding_passes_gradients_to_every_text_encoder(denoiser: Denoiser) -> None:
    assert denoiser.text_encoders
    conditioning = denoiser.encode_batch([PROMPT, ""])
    noisy = torch.randn(2, *denoiser.latent_shape)
    denoiser.predict(noisy, torch.tensor([100, 700]), conditioning).square().mean().backward()
    for encoder in denoiser.text_encoders.values():
        gradient = encoder.get_input_embeddings().weight.grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@EVERY_FAMILY
def test_the_prompt_is_read_by_the_context_projections(denoiser: Denoiser, name: str) -> None:
    linear = {layer: part for layer, part in denoiser.module.named_modules() if isinstance(part, nn.Linear)}
    chosen = [part for layer, part in linear.items() if layer.endswith(denoiser.context_projections)]
    every = [part for layer, part in linear.items() if layer.endswith(denoiser.attention_projections)]
    if name in ONE_STREAM:
        assert {id(part) for part in chosen}.isdisjoint({id(part) for part in every})
    else:
        assert {id(part) for part in chosen} < {id(part) for part in every}
    # FLUX.2's single blocks have their MLP in the same layers.
    attending = [layer for layer in linear if ".attn" in layer or ".attention." in layer]
    attending = [layer for layer in attending if not ("flux2" in name and "single" in layer)]
    assert len(every) == sum("to_" in layer or "_proj" in layer.rsplit(".", 1)[-1] for layer in attending)
    inputs: list[Tensor] = []
    for part in chosen:
        part.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    conditioning = denoiser.encode([PROMPT])
    denoiser.predict(torch.randn(1, *denoiser.latent_shape), torch.tensor([500]), conditioning)
    assert len(inputs) == len(chosen)
    length = conditioning.tensors["embeddings"].shape[1] + REGISTERS.get(name, 0)
    length = 32 * math.ceil(length / 32) if name == "zimage" else length  # which fills prompts up
    assert all(given.shape[1] == length for given in inputs)
    assert all(part.in_features == given.shape[2] for part, given in zip(chosen, inputs, strict=True))


@EVERY_FAMILY
@torch.no_grad()
def test_the_prompt_is_read_by_no_layer_but_those_of_the_group_text(denoiser: Denoiser) -> None:
    both = denoiser.encode([PROMPT, "a painting in the style of van gogh"])
    first, second = both[:1], both[1:]
    # A mask tells how long the prompt is, not what it says.
    masks = {key: tensor for key, tensor in first.tensors.items() if not tensor.is_floating_point()}
    other = Conditioning({**second.tensors, **masks})
    noisy, indices = torch.randn(1, *denoiser.latent_shape), torch.tensor([500])
    assert not torch.equal(denoiser.predict(noisy, indices, first), denoiser.predict(noisy, indices, other))
    for layer, part in denoiser.module.named_modules():
        if parts.ends_with(layer, denoiser.layer_groups()["text"]):
            part.register_forward_hook(lambda *given: torch.zeros_like(given[-1]))
    assert torch.equal(denoiser.predict(noisy, indices, first), denoiser.predict(noisy, indices, other))


@EVERY_FAMILY
def test_checkpointed_activations_change_no_prediction(denoiser: Denoiser) -> None:
    noisy, indices = torch.randn(2, *denoiser.latent_shape), torch.tensor([100, 700])
    conditioning = denoiser.encode([PROMPT, ""])
    gradients = []
    for _ in range(2):
        denoiser.module.zero_grad()
        predicted = denoiser.predict(noisy, indices, conditioning)
        predicted.square().sum().backward()
        gradients.append([predicted, *(weight.grad for weight in denoiser.module.parameters())])
        denoiser.module.enable_gradient_checkpointing()
        denoiser.module.train()
    torch.testing.assert_close(*gradients)


@EVERY_FAMILY
@torch.no_grad()
def test_the_grid_ascends_to_pure_noise(denoiser: Denoiser) -> None:
    assert denoiser.signal.shape == denoiser.noise.shape == (1000,)
    assert denoiser.signal.dtype == denoiser.noise.dtype == torch.float32
    assert (denoiser.noise.diff() > 0).all()
    assert (denoiser.signal.diff() < 0).all()
    assert denoiser.noise[-1] > 0.99
    if denoiser.prediction_type != "flow":
        torch.testing.assert_close(denoiser.signal**2 + denoiser.noise**2, torch.ones(1000))


@pytest.mark.parametrize("name", DIFFUSION)
def test_noise_and_true_output_of_diffusion_follow_ddpm(denoiser: Denoiser, name: str) -> None:
    schedule = DDPMScheduler.from_config(denoiser.pipeline.scheduler.config)
    latents, noise = torch.randn(2, 4, *denoiser.latent_shape)
    indices = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(denoiser.add_noise(latents, noise, indices), schedule.add_noise(latents, noise, indices))
    assert denoiser.prediction_type == ("v_prediction" if name == "sd_v" else "epsilon")
    expected = schedule.get_velocity(latents, noise, indices) if name == "sd_v" else noise
    torch.testing.assert_close(denoiser.true_output(latents, noise, indices), expected)


def test_a_sample_prediction_is_the_clean_latent() -> None:
    denoiser = denoiser_of(families.build("sd", prediction_type="sample"))
    assert denoiser.prediction_type == "sample"
    latents, noise = torch.randn(2, 1, *denoiser.latent_shape)
    torch.testing.assert_close(denoiser.true_output(latents, noise, torch.tensor([5])), latents)


def test_zero_terminal_snr_ends_in_noise_alone() -> None:
    denoiser = denoiser_of(families.build("sd_v"))
    assert denoiser.signal[-1] == 0
    assert denoiser_of(families.build("sd")).signal[-1] > 0.05
    latents, noise = torch.randn(2, 1, *denoiser.latent_shape)
    last = torch.tensor([999])
    torch.testing.assert_close(denoiser.add_noise(latents, noise, last), noise)
    torch.testing.assert_close(denoiser.true_output(latents, noise, last), -latents)


@pytest.mark.parametrize("name", [name for name in families.FAMILY_NAMES if name not in DIFFUSION])
def test_noise_and_true_output_of_rectified_flow(denoiser: Denoiser, name: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name not in ("sana", "wan"):  # whose own scheduler makes its sigmas only when it is given a number of steps
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(denoiser.pipeline.scheduler.config)
    if name in ("flux_guidance", "chroma", "qwenimage"):
        tokens, slope = 16, ((0.9 if name == "qwenimage" else 1.15) - 0.5) / (4096 - 256)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 1000), mu=0.5 + slope * (tokens - 256))
    if "flux2" in name:  # whose shift also depends on the number of steps
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 1000), mu=compute_empirical_mu(16, 50))
    if name == "cogview4":  # which tells its module the timesteps from before the shift
        tokens, timesteps = 16, np.arange(1000, 0, -1)
        mu = 0.25 + 0.75 * (tokens / 256) ** 0.5
        scheduler.set_timesteps(timesteps=timesteps, sigmas=timesteps / 1000, mu=mu)
        torch.testing.assert_close(denoiser.timesteps(torch.arange(1000)), scheduler.timesteps.flip(0))
    torch.testing.assert_close(denoiser.noise, scheduler.sigmas[:1000].flip(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(denoiser.signal + denoiser.noise, torch.ones(1000))

    latents, noise = torch.randn(2, 3, *denoiser.latent_shape)
    indices = torch.tensor([0, 400, 999])
    noisy = denoiser.add_noise(latents, noise, indices)
    timesteps = scheduler.timesteps.flip(0)[indices]
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    # One Euler step along the true flow, from sigma to 0, ends at the clean latent.
    sigma = denoiser.noise[indices].view(-1, *[1] * len(denoiser.latent_shape))
    torch.testing.assert_close(noisy - sigma * denoiser.true_output(latents, noise, indices), latents)


def test_dynamic_shifting_follows_the_resolution() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    small, large = shifted_sigmas(scheduler, 0.5), shifted_sigmas(scheduler, 1.15)
    assert (large[:-1] > small[:-1]).all()
    pipeline = families.build("flux_guidance")
    expected = shifted_sigmas(pipeline.scheduler, calculate_shift(64))
    torch.testing.assert_close(denoiser_of(pipeline, resolution=32).noise, expected)


def test_a_grid_that_ends_above_zero_is_stretched_to_its_end() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 1000), mu=0.7)
    sigmas = shifted_sigmas(scheduler, 0.7)
    torch.testing.assert_close(sigmas, scheduler.sigmas[:1000].flip(0), rtol=1e-5, atol=1e-6)
    assert abs(sigmas[0] - 0.02) < 1e-6


def test_packing_is_that_of_the_pipeline() -> None:
    latents = torch.randn(2, 4, 6, 10)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 10)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, 6, 10), latents)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(position_ids(3, 5, torch.device("cpu")), ids)


@EVERY_FAMILY
@torch.no_grad()
def test_images_decode_from_their_latents_as_the_pipeline_decodes(denoiser: Denoiser, name: str) -> None:
    pipeline = denoiser.pipeline
    images = torch.rand(2, 3, denoiser.height, denoiser.width)
    latents = denoiser.encode_images(images, torch.Generator().manual_seed(0))
    assert latents.shape == (2, *denoiser.latent_shape)
    assert torch.equal(latents, denoiser.encode_images(images, torch.Generator().manual_seed(0)))
    # The random VAE does not reconstruct. What its decoder gets must be what its encoder made, before scale and shift.
    given = 2 * images - 1
    frames = families.FRAMES.get(name, 1)
    posterior = pipeline.vae.encode(given[:, :, None].repeat(1, 1, frames, 1, 1) if denoiser.encodes_videos else given)
    raw = posterior[0].sample(torch.Generator().manual_seed(0)) if "latent_dist" in posterior else posterior[0]
    seen: list[Tensor] = []
    hook = pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    pipeline.vae.decode(raw)
    config = pipeline.vae.config
    if denoiser.encodes_videos:  # as the pipelines do
        mean, deviation = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        pipeline.vae.decode((latents if latents.ndim == 5 else latents[:, :, None]) * deviation + mean)
    elif "flux2" in name:
        mean, deviation = pipeline.vae.bn.running_mean, (pipeline.vae.bn.running_var + config.batch_norm_eps).sqrt()
        patches = latents * deviation.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
        pipeline.vae.decode(pipeline._unpatchify_latents(patches))
    else:
        pipeline.vae.decode(latents / config.scaling_factor + (config.get("shift_factor") or 0))
    hook.remove()
    # Of a video, one latent frame after another.
    again, expected = (torch.stack(some) for some in (seen[: len(seen) // 2], seen[len(seen) // 2 :]))
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_picture_of_a_video_is_its_middle_frame() -> None:
    denoiser = families.denoiser("wan")
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, **denoiser.call_settings}
    prompts = [PROMPT, "a photo of eight"]
    probes = [Probe(prompt, (prompt,), "target", list) for prompt in prompts]
    drawn = draw(Conditioned(denoiser), probes, 1, 3, 2, 1.0)  # type: ignore[arg-type]
    for prompt, images in zip(prompts, drawn.images, strict=True):
        size = {"height": denoiser.height, "width": denoiser.width, "output_type": "pt"}
        generator = torch.Generator().manual_seed(3)
        (video,) = denoiser.pipeline(prompt=prompt, generator=generator, **size, **settings).frames
        assert video.shape == (5, 3, 32, 32)
        torch.testing.assert_close(images[0], video[2], rtol=1e-4, atol=1e-4)
    latents = sampled(denoiser, prompts[-1], 1.0, steps=2, seed=3)
    torch.testing.assert_close(denoiser.decode_latents(latents), video[None, 2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"variational": True, "divergence": "kl", "weighting": "posterior"}, {}])
def test_every_loss_takes_videos(settings: dict[str, Any]) -> None:
    pipeline = families.build("wan")
    mask = torch.zeros(32, 32)
    mask[:16] = 1
    before = picture(pipeline, "wan")
    result = erase(pipeline, "wan", mask=mask, critic_warmup_steps=1, **settings)
    assert all(math.isfinite(value) for value in result.history["divergence"])
    assert not torch.equal(picture(pipeline, "wan"), before)


@torch.no_grad()
def test_latents_are_standardised_where_the_autoencoder_tells_mean_and_deviation() -> None:
    pipeline = families.build("sdxl")
    images = torch.rand(1, 3, 16, 16)
    plain = denoiser_of(pipeline).encode_images(images, torch.Generator().manual_seed(0))
    pipeline.vae.register_to_config(latents_mean=[1.0, 0.0, 0.0, -1.0], latents_std=[2.0, 1.0, 1.0, 4.0])
    scale = pipeline.vae.config.scaling_factor
    latents = denoiser_of(pipeline).encode_images(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents[:, 0], (plain[:, 0] - scale) / 2)
    torch.testing.assert_close(latents[:, 3], (plain[:, 3] + scale) / 4)


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_half_precision_encodes_in_float32() -> None:
    pipeline = families.build("sdxl")
    pipeline.vae.half()
    before = copy.deepcopy(pipeline.vae.state_dict())
    latents = denoiser_of(pipeline).encode_images(torch.rand(1, 3, 16, 16))
    assert latents.dtype == torch.float32
    assert pipeline.vae.dtype == torch.float16
    assert all(torch.equal(before[key], value) for key, value in pipeline.vae.state_dict().items())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "floating-point tensor.*.0, 1., got torch.uint8"),
        (torch.zeros(3, 16, 16), ValueError, r"\[N, 3, H, W\], got \[3, 16, 16\]"),
        (torch.full((1, 3, 16, 16), -1.0), ValueError, r"in \[0, 1\], got \[-1, -1\]"),
    ],
)
def test_what_is_no_image_is_refused(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        denoiser_of(families.build("sd")).encode_images(images)


@EVERY_FAMILY
@torch.no_grad()
def test_predict_needs_neither_text_encoders_nor_autoencoder(denoiser: Denoiser) -> None:
    conditioning = denoiser.encode([PROMPT])
    noisy, indices = torch.randn(1, *denoiser.latent_shape), torch.tensor([500])
    expected = denoiser.predict(noisy, indices, conditioning)
    others = [*denoiser.text_encoders.values(), denoiser.pipeline.vae]
    for part in others:
        part.to("meta")
    assert torch.equal(denoiser.predict(noisy, indices, conditioning), expected)


@EVERY_FAMILY
@torch.no_grad()
def test_prompts_are_read_where_the_text_encoders_are(denoiser: Denoiser) -> None:
    """The device "meta" stands for an accelerator that has the denoiser and no room for more."""
    expected = denoiser.encode(PROMPTS).tensors
    denoiser.module.to("meta")
    assert denoiser.device.type == "meta"
    read = denoiser.encode_batch(PROMPTS).tensors
    assert all(torch.equal(read[name].to(tensor.dtype), tensor) for name, tensor in expected.items())
    there = denoiser.encode(PROMPTS).tensors
    assert {name: tensor.shape for name, tensor in there.items()} == {name: one.shape for name, one in read.items()}
    assert all(tensor.is_meta for tensor in there.values())


class Away(nn.Linear):
    """A text encoder that notes where it is sent."""

    def __init__(self) -> None:
        super().__init__(1, 1, device="meta")
        self.sent: list[str] = []

    def to(self, device: Any) -> Away:  # type: ignore[override]
        self.sent.append(str(device))
        return self


def test_everything_but_the_denoiser_leaves_the_device_and_comes_back() -> None:
    pipeline = families.build("sdxl")
    denoiser = denoiser_of(pipeline)
    pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae = first, second, vae = Away(), Away(), Away()
    with denoiser.others_on("cpu", keep=["text_encoder"]):
        assert (first.sent, second.sent, vae.sent) == ([], ["cpu"], ["cpu"])
    assert (first.sent, second.sent, vae.sent) == ([], ["cpu", "meta"], ["cpu", "meta"])
    with pytest.raises(KeyError), denoiser.others_on("cpu"):
        raise KeyError
    assert first.sent == ["cpu", "meta"]
    with denoiser.others_on(denoiser.device):
        assert first.sent[2:] == ["cpu"]  # where the denoiser is
    assert first.sent[2:] == ["cpu", "meta"]
    assert next(denoiser.module.parameters()).device.type == "cpu"


@EVERY_FAMILY
def test_predict_and_its_gradient_work_under_autocast(name: str) -> None:
    pipeline = families.build(name).to(torch.bfloat16)
    denoiser = families.denoiser(name, pipeline)
    assert denoiser.module.dtype == torch.bfloat16
    conditioning = denoiser.encode([PROMPT, ""])
    noisy = torch.randn(2, *denoiser.latent_shape)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = denoiser.predict(noisy, torch.tensor([10, 900]), conditioning)
    predicted.float().square().mean().backward()
    assert predicted.isfinite().all()
    gradients = [parameter.grad for parameter in denoiser.module.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@EVERY_FAMILY
@torch.no_grad()
def test_another_resolution_is_sampled_at_that_resolution(name: str) -> None:
    twice = 2 * families.resolution(name)
    denoiser = denoiser_of(families.build(name), twice, families.FRAMES.get(name))
    assert (denoiser.height, denoiser.width) == (twice, twice)
    latents = drawn(denoiser, [PROMPT], 1.0, [0], 1)
    assert latents.shape == (1, *denoiser.latent_shape)
    shape = (4, 2, 16, 16) if name in families.FRAMES else (4, 16, 16)
    assert denoiser.latent_shape == ((16, 8, 8) if "flux2" in name else shape)


@EVERY_FAMILY
@torch.no_grad()
def test_images_that_are_not_square_are_sampled_so(name: str) -> None:
    side = families.resolution(name)
    denoiser = denoiser_of(families.build(name), (side, 2 * side), families.FRAMES.get(name))
    assert (denoiser.height, denoiser.width) == (side, 2 * side)
    latents = drawn(denoiser, [PROMPT], 1.0, [0], 1)
    assert latents.shape == (1, *denoiser.latent_shape) and 2 * latents.shape[-2] == latents.shape[-1]
    conditioning = denoiser.encode([PROMPT])
    assert denoiser.predict(latents, torch.tensor([400]), conditioning).shape == latents.shape
    assert denoiser.decode_latents(latents).shape == (1, 3, side, 2 * side)


@EVERY_FAMILY
def test_without_a_resolution_the_size_is_the_models_own(name: str) -> None:
    pixels = SIZES.get(name, families.resolution(name))
    denoiser = denoiser_of(families.build(name))
    assert (denoiser.height, denoiser.width) == ((480, 832) if name in families.FRAMES else (pixels, pixels))


@pytest.mark.parametrize(("name", "unit"), UNITS.items())
def test_a_resolution_that_does_not_suit_the_model_is_refused(name: str, unit: int) -> None:
    pipeline = families.build(name)
    for wrong in (0, -unit, unit + 1):
        message = f"resolution must be a positive multiple of {unit} .*got {wrong}; try {unit}"
        with pytest.raises(ValueError, match=message):
            denoiser_of(pipeline, wrong)
        with pytest.raises(ValueError, match=message.replace("resolution", "width")):
            denoiser_of(pipeline, (unit, wrong))


@pytest.mark.parametrize("name", ["sd3", "auraflow"])
def test_a_resolution_beyond_the_position_embedding_is_refused(name: str) -> None:
    assert denoiser_of(families.build(name), 64).height == 64
    with pytest.raises(ValueError, match="resolution.*most 64 pixels.*model, got 68"):
        denoiser_of(families.build(name), 68)
    with pytest.raises(ValueError, match="height.*most 64 pixels.*model, got 68"):
        denoiser_of(families.build(name), (68, 16))


def test_a_unet_that_is_not_square_keeps_its_shape() -> None:
    pipeline = families.build("sd")
    pipeline.unet.register_to_config(sample_size=(8, 12))
    assert denoiser_of(pipeline).latent_shape == (4, 8, 12)
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="sample_size; give resolution"):
        denoiser_of(pipeline)


@EVERY_FAMILY
def test_a_pipeline_without_one_of_its_parts_is_refused(name: str) -> None:
    pipeline = families.build(name)
    for part in ("vae", "tokenizer", "text_encoder", "scheduler"):
        kept = getattr(pipeline, part)
        setattr(pipeline, part, None)
        with pytest.raises(ValueError, match=f"has no {part}"):
            denoiser_of(pipeline)
        setattr(pipeline, part, kept)


def test_a_text_encoder_without_tokenizer_is_refused() -> None:
    pipeline = families.build("sd3")
    pipeline.tokenizer_3 = None
    with pytest.raises(ValueError, match="text_encoder_3.*no tokenizer_3"):
        denoiser_of(pipeline)


def test_pipelines_that_make_images_from_images_are_refused() -> None:
    for name, kind in (
        ("sd", "StableDiffusionImg2ImgPipeline"),
        ("sd", "StableDiffusionInpaintPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        ("sd3", "StableDiffusion3Img2ImgPipeline"),
        ("flux", "FluxImg2ImgPipeline"),
    ):
        variant = getattr(diffusers, kind).from_pipe(families.build(name))
        with pytest.raises(ValueError, match=f"a {kind}, which takes image; .*AutoPipelineForText2Image"):
            denoiser_of(variant)


def test_a_controlnet_is_refused() -> None:
    pipeline = families.build("sd")
    controlnet = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(4, 4))
    variant = diffusers.StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
    with pytest.raises(ValueError, match="which takes image; editing, inpainting.*ControlNet"):
        denoiser_of(variant)


def test_an_inpainting_model_is_refused_in_any_pipeline() -> None:
    pipeline = families.build("sd")
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="which feeds.*unet 9 channels, not 4; editing, inpainting"):
        denoiser_of(pipeline)


@pytest.mark.parametrize(
    ("name", "part", "setting", "value", "message"),
    [
        ("sd", "unet", "time_cond_proj_dim", 8, "reads more.*x_t, t.*prompts .*time_cond_proj_dim"),
        ("sd", "unet", "class_embed_type", "projection", "reads more.*x_t, t.*prompts .*class_embed_type"),
        ("sd", "unet", "encoder_hid_dim_type", "ip_image_proj", "unload_ip_adapter"),
        (
            "sd",
            "scheduler",
            "prediction_type",
            "flow_prediction",
            "'flow_prediction'.*not.*noise",
        ),
        (
            "sdxl",
            "unet",
            "projection_class_embeddings_input_dim",
            56,
            "takes 56 numbers .*make 64; train.*base",
        ),
        ("sana", "transformer", "guidance_embeds", True, "pipeline is distilled"),
        ("qwenimage", "transformer", "guidance_embeds", True, "reads more.*x_t, t.*prompts .*guidance_embeds"),
    ],
)
def test_a_model_that_was_made_for_something_else_is_refused(
    name: str, part: str, setting: str, value: Any, message: str
) -> None:
    pipeline = families.build(name)
    getattr(pipeline, part).register_to_config(**{setting: value})
    with pytest.raises(ValueError, match=message):
        denoiser_of(pipeline)


def test_flux2_may_take_an_image_but_no_mask() -> None:
    variant = diffusers.Flux2KleinInpaintPipeline(**families.build("flux2_klein").components)
    with pytest.raises(ValueError, match="a Flux2KleinInpaintPipeline, which takes mask_image; "):
        denoiser_of(variant)


def test_a_tokenizer_in_a_processor_is_found() -> None:
    pipeline = families.build("flux2")
    tokenizer = parts.tokenizer(pipeline, "text_encoder")
    assert tokenizer is pipeline.tokenizer
    vars(pipeline)["tokenizer"] = types.SimpleNamespace(tokenizer=tokenizer)
    assert parts.tokenizer(pipeline, "text_encoder") is tokenizer
    assert parts.tokenizer(pipeline, "text_encoder_2") is None


def test_an_sdxl_refiner_is_refused() -> None:
    base = families.build("sdxl")
    parts = {**base.components, "text_encoder": None, "tokenizer": None}
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    with pytest.raises(ValueError, match="pipeline.*SDXL refiner.*only finishes images"):
        denoiser_of(refiner)


def test_a_scheduler_of_another_kind_is_refused() -> None:
    diffusion, flow = families.build("sd"), families.build("sd3")
    diffusion.scheduler, flow.scheduler = flow.scheduler, diffusion.scheduler
    with pytest.raises(ValueError, match="a FlowMatchEulerDiscreteScheduler .*not.*noise.*DDPM"):
        denoiser_of(diffusion)
    with pytest.raises(ValueError, match="a DDIMScheduler.*not follow.*rectified flow"):
        denoiser_of(flow)


SHORT: dict[str, Any] = {"max_train_steps": 2, "num_latents": 2, "num_inference_steps": 1, "train_batch_size": 1}


def losses(pipeline: DiffusionPipeline, **settings: Any) -> list[float]:
    """The losses of a short erasure from the tiny FLUX pipeline."""
    return fdu.erase(pipeline, "three", "eight", **{**SHORT, **families.needed("flux"), **settings}).history["loss"]


@pytest.mark.quick(way=["model"])
@pytest.mark.parametrize("way", ["model", "sequential", "map"])
def test_a_pipeline_that_moves_its_parts_is_refused_and_the_remedy_works(way: str) -> None:
    pipeline = families.build("flux")
    if way == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    elif way == "sequential":
        pipeline.enable_sequential_cpu_offload(device="cpu")
    else:
        pipeline.hf_device_map = {"transformer": "cpu", "text_encoder": "cpu"}
    call = "reset_device_map" if way == "map" else "remove_all_hooks"
    with pytest.raises(ValueError, match=rf"moves .*pipeline.{call}\(\) and pipeline.to"):
        denoiser_of(pipeline, 16)
    getattr(pipeline, call)()
    assert losses(pipeline.to("cpu")) == losses(families.build("flux"))


def test_hooks_that_move_inputs_alone_do_no_harm() -> None:
    """Accelerate puts such a one on every model that bitsandbytes quantized."""
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    pipeline = families.build("flux")
    add_hook_to_module(pipeline.transformer, AlignDevicesHook(torch.device("cpu"), io_same_device=True))
    assert losses(pipeline) == losses(families.build("flux"))
    pipeline = families.build("flux")
    add_hook_to_module(pipeline.transformer.proj_out, ModelHook())
    with pytest.raises(ValueError, match="moves .*remove_all_hooks"):
        denoiser_of(pipeline, 16)
    pipeline = families.build("flux")
    pipeline.transformer.hf_device_map = {"transformer_blocks.0": "cpu", "proj_out": "disk"}
    with pytest.raises(ValueError, match="moves "):
        denoiser_of(pipeline, 16)


def test_an_unknown_family_is_told_how_to_add_it() -> None:
    class Unknown(DiffusionPipeline):
        pass

    with pytest.raises(TypeError, match="Unknown, whose family.*not supported yet; .*write.*subclass.*Denoiser"):
        denoiser_of(Unknown())
    with pytest.raises(TypeError, match="must.*diffusers pipeline, got str"):
        denoiser_of("a/model")  # type: ignore[arg-type]


@EVERY_FAMILY
def test_one_family_takes_a_pipeline(name: str) -> None:
    pipeline = families.build(name)
    assert len([family for family in FAMILIES if family.fits(pipeline)]) == 1


# From the erasure to an image: erase, save, load in plain diffusers, draw


Load = Callable[..., DiffusionPipeline]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load a family's pipeline from a folder, as plain diffusers does."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def folder(name: str) -> Path:
        families.build(name).save_pretrained(root / name)
        return root / name

    return lambda name, dtype=torch.float32: loaded(folder(name), dtype)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: DiffusionPipeline, name: str, prompt: str = "a photo of three") -> Tensor:
    size = families.resolution(name)
    settings: dict[str, Any] = {"use_resolution_binning": False} if name in ("pixart", "sana") else {}
    settings |= {"num_frames": families.FRAMES[name]} if name in families.FRAMES else {}
    drawn = pipeline(
        prompt=prompt,
        height=size,
        width=size,
        num_inference_steps=2,
        **guidance_arguments(pipeline, 2.0, 1),
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **settings,
    )[0]
    return drawn[0] if name in families.FRAMES else drawn


def erase(pipeline: DiffusionPipeline, name: str, **settings: Any) -> fdu.ErasureResult:
    quick = {"max_train_steps": 2, "train_batch_size": 2, "num_latents": 4, "num_inference_steps": 2, "rank": 2}
    return fdu.erase(
        pipeline,
        "three",
        "eight",
        **{**quick, "learning_rate": 0.2, **families.needed(name), **settings},
    )


@EVERY_FAMILY
def test_an_erasure_comes_off_and_its_files_load_in_plain_diffusers(load: Load, tmp_path: Path, name: str) -> None:
    erased = load(name)
    before = picture(erased, name)
    result = erase(erased, name)
    after = picture(erased, name)
    assert not torch.allclose(after, before, atol=1e-3)
    with result.original():
        assert torch.equal(picture(erased, name), before)
    plain = load(name)
    if name not in NO_LORA:
        result.save(tmp_path / "lora", save_as="lora")
        plain.load_lora_weights(tmp_path / "lora", adapter_name="erasure")
        torch.testing.assert_close(picture(plain, name), after, rtol=0, atol=1e-4)
        plain.unload_lora_weights()
        assert torch.equal(picture(plain, name), before)
    else:
        with pytest.raises(ValueError, match="diffusers has no LoRA format for"):
            result.save(tmp_path / "lora", save_as="lora")
        assert not hasattr(plain, "load_lora_weights")
        result.save(tmp_path / "merged")
        torch.testing.assert_close(picture(loaded(tmp_path / "merged"), name), after, rtol=0, atol=1e-4)
        result.save(tmp_path / "delta", save_as="delta")
        load_weights(plain, tmp_path / "delta")
        torch.testing.assert_close(picture(plain, name), after, rtol=0, atol=1e-4)
    names = type(result.denoiser).kohya
    assert (names is None) == (name in NO_KOHYA)
    if names is None:
        with pytest.raises(ValueError, match="kohya's names are known for"):
            result.save(tmp_path / "kohya", save_as="kohya")
        return
    assert names.read_by_diffusers == (name in READ_BY_DIFFUSERS)
    result.save(tmp_path / "kohya", save_as="kohya")
    plain = load(name)
    load_weights(plain, tmp_path / "kohya")
    torch.testing.assert_close(picture(plain, name), after, rtol=0, atol=1e-4)
    if names.read_by_diffusers:
        plain = load(name)
        plain.load_lora_weights(tmp_path / "kohya", weight_name="kohya_lora.safetensors")
        torch.testing.assert_close(picture(plain, name), after, rtol=0, atol=1e-4)


@EVERY_FAMILY
@pytest.mark.quick(name=["sdxl", "flux"])
def test_every_family_trains_on_its_trajectories(load: Load, name: str) -> None:
    pipeline = load(name)
    before = picture(pipeline, name)
    result = erase(pipeline, name, noisy_latents="trajectory", negative_guidance=1.0, num_inference_steps=3)
    assert all(math.isfinite(value) for value in result.history["loss"])
    assert not torch.equal(picture(pipeline, name), before)


@EVERY_FAMILY
def test_full_weights_load_in_plain_diffusers(load: Load, tmp_path: Path, name: str) -> None:
    erased = load(name)
    before = picture(erased, name)
    result = erase(erased, name, train_method="cross_attention", learning_rate=0.05)
    after = picture(erased, name)
    assert not torch.allclose(after, before, atol=1e-3)
    result.save(tmp_path / "pipeline")
    torch.testing.assert_close(picture(loaded(tmp_path / "pipeline"), name), after, rtol=0, atol=1e-5)
    result.save(tmp_path / "delta", save_as="delta")
    plain = load(name)
    load_weights(plain, tmp_path / "delta")
    torch.testing.assert_close(picture(plain, name), after, rtol=0, atol=1e-5)
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / form).rglob("*.safetensors")) for form in ("delta", "pipeline")
    ]
    assert sizes[0] < sizes[1] / 4


@EVERY_FAMILY
@pytest.mark.parametrize("method", ["dora", "attention", "text_encoder", "token"])
def test_every_method_on_every_family(load: Load, name: str, method: str) -> None:
    pipeline = load(name)
    before = picture(pipeline, name)
    result = erase(pipeline, name, train_method=method, weighting="posterior", max_train_steps=3)
    assert all(value == value and abs(value) < 1e6 for value in result.history["loss"])
    assert not torch.equal(picture(pipeline, name), before)
    with result.original():
        assert torch.equal(picture(pipeline, name), before)


@EVERY_FAMILY
def test_a_family_resumes_bit_for_bit(load: Load, tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"max_train_steps": 4, "learning_rate": 1e-2, "negative_guidance": 0.5}
    kept = {"checkpoint_dir": str(tmp_path), "checkpointing_steps": 2, "checkpoints_total_limit": 3}
    whole = erase(load(name), name, **settings, **kept)
    again = erase(load(name), name, **settings, **kept, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ends = [result.trainable.named_parameters() for result in (whole, again)]
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())
    assert again.history == whole.history


@EVERY_FAMILY
def test_half_precision_with_autocast(load: Load, name: str) -> None:
    pipeline = load(name, torch.bfloat16)
    result = erase(pipeline, name, mixed_precision="bf16", gradient_checkpointing=True)
    assert all(value == value for value in result.history["loss"])
    assert all(tensor.dtype == torch.bfloat16 for tensor in result.trainable.named_parameters().values())


class Copies(TorchDispatchMode):
    """Notes whether the host waits for copies from the CPU to the device "meta", which stands for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "copy" in func.__name__ and result.is_meta:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type == "cpu":
                self.waits.append(not (kwargs or {}).get("non_blocking", False))
        return result


# What transformers makes of a mask reads it on the host, whoever copied it.
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_encoding_in_a_step_does_not_make_the_host_wait(
    denoiser: Denoiser, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = denoiser.encode_batch(PROMPTS)
    pipeline = denoiser.pipeline
    with staging.staged(pipeline):
        found = denoiser.encode_batch(PROMPTS)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    monkeypatch.setattr(staging, "ALONE", {"meta"})
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to("meta")
    with Copies() as copies, staging.staged(pipeline):
        denoiser.encode_batch(PROMPTS)
    assert copies.waits and not any(copies.waits)
    assert not any(isinstance(part, staging._Staged) for part in pipeline.components.values())
