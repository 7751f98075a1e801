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
from fdu.models.denoiser import Conditioning, Denoiser
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

    Each concept has the weight 1, shared by its prompts, and each preserved prompt ``config.preservation_weight``.

    Raises:
        ValueError: the denoiser has no layer to edit.
    """
    kept = list(dict.fromkeys(["", *config.preservation_prompts, *(p for _, anchor in pairs for p in anchor.prompts)]))
    layers = parts.layers(denoiser.module)
    found = []
    for name, endings in denoiser.text_inputs.items():
        readers = tuple(layer for layer in layers if parts.ends_with(layer, endings))
        if readers:
            found.append(_edit(denoiser, readers, *_sums(denoiser, name, pairs, kept, config), config))
    if not found:
        raise ValueError(
            f"the closed form finds no layer to edit in this {type(denoiser.pipeline).__name__}; choose train_method "
            "'lora' and init 'zero'"
        )
    return tuple(found)


def _sums(
    denoiser: Denoiser, name: str, pairs: Sequence[Pair], kept: Sequence[str], config: EraseConfig
) -> tuple[Tensor, Tensor]:
    """sum_i w_i (a_i - t_i) t_i^T, and sum_i w_i t_i t_i^T + preservation_weight sum_k p_k p_k^T, [d, d] float64."""
    sums: list[Tensor] = []

    def add(weight: float, after: Tensor, before: Tensor) -> None:
        if not sums:
            sums.extend(after.new_zeros(2, after.shape[1], after.shape[1]))
        sums[0].addmm_((after - before).T, before, alpha=weight)
        sums[1].addmm_(before.T, before, alpha=weight)

    for target, anchor in pairs:
        for before, after in _aligned(denoiser, name, target.prompts, anchor.prompts):
            add(1 / len(target.prompts), after, before)
    for inputs in _inputs(denoiser, name, kept):
        add(config.preservation_weight * len(pairs) / len(kept), inputs, inputs)
    return sums[0], sums[1]


def _edit(denoiser: Denoiser, layers: Sequence[str], cross: Tensor, gram: Tensor, config: EraseConfig) -> Edit:
    """The edit of :func:`_sums`."""
    gram.diagonal().add_(config.ridge)
    change = torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T
    # The directions in which the change does most to the inputs of the prompts, those that do most last.
    squares, directions = torch.linalg.eigh(change @ cross.T)
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


def _inputs(denoiser: Denoiser, name: str, prompts: Sequence[str]) -> Iterator[Tensor]:
    """Each prompt's inputs, [n, d] float64, without those that a mask hides."""
    for start in range(0, len(prompts), 16):
        conditioning = denoiser.encode(prompts[start : start + 16])
        for row in range(len(conditioning)):
            yield _read(conditioning, name, row)[0]


def _read(conditioning: Conditioning, name: str, row: int) -> tuple[Tensor, Tensor]:
    """The inputs of one prompt, [n, d] float64, and their places, [n]."""
    tensor = conditioning.tensors[name][row].double()
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    mask = conditioning.tensors.get("mask")
    seen = torch.ones(len(tensor), dtype=torch.bool) if mask is None or len(tensor) == 1 else mask[row].bool().cpu()
    places = seen.nonzero()[:, 0]
    return tensor[places.to(tensor.device)], places


def _aligned(
    denoiser: Denoiser, name: str, targets: Sequence[str], anchors: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each pair of prompts, the target's inputs and those of the anchor that take their place, [n, d] float64."""
    tokens = [denoiser.tokens(prompts) for prompts in (targets, anchors)]
    for index, pair in enumerate(zip(targets, anchors, strict=True)):
        conditioning = denoiser.encode(pair)
        tensor = conditioning.tensors[name]
        if tensor.ndim == 2:
            yield tensor[:1].double(), tensor[1:].double()
            continue
        by_tokenizer = [(before[index], after[index]) for before, after in zip(*tokens, strict=True)]
        places = alignment(by_tokenizer, _shares(denoiser, tensor.shape[1], len(by_tokenizer)))
        inputs, seen = _read(conditioning, name, 0)
        yield inputs, tensor[1, torch.tensor(places, device=tensor.device)[seen]].double()


def _shares(denoiser: Denoiser, length: int, tokenizers: int) -> list[int]:
    """How many of the ``length`` embeddings belong to each tokenizer: the last one has what the first leaves."""
    if tokenizers == 1:
        return [length]
    first = denoiser.pipeline.tokenizer_max_length
    return [first, length - first]


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
