"""The interface of a denoiser: encode prompts, sample and noise latents, predict; one subclass per family.

The loop talks to this interface only, so it never asks which model family it is training.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from fdu.config import Size, check_size
from fdu.models import parts
from fdu.models.kohya_names import KohyaNames

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
ENCODE_BATCH = 64
"""Prompts encoded at a time where no gradient is asked for."""
PIPELINE_ARGUMENTS = {
    "embeddings": "prompt_embeds",
    "pooled": "pooled_prompt_embeds",
    "mask": "prompt_attention_mask",
}
"""Names of the tensors of a conditioning as arguments of diffusers' pipelines."""
FEW_STEP_SCHEDULERS = ("LCM", "TCD", "FlowMatchLCM")
"""How the names of schedulers begin that only serve models distilled to few steps."""
FEW_STEP_WORDS = ("turbo", "lightning", "schnell", "lcm", "tcd", "dmd", "hyper", "flash", "sprint")
"""Words in the names of models and adapters distilled to few steps."""
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
"""A word of a name such as "DreamShaperXL_Lightning"."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The linear layers of attention of an image, and of an image and a text together."""


class Conditioning:
    """Inputs of a denoiser besides x_t and t, for N prompts: tensors [N, ...] by name, as a rule of PIPELINE_ARGUMENTS.

    Prompts may differ in length: behind their own, embeddings [N, L, ...] are padded with zeros, and so are ids
    [N, L, ...], whose names end in "ids", and masks [N, L], integer tensors whose names end in "mask". "a_mask" tells
    the length of "a" and "a_ids", and "mask" that of all that have none of their own.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, chosen: Tensor | slice) -> Conditioning:
        """The prompts at indices [M] or in a slice."""
        return Conditioning({name: tensor[chosen] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Conditioning:
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The prompts of all parts, in order."""
        names = parts[0].tensors
        return Conditioning({name: torch.cat(padded([part.tensors[name] for part in parts])) for name in names})

    def mask_of(self, name: str) -> str | None:
        """The name of the mask that tells the length of a tensor; None without one, as of a pooled embedding [N, d]."""
        if name.endswith("mask"):
            return name
        if self.tensors[name].ndim == 2 and not name.endswith("ids"):
            return None
        own = f"{name.removesuffix('_ids')}_mask"
        return next((mask for mask in (own, "mask") if mask in self.tensors), None)

    def by_length(self) -> list[tuple[Tensor, Conditioning]]:
        """The prompts of each length by themselves, without padding: their indices [M] and their conditioning."""
        masks = [name for name in self.tensors if name.endswith("mask")]
        lengths = torch.stack([self.tensors[name].sum(1) for name in masks], 1)
        groups = []
        for own in lengths.unique(dim=0).tolist():
            rows = (lengths == lengths.new_tensor(own)).all(1).nonzero()[:, 0]
            ends = dict(zip(masks, own, strict=True))
            cut = {name: tensor[:, : ends.get(self.mask_of(name) or "")] for name, tensor in self[rows].tensors.items()}
            groups.append((rows, Conditioning(cut)))
        return groups


def padded(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors [N, L, ...] with zeros behind them up to the largest L."""
    if tensors[0].ndim == 1:
        return tensors
    longest = max(tensor.shape[1] for tensor in tensors)
    return [F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1])) for tensor in tensors]


@dataclasses.dataclass
class Trajectories:
    """What a sampler passes on its way from noise to N latents; :meth:`Denoiser.draw_latents` fills it in."""

    keeps_noisy: bool
    """Whether x_t is kept, too."""
    indices: list[int] = dataclasses.field(default_factory=list)
    """The indices of its S steps on the grid of the training, the nearest ones."""
    noisy: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    """x_t at every step, fp32 [N, S, C, H, W] on the CPU; empty if it is not kept."""


class Denoiser(ABC):
    """The denoiser behind a pipeline, on a grid of T training timesteps, noisiest last.

    x_t = signal[i] x_0 + noise[i] epsilon at index i of the grid, for every family: sqrt(abar) and sqrt(1 - abar) in
    diffusion, 1 - sigma and sigma in rectified flow.
    """

    family: ClassVar[str]
    """The name that users know."""
    module_name: ClassVar[Literal["unet", "transformer"]] = "transformer"
    """The pipeline's attribute that holds the module."""
    module_class: ClassVar[type[nn.Module]]
    parts: ClassVar[tuple[str, ...]] = ("scheduler", "vae", "tokenizer", "text_encoder")
    """Parts that a pipeline must have besides the module."""
    packing: ClassVar[int] = 1
    """Latent pixels per side that the module takes together as channels of one."""
    encodes_videos: ClassVar[bool] = False
    """Whether the autoencoder takes videos [N, C, T, H, W]; an image is one of a single frame."""
    draws_videos: ClassVar[bool] = False
    """Whether the pipeline draws videos; latents are then [N, C, T, H, W] wherever it says [N, C, H, W] here."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """The argument of the pipeline's call that is the scale of guidance by two predictions."""
    unguided_scale: ClassVar[float] = 1.0
    """The scale up to which the pipeline makes one prediction."""
    guides_in_turn: ClassVar[bool] = False
    """Whether the pipeline makes the two predictions of guidance one after the other, not in one batch."""
    asks_for_negative: ClassVar[bool] = False
    """Whether the pipeline guides only if it is told what to lead away from."""
    optional_images: ClassVar[tuple[str, ...]] = ()
    """Arguments of the text-to-image pipeline's call by which it also takes images."""
    context_projections: ClassVar[tuple[str, ...]] = ("attn2.to_k", "attn2.to_v")
    """Name endings of the linear layers of the module that read the prompt's tokens: as a rule keys and values."""
    other_readers: ClassVar[tuple[str, ...]] = ()
    """Name endings of the linear layers by which the prompt enters past these."""
    attention_projections: ClassVar[tuple[str, ...]] = ATTENTION
    """Name endings of all linear layers of attention."""
    text_inputs: ClassVar[dict[str, tuple[str, ...]]] = {"embeddings": ("attn2.to_k", "attn2.to_v")}
    """By tensor of the conditioning, the name endings of the linear layers of the module that read it first."""
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    """The tokenizers whose tokens the embeddings stand for, in their order."""
    kohya: ClassVar[KohyaNames | None] = None
    """How kohya's sd-scripts name the layers; None if they do not know the family."""

    @classmethod
    def layer_groups(cls) -> dict[str, tuple[str, ...]]:
        """Name endings of the layers that a training may choose, by the name of the choice: everything that reads the
        prompt, the context projections alone, or all of attention."""
        return {
            "text": (*cls.context_projections, *cls.other_readers),
            "cross_attention": cls.context_projections,
            "attention": cls.attention_projections,
        }

    embedded_guidance: float = 1.0
    """The guidance scale told to a guidance-distilled module."""

    @property
    def reads_guidance(self) -> bool:
        """Whether the module is guidance-distilled: it reads a guidance scale."""
        return False

    @property
    def guided_by_empty(self) -> bool:
        """Whether guidance is by a second prediction, for the prompt ""."""
        return True

    @property
    def few_steps(self) -> str | None:
        """What shows that the model is distilled to few steps, at whose timesteps alone it can be trained; None if
        nothing does."""
        scheduler = type(self.pipeline.scheduler).__name__
        if scheduler.startswith(FEW_STEP_SCHEDULERS):
            return f"its scheduler is a {scheduler}"
        place = Path(self.pipeline.config.get("_name_or_path") or "")
        *_, name = [place.name, *(part for part in place.parts if part.startswith("models--"))]  # the hub's cache
        if _says_few_steps(name):
            return f"its name is {name!r}"
        adapters = filter(_says_few_steps, parts.active_adapters(self.pipeline))
        return next((f"its adapter {adapter!r} is active" for adapter in adapters), None)

    signal: Tensor
    """The factor of x_0 in x_t at every timestep, [T] float32."""
    noise: Tensor
    """The factor of epsilon in x_t at every timestep, [T] float32."""
    prediction_type: PredictionType
    """The kind of the module's output."""

    def __init__(
        self, pipeline: DiffusionPipeline, resolution: Size | None = None, num_frames: int | None = None
    ) -> None:
        """A denoiser for images of ``resolution`` pixels per side, or of (height, width), by default of the model's
        native size, or for videos of ``num_frames`` frames, by default as many as the pipeline draws.

        Raises:
            ValueError: the pipeline lacks a part, or takes more than prompts; or resolution or num_frames does not suit
                the model.
        """
        self.check(pipeline)
        self.pipeline = pipeline
        self.module: nn.Module = getattr(pipeline, self.module_name)
        """The network; the training may put a wrapper of it here."""
        self.config: Any = self.module.config
        self.dtype: torch.dtype = self.module.dtype
        """The module's dtype when it was loaded; trained weights in it may have another."""
        self.height, self.width = self._image_size(resolution)
        """Pixels of an image."""
        self.frames = self._frame_count(num_frames)
        """Frames of a video; 1 for an image."""

    @classmethod
    def owns(cls, module: Any) -> bool:
        """Whether a pipeline's denoiser is of this family."""
        return isinstance(module, cls.module_class)

    @classmethod
    def fits(cls, pipeline: DiffusionPipeline) -> bool:
        """Whether the pipeline is of this family, and draws from prompts."""
        module = getattr(pipeline, cls.module_name, None)
        return cls.owns(module) and hasattr(pipeline, "encode_prompt") and callable(pipeline)

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        """Refuse a pipeline of this family that cannot be trained.

        Raises:
            ValueError: it lacks a part, takes images as input, or is being offloaded.
        """
        name = type(pipeline).__name__
        missing = [part for part in cls.parts if getattr(pipeline, part, None) is None]
        if missing:
            raise ValueError(f"pipeline, a {name}, has no {' and no '.join(missing)}; load it with all of them")
        inputs = inspect.signature(type(pipeline).__call__).parameters
        images = [given for given in ("image", "mask_image", "control_image", "video") if given in inputs]
        images = [given for given in images if given not in cls.optional_images]
        config = pipeline.vae.config
        channels = (config.get("latent_channels") or config.get("z_dim")) * cls.packing**2
        taken = getattr(pipeline, cls.module_name).config.in_channels
        if images or taken != channels:
            reason = f"takes {images[0]}" if images else f"feeds its {cls.module_name} {taken} channels, not {channels}"
            raise ValueError(
                f"pipeline is a {name}, which {reason}; editing, inpainting and ControlNet pipelines cannot be "
                "trained; load the model with AutoPipelineForText2Image"
            )
        mapped = isinstance(getattr(pipeline, "hf_device_map", None), dict)
        if mapped or any(_moves_weights(part) for part in pipeline.components.values()):
            call = "reset_device_map" if mapped else "remove_all_hooks"
            raise ValueError(
                "pipeline moves its models between devices itself; before the training, call "
                f"pipeline.{call}() and pipeline.to(device), or, where it does not fit there, load it by "
                "fdu.load_pipeline with quantization or offload"
            )
        if any(_offloads_groups(part) for part in pipeline.components.values()):
            raise ValueError(
                "pipeline has group offloading, which no gradient passes; load it again without, or by "
                "fdu.load_pipeline(..., offload=True)"
            )

    @abstractmethod
    def encode_batch(self, prompts: list[str]) -> Conditioning:
        """The conditioning of prompts, where the text encoders are; differentiable in them."""

    @abstractmethod
    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output [N, C, H, W] for x_t [N, C, H, W] at indices [N] of the grid."""

    def read_by_inputs(self, name: str, tensor: Tensor) -> Tensor:
        """What the layers of :attr:`text_inputs` read of a tensor [..., d] of a conditioning: as a rule the tensor."""
        return tensor

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def text_device(self) -> torch.device:
        """Where the text encoders are, and read prompts; it may be the CPU while the denoiser is elsewhere."""
        device: torch.device = self.pipeline.text_encoder.device
        return device

    @property
    def pixels_per_latent(self) -> int:
        """Pixels per side of a latent pixel."""
        scale: int = self.pipeline.vae_scale_factor
        return scale

    @property
    def native_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that the model was made for; None if it does not say."""
        size, scale = self.config.sample_size, self.pixels_per_latent
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return height * scale, width * scale

    @property
    def size_unit(self) -> int:
        """Pixels that height and width must be multiples of."""
        return self.pixels_per_latent * self.packing

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, H, W] of a latent; of a video's [C, T, H, W]."""
        scale = self.pixels_per_latent
        return self.config.in_channels // self.packing**2, self.height // scale, self.width // scale

    @property
    def call_settings(self) -> dict[str, Any]:
        """Arguments of every call of the pipeline."""
        return {}

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The pipeline's text encoders by attribute."""
        return {name: model for name, model in parts.models(self.pipeline).items() if name != self.module_name}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of any number of prompts, a constant, on the device and in the type of the module."""
        starts = range(0, len(prompts), ENCODE_BATCH)
        batches = [self.encode_batch(list(prompts[start : start + ENCODE_BATCH])) for start in starts]
        tensors = Conditioning.cat(batches).tensors
        return Conditioning(
            {name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        ).to(self.device)

    def tokens(self, prompts: Sequence[str]) -> list[list[Sequence[int]]]:
        """The tokens of prompts, without padding: by the tokenizer, and within it by the prompt. None of an absent one.

        Token i of a tokenizer stands for embedding i of that tokenizer's share of the embeddings.
        """
        converted = getattr(self.pipeline, "maybe_convert_prompt", lambda prompts, tokenizer: prompts)
        found: list[list[Sequence[int]]] = []
        for name in self.tokenizers:
            tokenizer = getattr(self.pipeline, name, None)
            absent: list[Sequence[int]] = [()] * len(prompts)
            found.append(tokenizer(converted(list(prompts), tokenizer))["input_ids"] if tokenizer else absent)
        return found

    @torch.no_grad()
    def draw_latents(
        self,
        conditioning: Conditioning,
        chosen: Sequence[int],
        empty: int,
        steps: int,
        guidance_scale: float,
        seeds: Sequence[int],
        batch_size: int,
        progress: bool = True,
        trajectories: Trajectories | None = None,
    ) -> Tensor:
        """Sample clean latents, fp32 [N, C, H, W]; each depends only on its prompt and its seed.

        Args:
            conditioning: the encoding of any prompts.
            chosen: the indices of N of these prompts.
            empty: the index of the prompt "", which guidance leads away from.
            steps, guidance_scale: number of steps and guidance scale for the pipeline's own sampler.
            seeds: one seed for each of the N latents.
            batch_size: latents sampled at a time.
            progress: whether to show a progress bar.
            trajectories: gets what the sampler passes on its way; None if nobody wants it.
        """
        batches, passed = [], []
        with silent(self.pipeline), self._module_alone():
            starts = range(0, len(chosen), batch_size)
            for start in tqdm(starts, desc="latents", unit="batch", disable=not progress):
                some = chosen[start : start + batch_size]
                prompts = torch.tensor(some, device=self.device)
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
                places, latents = [], []
                noisy: list[Tensor] = []
                for rows in self.together(conditioning[prompts]):
                    given = conditioning[torch.cat([prompts[rows], torch.full_like(rows, empty)])]
                    own = [generators[row] for row in rows.tolist()]
                    with self._noted(trajectories, noisy, len(rows)):
                        # Half precision would round the noise away at the first timesteps.
                        latents.append(self.sample(given, steps, guidance_scale, own).float())
                    places.append(rows)
                order = torch.cat(places).argsort()
                batches.append(torch.cat(latents)[order])
                if noisy:
                    passed.append(torch.cat(noisy)[order.cpu()])
        if trajectories is not None and passed:
            trajectories.noisy = torch.cat(passed)
        return torch.cat(batches)

    @contextmanager
    def _noted(self, trajectories: Trajectories | None, noisy: list[Tensor], count: int) -> Iterator[None]:
        """Within this context, note the steps of a sampler in ``trajectories``, and append x_t of ``count`` samples at
        all of them, [count, S, C, H, W], to ``noisy`` if it is to be kept."""
        if trajectories is None:
            yield
            return
        calls: dict[float, Tensor | None] = {}

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            packed, timestep = self.given(args, kwargs)
            told = float(timestep.flatten()[0])
            if told not in calls:  # guidance calls twice at a timestep, or once with every x_t twice
                calls[told] = self.unpacked(packed)[:count].float().cpu() if trajectories.keeps_noisy else None

        hook = getattr(self.pipeline, self.module_name).register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
        trajectories.indices = [self.index_of(told) for told in calls]
        if trajectories.keeps_noisy:
            noisy.append(torch.stack([one for one in calls.values() if one is not None], 1))

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """x_t as the pipeline packs it, [N, ...], and the timesteps, in the arguments of a call of the module."""
        noisy = args[0] if args else kwargs["hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        return noisy, torch.as_tensor(timestep)

    @abstractmethod
    def index_of(self, told: float) -> int:
        """The index on the grid that is nearest to a timestep that the module is told."""

    def together(self, conditioning: Conditioning) -> list[Tensor]:
        """The indices of the prompts of each call of the pipeline, where one call cannot draw them all."""
        return [torch.arange(len(conditioning), device=self.device)]

    def sample(
        self, conditioning: Conditioning, steps: int, guidance_scale: float, generators: list[torch.Generator]
    ) -> Tensor:
        """Clean latents [N, C, H, W] of one batch, by the pipeline's own sampler, without decoding them.

        ``conditioning`` is that of N prompts, and N times of "".
        """
        count = len(generators)
        given = self.call_arguments(conditioning[:count])
        if self.guided_by_empty and guidance_scale > self.unguided_scale:
            given |= self.negative_arguments(conditioning[count:])
        if "negative_prompt" in inspect.signature(type(self.pipeline).__call__).parameters:
            given["negative_prompt"] = None  # which is not the default of all
        latents = self.pipeline(
            **given,
            num_inference_steps=steps,
            **{self.guidance_argument: guidance_scale},
            generator=generators,
            output_type="latent",
        )[0]
        return self.unpacked(latents)

    def prompt_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """Arguments of the pipeline's call that stand for the prompts of a conditioning."""
        return {PIPELINE_ARGUMENTS[name]: tensor for name, tensor in conditioning.tensors.items()}

    def negative_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """Arguments of the pipeline's call by which guidance leads away from the prompts of a conditioning."""
        return {f"negative_{name}": value for name, value in self.prompt_arguments(conditioning).items()}

    def call_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """Arguments of the pipeline's call that draw one image of the denoiser's size per prompt of a conditioning."""
        given = self.prompt_arguments(conditioning)
        return {**given, "height": self.height, "width": self.width, **self.call_settings}

    def unpacked(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] as the pipeline returns them."""
        return latents

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Clean latents, fp32 [N, C, H, W], of images [N, 3, height, width] in [0, 1]; a KL autoencoder samples them.

        In a video the image stands still.

        Raises:
            TypeError: images are not a floating-point tensor.
            ValueError: images are not [N, 3, H, W], or not in [0, 1].
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor in [0, 1], got {kind}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [N, 3, H, W], got {list(images.shape)}")
        if images.min() < 0 or images.max() > 1:
            raise ValueError(f"images must be in [0, 1], got [{images.min():.3g}, {images.max():.3g}]")
        vae = self.pipeline.vae
        dtype, config = vae.dtype, vae.config
        overflows = dtype == torch.float16 and config.get("force_upcast", False)
        if overflows:
            vae.to(torch.float32)
        try:
            given = (2 * images - 1).to(vae.device, vae.dtype)
            if self.encodes_videos:
                given = given[:, :, None].expand(-1, -1, self.frames, -1, -1)
            encoded = vae.encode(given)
            latents = (encoded.latent_dist.sample(generator) if "latent_dist" in encoded else encoded[0]).float()
            latents = latents[:, :, 0] if self.encodes_videos and not self.draws_videos else latents
        finally:
            if overflows:
                vae.to(dtype)
        return self.standardised(latents)

    def standardised(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser knows them, of latents [N, C, H, W] as the autoencoder makes them."""
        config = self.pipeline.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
        mean, deviation = self._channel_statistics(latents)
        return (latents - mean) * config.get("scaling_factor", 1.0) / deviation

    def raw(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder knows them; undoes :meth:`standardised`."""
        config = self.pipeline.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        mean, deviation = self._channel_statistics(latents)
        return latents * deviation / config.get("scaling_factor", 1.0) + mean

    def _channel_statistics(self, like: Tensor) -> Iterator[Tensor]:
        """Mean and standard deviation of each channel of the autoencoder's latents, shaped to combine with ``like``."""
        config = self.pipeline.vae.config
        shape = (-1, *[1] * (like.ndim - 2))
        return (like.new_tensor(config[name]).view(shape) for name in ("latents_mean", "latents_std"))

    @contextmanager
    def _module_alone(self) -> Iterator[None]:
        """Within this context the pipeline has no part with weights but the denoiser.

        It needs none where prompts come encoded and latents are wanted, and takes the device of the first that it has,
        which may be away.
        """
        others = {
            name: part
            for name, part in self.pipeline.components.items()
            if isinstance(part, nn.Module) and name != self.module_name
        }
        # Not by setattr, at which the pipeline would forget the parts' classes.
        vars(self.pipeline).update({name: self.stand_in(name) for name in others})
        try:
            yield
        finally:
            vars(self.pipeline).update(others)

    def stand_in(self, name: str) -> Any:
        """What the pipeline has for a part while it samples latents, as a rule nothing."""
        return None

    @contextmanager
    def others_on(self, wanted: torch.device | str, keep: Collection[str] = ()) -> Iterator[None]:
        """Within this context all parts of the pipeline but the denoiser and ``keep`` are on the wanted device."""
        others = [
            (part, next(part.parameters()).device)
            for name, part in self.pipeline.components.items()
            if isinstance(part, nn.Module) and name != self.module_name and name not in keep
            if not getattr(part, "is_loaded_in_8bit", False)  # which transformers keeps where it is
        ]
        try:
            for part, _ in others:
                part.to(wanted)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what the parts held can now go to other processes, and to larger blocks
            yield
        finally:
            for part, device in others:
                part.to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """x_t [N, C, H, W] from clean latents, noise epsilon and indices [N]."""
        signal, level = self._at(indices, latents)
        return signal * latents + level * noise

    def true_output(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """The output [N, C, H, W] of a denoiser that knows x_0 and epsilon."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        if self.prediction_type == "flow":
            return noise - latents
        signal, level = self._at(indices, latents)
        return signal * noise - level * latents

    def parted(self, output: Tensor, noisy: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise in x_t that an output stands for, each [N, C, H, W]; the inverse of
        :meth:`true_output`."""
        signal, level = self._at(indices, noisy)
        if self.prediction_type == "epsilon":
            return (noisy - level * output) / signal, output
        if self.prediction_type == "sample":
            return output, (noisy - signal * output) / level
        if self.prediction_type == "flow":
            return noisy - level * output, noisy + signal * output
        return signal * noisy - level * output, level * noisy + signal * output

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [N, 3, height, width] in [0, 1] of clean latents, or the middle frames of videos; undoes
        :meth:`encode_images`."""
        vae = self.pipeline.vae
        dtype, config = vae.dtype, vae.config
        latents = self.raw(latents)
        overflows = dtype == torch.float16 and config.get("force_upcast", False)
        if overflows:
            vae.to(torch.float32)
        try:
            given = latents.to(vae.device, vae.dtype)
            given = given[:, :, None] if self.encodes_videos and not self.draws_videos else given
            decoded = vae.decode(given, return_dict=False)[0]
            decoded = decoded[:, :, decoded.shape[2] // 2] if self.encodes_videos else decoded
        finally:
            if overflows:
                vae.to(dtype)
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def _image_size(self, resolution: Size | None) -> tuple[int, int]:
        """Height and width in pixels."""
        if resolution is None:
            if self.native_size is None:
                raise ValueError(f"{self.module_name} has no sample_size; give resolution in pixels")
            return self.native_size
        check_size(resolution, self.size_unit, self.native_size)
        return (resolution, resolution) if isinstance(resolution, int) else resolution

    def _frame_count(self, num_frames: int | None) -> int:
        """Frames of a video."""
        if num_frames is not None:
            raise ValueError(f"num_frames is for models that draw videos, and {self.family} draws images; leave it out")
        return 1

    def _at(self, indices: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal and noise of indices [N], shaped to multiply ``like`` [N, ...]."""
        shape = (-1, *[1] * (like.ndim - 1))
        self.signal, self.noise = self.signal.to(like.device), self.noise.to(like.device)
        return self.signal[indices].view(shape).to(like.dtype), self.noise[indices].view(shape).to(like.dtype)


def _says_few_steps(name: str) -> bool:
    """Whether the name of a model or an adapter says that it is distilled to few steps; of one undone, it says "de"."""
    words = [word.lower() for word in WORD.findall(name)]
    return any(word in FEW_STEP_WORDS and before != "de" for before, word in zip(["", *words], words, strict=False))


def _moves_weights(part: Any) -> bool:
    """Whether hooks of accelerate move a part's weights, or it is spread over devices. Other hooks, such as those that
    move inputs to a quantized model, do no harm."""
    modules = part.modules() if isinstance(part, nn.Module) else ()
    found = [vars(module)["_hf_hook"] for module in modules if "_hf_hook" in vars(module)]
    hooks = [one for hook in found for one in getattr(hook, "hooks", [hook])]
    spread = len(set((getattr(part, "hf_device_map", None) or {}).values())) > 1
    return spread or any(not isinstance(hook, AlignDevicesHook) or hook.offload for hook in hooks)


def _offloads_groups(part: Any) -> bool:
    """Whether diffusers' group offloading moves a part between devices."""
    modules = part.modules() if isinstance(part, nn.Module) else ()
    registries = (getattr(module, "_diffusers_hook", None) for module in modules)
    return any(registry is not None and registry.get_hook("group_offloading") for registry in registries)


@contextmanager
def silent(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within this context the pipeline shows no progress bar, because a longer one runs."""
    settings = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline._progress_bar_config = settings


def call_default(pipeline: DiffusionPipeline, argument: str) -> Any:
    """The default of an argument of a pipeline's call."""
    return inspect.signature(type(pipeline).__call__).parameters[argument].default


def pictures(output: Any) -> Any:
    """The images in what a pipeline returns, as tensors [N, 3, H, W] or a list; of videos the middle frames."""
    frames = getattr(output, "frames", None)
    if frames is None:
        return output.images
    if isinstance(frames, list):
        return [video[len(video) // 2] for video in frames]
    return frames[:, frames.shape[1] // 2]
