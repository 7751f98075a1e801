"""Training on images of a concept: the denoiser's own loss, which restores a concept or finds what still draws it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fdu.config import EraseConfig
from fdu.models.denoiser import Conditioning, Denoiser
from fdu.training.cache import Cache
from fdu.training.examples import Examples
from fdu.training.loop import Training
from fdu.training.methods import Trainable
from fdu.training.objective import Objective
from fdu.training.step import Stepper

AUTOCAST: dict[torch.dtype, Any] = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""The mixed precision that suits the dtype of a model's weights."""


def learn_images(
    accelerator: Accelerator,
    denoiser: Denoiser,
    trainable: Trainable,
    texts: Sequence[str],
    conditioning: Conditioning,
    latents: Tensor,
    shown: Tensor,
    description: str,
    watched: Collection[int] = (),
    watch: Callable[[int], None] | None = None,
    **settings: object,
) -> list[float]:
    """Minimise the squared error of the denoiser on noised latents, by AdamW at a constant rate.

    Args:
        accelerator: of the device and precision of the run.
        denoiser: the model.
        trainable: what is trained.
        texts: prompts, each once.
        conditioning: the prompts as the model reads them; a trainable that trains text reads them again.
        latents: clean latents [M, C, H, W].
        shown: the prompt that each latent shows, an index of ``texts``, [M] on the CPU.
        description: label of the progress bar.
        watched, watch: as :class:`fdu.training.loop.Training` takes them.
        settings: of :class:`fdu.EraseConfig`: max_train_steps, train_batch_size, learning_rate, mixed_precision,
            gradient_checkpointing, seed.

    Returns:
        The loss of every step: the mean squared error of the denoiser's output.
    """
    config = EraseConfig.from_settings(
        {
            "objective": "noise",
            "divergence": "mse",
            "sigma": 1.0,
            "preservation_weight": 0.0,
            "lr_scheduler": "constant",
            **settings,
        }
    )
    places = torch.arange(len(texts))
    examples = Examples(
        texts=tuple(texts),
        conditioning=conditioning,
        target=places,
        anchor=places,
        preserved=torch.empty(0, dtype=torch.long),
        concept=torch.zeros(len(texts), dtype=torch.long),
        pair=shown,
        latents_per_concept=len(latents),
        latents=latents.to(denoiser.device),
    )
    cache, objective = Cache(None, {}, accelerator), Objective(denoiser, config)
    stepper = Stepper(accelerator, denoiser, trainable, examples, objective, config, cache)
    return Training(stepper, None, watched, watch, description).run()["divergence"]
