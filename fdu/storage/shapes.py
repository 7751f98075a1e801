"""Pipelines of shapes alone: every part has its layers, and no weight takes memory."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fdu.storage.loading import hub_name
from fdu.storage.output import PIPELINE_FILE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_shapes(model: str, dtype: str = "float32") -> DiffusionPipeline:
    """A pipeline on the device "meta", from its configs and tokenizers.

    Args:
        model: a folder, or a hub id, of which nothing but these small files is fetched.
        dtype: dtype of the weights.

    Raises:
        OSError, ValueError: a part is missing or unknown.
    """
    import diffusers
    from diffusers import DiffusionPipeline

    name, revision = (model, None) if Path(model).is_dir() else hub_name(model)
    if Path(name).is_dir():
        index = json.loads((Path(name) / PIPELINE_FILE).read_text(encoding="utf-8"))
    else:
        index = DiffusionPipeline.load_config(name, revision=revision)
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, (list, tuple)):
            continue
        library, kind_name = entry
        if kind_name is None or part in ("safety_checker", "feature_extractor", "image_encoder"):
            parts[part] = None
            continue
        kind = getattr(importlib.import_module(library), kind_name)
        where = {"subfolder": part, "revision": revision}
        if issubclass(kind, nn.Module):
            with torch.device("meta"):
                if library == "diffusers":
                    made = kind.from_config(kind.load_config(name, **where))
                else:
                    made = kind(kind.config_class.from_pretrained(name, **where))
            parts[part] = nn.Module.to(made, getattr(torch, dtype)).eval()
        else:
            parts[part] = kind.from_pretrained(name, **where)
    options = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    pipeline: DiffusionPipeline = getattr(diffusers, index["_class_name"])(**parts, **options)
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipeline
