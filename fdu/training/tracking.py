"""Tracking: figures for a tracker, and validation images during the training."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from torch import Tensor

from fdu.config import PLACES, EraseConfig
from fdu.models.denoiser import Denoiser, pictures, silent
from fdu.models.families import guidance_arguments

LOGGER = logging.getLogger(__name__)
PROJECT = "fdu"
VALIDATION_SEED = 500
"""Seed of the first validation image: none that a training or an evaluation uses."""


class Tracking:
    """The tracker of one run, through accelerate, and its validation images."""

    def __init__(self, accelerator: Accelerator, config: EraseConfig) -> None:
        self.accelerator = accelerator
        self.config = config
        if config.report_to != "none":
            # Trackers take numbers and words, no lists.
            settings = {
                name: value
                for name, value in config.as_dict().items()
                if isinstance(value, (int, float, str)) and name not in PLACES
            }
            accelerator.init_trackers(PROJECT, settings)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures after ``step`` steps."""
        if self.config.report_to != "none":
            self.accelerator.log(figures, step=step)

    def validate(self, step: int, denoiser: Denoiser) -> Tensor | None:
        """Draw the validation prompts for tracking_dir and the tracker; an error costs the pictures, not the run.

        Returns the images of the main process; None for others, and after an error.
        """
        if not (self.accelerator.is_main_process or self.config.shard):
            return None
        try:
            images = draw_validation(denoiser, self.config)
            if not self.accelerator.is_main_process:  # others have drawn for their shards alone
                return None
            self._keep(step, images)
            return images
        except Exception as error:
            if self.config.shard:
                raise  # the others are in the middle of it
            LOGGER.warning("validation after step %d failed (%s: %s); continuing", step, type(error).__name__, error)
            return None

    def _keep(self, step: int, images: Tensor) -> None:
        folder = Path(self.config.tracking_dir) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        pictures = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
        make_image_grid(pictures, rows=1, cols=len(pictures)).save(folder / f"step-{step:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images("validation", images, step, dataformats="NCHW")
            elif tracker.name == "wandb":
                import wandb

                captioned = zip(images, self.config.validation_prompts, strict=True)
                tracker.log({"validation": [wandb.Image(image, caption=text) for image, text in captioned]}, step=step)

    def end(self) -> None:
        """Close the tracker. Not by accelerate, which would end the process group with it."""
        if self.config.report_to == "none":  # a tracker that is there is that of a run around this one
            return
        for tracker in self.accelerator.trackers:
            tracker.finish()


@torch.no_grad()
def draw_validation(denoiser: Denoiser, config: EraseConfig) -> Tensor:
    """An image of every validation prompt, [N, 3, H, W] in [0, 1]; the seeds are the same each time."""
    images = []
    with silent(denoiser.pipeline):
        for index, prompt in enumerate(config.validation_prompts):
            drawn = denoiser.pipeline(
                prompt=prompt,
                height=denoiser.height,
                width=denoiser.width,
                num_inference_steps=config.num_inference_steps,
                **guidance_arguments(denoiser.pipeline, config.sampling_guidance, 1),
                generator=torch.Generator().manual_seed(VALIDATION_SEED + index),
                output_type="pt",
                **denoiser.call_settings,
            )
            images.append(pictures(drawn).float().cpu())
    return torch.cat(images)
