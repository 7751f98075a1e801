"""A perturbation of the prompt's embeddings: one for all prompts, on a few of their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fdu.models.denoiser import Conditioning, Denoiser
from fdu.training.methods.trainable import Trainable, put_on_top


class Perturbation(Trainable):
    """An additive perturbation of the conditioning, the same for every prompt.

    It moves the first ``tokens`` embeddings of a prompt and, in families that have one, its pooled embedding. The
    moves are fp32 in units of the root mean square of what they are added to, so that a learning rate means the same
    for every text encoder. Weights stay as they are. During training, only prompts encoded through the denoiser are
    perturbed, not those that the pipeline encodes itself.
    """

    trains_text = True

    def __init__(
        self,
        denoiser: Denoiser,
        prompt: str,
        tokens: int,
        start: float = 0.0,
        generator: torch.Generator | None = None,
        bound: float = math.inf,
    ) -> None:
        """The moves begin as normal noise.

        Args:
            denoiser: whose prompts are perturbed.
            prompt: sets the unit.
            tokens: how many embeddings are moved.
            start: standard deviation of the noise, in the unit.
            generator: draws the noise.
            bound: the largest root mean square of the move of an embedding, in the unit.

        Raises:
            ValueError: more tokens than the conditioning has.
        """
        read = {
            name: tensor for name, tensor in denoiser.encode([prompt]).tensors.items() if tensor.is_floating_point()
        }
        length = read["embeddings"].shape[1]
        if not 1 <= tokens <= length:
            raise ValueError(f"tokens must be from 1 to {length}, the tokens that this denoiser reads, got {tokens}")
        super().__init__(denoiser.pipeline)
        self.denoiser, self.tokens, self.bound, self.on = denoiser, tokens, bound, True
        self.units = {name: float(tensor.float().square().mean().sqrt()) for name, tensor in read.items()}
        self.moves = {}
        for name, tensor in read.items():
            shape = (tokens, tensor.shape[2]) if tensor.ndim == 3 else tensor.shape[1:]
            begin = start * torch.randn(shape, generator=generator)
            self.moves[name] = nn.Parameter(begin.to(tensor.device, torch.float32))
        self._encode = denoiser.encode_batch
        vars(denoiser)["encode_batch"] = self._encode_moved
        put_on_top(self)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.moves)

    @property
    def size(self) -> float:
        """The root mean square of the moves, in their unit."""
        values = torch.cat([moves.detach().flatten() for moves in self.moves.values()])
        return float(values.square().mean().sqrt())

    def addends(self) -> dict[str, Tensor]:
        """The moves as they are added, by the name of the tensor of a conditioning: [tokens, d] or [d]."""
        return {name: self._bounded(name).detach().clone() for name in self.moves}

    def _bounded(self, name: str) -> Tensor:
        """The moves in the unit of the embeddings; one that is too long is shortened to the bound."""
        moves: Tensor = self.moves[name]
        if self.bound < math.inf:
            size = moves.detach().square().mean(-1, keepdim=True).sqrt()
            moves = moves * (self.bound / size.clamp(min=self.bound))
        return moves * self.units[name]

    def _encode_moved(self, prompts: list[str]) -> Conditioning:
        conditioning = self._encode(prompts)
        if not self.on:
            return conditioning
        return Conditioning({name: self._moved(name, tensor) for name, tensor in conditioning.tensors.items()})

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.moves:
            return tensor
        moves = self._bounded(name).to(tensor.dtype)
        if tensor.ndim == 2:
            return tensor + moves
        moves = moves[: tensor.shape[1]]
        return torch.cat([tensor[:, : self.tokens] + moves, tensor[:, self.tokens :]], dim=1)

    @contextmanager
    def _off(self) -> Iterator[None]:
        on, self.on = self.on, False
        try:
            yield
        finally:
            self.on = on

    def _settle(self) -> None:
        for moves in self.moves.values():
            moves.requires_grad_(False)
            moves.grad = None

    def _undo(self) -> None:
        vars(self.denoiser).pop("encode_batch", None)
