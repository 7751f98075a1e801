"""Train the embeddings of a concept's own tokens in each text encoder, and no other row of the matrices."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.models.parts import TOKENIZERS
from fdu.training.methods.trainable import Request, Trainable


def make(denoiser: Denoiser, request: Request) -> Trainable:
    """The method "token": in each text encoder's embedding, the rows of the tokens that only the target's names are
    made of."""
    pipeline = denoiser.pipeline
    encoders = [name for name in TOKENIZERS if getattr(pipeline, name, None) is not None]
    if not encoders:
        raise ValueError(f"train_method 'token' needs a text encoder, and this {type(pipeline).__name__} has none")
    return TokenRows(pipeline, {encoder: own_tokens(pipeline, encoder, request) for encoder in encoders})


class TokenRows(Trainable):
    """Rows of the token embeddings.

    The parameters are the moves of the rows: fp32 [rows, width], 0 at the start. Weight decay so pulls towards the
    original, and rows that no prompt reads keep all bits. While training, a hook adds the moves to the embedding's
    output; :meth:`finish` writes the rows and removes the hook. The parameters belong to no module, so DDP does not
    average their gradients.
    """

    trains_text = True

    def __init__(self, pipeline: DiffusionPipeline, rows: Mapping[str, Sequence[int]]) -> None:
        """``rows``: token ids by the attribute of the text encoder."""
        super().__init__(pipeline)
        self.rows = {name: _Rows(name, getattr(pipeline, name), ids) for name, ids in rows.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{rows.name}.rows": rows.moves for rows in self.rows.values()}

    def changed_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {rows.name: (rows.matrix(rows.original), rows.matrix(rows.trained())) for rows in self.rows.values()}

    @contextmanager
    def _off(self) -> Iterator[None]:
        current = [rows.switch_off() for rows in self.rows.values()]
        try:
            yield
        finally:
            for rows, state in zip(self.rows.values(), current, strict=True):
                rows.switch_back(state)

    def _settle(self) -> None:
        for rows in self.rows.values():
            rows.settle()

    def _undo(self) -> None:
        for rows in self.rows.values():
            rows.undo()


class _Rows:
    """Trained rows of one text encoder's token embedding."""

    def __init__(self, attribute: str, encoder: Any, ids: Sequence[int]) -> None:
        weight = encoder.get_input_embeddings().weight
        # T5 holds its one matrix in two modules, of which it calls the other.
        named = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Embedding)]
        named = [(name, module) for name, module in named if module.weight is weight]
        self.name = f"{attribute}.{named[0][0]}.weight".replace(".base_layer", "")
        self.weight: nn.Parameter = weight
        self.ids = torch.tensor(ids, device=weight.device)
        self.original = weight.detach()[self.ids].clone()
        self.moves = nn.Parameter(torch.zeros_like(self.original, dtype=torch.float32))
        self.places = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
        """By token id: 0 for rows that stay, else the number of the trained row, from 1."""
        self.places[self.ids] = torch.arange(1, len(ids) + 1, device=weight.device)
        self.on = True
        self.hooks = [module.register_forward_hook(self._move) for _, module in named]

    def _move(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.on:
            return None
        places = self.places.to(output.device)[arguments[0]]
        moved = F.embedding(places, F.pad(self.moves, (0, 0, 1, 0)).to(output.device))
        moved = moved * getattr(module, "embed_scale", 1)  # Gemma
        return torch.where(places[..., None] > 0, (output + moved).to(output.dtype), output)

    def trained(self) -> Tensor:
        """The rows as they are trained, [rows, width] in the model's dtype."""
        moves = self.moves.detach().to(self.original.device)
        return (self.original.float() + moves).to(self.original.dtype)

    def matrix(self, rows: Tensor) -> Tensor:
        """The whole embedding matrix with these rows."""
        matrix = self.weight.detach().clone()
        matrix[self.ids.to(matrix.device)] = rows.to(matrix)
        return matrix

    def switch_off(self) -> tuple[bool, Tensor]:
        """Return what :meth:`switch_back` needs."""
        state = self.on, self.weight.data[self.ids.to(self.weight.device)]
        self.on = False
        self._write(self.original)
        return state

    def switch_back(self, state: tuple[bool, Tensor]) -> None:
        self.on, rows = state
        self._write(rows)

    def settle(self) -> None:
        self._unhook()
        self.moves.requires_grad_(False)
        self.moves.grad = None
        self._write(self.trained())

    def undo(self) -> None:
        self._unhook()
        self._write(self.original)

    def _unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _write(self, rows: Tensor) -> None:
        # Past autograd: the matrix may be saved for a backward pass, which does not read its values.
        self.weight.data[self.ids.to(self.weight.device)] = rows.to(self.weight)


def own_tokens(pipeline: DiffusionPipeline, encoder: str, request: Request) -> list[int]:
    """The ids of the tokens of the target's names in a text encoder.

    The tokens are read from the prompts themselves, because a name's tokens depend on its context. Tokens of the
    prompts to keep are left out: of "van gogh" only "gogh" is trained if "a van" is kept.

    Raises:
        ValueError: no prompt contains one of the names, a name has no token of its own, or a prompt contains none of
            the names.
    """
    names, prompts, kept = request.target_names, request.prompts, request.kept_prompts
    tokenizer = parts.tokenizer(pipeline, encoder)
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError(
            f"train_method 'token' needs a fast tokenizer in pipeline.{TOKENIZERS[encoder]}, got "
            f"{type(tokenizer).__name__}; load the pipeline with it, or choose another train_method"
        )
    read = {prompt: _tokens(tokenizer, prompt) for prompt in (*prompts, *kept)}
    taken = {*tokenizer.all_special_ids, *(token for prompt in kept for token, _, _ in read[prompt])}
    chosen: set[int] = set()
    for name in names:
        pattern = re.compile(rf"(?<!\w){re.escape(name.strip())}(?!\w)", re.IGNORECASE)
        spans = [(prompt, match.span()) for prompt in prompts for match in pattern.finditer(prompt)]
        if not name.strip() or not spans:
            raise ValueError(
                f"train_method 'token' trains the tokens of the target's name, and none of its prompts contains "
                f"{name!r}; name the target by a word of its prompts, or choose another train_method"
            )
        found = {token for prompt, (start, end) in spans for token, a, b in read[prompt] if a < end and start < b}
        if not found - taken:
            words = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(found))
            raise ValueError(
                f"target {name!r} has no token of its own in {encoder}: every one of {words} stands for something "
                "else too, in the anchor's prompts or in preservation_prompts; take those prompts out, choose another "
                "anchor, or choose another train_method"
            )
        chosen |= found - taken
    for prompt in prompts:
        if not chosen & {token for token, _, _ in read[prompt]}:
            raise ValueError(
                f"train_method 'token' cannot erase the prompt {prompt!r}, which has no token that belongs only to "
                f"{', '.join(map(repr, names))}; reword it, leave it out, or choose another train_method"
            )
    return sorted(chosen)


def _tokens(tokenizer: Any, prompt: str) -> list[tuple[int, int, int]]:
    """(id, start, end) of each token of whatever a pipeline may make of a prompt: some write it in lower case, and
    Sana puts an instruction before it."""
    tokens = []
    for before, text in itertools.product(("", " "), dict.fromkeys([prompt, prompt.lower()])):
        read = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [(start - len(before), end - len(before)) for start, end in read["offset_mapping"]]
        tokens += [(token, *span) for token, span in zip(read["input_ids"], spans, strict=True)]
    return tokens
