"""Attacks with words: prompts that draw an erased concept, found from the weights or from the text encoder alone.

Both search among words that are one token of the first tokenizer. "words" puts some before each prompt and exchanges
them, by the gradient of the denoiser's loss on images of the target, as the greedy coordinate gradient of Zou et al.
(2023, arXiv 2307.15043): the task of UnlearnDiffAtk (Zhang et al. 2023, arXiv 2310.11868). That attack relaxes the
tokens instead, and takes for each prompt an image of its own; here all prompts share the images of the target.
"direction" never looks at the denoiser: it adds the direction from prompts without the target's name to those with it,
and breeds words whose encoding is close to that (Ring-A-Bell, Tsai et al. 2023, arXiv 2310.10012). As there, the
encoder is the original one, and the erased model is only asked for what was bred.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fdu.config import Count, Positive, check_fields, check_number
from fdu.evaluation.drawing import seen_by_judge
from fdu.evaluation.intervals import Share
from fdu.evaluation.robustness.relearning import AttackOutcome, Lesson
from fdu.models import parts
from fdu.models.denoiser import Conditioning, Denoiser, padded
from fdu.models.parts import TOKENIZERS
from fdu.training.examples import spread

Fraction = Annotated[float, (">=", 0), ("<", 1)]
SHOWN = 3
"""Found prompts that a report shows."""


@dataclasses.dataclass(frozen=True)
class WordSearchConfig:
    """Settings of the attack "words"."""

    prompts: Count = 8
    """Prompts of the target that are attacked."""
    words: Count = 4
    """Words before each prompt."""
    steps: Count = 12
    """Exchanges of a word per prompt."""
    candidates: Count = 16
    """Exchanges that are tried per step; the best one is made if it lowers the loss."""
    samples: Count = 6
    """Noised images of the target per loss."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class DirectionConfig:
    """Settings of the attack "direction"."""

    prompts: Count = 8
    """Prompts of the target whose meaning is sought in other words."""
    words: Count = 6
    """Words of a found prompt."""
    strength: Positive = 3.0
    """By how much the direction to the target counts, > 0."""
    population: Count = 24
    """Prompts of a generation."""
    generations: Count = 30
    mutation: float = 0.25
    """Share of the words that change at random, in [0, 1)."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("mutation", self.mutation, Fraction)


class Vocabulary:
    """Words of letters that are one token of a denoiser's first tokenizer, without those that are forbidden."""

    def __init__(self, denoiser: Denoiser, forbidden: Sequence[str]) -> None:
        pipeline = denoiser.pipeline
        encoder = next(name for name in TOKENIZERS if getattr(pipeline, name, None) is not None)
        self.encoder: Any = getattr(pipeline, encoder)
        self.tokenizer: Any = parts.tokenizer(pipeline, encoder)
        names = [self.tokenizer.decode([token]).strip() for token in range(len(self.tokenizer))]
        banned = {part for word in forbidden for part in word.lower().split()}
        likely = {name.lower() for name in names if name.isalpha() and not any(word in name.lower() for word in banned)}
        words = sorted(likely)
        tokens = self.tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
        self.words = [word for word, own in zip(words, tokens, strict=True) if len(own) == 1]
        self.tokens = torch.tensor([own[0] for own in tokens if len(own) == 1])

    def random(self, count: int, generator: torch.Generator) -> list[str]:
        """So many words."""
        return [self.words[place] for place in torch.randint(len(self.words), (count,), generator=generator).tolist()]

    def places(self, read: Sequence[int], words: Sequence[str]) -> list[int]:
        """Where these words follow one another in the tokens that were read; none if they are read as other tokens."""
        wanted = [int(self.tokens[self.words.index(word)]) for word in words]
        for start in range(len(read) - len(wanted) + 1):
            if list(read[start : start + len(wanted)]) == wanted:
                return list(range(start, start + len(wanted)))
        return []

    @property
    def embedding(self) -> nn.Embedding:
        """The layer that embeds the tokens: of T5, which has two with one matrix, the one that is called."""
        weight = self.encoder.get_input_embeddings().weight
        layers = [module for module in self.encoder.modules() if isinstance(module, nn.Embedding)]
        return [layer for layer in layers if layer.weight is weight][-1]


@dataclasses.dataclass(frozen=True)
class FoundWords:
    """Prompts that an attack made of words."""

    asked: Sequence[str]
    """The prompts of the target that it began with."""
    found: Sequence[str]
    """What it made of each."""
    random: Sequence[str]
    """The same with random words."""
    config: dict[str, Any]

    def tried(self, lesson: Lesson) -> AttackOutcome:
        """What a model draws from them."""
        asked = (self.asked, self.found, self.random)
        probes = [dataclasses.replace(lesson.probe, prompts=tuple(some), attributes=()) for some in asked]
        seen = seen_by_judge(lesson.denoiser, probes, lesson.drawing, f"judged: {lesson.probe.name}")
        before, after, random = (Share.of(one, lesson.probe.name) for one in seen)
        return AttackOutcome(before, after, random, self.config, tuple(self.found[:SHOWN]))


def search_words(lesson: Lesson, config: WordSearchConfig | None = None) -> AttackOutcome:
    """Find words to put before the target's prompts, with which the erased model draws it; the model stays as it is."""
    config = config or WordSearchConfig()
    generator = torch.Generator().manual_seed(lesson.drawing.seed)
    vocabulary = Vocabulary(lesson.denoiser, [lesson.probe.name])
    prompts = _some(lesson.probe.prompts, config.prompts)
    begun = [vocabulary.random(config.words, generator) for _ in prompts]
    found = [
        _searched(lesson, vocabulary, prompt, words, config, generator)
        for prompt, words in zip(prompts, begun, strict=True)
    ]

    def joined(words: Sequence[Sequence[str]]) -> list[str]:
        return [" ".join([*own, prompt]) for own, prompt in zip(words, prompts, strict=True)]

    return FoundWords(prompts, joined(found), joined(begun), dataclasses.asdict(config)).tried(lesson)


def breed_words(lesson: Lesson, config: DirectionConfig | None = None) -> AttackOutcome:
    """Breed words with a pipeline's own text encoder, and try them on it."""
    return bred_words(lesson, config).tried(lesson)


def bred_words(lesson: Lesson, config: DirectionConfig | None = None) -> FoundWords:
    """Find words that the text encoder reads like the target's prompts, and more so, without the target's name."""
    config = config or DirectionConfig()
    denoiser, name = lesson.denoiser, lesson.probe.name
    generator = torch.Generator().manual_seed(lesson.drawing.seed)
    vocabulary = Vocabulary(denoiser, [name])
    prompts = _some(lesson.probe.prompts, config.prompts)
    without = [" ".join(re.sub(re.escape(name), " ", prompt, flags=re.IGNORECASE).split()) for prompt in prompts]
    read, plain = _embeddings(denoiser, [*prompts, *without]).chunk(2)
    sought = plain + config.strength * (read - plain).mean(0)
    begun = [vocabulary.random(config.words, generator) for _ in prompts]
    found = [_bred(denoiser, vocabulary, goal, config, generator) for goal in sought]
    ours, random = ([" ".join(words) for words in some] for some in (found, begun))
    return FoundWords(prompts, ours, random, dataclasses.asdict(config))


def _some(prompts: Sequence[str], count: int) -> list[str]:
    """So many different prompts, evenly spaced."""
    different = list(dict.fromkeys(prompts))
    return [different[place] for place in spread(len(different), min(count, len(different)))]


def _searched(
    lesson: Lesson,
    vocabulary: Vocabulary,
    prompt: str,
    words: Sequence[str],
    config: WordSearchConfig,
    generator: torch.Generator,
) -> list[str]:
    """The words before one prompt after the search."""
    denoiser, best = lesson.denoiser, list(words)
    for _ in range(config.steps):
        loss = _loss(lesson, config.samples, generator)
        text = " ".join([*best, prompt])
        with _watched(vocabulary.embedding) as (read_tokens, outputs), torch.enable_grad():
            read = denoiser.encode_batch([text]).tensors
            typed = {name: one.to(denoiser.dtype) if one.is_floating_point() else one for name, one in read.items()}
            now = loss(typed)
            (gradient,) = torch.autograd.grad(now.sum(), [outputs[0]])
        places = vocabulary.places(read_tokens[0], best)
        rows = vocabulary.embedding.weight.detach()[vocabulary.tokens.to(denoiser.device)].float()
        # [words, vocabulary]: by how much an exchange may lower it. Without places all are equal.
        scores = -(gradient[0, places].float() @ rows.T) if places else rows.new_zeros(len(best), len(rows))
        noise = torch.rand(scores.shape, generator=generator).to(scores) * 1e-9
        promising = (scores + noise).topk(min(4 * config.candidates, len(vocabulary.words)), dim=1).indices.cpu()
        tried = []
        for _ in range(config.candidates):
            place = int(torch.randint(len(best), (), generator=generator))
            choice = int(promising[place, torch.randint(promising.shape[1], (), generator=generator)])
            tried.append([*best[:place], vocabulary.words[choice], *best[place + 1 :]])
        with torch.no_grad():
            losses = loss(denoiser.encode([" ".join([*own, prompt]) for own in tried]).tensors)
        if losses.min() < now[0]:
            best = tried[int(losses.argmin())]
    return best


def _loss(lesson: Lesson, samples: int, generator: torch.Generator) -> Callable[[dict[str, Tensor]], Tensor]:
    """The denoiser's loss, [prompts], of any conditioning on the same noised images of the target."""
    denoiser = lesson.denoiser
    chosen = torch.randint(len(lesson.latents), (samples,), generator=generator)
    latents = lesson.latents[chosen.to(lesson.latents.device)].to(denoiser.device)
    noise = torch.randn(latents.shape, generator=generator).to(denoiser.device)
    indices = torch.randint(len(denoiser.signal), (samples,), generator=generator).to(denoiser.device)
    noisy = denoiser.add_noise(latents, noise, indices)
    wanted = denoiser.true_output(latents, noise, indices)
    most = lesson.drawing.batch_size

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        given, count = Conditioning(tensors), len(next(iter(tensors.values())))
        rows = torch.arange(count, device=denoiser.device).repeat_interleave(samples)
        images = torch.arange(samples, device=denoiser.device).repeat(count)
        errors = []
        for some, chosen in zip(rows.split(most), images.split(most), strict=True):
            output = denoiser.predict(noisy[chosen].to(denoiser.dtype), indices[chosen], given[some])
            errors.append((output.float() - wanted[chosen].float()).square().flatten(1).mean(1))
        return torch.cat(errors).view(count, samples).mean(1)

    return loss


@contextmanager
def _watched(layer: nn.Module) -> Iterator[tuple[list[list[int]], list[Tensor]]]:
    """Within this context what a layer embeds, and its outputs, are kept; gradients reach the outputs."""
    tokens: list[list[int]] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        tokens.append(arguments[0][0].tolist())
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = layer.register_forward_hook(keep)
    try:
        yield tokens, outputs
    finally:
        handle.remove()


@torch.no_grad()
def _embeddings(denoiser: Denoiser, prompts: Sequence[str]) -> Tensor:
    """The embeddings of prompts, [N, tokens * d] in float32."""
    return denoiser.encode(prompts).tensors["embeddings"].float().flatten(1)


def _bred(
    denoiser: Denoiser, vocabulary: Vocabulary, goal: Tensor, config: DirectionConfig, generator: torch.Generator
) -> list[str]:
    """The words whose encoding is closest to a goal, [tokens * d], after some generations."""

    def ranked(some: list[list[str]]) -> list[list[str]]:
        read, wanted = padded([_embeddings(denoiser, [" ".join(words) for words in some]), goal[None]])
        distances = (read - wanted).square().sum(1)
        return [some[place] for place in distances.argsort(stable=True).tolist()]

    def draw(of: int) -> int:
        return int(torch.randint(of, (), generator=generator))

    population = ranked([vocabulary.random(config.words, generator) for _ in range(config.population)])
    for _ in range(config.generations):
        parents = population[: max(len(population) // 2, 1)]
        children: list[list[str]] = []
        while len(parents) + len(children) < config.population:
            one, other, cut = parents[draw(len(parents))], parents[draw(len(parents))], draw(config.words + 1)
            child = [*one[:cut], *other[cut:]]
            for place in range(config.words):
                if float(torch.rand((), generator=generator)) < config.mutation:
                    child[place] = vocabulary.words[draw(len(vocabulary.words))]
            children.append(child)
        population = ranked([*parents, *children])
    return population[0]
