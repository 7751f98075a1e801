"""Load an erasure into a pipeline; the names of the tensors reveal the format of the file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from fdu.models import parts
from fdu.models.unet import original_name
from fdu.storage import delta, files, kohya, lora

COMPVIS_PREFIX = "model.diffusion_model."
"""Prefix of the UNet's weights in the original code of Stable Diffusion."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The loaded weights."""

    format: str
    """Format of the file in words."""
    tensors: int
    """Number of tensors in it."""
    attributes: tuple[str, ...]
    """The pipeline's models that it changes."""
    adapter_name: str | None = None
    """Name of the adapter; None if the weights themselves changed."""


def load_weights(
    pipeline: DiffusionPipeline,
    path: str | Path,
    adapter_name: str | None = None,
    strength: float = 1.0,
    check_base: bool = True,
) -> Loaded:
    """Load an erasure into ``pipeline``, whole or not at all.

    Reads LoRA and DoRA files (diffusers, peft or kohya names), fdu's deltas, and state dicts of changed weights
    (diffusers or CompVis names): concept ablation's ``delta.bin``, ESD, UCE, f-DMU and others. LoRA becomes a further
    active adapter; everything else replaces weights.

    Args:
        pipeline: the pipeline that the file was made for.
        path: a .safetensors, .bin, .pt, .pth or .ckpt file, or a folder with one. No code in it is executed.
        adapter_name: name of the LoRA adapter. None: a free one.
        strength: factor on the change; 1 is the trained erasure, 0 none.
        check_base: refuse fdu's delta on a base other than its own.

    Raises:
        FileNotFoundError: no weights at ``path``.
        ValueError: an unknown format, another model family, other shapes, or a pickle that would execute code; the
            pipeline is unchanged.
        TypeError: the pipeline cannot carry LoRA weights.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, got {strength!r}")
    file = files.weights_file(path)
    tensors, metadata = files.read(file)
    try:
        if kohya.is_kohya_lora(tensors):
            return _load_lora(
                pipeline, "kohya LoRA", tensors, kohya.from_file(pipeline, tensors), adapter_name, strength
            )
        if lora.is_diffusers_lora(tensors):
            updates = lora.from_file(pipeline, tensors, metadata)
            return _load_lora(pipeline, "diffusers LoRA", tensors, updates, adapter_name, strength)
        if delta.is_delta(metadata):
            delta.check_version(metadata)
            changes = delta.changes(pipeline, tensors)
            if check_base:
                delta.check_base(pipeline, metadata)
            return _load_changes(pipeline, "fdu delta", tensors, changes, strength)
        if _is_state_dict(pipeline, tensors):
            changes = delta.changes(pipeline, _in_diffusers_names(pipeline, tensors))
            return _load_changes(pipeline, "changed weights", tensors, changes, strength)
    except ValueError as error:
        raise ValueError(f"weights {str(file)!r}: {error}") from error
    first = ", ".join(repr(name) for name in list(tensors)[:3])
    raise ValueError(
        f"weights {str(file)!r} have no known format: neither LoRA in diffusers', peft's or kohya's names, nor a delta "
        f"of fdu, nor weights by the names that they have in this {type(pipeline).__name__}; first tensors: {first}"
    )


def _load_lora(
    pipeline: DiffusionPipeline,
    kind: str,
    tensors: Mapping[str, Tensor],
    updates: lora.Updates,
    adapter_name: str | None,
    strength: float,
) -> Loaded:
    checked = lora.check(pipeline, updates)
    name = lora.attach(pipeline, checked, adapter_name, strength)
    return Loaded(kind, len(tensors), tuple(checked), name)


def _load_changes(
    pipeline: DiffusionPipeline,
    kind: str,
    tensors: Mapping[str, Tensor],
    changes: list[delta.Change],
    strength: float,
) -> Loaded:
    delta.apply(pipeline, changes, strength)
    attributes = dict.fromkeys(change.name.partition(".")[0] for change in changes)
    return Loaded(kind, len(tensors), tuple(attributes))


def _is_state_dict(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> bool:
    """Whether names are those of weights, of this pipeline or of another family."""
    blocks = ("down_blocks.", "mid_block.", "up_blocks.", "transformer_blocks.", "single_transformer_blocks.")
    attributes = tuple(f"{name}." for name in (*parts.DENOISERS, *parts.TEXT_ENCODERS))
    own, denoiser = parts.weights(pipeline), parts.denoiser_name(pipeline)
    return any(name.startswith((*blocks, *attributes, COMPVIS_PREFIX)) for name in tensors) or any(
        f"{denoiser}.{name}" in own for name in tensors
    )


def _in_diffusers_names(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors, those in CompVis' names renamed.

    Raises:
        ValueError: a full checkpoint of all models.
    """
    if any(name.startswith("first_stage_model.") for name in tensors):
        raise ValueError("a full checkpoint; load it with StableDiffusionPipeline.from_single_file")
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        return tensors
    diffusers_names = {
        original: layer for layer in parts.layers(unet) if (original := original_name(layer, unet.config)) is not None
    }

    def renamed(name: str) -> str:
        layer, _, parameter = name.removeprefix(COMPVIS_PREFIX).rpartition(".")
        known = diffusers_names.get(layer.replace(".", "_"))
        return f"unet.{known}.{parameter}" if known and name.startswith(COMPVIS_PREFIX) else name

    return {renamed(name): tensor for name, tensor in tensors.items()}
