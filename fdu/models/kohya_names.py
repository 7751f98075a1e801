"""How kohya's sd-scripts, ComfyUI and AUTOMATIC1111 name a family's layers; the names themselves are in its file.

Stable Diffusion 1.x and 2.x go by diffusers' names, SDXL by those of its original code ("input_blocks"), SD3 and FLUX
by those of theirs, where query, key and value are one layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Layers = tuple[str, ...]
"""Layers in diffusers' names that are one layer of the original code, their outputs one after another."""
IMAGE_QKV: Layers = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV: Layers = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


@dataclasses.dataclass(frozen=True)
class KohyaNames:
    """The names of a family's layers, for writing and for reading."""

    layers: Callable[[Any], Iterator[tuple[str, Layers]]]
    """The denoiser's module -> (kohya's name, its layers); of several names of a layer the last one is written."""
    version: Callable[[Any], str]
    """The pipeline -> what sd-scripts calls its base model."""
    network: str = "networks.lora"
    """The module of sd-scripts that makes such files."""
    text_prefixes: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: {
            "text_encoder": ("lora_te1",),
            "text_encoder_2": ("lora_te2",),
            "text_encoder_3": ("lora_te3",),
        }
    )
    """The prefixes of each text encoder's layers, the one that is written last."""


def transformer_layers(
    blocks: Mapping[str, tuple[str, Mapping[Layers, str]]], others: Mapping[str, str]
) -> Callable[[Any], Iterator[tuple[str, Layers]]]:
    """:attr:`KohyaNames.layers` of a transformer.

    Args:
        blocks: {kohya's prefix of the blocks: (diffusers' attribute, {diffusers' layers: kohya's layer name})}.
        others: kohya's names of the layers outside of blocks.
    """

    def layers(module: Any) -> Iterator[tuple[str, Layers]]:
        for original, (attribute, names) in blocks.items():
            for index in range(len(getattr(module, attribute))):
                for parts, name in names.items():
                    yield f"{original}_{index}_{name}", tuple(f"{attribute}.{index}.{part}" for part in parts)
        for layer, name in others.items():
            yield name, (layer,)

    return layers
