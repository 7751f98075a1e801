"""Erase a concept: train the denoiser to answer the target's prompts as the frozen one answers the anchor's."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

import fdu_kernels
from fdu.concepts import Concept, ConceptLike, ConceptType, concept_pair
from fdu.config import EraseConfig
from fdu.denoiser import UNetDenoiser, denoiser_of
from fdu.result import ErasureResult
from fdu.trainable import Trainable, attach

LATENT_BATCH = 32
"""Latents sampled at a time."""
CHECK_EVERY = 10
"""Steps between looks at the loss, each of which waits for the device."""


def erase(
    pipeline: DiffusionPipeline,
    target: ConceptLike,
    anchor: ConceptLike,
    *,
    concept_type: ConceptType = "object",
    config: EraseConfig | None = None,
    **settings: Any,
) -> ErasureResult:
    """Erase ``target`` from ``pipeline``: its prompts come to mean what ``anchor``'s mean now.

    Minimises E[D_f(p_frozen(x_{t-1} | x_t, anchor) || p_trained(x_{t-1} | x_t, target))] over x_t and t (Novello et
    al. 2026, arXiv 2509.21167), while the frozen outputs on the preserved prompts are kept.

    Args:
        pipeline: a diffusers text-to-image pipeline, on the device to train on. It is changed in place and is
            ``result.pipeline``; within ``result.original()`` it draws as before.
        target: the concept to erase: a name, a ``.txt`` file of prompts, a :class:`fdu.Concept`, or prompts.
        anchor: what takes its place: a superclass ("painting"), another concept, or "" for nothing.
        concept_type: "object" or "style": the phrasings a name is put into.
        config: the settings; or give single ones by name in ``settings``, as ``fdu.EraseConfig`` names them.

    Raises:
        ValueError, TypeError, FileNotFoundError: a wrong argument, named, before any work is done.
        RuntimeError: the loss became NaN or infinite; the pipeline draws as before.
    """
    target, anchor = concept_pair(target, anchor, concept_type)
    config = _settle(config, settings)
    denoiser = denoiser_of(pipeline)
    _check_run(denoiser, target, config)
    started = time.perf_counter()
    examples = prepare_examples(denoiser, target, anchor, config)
    on_gpu = denoiser.device.type == "cuda"
    with torch.random.fork_rng(devices=[denoiser.device] if on_gpu else []):
        torch.default_generator.manual_seed(config.seed)
        if on_gpu:
            with torch.cuda.device(denoiser.device):
                torch.cuda.manual_seed(config.seed)
        trainable = attach(denoiser, config)
    try:
        with _own_accelerator(config, denoiser.device) as accelerator:
            sigma, history = train(accelerator, denoiser, trainable, examples, config)
    except BaseException:
        trainable.remove()
        raise
    trainable.finish()
    return ErasureResult(pipeline, target, anchor, config, trainable, history, sigma, time.perf_counter() - started)


@contextmanager
def _own_accelerator(config: EraseConfig, device: torch.device) -> Iterator[Accelerator]:
    """An Accelerator for this erasure alone: accelerate would keep device and precision of a process's first one."""
    states = (AcceleratorState, PartialState, GradientState)
    kept = [dict(state._shared_state) for state in states]
    for state in states:
        state._reset_state()
    try:
        yield Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=device.type == "cpu",
            device_placement=False,  # the pipeline is where its user put it
        )
    finally:
        for state, content in zip(states, kept, strict=True):
            state._shared_state.clear()
            state._shared_state.update(content)


def _check_run(denoiser: UNetDenoiser, target: Concept, config: EraseConfig) -> None:
    """Refuse what cannot be trained, before any work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError("erase runs in one process; start it without accelerate launch or torchrun")
    if config.mixed_precision == "no" and denoiser.module.dtype != torch.float32:
        raise ValueError(
            f"pipeline is in {denoiser.module.dtype} but mixed_precision is 'no'; "
            "load it with dtype=torch.float32, or choose mixed_precision 'fp16' or 'bf16'"
        )
    if config.mixed_precision == "fp16" and denoiser.device.type == "cpu":
        raise ValueError("mixed_precision 'fp16' needs a GPU, and the pipeline is on the CPU; use 'bf16' or 'no'")
    if getattr(denoiser.module, "peft_config", {}):
        raise ValueError(
            f"pipeline already carries adapters ({', '.join(denoiser.module.peft_config)}); make them part of it with "
            "pipeline.fuse_lora() and pipeline.unload_lora_weights(), or load it afresh"
        )
    contradicted = sorted(set(config.preservation_prompts) & set(target.prompts))
    if contradicted:
        raise ValueError(f"preservation_prompts holds {contradicted[0]!r}, a prompt of the target; take it out")


def _settle(config: EraseConfig | None, settings: dict[str, Any]) -> EraseConfig:
    """The one configuration that ``config`` or the single settings describe."""
    unknown = sorted(set(settings) - set(EraseConfig.field_names()))
    if unknown:
        raise TypeError(f"unknown setting {unknown[0]!r}; the settings are {', '.join(EraseConfig.field_names())}")
    if config is None:
        return EraseConfig(**settings)
    if settings:
        raise TypeError(f"give either config or single settings, not both; got config and {', '.join(settings)}")
    return config


@dataclasses.dataclass(frozen=True)
class Examples:
    """All that the loop trains on, computed once with the frozen model."""

    target: Tensor
    """Embeddings [pairs, tokens, width] of the target's prompts."""
    anchor: Tensor
    """Embeddings [pairs, tokens, width] of the anchor's prompts, in the same order."""
    preserved: Tensor
    """Embeddings [prompts, tokens, width] of the prompts to keep."""
    latents: Tensor
    """Clean latents [num_latents, C, H, W]: those of the target and the anchor first, then of the preserved prompts."""
    num_erasing: int
    """How many of the latents, from the first, belong to the target and the anchor."""


def prepare_examples(denoiser: UNetDenoiser, target: Concept, anchor: Concept, config: EraseConfig) -> Examples:
    """Encode every prompt once and sample the latents, all with the model as it is before the erasure."""
    preserved = tuple(dict.fromkeys(["", *(config.preservation_prompts or anchor.prompts)]))
    unique = tuple(dict.fromkeys([*target.prompts, *anchor.prompts, *preserved]))
    embeddings = dict(zip(unique, denoiser.encode(unique), strict=True))

    preserving = config.num_latents // 4 if config.preservation_weight else 0
    erasing = config.num_latents - preserving
    shares = ((target.prompts, erasing // 2), (anchor.prompts, erasing - erasing // 2), (preserved, preserving))
    prompts = [prompt for group, count in shares for prompt in spread(group, count)]
    latents = denoiser.draw_latents(
        prompts, config.num_inference_steps, config.guidance_scale, config.seed, LATENT_BATCH
    )

    def stack(group: tuple[str, ...]) -> Tensor:
        return torch.stack([embeddings[prompt] for prompt in group])

    return Examples(stack(target.prompts), stack(anchor.prompts), stack(preserved), latents, erasing)


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """``count`` of the prompts: evenly over all of them where they are more, again and again where they are fewer."""
    if count < len(prompts):
        return [prompts[index * len(prompts) // count] for index in range(count)]
    return list(itertools.islice(itertools.cycle(prompts), count))


def train(
    accelerator: Accelerator, denoiser: UNetDenoiser, trainable: Trainable, examples: Examples, config: EraseConfig
) -> tuple[float, dict[str, list[float]]]:
    """The training loop. Returns sigma and the history: loss, divergence, preservation and distance of every step."""
    divergence = fdu_kernels.get_divergence(config.divergence)
    criterion = fdu_kernels.GaussianDivergenceLoss(
        divergence, sigma=config.sigma, s0=config.s0, distance=config.distance
    ).to(denoiser.device)
    # Standardised to h'(0) = 1, so that learning rate and preservation weight mean the same for every divergence.
    # Where f has a kink the slope at 0 is infinite or zero, and the slope at s = 1 stands in.
    slope = divergence.slope_at_zero
    if not 0 < slope < math.inf:
        slope = float(divergence.profile_grad(torch.ones((), dtype=torch.float64)))

    parameters = trainable.parameters()
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    denoiser.module, optimizer, schedule = accelerator.prepare(denoiser.module, optimizer, schedule)

    draws = torch.Generator().manual_seed(config.seed)
    size = config.train_batch_size
    course: list[Tensor] = []
    try:
        progress = tqdm(range(config.max_train_steps), desc="erase", unit="step")
        for step in progress:
            terms = []
            for _ in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(denoiser.module):
                    noisy, timesteps, context, frozen_context = make_batch(denoiser, examples, config, draws)
                    with torch.no_grad(), trainable.frozen():
                        frozen = denoiser.predict(noisy, timesteps, frozen_context)
                    predicted = denoiser.predict(noisy, timesteps, context)

                    erased = criterion(predicted[:size], frozen[:size]) / slope
                    kept = erased.new_zeros(())
                    if config.preservation_weight:
                        kept = fdu_kernels.gaussian_divergence(
                            predicted[size:], frozen[size:], "mse", sigma=criterion.sigma, distance=config.distance
                        )
                    loss = erased + config.preservation_weight * kept
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad(set_to_none=True)
                with torch.no_grad():
                    distances = fdu_kernels.squared_distance(predicted[:size], frozen[:size], distance=config.distance)
                    terms.append(torch.stack([loss, erased, kept, distances.median()]))
            course.append(torch.stack(terms).mean(0))
            if step % CHECK_EVERY == 0 or step + 1 == config.max_train_steps:
                _check_finite(torch.stack(course[-CHECK_EVERY:])[:, 0], step)
                progress.set_postfix(loss=f"{course[-1][0].item():.4f}")
    finally:
        denoiser.module = accelerator.unwrap_model(denoiser.module, keep_fp32_wrapper=False)
        vars(denoiser.module).pop("forward", None)  # unwrapping pins the class's own method to the module
    columns = torch.stack(course).T.tolist() if course else [[]] * 4
    return float(criterion.sigma), dict(zip(("loss", "divergence", "preservation", "distance"), columns, strict=True))


def make_batch(
    denoiser: UNetDenoiser, examples: Examples, config: EraseConfig, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps, and the prompts' embeddings for the trained and for the frozen model.

    The first ``train_batch_size`` samples erase: the trained model reads the target, the frozen one the anchor. As many
    again preserve, where that has a weight: both read the same prompt.
    """

    def choose(count: int, of: int) -> Tensor:
        return torch.randint(of, (count,), generator=draws).to(denoiser.device, non_blocking=True)

    size = config.train_batch_size
    pairs = choose(size, len(examples.target))
    chosen = choose(size, examples.num_erasing)
    context, frozen_context = examples.target[pairs], examples.anchor[pairs]
    if config.preservation_weight:
        kept = examples.preserved[choose(size, len(examples.preserved))]
        chosen = torch.cat([chosen, choose(size, len(examples.latents))])
        context, frozen_context = torch.cat([context, kept]), torch.cat([frozen_context, kept])
    latents = examples.latents[chosen]
    noise = torch.randn(latents.shape, generator=draws).to(denoiser.device, non_blocking=True)
    timesteps = denoiser.random_timesteps(len(latents), draws)
    return denoiser.add_noise(latents, noise, timesteps), timesteps, context, frozen_context


def _check_finite(losses: Tensor, step: int) -> None:
    """Raise RuntimeError if one of the losses up to ``step`` is not finite."""
    wrong = (~torch.isfinite(losses)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise RuntimeError(
            f"the loss became {losses[first].item()} at step {step + 1 - len(losses) + first}; "
            "the pipeline draws as before. Lower learning_rate, or lower s0 if the divergence grows exponentially "
            "(pearson_chi2, alpha > 1)"
        )
