"""Every setting of an erasure, in one dataclass: the arguments of ``fdu.erase`` and the options of ``fdu erase``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
TRAIN_METHODS = ("lora", "cross_attention")
MIXED_PRECISIONS = ("no", "fp16", "bf16")


@dataclasses.dataclass(frozen=True)
class EraseConfig:
    """Settings of one erasure. Names shared with diffusers' training examples mean what they mean there."""

    divergence: str = "squared_hellinger"
    """The f-divergence to minimise: any name of `fdu divergences`, with its parameter as in alpha:0.3."""
    sigma: float | Literal["auto"] = "auto"
    """Scale in s = |pred - target|^2 / sigma^2, in units of the denoiser's output; "auto" sets it from s0."""
    s0: float = 1.0
    """With sigma "auto": the median of s at the start. The larger, the more divergences differ; near 0 all are mse."""
    distance: Literal["mean", "sum"] = "mean"
    """The squared distance of a sample: its mean over elements (the paper's code) or its sum (the true divergence)."""

    train_method: Literal["lora", "cross_attention"] = "lora"
    """What is trained: the cross-attention key and value projections, by low-rank adapters on them or themselves."""
    rank: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: float = 16.0
    """Scale of the LoRA update is lora_alpha / rank."""

    max_train_steps: int = 120
    """Optimizer steps."""
    train_batch_size: int = 16
    """Samples that erase, a step. As many again preserve where preservation_weight > 0."""
    gradient_accumulation_steps: int = 1
    """Batches an optimizer step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    adam_beta1: float = 0.9
    """First-moment decay of AdamW."""
    adam_beta2: float = 0.999
    """Second-moment decay of AdamW."""
    adam_weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    adam_epsilon: float = 1e-8
    """Denominator offset of AdamW."""
    max_grad_norm: float = 1.0
    """Norm at which the gradient is clipped."""

    preservation_weight: float = 1.0
    """Weight of keeping the frozen outputs on the preserved prompts; 0 turns preservation off."""
    preservation_prompts: tuple[str, ...] = ()
    """Prompts to keep as they are, beside the empty prompt: the target's neighbours. None given, the anchor's."""

    num_latents: int = 96
    """Latents to train on, sampled beforehand with the target's, the anchor's and the preserved prompts."""
    num_inference_steps: int = 15
    """Denoising steps to sample those latents."""
    guidance_scale: float = 3.0
    """Classifier-free guidance to sample those latents."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast of the training step; trained weights stay fp32."""
    seed: int = 0
    """Seed of everything random. The same seed gives the same weights, bit for bit on the CPU."""

    def __post_init__(self) -> None:
        import fdu_kernels  # here, because it brings torch and the help of the command line should not wait for it

        fdu_kernels.get_divergence(self.divergence)
        if isinstance(self.sigma, str):
            if self.sigma != "auto":
                raise ValueError(f"sigma must be a finite number > 0 or 'auto', got {self.sigma!r}")
        else:
            self._require_number("sigma", self.sigma, above=0)
        self._require_number("s0", self.s0, above=0)
        self._require_choice("distance", self.distance, ("mean", "sum"))
        self._require_choice("train_method", self.train_method, TRAIN_METHODS)
        self._require_choice("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        self._require_choice("mixed_precision", self.mixed_precision, MIXED_PRECISIONS)
        for name in ("rank", "train_batch_size", "gradient_accumulation_steps", "num_inference_steps"):
            self._require_integer(name, getattr(self, name), at_least=1)
        for name in ("max_train_steps", "lr_warmup_steps", "seed"):
            self._require_integer(name, getattr(self, name), at_least=0)
        self._require_integer("num_latents", self.num_latents, at_least=2)
        for name in ("learning_rate", "lora_alpha", "adam_epsilon", "max_grad_norm"):
            self._require_number(name, getattr(self, name), above=0)
        for name in ("preservation_weight", "adam_weight_decay", "guidance_scale"):
            self._require_number(name, getattr(self, name), at_least=0)
        for name in ("adam_beta1", "adam_beta2"):
            self._require_number(name, getattr(self, name), at_least=0)
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)!r}")
        if isinstance(self.preservation_prompts, str):
            raise TypeError("preservation_prompts must be a sequence of prompts, got one string; put it in a list")
        if not all(isinstance(prompt, str) for prompt in self.preservation_prompts):
            raise TypeError("preservation_prompts must hold strings only")

    @staticmethod
    def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

    @staticmethod
    def _require_integer(name: str, value: Any, at_least: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ValueError(f"{name} must be a whole number >= {at_least}, got {value!r}")

    @staticmethod
    def _require_number(name: str, value: Any, at_least: float | None = None, above: float | None = None) -> None:
        bound = f">= {at_least:g}" if at_least is not None else f"> {above:g}"
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not right or (at_least is not None and value < at_least) or (above is not None and value <= above):
            raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; a Divergence becomes its name."""
        values = {name: getattr(self, name) for name in self.field_names()}
        return {**values, "divergence": str(self.divergence), "preservation_prompts": list(self.preservation_prompts)}

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(field.name for field in dataclasses.fields(cls))
