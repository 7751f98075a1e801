"""A loop that does what the published loops of concept ablation and f-DMU do, for comparison with the loop of ``fdu``.

Written from concept ablation (Kumari et al. 2023, arXiv 2303.13516; nupurkmr9/concept-ablation, diffusers/train.py) and
f-DMU (Novello et al. 2026, arXiv 2509.21167; nicolaNovello/f-DMU, train.py). The loop samples anchor images and keeps
them as files. For every batch, the autoencoder encodes its images, the text encoder encodes both its prompts, and the
frozen denoiser has a forward pass of its own. In f-DMU the frozen denoiser is a copy; concept ablation uses the trained
one. The rest is as in ``fdu``: AdamW on the keys and values of cross-attention, batch and accumulation, the squared
Hellinger loss, the precision. The loop leaves out what slows the originals down needlessly: masks of augmented images,
statistics of every gradient, models loaded twice, attention that keeps its scores. The training process decodes the
files, as in f-DMU. Concept ablation has two more processes for that (``dataloader_num_workers``).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

TEMPLATES = ("{prompt}, in the style of {target}", "in {target}'s style, {prompt}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the published runs, except the learning rate's scaling and the optimizer's precision."""

    num_images: int = 1000
    num_inference_steps: int = 25
    sampling_guidance: float = 6.0
    sample_batch_size: int = 4
    train_batch_size: int = 2
    gradient_accumulation_steps: int = 2
    max_train_steps: int = 500
    learning_rate: float = 2.8e-4
    """7e-5 times batch and accumulation, as --scale_lr makes it."""
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    copies: bool = True
    """Whether the frozen denoiser is a copy, as in f-DMU, or the trained one itself, as in concept ablation."""
    preservation_weight: float = 0.0
    """Weight of the denoising loss on the anchor's own images; 0 in the published runs on styles."""
    mixed_precision: str = "no"
    """With "bf16" the trained denoiser runs under autocast, and all frozen parts, the copy too, have bf16 weights."""
    dataloader_num_workers: int = 0
    seed: int = 0


def sample_images(pipeline: StableDiffusionPipeline, prompts: Sequence[str], folder: Path, settings: Settings) -> None:
    """Draw the anchor's images, cycling through the prompts, and write them as JPEG files."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(settings.seed)
    for start in range(0, settings.num_images, settings.sample_batch_size):
        numbers = range(start, min(start + settings.sample_batch_size, settings.num_images))
        images = pipeline(
            [prompts[number % len(prompts)] for number in numbers],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.sampling_guidance,
            generator=generator,
        ).images
        for number, image in zip(numbers, images, strict=True):
            image.save(image_path(folder, number))


def image_path(folder: Path, number: int) -> Path:
    """Where an anchor image lies."""
    return folder / f"{number}.jpg"


class AnchorImages(Dataset):
    """The anchor's images, [3, H, W] in [-1, 1], with the tokens of the target's and of the anchor's prompt."""

    def __init__(self, folder: Path, count: int, prompts: Sequence[str], target: str, tokenizer: CLIPTokenizer) -> None:
        self.folder, self.count, self.prompts, self.target = folder, count, prompts, target
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        anchor = self.prompts[index % len(self.prompts)]
        with Image.open(image_path(self.folder, index)) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
        return {
            "pixels": pixels.flip(2) if random.random() < 0.5 else pixels,
            "target": self._tokens(random.choice(TEMPLATES).format(prompt=anchor, target=self.target)),
            "anchor": self._tokens(anchor),
        }

    def _tokens(self, prompt: str) -> Tensor:
        options = {"truncation": True, "padding": "max_length", "max_length": self.tokenizer.model_max_length}
        return self.tokenizer(prompt, return_tensors="pt", **options).input_ids[0]


def train(
    pipeline: StableDiffusionPipeline, target: str, prompts: Sequence[str], folder: Path, settings: Settings
) -> list[float]:
    """Train the denoiser in place. Returns the loss of every step."""
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)
    unet, vae = pipeline.unet, pipeline.vae
    encoders = [part for part in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if part is not None]
    for module in (unet, vae, *encoders):
        module.requires_grad_(False)
    parameters = context_projections(unet)
    for parameter in parameters:
        parameter.requires_grad_(True)
    frozen = copy.deepcopy(unet) if settings.copies else unet
    if settings.mixed_precision == "bf16":
        for module in (*([frozen] if settings.copies else []), vae, *encoders):
            module.to(torch.bfloat16)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.adam_weight_decay)
    images = AnchorImages(folder, settings.num_images, prompts, target, pipeline.tokenizer)
    workers = settings.dataloader_num_workers
    options = {"shuffle": True, "drop_last": True, "num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(images, settings.train_batch_size, **options)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    losses = []
    for _ in range(settings.max_train_steps):
        for _ in range(settings.gradient_accumulation_steps):
            batch = {name: value.to(unet.device) for name, value in next(batches).items()}
            with torch.autocast(unet.device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
                loss = batch_loss(batch, unet, frozen, vae, encoders, noise_scheduler, settings)
            (loss / settings.gradient_accumulation_steps).backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batch_loss(
    batch: dict[str, Tensor],
    unet: UNet2DConditionModel,
    frozen: UNet2DConditionModel,
    vae: nn.Module,
    encoders: Sequence[nn.Module],
    noise_scheduler: DDPMScheduler,
    settings: Settings,
) -> Tensor:
    """The loss of one batch, with its images and prompts encoded on the way.

    With preservation the same images come a second time, with the anchor's prompts, for the denoising loss; the trained
    denoiser takes both in one pass.
    """
    pixels, ids = batch["pixels"], batch["target"]
    if settings.preservation_weight:
        pixels, ids = torch.cat([pixels, pixels]), torch.cat([ids, batch["anchor"]])
    with torch.no_grad():
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.sample().float() * vae.config.scaling_factor
        prompts = read(encoders, ids, pixels.shape[-1])
        anchors = read(encoders, batch["anchor"], pixels.shape[-1])
    noise = torch.randn_like(latents)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),)).to(latents.device)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, **prompts).sample
    size = len(batch["anchor"])
    with torch.no_grad():
        wanted = frozen(noisy[:size].to(frozen.dtype), timesteps[:size], **anchors).sample
    loss = squared_hellinger(predicted[:size].float(), wanted.float())
    if settings.preservation_weight:
        loss = loss + settings.preservation_weight * functional.mse_loss(predicted[size:].float(), noise[size:])
    return loss


def read(encoders: Sequence[nn.Module], ids: Tensor, side: int) -> dict[str, Any]:
    """A denoiser's inputs from prompts. With one text encoder they are its last layer. With the two of Stable Diffusion
    XL they are the last layers but one, the second encoder's pooled embedding, and the sides of the image."""
    if len(encoders) == 1:
        return {"encoder_hidden_states": encoders[0](input_ids=ids)[0]}
    outputs = [encoder(input_ids=ids, output_hidden_states=True) for encoder in encoders]
    sides = torch.tensor([side, side, 0, 0, side, side], device=ids.device, dtype=outputs[1][0].dtype)
    return {
        "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in outputs], -1),
        "added_cond_kwargs": {"text_embeds": outputs[1][0], "time_ids": sides.expand(len(ids), 6)},
    }


def squared_hellinger(predicted: Tensor, wanted: Tensor, sigma: float = 1.0) -> Tensor:
    """-exp(-s/8) and its mean over the batch, with s the mean squared error of a sample over sigma^2."""
    distances = (predicted - wanted).square().mean(dim=(1, 2, 3)) / sigma**2
    return -torch.exp(-distances / 8).mean()


def context_projections(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """The weights that make keys and values of the prompt."""
    names = ("attn2.to_k", "attn2.to_v")
    return [parameter for name, parameter in unet.named_parameters() if any(part in name for part in names)]
