"""Robust erasure: conditionings that still draw a target are searched for, and erased together with its prompts.

A search moves some embeddings of the target's prompts until the erased model denoises images of the target well again:
the model's own loss on latents of the target, as in concept inversion (Pham et al. 2023, arXiv 2308.01508). In the
order "search_first" the searches are made in a training that is thrown away, and the concept is erased once, with all
that was found (STEREO, Srivatsan et al. 2024, arXiv 2408.16807). In the order "alternate" one training goes on between
the searches. AdvUnlearn (Zhang et al. 2024, arXiv 2405.15234) alternates too, but trains the text encoder, and searches
before it and in every step; here a few searches move what it puts out, so that a run costs a few searches more. A
closed form is computed again after each search (RECE, Gong et al. 2024, arXiv 2407.12383, which solves for its
conditionings instead).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fdu.concepts import Pair
from fdu.config import EraseConfig
from fdu.models.denoiser import Denoiser
from fdu.training.examples import Examples, Found, with_found
from fdu.training.methods.perturbation import Perturbation
from fdu.training.process_state import seeded
from fdu.training.reconstruction import learn_images

TOKENS = 4
"""Embeddings that a search may move, from the start of the prompt."""
LEARNING_RATE = 0.1
"""Of a search, in units of the embeddings' root mean square."""
START = 0.5
"""The first search of a round begins at the prompt, the others at noise of this size, in the same unit."""
PHRASINGS = 8
"""Prompts of a target that are erased with what a search found."""


@dataclasses.dataclass
class Adversary:
    """Searches for conditionings that still draw the targets, and remembers what it found.

    Args:
        accelerator, denoiser, pairs, config: those of the erasure.
        examples: its training data without anything found.
        steps: the optimizer steps after which a search is due, in order.
    """

    accelerator: Accelerator
    denoiser: Denoiser
    pairs: Sequence[Pair]
    config: EraseConfig
    examples: Examples
    steps: Sequence[int]
    rounds: int = 0
    """Searches made so far."""
    found: list[Found] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.examples.latents_per_concept < 2:
            raise ValueError(
                "adversarial_rounds needs images of each target: raise num_latents, or the steps that use them"
            )

    def due(self, step: int) -> bool:
        """Whether a search is due after so many steps."""
        return self.rounds < len(self.steps) and self.steps[self.rounds] <= step

    def search(self) -> Examples:
        """Search with the model as it is now; the training data with all that was found so far."""
        count = self.config.adversarial_conditionings
        with _bare(self.denoiser):
            for concept in range(len(self.pairs)):
                for number in range(count):
                    self.found.append(self._one(concept, self.rounds * count + number, bool(number)))
        self.rounds += 1
        return self.extended()

    def extended(self) -> Examples:
        """The training data with all that was found so far."""
        return with_found(self.examples, self.found, PHRASINGS)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was found, for a checkpoint."""
        return {"rounds": self.rounds, "found": [[one.concept, one.moves] for one in self.found]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.rounds, device = state["rounds"], self.denoiser.device
        self.found = []
        for concept, named in state["found"]:
            self.found.append(Found(concept, {name: moves.to(device) for name, moves in named.items()}))

    def _one(self, concept: int, number: int, noisy: bool) -> Found:
        config, denoiser, examples = self.config, self.denoiser, self.examples
        # Latents that the original model drew for the target's prompts, and these prompts.
        each = examples.latents_per_concept
        chosen = slice(concept * each, concept * each + each // 2)
        prompts = examples.target[examples.pair[chosen]]
        rows, shown = prompts.unique(return_inverse=True)
        texts = [examples.texts[row] for row in rows.tolist()]
        seed = config.seed + 1 + number
        generator = torch.Generator().manual_seed(seed)
        start = START if noisy else 0.0
        moved = Perturbation(denoiser, texts[0], TOKENS, start, generator, config.adversarial_bound)
        try:
            with seeded(seed, denoiser.device):
                learn_images(
                    self.accelerator,
                    denoiser,
                    moved,
                    texts,
                    examples.conditioning[rows.to(denoiser.device)],
                    examples.latents[chosen],
                    shown,
                    "search",
                    max_train_steps=config.adversarial_steps,
                    train_batch_size=config.train_batch_size,
                    learning_rate=LEARNING_RATE,
                    mixed_precision=str(self.accelerator.mixed_precision),
                    seed=seed,
                )
            return Found(concept, moved.addends())
        finally:
            moved.remove()


def search_steps(config: EraseConfig) -> list[int]:
    """The steps of a training after which searches are due: evenly spaced, and at its end if it is thrown away."""
    parts = config.adversarial_rounds + (config.adversarial_order == "alternate")
    return [config.max_train_steps * number // parts for number in range(1, config.adversarial_rounds + 1)]


def keys_of(found: Sequence[Found]) -> dict[str, Tensor]:
    """What was found as named tensors, for a cache; :func:`from_keys` undoes it."""
    return {
        f"{place} {one.concept} {name}": moves for place, one in enumerate(found) for name, moves in one.moves.items()
    }


def from_keys(tensors: dict[str, Tensor], device: torch.device) -> list[Found]:
    """Undo :func:`keys_of`."""
    gathered: dict[int, Found] = {}
    for key in sorted(tensors, key=lambda key: int(key.split()[0])):
        place, concept, name = key.split(" ", 2)
        gathered.setdefault(int(place), Found(int(concept), {})).moves[name] = tensors[key].to(device)
    return list(gathered.values())


@contextmanager
def _bare(denoiser: Denoiser) -> Iterator[None]:
    """Within this context the denoiser calls its module without what the training has put around it."""
    wrapped = denoiser.module
    denoiser.module = getattr(denoiser.pipeline, denoiser.module_name)
    try:
        yield
    finally:
        denoiser.module = wrapped
