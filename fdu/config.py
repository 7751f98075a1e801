"""Every setting of an erasure, in one dataclass: the arguments of ``fdu.erase`` and the options of ``fdu erase``."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import re
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from fdu_kernels import Divergence

PLACES = ("training_cache", "checkpoint_dir", "resume_from_checkpoint", "tracking_dir")
"""Settings that are paths; records and model cards leave them out."""
FORMER = {"training_cache": "cache_dir", "sampling_guidance": "guidance_scale", "tracking_dir": "logging_dir"}
"""Settings with their former names, which mean something else in diffusers' scripts. Records keep these names, so that
they stay valid."""
RENAMED = {former: name for name, former in FORMER.items()}


@dataclasses.dataclass(frozen=True)
class TrainMethod:
    """A training method, as far as it must be known without importing it."""

    module: str
    """Its file in fdu/training/methods, which defines the function ``make`` that ``attach`` calls."""
    result: Literal["weights", "lora", "dora"] = "weights"
    """Changed weights, or an adapter: low-rank matrices alone (LoRA), or with magnitudes (DoRA)."""
    learning_rate: float = 5e-4
    """The peak learning rate that suits it on fdu's own pipelines."""
    trains_whole_denoiser: bool = False
    reads_text: bool = True
    """Whether it trains the layers of the denoiser that read the text."""
    trains: bool = True
    """Whether there are steps; otherwise the weights are computed."""


TRAIN_METHODS: dict[str, TrainMethod] = {
    "lora": TrainMethod("adapter", result="lora", learning_rate=4e-3),
    "dora": TrainMethod("adapter", result="dora", learning_rate=4e-3),
    "text": TrainMethod("full_weights"),
    "cross_attention": TrainMethod("full_weights"),
    "attention": TrainMethod("full_weights"),
    "full": TrainMethod("full_weights", learning_rate=2e-4, trains_whole_denoiser=True),
    "text_encoder": TrainMethod("full_weights", reads_text=False),
    "token": TrainMethod("token_rows", learning_rate=0.2, reads_text=False),
    "closed_form": TrainMethod("adapter", result="lora", reads_text=False, trains=False),
}
"""The training methods by name. A new method is a file in fdu/training/methods and a line here."""


def trains(train_method: str) -> bool:
    """Whether a training method has steps; one that is unknown here, from a record of others, has."""
    return train_method not in TRAIN_METHODS or TRAIN_METHODS[train_method].trains


WITHOUT_STEPS = (
    *("train_method", "preservation_weight", "preservation_prompts", "resolution", "height", "width", "num_frames"),
    *("seed", "ridge", "rank_tolerance"),
    *("mixed_precision", "training_cache", "checkpoint_dir", "deterministic"),
)
"""The settings that mean something, or do no harm, where nothing is trained."""
SEARCHES = (
    *("adversarial_rounds", "adversarial_steps", "adversarial_conditionings", "adversarial_bound"),
    *("train_batch_size", "num_latents", "num_inference_steps", "sampling_guidance", "sample_batch_size"),
)
"""Those that mean something there too if there are searches."""
if TYPE_CHECKING:
    TrainMethodName = str
    Prompts = Sequence[str]
else:
    TrainMethodName = Literal[tuple(TRAIN_METHODS)]
    Prompts = tuple[str, ...]


SHAPES = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
"""The weighting_scheme that each of its parameters belongs to."""
SNR_GAMMA = 5.0
"""The snr_gamma of weighting min_snr if none is given."""


def updated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version may have written, as today's :meth:`EraseConfig.as_dict` has them."""
    found = {RENAMED.get(name, name): value for name, value in settings.items()}
    idle = "snr_gamma" in found and found.get("weighting") != "min_snr"
    return {**found, "snr_gamma": None} if idle else found


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError if ``value`` is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def closest(name: str, known: Sequence[str]) -> str:
    """The known name that was probably meant, as the end of an error; empty if there is none."""
    if RENAMED.get(name) in known:
        return f"; its name is {RENAMED[name]!r} now"
    folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


Natural = Annotated[int, (">=", 0)]
Count = Annotated[int, (">=", 1)]
NotNegative = Annotated[float, (">=", 0)]
Positive = Annotated[float, (">", 0)]
Share = Annotated[float, (">=", 0), ("<", 1)]
Finite = Annotated[float, (">", -math.inf)]
SIGNS = {">=": operator.ge, ">": operator.gt, "<": operator.lt}


def check_number(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError if ``value`` is not a finite number of an annotated type, within its bounds."""
    kind, *bounds = get_args(hint)
    right = isinstance(value, (int, kind)) and not isinstance(value, bool)
    right = right and (isinstance(value, int) or math.isfinite(value))
    for sign, bound in bounds:
        if not right or not SIGNS[sign](value, bound):
            whole = "whole" if kind is int else "finite"
            raise ValueError(f"{name} must be a {whole} number {sign} {bound}, got {value!r}")


Size = int | tuple[int, int]
"""Pixels of an image: the side of a square, or height and width."""


def image_size(resolution: int | None, height: int | None, width: int | None) -> Size | None:
    """The size that these three settings mean; None for the model's own.

    Raises:
        ValueError: they contradict each other.
    """
    if height is None and width is None:
        return resolution
    if height is None or width is None:
        raise ValueError("height and width go together; give both, or resolution for a square")
    if resolution is not None:
        raise ValueError("resolution is for squares; leave it out beside height and width, or leave these out")
    return height, width


def sides(size: Size | None) -> dict[str, int]:
    """The pixels of a size by the names of the settings that give them."""
    if size is None:
        return {}
    return {"resolution": size} if isinstance(size, int) else {"height": size[0], "width": size[1]}


def check_size(size: Size, unit: int, native: tuple[int, int] | None) -> None:
    """Raise ValueError if a side of a size is not a positive multiple of ``unit``; ``native`` is the model's."""
    for name, side in sides(size).items():
        if side <= 0 or side % unit:
            hint = f"try {max(1, round(side / unit)) * unit}"
            hint += f"; the model's own is {native[0]} x {native[1]}" if native else ""
            raise ValueError(f"{name} must be a positive multiple of {unit} pixels, got {side}; {hint}")


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a class, which take long to evaluate."""
    return get_type_hints(kind, include_extras=True)


@functools.cache
def choices_of(kind: type) -> dict[str, tuple[Any, ...]]:
    """The choices of each field of a class that has some."""
    return {name: get_args(hint) for name, hint in hints_of(kind).items() if get_origin(hint) is Literal}


def in_case(value: Any, choices: Collection[Any]) -> Any:
    """The choice that a text names but for its case, as AdamW in diffusers' scripts; else the value."""
    return next((one for one in choices if isinstance(value, str) and one.casefold() == value.casefold()), value)


def check_fields(settings: Any) -> None:
    """Raise ValueError or TypeError if a field of a dataclass of settings does not fit its annotation."""
    for name, hint in hints_of(settings.__class__).items():
        check_field(name, getattr(settings, name), hint)


def check_field(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError or TypeError if a value does not fit an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = None if value is None else get_args(hint)[0]
    if get_origin(hint) is Literal:
        check_choice(name, value, get_args(hint))
    elif get_origin(hint) is Annotated:
        check_number(name, value, hint)
    elif hint is bool and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """Settings of an erasure. Names shared with diffusers' training examples have the same meaning."""

    train_method: TrainMethodName = "lora"
    """Weights to train: low-rank adapters on the layers that read the prompt (lora, dora), those layers themselves
    (text), its keys and values alone (cross_attention), all attention, the full denoiser, the text encoders, or only
    the target's token embedding.
    closed_form trains nothing: it computes adapters with which the denoiser reads the target's prompts as the
    anchor's."""
    rank: Count = 16
    """Rank of the LoRA matrices, >= 1."""
    lora_alpha: Positive = 16.0
    """Scale of the LoRA update, > 0: the update is multiplied by lora_alpha / rank."""
    adapter_layers: Literal["text", "cross_attention", "attention"] = "text"
    """Layers that get adapters (lora, dora): all that read the prompt (text), its keys and values alone
    (cross_attention), or all of attention. text and cross_attention differ in SDXL, SD3 and FLUX, where the prompt also
    enters by other layers."""
    init: Literal["none", "closed_form"] = "none"
    """Where the training starts: from the model as it is ("none"), or from the edit of closed_form (lora, dora, text,
    cross_attention, attention, full), for lora and dora as far as their rank holds it (`fdu erase` tells the
    rank of the edit). The training's target is the original model either way."""
    ridge: Positive = 0.005
    """closed_form: ridge penalty on the change of the weights, > 0, relative to the mean square of what they read."""
    rank_tolerance: Share = 1e-3
    """closed_form: largest relative error of the edit from leaving out ranks, in [0, 1)."""
    max_train_steps: Natural = 120
    """Optimizer steps at most, >= 0."""
    stop_at: Share = 0.0
    """End the training early: once the median s of the erasing samples is this share of the original model's, in
    [0, 1); 0 takes all steps. Checked every 10 steps; the learning rate then falls to 0 within 10 more."""
    train_batch_size: Count = 16
    """Erasing samples per step per process, >= 1; as many preserving samples are added when preservation_weight > 0."""
    learning_rate: Positive | None = None
    """Peak learning rate, > 0. Default by train_method: 0.004 for lora and dora, 0.2 for token, 0.0002 for full, 0.0005
    for the others."""
    preservation_weight: NotNegative = 4.0
    """Weight of the preservation loss, >= 0; 0 turns preservation off."""
    preservation_prompts: Prompts = ()
    """Prompts to preserve besides the empty prompt, such as the target's neighbours. Default: the anchor's prompts."""
    resolution: Count | None = None
    """Height and width in pixels, a multiple of what the model needs (8 for Stable Diffusion). Default: the model's
    own."""
    height: Count | None = None
    """Height in pixels of images that are not square, together with width and instead of resolution."""
    width: Count | None = None
    """Width in pixels, together with height."""
    num_frames: Count | None = None
    """Frames of a video, >= 1; 1 trains on images. Default: as many as the pipeline draws. Video models only."""
    seed: Natural = 0
    """Random seed, >= 0. The same seed gives the same weights, bit for bit on the CPU; on a GPU add deterministic."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that the same seed, or a resumed run, gives the same weights bit for bit on
    a GPU too. Slower. Has no effect on the CPU."""

    divergence: str = "squared_hellinger"
    """f-divergence to minimise: a name from `fdu divergences`, with a parameter after a colon: alpha:0.3."""
    sigma: float | Literal["auto"] = "auto"
    """Standard deviation in s = |pred - target|^2 / sigma^2, in units of the denoiser's output, > 0. "auto": set from
    s0."""
    s0: Positive = 1.0
    """Median of s with the original model, > 0; used if sigma is "auto". Near 0 all divergences act like mse; larger
    values make them differ more."""
    distance: Literal["mean", "sum"] = "mean"
    """Squared distance of a sample: mean over elements (the paper's code) or sum (the true divergence)."""
    objective: Literal["model", "noise"] = "model"
    """Training target: the frozen denoiser's output for the anchor's prompt ("model"), or the noise in the anchor's
    latents ("noise")."""
    negative_guidance: NotNegative = 0.0
    """Guidance away from the target, beyond the anchor, >= 0; needs objective "model". With anchor "", 1 gives
    ESD's objective."""
    weighting: Literal["unit", "posterior", "min_snr", "p2"] = "unit"
    """Weight of each timestep: equal ("unit", the paper's code), that of the exact DDPM posterior, min-SNR (Hang et al.
    2023) or P2 (Choi et al. 2022)."""
    snr_gamma: Positive | None = None
    """Cap on the signal-to-noise ratio in min_snr, > 0. Default: 5."""
    timestep_sampling: Literal["uniform", "importance", "inference"] = "uniform"
    """Draw timesteps uniformly, or more often where the loss is large ("importance"); importance weights
    keep the expected loss unchanged. "inference" draws only those of num_inference_steps sampling steps, which models
    distilled to few steps need."""
    noisy_latents: Literal["noised", "trajectory"] = "noised"
    """Where x_t comes from: a clean latent with noise added ("noised"), or a step of the guided sampling of the target
    ("trajectory", as in ESD); its timesteps are those of num_inference_steps sampling steps."""
    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    """Flow models only, as in diffusers' training scripts: draw timesteps by the density "logit_normal" or "mode", or
    weigh the loss by "sigma_sqrt" or "cosmap" (Esser et al. 2024). "none" is uniform; the weights are divided by their
    mean."""
    logit_mean: Finite = 0.0
    """Mean of the logit in weighting_scheme "logit_normal", any number; lower means noisier timesteps, as in
    diffusers."""
    logit_std: Positive = 1.0
    """Standard deviation of the logit in "logit_normal", > 0."""
    mode_scale: Finite = 1.29
    """Scale of weighting_scheme "mode", any number."""
    embedded_guidance: NotNegative = 1.0
    """Guidance scale given to a guidance-distilled model (FLUX.1 dev) as an input during training, >= 0."""
    variational: bool = False
    """Estimate the divergence with a critic in a min-max game, as the paper does where there is no closed form, instead
    of computing it exactly between Gaussians."""
    critic_learning_rate: Positive = 1e-4
    """Learning rate of the critic's AdamW, > 0."""
    critic_warmup_steps: Natural = 30
    """Initial steps that train only the critic, >= 0."""

    gradient_accumulation_steps: Count = 1
    """Batches accumulated per optimizer step, >= 1."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    lr_warmup_steps: Natural = 0
    """Steps in which the learning rate rises from 0, >= 0."""
    optimizer: Literal["adamw", "adamw_8bit", "prodigy", "schedule_free"] = "adamw"
    """AdamW from torch, with 8-bit moments (needs bitsandbytes), or schedule-free (needs schedulefree, and a constant
    lr_scheduler); or Prodigy, which finds the learning rate (needs prodigyopt; learning_rate, 1 by default, scales it).
    """
    adam_beta1: Share = 0.9
    """AdamW: decay of the first moment, in [0, 1)."""
    adam_beta2: Share = 0.999
    """AdamW: decay of the second moment, in [0, 1)."""
    adam_weight_decay: NotNegative = 0.0
    """AdamW: decoupled weight decay, >= 0."""
    adam_epsilon: Positive = 1e-8
    """AdamW: term added to the denominator, > 0."""
    max_grad_norm: Positive = 1.0
    """Gradient norm to clip at, > 0."""
    gradient_surgery: bool = False
    """Remove the component of the erasing gradient that opposes the preserving gradient."""
    adversarial_rounds: Natural = 0
    """Robust erasure: rounds of searching for embeddings that still draw the target, and erasing them too, >= 0."""
    adversarial_steps: Count = 60
    """Optimizer steps of a search, >= 1."""
    adversarial_conditionings: Count = 2
    """Searches per round and concept, >= 1; the first begins at the prompts, the others at noise around them."""
    adversarial_bound: Positive = 2.0
    """Largest size (root mean square) of what a search adds to an embedding, > 0, in units of the embeddings' own."""
    adversarial_order: Literal["search_first", "alternate"] = "search_first"
    """Search during a first training, discard it, and erase once with everything found ("search_first", as STEREO), or
    continue one training between the searches ("alternate"; AdvUnlearn searches in every step instead)."""
    num_latents: Annotated[int, (">=", 2)] = 96
    """Training latents, >= 2, sampled in advance for the target's, the anchor's and the preserved prompts. If there are
    more than ten concepts, at least 8 times their number: 6 for each, and a quarter of all for what is preserved. Never
    more than the steps can use."""
    num_inference_steps: Count = 15
    """Denoising steps per sampled latent, >= 1."""
    sampling_guidance: NotNegative = 3.0
    """Guidance scale for sampling latents and validation images (the pipeline's guidance_scale), >= 0."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast dtype of the training step; trained weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the denoiser with torch.compile."""
    shard: bool = False
    """Split the denoiser's frozen weights across processes (FSDP 2) instead of replicating them. Implied by accelerate
    launch --use_fsdp."""
    sample_batch_size: Count = 32
    """Latents sampled at a time, >= 1."""
    frozen_batches: Natural = 0
    """Pre-draw so many batches with their frozen outputs and cycle through them, >= 0; 0 draws a fresh batch each step.
    Uses CPU memory: 4 float32 latents per erasing sample. With training_cache, runs that differ only in trained
    weights or divergence share them."""

    training_cache: str | None = None
    """Folder for encoded prompts, latents and frozen outputs, which later runs on the same model reuse. The hub's
    downloads are where HF_HUB_CACHE says."""
    checkpoint_dir: str | None = None
    """Folder for checkpoints, to resume an interrupted run. Default: none; `fdu erase` uses OUT.checkpoints."""
    checkpointing_steps: Count = 100
    """Steps between checkpoints, >= 1."""
    checkpoints_total_limit: Count = 2
    """Checkpoints to keep, >= 1; older ones are deleted."""
    resume_from_checkpoint: str | None = None
    """Checkpoint to resume from: "latest" in checkpoint_dir (from scratch if there is none), or a checkpoint's
    folder."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Tracker to log the training to."""
    tracking_dir: str = "logs"
    """Folder for the tracker's logs and the validation images."""
    validation_prompts: Prompts = ()
    """Prompts to draw during the training, with fixed seeds."""
    validation_steps: Count = 50
    """Steps between validation images, >= 1."""

    def __post_init__(self) -> None:
        divergence = read_divergence(self.divergence)
        if self.sigma != "auto":
            if isinstance(self.sigma, str):
                raise ValueError(f"sigma must be a finite number > 0 or 'auto', got {self.sigma!r}")
            check_number("sigma", self.sigma, Positive)
        for name, choices in choices_of(EraseConfig).items():
            object.__setattr__(self, name, in_case(getattr(self, name), choices))
        check_fields(self)
        for name in ("preservation_prompts", "validation_prompts"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a sequence of prompts, got one string; put it in a list")
            if not all(isinstance(prompt, str) for prompt in getattr(self, name)):
                raise TypeError(f"{name} must hold strings only")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in PLACES:
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        self._require_sense(divergence)

    def _require_sense(self, divergence: Divergence) -> None:
        """Refuse settings that contradict each other."""
        image_size(self.resolution, self.height, self.width)
        if self.adapter_layers != EraseConfig.adapter_layers and TRAIN_METHODS[self.train_method].result == "weights":
            raise ValueError(
                f"adapter_layers needs train_method 'lora' or 'dora', and train_method is {self.train_method!r}; "
                "leave it out"
            )
        method = TRAIN_METHODS[self.train_method]
        if self.init == "closed_form" and not method.reads_text:
            raise ValueError(
                f"init 'closed_form' needs a train_method that trains the layers that read the prompt, such as 'lora', "
                f"and train_method is {self.train_method!r}; leave init out"
            )
        idle: Collection[str] = () if self.init == "closed_form" else ("ridge", "rank_tolerance")
        if not method.trains:
            idle = {*self.field_names()} - {*WITHOUT_STEPS, *(SEARCHES if self.adversarial_rounds else ())}
        for field in dataclasses.fields(self):
            if field.name in idle and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} has no effect with train_method {self.train_method!r}; leave it out")
        for name, scheme in SHAPES.items():
            if self.weighting_scheme != scheme and getattr(self, name) != getattr(EraseConfig, name):
                raise ValueError(f"{name} needs weighting_scheme {scheme!r}; set that, or leave {name} out")
        if self.snr_gamma is not None and self.weighting != "min_snr":
            raise ValueError("snr_gamma needs weighting 'min_snr'; set that, or leave snr_gamma out")
        if self.weighting_scheme != "none" and (self.weighting, self.timestep_sampling) != ("unit", "uniform"):
            raise ValueError("weighting_scheme takes the place of weighting and timestep_sampling; leave these two out")
        if self.noisy_latents == "trajectory":
            self._require_trajectories()
        if self.objective == "noise" and self.negative_guidance:
            raise ValueError(
                "negative_guidance needs objective 'model'; set objective to 'model', or negative_guidance to 0"
            )
        if self.adversarial_rounds:
            self._require_searches()
        else:
            for field in dataclasses.fields(self):
                if field.name.startswith("adversarial") and getattr(self, field.name) != field.default:
                    raise ValueError(f"{field.name} has no effect without adversarial_rounds; add it")
        if self.stop_at and self.objective == "noise":
            raise ValueError(
                "stop_at needs objective 'model', since the distance from noise does not fall to a small share; "
                "set objective to 'model', or stop_at to 0"
            )
        if self.objective == "noise" and self.frozen_batches and not self.preservation_weight:
            raise ValueError("frozen_batches has no effect with objective 'noise' and no preservation; leave it out")
        if self.variational and divergence.name == "mse":
            raise ValueError("divergence 'mse' has no generator f, hence no critic; choose 'kl' with variational")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                "lr_warmup_steps needs lr_scheduler 'constant_with_warmup', 'linear' or 'cosine'; choose one of them, "
                "or set lr_warmup_steps to 0"
            )
        if self.optimizer == "schedule_free" and not self.lr_scheduler.startswith("constant"):
            raise ValueError(
                "optimizer 'schedule_free' needs lr_scheduler 'constant' or 'constant_with_warmup', and it is "
                f"{self.lr_scheduler!r}"
            )
        if self.gradient_surgery and not self.preservation_weight:
            raise ValueError("gradient_surgery needs preservation; set preservation_weight above 0")
        if self.frozen_batches and self.timestep_sampling == "importance":
            raise ValueError("frozen_batches fixes the timesteps; use timestep_sampling 'uniform' with it")
        if self.resume_from_checkpoint is not None and self.checkpoint_dir is None:
            raise ValueError("resume_from_checkpoint needs checkpoint_dir for further checkpoints; add it")

    def _require_trajectories(self) -> None:
        """Refuse settings that do not go with noisy_latents "trajectory"."""
        if self.objective == "noise":
            raise ValueError("noisy_latents 'trajectory' needs objective 'model': nobody knows the noise in its steps")
        if self.timestep_sampling == "importance" or self.weighting_scheme in SHAPES.values():
            raise ValueError(
                "noisy_latents 'trajectory' fixes the timesteps; leave timestep_sampling 'importance' and a "
                "weighting_scheme that draws timesteps out"
            )

    def _require_searches(self) -> None:
        """Refuse settings that do not go with adversarial_rounds."""
        if self.objective == "noise":
            raise ValueError("adversarial_rounds needs objective 'model'; set objective to 'model'")
        if self.shard:
            raise ValueError("adversarial_rounds does not work with shard; leave one of them out")
        if self.stop_at and self.adversarial_order == "alternate":
            raise ValueError(
                "stop_at may end the training before the searches; leave it out, or set adversarial_order to "
                "'search_first'"
            )
        if self.frozen_batches and self.adversarial_order == "alternate":
            raise ValueError(
                "frozen_batches fixes the batches before the searches; leave it out, or set adversarial_order to "
                "'search_first'"
            )
        method = TRAIN_METHODS[self.train_method]
        if method.trains and self.max_train_steps < 2 * self.adversarial_rounds:
            raise ValueError(
                f"adversarial_rounds {self.adversarial_rounds} needs at least {2 * self.adversarial_rounds} steps, and "
                f"max_train_steps is {self.max_train_steps}; raise it, or lower adversarial_rounds"
            )

    def as_dict(self) -> dict[str, Any]:
        """As a dict for JSON; a Divergence becomes its name, and what other settings decide the value that counts."""
        values = {name: getattr(self, name) for name in self.field_names()}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        decided: dict[str, Any] = {"learning_rate": self.peak_learning_rate}
        if self.weighting == "min_snr":
            decided["snr_gamma"] = self.snr_gamma or SNR_GAMMA
        return {**values, **lists, "divergence": str(self.divergence), **decided}

    def recorded(self) -> dict[str, Any]:
        """As :meth:`as_dict`, without places and in the form that records have."""
        found = {FORMER.get(name, name): value for name, value in self.as_dict().items() if name not in PLACES}
        return {**found, "snr_gamma": self.snr_gamma or SNR_GAMMA}

    @property
    def peak_learning_rate(self) -> float | None:
        """The learning rate, or else that of the training method; None where nothing is trained."""
        method = TRAIN_METHODS[self.train_method]
        default = (1.0 if self.optimizer == "prodigy" else method.learning_rate) if method.trains else None
        return default if self.learning_rate is None else self.learning_rate

    @property
    def size(self) -> Size | None:
        """The size of the images; None for the model's own."""
        return image_size(self.resolution, self.height, self.width)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> EraseConfig:
        """The settings with these values, and defaults for the rest.

        Raises:
            TypeError: an unknown setting.
        """
        unknown = sorted(set(settings) - set(cls.field_names()))
        if unknown:
            names = cls.field_names()
            hint = closest(unknown[0], names) or f"; the settings are {', '.join(names)}"
            raise TypeError(f"unknown setting {unknown[0]!r}{hint}")
        return cls(**settings)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(field.name for field in dataclasses.fields(cls))


def read_divergence(name: str) -> Divergence:
    """The divergence of this name, with a colon before its parameter: "alpha:0.3".

    Raises:
        ValueError: unknown; names the closest, also for "alpha=0.3".
        TypeError: a parameter for a divergence without one.
    """
    import fdu_kernels  # not at the top: it imports torch, and --help should not wait for that

    try:
        return fdu_kernels.get_divergence(name)
    except ValueError as error:
        spelling = r"\s*([a-z_]+)(?![a-z_])[\s:=(]*(?:[a-z]+\s*=)?\s*([-+\d.e]*\d[.]?)\)?\s*"
        parts = re.fullmatch(spelling, str(name).lower())
        if parts is None:
            raise
        meant = ":".join(parts.groups())
        try:
            fdu_kernels.get_divergence(meant)
        except (ValueError, TypeError):
            raise error from None
        raise ValueError(f"unknown divergence {name!r}; did you mean {meant}?") from None
