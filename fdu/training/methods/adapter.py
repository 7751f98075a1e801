"""Low-rank adapters: LoRA and DoRA through peft, in addition to adapters that the pipeline may carry already."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.training.closed_form import Edit
from fdu.training.methods.trainable import Request, Trainable, flags_of, restore

ADAPTER_NAME = "fdu"
"""The adapter's name in the pipeline; if that is taken, fdu_2, fdu_3, ..."""
DOWN, UP = ".lora.down.", ".lora.up."
"""Names that diffusers gives to the two matrices of a layer of attention."""
MARK = "_hf_peft_config_loaded"
"""The attribute by which diffusers knows a model with adapters."""


def make(denoiser: Denoiser, request: Request) -> Trainable:
    """The methods "lora" and "dora", an adapter on every layer of the chosen group; and "closed_form", one on
    the edited layers, of the rank of the edit."""
    layers = parts.layers(parts.models(denoiser.pipeline)[denoiser.module_name])
    endings = denoiser.layer_groups()
    if request.method == "closed_form":
        names, rank = list(request.edited), 1
        ranks = {layer: edit.rank for edit in request.edits for layer in edit.ups}
    else:
        chosen = [name for name in layers if parts.ends_with(name, endings[request.adapter_layers])]
        names, rank, ranks = list(dict.fromkeys([*chosen, *request.edited])), request.rank, {}
    request.check_found(names, denoiser)
    return Adapter(
        denoiser.pipeline,
        denoiser.module_name,
        names,
        rank=rank,
        ranks=ranks,
        lora_alpha=request.lora_alpha,
        dora=request.method == "dora",
    )


class LayerState(NamedTuple):
    """The state of a peft layer before the erasure."""

    active: list[str]
    disabled: bool
    merged: list[str]

    @property
    def applied(self) -> list[str]:
        """The adapters that it added to its base layer; peft adds none where one is fused."""
        return [] if self.disabled or self.merged else self.active


class Adapter(Trainable):
    """Low-rank adapters on linear layers (LoRA: Hu et al. 2022, arXiv 2106.09685; DoRA: Liu et al. 2024, arXiv
    2402.09353).

    Switching them on and off changes which names peft finds active, and no tensor: under torch.compile that is one
    graph for the trained and one for the frozen module.

    A fused former adapter stays in the weights. As long as this erasure is in place, peft knows nothing of the fusing:
    unfuse it before the erasure or after :meth:`remove`.
    """

    trains_text = False

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        attribute: str,
        layers: Sequence[str],
        *,
        rank: int,
        lora_alpha: float,
        dora: bool,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """An adapter on layers of a model of the pipeline; ``ranks`` are those of layers that differ from ``rank``."""
        super().__init__(pipeline)
        self.attribute = attribute
        self.module: Any = getattr(pipeline, attribute)
        self.name = _fresh_name(pipeline)
        known = set(self.module.modules())
        self.marked = MARK in vars(self.module)
        former = parts.adapted(self.module)
        for layer in former:
            if layer.merged and layer.disable_adapters:
                layer.unmerge()  # as its next forward pass would
        self.before = {
            layer: LayerState(list(layer.active_adapters), layer.disable_adapters, list(layer.merged_adapters))
            for layer in former
        }
        for layer in former:
            layer.merged_adapters = []  # or peft would unfuse them
        config = LoraConfig(
            r=rank,
            rank_pattern={f"^{re.escape(name)}$": own for name, own in (ranks or {}).items()},
            lora_alpha=lora_alpha,
            target_modules=list(layers),
            init_lora_weights="gaussian",
            use_dora=dora,
        )
        self.layers: list[Any] = []
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
                inject_adapter_in_model(config, self.module, self.name)
        except BaseException:
            self._restore_former()
            self._undo()
            raise
        self._restore_former()
        if isinstance(self.module, PeftAdapterMixin):
            setattr(self.module, MARK, True)
        for module in self.module.modules():
            if module not in known:
                module.training = self.module.training
        if dora:
            self._refine_magnitudes()
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        device = next(self.module.parameters()).device
        for parameter in self.named_parameters().values():
            # fp32 even in a half-precision model: peft casts what flows through them. On the device, where the layer
            # may be away.
            parameter.data = parameter.data.to(device, torch.float32)
            parameter.requires_grad_(True)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{self.attribute}.{name.replace(f'.{self.name}.', '.')}": parameter
            for name, parameter in self.module.named_parameters()
            if f".{self.name}." in name
        }

    def lora_layers(self) -> dict[str, dict[str, Tensor]]:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.module, adapter_name=self.name))
        if any(DOWN in name for name in layers):
            # It renames layers of attention alone, and of two kinds of names diffusers reads one.
            layers = {name.replace(".lora_A.", DOWN).replace(".lora_B.", UP): layers[name] for name in layers}
        return {self.attribute: layers}

    @torch.no_grad()
    def begin_at(self, denoiser: Denoiser, edits: Sequence[Edit]) -> None:
        """Begin at edits, cut to the rank of the adapter."""
        modules = dict(denoiser.module.named_modules())
        for edit in edits:
            for name, up in edit.ups.items():
                self._begin_layer(modules[name], up, edit.down)

    def _begin_layer(self, layer: Any, up: Tensor, down: Tensor) -> None:
        down_weight, up_weight = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
        rank = min(len(down), layer.r[self.name])
        up, down = up[:, :rank] / layer.scaling[self.name], down[:rank]
        # Each rank is equally large in both factors, since a training step changes both by the same amount.
        sizes = up.norm(dim=0), down.norm(dim=1)
        balance = torch.where(sizes[0] > 0, (sizes[1] / sizes[0]).sqrt(), 1.0)
        up_weight[:, :rank] = (up * balance).to(up_weight)
        down_weight[:rank] = 0
        down_weight[:rank, : down.shape[1]] = (down / balance[:, None]).to(down_weight)
        if layer.use_dora[self.name]:
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            weight = weight + layer.scaling[self.name] * up_weight @ down_weight
            layer.lora_magnitude_vector[self.name].weight.data = torch.linalg.norm(weight, dim=1)

    def _restore_former(self) -> None:
        """Switch on again what was on, because peft has switched every other adapter off, and this one beside it."""
        self.layers = [layer for layer in parts.adapted(self.module) if self.name in getattr(layer, "lora_A", {})]
        for layer, state in self.before.items():
            layer.set_adapter(state.active)
            layer.merged_adapters = list(state.merged)
        for layer in self.layers:
            state = self.before.get(layer, LayerState([], False, []))
            layer.merged_adapters = []  # where peft believes something fused, it applies nothing else
            layer.enable_adapters(True)
            layer.set_adapter([*state.applied, self.name])

    def _refine_magnitudes(self) -> None:
        """peft takes DoRA's magnitudes in the model's dtype; in fp32 the adapter starts out changing nothing."""
        for layer in self.layers:
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            layer.lora_magnitude_vector[self.name].weight.data = torch.linalg.norm(weight, dim=1)

    @contextmanager
    def _off(self) -> Iterator[None]:
        self._refuse_if_fused()
        active = [list(layer.active_adapters) for layer in self.layers]
        self._activate([[name for name in names if name != self.name] for names in active])
        try:
            yield
        finally:
            self._activate(active)

    def _activate(self, active: list[list[str]]) -> None:
        # peft's own set_adapter makes what it activates trainable, and takes milliseconds in every step.
        for layer, names in zip(self.layers, active, strict=True):
            layer._active_adapter = names
        if self.layers[0].active_adapters != active[0]:
            raise RuntimeError("this version of peft is not supported; install another one")

    def _settle(self) -> None:
        for layer in self.layers:
            weight = layer.get_base_layer().weight
            # Weights of less than 16 bits are stored so, and computed with in another type.
            plain = weight.is_floating_point() and weight.itemsize >= 2
            dtype = weight.dtype if plain else torch.float32
            for name, parameter in layer.named_parameters():
                if f".{self.name}." in name:
                    parameter.requires_grad_(False)
                    parameter.grad = None
                    parameter.data = parameter.data.to(dtype)

    def _undo(self) -> None:
        self._refuse_if_fused()
        names = {module: name for name, module in self.module.named_modules()}
        flags = flags_of(self.module)  # peft changes them
        for layer in parts.adapted(self.module):
            # First switched off: peft would choose another one to switch on in its place.
            layer.set_adapter([name for name in layer.active_adapters if name != self.name])
        for layer in self.layers:
            layer.delete_adapter(self.name)
            if not layer.lora_magnitude_vector:
                vars(layer).pop("adapter_layer_names", None)  # the first DoRA adapter left its own here
            if not layer.lora_A:
                parent, _, child = names[layer].rpartition(".")
                setattr(self.module.get_submodule(parent), child, layer.base_layer)
            elif layer in self.before and (self.before[layer].disabled or self.before[layer].merged):
                state = self.before[layer]
                layer.set_adapter(state.active)
                layer.enable_adapters(not state.disabled)
                layer.merged_adapters = list(state.merged)
        restore(flags)
        configs = getattr(self.module, "peft_config", {})
        configs.pop(self.name, None)
        if not configs:
            vars(self.module).pop("peft_config", None)
            vars(self.module).pop(MARK, None)
            if self.marked:
                setattr(self.module, MARK, None)  # as diffusers itself leaves it

    def _refuse_if_fused(self) -> None:
        if any(self.name in layer.merged_adapters for layer in self.layers):
            raise RuntimeError(
                f"adapter {self.name!r} is fused into the weights, so the original pipeline cannot be restored "
                "exactly; call pipeline.unfuse_lora() first (exact up to rounding), or load the pipeline afresh"
            )


def _fresh_name(pipeline: DiffusionPipeline) -> str:
    """The first adapter name that no model of the pipeline has."""
    taken = parts.adapter_names(pipeline)
    names = itertools.chain([ADAPTER_NAME], (f"{ADAPTER_NAME}_{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)
