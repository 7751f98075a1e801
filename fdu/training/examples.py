"""What the loop trains on: conditionings and latents, made once by the frozen model; and batches of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fdu.concepts import Pair, joined
from fdu.config import EraseConfig
from fdu.denoisers import Conditioning, Denoiser
from fdu.training.cache import Cache
from fdu.training.timesteps import TimestepSampler

LATENT_BATCH = 32
"""Latents sampled at a time."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts in words and as the frozen model reads them, [P, ...]."""

    texts: tuple[str, ...]
    conditioning: Conditioning


@dataclasses.dataclass(frozen=True)
class Examples:
    """All that the loop draws its batches from. G concepts lie one after the other, each with as many latents."""

    target: Prompts
    """The prompts of the targets."""
    anchor: Prompts
    """The prompts of the anchors, aligned with the targets'."""
    preserved: Prompts
    """The prompts to keep."""
    concept: Tensor
    """To which of the concepts each target's prompt belongs, [P]."""
    latents: Tensor
    """Clean latents [M, C, H, W] fp32: those of the concepts first, then those of the preserved prompts."""
    latents_per_concept: int
    """How many of the latents belong to each concept."""
    pair: Tensor
    """Of which target's prompt, or its anchor's, each of the concepts' latents was drawn, [latents of concepts]."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples of one batch: ``size`` that erase, then as many that preserve, if preservation has a weight."""

    size: int
    noisy: Tensor
    """x_t [N, C, H, W]."""
    indices: Tensor
    """Indices [N] of the grid of timesteps."""
    timestep_weight: Tensor | None
    """[size], what makes up for timesteps that are drawn unevenly; None if they are not."""
    true_output: Tensor
    """What a denoiser that knew the noise would predict for the samples that erase, [size, C, H, W]."""
    texts: list[str]
    """The prompts that the trained model reads."""
    conditioning: Conditioning
    """The same prompts as the frozen model reads them."""
    anchor: Conditioning
    """The prompts whose frozen output the trained model is to give: the anchors', then the preserved ones."""


def prepare_examples(
    denoiser: Denoiser, pairs: Sequence[Pair], config: EraseConfig, accelerator: Accelerator, cache: Cache
) -> Examples:
    """Encode every prompt once and sample the latents, all with the model as it is before the erasure."""
    targets, anchors = (joined([pair[side] for pair in pairs]) for side in (0, 1))
    preserved = tuple(dict.fromkeys(["", *(config.preservation_prompts or anchors.prompts)]))
    unique = tuple(dict.fromkeys([*targets.prompts, *anchors.prompts, *preserved]))
    tensors = cache.get("prompts", {"prompts": unique}, lambda: denoiser.encode(unique).tensors)
    encoded = Conditioning(tensors).to(denoiser.device)
    place = {prompt: index for index, prompt in enumerate(unique)}

    def prompts(texts: tuple[str, ...]) -> Prompts:
        return Prompts(texts, encoded[torch.tensor([place[text] for text in texts], device=denoiser.device)])

    # No more than the steps can use: each draws train_batch_size of either kind, a process and an accumulation.
    kinds = 2 if config.preservation_weight else 1
    steps = config.max_train_steps * config.gradient_accumulation_steps
    if config.frozen_batches:
        steps = min(steps, config.frozen_batches)
    wanted = min(config.num_latents, max(kinds * steps * config.train_batch_size * accelerator.num_processes, 2))
    preserving = wanted // 4 if config.preservation_weight else 0
    each = max((wanted - preserving) // len(pairs), 1)
    drawn: list[str] = []
    pair_of: list[int] = []
    concept: list[int] = []
    for number, (target, anchor) in enumerate(pairs):
        # The noise in a latent is an answer to the prompt that it was drawn with: the anchor's.
        from_target = 0 if config.objective == "noise" else each // 2
        for texts, count in ((target.prompts, from_target), (anchor.prompts, each - from_target)):
            chosen = spread(len(texts), count)
            drawn += [texts[index] for index in chosen]
            pair_of += [len(concept) + index for index in chosen]
        concept += [number] * len(target.prompts)
    drawn += [preserved[index] for index in spread(len(preserved), preserving)]
    key = {
        "prompts": drawn,
        "steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
        "resolution": config.resolution,
    }
    latents = cache.get("latents", key, lambda: {"latents": _sample(denoiser, drawn, config, accelerator)})["latents"]
    return Examples(
        target=prompts(targets.prompts),
        anchor=prompts(anchors.prompts),
        preserved=prompts(preserved),
        concept=torch.tensor(concept),
        latents=latents.to(denoiser.device),
        latents_per_concept=each,
        pair=torch.tensor(pair_of),
    )


def spread(of: int, count: int) -> list[int]:
    """``count`` indices below ``of``: evenly over all where these are more, again and again where they are fewer."""
    if count < of:
        return [index * of // count for index in range(count)]
    return [index % of for index in range(count)]


def _sample(denoiser: Denoiser, prompts: list[str], config: EraseConfig, accelerator: Accelerator) -> Tensor:
    """A latent a prompt; every process draws a share of them, and all have all."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = slice(len(prompts) * rank // processes, len(prompts) * (rank + 1) // processes)
    latents = denoiser.draw_latents(
        prompts[share],
        config.num_inference_steps,
        config.guidance_scale,
        [config.seed + index for index in range(len(prompts))][share],
        LATENT_BATCH,
    )
    return torch.cat(gather_object([latents.cpu()])).to(denoiser.device) if processes > 1 else latents


def draw_batch(
    denoiser: Denoiser,
    examples: Examples,
    config: EraseConfig,
    sampler: TimestepSampler,
    generator: torch.Generator,
    rank: int = 0,
    processes: int = 1,
) -> Batch:
    """This process's share of a batch that all processes draw alike.

    So a run depends on the whole batch alone, not on how many processes share it.
    """
    size, total = config.train_batch_size, config.train_batch_size * processes
    share = slice(rank * size, (rank + 1) * size)

    def choose(of: int) -> Tensor:
        return torch.randint(of, (total,), generator=generator)

    each = examples.latents_per_concept
    if config.objective == "noise":
        chosen = choose(len(examples.pair))
        pairs = examples.pair[chosen]
    else:
        pairs = choose(len(examples.target.texts))
        chosen = choose(len(examples.pair))
        # A prompt meets the latents of its own concept.
        chosen = examples.concept[pairs] * each + chosen % each
    kept = None
    if config.preservation_weight:
        kept = choose(len(examples.preserved.texts))
        chosen = torch.cat([chosen, choose(len(examples.latents))])
    noise = torch.randn((len(chosen), *examples.latents.shape[1:]), generator=generator)
    indices, weight = sampler.draw(len(chosen), generator)

    def shared(drawn: Tensor) -> Tensor:
        """This process's samples of both kinds, of [total or 2 total, ...]."""
        return torch.cat([part[share] for part in drawn.split(total)]).to(denoiser.device, non_blocking=True)

    texts = [examples.target.texts[pair] for pair in pairs[share].tolist()]
    pairs_here = pairs[share].to(denoiser.device)
    conditioning, anchor = examples.target.conditioning[pairs_here], examples.anchor.conditioning[pairs_here]
    if kept is not None:
        texts += [examples.preserved.texts[index] for index in kept[share].tolist()]
        keeping = examples.preserved.conditioning[kept[share].to(denoiser.device)]
        conditioning, anchor = Conditioning.cat([conditioning, keeping]), Conditioning.cat([anchor, keeping])
    latents, noise, indices = examples.latents[shared(chosen)], shared(noise), shared(indices)
    return Batch(
        size=size,
        noisy=denoiser.add_noise(latents, noise, indices),
        indices=indices,
        timestep_weight=None if weight is None else shared(weight)[:size],
        true_output=denoiser.true_output(latents[:size], noise[:size], indices[:size]),
        texts=texts,
        conditioning=conditioning,
        anchor=anchor,
    )
