"""A fingerprint of a pipeline's base weights: the same weights give the same one, any changed value another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fdu.weights import parts

SAMPLES = 256
"""Bytes of each tensor that are hashed themselves, evenly spread, beside the sum over all of its words."""


@torch.no_grad()
def fingerprint(pipeline: DiffusionPipeline, replaced: Mapping[str, Tensor] | None = None) -> str:
    """64 hexadecimal digits that depend on the denoiser and the text encoders: names, shapes, dtypes and values.

    Adapters do not count (unless fused), nor do the autoencoder, the scheduler, the device and the version of
    transformers. Weights that were rounded to another dtype are other weights. It is made to tell models apart, not to
    withstand forgery: of each tensor it reads the sum of all 64-bit words, which any single change alters, and some
    bytes; Stable Diffusion 1.5 takes about a second on a CPU.

    Args:
        pipeline: any diffusers pipeline.
        replaced: values to take in place of the pipeline's own, by "attribute.parameter".

    Raises:
        ValueError: ``replaced`` names a parameter that is not there.
    """
    own = parts.weights(pipeline)
    values: dict[int, Tensor] = {id(parameter): parameter for parameter in own.values()}
    for name, value in (replaced or {}).items():
        if name not in own:
            raise ValueError(f"replaced names {name!r}, which the pipeline does not have")
        values[id(own[name])] = value  # under all its names, if modules share it
    digest = hashlib.sha256()
    for name in sorted(own):
        tensor = values[id(own[name])]
        label = f"{name.replace('.text_model.', '.')} {tuple(tensor.shape)} {tensor.dtype}\n"
        digest.update(label.encode())
        total, sample = _read(tensor)
        digest.update(total.to_bytes(8, "little", signed=True) + sample)
    return digest.hexdigest()


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
