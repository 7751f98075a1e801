"""How kohya's sd-scripts and musubi-tuner, ComfyUI and AUTOMATIC1111 name the layers of each family that they know.

Stable Diffusion 1.x and 2.x use diffusers' names, SDXL those of its original code ("input_blocks"). All others use the
names of their original code, which ComfyUI keeps and where query, key and value are often one layer; those of
Qwen-Image are diffusers' names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from fdu.models import parts

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
    read_by_diffusers: bool = False
    """Whether diffusers reads such files, as far as they hold what fdu trains by default."""


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
                for joined, name in names.items():
                    yield f"{original}_{index}_{name}", tuple(f"{attribute}.{index}.{part}" for part in joined)
        for layer, name in others.items():
            yield name, (layer,)

    return layers


UNET_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
}
UNET_OTHERS = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}


def original_name(layer: str, config: Any) -> str | None:
    """The name of a UNet's layer in the original code, with underscores for dots; None if it has none there."""
    if layer in UNET_OTHERS:
        return UNET_OTHERS[layer]
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", layer)
    if match is None or not isinstance(config.layers_per_block, int):
        return None
    side, number, kind, index, rest = match.groups()
    block, position = int(number or 0), int(index)
    if kind == "resnets":
        rest = UNET_RESNET.get(rest, rest)
    rest, inner = rest.replace(".", "_"), int(kind == "attentions")
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


def unet_layers(module: Any, original_last: bool = False) -> Iterator[tuple[str, Layers]]:
    """Each layer by both names, diffusers' and that of the original code, in this order or the other."""
    for layer in parts.layers(module):
        names = [layer.replace(".", "_"), original_name(layer, module.config)]
        for name in names if original_last else reversed(names):
            if name is not None:
                yield name, (layer,)


def unet_version(pipeline: Any) -> str:
    """A 2.x is known by the width of its text encoder."""
    if pipeline.unet.config.cross_attention_dim != 1024:
        return "sd_v1"
    return "sd_v2_v" if pipeline.scheduler.config.get("prediction_type") == "v_prediction" else "sd_v2"


SD = KohyaNames(
    unet_layers, unet_version, text_prefixes={"text_encoder": ("lora_te1", "lora_te")}, read_by_diffusers=True
)
SDXL = KohyaNames(partial(unet_layers, original_last=True), lambda pipeline: "sdxl_base_v1-0", read_by_diffusers=True)

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
SD3_OTHERS = {
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder_proj",
    "proj_out": "final_layer_linear",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder_mlp_0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder_mlp_2",
    "time_text_embed.text_embedder.linear_1": "y_embedder_mlp_0",
    "time_text_embed.text_embedder.linear_2": "y_embedder_mlp_2",
}
SD3 = KohyaNames(
    transformer_layers({"joint_blocks": ("transformer_blocks", SD3_BLOCK)}, SD3_OTHERS),
    version=lambda pipeline: "sd3",
    network="networks.lora_sd3",
)

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
FLUX_OTHERS = {
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
FLUX_PARTS = {
    "double_blocks": ("transformer_blocks", FLUX_BLOCK),
    "single_blocks": ("single_transformer_blocks", FLUX_SINGLE_BLOCK),
}
"""Of FLUX.1 and of Chroma, which was trained from it."""
FLUX = KohyaNames(
    transformer_layers(FLUX_PARTS, FLUX_OTHERS),
    version=lambda pipeline: "flux1",
    network="networks.lora_flux",
    text_prefixes={"text_encoder": ("lora_te1",), "text_encoder_2": ("lora_te3",)},
)

CHROMA_OTHERS = {
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer_linear",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer_in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer_out_proj",
}
CHROMA = KohyaNames(
    transformer_layers(FLUX_PARTS, CHROMA_OTHERS),
    version=lambda pipeline: "chroma",
    network="networks.lora_flux",
    text_prefixes={},
)

FLUX2_BLOCK = {
    **{layers: name for layers, name in FLUX_BLOCK.items() if "attn" in name},
    ("ff.linear_in",): "img_mlp_0",
    ("ff.linear_out",): "img_mlp_2",
    ("ff_context.linear_in",): "txt_mlp_0",
    ("ff_context.linear_out",): "txt_mlp_2",
}
FLUX2_SINGLE_BLOCK: dict[Layers, str] = {("attn.to_qkv_mlp_proj",): "linear1", ("attn.to_out",): "linear2"}
FLUX2_OTHERS = {
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer_linear",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in_in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in_out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in_in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in_out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img_lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt_lin",
    "single_stream_modulation.linear": "single_stream_modulation_lin",
}
QWEN3_4B_WIDTH = 2560


def flux2_version(pipeline: Any) -> str:
    """dev reads a guidance scale; the two kleins read Qwen3 of two sizes."""
    if pipeline.transformer.config.guidance_embeds:
        return "flux_2_dev"
    small = pipeline.text_encoder.config.hidden_size <= QWEN3_4B_WIDTH
    return "flux_2_klein_4b" if small else "flux_2_klein_9b"


FLUX2 = KohyaNames(
    transformer_layers(
        {
            "double_blocks": ("transformer_blocks", FLUX2_BLOCK),
            "single_blocks": ("single_transformer_blocks", FLUX2_SINGLE_BLOCK),
        },
        FLUX2_OTHERS,
    ),
    flux2_version,
    network="networks.lora_flux_2",
    text_prefixes={},
    read_by_diffusers=True,
)

AURAFLOW_MLP = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
AURAFLOW_BLOCK: dict[Layers, str] = {
    **{(f"attn.to_{part}",): f"attn_w2{part}" for part in "qkv"},
    **{(f"attn.add_{part}_proj",): f"attn_w1{part}" for part in "qkv"},
    ("attn.to_out.0",): "attn_w2o",
    ("attn.to_add_out",): "attn_w1o",
    **{(f"ff.{layer}",): f"mlpX_{name}" for layer, name in AURAFLOW_MLP.items()},
    **{(f"ff_context.{layer}",): f"mlpC_{name}" for layer, name in AURAFLOW_MLP.items()},
    ("norm1.linear",): "modX_1",
    ("norm1_context.linear",): "modC_1",
}
AURAFLOW_SINGLE_BLOCK: dict[Layers, str] = {
    **{(f"attn.to_{part}",): f"attn_w1{part}" for part in "qkv"},
    ("attn.to_out.0",): "attn_w1o",
    **{(f"ff.{layer}",): f"mlp_{name}" for layer, name in AURAFLOW_MLP.items()},
    ("norm1.linear",): "modCX_1",
}
AURAFLOW_OTHERS = {
    "context_embedder": "cond_seq_linear",
    "pos_embed.proj": "init_x_linear",
    "proj_out": "final_linear",
    "time_step_proj.linear_1": "t_embedder_mlp_0",
    "time_step_proj.linear_2": "t_embedder_mlp_2",
}
AURAFLOW = KohyaNames(
    transformer_layers(
        {
            "double_layers": ("joint_transformer_blocks", AURAFLOW_BLOCK),
            "single_layers": ("single_transformer_blocks", AURAFLOW_SINGLE_BLOCK),
        },
        AURAFLOW_OTHERS,
    ),
    version=lambda pipeline: "auraflow",
    text_prefixes={},
)

LUMINA2_BLOCK: dict[Layers, str] = {
    IMAGE_QKV: "attention_qkv",
    ("attn.to_out.0",): "attention_out",
    **{(f"feed_forward.linear_{number}",): f"feed_forward_w{number}" for number in (1, 2, 3)},
    ("norm1.linear",): "adaLN_modulation_1",
}
LUMINA2_OTHERS = {
    "time_caption_embed.caption_embedder.1": "cap_embedder_1",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder_mlp_0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder_mlp_2",
    "x_embedder": "x_embedder",
    "norm_out.linear_1": "final_layer_adaLN_modulation_1",
    "norm_out.linear_2": "final_layer_linear",
}
BLOCKS_OF_ONE_STREAM = ("layers", "noise_refiner", "context_refiner")
LUMINA2 = KohyaNames(
    transformer_layers({blocks: (blocks, LUMINA2_BLOCK) for blocks in BLOCKS_OF_ONE_STREAM}, LUMINA2_OTHERS),
    version=lambda pipeline: "lumina2",
    network="networks.lora_lumina",
    text_prefixes={},
)

Z_IMAGE_BLOCK: dict[Layers, str] = {
    ("attention.to_q", "attention.to_k", "attention.to_v"): "attention_qkv",
    ("attention.to_out.0",): "attention_out",
    **{(f"feed_forward.w{number}",): f"feed_forward_w{number}" for number in (1, 2, 3)},
    ("adaLN_modulation.0",): "adaLN_modulation_0",
}
Z_IMAGE_OTHERS = {
    "cap_embedder.1": "cap_embedder_1",
    "t_embedder.mlp.0": "t_embedder_mlp_0",
    "t_embedder.mlp.2": "t_embedder_mlp_2",
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer_linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer_adaLN_modulation_1",
}
Z_IMAGE = KohyaNames(
    transformer_layers({blocks: (blocks, Z_IMAGE_BLOCK) for blocks in BLOCKS_OF_ONE_STREAM}, Z_IMAGE_OTHERS),
    version=lambda pipeline: "z_image",
    network="networks.lora_zimage",
    text_prefixes={},
    read_by_diffusers=True,
)


def qwen_image_layers(module: Any) -> Iterator[tuple[str, Layers]]:
    """Every layer by its name here, except the one whose halves change places wherever else it is named."""
    for layer in parts.layers(module):
        if layer != "norm_out.linear":
            yield layer.replace(".", "_"), (layer,)


QWEN_IMAGE = KohyaNames(
    qwen_image_layers,
    version=lambda pipeline: "qwen_image",
    network="networks.lora_qwen_image",
    text_prefixes={},
    read_by_diffusers=True,
)

WAN_BLOCK: dict[Layers, str] = {
    **{(f"attn1.to_{part}",): f"self_attn_{part}" for part in "qkv"},
    ("attn1.to_out.0",): "self_attn_o",
    **{(f"attn2.to_{part}",): f"cross_attn_{part}" for part in "qkv"},
    ("attn2.to_out.0",): "cross_attn_o",
    ("ffn.net.0.proj",): "ffn_0",
    ("ffn.net.2",): "ffn_2",
}
WAN_OTHERS = {
    "condition_embedder.text_embedder.linear_1": "text_embedding_0",
    "condition_embedder.text_embedder.linear_2": "text_embedding_2",
    "condition_embedder.time_embedder.linear_1": "time_embedding_0",
    "condition_embedder.time_embedder.linear_2": "time_embedding_2",
    "condition_embedder.time_proj": "time_projection_1",
    "patch_embedding": "patch_embedding",
    "proj_out": "head_head",
}
# diffusers reads such a file only if it changes every linear layer of every block.
WAN = KohyaNames(
    transformer_layers({"blocks": ("blocks", WAN_BLOCK)}, WAN_OTHERS),
    version=lambda pipeline: "wan",
    network="networks.lora_wan",
    text_prefixes={},
)
