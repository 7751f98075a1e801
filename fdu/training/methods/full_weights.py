"""Train the pipeline's own weights as float32 masters, with the originals kept beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.models.quantization import is_few_bits
from fdu.training.closed_form import Edit
from fdu.training.methods.trainable import Request, Trainable


def make(denoiser: Denoiser, request: Request) -> Trainable:
    """The methods "text" (the layers that read the prompt), "cross_attention" (its keys and values), "attention" (all
    layers of attention), "full" (all weights of the denoiser, of which the originals are a further copy) and
    "text_encoder" (all of these)."""
    method, trains_text = request.method, request.method == "text_encoder"
    attributes = denoiser.text_encoders if trains_text else [denoiser.module_name]
    endings = denoiser.layer_groups()
    names: dict[nn.Parameter, str] = {}
    for name, parameter in parts.weights(denoiser.pipeline).items():
        attribute, _, rest = name.partition(".")
        layer = rest.rpartition(".")[0]
        chosen = method not in endings or parts.ends_with(layer, endings[method])
        chosen |= rest.endswith(".weight") and layer in request.edited
        if attribute in attributes and chosen:
            names.setdefault(parameter, name)  # one that modules share is trained once
    for parameter, name in names.items():
        away = parameter.is_meta and not request.by_shape
        if is_few_bits(parameter) or away:
            kind = parameter.dtype if type(parameter.data) is Tensor else type(parameter.data).__name__
            raise ValueError(
                f"train_method {method!r} trains {name}, which is "
                f"{'not in memory' if away else f'stored as {kind}'}; load the pipeline "
                "without quantization, layerwise casting or offloading, or choose train_method 'lora'"
            )
    request.check_found(names.values(), denoiser)
    return Weights(denoiser.pipeline, {name: parameter for parameter, name in names.items()}, trains_text=trains_text)


class Weights(Trainable):
    """Chosen weights of the pipeline.

    The modules get fp32 masters in place of their parameters, and the user's parameters are kept for the frozen model:
    one further copy of the trained weights. In a half-precision module the masters need autocast. The frozen model uses
    the user's own parameters, so no tensor that autograd saved is touched, and a cache of cast weights cannot mix up
    the two. Under torch.compile it has its own graph.
    """

    def __init__(self, pipeline: DiffusionPipeline, chosen: Mapping[str, nn.Parameter], *, trains_text: bool) -> None:
        super().__init__(pipeline)
        self.trains_text = trains_text
        self.originals = dict(chosen)
        self.trained = {
            name: nn.Parameter(original.detach().to(torch.float32, copy=True)) for name, original in chosen.items()
        }
        names = {id(original): name for name, original in chosen.items()}
        self.places: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in chosen}
        """Where each weight stands: its module's registered parameters, and its name there. Modules may share it."""
        for model in parts.models(pipeline).values():
            for module in model.modules():
                for attribute, parameter in module._parameters.items():
                    if id(parameter) in names:
                        self.places[names[id(parameter)]].append((module._parameters, attribute))
        self._put(self.trained)

    @torch.no_grad()
    def begin_at(self, denoiser: Denoiser, edits: Sequence[Edit]) -> None:
        layers = parts.layers(denoiser.module)
        for edit in edits:
            for name, up in edit.ups.items():
                weight: Any = layers[name].weight
                weight[:, : edit.down.shape[1]] += (up @ edit.down).to(weight)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.trained)

    def changed_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        self._follow()
        return {
            name: (original.detach(), self.trained[name].detach().to(original.dtype))
            for name, original in self.originals.items()
        }

    @contextmanager
    def _off(self) -> Iterator[None]:
        self._follow()
        current = {name: places[0][0][places[0][1]] for name, places in self.places.items()}
        self._put(self.originals)
        try:
            yield
        finally:
            self._put(current)

    def _settle(self) -> None:
        flags = {id(parameter): flag for parameter, flag in self._flags}
        for name, original in self.originals.items():
            trained = self.trained[name]
            trained.requires_grad_(flags[id(original)])
            trained.grad = None
            trained.data = trained.data.to(original.dtype)

    def _undo(self) -> None:
        self._follow()
        self._put(self.originals)

    def _put(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, places in self.places.items():
            for registered, attribute in places:
                registered[attribute] = parameters[name]  # what setattr does, without its many checks

    def _follow(self) -> None:
        """The originals go where the user has moved the pipeline, and after the training to its dtype."""
        for name, original in self.originals.items():
            trained = self.trained[name]
            dtype = original.dtype if self.state == "training" else trained.dtype
            if original.device != trained.device or original.dtype != dtype:
                original.data = original.data.to(trained.device, dtype)
