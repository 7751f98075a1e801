"""The options of the commands: the settings of an erasure in groups, the help, and the hints for mistyped names."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro

from fdu.config import EraseConfig, choices_of, hints_of, in_case
from fdu.presets import preset_settings, read_settings
from fdu.storage.loading import (
    Dtype,
    Quantization,
    at_revision,
    check_packages,
    check_quantization,
    check_stored,
    is_main_process,
    with_config,
)

if TYPE_CHECKING:
    from fdu.report.hub import Upload

GROUPS = {
    "basic": "train_method",
    "divergence": "divergence",
    "training": "gradient_accumulation_steps",
    "memory": "mixed_precision",
    "files": "training_cache",
}
"""The groups of settings in the help, each with its first setting; the order is that of EraseConfig."""
OTHER_NAMES = {
    "steps": "max_train_steps",
    "num_train_steps": "max_train_steps",
    "iterations": "max_train_steps",
    "lr": "learning_rate",
    "batch_size": "train_batch_size",
    "method": "train_method",
    "loss": "divergence",
    "concept": "target",
    "output": "out",
    "output_dir": "out",
    "size": "resolution",
    "type": "concept_type",
    "cache_dir": "training_cache (HF_HUB_CACHE says where the hub's downloads go)",
    "logging_dir": "tracking_dir",
    "guidance_scale": "sampling_guidance (or --embedded_guidance, the input of FLUX.1 dev)",
    "num_train_epochs": "max_train_steps",
    "validation_epochs": "validation_steps",
    "instance_prompt": "target",
    "class_prompt": "anchor",
    "prior_loss_weight": "preservation_weight",
    "with_prior_preservation": "preservation_weight",
    "use_8bit_adam": "optimizer adamw_8bit",
    "use_dora": "train_method dora",
    "private": "hub_private_repo",
    "repo_id": "hub_model_id",
    "output_kohya_format": "save_as kohya",
}
"""Names of options in other programs, among them diffusers' scripts, and earlier names; each with the option meant and
what to say about it."""


class Settings:
    """The settings on a command line: a dataclass with one dataclass per group. See :func:`grouped`."""

    def typed(self) -> dict[str, Any]:
        """Every setting by name."""
        return {name: value for group in vars(self).values() for name, value in vars(group).items()}

    def checked(self, **others: Any) -> EraseConfig:
        """The settings, checked; ``others`` replace those that are None.

        Raises:
            ValueError, TypeError: as :class:`fdu.EraseConfig`.
        """
        typed = self.typed()
        return EraseConfig(**typed | {name: value for name, value in others.items() if typed[name] is None})


@cache
def grouped(without: Collection[str] = ()) -> type[Settings]:
    """The class of the settings on a command line, except those in ``without``."""
    hints, help_texts, fields = get_type_hints(EraseConfig), helps(EraseConfig), EraseConfig.__dataclass_fields__
    groups = []
    starts = [*map(list(fields).index, GROUPS.values()), len(fields)]
    for title, start, end in zip(GROUPS, starts, starts[1:], strict=False):
        options = [
            (name, _option(hints[name], help_texts[name]), dataclasses.field(default=fields[name].default))
            for name in list(fields)[start:end]
            if name not in without
        ]
        if options:
            group = dataclasses.make_dataclass(title, options, frozen=True)
            groups.append((title, Annotated[group, tyro.conf.arg(help="")], dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass("Settings", groups, bases=(Settings,), frozen=True)


def described(command: type) -> type:
    """The command's dataclass with the help of its own options as tyro should print it."""
    hints, help_texts = get_type_hints(command, include_extras=True), helps(command)
    options = [
        (field.name, _option(hints[field.name], help_texts[field.name]), field)
        for field in dataclasses.fields(command)
        if field.name in help_texts
    ]
    namespace = {"__doc__": command.__doc__, "__module__": command.__module__}
    return dataclasses.make_dataclass(command.__name__, options, bases=(command,), namespace=namespace)


def helps(kind: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, also of inherited ones, each in one paragraph."""
    import docstring_parser

    kinds = [one for one in reversed(kind.__mro__) if dataclasses.is_dataclass(one)]
    found = [one for kind in kinds for one in docstring_parser.parse_from_object(kind).params]
    return {one.arg_name: " ".join(one.description.split()) for one in found if one.description}


@dataclasses.dataclass
class ModelOptions:
    """Options that say which weights of a model are read, and how the frozen ones are stored."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    model_config: str | None = None
    """Of a .safetensors file: the folder or hub id of the pipeline that it belongs to, for configs and tokenizers, and
    for the weights of what the file lacks. Default: the one that diffusers knows for such files, from the hub."""
    quantization: Quantization = "none"
    """Store the linear layers in the blocks of the denoiser, and those of large text encoders, in four or eight bits:
    nf4 (needs bitsandbytes), int8 or fp8. Only adapters can be trained on them."""
    offload: bool = False
    """Keep the blocks of a transformer on the CPU and bring them to the device one at a time. To erase so, train
    adapters with --gradient_checkpointing."""

    def location(self, model: str) -> str:
        """The model at the revision, or with the pipeline that its file belongs to.

        Raises:
            ValueError: a revision of a folder, or options that do not fit the model.
        """
        return with_config(at_revision(model, self.revision), self.model_config)

    def check(self, *configs: EraseConfig) -> None:
        """Refuse storage that cannot be made, or that erasures with these settings cannot use, and settings whose
        packages are not installed.

        Raises:
            ValueError, MissingPackage: names the option.
        """
        check_quantization(self.quantization)
        for config in configs:
            check_packages(config)
            check_stored(self.quantization, self.offload, config)

    def given(self) -> dict[str, Any]:
        """The options that are not the defaults."""
        values = {one.name: (getattr(self, one.name), one.default) for one in dataclasses.fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def words(self) -> list[str]:
        """The options as words of a command line."""
        return words_of(self.given())


@dataclasses.dataclass
class LoadOptions(ModelOptions):
    """Options that say how a model is loaded."""

    variant: str | None = None
    """Variant of the weights' files, such as fp16. Default: full precision, or fp16 where there is nothing else."""
    base_lora: tuple[str, ...] = ()
    """LoRA files or folders of yours that count as part of the model and stay active."""

    def location(self, model: str) -> str:
        """See :meth:`ModelOptions.location`."""
        return with_config(at_revision(model, self.revision), self.model_config, self.variant)

    def check(self, *configs: EraseConfig) -> None:
        """See :meth:`ModelOptions.check`; also refuse a LoRA that is not there."""
        super().check(*configs)
        for path in self.base_lora:
            from fdu.storage.readers import weights_file  # which takes long

            try:
                weights_file(path)
            except (OSError, ValueError) as error:
                raise type(error)(f"base_lora: {error}") from error

    @property
    def storage(self) -> tuple[str, bool]:
        """Quantization and offloading, as arguments that load a model."""
        return self.quantization, self.offload

    @property
    def arguments(self) -> tuple[str, bool, str | None, tuple[str, ...]]:
        """All arguments of :meth:`fdu.subjects.subject.Subject.load` behind dtype and device."""
        return *self.storage, self.variant, self.base_lora


@dataclasses.dataclass
class HubOptions:
    """Options that push a result to the Hugging Face hub."""

    push_to_hub: bool = False
    """Push the erasure to the Hugging Face hub."""
    hub_model_id: str | None = None
    """Repository to push to: org/name, or a name in your own namespace. Default: the name of the erasure's folder."""
    hub_token: str | None = None
    """Token of the hub that can write; no record keeps it. Default: that of `hf auth login` or HF_TOKEN."""
    hub_private_repo: bool = False
    """Make a new repository private."""

    def check(self) -> None:
        """Refuse options that have no effect.

        Raises:
            ValueError: names the option.
        """
        for name in ("hub_model_id", "hub_token", "hub_private_repo"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"{name} has no effect without --push_to_hub; add that option, or leave {name} out")

    def upload(self, folder: Path) -> Upload | None:
        """The repository for the erasure in a folder, checked; None if this process pushes nothing.

        Raises:
            ValueError, OSError: as :meth:`fdu.report.hub.Upload.checked`.
        """
        self.check()
        if not self.push_to_hub or not is_main_process():
            return None
        from fdu.report.hub import Upload  # which takes long

        return Upload.checked(self.hub_model_id or folder.resolve().name, self.hub_token, self.hub_private_repo or None)


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line; what is None or False is left out.

    >>> words_of({"offload": True, "rank": 4, "compile": False, "validation_prompts": ("a cat", "a dog")})
    ['--offload', '--rank', '4', '--validation_prompts', 'a cat', 'a dog']
    """
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name}", *map(str, values)] if values else []
    return words


def _option(hint: Any, text: str) -> Any:
    """The hint with its help. By itself, tyro would show None and False as defaults."""

    def default(label: str) -> str:
        return "" if label in ("", "None", "False") or "MISSING" in label else f"(default: {label})"

    return Annotated[hint, tyro.conf.arg(help=text, help_behavior_hint=default)]


def expanded(arguments: Sequence[str], known: Collection[str]) -> list[str]:
    """The arguments with the settings of --preset and --config behind them, except those that are typed as well, or
    that are no option of the command (``known``); of the two, the file counts. --no_NAME is taken for a setting that is
    switched off.

    Raises:
        ValueError, FileNotFoundError: an unknown preset, or a file that cannot be read.
    """
    typed: dict[str, str] = {}
    for word, following in itertools.pairwise([*arguments, ""]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            typed[name.replace("-", "_")] = value if equals else following
    switches = {
        one.name for kind in (EraseConfig, LoadOptions) for one in dataclasses.fields(kind) if one.default is False
    }
    off = {name for name in typed if name.startswith("no_") and name[3:] in switches}
    words = [word for word in arguments if word[2:].replace("-", "_") not in off]
    typed |= {name[3:]: "" for name in off}
    read = read_settings(typed["config"], {**hints_of(LoadOptions), "dtype": Dtype}) if "config" in typed else {}
    settings = (preset_settings(typed["preset"], {*typed, *read}) if "preset" in typed else {}) | read
    return words + words_of({name: value for name, value in settings.items() if name in known and name not in typed})


def in_own_case(arguments: Sequence[str]) -> list[str]:
    """The arguments with the choices of settings in their own case."""
    choices, words, option = choices_of(EraseConfig), list[str](), ""
    for word in arguments:
        named, equals, value = word.rpartition("=") if word.startswith("--") else (option, "", word)
        value = in_case(value, choices.get(named[2:].replace("-", "_"), ()))
        words.append(named + equals + value if equals else value)
        option = word
    return words


def check_typed(arguments: Sequence[str], commands: Mapping[str, type]) -> None:
    """Raise ValueError for an unknown command, an unknown option, or several names after an option that takes one."""
    command, *rest = arguments
    if command.startswith("-"):
        return
    if command not in commands:
        hint = _meant(command, commands)
        raise ValueError(f"there is no command {command!r}{hint} The commands are {', '.join(commands)}")
    options, repeated, _ = option_names(commands[command])
    for i, word in enumerate(rest):
        if not word.startswith("--") or word == "--":
            continue
        typed = word[2:].partition("=")[0]
        name = typed.replace("-", "_")
        if name not in (*options, "help"):
            hint = _meant(name, options, "--")
            raise ValueError(f"there is no option --{typed}{hint} fdu {command} --help lists the options")
        values = list(itertools.takewhile(lambda value: not value.startswith("--"), rest[i + 1 :]))
        # If the first word is an option, the last value may be the model.
        if name in repeated and "=" not in word and len(values) > 1 and not rest[0].startswith("-"):
            again = " ".join(f"--{typed} {value}" for value in values)
            raise ValueError(f"--{typed} takes one name; repeat the option for each further name: {again}")


def option_names(command: type) -> tuple[set[str], set[str], set[str]]:
    """The names of a command's arguments, which of them can be repeated, and which have a place instead of a name."""
    names, repeated, positional = set(), set(), set()
    for field in dataclasses.fields(command):
        made_by = field.default_factory
        if isinstance(made_by, type) and issubclass(made_by, Settings):
            names |= set(made_by().typed())
        elif isinstance(made_by, type) and issubclass(made_by, (ModelOptions, HubOptions)):
            names |= {option.name for option in dataclasses.fields(made_by)}
        else:
            names.add(field.name)
        if "UseAppendAction" in str(field.type):
            repeated.add(field.name)
        if "Positional" in str(field.type):
            positional.add(field.name)
    return names, repeated, positional


def _meant(typed: str, known: Collection[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(typed, known, n=1, cutoff=0.5)
    other = OTHER_NAMES.get(typed, "")
    best = next(iter(close), None)
    if other:  # a name that looks like it means something else
        best = other if other.partition(" ")[0] in known else None
    return f"; did you mean {prefix}{best}?" if best else "."
