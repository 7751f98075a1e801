"""A pipeline of the shape of Stable Diffusion XL with random weights, full or with every width and side divided."""

from __future__ import annotations

from typing import Any

import sd15_shape
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SIDE = 1024
"""Pixels of an image; eight times those of its latents."""
TIME_ID_WIDTH = 256
POOLED = 1280
CONTEXT = (768, 1280)
"""Widths of the two text encoders, of which the denoiser reads both."""


def unet_config(width: int = 1, side: int = 1, text_width: int = 1) -> dict[str, Any]:
    """The denoiser's; with 1, 1 and 1 that of Stable Diffusion XL."""
    return {
        "sample_size": SIDE // 8 // side,
        "block_out_channels": tuple(channels // width for channels in (320, 640, 1280)),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "attention_head_dim": tuple(max(1, heads // width) for heads in (5, 10, 20)),
        "cross_attention_dim": sum(CONTEXT) // text_width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID_WIDTH // width,
        "projection_class_embeddings_input_dim": 6 * (TIME_ID_WIDTH // width) + POOLED // text_width,
        "norm_num_groups": max(1, 32 // width),
    }


def text_configs(text_width: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the two text encoders."""
    second = {
        **sd15_shape.text_config(),
        "hidden_size": CONTEXT[1] // text_width,
        "intermediate_size": 4 * CONTEXT[1] // text_width,
        "num_hidden_layers": 32,
        "num_attention_heads": max(1, 20 // text_width),
        "projection_dim": POOLED // text_width,
        "hidden_act": "gelu",
    }
    return sd15_shape.text_config(text_width), second


def build(
    seed: int = 0, width: int = 1, side: int = 1, text_width: int = 1, device: str = "cpu"
) -> StableDiffusionXLPipeline:
    """The pipeline, fp32."""
    tokenizer = sd15_shape.make_tokenizer()
    ids = sd15_shape.special_ids(tokenizer)
    first, second = text_configs(text_width)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        vae = {**sd15_shape.vae_config(width, side), "sample_size": SIDE // side, "scaling_factor": 0.13025}
        return StableDiffusionXLPipeline(
            vae=AutoencoderKL(**vae).eval(),
            text_encoder=CLIPTextModel(CLIPTextConfig(**first, **ids)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**second, **ids)).eval(),
            tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(**unet_config(width, side, text_width)).eval(),
            scheduler=sd15_shape.make_scheduler(),
            add_watermarker=False,
        )
