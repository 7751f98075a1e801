"""Tensors that are costly to make and the same for many runs: kept in a folder, named by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class Cache:
    """A folder of tensors. Without a folder everything is made anew.

    Args:
        folder: where the files lie; it is made when something is first kept.
        base: what all entries depend on, such as the fingerprint of the model; ready for JSON.
        writes: whether this process keeps what it makes; with several, one does.
    """

    def __init__(self, folder: str | Path | None, base: dict[str, Any], writes: bool = True) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.base = base
        self.writes = writes

    def get(self, kind: str, key: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of ``kind`` that depend on ``key`` alone, from the folder or from ``make``; on the CPU if read.

        A file appears whole or not at all. One that cannot be read is made anew; a full disk costs the entry only.
        """
        if self.folder is None:
            return make()
        text = json.dumps({**self.base, **key, "kind": kind}, sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            made = make()
        if self.writes:
            self._keep(path, made, text)
        return made

    def _keep(self, path: Path, tensors: dict[str, Tensor], text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, fresh = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, fresh, {"key": text})
            os.replace(fresh, path)
        except (OSError, SafetensorError):
            Path(fresh).unlink(missing_ok=True)
