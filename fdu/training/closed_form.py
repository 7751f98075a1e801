"""The closed form of an erasure: the denoiser reads the target's prompts as it reads the anchor's, without training.

Every linear layer that reads a text input c, of weight W, gets the weight W + W M. The change M is the minimiser of

    sum_i w_i |W M t_i - W (a_i - t_i)|^2 + preservation_weight sum_k |W M p_k|^2 + ridge |W M|^2

over the inputs t_i of the target's prompts, a_i of the anchor's and p_k of the preserved ones:

    M = (sum_i w_i (a_i - t_i) t_i^T) (sum_i w_i t_i t_i^T + preservation_weight sum_k p_k p_k^T + ridge I)^-1

It is the same for all layers that read one input, and its rank is at most the number of inputs t_i. TIME (Orgad et al.
2023, arXiv 2303.08084), UCE (Gandikota et al. 2024, arXiv 2308.14761) and MACE (Lu et al. 2024, arXiv 2403.06135) edit
the keys and values of the cross-attention so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fdu.concepts import Pair
from fdu.config import EraseConfig
from fdu.models import parts
from fdu.models.denoiser import ENCODE_BATCH, Conditioning, Denoiser
from fdu.storage.merging import merged


@dataclasses.dataclass(frozen=True)
class Edit:
    """The changes up @ down of the layers that read one input, in float64; the first ranks do most."""

    ups: Mapping[str, Tensor]
    """By the layer's name in the denoiser, [out, r]."""
    down: Tensor
    """[r, d]; the d numbers of the input are the first that the layers read."""
    effects: Tensor
    """The share of each rank in the squared change of the inputs of the prompts, [d], decreasing; their sum is 1. Those
    beyond r have been left out."""

    @property
    def rank(self) -> int:
        return len(self.down)

    def error(self, rank: int) -> float:
        """The root mean square of what the first ``rank`` ranks leave out of the change of the prompts' inputs,
        relative to the whole."""
        return max(float(self.effects[rank:].sum()), 0.0) ** 0.5


@torch.no_grad()
def closed_form(denoiser: Denoiser, pairs: Sequence[Pair], config: EraseConfig) -> tuple[Edit, ...]:
    """The edits that erase the targets of ``pairs``, one for each text input of the denoiser.

    Each concept has the weight 1, shared by its prompts. The preserved prompts together have the weight
    ``config.preservation_weight`` for each concept.

    Raises:
        ValueError: the denoiser has no layer to edit.
    """
    layers = parts.layers(denoiser.module)
    readers = {
        name: [layer for layer in layers if parts.ends_with(layer, endings)]
        for name, endings in denoiser.text_inputs.items()
    }
    sums = {name: Sums() for name in denoiser.text_inputs if readers[name]}
    if not sums:
        raise ValueError(
            f"the closed form finds no layer to edit in this {type(denoiser.pipeline).__name__}; choose train_method "
            "'lora' and init 'zero'"
        )
    for weight, before, after in _aligned(denoiser, pairs):
        for name, one in sums.items():
            one.add(weight, before[name], after[name])
    kept = list(dict.fromkeys(["", *config.preservation_prompts, *(p for _, anchor in pairs for p in anchor.prompts)]))
    for start in range(0, len(kept), ENCODE_BATCH):
        conditioning = denoiser.encode(kept[start : start + ENCODE_BATCH])
        for row in range(len(conditioning)):
            for name, one in sums.items():
                inputs = _inputs(conditioning, name, row)[_seen(conditioning, name, row)]
                one.add(config.preservation_weight * len(pairs) / len(kept), inputs, inputs)
    return tuple(_edit(denoiser, readers[name], one, config) for name, one in sums.items())


class Sums:
    """The two sums over the inputs of prompts that the change is made of, [d, d] float64."""

    cross: Tensor
    """sum_i w_i (a_i - t_i) t_i^T."""
    gram: Tensor
    """sum_i w_i t_i t_i^T, and that of the preserved ones."""

    def add(self, weight: float, before: Tensor, after: Tensor) -> None:
        """Add the inputs [n, d] of a prompt, and those that take their place."""
        if not hasattr(self, "gram"):
            self.cross, self.gram = before.new_zeros(2, before.shape[1], before.shape[1])
        self.gram.addmm_(before.T, before, alpha=weight)
        if after is not before:
            self.cross.addmm_((after - before).T, before, alpha=weight)


def _edit(denoiser: Denoiser, layers: Sequence[str], sums: Sums, config: EraseConfig) -> Edit:
    """The edit of the layers that read one input."""
    sums.gram.diagonal().add_(config.ridge)
    change = torch.cholesky_solve(sums.cross.T, torch.linalg.cholesky(sums.gram)).T
    # The directions in which the change does most to the inputs of the prompts, those that do most last.
    squares, directions = torch.linalg.eigh(change @ sums.cross.T)
    effects = squares.flip(0).clamp(min=0)
    effects = effects / effects.sum()
    left_out = effects.flip(0).cumsum(0).flip(0).sqrt()
    left = directions.flip(1)[:, left_out > config.rank_tolerance]
    with merged(denoiser.pipeline) as adapted:
        ups = {}
        for layer in layers:
            name = f"{denoiser.module_name}.{layer}.weight"
            weight = adapted[name][1] if name in adapted else denoiser.module.get_parameter(f"{layer}.weight")
            ups[layer] = weight[:, : len(left)].double() @ left
    return Edit(ups, left.T @ change, effects)


def _aligned(denoiser: Denoiser, pairs: Sequence[Pair]) -> Iterator[tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """For each pair of prompts its weight, the target's inputs, and those of the anchor that take their place.

    Inputs have the names of ``Denoiser.text_inputs`` and are [n, d] float64.
    """
    every = [
        (1 / len(target.prompts), one, other)
        for target, anchor in pairs
        for one, other in zip(target.prompts, anchor.prompts, strict=True)
    ]
    for start in range(0, len(every), ENCODE_BATCH // 2):
        some = every[start : start + ENCODE_BATCH // 2]
        prompts = list(dict.fromkeys(prompt for _, *both in some for prompt in both))
        conditioning, tokens = denoiser.encode(prompts), denoiser.tokens(prompts)
        lengths = _lengths(denoiser, conditioning, len(tokens))
        for weight, one, other in some:
            rows = prompts.index(one), prompts.index(other)
            places = alignment([(own[rows[0]], own[rows[1]]) for own in tokens], lengths)
            found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
            for name in denoiser.text_inputs:
                before, after = (_inputs(conditioning, name, row) for row in rows)
                seen = _seen(conditioning, name, rows[0])
                # A pooled embedding is one input.
                found[0][name] = before[seen]
                found[1][name] = after[torch.tensor(places)[seen.cpu()]] if len(after) > 1 else after
            yield weight, *found


def _inputs(conditioning: Conditioning, name: str, row: int) -> Tensor:
    """The inputs of one prompt, [n, d] float64."""
    tensor = conditioning.tensors[name][row].double()
    return tensor[None] if tensor.ndim == 1 else tensor


def _seen(conditioning: Conditioning, name: str, row: int) -> Tensor:
    """Which inputs of a prompt no mask hides, [n]."""
    tensor, mask = conditioning.tensors[name], conditioning.tensors.get("mask")
    if tensor.ndim == 3 and mask is not None:
        return mask[row].bool()
    return torch.ones(1 if tensor.ndim == 2 else tensor.shape[1], dtype=torch.bool, device=tensor.device)


def _lengths(denoiser: Denoiser, conditioning: Conditioning, tokenizers: int) -> list[int]:
    """How many of the embeddings belong to each tokenizer: the last one has what the first leaves."""
    length = conditioning.tensors["embeddings"].shape[1]
    first = denoiser.pipeline.tokenizer_max_length if tokenizers > 1 else length
    return [first, length - first][:tokenizers]


def alignment(tokens: Sequence[tuple[Sequence[int], Sequence[int]]], lengths: Sequence[int]) -> list[int]:
    """For each place in the embeddings of one prompt, the place in those of another that corresponds to it.

    What the two begin and end with corresponds one to one. Of what is between, the name of a concept, token i
    corresponds to token i, and the last one to the last one. Where the other has nothing there, its next token stands
    in. What follows the prompts corresponds in its order.

    Args:
        tokens: by tokenizer, the tokens of the one prompt and of the other, without padding.
        lengths: by tokenizer, the number of its embeddings, which follow one another.
    """
    places: list[int] = []
    for (one, other), length in zip(tokens, lengths, strict=True):
        start = len(places)
        one, other = one[:length], other[:length]
        shorter = min(len(one), len(other))
        head = next((i for i in range(shorter) if one[i] != other[i]), shorter)
        tail = next((i for i in range(shorter - head) if one[-1 - i] != other[-1 - i]), shorter - head)
        name, others = len(one) - head - tail, len(other) - head - tail
        own = list(range(head))
        own += [head + (min(i, others - 1) if i < name - 1 else others - 1) if others else head for i in range(name)]
        own += range(len(other) - tail, len(other) + length - len(one))
        places += [start + min(place, length - 1) for place in own]
    return places
