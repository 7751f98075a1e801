"""Read weights from files of any origin as named tensors, without executing code in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fdu.storage.delta import DELTA_FILE
from fdu.storage.kohya import KOHYA_FILE
from fdu.storage.lora import LORA_FILE

OWN_FILES = (LORA_FILE, KOHYA_FILE, DELTA_FILE)
"""What is looked for first in a folder, in this order."""
PIPELINE_FILE = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def weights_file(path: str | Path) -> Path:
    """The file of weights that ``path`` is or holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a full pipeline, several files, or a file of a kind that is not read.
    """
    path = Path(path)
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(path)!r} do not exist; give a file or a folder of weights")
    if path.suffix not in (".safetensors", *PICKLES):
        raise ValueError(
            f"weights {str(path)!r} have none of the endings .safetensors, {', '.join(PICKLES)}; give such a file"
        )
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, the names of nested dicts joined by dots, and its metadata.

    Raises:
        ValueError: the file is damaged, holds no tensors, or could only be read by executing its code.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"weights {str(path)!r} are not a safetensors file, or are damaged ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights {str(path)!r} are a pickle that would execute code and are not loaded. Ask for a safetensors "
            "file. If you trust the author, read the pickle on an isolated machine with torch.load(..., "
            "weights_only=False) and write its tensors with safetensors.torch.save_file"
        ) from error
    except Exception as error:  # what a broken file makes the reader raise has no common kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"weights {str(path)!r} cannot be read ({reason}); the file is damaged") from error
    tensors = dict(_flat(content, ""))
    if not tensors:
        raise ValueError(f"weights {str(path)!r} hold no tensors")
    return tensors, {}


def _in_folder(folder: Path) -> Path:
    for name in OWN_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / PIPELINE_FILE).is_file():
        raise ValueError(
            f"weights {str(folder)!r} are a full pipeline; load it with DiffusionPipeline.from_pretrained(folder)"
        )
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES) and path.is_file())
    if not found:
        raise FileNotFoundError(f"weights {str(folder)!r} contain no file ending in .safetensors, {', '.join(PICKLES)}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise ValueError(f"weights {str(folder)!r} hold several files ({names}); name the one to load")
    return found[0]


def _flat(content: Any, prefix: str) -> list[tuple[str, Tensor]]:
    """The tensors in nested dicts; "state_dict" is but a wrapping, and what is no tensor (steps, settings) is left."""
    if isinstance(content, Tensor):
        return [(prefix, content.detach())]
    if not isinstance(content, Mapping):
        return []
    return [
        pair
        for key, value in content.items()
        for pair in _flat(value, prefix if key == "state_dict" and not prefix else f"{prefix}.{key}".lstrip("."))
    ]
