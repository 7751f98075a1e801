"""The technique ``fdu`` of eval-unlearn, a benchmark of concept erasure, which finds this class by an entry point.

Written for eval-unlearn 1.1.2. Its techniques have no base class: eval-unlearn constructs one from the keys of
``technique.config`` and calls ``generate``. This file imports nothing from it, and torch and diffusers only on use.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import fdu
from fdu.concepts import ConceptType, concept_pairs
from fdu.config import Count, EraseConfig, NotNegative, check_choice, check_number
from fdu.storage.loading import Dtype, check_dtype, check_erased, choose_device, load_erased, load_model
from fdu.storage.output import PIPELINE_FILE
from fdu.subjects.registry import subject_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

BASE_MODEL = "CompVis/stable-diffusion-v1-4"
"""The model that most of eval-unlearn's own techniques erase from."""


class Technique:
    """A pipeline with a concept erased, by ``fdu.erase`` or by saved weights.

    Arguments that eval-unlearn's own techniques have, too, have the same meaning.
    """

    def __init__(
        self,
        *,
        erase_concept: str = "",
        anchor_concept: str | None = None,
        concept_type: ConceptType = "object",
        settings: dict[str, Any] | None = None,
        load_path: str | None = None,
        model_id: str = BASE_MODEL,
        device: str | None = None,
        dtype: Dtype = "auto",
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        num_frames: int | None = None,
        **unknown: Any,
    ) -> None:
        """Erase a concept, or load an erasure.

        Args:
            erase_concept: the target: a name, or a ``.txt`` file of prompts. With ``load_path``, only eval-unlearn
                reads it, for its reports and to allow metrics.
            anchor_concept: the concept that replaces it, in the same forms; "" for nothing.
            concept_type: the phrasings for names, "object" or "style".
            settings: settings of the erasure, by the names of :class:`fdu.EraseConfig`.
            load_path: weights that :func:`fdu.load_weights` reads, or the folder of an erased pipeline.
            model_id: the pipeline to erase from, or the base of the weights: a folder, a hub id, or a .safetensors
                file, with the pipeline that it belongs to after an @.
            device: cpu, cuda or mps. None: the first accelerator found.
            dtype: dtype of the weights. "auto": float32, or the dtype of the setting ``mixed_precision``.
            num_inference_steps: sampling steps per image of the benchmark; ``settings`` has those of the erasure.
            guidance_scale: classifier-free guidance scale of the benchmark's images.
            num_frames: frames of the benchmark's videos, of which the middle ones are the images; 1 draws images. None:
                the pipeline's own. Video models only.

        Raises:
            ValueError, TypeError, FileNotFoundError: a wrong argument; raised before any work.
            OSError: the model or the weights cannot be loaded.
            RuntimeError: the erasure failed, see :func:`fdu.erase`.
        """
        if unknown:
            raise TypeError(_unknown(next(iter(unknown))))
        check_choice("dtype", dtype, get_args(Dtype))
        model = subject_of(model_id, "model_id")
        check_number("num_inference_steps", num_inference_steps, Count)
        check_number("guidance_scale", guidance_scale, NotNegative)
        if num_frames is not None:
            check_number("num_frames", num_frames, Count)
        place = choose_device(device or "auto")
        if load_path is None:
            if not erase_concept:
                raise ValueError("erase_concept is missing; name the concept to erase, or give load_path")
            if anchor_concept is None:
                raise ValueError("anchor_concept is missing; name what replaces erase_concept, or '' for nothing")
            concept_pairs(erase_concept, anchor_concept, concept_type)
            config = EraseConfig.from_settings(settings or {})
            pipeline = model.load(check_dtype(dtype, config.mixed_precision), place)
            _check_frames(pipeline, num_frames)
            fdu.erase(pipeline, erase_concept, anchor_concept, concept_type=concept_type, config=config)
        else:
            if anchor_concept is not None or settings:
                raise ValueError("load_path holds a finished erasure; leave out anchor_concept and settings")
            check_erased(load_path)
            precision = "float32" if dtype == "auto" else dtype
            if (Path(load_path) / PIPELINE_FILE).is_file():
                pipeline = load_model(load_path, precision, place)
            else:
                pipeline = load_erased(model.load(precision, place), load_path)
            _check_frames(pipeline, num_frames)
        if getattr(pipeline, "safety_checker", None) is not None:
            pipeline.safety_checker = None  # it would black out images that the benchmark counts
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline: DiffusionPipeline = pipeline
        self.drawing: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        if num_frames is not None:
            self.drawing["num_frames"] = num_frames

    def generate(self, prompts: Sequence[str], seed: int | None = None, **drawing: Any) -> list[Image]:
        """Draw one image per prompt, one at a time; of a video model the middle frame of a video.

        Image i has the noise of ``seed + i``, drawn on the pipeline's device, as eval-unlearn's technique ``free_run``
        draws it: with the same seed it shows the images before the erasure. Without a seed, torch's state decides.

        Args:
            prompts: the prompts.
            seed: seed of the first image.
            drawing: further arguments of the pipeline, which override those in the configuration. ``guidance_scale``
                becomes the argument by which the family guides.
        """
        import torch

        from fdu.models.denoiser import pictures
        from fdu.models.families import guidance_arguments

        given = {"output_type": "pil", **self.drawing, **drawing}
        scale = given.pop("guidance_scale")
        guiding = {
            name: value[0] if isinstance(value, list) else value  # for one prompt
            for name, value in guidance_arguments(self.pipeline, scale, 1).items()
        }
        images: list[Image] = []
        for index, prompt in enumerate(prompts):
            generator = None if seed is None else torch.Generator(self.pipeline.device).manual_seed(seed + index)
            images += pictures(self.pipeline(prompt=prompt, **{**guiding, **given}, generator=generator))
        return images


def _check_frames(pipeline: DiffusionPipeline, num_frames: int | None) -> None:
    """Refuse frames of a pipeline that draws images."""
    if num_frames is not None and "num_frames" not in inspect.signature(type(pipeline).__call__).parameters:
        raise ValueError(f"num_frames is for videos, and {type(pipeline).__name__} draws images; leave it out")


def _unknown(name: str) -> str:
    """The message for a key that eval-unlearn's own techniques would ignore."""
    if name in EraseConfig.field_names():
        return f"{name} is a setting of the erasure; put it into settings: {{{name!r}: ...}}"
    known = [key for key in Technique.__init__.__annotations__ if key not in ("unknown", "return")]
    return f"unknown key {name!r} in the configuration of the technique fdu; the keys are {', '.join(known)}"
