"""Inputs of a result: a fingerprint of the pipeline's weights, and the versions of packages."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fdu

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAMPLES = 256
"""Bytes of each tensor that are hashed, evenly spread, besides the sum of all its words."""
PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Name to version of fdu, Python and every installed package that a result depends on."""
    found = {"fdu": fdu.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@torch.no_grad()
def fingerprint(
    pipeline: DiffusionPipeline, replaced: Mapping[str, Tensor] | None = None, adapters: bool = False
) -> str:
    """64 hexadecimal digits that depend on the denoiser and the text encoders: names, shapes, dtypes and values.

    Autoencoder, scheduler, device, version of transformers and unfused adapters do not count. Weights rounded to
    another dtype are other weights. The fingerprint tells models apart but does not withstand forgery: it reads some
    bytes of each tensor and the sum of its 64-bit words, which any single change alters. Stable Diffusion 1.5 takes
    about a second on a CPU.

    Args:
        pipeline: any diffusers pipeline.
        replaced: values that stand in for the pipeline's own, by "attribute.parameter".
        adapters: count active adapters too, with their strengths.

    Raises:
        ValueError: ``replaced`` names a parameter that is not there.
    """
    from fdu.models import parts  # imports diffusers, which versions() must do without

    own = parts.weights(pipeline)
    values: dict[int, Tensor] = {id(parameter): parameter for parameter in own.values()}
    for name, value in (replaced or {}).items():
        if name not in own:
            raise ValueError(f"replaced names {name!r}, which the pipeline does not have")
        values[id(own[name])] = value  # under all its names, if modules share it
    named = [(name.replace(".text_model.", "."), values[id(own[name])]) for name in sorted(own)]
    if adapters:
        named += _active_adapters(parts.models(pipeline))
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total, sample = _read(tensor)
        digest.update(total.to_bytes(8, "little", signed=True) + sample)
    return digest.hexdigest()


def _active_adapters(models: Mapping[str, torch.nn.Module]) -> list[tuple[str, Tensor]]:
    """The parameters of the adapters that each layer adds, under names that tell their order and strengths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = []
    for attribute, model in models.items():
        for layer_name, layer in model.named_modules():
            if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters or layer.merged:
                continue
            # Not their own names, which differ from pipeline to pipeline.
            strengths = getattr(layer, "scaling", {})
            known = {name: f"{place}@{strengths.get(name)}" for place, name in enumerate(layer.active_adapters)}
            for name, parameter in layer.named_parameters():
                path = name.split(".")
                if known.keys() & set(path):
                    label = ".".join(known.get(part, part) for part in path)
                    named.append((f"{attribute}.{layer_name}.{label}", parameter))
    return named


def _read(tensor: Tensor) -> tuple[int, bytes]:
    """The sum of all words, modulo 2^64 and so in any order, and some bytes."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    words, rest = data[:whole], data[whole:]
    if words.data_ptr() % 8:
        words = words.clone()
    total = int(words.view(torch.int64).sum()) if whole else 0
    step = max(1, data.numel() // SAMPLES)
    # An odd step, so that the sample meets every byte of an element.
    sample = data[:: step | 1][: 2 * SAMPLES]
    return total, bytes(sample.tolist()) + bytes(rest.tolist())
