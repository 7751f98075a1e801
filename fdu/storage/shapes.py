"""Pipelines of shapes alone: every part has its layers, and no weight takes memory."""

from __future__ import annotations

import importlib
import json
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fdu.models.denoiser import Conditioning, Denoiser
from fdu.storage.loading import hub_name, loading
from fdu.storage.output import PIPELINE_FILE
from fdu.storage.single_file import SingleFile

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROMPT = "a photo of a corgi in the style of van gogh"
"""A prompt of usual length, for families that do not pad prompts to a fixed one."""
TOKEN_CHARACTERS, CLIP_TOKENS, OTHER_TOKENS = 4, 77, 512
"""Without a tokenizer: the characters of a token, and the tokens that prompts are padded to, by CLIP and others."""


def load_shapes(model: str, dtype: str = "float32") -> DiffusionPipeline:
    """A pipeline on the device "meta", from its configs and tokenizers; a tokenizer that cannot be loaded is replaced
    by one that only counts.

    Args:
        model: a folder; a hub id, of which nothing but these small files is fetched; or a .safetensors file, of which
            the pipeline that it belongs to stands for it.
        dtype: dtype of the weights.

    Raises:
        OSError: it cannot be loaded; the first line of the reason.
    """
    file = SingleFile.of(model)
    with loading(model):
        pipeline = _pipeline(file.pipeline_name if file else model, dtype)
    pipeline.register_to_config(_name_or_path=str(file.path) if file else model)
    return pipeline


def _pipeline(model: str, dtype: str) -> DiffusionPipeline:
    import diffusers
    from diffusers import DiffusionPipeline

    name, revision = (model, None) if Path(model).is_dir() else hub_name(model)
    if Path(name).is_dir():
        index = json.loads((Path(name) / PIPELINE_FILE).read_text(encoding="utf-8"))
    else:
        index = DiffusionPipeline.load_config(name, revision=revision)
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, (list, tuple)):
            continue
        library, kind_name = entry
        if kind_name is None or part in ("safety_checker", "feature_extractor", "image_encoder"):
            parts[part] = None
            continue
        where = {"subfolder": part, "revision": revision}
        if part.startswith("tokenizer"):
            parts[part] = _tokenizer(library, kind_name, name, where)
            continue
        kind = getattr(importlib.import_module(library), kind_name)
        if issubclass(kind, nn.Module):
            with torch.device("meta"):
                if library == "diffusers":
                    made = kind.from_config(kind.load_config(name, **where))
                else:
                    made = kind(kind.config_class.from_pretrained(name, **where))
            parts[part] = nn.Module.to(made, getattr(torch, dtype)).eval()
        else:
            parts[part] = kind.from_pretrained(name, **where)
    options = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    pipeline: DiffusionPipeline = getattr(diffusers, index["_class_name"])(**parts, **options)
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipeline


def conditioning_shapes(denoiser: Denoiser, count: int) -> Conditioning:
    """The conditioning of ``count`` prompts for a pipeline of shapes: the device "meta" for embeddings, and for masks,
    whose values pipelines look at, the CPU."""
    with torch.device("cpu"), _reading_on_cpu(denoiser):
        tensors = denoiser.encode_batch([PROMPT]).tensors
    shapes = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            shapes[name] = torch.empty(count, *tensor.shape[1:], dtype=denoiser.dtype, device="meta")
        else:
            shapes[name] = tensor.expand(count, *tensor.shape[1:])
    return Conditioning(shapes)


@contextmanager
def _reading_on_cpu(denoiser: Denoiser) -> Iterator[None]:
    """Within this context the text encoders are stand-ins on the CPU."""
    pipeline, encoders = denoiser.pipeline, denoiser.text_encoders
    # Not by setattr, at which the pipeline would change its record of its parts.
    vars(pipeline).update({name: _Reader(encoder) for name, encoder in encoders.items()})
    try:
        yield
    finally:
        vars(pipeline).update(encoders)


class _Reader:
    """A text encoder of which nothing is known but its config: all that it reads is zeros, which take no memory."""

    device = torch.device("cpu")

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def __call__(self, input_ids: Tensor, *others: Any, **options: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        config = self.encoder.config.get_text_config()
        zero = torch.zeros((), dtype=self.encoder.dtype)
        states = zero.expand(*input_ids.shape, config.hidden_size)
        read: dict[str, Any] = {
            "last_hidden_state": states,
            "hidden_states": (states,) * (config.num_hidden_layers + 1),
        }
        if hasattr(self.encoder, "text_projection"):
            return CLIPTextModelOutput(text_embeds=zero.expand(len(input_ids), config.projection_dim), **read)
        return BaseModelOutputWithPooling(pooler_output=states[:, 0], **read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)


def _tokenizer(library: str, kind: str, name: str, where: Mapping[str, Any]) -> Any:
    """A pipeline's tokenizer, or one that counts; of nothing at all transformers would make one without words."""
    try:
        if Path(name).is_dir() and not (Path(name) / where["subfolder"]).is_dir():
            raise FileNotFoundError(where["subfolder"])
        return getattr(importlib.import_module(library), kind).from_pretrained(name, **where)
    except (OSError, ValueError, ImportError, AttributeError, TypeError):
        return _Counter(CLIP_TOKENS if "CLIP" in kind else OTHER_TOKENS)


class _Counter:
    """A tokenizer that knows no words: prompts become as many tokens as they usually do."""

    pad_token_id = 0

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length
        self.tokenizer = types.SimpleNamespace(padding_side="right")

    def __call__(self, text: Any, *others: Any, **options: Any) -> Any:
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else list(text)
        counts = [len(one) // TOKEN_CHARACTERS + 2 for one in texts]
        longest = options.get("max_length") or self.model_max_length
        if options.get("truncation"):
            counts = [min(count, longest) for count in counts]
        padding = options.get("padding")
        width = {"max_length": longest, "longest": max(counts), True: max(counts)}.get(padding, 0)
        read = {
            "input_ids": [[1] * count + [self.pad_token_id] * (width - count) for count in counts],
            "attention_mask": [[1] * count + [0] * (width - count) for count in counts],
        }
        return BatchEncoding(read, tensor_type=options.get("return_tensors"))

    def tokenize(self, text: str) -> list[str]:
        return []

    def batch_decode(self, tokens: Any) -> list[str]:
        return [""] * len(tokens)

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any) -> Any:
        told = messages if isinstance(messages[0], list) else [messages]
        texts = ["\n".join(str(message["content"]) for message in one) for one in told]
        if tokenize:
            return self(texts, **options)
        return texts if told is messages else texts[0]
