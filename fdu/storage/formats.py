"""The formats of a saved erasure: choose one and write it, for diffusers, ComfyUI and others."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast, get_args

from diffusers import DiffusionPipeline
from torch import Tensor

from fdu.config import TRAIN_METHODS, check_choice
from fdu.models import parts
from fdu.models.quantization import is_few_bits, quantization_of
from fdu.storage import delta, kohya, lora
from fdu.storage.merging import merged
from fdu.storage.output import PIPELINE_FILE

Format = Literal["lora", "kohya", "pipeline", "delta"]


def choose_format(save_as: str, train_method: str, pipeline: DiffusionPipeline | None = None) -> Format:
    """The format that ``save_as`` means for a training method; "auto" is one that plain diffusers loads in one line.

    Args:
        save_as: "auto" or a format.
        train_method: as in :class:`fdu.EraseConfig`.
        pipeline: its family must have the format; None skips this check.

    Raises:
        ValueError: an unknown format, or one that the method's result, or the family, cannot have.
    """
    check_choice("save_as", save_as, ("auto", *get_args(Format)))
    trains_adapter = TRAIN_METHODS[train_method].result != "weights"
    has_lora = pipeline is None or hasattr(pipeline, "save_lora_weights")
    if save_as == "auto":
        save_as = "lora" if trains_adapter and has_lora else "pipeline"
    if save_as in ("pipeline", "delta") and pipeline is not None and _is_quantized(pipeline, trains_adapter):
        raise ValueError(
            f'save_as "{save_as}" would merge the adapter into quantized weights; choose save_as "lora" or "kohya", or '
            "load the pipeline without quantization"
        )
    if save_as == "lora" and not has_lora:
        raise ValueError(
            f'save_as "lora": diffusers has no LoRA format for {type(pipeline).__name__}; '
            'choose save_as "delta" or "pipeline", which merge adapters'
        )
    if save_as == "kohya" and pipeline is not None:
        kohya.table(pipeline)
    if save_as in ("lora", "kohya") and not trains_adapter:
        raise ValueError(
            f'save_as "{save_as}" needs an adapter, but train_method "{train_method}" changes the weights '
            'themselves; choose save_as "delta" (the changed weights alone) or "pipeline", or train_method "lora"'
        )
    return cast(Format, save_as)


def _is_quantized(pipeline: DiffusionPipeline, trains_adapter: bool) -> bool:
    """Whether the pipeline has weights that only fdu stores so, or an adapter would be merged into weights of few bits,
    where rounding would take it away."""
    denoiser = getattr(pipeline, parts.denoiser_name(pipeline))
    merges = trains_adapter and any(map(is_few_bits, denoiser.parameters()))
    return merges or quantization_of(pipeline) != "none"


def write(
    folder: str | Path,
    format: Format,
    pipeline: DiffusionPipeline,
    lora_layers: Mapping[str, Mapping[str, Tensor]] | None = None,
    changed_weights: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    lora_alpha: float | None = None,
    base: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the erasure that ``pipeline`` carries into an existing folder; returns the file that loads it.

    | format | file | loads with |
    |---|---|---|
    | lora | pytorch_lora_weights.safetensors | ``pipeline.load_lora_weights(folder)`` |
    | kohya | kohya_lora.safetensors | ComfyUI, Forge, AUTOMATIC1111, sd-scripts; of some families diffusers |
    | pipeline | model_index.json and one folder per model | ``DiffusionPipeline.from_pretrained(folder)`` |
    | delta | delta.safetensors | ``fdu.load_weights(pipeline, folder)`` |

    With "pipeline" and "delta", active adapters are merged in what is written, and only there.

    Args:
        folder: an existing folder, such as :func:`fdu.storage.output.whole_folder` yields.
        format: as returned by :func:`choose_format`.
        pipeline: the pipeline after the training.
        lora_layers: as returned by :meth:`fdu.training.methods.trainable.Trainable.lora_layers`.
        changed_weights: as returned by :meth:`fdu.training.methods.trainable.Trainable.changed_weights`.
        lora_alpha: the alpha of every LoRA layer; None means its rank.
        base: the base model's name, without its path on this machine.
        metadata: strings for the header of a kohya file or a delta, such as what was erased.

    Raises:
        ValueError: a format that this result cannot have, or that does not exist for the family; nothing changed.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    made = _write(folder, format, pipeline, lora_layers or {}, changed_weights or {}, lora_alpha, base, metadata or {})
    for path in folder.rglob("*.safetensors"):
        _order_header(path)
    return made


def _write(
    folder: Path,
    format: Format,
    pipeline: DiffusionPipeline,
    lora_layers: Mapping[str, Mapping[str, Tensor]],
    changed_weights: Mapping[str, tuple[Tensor, Tensor]],
    lora_alpha: float | None,
    base: str,
    metadata: Mapping[str, str],
) -> Path:
    if format == "lora" or format == "kohya":
        if not lora_layers:
            raise ValueError(
                f'format "{format}" needs LoRA layers, but the run trained weights; choose "delta" or "pipeline"'
            )
        updates = lora.check(pipeline, lora.from_layers(lora_layers, lora_alpha))
        if format == "lora":
            return lora.write(folder, pipeline, updates)
        return kohya.write(folder, pipeline, updates, metadata)
    with merged(pipeline) as by_adapters:
        if format == "delta":
            changed = dict(changed_weights)
            for name, (before, after) in by_adapters.items():
                changed[name] = (changed[name][0] if name in changed else before, after)
            return delta.write(folder, pipeline, changed, base, metadata)
        pipeline.save_pretrained(folder)
        _leave_out_places(folder)
        return folder / PIPELINE_FILE


def public_name(name: str) -> str:
    """A hub id unchanged, but only the name of a local folder or file, because its path is private."""
    return Path(name).resolve().name if name and (Path(name).is_absolute() or Path(name).exists()) else name


def _order_header(path: Path) -> None:
    """Sort the strings in the header of a safetensors file, so that the same weights are the same bytes: safetensors
    writes them in any order."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        texts = dict(sorted(header.pop("__metadata__", {}).items()))
        ordered = {"__metadata__": texts, **header} if texts else header
        written = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(written) <= length, "the same strings take no more bytes"
        file.seek(8)
        file.write(written.ljust(length))


def _leave_out_places(folder: Path) -> None:
    """Shorten paths in the configs, which note where the models came from, to the names of folders."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        place = content.get("_name_or_path") if isinstance(content, dict) else None
        if isinstance(place, str) and public_name(place) != place:
            content["_name_or_path"] = public_name(place)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
