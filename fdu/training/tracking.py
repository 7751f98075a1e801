"""What a run shows while it goes on: figures in a tracker, and the validation prompts drawn in its course."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor

from fdu.config import EraseConfig
from fdu.pictures import strip

PROJECT = "fdu"
VALIDATION_SEED = 500
"""Seed of the first validation image: none that a training or an evaluation uses."""
NEEDS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""The packages of which a tracker needs one."""


def check_tracker(report_to: str) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ImportError: it is not.
    """
    packages = NEEDS.get(report_to, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ImportError(f"report_to {report_to!r} needs {packages[0]}; pip install {packages[0]}, or choose 'none'")


class Tracking:
    """The tracker of one run, through accelerate, and its validation images."""

    def __init__(self, accelerator: Accelerator, config: EraseConfig) -> None:
        self.accelerator = accelerator
        self.config = config
        if config.report_to != "none":
            # Trackers take numbers and words, no lists.
            settings = {name: value for name, value in config.as_dict().items() if isinstance(value, (int, float, str))}
            accelerator.init_trackers(PROJECT, settings)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures after ``step`` steps."""
        if self.config.report_to != "none":
            self.accelerator.log(figures, step=step)

    def validate(self, step: int, pipeline: DiffusionPipeline) -> None:
        """Draw the validation prompts and keep them in logging_dir, and in the tracker."""
        if not (self.accelerator.is_main_process or self.config.shard):
            return
        images = draw_validation(pipeline, self.config)
        if not self.accelerator.is_main_process:
            return  # it has drawn for its shards alone
        folder = Path(self.config.logging_dir) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        strip(images, height=512).save(folder / f"step-{step:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images("validation", images, step, dataformats="NCHW")
            elif tracker.name == "wandb":
                import wandb

                captioned = zip(images, self.config.validation_prompts, strict=True)
                tracker.log({"validation": [wandb.Image(image, caption=text) for image, text in captioned]}, step=step)

    def end(self) -> None:
        """Close the tracker."""
        if self.config.report_to != "none":
            self.accelerator.end_training()


@torch.no_grad()
def draw_validation(pipeline: DiffusionPipeline, config: EraseConfig) -> Tensor:
    """An image of every validation prompt, [N, 3, H, W] in [0, 1]; the seeds are the same each time."""
    settings = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        numbered = enumerate(config.validation_prompts)
        return torch.cat([_draw(pipeline, prompt, index, config) for index, prompt in numbered])
    finally:
        pipeline._progress_bar_config = settings


def _draw(pipeline: DiffusionPipeline, prompt: str, index: int, config: EraseConfig) -> Tensor:
    size = {} if config.resolution is None else {"height": config.resolution, "width": config.resolution}
    images: Tensor = pipeline(
        prompt,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generator=torch.Generator().manual_seed(VALIDATION_SEED + index),
        output_type="pt",
        **size,
    ).images
    return images.float().cpu()
