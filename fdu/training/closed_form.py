"""The closed form of an erasure: an edit of the layers that read the text, computed without training.

With it the denoiser reads the target's prompts as it reads the anchor's. Every linear layer that reads a text input c,
of weight W, gets the weight W + W M. The change M minimises, for any W,

    sum_i w_i |W M t_i - W (a_i - t_i)|^2 + sum_k v_k |W M p_k|^2 + r |W M|^2

over the inputs t_i of the target's prompts, the inputs a_i of the anchor's that correspond to them, and the inputs p_k
of the preserved prompts:

    M = (sum_i w_i (a_i - t_i) t_i^T) (sum_i w_i t_i t_i^T + sum_k v_k p_k p_k^T + r I)^-1

The prompts of one concept share its weight. All preserved prompts share preservation_weight times the sum of these
weights. r is ``ridge`` times the mean of the diagonal of the other two sums.

TIME (Orgad et al. 2023, arXiv 2303.08084), UCE (Gandikota et al. 2024, arXiv 2308.14761) and MACE (Lu et al. 2024,
arXiv 2403.06135) edit the keys and values of cross-attention in this way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional

from fdu.concepts import Pair
from fdu.config import EraseConfig
from fdu.models import parts
from fdu.models.denoiser import ENCODE_BATCH, Conditioning, Denoiser
from fdu.training.examples import Found, preserved_prompts, spread

MOST_PROMPTS = 256
"""Of many concepts, no more prompts of targets and preserved anchors are read than these, but one of each: encoding
them takes most of the time."""
NEGLIGIBLE = 1e-14
"""Shares of the squared effect below this are rounding errors."""


@dataclasses.dataclass(frozen=True)
class EditFigures:
    """What is told of an edit."""

    input: str
    """What the layers read: "embeddings" or "pooled"."""
    layers: int
    """The number of edited layers."""
    rank: int
    """The rank that is in place."""
    error: float
    """Root mean square of what that rank leaves out of the change of the inputs, relative to the whole change."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """The changes up @ down of the layers that read one input, in float64, in decreasing order of effect."""

    input: str
    """A name of ``Denoiser.text_inputs``."""
    ups: Mapping[str, Tensor]
    """By the layer's name in the denoiser, [out, r]."""
    down: Tensor
    """[r, d]; the d numbers of the input are the first that the layers read."""
    effects: Tensor
    """The share of each rank in the squared effect, [d]; their sum is 1. Those beyond r have been left out."""

    @property
    def rank(self) -> int:
        return len(self.down)

    def figures(self, rank: int | None = None) -> EditFigures:
        """The figures of the edit cut to a rank; None for its own."""
        used = self.rank if rank is None else min(rank, self.rank)
        error = max(float(self.effects[used:].sum()), 0.0) ** 0.5
        return EditFigures(self.input, len(self.ups), used, error)


@torch.no_grad()
def closed_form(
    denoiser: Denoiser, pairs: Sequence[Pair], config: EraseConfig, found: Sequence[Found] = ()
) -> tuple[Edit, ...]:
    """The edits that erase the targets of ``pairs``: one for each text input in which target and anchor differ.

    Args:
        denoiser: the model.
        pairs: targets and their anchors.
        config: the settings.
        found: conditionings that still draw a target, which are erased too. Those of one concept share its weight.

    Raises:
        ValueError: the denoiser has no layer to edit, or its text encoders read target and anchor as the same.
    """
    layers = parts.layers(denoiser.module)
    readers = {
        name: [layer for layer in layers if parts.ends_with(layer, endings)]
        for name, endings in denoiser.text_inputs.items()
    }
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, weight: float, before: Tensor, after: Tensor) -> None:
        if name not in sums:
            size = before.shape[1]
            sums[name] = before.new_zeros(size, size), before.new_zeros(size, size)
        cross, gram = sums[name]
        gram.addmm_(before.T, before, alpha=weight)
        if after is not before:
            cross.addmm_((after - before).T, before, alpha=weight)

    if not any(readers.values()):
        raise ValueError(
            f"the closed form finds no layer to edit in this {type(denoiser.pipeline).__name__}; choose train_method "
            "'lora' and init 'none'"
        )
    pairs = _thinned(pairs, config)
    for weight, before, after in _aligned(denoiser, pairs, found):
        for name in before:
            add(name, weight, before[name], after[name])
    kept = preserved_prompts(pairs, config)
    preserving = config.preservation_weight * sum(target.weight for target, _ in pairs) / len(kept)
    for start in range(0, len(kept), ENCODE_BATCH):
        conditioning = denoiser.encode(kept[start : start + ENCODE_BATCH])
        for row in range(len(conditioning)):
            for name in sums:
                inputs = _inputs(denoiser, conditioning, name, row)[_unmasked(conditioning, name, row)]
                add(name, preserving, inputs, inputs)
    edits = [
        _edit(denoiser, name, readers[name], *both, config)
        for name, both in sums.items()
        if readers[name] and both[0].any()
    ]
    if not edits:
        raise ValueError("the text encoders read target and anchor as the same; choose another anchor")
    return tuple(edits)


def _edit(
    denoiser: Denoiser, name: str, layers: Sequence[str], cross: Tensor, gram: Tensor, config: EraseConfig
) -> Edit:
    """The edit of the layers that read one input, from the two sums of the module's docstring."""
    gram.diagonal().add_(config.ridge * gram.trace() / len(gram))
    change = torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T
    # The directions in which the change moves the inputs, those with the largest effect last.
    squares, directions = torch.linalg.eigh(change @ cross.T)
    effects = squares.flip(0).clamp(min=0)
    effects = effects / effects.sum()
    effects[effects < NEGLIGIBLE] = 0
    left_out = effects.flip(0).cumsum(0).flip(0).sqrt()
    left = directions.flip(1)[:, left_out > config.rank_tolerance]
    modules = dict(denoiser.module.named_modules())
    return Edit(name, {layer: _applied(modules[layer], left) for layer in layers}, left.T @ change, effects)


def _applied(layer: nn.Module, left: Tensor) -> Tensor:
    """W @ left, [out, r] float64, of a layer, with its active adapters. A layer that reads more reads this first."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = _exact(dequantize_module_weight(base))
    applied = weight[:, : len(left)] @ left
    if base is not layer:
        own = next(layer.parameters())
        inputs = functional.pad(left.T, (0, weight.shape[1] - len(left))).to(own.device)
        inputs = inputs.to(own.dtype if own.is_floating_point() else torch.float32)
        applied += _exact(layer(inputs) - base(inputs)).T
    return applied


def _thinned(pairs: Sequence[Pair], config: EraseConfig) -> list[Pair]:
    """The concepts with those of their prompts that are read."""
    anchors = 0 if config.preservation_prompts else len({anchor.prompts for _, anchor in pairs})
    most = max(MOST_PROMPTS // (len(pairs) + anchors), 1)
    found = []
    for pair in pairs:
        count = len(pair[0].prompts)
        chosen = spread(count, min(count, most))
        target, anchor = (
            dataclasses.replace(one, prompts=tuple(one.prompts[index] for index in chosen)) for one in pair
        )
        found.append((target, anchor))
    return found


def _aligned(
    denoiser: Denoiser, pairs: Sequence[Pair], found: Sequence[Found] = ()
) -> Iterator[tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """For each pair of prompts: its weight, the target's inputs, and those of the anchor that correspond to them; then
    the same with what was found added to the target's.

    Inputs have the names of ``Denoiser.text_inputs`` and are [n, d] float64.
    """
    every = []
    for concept, (target, anchor) in enumerate(pairs):
        own = [one for one in found if one.concept == concept]
        share = target.weight / len(target.prompts)
        every += [(share, own, *both) for both in zip(target.prompts, anchor.prompts, strict=True)]
    for start in range(0, len(every), ENCODE_BATCH // 2):
        some = every[start : start + ENCODE_BATCH // 2]
        prompts = list(dict.fromkeys(prompt for _, _, *both in some for prompt in both))
        conditioning, tokens = denoiser.encode(prompts), denoiser.tokens(prompts)
        lengths = _lengths(denoiser, conditioning)
        for weight, own, one, other in some:
            rows = prompts.index(one), prompts.index(other)
            places = torch.tensor(alignment([(own[rows[0]], own[rows[1]]) for own in tokens], lengths))
            mine = conditioning[slice(rows[0], rows[0] + 1)]
            for share, read in ((weight, mine), *((weight / len(own), one.moved(mine)) for one in own)):
                before, after = {}, {}
                for name in denoiser.text_inputs:
                    others, seen = _inputs(denoiser, conditioning, name, rows[1]), _unmasked(read, name, 0)
                    before[name] = _inputs(denoiser, read, name, 0)[seen]
                    # A pooled embedding is one input.
                    after[name] = others[places.to(others.device)][seen] if len(others) > 1 else others
                yield share, before, after


@torch.no_grad()
def _inputs(denoiser: Denoiser, conditioning: Conditioning, name: str, row: int) -> Tensor:
    """The inputs of one prompt, [n, d] float64."""
    tensor = _exact(denoiser.read_by_inputs(name, conditioning.tensors[name][row]))
    return tensor[None] if tensor.ndim == 1 else tensor


def _unmasked(conditioning: Conditioning, name: str, row: int) -> Tensor:
    """Which inputs of a prompt no mask hides, [n]."""
    tensor, mask = conditioning.tensors[name], conditioning.mask_of(name)
    if mask is not None:
        return conditioning.tensors[mask][row].to(_exact(tensor[row]).device, torch.bool)
    return torch.ones(1 if tensor.ndim == 2 else tensor.shape[1], dtype=torch.bool)


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has none."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device).double()


def _lengths(denoiser: Denoiser, conditioning: Conditioning) -> list[int]:
    """How many of the embeddings belong to each tokenizer: the last one has what the first leaves."""
    length = conditioning.tensors["embeddings"].shape[1]
    if len(denoiser.tokenizers) == 1:
        return [length]
    first = denoiser.pipeline.tokenizer_max_length
    return [first, length - first]


def alignment(tokens: Sequence[tuple[Sequence[int], Sequence[int]]], lengths: Sequence[int]) -> list[int]:
    """For each place in the embeddings of one prompt, the place in those of another that corresponds to it.

    What the two begin and end with corresponds one to one. Of what is between, the name of a concept, token i
    corresponds to token i, and the last one to the last one. Where the other has nothing there, its next token stands
    in, or else its last one. What follows the prompts corresponds in its order.

    Args:
        tokens: by tokenizer, the tokens of the one prompt and of the other, without padding.
        lengths: by tokenizer, the number of its embeddings, which follow one another.
    """
    places: list[int] = []
    for (one, other), length in zip(tokens, lengths, strict=True):
        shorter = min(len(one), len(other))
        head = next((i for i in range(shorter) if one[i] != other[i]), shorter)
        tail = next((i for i in range(shorter - head) if one[-1 - i] != other[-1 - i]), shorter - head)
        name, others = len(one) - head - tail, len(other) - head - tail
        own = list(range(head))
        own += [head + min(i, others - 1) if i < name - 1 else head + others - 1 for i in range(name if others else 0)]
        own += [max(min(head, len(other) - 1), 0)] * (0 if others else name)
        own += range(len(other) - tail, len(other) + max(length - len(one), 0))
        start = len(places)
        places += [start + min(place, length - 1) for place in own[:length]]
    return places
