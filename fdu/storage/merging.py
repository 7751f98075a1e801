"""Merge adapters into the weights, permanently or only while a pipeline is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fdu.models import parts


def merge(pipeline: DiffusionPipeline) -> None:
    """Make the active adapters part of the weights, at their strengths, and drop all adapters. There is no way back.

    Raises:
        ValueError: no adapter is active.
        TypeError: diffusers cannot merge adapters in this kind of pipeline.
    """
    layers = [layer for model in parts.models(pipeline).values() for layer in parts.adapted(model)]
    if not any(layer.active_adapters for layer in layers):
        raise ValueError("pipeline has no active adapter to merge; load one with load_lora_weights or load_weights")
    if not hasattr(pipeline, "fuse_lora"):
        raise TypeError(
            f"diffusers cannot merge adapters in a {type(pipeline).__name__}; save it as a full pipeline "
            '(save_as="pipeline"), which merges them'
        )
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


@contextmanager
def merged(pipeline: DiffusionPipeline) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within this context the active adapters are part of the weights and the models are as if they had never had any.

    Yields "attribute.parameter" -> (before, after) of the weights that this changes. Afterwards all is as it was, bit
    for bit.
    """
    changed: dict[str, tuple[Tensor, Tensor]] = {}
    undo: list[tuple[nn.Module, str, BaseTunerLayer, Tensor | None]] = []
    flags: dict[str, bool | None] = {}
    try:
        model: Any
        for attribute, model in parts.models(pipeline).items():
            wrapped = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
            if wrapped:
                flags[attribute] = getattr(model, "_hf_peft_config_loaded", False)
                model._hf_peft_config_loaded = False  # transformers would write the adapters alone
            for name, layer in wrapped.items():
                base = layer.get_base_layer()
                merges = bool(layer.active_adapters) and not layer.disable_adapters and not layer.merged
                before = base.weight.data if merges else None
                stem, _, last = name.rpartition(".")
                parent = model.get_submodule(stem)
                undo.append((parent, last, layer, before))
                if before is not None:
                    base.weight.data = before.clone()
                    layer.merge()
                    changed[f"{attribute}.{name}.weight"] = (before, base.weight.data)
                parent._modules[last] = base
        yield changed
    finally:
        with torch.no_grad():
            for parent, last, layer, before in undo:
                parent._modules[last] = layer
                if before is not None:
                    if layer.merged:
                        layer.unmerge()
                    layer.get_base_layer().weight.data = before  # unmerging rounds
        for attribute, flag in flags.items():
            getattr(pipeline, attribute)._hf_peft_config_loaded = flag
