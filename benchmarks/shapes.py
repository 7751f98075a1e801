"""Pipelines of the shape of Stable Diffusion 1.5 and XL with random weights, full or with all widths and sides divided.

By default every width of Stable Diffusion 1.5 is a quarter and every side a half. Each of its counts is then the same
fraction of itself: parameters and activations a sixteenth, multiplications and softmax elements a sixty-fourth. So
denoiser, autoencoder and text encoder, weights and activations, keep their shares. Group norms keep their channels per
group and attention heads their size; the text encoder, whose 77 tokens stay 77, has an eighth of its width, which gives
it its share of the multiplications.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fdu.subjects.digits.vocabulary import END, START, learn_tokenizer

TOKENS = 77
WIDTH, SIDE, TEXT_WIDTH = 4, 2, 8
"""Divisors of the widths of denoiser and autoencoder, of the sides of an image, and of the width of the text."""
XL_TEXT = (768, 1280)
"""Widths of XL's two text encoders; the denoiser reads both."""
THINGS = ("house", "tree", "woman", "man", "street", "boat", "bridge", "garden", "mountain", "horse")
SETTINGS = ("at dawn", "at night", "in the rain", "in winter", "by the sea", "in a valley", "from above", "in sunlight")


def unet_config(width: int = WIDTH, side: int = SIDE, text_width: int = TEXT_WIDTH) -> dict[str, Any]:
    """The denoiser's, beside the defaults; with 1, 1 and 1 that of Stable Diffusion 1.5."""
    return {
        "sample_size": 64 // side,
        "block_out_channels": tuple(channels // width for channels in (320, 640, 1280, 1280)),
        "attention_head_dim": max(1, 8 // width),  # as this family of configs calls the number of heads
        "cross_attention_dim": 768 // text_width,
        "norm_num_groups": max(1, 32 // width),
    }


def vae_config(width: int = WIDTH, side: int = SIDE) -> dict[str, Any]:
    """The autoencoder's."""
    return {
        "sample_size": 512 // side,
        "block_out_channels": tuple(channels // width for channels in (128, 256, 512, 512)),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": max(1, 32 // width),
    }


def text_config(text_width: int = TEXT_WIDTH) -> dict[str, Any]:
    """The text encoder's."""
    return {
        "hidden_size": 768 // text_width,
        "intermediate_size": 3072 // text_width,
        "num_attention_heads": 12,
    }


def sd15(
    seed: int = 0, width: int = WIDTH, side: int = SIDE, text_width: int = TEXT_WIDTH, device: str = "cpu"
) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5, fp32, with the sampler that both loops use; with 1, 1 and 1 of the full shape. Its random
    weights are drawn on ``device``: a GPU takes seconds where a CPU would take a minute."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return StableDiffusionPipeline(
            vae=AutoencoderKL(**vae_config(width, side)).eval(),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(text_width), **special_ids(tokenizer))).eval(),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**unet_config(width, side, text_width)).eval(),
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def xl_unet_config(width: int, side: int, text_width: int) -> dict[str, Any]:
    """XL's denoiser's; with 1, 1 and 1 the full one."""
    time_ids = 256 // width
    return {
        "sample_size": 128 // side,
        "block_out_channels": tuple(channels // width for channels in (320, 640, 1280)),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "attention_head_dim": tuple(max(1, heads // width) for heads in (5, 10, 20)),
        "cross_attention_dim": sum(XL_TEXT) // text_width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_ids,
        "projection_class_embeddings_input_dim": 6 * time_ids + XL_TEXT[1] // text_width,
        "norm_num_groups": max(1, 32 // width),
    }


def sdxl(
    seed: int = 0, width: int = 1, side: int = 1, text_width: int = 1, device: str = "cpu"
) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL, fp32, with the same sampler and words."""
    tokenizer = make_tokenizer()
    ids = special_ids(tokenizer)
    second = CLIPTextConfig(
        hidden_size=XL_TEXT[1] // text_width,
        intermediate_size=4 * XL_TEXT[1] // text_width,
        num_hidden_layers=32,
        num_attention_heads=max(1, 20 // text_width),
        projection_dim=XL_TEXT[1] // text_width,
        hidden_act="gelu",
        **ids,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        vae = {**vae_config(width, side), "sample_size": 1024 // side, "scaling_factor": 0.13025}
        return StableDiffusionXLPipeline(
            vae=AutoencoderKL(**vae).eval(),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(text_width), **ids)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(second).eval(),
            tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(**xl_unet_config(width, side, text_width)).eval(),
            scheduler=make_scheduler(),
            add_watermarker=False,
        )


def make_scheduler() -> DPMSolverMultistepScheduler:
    """Of the noise that Stable Diffusion 1.5 and XL were trained with."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )  # fmt: skip


def special_ids(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """What a text encoder's config has to know of its tokenizer."""
    special = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}


@functools.cache
def make_tokenizer() -> CLIPTokenizer:
    """CLIP's conventions and length over the words of the prompts."""
    return learn_tokenizer([*anchor_prompts(), "in the style of van gogh"], max_length=TOKENS)


def anchor_prompts(count: int = 200) -> list[str]:
    """Prompts of the anchor concept, "painting"."""
    prompts = [
        f"a {kind} of a {thing} {setting}"
        for setting in SETTINGS
        for thing in THINGS
        for kind in ("painting", "large painting", "small painting")
    ]
    return prompts[:count]


def proportions(width: int = WIDTH, side: int = SIDE, text_width: int = TEXT_WIDTH) -> dict[str, float]:
    """Parameters in millions, and 10^9 floating-point operations for one sample, by part; nothing is computed."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(width, side, text_width))
        vae = AutoencoderKL(**vae_config(width, side))
        text = CLIPTextModel(CLIPTextConfig(**text_config(text_width)))
        latent = torch.empty(1, 4, 64 // side, 64 // side)
        context = torch.empty(1, TOKENS, 768 // text_width)
        calls = {
            "denoiser": lambda: unet(latent, torch.empty(1, dtype=torch.int64), context),
            "encoder": lambda: vae.encode(torch.empty(1, 3, 512 // side, 512 // side)),
            "decoder": lambda: vae.decode(latent),
            "text encoder": lambda: text(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64)),
        }
        found = {}
        for name, call in calls.items():
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                call()
            found[f"{name}, GFLOP"] = counter.get_total_flops() / 1e9
    for name, module in (("denoiser", unet), ("autoencoder", vae), ("text encoder", text)):
        found[f"{name}, M parameters"] = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    return found
