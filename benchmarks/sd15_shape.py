"""A pipeline of the shape of Stable Diffusion 1.5 with random weights, every width a quarter and every side a half.

Each count of Stable Diffusion 1.5 then comes out the same fraction of itself: parameters and activations a sixteenth,
multiplications and softmax elements a sixty-fourth, so that the shares of denoiser, autoencoder and text encoder, of
weights and activations, are the original's. Group norms keep their channels a group and attention heads their size;
the text encoder, whose 77 tokens stay 77, has an eighth of its width, for its share of the multiplications.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fdu.subjects.digits.tokenizer import END, START, learn_tokenizer

TOKENS = 77
WIDTH, SIDE, TEXT_WIDTH = 4, 2, 8
"""By what the widths of denoiser and autoencoder, the sides of an image and the width of the text are divided."""
THINGS = ("house", "tree", "woman", "man", "street", "boat", "bridge", "garden", "mountain", "horse")
SETTINGS = ("at dawn", "at night", "in the rain", "in winter", "by the sea", "in a valley", "from above", "in sunlight")


def unet_config(width: int = WIDTH, side: int = SIDE, text_width: int = TEXT_WIDTH) -> dict[str, Any]:
    """The denoiser's; with 1, 1 and 1 that of Stable Diffusion 1.5."""
    return {
        "sample_size": 64 // side,
        "block_out_channels": tuple(channels // width for channels in (320, 640, 1280, 1280)),
        "layers_per_block": 2,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
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
        "latent_channels": 4,
        "norm_num_groups": max(1, 32 // width),
    }


def text_config(text_width: int = TEXT_WIDTH) -> dict[str, Any]:
    """The text encoder's."""
    return {
        "vocab_size": 49408,
        "hidden_size": 768 // text_width,
        "intermediate_size": 3072 // text_width,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": TOKENS,
        "hidden_act": "quick_gelu",
    }


def build(
    seed: int = 0, width: int = WIDTH, side: int = SIDE, text_width: int = TEXT_WIDTH, device: str = "cpu"
) -> StableDiffusionPipeline:
    """The pipeline, fp32, with the sampler that both loops use; with 1, 1 and 1 of the full shape. Its random weights
    are drawn on ``device``, which takes seconds where a CPU would take a minute."""
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
        found[f"{name}, M parameters"] = _parameters(module) / 1e6
    return found


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
