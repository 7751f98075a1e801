"""Make a part of a pipeline trainable, by the name of a training method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fdu.config import ADAPTER_METHODS, TRAIN_METHODS
from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.training.methods.adapter import Adapter
from fdu.training.methods.full_weights import Weights
from fdu.training.methods.token_rows import TokenRows, own_tokens
from fdu.training.methods.trainable import Trainable, parameters_of, put_on_top, refuse_while_training


def attach(
    denoiser: Denoiser,
    method: str,
    *,
    rank: int,
    lora_alpha: float,
    target_name: str | Sequence[str],
    prompts: Sequence[str],
    kept_prompts: Sequence[str] = (),
) -> Trainable:
    """Make the part of a pipeline that ``method`` names trainable, and everything else frozen.

    Args:
        denoiser: the denoiser of the pipeline, not yet wrapped for several devices.
        method: "lora" or "dora", low-rank adapters on the layers that read the prompt; "cross_attention", the weights
            of those layers; "attention", the weights of all layers of attention; "full", all weights of the denoiser,
            of which the originals are a further copy; "text_encoder", all weights of the text encoders; "token", in
            each text encoder's embedding, the rows of the tokens that only the target's name is made of.
        rank, lora_alpha: of the adapters, whose scale is lora_alpha / rank.
        target_name: for "token", the target's name or names.
        prompts: for "token", the target's prompts.
        kept_prompts: for "token", the prompts of the anchor and those to preserve, whose tokens stay as they are.

    Raises:
        ValueError: an unknown method, or one that this pipeline offers nothing to train for.
        RuntimeError: another erasure of the pipeline is still being trained.
    """
    if method not in TRAIN_METHODS:
        raise ValueError(f"train_method must be one of {', '.join(TRAIN_METHODS)}, got {method!r}")
    pipeline = denoiser.pipeline
    refuse_while_training(pipeline)
    flags = [(parameter, parameter.requires_grad) for parameter in parameters_of(pipeline)]
    try:
        if method in ADAPTER_METHODS:
            trainable: Trainable = Adapter(
                pipeline,
                denoiser.module_name,
                _adapted(denoiser, method),
                rank=rank,
                lora_alpha=lora_alpha,
                dora=method == "dora",
            )
        elif method == "token":
            names = [target_name] if isinstance(target_name, str) else list(target_name)
            trainable = TokenRows(pipeline, own_tokens(pipeline, names, prompts, kept_prompts))
        else:
            trainable = Weights(pipeline, _chosen(denoiser, method), trains_text=method == "text_encoder")
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    put_on_top(trainable)
    return trainable


def _adapted(denoiser: Denoiser, method: str) -> list[str]:
    """The names of the module's layers that get an adapter."""
    module = parts.models(denoiser.pipeline)[denoiser.module_name]
    names = [name for name in parts.layers(module) if _ends(name, denoiser.context_projections)]
    return _some(names, denoiser, method)


def _chosen(denoiser: Denoiser, method: str) -> dict[str, nn.Parameter]:
    """The parameters to train, by name; one that modules share is there once."""
    attributes = denoiser.text_encoders if method == "text_encoder" else [denoiser.module_name]
    endings = {"cross_attention": denoiser.context_projections, "attention": denoiser.attention_projections}
    names: dict[nn.Parameter, str] = {}
    for name, parameter in parts.weights(denoiser.pipeline).items():
        attribute, _, rest = name.partition(".")
        chosen = method not in endings or _ends(rest.rpartition(".")[0], endings[method])
        if attribute in attributes and chosen:
            names.setdefault(parameter, name)
    chosen_parameters = {name: parameter for parameter, name in names.items()}
    for name, parameter in chosen_parameters.items():
        if not parameter.is_floating_point() or parameter.itemsize < 2 or parameter.is_meta:
            raise ValueError(
                f"train_method {method!r} trains {name}, which is "
                f"{'not in memory' if parameter.is_meta else f'stored as {parameter.dtype}'}; load the pipeline "
                "without quantization, layerwise casting and offloading, or choose train_method 'lora'"
            )
    _some(list(chosen_parameters), denoiser, method)
    return chosen_parameters


def _ends(name: str, endings: Sequence[str]) -> bool:
    """Whether the last parts of a dotted name are one of the endings."""
    return f".{name}".endswith(tuple(f".{ending}" for ending in endings))


def _some(names: list[str], denoiser: Denoiser, method: str) -> list[str]:
    if not names:
        raise ValueError(
            f"train_method {method!r} finds nothing to train in this {type(denoiser.pipeline).__name__}; "
            "choose another one"
        )
    return names
