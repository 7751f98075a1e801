"""Feature extractors: CLIP models by folder or hub id, and any module, such as a pipeline's own judge."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

CLIP = "openai/clip-vit-base-patch32"
"""The default image-text encoder, with which concept ablation and its successors publish their figures."""
CLIP_LAYERS = 4
"""Number of layers of its image encoder in the perceptual distance, evenly spaced, the last one included."""


class Features:
    """Turns images into features; a subclass implements :meth:`extract`, and :meth:`texts` if it reads text."""

    def __init__(self, name: str, batch_size: int = 32) -> None:
        self.name = name
        self.batch_size = batch_size
        self._known: Any = WeakTensorKeyDictionary()

    def extract(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features [B, D] of one batch [B, 3, H, W] in [0, 1], and [B, places, channels] for each layer."""
        raise NotImplementedError

    def texts(self, prompts: Sequence[str]) -> Tensor | None:
        """Text features [N, D] comparable with image features; None if this extractor reads no text."""
        return None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [N, D], float32 on the CPU, of images [N, 3, H, W] in [0, 1].

        They are kept as long as the tensor lives: judge, scores and distances ask for the same images.
        """
        if images not in self._known:
            self._known[images] = torch.cat([self.extract(batch)[0] for batch in images.split(self.batch_size)])
        return self._known[images]

    @torch.no_grad()
    def layers_of_pairs(self, before: Tensor, after: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The layers of images [N, 3, H, W] and of their counterparts, by batches; their features are kept too."""
        features: tuple[list[Tensor], list[Tensor]] = ([], [])
        for pair in zip(before.split(self.batch_size), after.split(self.batch_size), strict=True):
            extracted = [self.extract(batch) for batch in pair]
            for kept, (batch, _) in zip(features, extracted, strict=True):
                kept.append(batch)
            yield extracted[0][1], extracted[1][1]
        for images, kept in zip((before, after), features, strict=True):
            self._known[images] = torch.cat(kept)


class ClipFeatures(Features):
    """A CLIP model, or another of two encoders with the interface of transformers' CLIP, such as SigLIP."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any, name: str, batch_size: int = 32) -> None:
        super().__init__(name, batch_size)
        self.model, self.tokenizer, self.processor = model.eval().requires_grad_(False), tokenizer, processor

    @classmethod
    def load(cls, name: str = CLIP, device: str = "cpu") -> ClipFeatures:
        """The model, tokenizer and image processor in a folder or behind a hub id, as transformers saves them.

        Raises:
            OSError: the model, its tokenizer or its image processor is missing, or the model is of another kind.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
            if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
                raise ValueError(f"a {type(model).__name__} is not an image-text encoder such as CLIP")
            tokenizer = AutoTokenizer.from_pretrained(name)
            # The backend of Pillow needs no torchvision, and reads images the same way everywhere.
            processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"image-text encoder {name!r} could not be loaded: {line}") from error
        return cls(model.to(device), tokenizer, processor, name)

    def extract(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`Features.extract`; the image's projected embedding, and evenly spaced layers of its encoder."""
        pictures = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pixels = self.processor(images=list(pictures), return_tensors="pt", input_data_format="channels_last")
        output = self.model.get_image_features(
            pixel_values=pixels["pixel_values"].to(self.model.device), output_hidden_states=True
        )
        layers = output.hidden_states[1:]
        chosen = sorted({round((index + 1) * len(layers) / CLIP_LAYERS) for index in range(CLIP_LAYERS)} - {0})
        return output.pooler_output.float().cpu(), [layers[index - 1].float().cpu() for index in chosen]

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """See :meth:`Features.texts`; longer texts are cut off where the encoder stops reading."""
        places = self.model.config.text_config.max_position_embeddings
        # SigLIP was trained on padded texts; CLIP ignores the padding.
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=places, truncation=True, return_tensors="pt"
        )
        kept = {key: tokens[key].to(self.model.device) for key in ("input_ids", "attention_mask") if key in tokens}
        return self.model.get_text_features(**kept).pooler_output.float().cpu()


class ModuleFeatures(Features):
    """Any module that takes images [B, 3, H, W] in [0, 1].

    Args:
        module: called in evaluation mode, on its own device.
        layers: submodules, by their names in ``named_modules``, whose outputs make up the perceptual distance. Outputs
            [B, channels, ...] have their channels first; [B, channels] count as one place.
        features: submodules whose outputs, flattened and joined, are the features. None: the module's own output.
        name: its name in reports.
        batch_size: images at a time.

    Raises:
        ValueError: the module has no submodule of that name.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str] = (),
        features: Sequence[str] = (),
        name: str = "",
        batch_size: int = 64,
    ) -> None:
        super().__init__(name or type(module).__name__, batch_size)
        self.module, self.layers, self.features = module.eval(), tuple(layers), tuple(features)
        known = dict(module.named_modules())
        missing = [given for given in (*layers, *features) if given not in known]
        if missing:
            raise ValueError(f"module {self.name!r} has no submodule {missing[0]!r}; named_modules() lists them")

    def extract(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`Features.extract`; without ``layers`` the features count as the only one."""
        parameter = next(self.module.parameters(), None)
        seen: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = output

        with ExitStack() as hooks:
            for name in {*self.layers, *self.features}:
                submodule = self.module.get_submodule(name)
                hooks.enter_context(submodule.register_forward_hook(functools.partial(keep, name)))
            output = self.module(images if parameter is None else images.to(parameter.device, parameter.dtype))
        if self.features:
            output = torch.cat([seen[name].flatten(1) for name in self.features], 1)
        if not isinstance(output, Tensor):
            raise TypeError(f"module {self.name!r} returns {type(output).__name__}; name submodules as its features")
        output = output.flatten(1).float().cpu()
        layers = [seen[name].float().cpu() for name in self.layers]
        return output, [layer.flatten(2).mT if layer.ndim > 2 else layer[:, None] for layer in layers or [output]]


def as_features(given: Features | nn.Module | str | None) -> Features | None:
    """An extractor from whatever a user gives: an extractor, a module, or a folder or hub id of a CLIP model.

    Raises:
        TypeError: anything else.
        OSError: as :meth:`ClipFeatures.load`.
    """
    if given is None or isinstance(given, Features):
        return given
    if isinstance(given, nn.Module):
        return ModuleFeatures(given)
    if isinstance(given, str):
        return ClipFeatures.load(given)
    raise TypeError(f"features must be an extractor, a module or a name, got {type(given).__name__}")
