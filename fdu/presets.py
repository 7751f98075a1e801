"""Settings of published methods by name, and settings in YAML files."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from fdu.config import PLACES, EraseConfig, check_choice, check_field, choices_of, closest, hints_of, in_case
from fdu.storage.foreign import parse_yaml

EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
"""A number that YAML takes for a text."""
NO_CLIPPING = 1e6
"""A max_grad_norm that no gradient reaches."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings to begin with: of a published method, as far as they have a counterpart here, or for a task."""

    settings: Mapping[str, Any]
    models: str
    """How the names of the models that it is for begin, and that of their family."""
    meaning: str
    """What it is, and what the command line must say besides."""
    source: str
    """Where the numbers come from."""


FDMU: dict[str, Any] = {
    "train_method": "cross_attention",
    "max_train_steps": 500,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2.8e-4,
    "lr_scheduler": "constant",
    "adam_weight_decay": 1e-2,
    "max_grad_norm": NO_CLIPPING,
    "sigma": 1.0,
    "preservation_weight": 0.0,
    "num_latents": 1000,
    "num_inference_steps": 25,
    "sampling_guidance": 6.0,
}
ABLATION: dict[str, Any] = {
    "train_method": "cross_attention",
    "divergence": "mse",
    "max_train_steps": 100,
    "train_batch_size": 8,
    "learning_rate": 1.6e-5,
    "lr_scheduler": "constant",
    "adam_weight_decay": 1e-2,
    "sigma": 1.0,
    "preservation_weight": 0.0,
    "num_latents": 1000,
    "num_inference_steps": 25,
    "sampling_guidance": 6.0,
}
ESD: dict[str, Any] = {
    "train_method": "cross_attention",
    "divergence": "mse",
    "negative_guidance": 1.0,
    "noisy_latents": "trajectory",
    "max_train_steps": 200,
    "train_batch_size": 1,
    "learning_rate": 5e-5,
    "lr_scheduler": "constant",
    "max_grad_norm": NO_CLIPPING,
    "sigma": 1.0,
    "preservation_weight": 0.0,
    "num_latents": 200,
    "num_inference_steps": 50,
}
ESD_XL = {**ESD, "negative_guidance": 0.0, "learning_rate": 2e-4, "sampling_guidance": 2.0}
LORA: dict[str, Any] = {
    "rank": 4,
    "lora_alpha": 4.0,
    "max_train_steps": 500,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "lr_scheduler": "constant",
    "adam_weight_decay": 1e-4,
    "num_inference_steps": 28,
    "sample_batch_size": 4,
    "mixed_precision": "bf16",
}
UNTRIED = "The numbers are those of diffusers for learning a subject. Nobody has tried them for erasing."
SAMPLING = "sampling as the pipeline does by default"

PRESETS: dict[str, Preset] = {
    "fdmu": Preset(
        FDMU,
        "Stable Diffusion 1",
        "Novello et al. 2026 (arXiv 2509.21167), Stable Diffusion 1.4; choose --divergence. The authors use 8-bit "
        "Adam: add --optimizer adamw_8bit on a GPU.",
        "run_experiment.sh and train.py of nicolaNovello/f-DMU: learning rate 7e-5 times batch 2 times accumulation 2",
    ),
    "fdmu-flux": Preset(
        {
            **FDMU,
            "train_method": "text",
            "train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-5,
            "num_inference_steps": 28,
            "sampling_guidance": 3.5,
            "sample_batch_size": 4,
        },
        "FLUX.1",
        "The same for FLUX.1; choose --divergence. The authors train the two embedders of the text (context_embedder, "
        "text_embedder); here the text's keys and values are trained too.",
        "the defaults of parse_args_flux in utils.py of nicolaNovello/f-DMU, whose script and steps for FLUX are not "
        f"published: the steps are those for Stable Diffusion; {SAMPLING}",
    ),
    "concept-ablation": Preset(
        ABLATION,
        "Stable Diffusion 1",
        "Kumari et al. 2023 (arXiv 2303.13516), styles and objects, Stable Diffusion 1.4, model-based.",
        "diffusers/README.md and train.py of nupurkmr9/concept-ablation: learning rate 2e-6 times batch 4 times 2 GPUs",
    ),
    "esd-x": Preset(
        ESD,
        "Stable Diffusion 1",
        "Gandikota et al. 2023 (arXiv 2303.07345), keys and values only (esd-x-strict), Stable Diffusion 1.4; add "
        '--anchor "". ESD trains on the name alone, and fdu puts it into phrasings, unless --target is a .txt file '
        "that holds it.",
        "esd_sd.py of rohitgandikota/erasing; its negative_guidance 2 is 1 here, which counts from the anchor, and "
        "its Adam is AdamW without weight decay",
    ),
    "esd-x-sdxl": Preset(
        ESD_XL,
        "Stable Diffusion XL",
        'The same for Stable Diffusion XL; add --anchor "". As in ESD, the layer that reads the pooled embedding stays '
        "as it is.",
        "esd_sdxl.py of rohitgandikota/erasing; its negative_guidance 1 is 0 here",
    ),
    "sd15-style": Preset(
        FDMU,
        "Stable Diffusion 1",
        "A style from Stable Diffusion 1.x: the settings of fdmu; add --concept_type style.",
        "run_experiment.sh of nicolaNovello/f-DMU erases Van Gogh with them",
    ),
    "sd15-object": Preset(
        ABLATION,
        "Stable Diffusion 1",
        "An object from Stable Diffusion 1.x: the settings of concept-ablation. If the target's name contains "
        "the anchor's (grumpy cat, cat), add --preservation_weight 1 --learning_rate 3.2e-5, as its authors do.",
        "diffusers/README.md of nupurkmr9/concept-ablation erases R2D2 with them",
    ),
    "sdxl-style": Preset(
        {**ESD_XL, "train_method": "text"},
        "Stable Diffusion XL",
        "A style from Stable Diffusion XL: the settings of esd-x-sdxl for all layers that read the prompt, as the "
        'pooled embedding could keep the style; add --anchor "" --concept_type style.',
        "README.md of rohitgandikota/erasing erases Van Gogh with those settings, but from keys and values alone",
    ),
    "sd3": Preset(
        {**LORA, "learning_rate": 4e-4, "weighting_scheme": "logit_normal", "sampling_guidance": 7.0},
        "Stable Diffusion 3",
        f"A LoRA for Stable Diffusion 3 and 3.5. We know of no published settings for erasing from them. {UNTRIED}",
        f"README_sd3.md and train_dreambooth_lora_sd3.py of diffusers' examples; {SAMPLING}",
    ),
    "flux": Preset(
        {**LORA, "learning_rate": 1e-4, "sampling_guidance": 3.5},
        "FLUX.1",
        f"A LoRA for FLUX.1, which needs less memory than fdmu-flux. {UNTRIED}",
        f"README_flux.md and train_dreambooth_lora_flux.py of diffusers' examples, with AdamW; {SAMPLING}",
    ),
}
if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(PRESETS)]


def preset(name: str, **settings: Any) -> EraseConfig:
    """The settings of a published method; ``settings`` replace some of them.

    >>> preset("fdmu", divergence="pearson_chi2").learning_rate
    0.00028

    Raises:
        ValueError, TypeError: an unknown preset, or as :class:`fdu.EraseConfig`.
    """
    return EraseConfig.from_settings({**preset_settings(name, settings), **settings})


def preset_settings(name: str, others: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a preset beside ``others``, which win: s0 also over a sigma, with which it would do nothing.

    Raises:
        ValueError: an unknown preset.
    """
    check_choice("preset", name, PRESETS)
    moot = {"sigma"} if "s0" in others else set()
    return {key: value for key, value in PRESETS[name].settings.items() if key not in {*others, *moot}}


def check_preset(name: str, family: str) -> None:
    """Refuse a preset for another family of models: it could leave a way for the concept.

    Raises:
        ValueError: names presets that suit the model.
    """
    models = PRESETS[name].models
    if not family.startswith(models):
        suited = [other for other, one in PRESETS.items() if family.startswith(one.models)]
        remedy = f"choose {' or '.join(suited)}" if suited else "leave it out"
        raise ValueError(f"preset {name!r} is for {models}, and the model is {family}; {remedy}")


def read_settings(path: str | Path, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings in a YAML file: a mapping of names of settings to values.

    Args:
        path: the file.
        others: what it may hold besides the settings of an erasure: annotations by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, not a mapping, or an unknown setting; names the file.
    """
    shown = f"config {str(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{shown} does not exist; --save_config writes such a file")
    try:
        found = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{shown} must hold one setting per line, such as learning_rate: 0.001")
    hints = {**hints_of(EraseConfig), **(others or {})}
    for name, value in found.items():
        if name not in hints:
            raise ValueError(f"{shown} names {name!r}, which is not a setting{closest(name, list(hints))}")
        plain = value if isinstance(value, list) else [value]
        if not all(one is None or isinstance(one, (str, int, float)) for one in plain):
            got = reprlib.repr(value)
            raise ValueError(f"{shown}: {name} must be a number, a text, true, false or a list of texts, got {got}")
        try:
            found[name] = read_value(name, value, hints[name])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{shown}: {error}") from error
    return found


def read_value(name: str, value: Any, hint: Any) -> Any:
    """A setting's value from a file: YAML takes 1e-3, without a point, for a text.

    Raises:
        ValueError, TypeError: it does not fit the setting.
    """
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        value = float(value)
    value = in_case(value, choices_of(EraseConfig).get(name, ()))
    check_field(name, value, hint)
    kind = get_args(hint)[0] if type(None) in get_args(hint) else hint
    if kind is str and not isinstance(value, str) and (value is not None or kind is hint):
        raise TypeError(f"{name} must be a text, got {reprlib.repr(value)}")
    if get_origin(hint) is tuple and not isinstance(value, list):
        raise TypeError(f"{name} must be a list of texts, got {value!r}")
    return value


def write_settings(path: str | Path, config: EraseConfig, others: Mapping[str, Any] | None = None) -> None:
    """Write the settings that are not the defaults to a YAML file, whole or not at all, without the places of files on
    this machine; ``others``: more settings to write.

    Raises:
        OSError: the file cannot be written.
    """
    import yaml

    from fdu.storage.output import write_text

    given = {name: getattr(config, name) for name in config.field_names() if name not in PLACES}
    changed = {name: value for name, value in given.items() if value != getattr(EraseConfig, name)}
    changed |= others or {}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    settings |= {"divergence": str(config.divergence)} if "divergence" in settings else {}
    write_text(Path(path), yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
