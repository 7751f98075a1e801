"""Training data: conditionings and latents, which the frozen model makes once, and batches of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fdu.concepts import Pair, joined, weights_of
from fdu.config import EraseConfig
from fdu.models.denoiser import Conditioning, Denoiser, Trajectories
from fdu.models.offloading import offloads
from fdu.models.staging import to_device
from fdu.training.cache import Cache, token_key
from fdu.training.timesteps import TimestepSampler

MANY, FEWEST_LATENTS = 10, 8
"""If there are more concepts, at least so many latents for each are sampled; a quarter of them goes to preservation."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """The source of all batches. The concepts follow one another, each with the same number of latents.

    Prompts are given by their index in ``texts``, in int64 on the CPU.
    """

    texts: tuple[str, ...]
    """Every prompt once."""
    conditioning: Conditioning
    """The prompts as the frozen model reads them, [prompts, ...]."""
    target: Tensor
    """The targets' prompts, [pairs]."""
    anchor: Tensor
    """Their anchors' prompts, [pairs]."""
    preserved: Tensor
    """The prompts to preserve, [K]."""
    concept: Tensor
    """The number of the concept of each pair, [pairs]; on the CPU."""
    pair: Tensor
    """The number of the pair that each latent of a concept shows, [latents of concepts]; on the CPU."""
    latents_per_concept: int
    """Latents of each concept."""
    latents: Tensor
    """Clean latents [M, C, H, W] fp32, on the device: of the concepts, then of the preserved prompts."""
    steps: Tensor | None = None
    """The indices on the grid at which alone the model is trained, [S]; on the CPU. None for the whole grid."""
    trajectories: Tensor | None = None
    """x_t of each latent at each of the steps, [M, S, C, H, W] fp32, on the CPU; None to add noise to the latents."""
    weights: Tensor | None = None
    """How often a prompt of each concept is drawn, relative to the others, [concepts]; on the CPU. None: equally."""
    added: Conditioning | None = None
    """What is added to the prompts as an encoder reads them, [prompts, ...]; None for nothing. ``conditioning`` has it
    already."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A conditioning that still draws an erased concept: what to add to the prompts of its target."""

    concept: int
    """The number of the concept."""
    moves: dict[str, Tensor]
    """By name of a tensor of the conditioning: to its first embeddings, [tokens, d], or to all of it, [d]; fp32."""

    def added(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is added to the tensors of a conditioning of N prompts, in their shapes."""
        found = {}
        for name, tensor in tensors.items():
            if name not in self.moves:
                continue
            addend, moves = torch.zeros_like(tensor), self.moves[name].to(tensor)
            if tensor.ndim == 3:
                addend[:, : len(moves)] = moves[: addend.shape[1]]
            else:
                addend += moves
            found[name] = addend
        return found

    def moved(self, conditioning: Conditioning) -> Conditioning:
        """A conditioning with this added."""
        return plus(conditioning, self.added(conditioning.tensors))


def plus(conditioning: Conditioning, added: Mapping[str, Tensor]) -> Conditioning:
    """A conditioning with something added to its tensors."""
    moved = {name: conditioning.tensors[name] + addend.to(conditioning.tensors[name]) for name, addend in added.items()}
    return Conditioning({**conditioning.tensors, **moved})


def with_found(examples: Examples, found: Sequence[Found], phrasings: int) -> Examples:
    """The examples with conditionings that still draw the targets: prompts of the target, moved by each, which are to
    become what the anchor's prompts are. At most half of the samples that erase are of these.

    Args:
        examples: without any.
        found: the conditionings.
        phrasings: how many prompts of a target each moves.
    """
    if not found:
        return examples
    rows: list[int] = []
    moved: list[Conditioning] = []
    addends: list[dict[str, Tensor]] = []
    pairs: list[int] = []
    device = examples.latents.device
    for one in found:
        own = (examples.concept == one.concept).nonzero().flatten().tolist()
        chosen = [own[place] for place in spread(len(own), min(len(own), phrasings))]
        texts = examples.target[chosen]
        rows += texts.tolist()
        pairs += chosen
        read = examples.conditioning[texts.to(device)]
        addends.append(one.added(read.tensors))
        moved.append(plus(read, addends[-1]))
    first, plain = len(examples.texts), len(examples.target)
    again = torch.arange(max(len(rows) - plain, 0)) % plain
    names = addends[0]
    none = {name: torch.zeros_like(examples.conditioning.tensors[name]) for name in names}
    return dataclasses.replace(
        examples,
        texts=(*examples.texts, *(examples.texts[row] for row in rows)),
        conditioning=Conditioning.cat([examples.conditioning, *moved]),
        target=torch.cat([examples.target, first + torch.arange(len(rows)), examples.target[again]]),
        anchor=torch.cat([examples.anchor, examples.anchor[pairs], examples.anchor[again]]),
        concept=torch.cat([examples.concept, examples.concept[pairs], examples.concept[again]]),
        added=Conditioning({name: torch.cat([none[name], *(addend[name] for addend in addends)]) for name in names}),
    )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples of one batch: ``size`` that erase, then as many that preserve, if preservation has a weight."""

    size: int
    noisy: Tensor
    """x_t [N, C, H, W]."""
    indices: Tensor
    """Indices [N] on the timestep grid."""
    timestep_weight: Tensor | None
    """Weights [size] that compensate unevenly drawn timesteps; None for uniform ones."""
    noise: Tensor | None
    """The true outputs of the erasing samples, [size, C, H, W], if the objective is "noise"; otherwise None."""
    reads: Tensor
    """The prompt that the trained model reads for each sample, an index of ``Examples.texts``, [N]; on the CPU."""
    anchors: Tensor
    """The prompt whose frozen output is its target: the anchor's, or the preserved one itself, [N]; on the CPU."""

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """One batch from several of equal size: all samples that erase, then all that preserve."""
        size = batches[0].size
        values: dict[str, Any] = {"size": size * len(batches)}
        for name in ("noisy", "indices", "timestep_weight", "noise", "reads", "anchors"):
            own = [getattr(batch, name) for batch in batches if getattr(batch, name) is not None]
            kinds = [part[:size] for part in own] + [part[size:] for part in own]
            values[name] = torch.cat(kinds) if kinds else None
        return cls(**values)

    def parted(self, outputs: Tensor, count: int) -> list[Tensor]:
        """Split outputs [N, ...] of this batch among the ``count`` batches that it was joined from."""
        kinds = [kind.chunk(count) for kind in outputs.split(self.size)]
        return [torch.cat(parts) for parts in zip(*kinds, strict=True)]

    def to(self, device: torch.device | str) -> Batch:
        """The batch with what the denoiser reads on another device."""
        # Towards the CPU the host must wait: it would read memory that the copy has not reached.
        waits = torch.device(device).type == "cpu"
        return self._with(lambda tensor: tensor.to(device, non_blocking=not waits))

    def pinned(self) -> Batch:
        """A batch on the CPU with what the denoiser reads in pinned memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name not in ("reads", "anchors")
        }
        return dataclasses.replace(self, **changed)


def prepare_examples(
    denoiser: Denoiser, pairs: Sequence[Pair], config: EraseConfig, accelerator: Accelerator, cache: Cache
) -> Examples:
    """Encode the prompts and sample the latents, all with the model as it is before the erasure."""
    targets, anchors = (joined([pair[side] for pair in pairs]) for side in (0, 1))
    preserved = preserved_prompts(pairs, config)
    texts = tuple(dict.fromkeys([*targets.prompts, *anchors.prompts, *preserved]))
    key: dict[str, object] = {"prompts": texts}
    if cache.folder is not None:
        key["tokens"] = token_key(denoiser, list(texts))

    def encode() -> dict[str, Tensor]:
        # Text encoders beside offloaded blocks may have no room on the device.
        home = denoiser.text_device if offloads(denoiser.module) else denoiser.device
        with denoiser.others_on(home, keep=("vae",)):
            return denoiser.encode(texts).tensors

    encoded = Conditioning(cache.get("prompts", key, encode)).to(denoiser.device)

    each, preserving = latent_counts(config, len(pairs), accelerator.num_processes)
    drawn: list[str] = []
    pair_of: list[int] = []
    concept: list[int] = []
    for number, (target, anchor) in enumerate(pairs):
        # The noise in a latent is an answer to the prompt that it was drawn with: the anchor's.
        from_target = 0 if config.objective == "noise" else each // 2
        from_target = each if config.noisy_latents == "trajectory" else from_target
        for prompts, count in ((target.prompts, from_target), (anchor.prompts, each - from_target)):
            chosen = spread(len(prompts), count)
            drawn += [prompts[index] for index in chosen]
            pair_of += [len(concept) + index for index in chosen]
        concept += [number] * len(target.prompts)
    drawn += [preserved[index] for index in spread(len(preserved), preserving)]
    key = {
        **key,
        "drawn": drawn,
        "steps": config.num_inference_steps,
        "guidance_scale": config.sampling_guidance,
        "seed": config.seed,
        "mixed_precision": config.mixed_precision,
    }
    trajectories = None
    if config.noisy_latents == "trajectory" or config.timestep_sampling == "inference":
        trajectories = Trajectories(keeps_noisy=config.noisy_latents == "trajectory")
        key["trajectories"] = trajectories.keeps_noisy

    def places(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([texts.index(prompt) for prompt in prompts])

    def sample() -> dict[str, Tensor]:
        chosen = places(drawn).tolist()
        with denoiser.others_on("cpu"), accelerator.autocast():
            return _sample(denoiser, encoded, chosen, texts.index(""), config, accelerator, trajectories)

    found = cache.get("latents", key, sample)
    weights = weights_of(pairs)
    return Examples(
        texts=texts,
        conditioning=encoded,
        target=places(targets.prompts),
        anchor=places(anchors.prompts),
        preserved=places(preserved),
        concept=torch.tensor(concept),
        weights=None if weights is None else torch.tensor(weights),
        pair=torch.tensor(pair_of),
        latents_per_concept=each,
        latents=found["latents"].to(denoiser.device),
        steps=found.get("steps"),
        trajectories=found.get("trajectories"),
    )


def latent_counts(config: EraseConfig, concepts: int = 1, processes: int = 1) -> tuple[int, int]:
    """How many latents are sampled for each concept, and for the preserved prompts."""
    # No more than the steps can use: each draws train_batch_size of either kind, a process and an accumulation.
    kinds = 2 if config.preservation_weight else 1
    least = FEWEST_LATENTS * concepts if concepts > MANY else 0
    usable = max(kinds * batch_count(config) * config.train_batch_size * processes, 2)
    wanted = min(max(config.num_latents, least), usable)
    preserving = wanted // 4 if config.preservation_weight else 0
    return max((wanted - preserving) // concepts, 1), preserving


def batch_count(config: EraseConfig) -> int:
    """How many batches a process draws in a run."""
    steps = config.max_train_steps * config.gradient_accumulation_steps
    return min(steps, config.frozen_batches) if config.frozen_batches else steps


def preserved_prompts(pairs: Sequence[Pair], config: EraseConfig) -> tuple[str, ...]:
    """The prompts to preserve: the empty one, and those of the settings or else the anchors'."""
    anchors = joined([anchor for _, anchor in pairs])
    return tuple(dict.fromkeys(["", *(config.preservation_prompts or anchors.prompts)]))


def spread(of: int, count: int) -> list[int]:
    """``count`` indices below ``of``: evenly spaced, or in turn if ``count`` is larger."""
    return [index * of // count if count < of else index % of for index in range(count)]


def _sample(
    denoiser: Denoiser,
    conditioning: Conditioning,
    chosen: Sequence[int],
    empty: int,
    config: EraseConfig,
    accelerator: Accelerator,
    trajectories: Trajectories | None,
) -> dict[str, Tensor]:
    """A latent of each chosen prompt, and what its sampler passed if that is wanted; every process draws a share of
    them, and all have all."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = range(len(chosen))[len(chosen) * rank // processes : len(chosen) * (rank + 1) // processes]
    latents = torch.empty(0, *denoiser.latent_shape)
    if share:
        latents = denoiser.draw_latents(
            conditioning,
            chosen[share.start : share.stop],
            empty,
            config.num_inference_steps,
            config.sampling_guidance,
            [config.seed + index for index in share],
            config.sample_batch_size,
            accelerator.is_local_main_process,
            trajectories,
        )
    parts = [(latents, trajectories)]
    if processes > 1:
        parts = gather_object([(latents.cpu(), trajectories)])
        latents = torch.cat([part for part, _ in parts])
    found = {"latents": latents}
    passed = [one for _, one in parts if one is not None and one.indices]
    if passed:
        found["steps"] = torch.tensor(passed[0].indices)
        if passed[0].keeps_noisy:
            found["trajectories"] = torch.cat([one.noisy for one in passed])
    return found


def draw_batch(
    denoiser: Denoiser,
    examples: Examples,
    config: EraseConfig,
    sampler: TimestepSampler,
    generator: torch.Generator,
    rank: int = 0,
    processes: int = 1,
) -> Batch:
    """This process's share of a batch.

    All processes draw the same whole batch, so that a run does not depend on their number.
    """
    size, total = config.train_batch_size, config.train_batch_size * processes
    share = slice(rank * size, (rank + 1) * size)

    def choose(of: int, concept: Tensor | None = None) -> Tensor:
        """Numbers below ``of``; with the concept of each, by its weight."""
        if concept is None or examples.weights is None:
            return torch.randint(of, (total,), generator=generator)
        return torch.multinomial(examples.weights[concept], total, replacement=True, generator=generator)

    each = examples.latents_per_concept
    if config.objective == "noise":
        chosen = choose(len(examples.pair), torch.arange(len(examples.pair)) // each)
        pairs = examples.pair[chosen]
    else:
        pairs = choose(len(examples.target), examples.concept)
        chosen = choose(len(examples.pair))
        # A prompt is paired with latents of its concept.
        chosen = examples.concept[pairs] * each + chosen % each
    reads, anchors = examples.target[pairs], examples.anchor[pairs]
    if config.preservation_weight:
        kept = examples.preserved[choose(len(examples.preserved))]
        reads, anchors = torch.cat([reads, kept]), torch.cat([anchors, kept])
        chosen = torch.cat([chosen, choose(len(examples.latents))])
    noise = torch.randn((len(chosen), *examples.latents.shape[1:]), generator=generator)
    places = torch.zeros(0, dtype=torch.long)
    if examples.steps is not None:
        places = torch.randint(len(examples.steps), (len(chosen),), generator=generator)
        indices, weight = examples.steps[places], None
    elif sampler.adapts:
        # By the erasing loss, whose weights say nothing of the preserving one.
        indices, weight = sampler.draw(total, generator)
        uniform = torch.randint(len(denoiser.signal), (len(chosen) - total,), generator=generator)
        indices = torch.cat([indices, uniform])
    else:
        indices, weight = sampler.draw(len(chosen), generator)

    def shared(drawn: Tensor) -> Tensor:
        """This process's samples of both kinds, of [total or 2 total, ...]."""
        return torch.cat([part[share] for part in drawn.split(total)])

    def here(drawn: Tensor) -> Tensor:
        return to_device(shared(drawn), denoiser.device)

    if examples.trajectories is not None:
        noisy = to_device(examples.trajectories[shared(chosen), shared(places)], denoiser.device)
    latents, noise, indices = examples.latents[here(chosen)], here(noise), here(indices)
    if examples.trajectories is None:
        noisy = denoiser.add_noise(latents, noise, indices)
    knows_noise = config.objective == "noise"
    return Batch(
        size=size,
        noisy=noisy,
        indices=indices,
        timestep_weight=None if weight is None else here(weight),
        noise=denoiser.true_output(latents[:size], noise[:size], indices[:size]) if knows_noise else None,
        reads=shared(reads),
        anchors=shared(anchors),
    )
