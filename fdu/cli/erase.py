"""``fdu erase``: erase concepts from a pipeline and save the result."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

import fdu
from fdu.cli.options import HubOptions, LoadOptions, Settings, described, grouped
from fdu.concept_table import ConceptTable
from fdu.concepts import has_prompts, weighted
from fdu.config import TRAIN_METHODS
from fdu.presets import PresetName, check_preset, write_settings
from fdu.storage.loading import (
    Dtype,
    SaveAs,
    check_dtype,
    check_resolution,
    choose_device,
    is_main_process,
    result_bytes,
)
from fdu.subjects.registry import subject_of
from fdu.subjects.subject import Subject


@dataclasses.dataclass
class Erase:
    """Erase a concept from a diffusers pipeline and save the result for plain diffusers, ComfyUI and others.

    With several devices: accelerate launch -m fdu erase ...
    """

    examples: ClassVar[tuple[str, ...]] = (
        "fdu erase org/model --target 'van gogh' --anchor painting --concept_type style --out erased",
        "fdu erase ./my-pipeline --target prompts.txt --anchor cat --divergence alpha:0.5 --out erased",
        "fdu erase digits --target three --anchor digit --out erased --overwrite",
    )

    model: Positional[str]
    """A pipeline's folder, a .safetensors file, a hub id (org/name, or org/name@revision), "emoji" or "digits"."""
    target: UseAppendAction[tuple[str, ...]]
    """Concept to erase: a name, or a .txt file with one prompt per line. Repeat the option for further concepts."""
    anchor: UseAppendAction[tuple[str, ...]]
    """Concept that replaces the target, in the same forms: a superclass ("painting"), another concept, or "" for
    nothing. The pipelines of fdu do not know ""; use a superclass there. Give one anchor for all targets, or one per
    target in the same order."""
    out: Path
    """Folder for the result."""
    concepts: Path | None = None
    """Table of concepts, in place of --target and --anchor: a .csv file whose first line names the columns, or a .yaml
    file with a list of mappings. Columns: target and anchor; if wanted type, weight, prompts and anchor_prompts (in CSV
    separated by |)."""
    concept_type: UseAppendAction[tuple[Literal["object", "style"], ...]] = ()
    """Which prompt templates the names are put into: one choice for all targets, or one per target. Default: object.
    Emoji and digits have their own."""
    weights: tuple[float, ...] = ()
    """How much each target counts beside the others, > 0, in the same order. Default: 1 each."""
    preset: PresetName | None = None
    """Begin with settings of a published method, or for a kind of model; a setting given beside it wins. docs/usage.md
    says what they are and where they come from."""
    config: Path | None = None
    """YAML file of settings, one per line, as --save_config writes; a setting given beside it wins. --no_NAME switches
    off what the file switches on, such as --no_compile."""
    save_config: Path | None = None
    """Write the settings of this erasure, and how its model is loaded, to a YAML file for --config."""
    save_as: SaveAs = "auto"
    """Format of the result: lora (diffusers), kohya (ComfyUI, A1111, Forge), pipeline (a whole folder) or delta (the
    changed weights in safetensors). auto: lora if adapters were trained, otherwise pipeline."""
    overwrite: bool = False
    """Replace OUT if fdu wrote it. Other files are never replaced."""
    dtype: Dtype = "auto"
    """Dtype of the weights. auto: float32, or the dtype of --mixed_precision."""
    device: str = "auto"
    """Device to run on: cpu, cuda, mps, or auto for the first accelerator found."""
    loading: Annotated[OmitArgPrefixes[LoadOptions], arg(name="")] = dataclasses.field(
        default_factory=described(LoadOptions)
    )
    hub: Annotated[OmitArgPrefixes[HubOptions], arg(name="")] = dataclasses.field(default_factory=described(HubOptions))
    push_unevaluated: bool = False
    """With --push_to_hub: push although the model card has no figures yet. Otherwise `fdu evaluate` pushes."""
    settings: Annotated[OmitArgPrefixes[Settings], arg(name="")] = dataclasses.field(default_factory=grouped())

    def prepare(self, command: str) -> Callable[[], None]:
        """Check the arguments and return the work."""
        from fdu.models.families import denoiser_of
        from fdu.storage.formats import choose_format
        from fdu.storage.output import check_output, clear_run, strangers, whole_folder

        table = ConceptTable.read(self.concepts) if self.concepts is not None else None
        if table and (self.target or self.anchor or self.concept_type or self.weights):
            raise ValueError(
                "--concepts holds targets, anchors, types and weights; leave out --target, --anchor, --concept_type "
                "and --weights"
            )
        if not table and not self.target:
            raise ValueError("--target is missing; name the concept to erase, such as --target 'van gogh'")
        if not table and not self.anchor:
            raise ValueError(
                "--anchor is missing; name the concept that replaces the target: a superclass such as --anchor "
                "painting, another concept, or --anchor '' for nothing"
            )
        types = self.concept_type[0] if len(self.concept_type) == 1 else self.concept_type or "object"
        named = (table.targets, table.anchors, table.types) if table else (self.target, self.anchor, types)
        model = subject_of(self.loading.location(self.model))
        pairs = weighted(model.pairs(*named), self.weights)
        checkpoints = Path(f"{self.out}.checkpoints")
        given = config = self.settings.checked(checkpoint_dir=str(checkpoints))
        check_resolution(model.folder, config.size)
        keeps = self.settings.typed()["checkpoint_dir"] is None
        if keeps and strangers(checkpoints):
            raise FileExistsError(
                f"checkpoint folder {str(checkpoints)!r} holds {strangers(checkpoints)[0].name!r}, which fdu did not "
                "write; choose another with --checkpoint_dir"
            )
        files = [name for name in (*self.target, *self.anchor) if name.endswith(".txt")]
        files += [str(self.concepts)] if table else []
        inputs = [*files, *map(str, model.places), *self.loading.base_lora]
        if self.save_config is not None:
            shown = f"save_config {str(self.save_config)!r}"
            if self.save_config.is_dir() or self.out.resolve() in self.save_config.resolve().parents:
                raise ValueError(f"{shown} must be a file outside of OUT; choose another name")
            if self.save_config.exists() and not self.overwrite:
                raise FileExistsError(f"{shown} exists; choose another name or add --overwrite")
        check_output(self.out, self.overwrite, result_bytes(model.places, config.train_method, self.save_as), inputs)
        if TRAIN_METHODS[config.train_method].trains:
            dtype = check_dtype(self.dtype, config.mixed_precision)
        else:
            dtype = "float32" if self.dtype == "auto" else self.dtype
        if not has_prompts([*named[0], *named[1]]):
            config = model.with_preserved(config, [(target.name, anchor.name) for target, anchor in pairs])
        self.loading.check(config)
        device = choose_device(self.device)
        evaluate = ["fdu", "evaluate", self.model, str(self.out), *self.loading.words()]
        if self.hub.push_to_hub != self.push_unevaluated:
            repository = ["--hub_model_id", self.hub.hub_model_id] if self.hub.hub_model_id else []
            raise ValueError(
                "push_to_hub: the erasure is pushed once its evaluation is in the model card. Leave it out here, then "
                f"run: {shlex.join([*evaluate, '--push_to_hub', *repository])}; or add --push_unevaluated"
                if self.hub.push_to_hub
                else "push_unevaluated has no effect without --push_to_hub; add that option, or leave it out"
            )
        upload = self.hub.upload(self.out)

        def work() -> None:
            writes = is_main_process()
            if self.save_config is not None and writes:
                dtype_given = {} if self.dtype == "auto" else {"dtype": self.dtype}
                write_settings(self.save_config, given, {**dtype_given, **self.loading.given()})
            try:
                with whole_folder(self.out, self.overwrite) if writes else nullcontext() as folder:
                    pipeline = model.load(dtype, device, *self.loading.arguments)
                    if self.preset is not None:
                        check_preset(self.preset, denoiser_of(pipeline, config.size, config.num_frames).family)
                    format = choose_format(self.save_as, config.train_method, pipeline)
                    targets, anchors = ([pair[side] for pair in pairs] for side in (0, 1))
                    result = fdu.erase(pipeline, targets, anchors, config=config)
                    if folder is not None:
                        result.save(folder, save_as=format, command=command)
            except BlockingIOError:
                raise  # the checkpoints are those of the run that is in the way
            except BaseException:
                if keeps and writes:
                    _tidy_checkpoints(checkpoints)
                raise
            if not writes:
                return
            if keeps:
                clear_run(checkpoints)
            loading = _loading_line(model, self.out, format, config.train_method, self.loading.base_lora)
            print(f"Saved to {self.out} after {result.seconds:.1f} s. {loading}")
            for edit in result.edits:
                layers = "layer reads" if edit.layers == 1 else "layers read"
                words = f"{edit.layers} {layers} the {edit.input} of the text"
                print(f"Closed form: {words}; edited at rank {edit.rank}, relative error {edit.error:.1g}.")
            if not config.max_train_steps and not result.edits:
                print("Nothing was trained: max_train_steps is 0.")
            print(f"Evaluate it with: {shlex.join(evaluate)}")
            if upload is not None:
                print(f"Pushed to {upload.push(self.out, unevaluated=True)}")

        return work


def _loading_line(model: Subject, out: Path, format: str, train_method: str, base_lora: Sequence[str] = ()) -> str:
    """How to load the result."""
    base = model.loading_code
    if base_lora and format in ("lora", "kohya"):
        base = f"fdu.load_pipeline({model.model!r}, base_lora={[*base_lora]})"
    by_fdu = f"In Python:\n  pipeline = {base}; fdu.load_weights(pipeline, {str(out)!r})"
    if format == "kohya":
        programs = f"In ComfyUI, Forge or A1111: put {out / 'kohya_lora.safetensors'} into the folder for LoRAs."
        return by_fdu if TRAIN_METHODS[train_method].result == "dora" else programs
    return {
        "lora": by_fdu if base_lora else f"In Python:\n  pipeline = {base}; pipeline.load_lora_weights({str(out)!r})",
        "pipeline": f"In Python:\n  pipeline = DiffusionPipeline.from_pretrained({str(out)!r})",
        "delta": by_fdu,
    }[format]


def _tidy_checkpoints(folder: Path) -> None:
    """After a run that failed: name what it can go on from, or remove the empty folder."""
    from fdu.storage.output import clear_run

    if any(folder.rglob("checkpoint-[0-9]*")):
        print(f"fdu: checkpoint saved in {folder}; resume with --resume_from_checkpoint latest", file=sys.stderr)
    elif any(folder.glob("adversary-*")):
        print(f"fdu: the finished searches are in {folder}; the same command goes on from them", file=sys.stderr)
    else:
        clear_run(folder)
