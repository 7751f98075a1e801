"""Single-file checkpoints: all of a pipeline, or its denoiser alone, in one file of safetensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

CONFIG_MARK = "_fdu_model_config"
"""The attribute of a pipeline that holds the pipeline that its file was said to belong to."""
NAME = re.compile(r"(?P<file>.+?\.safetensors)(?:@(?P<config>.+))?")
UNET = "model.diffusion_model.input_blocks.0.0.weight"
"""The first layer of Stable Diffusion's UNet, which diffusers takes every file for that it knows no better."""
AUTOENCODER = ("first_stage_model.", "vae.")
TEXT_ENCODER = re.compile(r"(cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.\w+)\.")
"""How the names of weights begin, outside of the denoiser."""


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """A file of weights, and the pipeline that it belongs to."""

    path: Path
    config: str | None
    """A folder or hub id with configs and tokenizers, and weights of what the file lacks; None: diffusers' choice."""

    @classmethod
    def of(cls, model: str) -> SingleFile | None:
        """The file that a model's name means, with a pipeline after an @; None for folders and hub ids.

        >>> SingleFile.of("sd.safetensors@org/model").config, SingleFile.of("org/model@v1.0")
        ('org/model', None)
        """
        match = None if Path(model).is_dir() else NAME.fullmatch(model)
        return match and cls(Path(match["file"]), match["config"])

    def check(self, argument: str) -> None:
        """Refuse a file that cannot be loaded, from its header.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not in the format safetensors, holds a LoRA, or nothing that diffusers knows.
        """
        shown = f"{argument} {str(self.path)!r}"
        if not self.path.is_file():
            raise FileNotFoundError(f"{shown} does not exist; give a .safetensors file that does")
        names = self.shapes(argument)
        if any("lora" in name for name in names):
            raise ValueError(f"{shown} holds a LoRA, not a model; give its base model, and load the LoRA into that")
        if self.config is None and self._usual_config(names) is None:
            raise ValueError(
                f"{shown} holds no model that diffusers recognises; if it is one, name the pipeline that it belongs to "
                "by model_config"
            )

    def shapes(self, argument: str = "MODEL") -> dict[str, Any]:
        """Tensors without content by name, from the header of the file.

        Raises:
            ValueError: it is not in the format safetensors.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                return {
                    name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                    for name in file.keys()  # noqa: SIM118
                }
        except SafetensorError as error:
            raise ValueError(
                f"{argument} {str(self.path)!r} is not a safetensors file, or is damaged ({error}); download it again"
            ) from error

    @property
    def pipeline_name(self) -> str:
        """The folder or hub id of the pipeline that the file belongs to."""
        return self.config or self._usual_config(self.shapes()) or ""

    @staticmethod
    def _usual_config(shapes: Mapping[str, Any]) -> str | None:
        """The hub id of the pipeline that diffusers takes the configs from; None if it knows none."""
        from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

        try:
            known = infer_diffusers_model_type(shapes) != "v1" or UNET in shapes
            return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]) if known else None
        except (KeyError, ValueError, IndexError, UnboundLocalError, RuntimeError):  # shapes of no model that it knows
            return None

    def load(self, dtype: str) -> DiffusionPipeline:
        """The pipeline with the weights of the file; what the file lacks comes from the pipeline that it belongs to.

        Raises:
            OSError: the configs cannot be read or fetched, or the file lacks weights.
            Exception: diffusers raises errors of many kinds for weights that do not fit.
        """
        import torch
        from diffusers import DiffusionPipeline
        from torch import nn

        config = self.pipeline_name
        try:
            index = DiffusionPipeline.load_config(config)
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise OSError(
                f"no configs in {config!r}; give a folder with configs and tokenizers by model_config ({reason})"
            ) from error
        lacking = (
            f"it lacks weights of a {index['_class_name']}; it is damaged, or belongs to another pipeline, to name by "
            "model_config"
        )
        try:
            pipeline = self._loaded(config, index, getattr(torch, dtype))
            modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
            absent = any(weight.is_meta for module in modules for weight in module.parameters())
        except NotImplementedError as error:  # what got no weights cannot be moved
            raise OSError(lacking) from error
        if absent:
            raise OSError(lacking)
        pipeline.register_to_config(_name_or_path=str(self.path))
        vars(pipeline)[CONFIG_MARK] = self.config
        return pipeline

    def _loaded(self, config: str, index: Mapping[str, Any], dtype: torch.dtype) -> DiffusionPipeline:
        import diffusers

        options: dict[str, Any] = {"config": config, "torch_dtype": dtype}
        whole: DiffusionPipeline
        if holds_all(self.shapes(), index):
            whole = _reads_files(getattr(diffusers, index["_class_name"])).from_single_file(str(self.path), **options)
        else:
            part = "transformer" if "transformer" in index else "unet"
            kind = _reads_files(getattr(diffusers, index[part][1]))
            denoiser = kind.from_single_file(str(self.path), subfolder=part, **options)
            whole = diffusers.DiffusionPipeline.from_pretrained(config, **{part: denoiser, "dtype": dtype})
        return whole


def _reads_files(kind: Any) -> Any:
    """The class, if diffusers reads single files of it."""
    if not hasattr(kind, "from_single_file"):
        raise ValueError(f"diffusers reads no single files of a {kind.__name__}; give the folder of the pipeline")
    return kind


def holds_all(names: Collection[str], index: Mapping[str, Any]) -> bool:
    """Whether a file with weights of these names holds every part of a pipeline, by the pipeline's index."""
    wanted = [name for name, entry in index.items() if name.startswith("text_encoder") and entry[0] is not None]
    found = {match[1] for name in names if (match := TEXT_ENCODER.match(name))}
    return any(name.startswith(AUTOENCODER) for name in names) and len(found) >= len(wanted)
