"""The names that kohya's sd-scripts, ComfyUI and AUTOMATIC1111 give the layers of a pipeline.

Stable Diffusion 1.x and 2.x go by diffusers' names, SDXL by those of its original code ("input_blocks"), SD3 and FLUX
by those of theirs, where query, key and value are one layer. The table is made from the layers that a pipeline has, so
that it serves both writing and reading.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from fdu.storage import parts


@dataclasses.dataclass(frozen=True)
class Slot:
    """One layer of the original code: one or several of diffusers', their outputs one after another."""

    attribute: str
    layers: tuple[str, ...]
    halves_swapped: bool = False
    """Whether the halves of the outputs change places: scale and shift there, shift and scale here."""


RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
}
UNET_ENDS = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
SD3_BLOCK = {
    IMAGE_QKV: "x_block_attn_qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block_attn2_qkv",
    TEXT_QKV: "context_block_attn_qkv",
    ("attn.to_out.0",): "x_block_attn_proj",
    ("attn2.to_out.0",): "x_block_attn2_proj",
    ("attn.to_add_out",): "context_block_attn_proj",
    ("ff.net.0.proj",): "x_block_mlp_fc1",
    ("ff.net.2",): "x_block_mlp_fc2",
    ("ff_context.net.0.proj",): "context_block_mlp_fc1",
    ("ff_context.net.2",): "context_block_mlp_fc2",
    ("norm1.linear",): "x_block_adaLN_modulation_1",
    ("norm1_context.linear",): "context_block_adaLN_modulation_1",
}
SD3_ENDS = {
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder_proj",
    "proj_out": "final_layer_linear",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder_mlp_0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder_mlp_2",
    "time_text_embed.text_embedder.linear_1": "y_embedder_mlp_0",
    "time_text_embed.text_embedder.linear_2": "y_embedder_mlp_2",
}
FLUX_BLOCK = {
    IMAGE_QKV: "img_attn_qkv",
    TEXT_QKV: "txt_attn_qkv",
    ("attn.to_out.0",): "img_attn_proj",
    ("attn.to_add_out",): "txt_attn_proj",
    ("ff.net.0.proj",): "img_mlp_0",
    ("ff.net.2",): "img_mlp_2",
    ("ff_context.net.0.proj",): "txt_mlp_0",
    ("ff_context.net.2",): "txt_mlp_2",
    ("norm1.linear",): "img_mod_lin",
    ("norm1_context.linear",): "txt_mod_lin",
}
FLUX_SINGLE_BLOCK = {
    (*IMAGE_QKV, "proj_mlp"): "linear1",
    ("proj_out",): "linear2",
    ("norm.linear",): "modulation_lin",
}
FLUX_ENDS = {
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer_linear",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
    "time_text_embed.timestep_embedder.linear_1": "time_in_in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in_out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in_in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in_out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in_in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in_out_layer",
}

Table = dict[str, Slot]


def table(pipeline: DiffusionPipeline) -> Table:
    """Kohya's names of all layers that have weights. Of several names of a layer the last is the one to write.

    Raises:
        ValueError: no program names the layers of this family in kohya's way.
    """
    attribute = parts.denoiser_name(pipeline)
    denoiser = getattr(pipeline, attribute)
    present = set(_with_weights(denoiser))
    if isinstance(denoiser, UNet2DConditionModel):
        slots = _unet(attribute, present, denoiser.config)
    elif isinstance(denoiser, SD3Transformer2DModel):
        slots = _sd3(attribute, denoiser.config.num_layers)
    elif isinstance(denoiser, FluxTransformer2DModel):
        slots = _flux(attribute, denoiser.config.num_layers, denoiser.config.num_single_layers)
    else:
        raise ValueError(
            "kohya's names are known for Stable Diffusion 1.x, 2.x, XL, 3 and FLUX, not for "
            f'{type(denoiser).__name__}; choose save_as "delta" or "pipeline"'
        )
    found = {f"lora_unet_{name}": slot for name, slot in slots if present.issuperset(slot.layers)}
    for encoder, prefixes in _text_prefixes(pipeline, denoiser).items():
        model = parts.models(pipeline).get(encoder)
        for layer in _with_weights(model) if model is not None else ():
            full = f"text_model.{layer}" if parts.lost_prefix(model) else layer
            for prefix in prefixes:
                found[f"{prefix}_{_joined(full)}"] = Slot(encoder, (layer,))
    return found


def original_unet_name(layer: str, config: Any) -> str | None:
    """The name of a UNet's layer in the original code, with underscores for dots; None if it has none there."""
    if layer in UNET_ENDS:
        return UNET_ENDS[layer]
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", layer)
    if match is None or not isinstance(config.layers_per_block, int):
        return None
    side, number, kind, index, rest = match.groups()
    block, position = int(number or 0), int(index)
    if kind == "resnets":
        rest = RESNET.get(rest, rest)
    rest, inner = _joined(rest), int(kind == "attentions")
    if side == "mid":
        return f"middle_block_{1 if inner else 2 * position}_{rest}"
    length = config.layers_per_block + 1
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks_{(block + 1) * length}_0_op"
        return f"input_blocks_{1 + block * length + position}_{inner}_{rest}"
    if kind == "upsamplers":
        attends = "Attn" in config.up_block_types[block]
        return f"output_blocks_{(block + 1) * length - 1}_{2 if attends else 1}_conv"
    return f"output_blocks_{block * length + position}_{inner}_{rest}"


def base_model_version(pipeline: DiffusionPipeline) -> str:
    """What sd-scripts calls the family."""
    denoiser = getattr(pipeline, parts.denoiser_name(pipeline))
    if isinstance(denoiser, SD3Transformer2DModel):
        return "sd3"
    if isinstance(denoiser, FluxTransformer2DModel):
        return "flux1"
    if _is_sdxl(denoiser.config):
        return "sdxl_base_v1-0"
    if not is_version_2(pipeline):
        return "sd_v1"
    return "sd_v2_v" if pipeline.scheduler.config.get("prediction_type") == "v_prediction" else "sd_v2"


def is_version_2(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline is a Stable Diffusion 2.x, known by the width of its text encoder."""
    return getattr(pipeline, parts.denoiser_name(pipeline)).config.get("cross_attention_dim") == 1024


def _unet(attribute: str, present: set[str], config: Any) -> Iterator[tuple[str, Slot]]:
    for layer in present:
        names = [_joined(layer), original_unet_name(layer, config)]
        for name in names if _is_sdxl(config) else reversed(names):
            if name is not None:
                yield name, Slot(attribute, (layer,))


def _sd3(attribute: str, blocks: int) -> Iterator[tuple[str, Slot]]:
    for index in range(blocks):
        for layers, name in SD3_BLOCK.items():
            # The last block does not go on with the text: its normalisation has another form.
            swapped = index == blocks - 1 and layers == ("norm1_context.linear",)
            yield f"joint_blocks_{index}_{name}", _slot(attribute, f"transformer_blocks.{index}", layers, swapped)
    for layer, name in SD3_ENDS.items():
        yield name, Slot(attribute, (layer,), layer == "norm_out.linear")


def _flux(attribute: str, blocks: int, single_blocks: int) -> Iterator[tuple[str, Slot]]:
    for index in range(blocks):
        for layers, name in FLUX_BLOCK.items():
            yield f"double_blocks_{index}_{name}", _slot(attribute, f"transformer_blocks.{index}", layers)
    for index in range(single_blocks):
        for layers, name in FLUX_SINGLE_BLOCK.items():
            yield f"single_blocks_{index}_{name}", _slot(attribute, f"single_transformer_blocks.{index}", layers)
    for layer, name in FLUX_ENDS.items():
        yield name, Slot(attribute, (layer,), layer == "norm_out.linear")


def _slot(attribute: str, block: str, layers: tuple[str, ...], swapped: bool = False) -> Slot:
    return Slot(attribute, tuple(f"{block}.{layer}" for layer in layers), swapped)


def _text_prefixes(pipeline: DiffusionPipeline, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
    """The prefixes of every text encoder, the one to write last."""
    if isinstance(denoiser, FluxTransformer2DModel):
        return {"text_encoder": ("lora_te1",), "text_encoder_2": ("lora_te3",)}
    if not hasattr(pipeline, "text_encoder_2"):
        return {"text_encoder": ("lora_te1", "lora_te")}
    return {"text_encoder": ("lora_te1",), "text_encoder_2": ("lora_te2",), "text_encoder_3": ("lora_te3",)}


def _with_weights(model: nn.Module) -> list[str]:
    return [name for name, layer in parts.layers(model).items() if isinstance(getattr(layer, "weight", None), Tensor)]


def _is_sdxl(config: Any) -> bool:
    return config.get("addition_embed_type") == "text_time"


def _joined(name: str) -> str:
    return name.replace(".", "_")
