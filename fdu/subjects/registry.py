"""The subject of a model name, for the command line and :func:`fdu.load_pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fdu.config import check_choice
from fdu.storage.loading import at_revision, check_model, check_quantization, choose_device, with_config
from fdu.subjects.embedded import EMBEDDED
from fdu.subjects.subject import Subject

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def find_subject(model: str) -> Subject:
    """The subject of that name, which need not exist."""
    return next((one(model) for one in EMBEDDED if one.answers_to(model)), Subject(model))


def subject_of(model: str, argument: str = "MODEL") -> Subject:
    """The subject of that name; nothing is loaded.

    Args:
        model: a pipeline's folder, a .safetensors file, a hub id (org/name), or the name of a pipeline of fdu.
        argument: its name in errors.

    Raises:
        ValueError: no name, or a file that is no model.
        FileNotFoundError: neither a pipeline's folder, nor a file, nor a pipeline of fdu, nor of the form of a hub id.
    """
    subject = find_subject(model)
    if not subject.title:
        check_model(model, argument, tuple(one.name for one in EMBEDDED))
    return subject


def load_pipeline(
    model: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    quantization: str = "none",
    offload: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | Path | None = None,
    base_lora: Sequence[str | Path] = (),
) -> DiffusionPipeline:
    """Load a pipeline by the name that the command line takes.

    Args:
        model: a pipeline's folder, a .safetensors file, a hub id (org/name), "emoji" or "digits".
        dtype: dtype of the weights: float32, float16 or bfloat16, by name or from torch.
        device: the device to put the pipeline on: cpu, cuda, mps or auto.
        quantization: store the linear layers in the blocks of the denoiser and of large text encoders in four or eight
            bits, to train adapters on: "nf4" (needs bitsandbytes), "int8" or "fp8".
        offload: keep the blocks of a transformer on the CPU, from which they come to the device one at a time, to train
            adapters with gradient_checkpointing.
        revision: branch, tag or commit of a hub id.
        variant: of the weights' files, such as "fp16". By default those of full precision, or fp16 where there are no
            others.
        model_config: of a .safetensors file: the pipeline that it belongs to, by folder or hub id, for configs and
            tokenizers, and for the weights of what the file lacks. By default the one that diffusers knows for such
            files, from the hub.
        base_lora: files or folders of LoRA weights that become active adapters, and so part of what is erased from.

    Raises:
        ValueError, FileNotFoundError: as :func:`subject_of`, or an unknown dtype, device or quantization; or a denoiser
            without blocks to offload.
        ImportError: the quantization's package is missing.
        OSError: it cannot be loaded; the message gives the first line of the reason.
    """
    dtype = str(dtype).removeprefix("torch.")
    check_choice("dtype", dtype, ("float32", "float16", "bfloat16"))
    check_quantization(quantization)
    config = None if model_config is None else str(model_config)
    subject = subject_of(with_config(at_revision(str(model), revision), config, variant))
    loras = [base_lora] if isinstance(base_lora, (str, Path)) else base_lora
    return subject.load(dtype, choose_device(device), quantization, offload, variant, [*map(str, loras)])
