"""Fine-tuning on images of the target with the erasure's training loop; shared by attack and relearning."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fdu.config import EraseConfig
from fdu.evaluation import Probe
from fdu.evaluation.robustness.judging import Course, JudgedSampling, Share, count, spaced
from fdu.models.denoiser import Denoiser
from fdu.training.cache import Cache
from fdu.training.examples import Examples
from fdu.training.loop import Training
from fdu.training.methods import Trainable
from fdu.training.objective import Objective
from fdu.training.process import own_accelerator
from fdu.training.step import Stepper

AUTOCAST: dict[torch.dtype, Any] = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""The mixed precision that suits the dtype of a model's weights."""


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Images of the target that a pipeline learns from, and how it is judged on the way."""

    denoiser: Denoiser
    """Of the pipeline, erased or not."""
    probe: Probe
    """The target's prompts, and who judges the images."""
    latents: Tensor
    """Clean latents [M, C, H, W] of the target, of :func:`fdu.evaluation.robustness.judging.target_latents`; latent i
    shows prompt i, modulo their number."""
    drawing: JudgedSampling = dataclasses.field(default_factory=JudgedSampling)
    """How judged images are drawn."""
    drawn_before: float = 1.0
    """The share that the target's prompts alone drew before the erasure, half of which counts as back."""

    def judged(self) -> Share:
        """The share of images that show the target now."""
        return count(self.denoiser, self.probe, self.drawing)

    def learn(self, trainable: Trainable, config: Any, course: Course, seed: int, description: str) -> list[float]:
        """Minimise the squared error of the denoiser on noised latents, by AdamW at a constant rate.

        Args:
            trainable: what is trained.
            config: has ``steps``, ``learning_rate``, ``batch_size``, and ``looks``: how often the pipeline is judged.
            course: gets the steps at which the pipeline is judged, and the shares.
            seed: of timesteps and noise.
            description: what the progress bar says.

        Returns:
            The loss of every step: the mean squared error of the denoiser's output.
        """

        def watch(step: int) -> None:
            course.append((step, self.judged()))

        denoiser, texts = self.denoiser, tuple(dict.fromkeys(self.probe.prompts))
        settings = EraseConfig(
            objective="noise",
            divergence="mse",
            sigma=1.0,
            preservation_weight=0.0,
            lr_scheduler="constant",
            max_train_steps=config.steps,
            train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            mixed_precision=AUTOCAST.get(denoiser.dtype, "bf16"),
            seed=seed,
        )
        places = torch.arange(len(texts))
        with torch.no_grad():
            conditioning = denoiser.encode(texts)
        examples = Examples(
            texts=texts,
            conditioning=conditioning,
            target=places,
            anchor=places,
            preserved=torch.empty(0, dtype=torch.long),
            concept=torch.zeros(len(texts), dtype=torch.long),
            pair=torch.arange(len(self.latents)) % len(texts),
            latents_per_concept=len(self.latents),
            latents=self.latents.to(denoiser.device),
        )
        with own_accelerator(settings, denoiser.device) as accelerator:
            cache = Cache(None, {}, accelerator)
            stepper = Stepper(
                accelerator, denoiser, trainable, examples, Objective(denoiser, settings), settings, cache
            )
            watched = spaced(config.steps, config.looks)
            return Training(stepper, None, watched, watch, description).run()["divergence"]
