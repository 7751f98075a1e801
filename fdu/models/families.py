"""The families of denoisers. A new one is a file in this folder and a line in ``FAMILIES``."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from fdu.config import Size
from fdu.models.auraflow import AuraFlowDenoiser
from fdu.models.chroma import ChromaDenoiser
from fdu.models.cogview4 import CogView4Denoiser
from fdu.models.denoiser import Denoiser
from fdu.models.flux import FluxDenoiser
from fdu.models.flux2 import Flux2Denoiser
from fdu.models.lumina2 import Lumina2Denoiser
from fdu.models.parts import DENOISERS
from fdu.models.pixart import PixArtDenoiser
from fdu.models.qwenimage import QwenImageDenoiser
from fdu.models.sana import SanaDenoiser
from fdu.models.sd3 import SD3Denoiser
from fdu.models.unet import SDXLDenoiser, UNetDenoiser
from fdu.models.wan import WanDenoiser
from fdu.models.zimage import ZImageDenoiser

FAMILIES: tuple[type[Denoiser], ...] = (
    UNetDenoiser,
    SDXLDenoiser,
    SD3Denoiser,
    FluxDenoiser,
    PixArtDenoiser,
    SanaDenoiser,
    AuraFlowDenoiser,
    ChromaDenoiser,
    CogView4Denoiser,
    Lumina2Denoiser,
    QwenImageDenoiser,
    ZImageDenoiser,
    Flux2Denoiser,
    WanDenoiser,
)
"""The first that fits a pipeline takes it."""


def family_of(module: Any) -> type[Denoiser] | None:
    """The family of a pipeline's denoiser; None if it is not known here."""
    return next((family for family in FAMILIES if family.owns(module)), None)


def _fitting(pipeline: Any) -> type[Denoiser]:
    """The family of a pipeline; of one that is not known here, what most have in common."""
    return next((family for family in FAMILIES if family.fits(pipeline)), Denoiser)


def guidance_argument_of(pipeline: Any) -> str:
    """The argument of a pipeline's call that is the scale of guidance by two predictions."""
    return _fitting(pipeline).guidance_argument


def guidance_arguments(pipeline: Any, scale: float | None, count: int) -> dict[str, Any]:
    """Arguments of a pipeline's call that guide ``count`` prompts by a scale, of any pipeline, known here or not.

    None is the pipeline's default.
    """
    family = _fitting(pipeline)
    given: dict[str, Any] = {} if scale is None else {family.guidance_argument: scale}
    if family.asks_for_negative and (scale is None or scale > family.unguided_scale):
        given["negative_prompt"] = [""] * count
    return given


def denoiser_of(pipeline: DiffusionPipeline, resolution: Size | None = None, num_frames: int | None = None) -> Denoiser:
    """The denoiser of a pipeline, for images of ``resolution`` pixels a side, or of (height, width), by default of the
    model's native size, or for videos of ``num_frames`` frames, by default as many as the pipeline draws.

    Raises:
        TypeError: not a pipeline, or of an unknown family.
        ValueError: the pipeline lacks a part, or takes more than prompts; or resolution or num_frames does not suit the
            model.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(
            f"pipeline must be a diffusers pipeline, got {type(pipeline).__name__}; load it with from_pretrained"
        )
    for family in FAMILIES:
        if family.fits(pipeline):
            return family(pipeline, resolution, num_frames)
    for name in DENOISERS:
        if hasattr(getattr(pipeline, name, None), "_orig_mod"):
            raise TypeError(
                f"pipeline.{name} is compiled; set pipeline.{name} = pipeline.{name}._orig_mod before training, and "
                "pass compile=True, so that fdu compiles it"
            )
    raise TypeError(
        f"pipeline is a {type(pipeline).__name__}, whose family is not supported yet; supported: "
        f"{'; '.join(family.family for family in FAMILIES)}. "
        "To add a family, write a subclass of Denoiser in fdu/models/ and name it in FAMILIES"
    )
