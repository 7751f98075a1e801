"""Load an erasure into a pipeline, from files of any origin, without executing code in them.

The names of the tensors reveal the format of the file.
"""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from fdu.models import parts
from fdu.models.kohya_names import original_name
from fdu.storage import delta, kohya, lora
from fdu.storage.output import PIPELINE_FILE
from fdu.storage.tensor_checks import check_name, check_tensors

OWN_FILES = (lora.LORA_FILE, kohya.KOHYA_FILE, delta.DELTA_FILE)
"""The files that fdu writes; a folder is searched for them first, in this order."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
COMPVIS_PREFIX = "model.diffusion_model."
"""Prefix of the UNet's weights in the original code of Stable Diffusion."""
DEPTH, ENTRIES = 32, 1_000_000
"""The most levels of nested dicts that are followed, and the most entries; an entry counts for every way to it."""
SIZES, SPARE_BYTES = 8, 64 << 20
"""The most memory that tensors of one storage may take together: so many sizes of the file, and so many bytes."""
LARGEST = torch.finfo(torch.float32).max
ZIP = b"PK\x03\x04"
"""How the files of torch.save begin, since PyTorch 1.6."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The loaded weights."""

    format: str
    """Format of the file in words."""
    tensors: int
    """Number of tensors in it."""
    attributes: tuple[str, ...]
    """The pipeline's models that it changes."""
    adapter_name: str | None = None
    """Name of the adapter; None if the weights themselves changed."""


@dataclasses.dataclass(frozen=True)
class ReadWeights:
    """The content of a file of weights, checked against a pipeline, which is unchanged."""

    format: str
    """Format of the file in words."""
    tensors: int
    """Number of tensors in it."""
    updates: lora.Updates | None
    """Of an adapter; None if the file holds new weights."""
    changes: list[delta.Change]
    """New weights; none if the file holds an adapter."""


def load_weights(
    pipeline: DiffusionPipeline,
    path: str | Path,
    adapter_name: str | None = None,
    strength: float = 1.0,
    check_base: bool = True,
) -> Loaded:
    """Load an erasure into ``pipeline``, whole or not at all.

    Reads LoRA and DoRA files (diffusers, peft or kohya names), fdu's deltas, and state dicts of changed weights
    (diffusers or CompVis names): concept ablation's ``delta.bin``, ESD, UCE, f-DMU and others. LoRA becomes a further
    active adapter; everything else replaces weights.

    Args:
        pipeline: the pipeline that the file was made for.
        path: a .safetensors, .bin, .pt, .pth or .ckpt file, or a folder with one. No code in it is executed.
        adapter_name: name of the LoRA adapter. None: a free one.
        strength: factor on the change; 1 is the trained erasure, 0 none.
        check_base: refuse fdu's delta on a base other than its own.

    Raises:
        FileNotFoundError, OSError: no weights at ``path``, or they cannot be read.
        ValueError: an unknown format, another model family, other shapes, numbers that are not finite, a damaged file,
            or a pickle that would execute code; the pipeline is unchanged.
        TypeError: the pipeline cannot carry LoRA weights.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) <= LARGEST:
        raise ValueError(f"strength must be a finite number that float32 holds, got {strength!r:.20}")
    if adapter_name is not None and (not adapter_name or "." in adapter_name):
        raise ValueError(f"adapter_name {adapter_name!r} must not be empty and must have no dot; choose another")
    found = read_weights(pipeline, path, check_base)
    try:
        if found.updates is not None:
            adapter_name = lora.attach(pipeline, found.updates, adapter_name, strength)
            return Loaded(found.format, found.tensors, tuple(found.updates), adapter_name)
        delta.apply(pipeline, found.changes, strength)
    except ValueError as error:
        raise ValueError(f"weights {str(weights_file(path))!r}: {error}") from error
    attributes = dict.fromkeys(change.name.partition(".")[0] for change in found.changes)
    return Loaded(found.format, found.tensors, tuple(attributes))


def read_weights(pipeline: DiffusionPipeline, path: str | Path, check_base: bool = True) -> ReadWeights:
    """Read an erasure for ``pipeline`` without loading it; arguments and errors as of :func:`load_weights`."""
    file = weights_file(path)
    content, metadata = _read(file)
    updates: lora.Updates | None = None
    changes: list[delta.Change] = []
    try:
        tensors = _flat(content)
        check_tensors(tensors)
        _check_memory(tensors, file.stat().st_size)
        if kohya.is_kohya_lora(tensors):
            kind, updates = "kohya LoRA", kohya.from_file(pipeline, tensors)
        elif lora.is_diffusers_lora(tensors):
            kind, updates = "diffusers LoRA", lora.from_file(pipeline, tensors, metadata)
        elif delta.is_delta(metadata):
            kind, changes = "fdu delta", delta.changes(pipeline, tensors)
            if check_base:
                delta.check_base(pipeline, metadata)
        elif _is_state_dict(pipeline, tensors):
            kind, changes = "changed weights", delta.changes(pipeline, _in_diffusers_names(pipeline, tensors))
        else:
            first = ", ".join(repr(name) for name in list(tensors)[:3])
            raise ValueError(
                "unknown format: neither LoRA in diffusers', peft's or kohya's names, nor a delta of fdu, nor weights "
                f"by the names that they have in this {type(pipeline).__name__}; first tensors: {first}"
            )
        if updates is not None:
            updates = lora.check(pipeline, updates)
    except ValueError as error:
        raise ValueError(f"weights {str(file)!r}: {error}") from error
    return ReadWeights(kind, len(tensors), updates, changes)


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


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, tensors in dicts, and its metadata. Unchecked.

    Raises:
        OSError: it cannot be opened.
        ValueError: the file is damaged, or could only be read by executing its code.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except OSError:
            raise
        except Exception as error:  # a dtype that this version does not know makes it raise errors of many kinds
            raise ValueError(f"weights {str(path)!r} are not a safetensors file, or are damaged ({error})") from error
    try:
        _check_packing(path)
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights {str(path)!r} are a pickle that would execute code and are not loaded. Ask for a safetensors "
            "file. If you trust the author, read the pickle on an isolated machine with torch.load(..., "
            "weights_only=False) and write its tensors with safetensors.torch.save_file"
        ) from error
    except Exception as error:  # a broken file makes torch raise errors of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"weights {str(path)!r} cannot be read ({reason}); the file is damaged") from error


def _check_packing(path: Path) -> None:
    """Raise ValueError for a file of torch.save that is compressed: PyTorch writes none, and a small one could take all
    memory."""
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return
    with zipfile.ZipFile(path) as packed:
        unpacked, size = sum(entry.file_size for entry in packed.infolist()), path.stat().st_size
    if unpacked > size:
        raise ValueError(f"it is compressed: {size} bytes would become {unpacked}")


def _check_memory(tensors: Mapping[str, Tensor], size: int) -> None:
    """Raise ValueError for tensors that share what a file stores so often that they would take much memory."""
    needed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if needed > SIZES * size + SPARE_BYTES:
        raise ValueError(
            f"the file of {size / 2**20:.0f} MiB takes {needed / 2**20:.0f} MiB in memory, because its tensors share "
            "what it stores; ask its author for a safetensors file"
        )


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


def _flat(content: Any) -> dict[str, Tensor]:
    """The tensors in nested dicts, the keys joined by dots. "state_dict" is only a wrapper; what is no tensor, such as
    a step, is left out.

    Raises:
        ValueError: there are none, names that none can have, or dicts that nest without end.
    """
    found: dict[str, Tensor] = {}
    entries = 0

    def visit(value: Any, path: tuple[Any, ...], depth: int) -> None:
        nonlocal entries
        if isinstance(value, Tensor):
            name = _name(path)
            if name in found:
                raise ValueError(f"the file holds the tensor {name!r} twice, in dicts of different depths; drop one")
            found[name] = value.detach()
        elif isinstance(value, Mapping):
            entries += len(value)
            if depth > DEPTH:
                raise ValueError(f"its dicts nest deeper than {DEPTH} levels; the file is no state dict of a model")
            if entries > ENTRIES:
                raise ValueError(f"its dicts hold more than {ENTRIES} entries; the file is no state dict of a model")
            for key, item in value.items():
                visit(item, path if key == "state_dict" and not path else (*path, key), depth + 1)

    visit(content, (), 0)
    if not found:
        raise ValueError("the file holds no tensors; give one with the weights of a model")
    return found


def _name(path: tuple[Any, ...]) -> str:
    """The name of a tensor by the keys that lead to it; numbers may be among them."""
    for key in path:
        if isinstance(key, str):
            check_name(key)
        elif type(key) is not int or abs(key) > ENTRIES:
            raise ValueError(f"a tensor has a key of type {type(key).__name__}; keys of state dicts are strings")
    return ".".join(map(str, path))


def _is_state_dict(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> bool:
    """Whether names are those of weights, of this pipeline or of another family."""
    blocks = ("down_blocks.", "mid_block.", "up_blocks.", "transformer_blocks.", "single_transformer_blocks.")
    attributes = tuple(f"{name}." for name in (*parts.DENOISERS, *parts.TEXT_ENCODERS))
    own, denoiser = parts.weights(pipeline), parts.denoiser_name(pipeline)
    return any(name.startswith((*blocks, *attributes, COMPVIS_PREFIX)) for name in tensors) or any(
        f"{denoiser}.{name}" in own for name in tensors
    )


def _in_diffusers_names(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors, those in CompVis' names renamed.

    Raises:
        ValueError: a full checkpoint of all models, or weights in both kinds of names.
    """
    if any(name.startswith("first_stage_model.") for name in tensors):
        raise ValueError("a full checkpoint; load it with StableDiffusionPipeline.from_single_file")
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        return tensors
    diffusers_names = {
        original: layer for layer in parts.layers(unet) if (original := original_name(layer, unet.config)) is not None
    }

    def renamed(name: str) -> str:
        layer, _, parameter = name.removeprefix(COMPVIS_PREFIX).rpartition(".")
        known = diffusers_names.get(layer.replace(".", "_"))
        return f"unet.{known}.{parameter}" if known and name.startswith(COMPVIS_PREFIX) else name

    own_names = {renamed(name): tensor for name, tensor in tensors.items()}
    if len(own_names) < len(tensors):
        raise ValueError("the file holds weights twice, in diffusers' and in CompVis' names; drop one of them")
    return own_names
