"""The models of a pipeline that an erasure may change, and their weights by name, with adapters on them or without."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = {name: name.replace("text_encoder", "tokenizer") for name in TEXT_ENCODERS}
"""The tokenizer of each text encoder."""


def models(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The denoiser and the text encoders, by the pipeline's attribute."""
    found = {name: getattr(pipeline, name, None) for name in (*DENOISERS, *TEXT_ENCODERS)}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def tokenizer(pipeline: DiffusionPipeline, encoder: str) -> Any:
    """The tokenizer of a text encoder, also where the pipeline holds it in a processor; None without one."""
    found = getattr(pipeline, TOKENIZERS[encoder], None)
    return getattr(found, "tokenizer", found)


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """The attribute of the denoiser.

    Raises:
        TypeError: the pipeline has none.
    """
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise TypeError(f"pipeline is a {type(pipeline).__name__}, which has neither a unet nor a transformer")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` by the names they have without adapters; under an adapter, the layer it sits on."""
    wrapped = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[name] = module.get_base_layer()
        elif not name.startswith(wrapped):
            found[name] = module
    return found


def adapted(model: nn.Module) -> list[Any]:
    """The layers of peft: those with adapters on them."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_names(pipeline: DiffusionPipeline) -> set[str]:
    """The names of all adapters on the models."""
    return {name for model in models(pipeline).values() for name in getattr(model, "peft_config", {})}


def active_adapters(pipeline: DiffusionPipeline) -> list[str]:
    """The names of the adapters that are switched on in any layer, in order."""
    on = [layer for model in models(pipeline).values() for layer in adapted(model) if not layer.disable_adapters]
    return sorted({name for layer in on for name in layer.active_adapters})


def weights(pipeline: DiffusionPipeline) -> dict[str, nn.Parameter]:
    """Every parameter as "attribute.name", by the names they have without adapters; those of adapters left out.

    Weights that two modules share appear under both names.
    """
    return {
        f"{attribute}.{f'{layer}.' if layer else ''}{name}": parameter
        for attribute, model in models(pipeline).items()
        for layer, module in layers(model).items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def split(pipeline: DiffusionPipeline, key: str) -> tuple[str, str]:
    """The attribute and the rest of a name such as "unet.conv_in.weight"; without an attribute, the denoiser's."""
    attribute, _, rest = key.partition(".")
    if attribute in (*DENOISERS, *TEXT_ENCODERS):
        return attribute, rest
    return denoiser_name(pipeline), key


def ends_with(name: str, endings: Sequence[str]) -> bool:
    """Whether the last parts of a dotted name are one of the endings."""
    return f".{name}".endswith(tuple(f".{ending}" for ending in endings))


def find(known: Collection[str], name: str, prefix: str = "") -> str | None:
    """The known name that ``prefix`` and ``name`` mean; transformers 5 has dropped "text_model.", files have not."""
    spellings = (name, name.removeprefix("text_model."), f"text_model.{name}")
    return next((prefix + spelling for spelling in spellings if prefix + spelling in known), None)


def lost_prefix(model: nn.Module | None) -> bool:
    """Whether a model is a CLIP text encoder whose names lack the "text_model." that they have in files."""
    is_clip = str(getattr(getattr(model, "config", None), "model_type", "")).startswith("clip")
    return is_clip and not hasattr(model, "text_model")
