"""Make a part of a pipeline trainable, by the name of a training method."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from fdu.config import TRAIN_METHODS, check_choice
from fdu.models.denoiser import Denoiser
from fdu.training.methods.trainable import (
    Request,
    Trainable,
    flags_restored_on_error,
    put_on_top,
    refuse_while_training,
)


def attach(
    denoiser: Denoiser,
    method: str,
    *,
    rank: int,
    lora_alpha: float,
    target_name: str | Sequence[str],
    prompts: Sequence[str],
    kept_prompts: Sequence[str] = (),
) -> Trainable:
    """Make the part of a pipeline that ``method`` names trainable, and everything else frozen.

    The method's file defines ``make(denoiser: Denoiser, request: Request) -> Trainable``, which is called here.

    Args:
        denoiser: the denoiser of the pipeline, not yet wrapped for several devices.
        method: a name in ``TRAIN_METHODS``.
        rank, lora_alpha, prompts, kept_prompts: see :class:`Request`.
        target_name: the target's name or names.

    Raises:
        ValueError: an unknown method, or one that this pipeline offers nothing to train for.
        RuntimeError: another erasure of the pipeline is still being trained.
    """
    check_choice("train_method", method, TRAIN_METHODS)
    refuse_while_training(denoiser.pipeline)
    names = (target_name,) if isinstance(target_name, str) else tuple(target_name)
    make = import_module(f"{__package__}.{TRAIN_METHODS[method].module}").make
    with flags_restored_on_error(denoiser.pipeline):
        trainable: Trainable = make(denoiser, Request(method, rank, lora_alpha, names, prompts, kept_prompts))
    put_on_top(trainable)
    return trainable
