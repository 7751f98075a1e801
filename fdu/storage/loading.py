"""Pipelines by folder or hub id: checked first, loaded later."""

from __future__ import annotations

import logging
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fdu.config import TRAIN_METHODS, EraseConfig, Size, check_choice, check_size
from fdu.storage.foreign import read_json
from fdu.storage.output import PIPELINE_FILE, RECORD_FILE, SMALL_RESULT
from fdu.storage.single_file import SingleFile

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
REVISION = re.compile(r"@[\w./-]+")
"""What may follow a hub id: a branch, tag or commit."""
HUB_PIPELINE = 6 << 30
"""Assumed bytes of a pipeline that is not here yet; Stable Diffusion 1.5 takes 5.5 GB in float32."""
LOGGER = logging.getLogger(__name__)
ABSENT = re.compile("no file named|does not appear to have a file named", re.IGNORECASE)
"""What diffusers and transformers say if weights are not there."""
REVISION_MARK = "_fdu_revision"
"""The attribute of a pipeline that holds the revision that it was loaded by."""
VARIANT = "fp16"
"""The variant of weights that a repository may have instead of those of full precision."""
PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
"""The packages of optimizers that are not PyTorch's."""
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Quantization = Literal["none", "nf4", "int8", "fp8"]
SaveAs = Literal["auto", "lora", "kohya", "pipeline", "delta"]


class MissingPackage(ImportError):
    """A setting needs a package that is not installed; the message names both, and the remedy."""


def check_model(model: str, argument: str = "MODEL", embedded: Sequence[str] = ()) -> None:
    """Refuse a model that cannot exist, before anything is loaded.

    Args:
        model: a pipeline's folder, a .safetensors file or a hub id.
        argument: name of the argument in errors.
        embedded: names of the pipelines of fdu, which errors offer too.

    Raises:
        ValueError: an empty name, or a file that is no model.
        FileNotFoundError: neither a pipeline's folder, nor a file, nor a possible hub id.
    """
    choices = "a pipeline's folder, a .safetensors file, a hub id (org/name)"
    choices += "".join(f" or {name!r}" for name in embedded)
    if not model.strip():
        raise ValueError(f"{argument} is empty; give {choices}")
    file = SingleFile.of(model)
    if file is not None:
        file.check(argument)
        if file.config is not None:
            check_model(file.config, "model_config")
            if not HUB_ID.fullmatch(file.config) and not Path(file.config).is_dir():
                raise ValueError(f"model_config {file.config!r} must be a folder, or a hub id without revision")
    elif Path(model).is_file():
        raise ValueError(f"{argument} {model!r} is a file of another kind than .safetensors; give {choices}")
    elif Path(model).is_dir():
        if not (Path(model) / PIPELINE_FILE).is_file():
            raise FileNotFoundError(
                f"{argument} {model!r} is not the folder of a diffusers pipeline: no {PIPELINE_FILE}"
            )
    elif not HUB_ID.fullmatch(hub_name(model)[0]):
        raise FileNotFoundError(f"{argument} {model!r} does not exist; give {choices}")
    elif Path(model).parent.is_dir():
        raise FileNotFoundError(
            f"{argument} {model!r} does not exist: there is a folder {str(Path(model).parent)!r}, but no "
            f"{Path(model).name!r} in it; for the hub id {model!r}, run where there is no such folder"
        )


def hub_name(model: str) -> tuple[str, str | None]:
    """The hub id and the revision, if there is one, of "org/name@revision".

    >>> hub_name("org/model@v1.0"), hub_name("org/model")
    (('org/model', 'v1.0'), ('org/model', None))
    """
    name, sign, revision = model.partition("@")
    return (name, revision) if REVISION.fullmatch(sign + revision) else (model, None)


def at_revision(model: str, revision: str | None) -> str:
    """The name of a model at a revision, if one is given.

    >>> at_revision("org/model", "v1.0"), at_revision("org/model", None)
    ('org/model@v1.0', 'org/model')

    Raises:
        ValueError: a folder, a file, or a name that has a revision already.
    """
    if revision is None:
        return model
    if Path(model).is_dir() or SingleFile.of(model) or not HUB_ID.fullmatch(model):
        raise ValueError(f"revision goes with a hub id (org/name), and the model is {model!r}; leave it out")
    return f"{model}@{revision}"


def with_config(model: str, model_config: str | None, variant: str | None = None) -> str:
    """The name of a model in a single file with that of the pipeline that it belongs to, if one is given.

    >>> with_config("sd.safetensors", "org/model"), with_config("org/model", None)
    ('sd.safetensors@org/model', 'org/model')

    Raises:
        ValueError: a model that is no file, or a file that has a pipeline already; or a variant of a file.
    """
    file = SingleFile.of(model)
    if variant is not None and file is not None:
        raise ValueError(f"variant chooses among the files of a pipeline, and the model is {model!r}; leave it out")
    if model_config is None:
        return model
    if file is None or file.config is not None:
        raise ValueError(f"model_config goes with a .safetensors file, and the model is {model!r}; leave it out")
    return f"{model}@{model_config}"


def check_resolution(folder: Path | None, size: Size | None) -> None:
    """Raise ValueError for a size that the pipeline in ``folder`` cannot draw, as far as its configs tell."""
    if size is None or folder is None:
        return
    vae, denoiser = _config(folder / "vae"), _config(folder / "unet") or _config(folder / "transformer")
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    if blocks:
        scale, side = 2 ** (len(blocks) - 1), denoiser.get("sample_size")
        native = (side * scale, side * scale) if isinstance(side, int) else None
        patch = denoiser.get("patch_size")
        check_size(size, math.lcm(8, scale * (patch if isinstance(patch, int) else 1)), native)


def result_bytes(places: Sequence[Path], train_method: str, save_as: str = "auto") -> int:
    """Bytes that a saved erasure takes: LoRA weights are small, other formats reach the size of the pipeline.

    Args:
        places: the files and folders of the pipeline; none for a pipeline on the hub.
        train_method, save_as: settings of the erasure; a format that its result cannot have is a ValueError.
    """
    from fdu.storage.formats import choose_format

    if choose_format(save_as, train_method) in ("lora", "kohya"):
        return SMALL_RESULT
    if not places:
        return HUB_PIPELINE
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    return SMALL_RESULT + sum(path.stat().st_size for path in files)


def check_erased(path: str) -> None:
    """Refuse a path that holds neither a pipeline nor one file of weights for :func:`fdu.load_weights`.

    Raises:
        FileNotFoundError, ValueError: no weights; several files of weights, or a file of another kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"ERASED {path!r} does not exist; give a folder that `fdu erase` wrote, or weights")
    if not (Path(path) / PIPELINE_FILE).is_file():
        from fdu.storage.readers import weights_file

        weights_file(path)


def check_encoder(name: str, argument: str = "judge") -> None:
    """Raise FileNotFoundError for an image-text encoder that is neither a model's folder nor a possible hub id."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"{argument} {name!r} is not the folder of a transformers model: no config.json")
    elif not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{argument} {name!r} does not exist; give a CLIP model's folder or hub id (org/name)")


def check_target_judge(name: str) -> None:
    """Raise MissingPackage if the package of a judge of the target is not installed."""
    check_package(name, f"target_judge {name!r}", "none, so that the encoder judges")


def read_record(folder: str) -> Any:
    """The record of ``fdu erase`` next to the weights, unchecked (see :func:`fdu.report.check_record`), or None.

    Raises:
        ValueError: it is not valid JSON.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return None
    return read_json(path, "run `fdu erase` again")


def erased_pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of targets and anchors in the record of an erasure."""
    pairs = record.get("concepts") or [(record["target"]["name"], record["anchor"]["name"])]
    return [(target, anchor) for target, anchor in pairs]


def choose_device(device: str) -> str:
    """The device to run on; "auto" takes the first accelerator. Raises ValueError for a device that is not here."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            # One device for each of the processes that accelerate launch or torchrun started.
            return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {device!r} cannot be used ({_first_line(error)}); choose auto or cpu, and see `fdu doctor`"
        ) from error
    return device


def is_main_process() -> bool:
    """Whether this process writes the results: it is alone, or the first of accelerate launch."""
    return os.environ.get("RANK", "0") == "0"


def describe_device(device: str) -> str:
    """A device in words, for records."""
    import torch

    if device.startswith("cuda"):
        return f"{device}: {torch.cuda.get_device_name(device)}"
    if device == "cpu":
        threads = torch.get_num_threads()
        return f"cpu: {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"
    return device


def check_dtype(dtype: Dtype, mixed_precision: str) -> str:
    """The dtype to load the model in; "auto" fits ``mixed_precision``. Half precision without autocast is an error."""
    if dtype == "auto":
        return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[mixed_precision]
    if dtype != "float32" and mixed_precision == "no":
        raise ValueError(f"dtype {dtype} needs mixed_precision fp16 or bf16; add that, or use dtype float32")
    return dtype


def check_quantization(quantization: str) -> None:
    """Refuse a quantization that cannot run.

    Raises:
        ValueError: it does not exist.
        MissingPackage: its package is not installed.
    """
    check_choice("quantization", quantization, get_args(Quantization))
    if quantization == "nf4":
        check_package("bitsandbytes", "quantization 'nf4'", "'int8' or 'fp8'")


def check_packages(config: EraseConfig) -> None:
    """Raise MissingPackage if the optimizer or the tracker is not installed."""
    if config.optimizer in PACKAGES:
        check_package(PACKAGES[config.optimizer], f"optimizer {config.optimizer!r}", "'adamw'")
    if config.report_to != "none":
        from accelerate.tracking import get_available_trackers

        if config.report_to not in map(str, get_available_trackers()):
            raise _missing(config.report_to, f"report_to {config.report_to!r}", "'none'")


def check_package(package: str, setting: str, others: str) -> None:
    """Raise MissingPackage if a setting's package cannot be imported; ``others`` are the choices that do without."""
    try:
        import_module(package)
    except ImportError as error:
        raise _missing(package, setting, others, f" ({error})") from error


def _missing(package: str, setting: str, others: str, reason: str = "") -> MissingPackage:
    return MissingPackage(f"{setting} needs {package}{reason}; pip install {package}, or choose {others}")


def check_offloaded(config: EraseConfig) -> None:
    """Raise ValueError for settings that do not go with a denoiser whose blocks are offloaded."""
    method = TRAIN_METHODS[config.train_method]
    if method.result == "weights" or not method.trains or config.init != "none":
        raise ValueError(
            "the pipeline's blocks are offloaded, so only adapters can be trained; load it without offload, or choose "
            "train_method 'lora' or 'dora' and init 'none'"
        )
    if not config.gradient_checkpointing:
        raise ValueError(
            "the pipeline's blocks are offloaded, which saves memory only with gradient_checkpointing; add that, or "
            "load the pipeline without offload"
        )
    for name in ("compile", "shard"):
        if getattr(config, name):
            raise ValueError(f"{name} does not go with offloaded blocks; leave it out, or load without offload")


def check_stored(quantization: str, offload: bool, config: EraseConfig) -> None:
    """Raise ValueError if an erasure needs the weights that are quantized, or away."""
    train_method = config.train_method
    given = "offload" if offload else f"quantization {quantization!r}" if quantization != "none" else ""
    if given and (TRAIN_METHODS[train_method].result == "weights" or not TRAIN_METHODS[train_method].trains):
        raise ValueError(f"{given} needs train_method 'lora' or 'dora', and train_method is {train_method!r}")
    if offload:
        check_offloaded(config)


def load_model(
    model: str,
    dtype: str = "float32",
    device: str = "cpu",
    quantization: str = "none",
    offload: bool = False,
    variant: str | None = None,
    base_lora: Sequence[str] = (),
) -> DiffusionPipeline:
    """Load a pipeline; of one that has no other weights, the variant "fp16".

    Args:
        model: a folder; a hub id, with a branch, tag or commit after an @; or a .safetensors file, with the pipeline
            that it belongs to after an @.
        dtype: of the weights in memory.
        device: where they go.
        quantization: of the linear layers in the blocks of the denoiser and of large text encoders; "none" for none.
        variant: of the weights' files, such as "fp16".
        offload: keep the blocks of the denoiser on the CPU until they are called, and the other parts too.
        base_lora: files or folders of LoRA weights, which become active adapters.

    Raises:
        OSError: it cannot be loaded; the first line of the reason.
        ValueError: the denoiser has no blocks to offload.
    """
    import torch
    from diffusers import DiffusionPipeline

    from fdu.models.offloading import offload_blocks
    from fdu.models.quantization import quantize

    file = SingleFile.of(model)
    name, revision = (model, None) if file or Path(model).is_dir() else hub_name(model)
    given = {"dtype": getattr(torch, dtype), "revision": revision, "variant": variant}
    with loading(model):
        try:
            pipeline = file.load(dtype) if file else DiffusionPipeline.from_pretrained(name, **given)
        except Exception as error:
            if file or variant is not None or not ABSENT.search(str(error)):
                raise
            try:
                pipeline = DiffusionPipeline.from_pretrained(name, **{**given, "variant": VARIANT})
            except Exception:
                raise error from None
            LOGGER.warning("%s has no other weights than those of the variant %s; loaded these", model, VARIANT)
        vars(pipeline)[REVISION_MARK] = revision
        quantize(pipeline, quantization, "cpu" if offload else device)
        pipeline.to("cpu" if offload else device)
    if offload:
        offload_blocks(pipeline, device)
    for path in base_lora:
        _add_lora(pipeline, path)
    return pipeline


def _add_lora(pipeline: DiffusionPipeline, path: str) -> None:
    """Load LoRA weights as an adapter that is named after their file or folder.

    Raises:
        OSError: they cannot be loaded, or are of another kind; the first line of the reason.
    """
    from fdu.models.parts import adapter_names
    from fdu.storage.readers import load_weights

    name = re.sub(r"[^\w-]", "_", Path(path).resolve().stem)
    while name in adapter_names(pipeline):
        name += "_"
    with loading(path, "base_lora"):
        if load_weights(pipeline, path, name).adapter_name is None:
            raise ValueError("it holds changed weights, no adapter; save a pipeline with them, and give that as MODEL")


@contextmanager
def loading(path: str, argument: str = "model") -> Iterator[None]:
    """Within this context, whatever fails becomes an OSError with the first line of the reason: libraries raise errors
    of many kinds where files, weights, or classes that a config names do not suit them."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{argument} {path!r} could not be loaded: {_first_line(error)}") from error


def load_erased(pipeline: DiffusionPipeline, path: str) -> DiffusionPipeline:
    """``pipeline`` with the weights of ``path``. A delta holds the adapters that its base carried, so that those of the
    pipeline go.

    Raises:
        OSError: it cannot be loaded; the first line of the reason.
    """
    from fdu.storage.readers import load_weights

    folder = path if Path(path).is_dir() else str(Path(path).parent)
    with loading(path, "weights"):
        merged = load_weights(pipeline, path).adapter_name is None and (read_record(folder) or {}).get("adapters")
        if merged:
            pipeline.unload_lora_weights()
    return pipeline


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of a model in ``folder``; empty if it cannot be read, which loading will report."""
    try:
        found = read_json(folder / "config.json", "download it again")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_line(error: BaseException) -> str:
    """The first line of a message, shortened: those of libraries are long."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(line, 160, placeholder=" ...").rstrip(".")
