"""Erase a concept: train the denoiser to predict for the target what the frozen one predicts for the anchor."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ParamSpec, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, parse_flag_from_env
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional

from fdu.concepts import Concept, ConceptLike, ConceptType, Pair, concept_pairs, joined, weights_of
from fdu.config import TRAIN_METHODS, EraseConfig
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of
from fdu.models.offloading import offloads
from fdu.result import ErasureResult
from fdu.storage.fingerprint import versions
from fdu.storage.loading import check_offloaded, check_packages
from fdu.storage.locks import sole_use
from fdu.storage.output import RUN_LOCK
from fdu.training.adversary import Adversary, from_keys, keys_of, search_steps
from fdu.training.cache import Cache, model_key, tensor_key
from fdu.training.checkpoint import Checkpoints
from fdu.training.closed_form import EditFigures, closed_form
from fdu.training.examples import Examples, Found, prepare_examples
from fdu.training.loop import Training
from fdu.training.methods import Request, Trainable, attach
from fdu.training.objective import Objective
from fdu.training.process_state import deterministic, own_accelerator, seeded
from fdu.training.reconstruction import AUTOCAST
from fdu.training.sharding import check_shards, with_launcher
from fdu.training.step import Stepper

LOGGER = logging.getLogger(__name__)
SEARCH_FOLDER = "checkpoint-search"
"""Within the folder of a run's checkpoints, those of the training whose searches come first."""
Settings = ParamSpec("Settings")


class ErasureFunction(Protocol[Settings]):
    """:func:`erase` as editors and type checkers see it: every setting is an argument with a name and a type."""

    def __call__(
        self,
        pipeline: DiffusionPipeline,
        target: ConceptLike | Sequence[Concept],
        anchor: ConceptLike | Sequence[Concept],
        concept_type: ConceptType | Sequence[ConceptType] = "object",
        mask: Tensor | None = None,
        config: EraseConfig | None = None,
        stop_when: Callable[[Tensor], bool] | None = None,
        *args: Settings.args,
        **settings: Settings.kwargs,
    ) -> ErasureResult: ...


def _with_settings(
    config: Callable[Settings, EraseConfig],
) -> Callable[[Callable[..., ErasureResult]], ErasureFunction[Settings]]:
    return lambda function: function


@_with_settings(EraseConfig)
def erase(
    pipeline: DiffusionPipeline,
    target: ConceptLike | Sequence[Concept],
    anchor: ConceptLike | Sequence[Concept],
    concept_type: ConceptType | Sequence[ConceptType] = "object",
    mask: Tensor | None = None,
    config: EraseConfig | None = None,
    stop_when: Callable[[Tensor], bool] | None = None,
    **settings: Any,
) -> ErasureResult:
    """Erase ``target`` from ``pipeline``: its prompts then give what ``anchor``'s prompts give now.

    Minimises E[D_f(p_frozen(x_{t-1} | x_t, anchor) || p_trained(x_{t-1} | x_t, target))] over x_t and t (Novello et
    al. 2026, arXiv 2509.21167), and keeps the frozen outputs on the preserved prompts.

    Args:
        pipeline: a diffusers text-to-image pipeline on the training device. It is changed in place and returned as
            ``result.pipeline``; within ``result.original()`` it draws as before. Active adapters, such as LoRAs of
            your own and earlier erasures, count as part of the model and stay.
        target: the concept to erase: a name, a ``.txt`` file of prompts, a :class:`fdu.Concept`, prompts, or a
            sequence of :class:`fdu.Concept` for several.
        anchor: the concept that replaces it: a superclass ("painting"), another concept, or "" for nothing. One for
            all targets, or a sequence of :class:`fdu.Concept`, one per target.
        concept_type: "object" or "style": the phrasings for names. One for all targets, or a sequence, one per target.
        mask: weight of each pixel in the divergence, [H, W], >= 0; resized to the latents.
        config: the settings.
        stop_when: gets the images of ``validation_prompts``, [N, 3, H, W] in [0, 1], every ``validation_steps``. Once
            it returns True, the training ends as with ``stop_at``. A judge, for example: ``lambda images:
            judge(images).count("van gogh") == 0``.
        settings: single settings by name, instead of ``config``; see :class:`fdu.EraseConfig`.

    Raises:
        ValueError, TypeError, ImportError, FileNotFoundError: a wrong argument; raised before any work, with its name.
        BlockingIOError: another run uses ``checkpoint_dir``.
        RuntimeError: the loss became NaN or infinite, and the pipeline draws as before; or ``deterministic`` comes too
            late for cuBLAS, before any work.
        KeyboardInterrupt: interrupted by a signal; the pipeline draws as before. With checkpoint_dir, the state is
            saved there.
    """
    pairs = concept_pairs(target, anchor, concept_type)
    if config is not None and settings:
        raise TypeError(f"give either config or single settings, not both; got config and {', '.join(settings)}")
    config = with_launcher(config or EraseConfig.from_settings(settings))
    denoiser = denoiser_of(pipeline, config.size, config.num_frames)
    _check_run(denoiser, pairs, mask, config)
    _tell_of_gaps(denoiser, config)
    if stop_when is not None:
        _check_judged(config)
    denoiser.embedded_guidance = config.embedded_guidance
    started = time.perf_counter()
    precise = config
    if config.adversarial_rounds and not TRAIN_METHODS[config.train_method].trains:
        precise = dataclasses.replace(config, mixed_precision=AUTOCAST.get(denoiser.dtype, "bf16"))
    device = denoiser.device
    with ExitStack() as stack:
        stack.enter_context(deterministic(config.deterministic, device))
        accelerator = stack.enter_context(own_accelerator(precise, device))
        check_shards(denoiser.module, config, accelerator.num_processes)
        if config.checkpoint_dir is not None and accelerator.is_main_process:
            lock = Path(config.checkpoint_dir) / RUN_LOCK
            stack.enter_context(sole_use(lock, f"checkpoint_dir {config.checkpoint_dir!r}"))
        if TRAIN_METHODS[config.train_method].trains:
            trainable, history, sigma, edits = _train(accelerator, denoiser, pairs, mask, config, stop_when)
        else:
            trainable, edits = _compute(accelerator, denoiser, pairs, config)
            history, sigma = {}, None
    trainable.finish()
    seconds = time.perf_counter() - started
    return ErasureResult(denoiser, pairs, config, trainable, history, sigma, seconds, edits)


def _train(
    accelerator: Accelerator,
    denoiser: Denoiser,
    pairs: Sequence[Pair],
    mask: Tensor | None,
    config: EraseConfig,
    stop_when: Callable[[Tensor], bool] | None,
) -> tuple[Trainable, dict[str, list[float]], float, tuple[EditFigures, ...]]:
    """Train. Returns what was trained, the history, sigma, and the figures of the edits at its start."""
    # Without a training_cache, the latents go next to the checkpoints; a resumed run need not sample them again.
    folder = config.training_cache or config.checkpoint_dir
    model = model_key(denoiser) if folder is not None else {}
    checkpoints = _checkpoints(pairs, mask, config, model.get("weights", ""), accelerator.num_processes)
    cache = Cache(folder, model, accelerator)
    examples = prepare_examples(denoiser, pairs, config, accelerator, cache)
    with seeded(config.seed, denoiser.device):
        if mask is not None:
            size = examples.latents.shape[-2:]
            mask = functional.interpolate(mask[None, None].float(), size=size, mode="area")[0]
    adversary = None
    if config.adversarial_rounds:
        adversary = Adversary(accelerator, denoiser, pairs, config, examples, search_steps(config))
        if config.adversarial_order == "search_first":
            examples = _searched(adversary, mask, cache, model.get("weights", ""))
            adversary = None
    with seeded(config.seed, denoiser.device):
        objective = Objective(denoiser, config, mask)
        trainable, edits = _attach(denoiser, pairs, config)
    try:
        _share(accelerator, trainable)
        stepper = Stepper(accelerator, denoiser, trainable, examples, objective, config, cache)
        history = Training(stepper, checkpoints, adversary=adversary, stop_when=stop_when).run()
    except BaseException:
        trainable.remove()
        raise
    return trainable, history, objective.sigma, edits


def _compute(
    accelerator: Accelerator, denoiser: Denoiser, pairs: Sequence[Pair], config: EraseConfig
) -> tuple[Trainable, tuple[EditFigures, ...]]:
    """Erase in closed form; after each search, again from the original model. Returns the edit and its figures."""
    found: Sequence[Found] = ()
    if config.adversarial_rounds:
        folder = config.training_cache or config.checkpoint_dir
        cache = Cache(folder, model_key(denoiser) if folder is not None else {}, accelerator)
        examples = prepare_examples(denoiser, pairs, config, accelerator, cache)
        adversary = Adversary(accelerator, denoiser, pairs, config, examples, range(config.adversarial_rounds))

        def search() -> dict[str, Tensor]:
            with seeded(config.seed, denoiser.device):
                trainable, _ = _attach(denoiser, pairs, config, adversary.found)
            try:
                adversary.search()
            finally:
                trainable.remove()
            return keys_of(adversary.found)

        for rounds in range(1, config.adversarial_rounds + 1):
            # Each round is an entry, so that a run that was interrupted goes on, and so does one with more rounds.
            key = _searches_key(accelerator, pairs, None, dataclasses.replace(config, adversarial_rounds=rounds))
            adversary.found = from_keys(cache.get("adversary", key, search), denoiser.device)
            adversary.rounds = rounds
        found = adversary.found
    with seeded(config.seed, denoiser.device):
        return _attach(denoiser, pairs, config, found)


def _searched(adversary: Adversary, mask: Tensor | None, cache: Cache, base: str) -> Examples:
    """The training data with what a training that is thrown away and searches find, from the cache if it is there."""
    accelerator, denoiser, pairs = adversary.accelerator, adversary.denoiser, adversary.pairs
    config = dataclasses.replace(
        adversary.config,
        adversarial_order="alternate",
        frozen_batches=0,
        stop_at=0.0,
        report_to="none",
        validation_prompts=(),
        checkpoint_dir=adversary.config.checkpoint_dir and str(Path(adversary.config.checkpoint_dir) / SEARCH_FOLDER),
        resume_from_checkpoint=adversary.config.resume_from_checkpoint and "latest",
    )

    def search() -> dict[str, Tensor]:
        with seeded(config.seed, denoiser.device):
            objective = Objective(denoiser, config, mask)
            trainable, _ = _attach(denoiser, pairs, config)
        try:
            _share(accelerator, trainable)
            checkpoints = _checkpoints(pairs, mask, config, base, accelerator.num_processes)
            stepper = Stepper(accelerator, denoiser, trainable, adversary.examples, objective, config, cache)
            training = Training(stepper, checkpoints, description="search", adversary=adversary)
            training.run()
            if training.interrupted:
                raise KeyboardInterrupt
        finally:
            trainable.remove()
        return keys_of(adversary.found)

    key = _searches_key(accelerator, pairs, mask, config)
    adversary.found = from_keys(cache.get("adversary", key, search), denoiser.device)
    return adversary.extended()


def _searches_key(
    accelerator: Accelerator, pairs: Sequence[Pair], mask: Tensor | None, config: EraseConfig
) -> dict[str, Any]:
    """What the found conditionings depend on besides the model, for a cache."""
    return {
        "settings": config.recorded(),
        "concepts": [[list(one.prompts) for one in pair] for pair in pairs],
        "weights": weights_of(pairs),
        "mask": None if mask is None else tensor_key(mask),
        "processes": accelerator.num_processes,
    }


def _share(accelerator: Accelerator, trainable: Trainable) -> None:
    """Give all processes the same weights to begin with: they may round an edit differently."""
    if accelerator.num_processes > 1:
        for parameter in trainable.named_parameters().values():
            broadcast(parameter.data)


def _attach(
    denoiser: Denoiser, pairs: Sequence[Pair], config: EraseConfig, found: Sequence[Found] = ()
) -> tuple[Trainable, tuple[EditFigures, ...]]:
    """The trainable part of the pipeline, at its start, and the figures of the edits in it."""
    method = TRAIN_METHODS[config.train_method]
    edits = closed_form(denoiser, pairs, config, found) if config.init == "closed_form" or not method.trains else ()
    request = Request(
        config.train_method,
        config.rank,
        config.lora_alpha,
        target_names=[target.name for target, _ in pairs],
        prompts=joined([target for target, _ in pairs]).prompts,
        kept_prompts=[*joined([anchor for _, anchor in pairs]).prompts, *config.preservation_prompts],
        adapter_layers=config.adapter_layers,
        edits=edits,
    )
    trainable = attach(denoiser, request)
    cut = config.rank if method.trains and method.result != "weights" else None
    return trainable, tuple(edit.figures(cut) for edit in edits)


def check_suited(denoiser: Denoiser, config: EraseConfig) -> None:
    """Refuse settings with which this model cannot be trained on any device.

    Raises:
        ValueError: names the setting.
    """
    trains = TRAIN_METHODS[config.train_method].trains
    if trains and config.max_train_steps and denoiser.few_steps and config.timestep_sampling != "inference":
        raise ValueError(
            f"pipeline seems to be distilled to few steps: {denoiser.few_steps}. Set timestep_sampling 'inference', "
            "num_inference_steps to the number that the model is made for, such as 4, and sampling_guidance to "
            f"{denoiser.unguided_scale:g}; or train the model that it was distilled from. If it is not distilled, set "
            "timestep_sampling 'inference' and num_inference_steps to the number of steps that you draw with"
        )
    if config.embedded_guidance != EraseConfig.embedded_guidance and not denoiser.reads_guidance:
        raise ValueError(f"embedded_guidance: {denoiser.family} is not guidance-distilled here; leave it out")
    if config.weighting_scheme != "none" and denoiser.prediction_type != "flow":
        raise ValueError(
            f"weighting_scheme is for flow models, and {denoiser.family} is none; use weighting or timestep_sampling"
        )
    if config.gradient_checkpointing and not hasattr(denoiser.module, "enable_gradient_checkpointing"):
        raise ValueError(f"gradient_checkpointing: {type(denoiser.module).__name__} does not support it; leave it out")


def _check_run(denoiser: Denoiser, pairs: Sequence[Pair], mask: Tensor | None, config: EraseConfig) -> None:
    """Refuse a run that cannot be trained, before any work."""
    check_suited(denoiser, config)
    trains = TRAIN_METHODS[config.train_method].trains
    if mask is not None and not trains:
        raise ValueError(f"mask has no effect with train_method {config.train_method!r}; leave it out")
    if trains and config.mixed_precision == "no" and denoiser.module.dtype != torch.float32:
        raise ValueError(
            f"pipeline is in {denoiser.module.dtype} but mixed_precision is 'no'; "
            "load it with dtype=torch.float32, or choose mixed_precision 'fp16' or 'bf16'"
        )
    if offloads(denoiser.module):
        check_offloaded(config)
    if config.mixed_precision == "fp16" and denoiser.device.type == "cpu":
        raise ValueError("mixed_precision 'fp16' needs a GPU, and the pipeline is on the CPU; use 'bf16' or 'no'")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", config.mixed_precision)
    if launched != config.mixed_precision and launched != "no":
        raise ValueError(
            f"accelerate launch sets mixed_precision {launched!r} but the settings say {config.mixed_precision!r}; "
            f"set mixed_precision {launched!r}"
        )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("accelerate launch requests DeepSpeed, which is not supported; use DDP or FSDP")
    check_packages(config)
    if config.optimizer == "adamw_8bit" and denoiser.device.type == "cpu":
        raise ValueError("optimizer 'adamw_8bit' needs a GPU, and the pipeline is on the CPU; choose 'adamw'")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise TypeError(f"mask must be a tensor [H, W], got {getattr(mask, 'shape', type(mask).__name__)}")
        if not bool((mask >= 0).all() & (mask.sum() > 0)):
            raise ValueError("mask must hold values >= 0, at least one of them > 0")
    targets = {prompt for target, _ in pairs for prompt in target.prompts}
    contradicted = sorted(set(config.preservation_prompts) & targets)
    if contradicted:
        raise ValueError(f"preservation_prompts holds {contradicted[0]!r}, a prompt of the target; remove it")


def _tell_of_gaps(denoiser: Denoiser, config: EraseConfig) -> None:
    """Warn of layers by which the prompt enters the model past those that are trained."""
    by_weights = TRAIN_METHODS[config.train_method].result == "weights"
    option, chosen = ("train_method", config.train_method) if by_weights else ("adapter_layers", config.adapter_layers)
    trained = denoiser.layer_groups().get(chosen)
    left = [layer for layer in denoiser.other_readers if trained is not None and layer not in trained]
    if left:
        LOGGER.warning(
            "%s %r leaves %s as it is, by which the prompt also enters %s, so the concept may stay; 'text' trains it",
            *(option, chosen, " and ".join(left), denoiser.family),
        )


def _check_judged(config: EraseConfig) -> None:
    """Refuse settings that do not go with ``stop_when``."""
    if not config.validation_prompts or not TRAIN_METHODS[config.train_method].trains:
        raise ValueError("stop_when needs a training and validation_prompts, whose images it looks at; add them")
    if config.validation_steps >= config.max_train_steps:
        raise ValueError(
            f"stop_when looks every {config.validation_steps} steps, and the training has {config.max_train_steps}; "
            "lower validation_steps"
        )
    if config.adversarial_rounds and config.adversarial_order == "alternate":
        raise ValueError(
            "stop_when may end the training before the searches; leave it out, or set adversarial_order to "
            "'search_first'"
        )


def _checkpoints(
    pairs: Sequence[Pair], mask: Tensor | None, config: EraseConfig, base: str, processes: int
) -> Checkpoints | None:
    """The run's checkpoints; None without checkpoint_dir.

    Raises:
        FileExistsError: checkpoint_dir holds checkpoints and the run is not to resume.
        FileNotFoundError, ValueError: the checkpoint to resume from does not exist, or belongs to another run.
    """
    if config.checkpoint_dir is None:
        return None
    manifest = {
        "config": config.as_dict(),
        "concepts": [[[one.name, list(one.prompts)] for one in pair] for pair in pairs],
        "weights": weights_of(pairs),
        "mask": None if mask is None else tensor_key(mask),
        "base": base,
        "processes": processes,
        "versions": versions(),
    }
    checkpoints = Checkpoints(config.checkpoint_dir, config.checkpoints_total_limit, manifest)
    if config.resume_from_checkpoint is not None:
        checkpoints.load(config.resume_from_checkpoint, header_only=True)
    elif checkpoints.all():
        raise FileExistsError(
            f"checkpoint_dir {config.checkpoint_dir!r} holds checkpoints of an earlier run; resume with "
            "resume_from_checkpoint 'latest', or choose another folder"
        )
    return checkpoints
