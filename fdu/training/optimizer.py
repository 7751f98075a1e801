"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fdu.config import EraseConfig


def check_optimizer(config: EraseConfig, device: torch.device) -> None:
    """Refuse an optimizer that cannot run.

    Raises:
        ImportError: it is not installed.
        ValueError: it does not run on the device.
    """
    if config.optimizer != "adamw_8bit":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"optimizer 'adamw_8bit' needs bitsandbytes ({error}); pip install bitsandbytes, or choose 'adamw'"
        ) from error
    if device.type == "cpu":
        raise ValueError("optimizer 'adamw_8bit' needs a GPU, and the pipeline is on the CPU; choose 'adamw'")


def make_optimizer(parameters: Sequence[nn.Parameter], config: EraseConfig) -> tuple[Optimizer, LRScheduler]:
    """AdamW over the trained parameters, and the schedule of its learning rate."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw_8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(parameters, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=all(each.is_cuda for each in parameters) or None, **settings)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return optimizer, schedule
