"""LoRA and DoRA updates in diffusers' names: read, load into a pipeline, write."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import delete_adapter_layers
from torch import Tensor, nn

from fdu.models import parts
from fdu.models.offloading import called_on
from fdu.storage.tensor_checks import check_floats, check_range, one_number, real_number

LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the configuration of adapters in a safetensors file."""

FORMS = {
    "down": r"\.lora_A\.weight|\.lora\.down\.weight|_lora\.down\.weight|\.lora_linear_layer\.down\.weight",
    "up": r"\.lora_B\.weight|\.lora\.up\.weight|_lora\.up\.weight|\.lora_linear_layer\.up\.weight",
    "magnitude": r"\.lora_magnitude_vector(?:\.weight)?",
    "alpha": r"\.alpha",
}
"""Endings of the names of an update's parts in diffusers, now and formerly, and in peft."""
PARTS = re.compile("(?P<layer>.+?)(?:" + "|".join(f"(?P<{part}>{ends})" for part, ends in FORMS.items()) + ")")
FORMER_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Former names of the projections of text encoders in diffusers."""


@dataclasses.dataclass(frozen=True)
class Update:
    """A low-rank update of a layer's weight W to W + alpha / r * up @ down (Hu et al. 2022, arXiv 2106.09685).

    With a magnitude, the rows of that sum are scaled to these norms (DoRA, Liu et al. 2024, arXiv 2402.09353).
    """

    down: Tensor
    """[r, in], for convolutions [r, in, height, width]."""
    up: Tensor
    """[out, r], for convolutions [out, r, 1, 1]."""
    alpha: float
    magnitude: Tensor | None = None
    """[out]."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]


Updates = dict[str, dict[str, Update]]
"""Updates by the pipeline's attribute, and within it by the layer's name."""


def is_diffusers_lora(names: Mapping[str, Any]) -> bool:
    """Whether tensors are named as diffusers or peft name the parts of LoRA updates."""
    return any((match := PARTS.fullmatch(name)) and (match["down"] or match["up"]) for name in names)


def from_layers(lora_layers: Mapping[str, Mapping[str, Tensor]], lora_alpha: float | None = None) -> Updates:
    """The updates in LoRA weights by attribute, as ``Trainable.lora_layers`` gives them.

    Args:
        lora_layers: by attribute, tensors in diffusers' or peft's names.
        lora_alpha: the alpha of every update; None means its rank.

    Raises:
        ValueError: tensors that are none of an update, or incomplete updates.
    """
    return {
        attribute: _pair(tensors, lambda layer, rank: lora_alpha or float(rank))
        for attribute, tensors in lora_layers.items()
        if tensors
    }


def from_file(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Updates:
    """The updates in a file with diffusers' names, with or without the attribute before them.

    Raises:
        ValueError: tensors that are none of an update, or incomplete updates.
    """
    by_attribute: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        attribute, name = parts.split(pipeline, key)
        if name in by_attribute.setdefault(attribute, {}):
            raise ValueError(f"the file holds {attribute}.{name} twice, with {attribute} and without; drop one")
        by_attribute[attribute][name] = tensor
    settings = _settings(metadata)

    def updates(attribute: str) -> dict[str, Update]:
        patterns, by_root = (settings.get(f"{attribute}.{key}") for key in ("alpha_pattern", "use_rslora"))
        for key, value, kind in (("alpha_pattern", patterns, dict), ("use_rslora", by_root, bool)):
            if value is not None and not isinstance(value, kind):
                raise ValueError(
                    f"its metadata state {key} as a {type(value).__name__}, not as a {kind.__name__}; correct them"
                )

        def alpha(layer: str, rank: int) -> float:
            stated = _alpha(patterns or {}, layer)
            value = settings.get(f"{attribute}.lora_alpha", rank) if stated is None else stated
            return real_number(f"the alpha of {layer}", value) * (math.sqrt(rank) if by_root else 1)

        found = _pair(by_attribute[attribute], alpha)
        if attribute in parts.TEXT_ENCODERS:
            return {_current_name(layer): update for layer, update in found.items()}
        return found

    return {attribute: updates(attribute) for attribute in by_attribute}


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings of the adapters in a file; empty if it has none.

    Raises:
        ValueError: they are no JSON object.
    """
    try:
        settings = json.loads(metadata.get(METADATA_KEY, "null")) or {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata {METADATA_KEY!r} are not valid JSON ({error}); write the file again") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"its metadata {METADATA_KEY!r} are a {type(settings).__name__}, not a JSON object of settings; write the "
            "file again"
        )
    return settings


def _alpha(patterns: Mapping[str, Any], layer: str) -> Any:
    """The alpha that a file states for a layer: by its name, or else by the longest end of it."""
    ends = [key for key in patterns if f".{layer}".endswith(f".{key}")]
    return patterns.get(f"^{layer}", patterns[max(ends, key=len)] if ends else None)


def check(pipeline: DiffusionPipeline, updates: Updates) -> Updates:
    """The same updates under the pipeline's own names of the layers.

    Raises:
        ValueError: an attribute or a layer that the pipeline does not have, or shapes that do not fit it.
    """
    checked: Updates = {}
    for attribute, by_layer in updates.items():
        model = parts.models(pipeline).get(attribute)
        if model is None:
            raise ValueError(f"the weights change {attribute}, which {type(pipeline).__name__} does not have")
        known = parts.layers(model)
        for name, update in by_layer.items():
            found = parts.find(known, name)
            if found is None:
                raise ValueError(
                    f"the weights change the layer {attribute}.{name}, which this {type(pipeline).__name__} does not "
                    "have; load them into the model family they were made for"
                )
            _check_shapes(f"{attribute}.{name}", known[found], update)
            if found in checked.setdefault(attribute, {}):
                raise ValueError(f"the weights change the layer {attribute}.{found} twice; drop one of the updates")
            checked[attribute][found] = update
        if len({update.magnitude is None for update in by_layer.values()}) > 1:
            raise ValueError(
                f"only some updates of {attribute} have a DoRA magnitude, which peft cannot mix; drop one kind"
            )
    return checked


def attach(pipeline: DiffusionPipeline, updates: Updates, adapter_name: str | None, strength: float) -> str:
    """Put :func:`check`-ed updates on the pipeline as one adapter, in addition to the active ones; returns its name.

    Raises:
        ValueError: the name is taken.
        TypeError: the pipeline cannot carry LoRA weights.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise TypeError(
            f"diffusers cannot put LoRA weights on a {type(pipeline).__name__}; use a full pipeline or a weight delta"
        )
    models: dict[str, Any] = {attribute: parts.models(pipeline)[attribute] for attribute in updates}
    if adapter_name is None:
        taken = parts.adapter_names(pipeline)
        adapter_name = next(name for index in range(len(taken) + 1) if (name := f"erased_{index}") not in taken)
    elif any(adapter_name in getattr(model, "peft_config", {}) for model in models.values()):
        raise ValueError(f"adapter_name {adapter_name!r} is taken; choose another, or delete that adapter first")
    active = {layer: list(layer.active_adapters) for model in models.values() for layer in parts.adapted(model)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are the purpose
            for attribute, model in models.items():
                _inject(pipeline, attribute, model, updates[attribute], adapter_name)
                _settle(model, updates[attribute], adapter_name)
    except BaseException:
        detach(pipeline, adapter_name, models)
        raise
    for model in models.values():
        for layer in parts.adapted(model):
            # Loading makes the newest adapter the only active one.
            layer.set_adapter([*active.get(layer, []), adapter_name], inference_mode=True)
            layer.set_scale(adapter_name, strength)
    return adapter_name


def detach(pipeline: DiffusionPipeline, adapter_name: str, attributes: Collection[str]) -> None:
    """Remove an adapter from the models named; after the last one the models carry nothing more."""
    models: dict[str, Any] = parts.models(pipeline)
    carried = {(attribute, name) for attribute, model in models.items() for name in getattr(model, "peft_config", {})}
    unwanted = {(attribute, adapter_name) for attribute in attributes}
    if carried <= unwanted:
        pipeline.unload_lora_weights()
        return
    for attribute, _ in carried & unwanted:
        delete_adapter_layers(models[attribute], adapter_name)


def write(folder: Path, pipeline: DiffusionPipeline, updates: Updates) -> Path:
    """Write :func:`check`-ed updates so that ``pipeline.load_lora_weights(folder)`` loads them.

    Raises:
        ValueError: diffusers has no LoRA format for the pipeline, or for one of its models.
    """
    save: Any = getattr(pipeline, "save_lora_weights", None)
    accepted = inspect.signature(save).parameters if save else {}
    arguments: dict[str, Any] = {}
    for attribute, by_layer in updates.items():
        if f"{attribute}_lora_layers" not in accepted:
            raise ValueError(
                f"diffusers has no LoRA format for the {attribute} of {type(pipeline).__name__}; "
                'use save_as="pipeline" or "delta"'
            )
        # transformers 4 and other programs know the layers of CLIP with this prefix; diffusers takes it off as needed.
        prefix = "text_model." if parts.lost_prefix(parts.models(pipeline)[attribute]) else ""
        tensors = state_dict(by_layer)
        arguments[f"{attribute}_lora_layers"] = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        if f"{attribute}_lora_adapter_metadata" in accepted:
            arguments[f"{attribute}_lora_adapter_metadata"] = config(by_layer)
    save(folder, **arguments)
    return folder / LORA_FILE


def state_dict(by_layer: Mapping[str, Update]) -> dict[str, Tensor]:
    """The tensors of updates in peft's names."""
    tensors = {}
    for layer, update in by_layer.items():
        tensors[f"{layer}.lora_A.weight"] = update.down
        tensors[f"{layer}.lora_B.weight"] = update.up
        if update.magnitude is not None:
            tensors[f"{layer}.lora_magnitude_vector"] = update.magnitude
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def config(by_layer: Mapping[str, Update]) -> dict[str, Any]:
    """The arguments of the ``peft.LoraConfig`` of updates."""
    rank = Counter(update.rank for update in by_layer.values()).most_common()[0][0]
    alpha = Counter(update.alpha for update in by_layer.values()).most_common()[0][0]
    # ^ so that a pattern fits this layer alone, and no layer with the same ending.
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(by_layer),
        "rank_pattern": {f"^{name}": update.rank for name, update in by_layer.items() if update.rank != rank},
        "alpha_pattern": {f"^{name}": update.alpha for name, update in by_layer.items() if update.alpha != alpha},
        "use_dora": any(update.magnitude is not None for update in by_layer.values()),
    }


def _pair(tensors: Mapping[str, Tensor], alpha_of: Any) -> dict[str, Update]:
    """The updates whose parts ``tensors`` are; ``alpha_of`` (layer, rank) where no tensor tells alpha."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = PARTS.fullmatch(key)
        if match is None:
            raise ValueError(f"the tensor {key!r} is not part of a LoRA or DoRA update")
        layer = match["layer"].replace(".processor.", ".")
        layer = f"{layer}.0" if layer.endswith(".to_out") else layer
        part = next(part for part in FORMS if match[part])
        if part in found.setdefault(layer, {}):
            raise ValueError(f"the update of {layer!r} has its {part} twice, as {key!r} too; drop one")
        found[layer][part] = tensor
    updates = {}
    for layer, update in found.items():
        missing = {"down", "up"} - update.keys()
        if missing:
            raise ValueError(f"the update of {layer!r} lacks its {missing.pop()} matrix; the file is incomplete")
        magnitude = update.get("magnitude")
        check_parts(layer, update["down"], update["up"], magnitude)
        rank = update["down"].shape[0]
        alpha = one_number(f"alpha of {layer}", update["alpha"]) if "alpha" in update else alpha_of(layer, rank)
        updates[layer] = Update(update["down"], update["up"], float(alpha), magnitude)
    return updates


def check_parts(layer: str, down: Tensor, up: Tensor, magnitude: Tensor | None) -> None:
    """Raise ValueError for parts of an update that are no matrices of floats, or of rank 0."""
    check_floats(f"down of {layer}", down, dimensions=2)
    check_floats(f"up of {layer}", up, dimensions=2)
    if not len(down):
        raise ValueError(f"the update of {layer} has rank 0; leave it out of the file")
    if magnitude is not None:
        check_floats(f"magnitude of {layer}", magnitude, dimensions=1)


def _current_name(layer: str) -> str:
    """A text encoder's layer by its present name."""
    stem, _, last = layer.removesuffix(".0").rpartition(".")
    return f"{stem}.{FORMER_NAMES[last]}" if last in FORMER_NAMES else layer


def _check_shapes(name: str, layer: nn.Module, update: Update) -> None:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"the weights change {name}, a {type(layer).__name__} without a weight")
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ValueError(f"the weights change {name}, a {type(layer).__name__}, which can carry no LoRA; drop it")
    # Of a quantized layer, the weight is stored in another shape.
    shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(weight.shape)
    fits = update.down.shape[1:] == shape[1:] and update.up.shape[0] == shape[0]
    fits = fits and update.up.shape[1:] == (update.rank, *[1] * len(shape[2:]))
    if not fits or (update.magnitude is not None and update.magnitude.shape != shape[:1]):
        shapes = f"down {tuple(update.down.shape)} and up {tuple(update.up.shape)}"
        if update.magnitude is not None:
            shapes += f" and magnitude {tuple(update.magnitude.shape)}"
        raise ValueError(
            f"the update of {name}, {shapes}, does not fit its weight {shape}; load it into the model it was made for"
        )
    if weight.is_floating_point() and weight.itemsize == 2:  # the dtype of the adapter too
        for part in (update.down, update.up, *([] if update.magnitude is None else [update.magnitude])):
            check_range(f"of the update of {name}", part, weight.dtype)


def _inject(
    pipeline: DiffusionPipeline, attribute: str, model: Any, by_layer: Mapping[str, Update], adapter_name: str
) -> None:
    """Load as plain diffusers does, but with an alpha for each layer."""
    tensors, settings = state_dict(by_layer), config(by_layer)
    if attribute in parts.DENOISERS:
        model.load_lora_adapter(
            tensors,
            prefix=None,
            adapter_name=adapter_name,
            metadata=settings,
            _pipeline=pipeline,
            low_cpu_mem_usage=True,
        )
        return
    pipeline.load_lora_into_text_encoder(
        {f"{attribute}.{name}": tensor for name, tensor in tensors.items()},
        None,
        model,
        prefix=attribute,
        adapter_name=adapter_name,
        metadata={f"{attribute}.{name}": value for name, value in settings.items()},
        _pipeline=pipeline,
        low_cpu_mem_usage=True,
    )


def _settle(model: nn.Module, by_layer: Mapping[str, Update], adapter_name: str) -> None:
    """Give adapters float32 where peft has cast them to the eight bits in which their layer stores its weight, give
    text encoders the magnitudes of DoRA, which transformers 5 leaves out, and bring the adapters of offloaded blocks to
    the device, where they stay."""
    device = called_on(model)
    for name, update in by_layer.items():
        layer: Any = model.get_submodule(name)
        loaded = [(layer.lora_A[adapter_name], update.down), (layer.lora_B[adapter_name], update.up)]
        if update.magnitude is not None:
            magnitude = layer.lora_magnitude_vector[adapter_name]
            magnitude.weight.data = update.magnitude.to(magnitude.weight)
            loaded.append((magnitude, update.magnitude))
        for part, values in loaded:
            if part.weight.itemsize < 2:
                part.weight.data = values.to(part.weight.device, torch.float32)
            if device is not None:
                part.to(device)
