"""Pipelines with the shapes of Stable Diffusion 1.5 and XL and random weights, in full size or scaled down.

SCALED divides the widths of Stable Diffusion 1.5 by four and its sides by two. In the denoiser and in the autoencoder,
this divides parameters and activations by 16, and multiplications and softmax elements by 64. So both keep their shares
of time and memory. Group norms keep their channels per group, and attention heads their size. The text encoder keeps
its 77 tokens; an eighth of its width gives it its share of the multiplications.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

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

from fdu.subjects.from_scratch import END, START, learn_tokenizer

TOKENS = 77


class Scale(NamedTuple):
    """Divisors of a model's widths and sides."""

    width: int
    """Divisor of the widths of the denoiser and the autoencoder."""
    side: int
    """Divisor of the image's side."""
    text_width: int


FULL, SCALED = Scale(1, 1, 1), Scale(4, 2, 8)
XL_TEXT = (768, 1280)
"""Widths of XL's two text encoders; the denoiser reads both."""
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""The noise that Stable Diffusion 1.5 and XL were trained with."""
KINDS = ("painting", "large painting", "small painting")
THINGS = ("house", "tree", "woman", "man", "street", "boat", "bridge", "garden", "mountain", "horse")
SETTINGS = ("at dawn", "at night", "in the rain", "in winter", "by the sea", "in a valley", "from above", "in sunlight")


def make_unet(scale: Scale) -> UNet2DConditionModel:
    """The denoiser of Stable Diffusion 1.5."""
    return UNet2DConditionModel(
        sample_size=64 // scale.side,
        block_out_channels=tuple(channels // scale.width for channels in (320, 640, 1280, 1280)),
        attention_head_dim=max(1, 8 // scale.width),  # as this family of configs calls the number of heads
        cross_attention_dim=768 // scale.text_width,
        norm_num_groups=max(1, 32 // scale.width),
    ).eval()


def make_xl_unet(scale: Scale) -> UNet2DConditionModel:
    """The denoiser of Stable Diffusion XL."""
    time_ids = 256 // scale.width
    return UNet2DConditionModel(
        sample_size=128 // scale.side,
        block_out_channels=tuple(channels // scale.width for channels in (320, 640, 1280)),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        attention_head_dim=tuple(max(1, heads // scale.width) for heads in (5, 10, 20)),
        cross_attention_dim=sum(XL_TEXT) // scale.text_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_ids,
        projection_class_embeddings_input_dim=6 * time_ids + XL_TEXT[1] // scale.text_width,
        norm_num_groups=max(1, 32 // scale.width),
    ).eval()


def make_vae(scale: Scale, side: int = 512, **settings: Any) -> AutoencoderKL:
    """The autoencoder, for images of this side before it is scaled."""
    return AutoencoderKL(
        sample_size=side // scale.side,
        block_out_channels=tuple(channels // scale.width for channels in (128, 256, 512, 512)),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=max(1, 32 // scale.width),
        **settings,
    ).eval()


def text_config(width: int, heads: int = 12, **settings: Any) -> CLIPTextConfig:
    """A text encoder's config, with the tokenizer's special tokens."""
    special = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    ids = {name: make_tokenizer().convert_tokens_to_ids(token) for name, token in special.items()}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return CLIPTextConfig(**sizes, **ids, **settings)


def make_text_encoder(scale: Scale) -> CLIPTextModel:
    """The text encoder of Stable Diffusion 1.5, the first one of XL."""
    return CLIPTextModel(text_config(XL_TEXT[0] // scale.text_width)).eval()


def make_second_text_encoder(scale: Scale) -> CLIPTextModelWithProjection:
    """The second text encoder of Stable Diffusion XL."""
    width, heads = XL_TEXT[1] // scale.text_width, max(1, 20 // scale.text_width)
    config = text_config(width, heads, projection_dim=width, num_hidden_layers=32, hidden_act="gelu")
    return CLIPTextModelWithProjection(config).eval()


def sd15(scale: Scale = SCALED, device: str = "cpu") -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in fp32, with the sampler that both loops use. The random weights are drawn on ``device``:
    a GPU takes seconds for the full shape, a CPU a minute."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return StableDiffusionPipeline(
            vae=make_vae(scale),
            text_encoder=make_text_encoder(scale),
            tokenizer=make_tokenizer(),
            unet=make_unet(scale),
            scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def sdxl(scale: Scale, device: str) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL in fp32, with the same sampler and words."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return StableDiffusionXLPipeline(
            vae=make_vae(scale, 1024, scaling_factor=0.13025),
            text_encoder=make_text_encoder(scale),
            tokenizer=make_tokenizer(),
            text_encoder_2=make_second_text_encoder(scale),
            tokenizer_2=make_tokenizer(),
            unet=make_xl_unet(scale),
            scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
            add_watermarker=False,
        )


@functools.cache
def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer with CLIP's conventions and length, over the words of the prompts."""
    return learn_tokenizer([*anchor_prompts(), "in the style of van gogh"], max_length=TOKENS)


def anchor_prompts(count: int = 200) -> list[str]:
    """Prompts of the anchor concept, "painting"."""
    words = itertools.product(SETTINGS, THINGS, KINDS)
    return [f"a {kind} of a {thing} {setting}" for setting, thing, kind in words][:count]


def proportions(scale: Scale) -> dict[str, float]:
    """Parameters in millions, and 10^9 floating-point operations for one sample, by part; nothing is computed."""
    with torch.device("meta"):
        unet, vae, text = make_unet(scale), make_vae(scale), make_text_encoder(scale)
        latent = torch.empty(1, 4, 64 // scale.side, 64 // scale.side)
        context = torch.empty(1, TOKENS, 768 // scale.text_width)
        calls = {
            "denoiser": lambda: unet(latent, torch.empty(1, dtype=torch.int64), context),
            "encoder": lambda: vae.encode(torch.empty(1, 3, 512 // scale.side, 512 // scale.side)),
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
