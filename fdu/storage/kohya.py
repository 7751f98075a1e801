"""LoRA files with the names of kohya's sd-scripts, which ComfyUI, Forge and AUTOMATIC1111 read."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.models.normalization import AdaLayerNormContinuous
from safetensors.torch import save_file
from torch import Tensor, nn

from fdu.models import parts
from fdu.models.families import FAMILIES, family_of
from fdu.models.kohya_names import KohyaNames
from fdu.storage.lora import Update, Updates, check_parts
from fdu.storage.tensor_checks import one_number

KOHYA_FILE = "kohya_lora.safetensors"
ENDS = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One layer of the original code: one or several of diffusers', whose outputs it concatenates."""

    attribute: str
    layers: tuple[str, ...]
    halves_swapped: bool = False
    """The halves of the outputs change places: scale and shift there, shift and scale here."""


def table(pipeline: DiffusionPipeline) -> dict[str, Slot]:
    """Kohya's names of all layers that have weights. Of several names of a layer the last is the one to write.

    Raises:
        ValueError: no program names the layers of this family in kohya's way.
    """
    names, attribute = kohya_names(pipeline), parts.denoiser_name(pipeline)
    module = getattr(pipeline, attribute)
    modules, present = parts.layers(module), set(_with_weights(module))
    found = {}
    for name, layers in names.layers(module):
        if present.issuperset(layers):
            swapped = isinstance(modules[layers[0].rpartition(".")[0]], AdaLayerNormContinuous)
            found[f"lora_unet_{name}"] = Slot(attribute, layers, swapped)
    for encoder, prefixes in names.text_prefixes.items():
        model = parts.models(pipeline).get(encoder)
        for layer in _with_weights(model) if model is not None else ():
            full = f"text_model.{layer}" if parts.lost_prefix(model) else layer
            for prefix in prefixes:
                found[f"{prefix}_{full.replace('.', '_')}"] = Slot(encoder, (layer,))
    return found


def kohya_names(pipeline: DiffusionPipeline) -> KohyaNames:
    """The names of a pipeline's family.

    Raises:
        ValueError: there are none.
    """
    module = getattr(pipeline, parts.denoiser_name(pipeline))
    family = family_of(module)
    if family is None or family.kohya is None:
        known = ", ".join(one.family.partition(" (")[0] for one in FAMILIES if one.kohya is not None)
        raise ValueError(
            f"kohya's names are known for {known}, not for {type(module).__name__}; "
            'choose save_as "delta" or "pipeline"'
        )
    return family.kohya


def _with_weights(model: nn.Module) -> list[str]:
    return [name for name, layer in parts.layers(model).items() if isinstance(getattr(layer, "weight", None), Tensor)]


def is_kohya_lora(names: Mapping[str, Tensor]) -> bool:
    """Whether tensors are named in kohya's way."""
    return any(name.startswith("lora_") and name.endswith(ENDS[:2]) for name in names)


def write(folder: Path, pipeline: DiffusionPipeline, updates: Updates, metadata: Mapping[str, str]) -> Path:
    """Write updates, checked by :func:`fdu.storage.lora.check`, with ``metadata`` in addition to kohya's own.

    DoRA magnitudes are ``dora_scale`` [out, 1], as LyCORIS has them with wd_on_output. Only fdu and programs that
    follow LyCORIS read them right: diffusers drops them with a warning, AUTOMATIC1111 takes them for magnitudes of
    inputs, and ComfyUI divides by the norms of the weights before the update.

    Raises:
        ValueError: the family or a layer has no name there.
    """
    slots = {slot: name for name, slot in table(pipeline).items()}
    weights = parts.weights(pipeline)
    tensors: dict[str, Tensor] = {}
    written: set[tuple[str, str]] = set()
    for slot, name in slots.items():
        trained = [updates.get(slot.attribute, {}).get(layer) for layer in slot.layers]
        if not any(trained):
            continue
        update = _fused(trained, [weights[f"{slot.attribute}.{layer}.weight"] for layer in slot.layers])
        if slot.halves_swapped:
            update = _with_halves_swapped(update)
        tensors[f"{name}.lora_down.weight"] = update.down
        tensors[f"{name}.lora_up.weight"] = update.up
        tensors[f"{name}.alpha"] = torch.tensor(update.alpha, dtype=torch.float32)
        if update.magnitude is not None:
            ones = [1] * (update.down.ndim - 1)
            tensors[f"{name}.dora_scale"] = update.magnitude.reshape(-1, *ones)
        written |= {(slot.attribute, layer) for layer in slot.layers}
    for attribute, by_layer in updates.items():
        for layer in by_layer:
            if (attribute, layer) not in written:
                raise ValueError(
                    f"kohya's format has no name for {attribute}.{layer}; "
                    'use save_as="lora", "pipeline" or "delta", or train other layers'
                )
    path = folder / KOHYA_FILE
    # Several tensors may be views of one; the format stores each by itself.
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(stored, path, {**metadata, **_metadata(pipeline, updates)})
    return path


def from_file(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> Updates:
    """The updates in a file with kohya's names.

    Raises:
        ValueError: a layer that the pipeline does not have, a kind of update other than LoRA and DoRA, or shapes that
            do not fit.
    """
    slots, weights = table(pipeline), parts.weights(pipeline)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, end = key.partition(".")
        if name not in slots:
            raise ValueError(
                f"the file changes the layer {name!r}, which this {type(pipeline).__name__} does not have; "
                "load it into the model family it was made for"
            )
        if end not in ENDS:
            raise ValueError(f"the tensor {key!r} is not part of a LoRA or DoRA update; other kinds cannot be read")
        found.setdefault(name, {})[end] = tensor
    updates: Updates = {}
    for name, update in found.items():
        if not update.keys() >= set(ENDS[:2]):
            raise ValueError(f"the update of {name!r} lacks its up or down matrix; the file is incomplete")
        down, up = update["lora_down.weight"], update["lora_up.weight"]
        check_parts(name, down, up, update.get("dora_scale"))
        alpha = one_number(f"alpha of {name}", update["alpha"]) if "alpha" in update else float(down.shape[0])
        magnitude = _magnitude(name, update.get("dora_scale"), up.shape[0])
        slot = slots[name]
        whole = Update(down, up, alpha, magnitude)
        if slot.halves_swapped:
            whole = _with_halves_swapped(whole)
        sizes = [weights[f"{slot.attribute}.{layer}.weight"].shape[0] for layer in slot.layers]
        if sum(sizes) != up.shape[0]:
            raise ValueError(
                f"the update of {name!r} has {up.shape[0]} outputs, this {type(pipeline).__name__} has {sum(sizes)} "
                "there; load it into the model it was made for"
            )
        for layer, part in zip(slot.layers, _parted(whole, sizes), strict=True):
            if layer in updates.get(slot.attribute, {}):
                raise ValueError(f"the file changes {slot.attribute}.{layer} twice, as {name!r} too; drop one")
            if part is not None:
                updates.setdefault(slot.attribute, {})[layer] = part
    return updates


def _fused(updates: Sequence[Update | None], weights: Sequence[Tensor]) -> Update:
    """One update of layers whose outputs follow one another: block-diagonal, with zeros for layers without one."""
    present = [update for update in updates if update is not None]
    if len(updates) == 1:
        return present[0]
    rank = max(update.rank for update in present)
    scales = {update.alpha / update.rank for update in present}
    # With several scales there is no common alpha; then they go into the matrices.
    scale = scales.pop() if len(scales) == 1 else 1.0
    like = present[0].up
    down = like.new_zeros(rank * len(updates), weights[0].shape[1])
    up = like.new_zeros(sum(weight.shape[0] for weight in weights), rank * len(updates))
    row = 0
    for index, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        rows = slice(row, row := row + weight.shape[0])
        if update is not None:
            columns = slice(index * rank, index * rank + update.rank)
            down[columns] = update.down
            factor = update.alpha / update.rank / scale
            up[rows, columns] = update.up if factor == 1 else update.up * factor
    magnitude = None
    if present[0].magnitude is not None:
        # The magnitude of a layer that nothing changes is the norm of its rows.
        magnitude = torch.cat(
            [
                weight.detach().float().norm(dim=1).to(like)
                if update is None or update.magnitude is None
                else update.magnitude
                for update, weight in zip(updates, weights, strict=True)
            ]
        )
    return Update(down, up, scale * down.shape[0], magnitude)


def _parted(update: Update, sizes: Sequence[int]) -> list[Update | None]:
    """The update of each layer whose outputs follow one another; None for one without."""
    count = len(sizes)
    if count == 1:
        return [update]
    ups = update.up.split(list(sizes))
    magnitudes = [None] * count if update.magnitude is None else list(update.magnitude.split(list(sizes)))
    downs, alpha = [update.down] * count, update.alpha
    width = update.rank // count
    if update.rank % count == 0:
        blocks = [list(up.split(width, dim=1)) for up in ups]
        if not any(block.any() for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j):
            ups = tuple(row[index] for index, row in enumerate(blocks))
            downs, alpha = list(update.down.split(width)), update.alpha / count
    return [
        Update(down, up, alpha, magnitude) if magnitude is not None or up.any() else None
        for down, up, magnitude in zip(downs, ups, magnitudes, strict=True)
    ]


def _with_halves_swapped(update: Update) -> Update:
    def swapped(tensor: Tensor) -> Tensor:
        return torch.cat(tensor.chunk(2)[::-1])

    magnitude = None if update.magnitude is None else swapped(update.magnitude)
    return Update(update.down, swapped(update.up), update.alpha, magnitude)


def _magnitude(name: str, dora_scale: Tensor | None, outputs: int) -> Tensor | None:
    if dora_scale is None:
        return None
    if dora_scale.shape[0] != outputs or dora_scale.numel() != outputs:
        raise ValueError(
            f"the magnitude of {name!r} is {tuple(dora_scale.shape)}, not one per output as in peft, so this DoRA "
            "cannot be loaded; merge it into a model with the program that made it"
        )
    return dora_scale.reshape(-1)


def _metadata(pipeline: DiffusionPipeline, updates: Updates) -> dict[str, str]:
    """The metadata that sd-scripts, and programs that read its files, look for."""
    names = kohya_names(pipeline)
    version = names.version(pipeline)
    every = [update for by_layer in updates.values() for update in by_layer.values()]
    return {
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_base_model_version": version,
        "ss_network_module": names.network,
        "ss_network_dim": str(Counter(update.rank for update in every).most_common()[0][0]),
        "ss_network_alpha": str(Counter(update.alpha for update in every).most_common()[0][0]),
        "ss_network_args": json.dumps({}),
    }
