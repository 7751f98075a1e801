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
        by_attribute.setdefault(attribute, {})[name] = tensor
    settings = json.loads(metadata.get(METADATA_KEY, "null")) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"its metadata {METADATA_KEY!r} is a {type(settings).__name__}, not a JSON object of settings")

    def updates(attribute: str) -> dict[str, Update]:
        def alpha(layer: str, rank: int) -> float:
            stated = _alpha(settings.get(f"{attribute}.alpha_pattern"), layer)
            value = settings.get(f"{attribute}.lora_alpha", rank) if stated is None else stated
            if not isinstance(value, (int, float)):
                raise ValueError(f"its metadata states the alpha {value!r} for {layer}, which is not a number")
            return value * math.sqrt(rank) if settings.get(f"{attribute}.use_rslora") else value

        found = _pair(by_attribute[attribute], alpha)
        if attribute in parts.TEXT_ENCODERS:
            return {_current_name(layer): update for layer, update in found.items()}
        return found

    return {attribute: updates(attribute) for attribute in by_attribute}


def _alpha(patterns: Any, layer: str) -> float | None:
    """The alpha that a file states for a layer: by its name, or else by the longest end of it."""
    if not isinstance(patterns, dict):
        return None
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
            checked.setdefault(attribute, {})[found] = update
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
        found.setdefault(layer, {})[next(part for part in FORMS if match[part])] = tensor
    updates = {}
    for layer, update in found.items():
        missing = {"down", "up"} - update.keys()
        if missing:
            raise ValueError(f"the update of {layer!r} lacks its {missing.pop()} matrix; the file is incomplete")
        alpha = update["alpha"].item() if "alpha" in update else alpha_of(layer, update["down"].shape[0])
        updates[layer] = Update(update["down"], update["up"], float(alpha), update.get("magnitude"))
    return updates


def _current_name(layer: str) -> str:
    """A text encoder's layer by its present name."""
    stem, _, last = layer.removesuffix(".0").rpartition(".")
    return f"{stem}.{FORMER_NAMES[last]}" if last in FORMER_NAMES else layer


def _check_shapes(name: str, layer: nn.Module, update: Update) -> None:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"the weights change {name}, a {type(layer).__name__} without a weight")
    # Of a quantized layer, the weight is stored in another shape.
    shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(weight.shape)
    fits = update.down.shape[1:] == shape[1:] and update.up.shape[0] == shape[0]
    fits = fits and update.up.shape[1] == update.rank
    if not fits or (update.magnitude is not None and update.magnitude.shape != shape[:1]):
        shapes = f"down {tuple(update.down.shape)} and up {tuple(update.up.shape)}"
        if update.magnitude is not None:
            shapes += f" and magnitude {tuple(update.magnitude.shape)}"
        raise ValueError(
            f"the update of {name}, {shapes}, does not fit its weight {shape}; load it into the model it was made for"
        )


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
    """Give adapters float32 where peft has cast them to the eight bits in which their layer stores its weight, and
    bring those of offloaded blocks to the device, where they stay."""
    device = called_on(model)
    for name, update in by_layer.items():
        layer: Any = model.get_submodule(name)
        loaded = [(layer.lora_A[adapter_name], update.down), (layer.lora_B[adapter_name], update.up)]
        if update.magnitude is not None:
            loaded.append((layer.lora_magnitude_vector[adapter_name], update.magnitude))
        for part, values in loaded:
            if part.weight.itemsize < 2:
                part.weight.data = values.to(part.weight.device, torch.float32)
            if device is not None:
                part.to(device)
