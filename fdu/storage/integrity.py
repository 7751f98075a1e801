"""Files of tensors with their SHA-256 in the header, compared when they are read: a flipped bit is an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DIGEST = "sha256"
"""The key of the digest in the header."""


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with a digest of themselves, and of the tensors in it."""
    return {**metadata, DIGEST: json.dumps([_digest_of_text(metadata), digest(tensors)])}


def read_sealed(path: Path, header_only: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and its metadata.

    Args:
        path: a safetensors file. One that was written without a digest is not compared; its metadata lack DIGEST.
        header_only: read and compare the metadata alone; there are no tensors.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no safetensors file, or not as it was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {} if header_only else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is damaged: {error}") from error
    if DIGEST in metadata:
        text, content = _digest_of_text(metadata), None if header_only else digest(tensors)
        try:
            expected_text, expected = json.loads(metadata[DIGEST])
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError("it is damaged: its digest cannot be read") from error
        if text != expected_text or content not in (None, expected):
            part = "header" if text != expected_text else "tensors"
            raise ValueError(f"it is damaged: the SHA-256 of its {part} is not the one that was written")
    return tensors, metadata


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors with their names, dtypes and shapes, in any order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _digest_of_text(metadata: Mapping[str, str]) -> str:
    others = {name: text for name, text in metadata.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()
