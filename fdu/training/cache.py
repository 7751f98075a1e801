"""A cache of tensors that are expensive and serve many runs: a folder of files named after a hash of their inputs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import fdu
from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.storage.fingerprint import fingerprint
from fdu.storage.integrity import DIGEST, read_sealed, sealed
from fdu.storage.output import whole_file

LOGGER = logging.getLogger(__name__)
KEY = "key"
"""Where an entry's file keeps its inputs."""


class Cache:
    """A folder of tensors. Without a folder, everything is computed.

    Args:
        folder: the files; it is made with the first of them.
        base: inputs of all entries, ready for JSON.
        accelerator: the processes; all of them find an entry, or none does.
    """

    def __init__(self, folder: str | Path | None, base: dict[str, Any], accelerator: Accelerator) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.base = base
        self.accelerator = accelerator

    def get(
        self, kind: str, key: dict[str, Any], make: Callable[[], dict[str, Tensor]], every_process: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of ``kind`` that depend on ``key`` alone, from the folder (then on the CPU) or from ``make``.

        A file appears whole or not at all. A damaged file, or one of another key, is replaced, and an unwritable folder
        costs only the entry. With ``every_process`` each process has its own entry, and ``key`` must tell them apart.
        """
        if self.folder is None:
            return make()
        text = json.dumps({**self.base, **key, "kind": kind}, sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        found = self._read(path, text)
        # Making may need all processes.
        if self.accelerator.num_processes > 1 and not all(gather_object([found is not None])):
            found = None
        if found is not None:
            return found
        made = make()
        if every_process or self.accelerator.is_main_process:
            try:
                with whole_file(path) as fresh:
                    tensors = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
                    save_file(tensors, fresh, sealed(tensors, {KEY: text}))
            except (OSError, SafetensorError) as error:
                LOGGER.warning("cache entry %s could not be written (%s); continuing", path, error)
        return made

    @staticmethod
    def _read(path: Path, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry; None if there is none, or none that is as it was written."""
        if not path.is_file():
            return None
        try:
            found, metadata = read_sealed(path)
            if DIGEST not in metadata:
                raise ValueError("it has no SHA-256, as entries of earlier versions")
            if metadata.get(KEY) != key:
                raise ValueError("it was made from other inputs")
        except (OSError, ValueError) as error:
            LOGGER.warning("cache entry %s cannot be used (%s); it is made again", path, error)
            return None
        return found


def model_key(denoiser: Denoiser) -> dict[str, Any]:
    """The inputs of prompts, latents and frozen outputs of a pipeline, besides the settings."""
    pipeline = denoiser.pipeline
    settings = {name: repr(value) for name, value in pipeline.config.items() if not name.startswith("_")}
    return {
        "weights": fingerprint(pipeline, adapters=True),
        "pipeline": type(pipeline).__name__,
        "settings": settings,
        "scheduler": f"{type(pipeline.scheduler).__name__} {pipeline.scheduler.config}",
        "size": (*([denoiser.frames] if denoiser.draws_videos else []), denoiser.height, denoiser.width),
        "guidance": denoiser.embedded_guidance if denoiser.reads_guidance else None,
        "versions": [module.__version__ for module in (fdu, torch, diffusers, transformers)],
    }


def token_key(denoiser: Denoiser, prompts: list[str]) -> str:
    """A hash of what the pipeline's tokenizers make of prompts."""
    found = [parts.tokenizer(denoiser.pipeline, encoder) for encoder in parts.TEXT_ENCODERS]
    tokenizers = [tokenizer for tokenizer in found if tokenizer is not None]
    tokens = [tokenizer(prompts)["input_ids"] for tokenizer in tokenizers]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def tensor_key(*tensors: Tensor) -> str:
    """A hash of the values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
