"""A delta: only the changed weights, in one safetensors file; exact on its own base model, refused on others.

New values are stored, not differences: an addition would round. Of a matrix in which few rows changed, such as the
token embeddings after one token was trained, only these rows are stored, with their indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from fdu.models import parts
from fdu.storage.fingerprint import fingerprint
from fdu.storage.foreign import printable
from fdu.storage.tensor_checks import check_floats, is_finite

DELTA_FILE = "delta.safetensors"
FORMAT_KEY, FORMAT = "fdu_format", "delta 1"
"""Metadata that identifies a delta, with the version of the format."""
BASE_KEY, FINGERPRINT_KEY = "base", "base_fingerprint"
ROWS, INDICES = ":rows", ":indices"
"""Suffixes for changed rows and their indices; no parameter's name has a colon."""
BUFFER = "position_ids"
"""A buffer in text encoders of transformers 4, not a weight."""
FEW = 8
"""Changed rows are stored alone if at most one in 8 changed."""


@dataclasses.dataclass(frozen=True)
class Change:
    """New values of a parameter."""

    name: str
    """ "attribute.parameter", by the pipeline's own names."""
    values: Tensor
    rows: Tensor | None = None
    """Indices [N] of the rows in ``values``; None for all rows."""


def write(
    folder: Path,
    pipeline: DiffusionPipeline,
    changed_weights: Mapping[str, tuple[Tensor, Tensor]],
    base: str,
    metadata: Mapping[str, str],
) -> Path:
    """Write the weights that differ.

    Args:
        folder: where :data:`DELTA_FILE` goes.
        pipeline: the pipeline, with the weights after or before the erasure.
        changed_weights: "attribute.parameter" -> (before, after), in the model's dtype.
        base: the base model's name, for messages.
        metadata: strings for the file's header, besides those needed to apply it.

    Raises:
        ValueError: nothing changed.
    """
    tensors = {}
    for name, (before, after) in changed_weights.items():
        differs = before != after
        if not differs.any():
            continue
        rows = differs.reshape(len(differs), -1).any(1).nonzero()[:, 0] if differs.ndim else differs
        if after.ndim >= 2 and FEW * len(rows) <= len(after):
            tensors[name + ROWS], tensors[name + INDICES] = after[rows], rows
        else:
            tensors[name] = after
    if not tensors:
        raise ValueError("nothing to save: no weight differs from before")
    known = {
        FORMAT_KEY: FORMAT,
        BASE_KEY: base,
        FINGERPRINT_KEY: fingerprint(pipeline, {name: before for name, (before, _) in changed_weights.items()}),
    }
    path = folder / DELTA_FILE
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(stored, path, {"format": "pt", **metadata, **known})
    return path


def is_delta(metadata: Mapping[str, str]) -> bool:
    """Whether a file is a delta of fdu.

    Raises:
        ValueError: a delta of a later version.
    """
    form = metadata.get(FORMAT_KEY, "")
    if form.startswith("delta ") and form != FORMAT:
        raise ValueError(f"the file is a {form!r}, this version of fdu reads {FORMAT!r}; update fdu")
    return form == FORMAT


def check_base(pipeline: DiffusionPipeline, metadata: Mapping[str, str]) -> None:
    """Raise ValueError if a delta was made on another base than the pipeline."""
    expected, found = metadata.get(FINGERPRINT_KEY, "none"), fingerprint(pipeline)
    if expected != found:
        name = pipeline.config.get("_name_or_path") or type(pipeline).__name__
        raise ValueError(
            f"the delta was made on {printable(metadata.get(BASE_KEY) or 'a base')} with fingerprint "
            f"{printable(expected[:16])}, but this "
            f"pipeline, {name}, has {found[:16]}; load that base in the dtype of the training, without other "
            "changes, or pass check_base=False to apply it anyway"
        )


def changes(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> list[Change]:
    """The changes in a file, under the pipeline's own names. Nothing is changed yet.

    Args:
        pipeline: the pipeline to change.
        tensors: new values by "attribute.parameter"; without an attribute, the denoiser's.

    Raises:
        ValueError: a parameter that the pipeline does not have, or not as plain numbers in memory; a shape or a dtype
            that does not fit; or indices that are none.
    """
    found: dict[str, Change] = {}
    own = parts.weights(pipeline)
    for key, tensor in tensors.items():
        if key.endswith(BUFFER):
            continue
        if key.endswith(INDICES):
            if key.removesuffix(INDICES) + ROWS not in tensors:
                raise ValueError(f"the file has {key}, indices without rows; it is incomplete")
            continue
        attribute, name = parts.split(pipeline, key.removesuffix(ROWS))
        target = parts.find(own, name, f"{attribute}.")
        if target is None:
            raise ValueError(
                f"the file changes {attribute}.{name}, which this {type(pipeline).__name__} does not have; "
                "load it into the model family it was made for"
            )
        if target in found:
            raise ValueError(f"the file changes {target} twice; drop one of its tensors")
        rows = None
        if key.endswith(ROWS):
            rows = tensors.get(key.removesuffix(ROWS) + INDICES)
            _check_indices(target, own[target], rows)
        _check_shape(target, tensor, own[target], rows)
        found[target] = Change(target, tensor, rows)
    return list(found.values())


Former = list[tuple[Tensor, Any, Tensor]]
"""Weights, the place in each that was changed, and its former values on the CPU."""


@torch.no_grad()
def apply(pipeline: DiffusionPipeline, wanted: list[Change], strength: float = 1.0) -> Former:
    """Set the new values, all or, after an error, none; with ``strength`` below or above 1, part of the way or beyond.

    Raises:
        ValueError: a value that the pipeline's dtype cannot hold.
    """
    own = parts.weights(pipeline)
    ready = []
    for change in wanted:
        weight = own[change.name]
        place = ... if change.rows is None else change.rows.to(weight.device)
        values = change.values.to(weight.dtype)
        if strength != 1:
            before = weight[place].float()
            values = torch.lerp(before, values.to(before), strength).to(weight.dtype)
        if not is_finite(values):
            raise ValueError(
                f"{change.name} would have numbers that {weight.dtype} cannot hold (it is {change.values.dtype} in the "
                f"file, the strength {strength:g}); load the pipeline in float32, or choose a strength near 1"
            )
        ready.append((weight, place, values))
    former: Former = []
    try:
        for weight, place, values in ready:
            former.append((weight, place, weight[place].to("cpu", copy=True)))
            weight[place] = values.to(weight.device)
    except BaseException:
        _restore(former)
        raise
    return former


@contextmanager
def applied(pipeline: DiffusionPipeline, wanted: list[Change], strength: float = 1.0) -> Iterator[None]:
    """Within this context the weights have the new values; afterwards all are as they were, bit for bit.

    Raises:
        ValueError: as :func:`apply`.
    """
    former = apply(pipeline, wanted, strength)
    try:
        yield
    finally:
        _restore(former)


@torch.no_grad()
def _restore(former: Former) -> None:
    for weight, place, values in reversed(former):  # two names may be one weight
        weight[place] = values.to(weight.device)


def _check_shape(name: str, tensor: Tensor, weight: Tensor, rows: Tensor | None) -> None:
    if weight.is_meta:
        raise ValueError(f"{name} is not in memory; load the weights before the pipeline is offloaded")
    if not weight.is_floating_point():
        raise ValueError(f"{name} is stored in {weight.dtype} here; load the pipeline without quantization")
    expected = weight.shape if rows is None else (len(rows), *weight.shape[1:])
    if tensor.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)} here, but {tuple(tensor.shape)} ({tensor.dtype}) in the file; "
            "load it into the model it was made for"
        )
    check_floats(name, tensor)


def _check_indices(name: str, weight: Tensor, rows: Tensor | None) -> None:
    if rows is None:
        raise ValueError(f"the file has rows of {name} but lacks their indices; it is incomplete")
    if not weight.ndim:
        raise ValueError(f"the file changes rows of {name}, which has no rows; load it into the model it was made for")
    if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"the indices of the rows of {name} are {rows.dtype} of shape {tuple(rows.shape)}, not whole numbers in a "
            "line; the file is damaged"
        )
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(weight):
        raise ValueError(f"the file changes rows of {name} beyond its {len(weight)} rows; it is damaged")
    if len(rows.unique()) < len(rows):
        raise ValueError(f"the file changes a row of {name} more than once; it is damaged")
