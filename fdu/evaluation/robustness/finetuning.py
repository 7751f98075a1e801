"""Fine-tuning on images of the target with the erasure's training loop; shared by attack and relearning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fdu.config import EraseConfig
from fdu.models.denoiser import Denoiser
from fdu.training.cache import Cache
from fdu.training.examples import Examples
from fdu.training.loop import Training
from fdu.training.methods import Trainable
from fdu.training.objective import Objective
from fdu.training.process import own_accelerator

AUTOCAST: dict[torch.dtype, Literal["no", "fp16", "bf16"]] = {
    torch.float32: "no",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
"""The mixed precision that suits the dtype of a model's weights."""


def check_settings(config: Any, counts: Sequence[str]) -> None:
    """Refuse settings that cannot be.

    Raises:
        ValueError: one of ``counts`` is no whole number >= 1, or learning_rate is not > 0.
    """
    for name in counts:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if not config.learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, got {config.learning_rate!r}")


def fine_tune(
    denoiser: Denoiser,
    trainable: Trainable,
    prompts: Sequence[str],
    latents: Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    description: str,
    watched: Collection[int] = (),
    watch: Callable[[int], None] | None = None,
) -> list[float]:
    """Minimise the squared error of the denoiser on noised ``latents``, which ``prompts``, used in turn, describe.

    Args:
        denoiser, trainable: the model, and what of it is trained.
        prompts: latent i shows prompt i, modulo their number.
        latents: clean latents [M, C, H, W].
        steps, learning_rate, batch_size, seed: of AdamW at a constant rate.
        description: what the progress bar says.
        watched, watch: steps after which ``watch`` is called.

    Returns:
        The loss of every step: the mean squared error of the denoiser's output.
    """
    texts = tuple(dict.fromkeys(prompts))
    config = EraseConfig(
        objective="noise",
        divergence="mse",
        sigma=1.0,
        preservation_weight=0.0,
        lr_scheduler="constant",
        max_train_steps=steps,
        train_batch_size=batch_size,
        learning_rate=learning_rate,
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
        pair=torch.arange(len(latents)) % len(texts),
        latents_per_concept=len(latents),
        latents=latents.to(denoiser.device),
    )
    with own_accelerator(config, denoiser.device) as accelerator:
        training = Training(
            accelerator,
            denoiser,
            trainable,
            examples,
            Objective(denoiser, config),
            config,
            Cache(None, {}, accelerator),
            watched=watched,
            watch=watch,
            description=description,
        )
        return training.run()["divergence"]
