"""The command ``fdu``: each subcommand a dataclass that checks everything first, and then works."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

import fdu
from fdu.config import EraseConfig
from fdu.loading import (
    EMBEDDED,
    Dtype,
    SaveAs,
    check_dtype,
    check_erased,
    check_model,
    choose_device,
    describe_device,
    is_embedded,
    is_main_process,
    load_erased,
    load_model,
    model_folder,
    read_record,
    result_bytes,
)

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done; a run failed; wrong arguments, nothing was done; Ctrl-C."""

USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError)
"""What a user can cause, told in a line or two; anything else is a fault of fdu and keeps its traceback."""


class Settings(EraseConfig):
    """Settings of the erasure, named as in diffusers' training examples."""

    def __post_init__(self) -> None:
        """Nothing: what was typed is checked when it becomes an EraseConfig, so that errors read alike everywhere."""

    def checked(self, **others: Any) -> EraseConfig:
        """The settings, checked, with ``others`` for those that were not given."""
        given = {name: getattr(self, name) for name in EraseConfig.field_names()}
        return EraseConfig(**{**given, **{name: value for name, value in others.items() if given[name] is None}})


@dataclasses.dataclass
class Demo:
    """Erase a digit or an ink from the embedded pipeline, judge it, and write figures and a report.

    Needs no download and no GPU. OUT receives metrics.json, report.html, before-after.png and the weights in erased/.
    A folder of a former demo is replaced.
    """

    out: Path = Path("demo-out")
    """Folder for the results."""
    target: str = "three"
    """What to erase: a digit (zero ... nine) or an ink (black, red, green, blue)."""
    anchor: str = "eight"
    """What takes its place: another digit or ink, or "digit" for the superclass."""
    images_per_class: int = 32
    """Images that the judge sees of every class, before and after."""
    device: str = "cpu"
    """Device to run on: cpu, cuda, mps or auto."""
    settings: OmitArgPrefixes[Settings] = dataclasses.field(default_factory=Settings)

    def prepare(self, command: str) -> Callable[[], None]:
        """Check everything; the work is what comes back."""
        from fdu.concepts import concept_pair

        concept_pair(self.target, self.anchor)
        _check_images(self.images_per_class)
        config = self.settings.checked()
        from fdu import demo, embedded

        demo.check_demo_output(self.out)
        target, anchor = embedded.concepts(self.target, self.anchor)
        config = demo.with_preserved(config, target.name)
        device = choose_device(self.device)

        def work() -> None:
            evaluation, probes = demo.run_demo(self.out, target, anchor, config, self.images_per_class, device, command)
            _print_evaluation(evaluation, probes)
            print()
            print(f"report   {self.out / demo.REPORT}")
            print(f"figures  {self.out / demo.METRICS}")
            print(f"picture  {self.out / demo.PICTURE}")
            print(f"weights  {self.out / demo.WEIGHTS}")

        return work


@dataclasses.dataclass
class Erase:
    """Erase a concept from a diffusers pipeline and save the result for plain diffusers, ComfyUI and others.

    With several devices: accelerate launch -m fdu erase ...
    """

    model: Positional[str]
    """A pipeline's folder, a hub id (org/name), or "embedded"."""
    target: UseAppendAction[tuple[str, ...]]
    """What to erase: a name, or a .txt file of prompts, one a line. Give it again for a further concept."""
    anchor: UseAppendAction[tuple[str, ...]]
    """What takes its place, in the same forms: a superclass ("painting"), another concept, or "" for nothing; the
    embedded pipeline does not know "" and takes "digit". One for all targets, or one each, in their order."""
    out: Path
    """Folder for the result."""
    concept_type: UseAppendAction[tuple[Literal["object", "style"], ...]] = ()
    """The phrasings that names are put into, object if not given; one for all targets, or one each. The embedded
    pipeline has its own."""
    save_as: SaveAs = "auto"
    """Form of the result: lora (diffusers), kohya (ComfyUI, A1111, Forge), pipeline (a whole folder), delta (what
    changed, in safetensors); auto is lora where adapters were trained, and pipeline elsewhere."""
    overwrite: bool = False
    """Replace OUT if fdu wrote it; anything else is never replaced."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is float32, or the type of --mixed_precision."""
    device: str = "auto"
    """Device to run on: cpu, cuda, mps, or auto for the first accelerator there is."""
    settings: OmitArgPrefixes[Settings] = dataclasses.field(default_factory=Settings)

    def prepare(self, command: str) -> Callable[[], None]:
        """Check everything; the work is what comes back."""
        from fdu.concepts import concept_pairs, read_concepts
        from fdu.output import check_output, clear_run, strangers, whole_folder
        from fdu.weights import choose_format

        types = self.concept_type[0] if len(self.concept_type) == 1 else self.concept_type or "object"
        pairs = concept_pairs(read_concepts(self.target), read_concepts(self.anchor), types)
        check_model(self.model)
        checkpoints = Path(f"{self.out}.checkpoints")
        config = self.settings.checked(checkpoint_dir=str(checkpoints))
        keeps = self.settings.checkpoint_dir is None
        if keeps and strangers(checkpoints):
            raise FileExistsError(
                f"{str(checkpoints)!r}, where the run would keep its checkpoints, holds "
                f"{strangers(checkpoints)[0].name!r}, which fdu did not write; "
                "name another folder with --checkpoint_dir"
            )
        files = [name for name in (*self.target, *self.anchor) if name.endswith(".txt")]
        inputs = files + [str(folder) for folder in [model_folder(self.model)] if folder]
        check_output(self.out, self.overwrite, result_bytes(self.model, config.train_method, self.save_as), inputs)
        dtype = check_dtype(self.dtype, config.mixed_precision)
        if is_embedded(self.model) and not files:
            from fdu import demo, embedded

            anchors = self.anchor * len(self.target) if len(self.anchor) == 1 else self.anchor
            named = zip(self.target, anchors, strict=True)
            pairs = tuple(embedded.concepts(target.strip(), anchor.strip()) for target, anchor in named)
            config = demo.with_preserved(config, *(target.name for target, _ in pairs))
        device = choose_device(self.device)

        def work() -> None:
            writes = is_main_process()
            try:
                with whole_folder(self.out, self.overwrite) if writes else nullcontext() as folder:
                    pipeline = load_model(self.model, dtype, device)
                    format = choose_format(self.save_as, config.train_method, pipeline)
                    targets, anchors = ([pair[side] for pair in pairs] for side in (0, 1))
                    result = fdu.erase(pipeline, targets, anchors, config=config)
                    if folder is not None:
                        result.save(folder, save_as=format)
            except BaseException:
                if keeps and writes:
                    _tidy_checkpoints(checkpoints)
                raise
            if not writes:
                return
            if keeps:
                clear_run(checkpoints)
            loading = _loading_line(self.model, self.out, format, config.train_method)
            print(f"Saved to {self.out} after {result.seconds:.0f} s. {loading}")
            if is_embedded(self.model):
                print(f"Judge it with: {shlex.join(['fdu', 'evaluate', EMBEDDED, str(self.out)])}")

        return work


@dataclasses.dataclass
class Evaluate:
    """Draw with a pipeline before and after an erasure, and let an independent judge count.

    The judge of the embedded pipeline comes with fdu. For other models, give your own in Python: fdu.evaluate with
    fdu.Probe.
    """

    base: Positional[str]
    """The pipeline before: "embedded"."""
    erased: Positional[str]
    """The folder that `fdu erase` or ErasureResult.save wrote; or weights that others made, in any form that
    fdu.weights.load_weights reads."""
    target: str | None = None
    """What was erased; need not be given if ERASED tells. Of several concepts, the one to judge."""
    images_per_class: int = 32
    """Images that the judge sees of every class, before and after."""
    seed: int = 0
    """Images are drawn with the seeds from SEED + 1000 on, which no training uses."""
    out: Path | None = None
    """Folder for metrics.json and report.html."""
    overwrite: bool = False
    """Replace OUT if fdu wrote it; anything else is never replaced."""
    device: str = "cpu"
    """Device to run on: cpu, cuda, mps or auto."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Check everything; the work is what comes back."""
        from fdu.output import check_output, whole_folder

        check_model(self.base, "BASE")
        check_erased(self.erased)
        if not is_embedded(self.base):
            raise ValueError(
                f"BASE {self.base!r}: the command line has a judge for the embedded pipeline only; "
                "for other models give a classifier through the Python API: fdu.evaluate with fdu.Probe"
            )
        _check_images(self.images_per_class)
        record = read_record(self.erased)
        erased = [target for target, _ in record.get("concepts", [])] if record else []
        if record and not erased:
            erased = [record["target"]["name"]]
        target = self.target or (erased[0] if len(erased) == 1 else None)
        if target is None:
            told = f"says that it erased {' and '.join(erased)}" if erased else "does not tell what was erased"
            raise ValueError(f"target is missing: ERASED {self.erased!r} {told}; add --target")
        if self.out is not None:
            check_output(self.out, self.overwrite, inputs=[self.erased])
        from fdu import demo, embedded
        from fdu.evaluation import JUDGED_SEED

        embedded.concepts(target, embedded.SUPERCLASS)
        device = choose_device(self.device)

        def work() -> None:
            probes = embedded.probes(target, *(name for name in erased if name != target))
            settings = {"images_per_class": self.images_per_class, "seed": self.seed + JUDGED_SEED}
            pipeline = load_model(EMBEDDED, device=device)
            before = fdu.draw(pipeline, probes, description="before", **settings)
            after = fdu.draw(load_erased(pipeline, self.erased, device), probes, description="after", **settings)
            evaluation = fdu.evaluate(before, after, probes)
            _print_evaluation(evaluation, probes)
            if self.out is not None:
                with whole_folder(self.out, self.overwrite) as folder:
                    described = describe_device(device)
                    demo.write_figures(folder, evaluation, probes, before, after, record, command, described)
                print(f"\nreport   {self.out / demo.REPORT}\nfigures  {self.out / demo.METRICS}")

        return work


@dataclasses.dataclass
class Divergences:
    """List the divergences that --divergence takes."""

    json: bool = False
    """Print JSON instead of a table."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Nothing to check; the work is what comes back."""

        def work() -> None:
            from fdu.divergences import rows, table

            print(json.dumps(rows(), indent=1) if self.json else table(rows()))

        return work


@dataclasses.dataclass
class Doctor:
    """Look whether fdu can run here: versions, devices, kernels, disk; and how to mend what is missing.

    Exits with 0 if fdu can run and with 1 if not.
    """

    def prepare(self, command: str) -> Callable[[], None]:
        """Nothing to check; the work is what comes back."""

        def work() -> None:
            from fdu.doctor import examine, healthy, render

            findings = examine()
            print(render(findings))
            if not healthy(findings):
                sys.exit(FAILED)

        return work


Command = Demo | Erase | Evaluate | Divergences | Doctor
COMMANDS: dict[str, Callable[..., Command]] = {
    "demo": Demo,
    "erase": Erase,
    "evaluate": Evaluate,
    "divergences": Divergences,
    "doctor": Doctor,
}

DESCRIPTION = "Concept erasure for diffusers pipelines by f-divergence minimisation."
EXAMPLES = {
    "": (
        "fdu demo",
        "fdu erase org/model --target 'van gogh' --anchor painting --concept_type style --out erased",
        "fdu doctor",
    ),
    "demo": (
        "fdu demo",
        "fdu demo --target red --anchor black --out red-out",
        "fdu demo --divergence pearson_chi2 --s0 4 --max_train_steps 100",
    ),
    "erase": (
        "fdu erase org/model --target 'van gogh' --anchor painting --concept_type style --out erased",
        "fdu erase ./my-pipeline --target prompts.txt --anchor cat --divergence alpha:0.5 --out erased",
        "fdu erase embedded --target three --anchor digit --out erased --overwrite",
    ),
    "evaluate": ("fdu evaluate embedded erased", "fdu evaluate embedded erased --target three --out evaluation"),
    "divergences": ("fdu divergences", "fdu divergences --json"),
    "doctor": ("fdu doctor",),
}
"""Printed at the end of the help of each command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (of the process, if None) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("FDU_DEBUG", "0") not in ("", "0")
    given = [argument for argument in given if argument != "--debug"]
    if given[:1] == ["--version"]:
        print(f"fdu {fdu.__version__}")
        return OK
    _quiet()
    phase = USAGE
    try:
        command = _parse(given or ["--help"])
        work = command.prepare(shlex.join(["fdu", *given]))
        phase = FAILED
        work()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK
    except KeyboardInterrupt:
        print("\nfdu: interrupted; nothing half-written is left behind", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        print(f"fdu: error: {error}", file=sys.stderr)
        if phase == FAILED and not debug:
            print("fdu: --debug shows where it happened", file=sys.stderr)
        return phase
    return OK


def _parse(arguments: list[str]) -> Command:
    """The command that the arguments describe. Help, which ends with examples, and wrong usage end in SystemExit."""
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="fdu",
            description=DESCRIPTION,
            args=arguments,
            use_underscores=True,
            config=(tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
        )
    except SystemExit as stop:
        if stop.code in (OK, None):
            name = arguments[0] if arguments[0] in COMMANDS else ""
            print("examples:", *(f"  {example}" for example in EXAMPLES[name]), sep="\n")
            print("\n--debug, or FDU_DEBUG=1, shows the traceback of an error; fdu --version prints the version.")
        raise


def _check_images(images_per_class: int) -> None:
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be >= 1, got {images_per_class}")


def _print_evaluation(evaluation: fdu.Evaluation, probes: list[fdu.Probe]) -> None:
    from fdu.verdict import judge, table

    print(f"\n{table(evaluation, probes)}\n\n{judge(evaluation, probes).headline}.")


def _loading_line(model: str, out: Path, format: str, train_method: str) -> str:
    """How the result is loaded."""
    base = "fdu.embedded.load_pipeline()" if is_embedded(model) else f"DiffusionPipeline.from_pretrained({model!r})"
    by_fdu = f"In Python:\n  pipeline = {base}; fdu.weights.load_weights(pipeline, {str(out)!r})"
    if format == "kohya":
        programs = f"In ComfyUI, Forge or A1111: put {out / 'kohya_lora.safetensors'} into the folder for LoRAs."
        return by_fdu if train_method == "dora" else programs
    return {
        "lora": f"In plain diffusers:\n  pipeline = {base}; pipeline.load_lora_weights({str(out)!r})",
        "pipeline": f"In plain diffusers:\n  pipeline = DiffusionPipeline.from_pretrained({str(out)!r})",
        "delta": by_fdu,
    }[format]


def _tidy_checkpoints(folder: Path) -> None:
    """After a run that did not end well: say what can go on, or leave nothing."""
    from fdu.output import clear_run

    if any(folder.glob("checkpoint-*")):
        print(f"fdu: its state is in {folder}; go on with --resume_from_checkpoint latest", file=sys.stderr)
    else:
        clear_run(folder)


def _quiet() -> None:
    """Silence what transformers and diffusers say on every start and nobody can act on; nothing else."""
    beside_the_point = ("requires torchvision", "You have disabled the safety checker")

    def relevant(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in beside_the_point)

    for name in (
        "transformers.utils.import_utils",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.pipelines.pipeline_utils",
    ):
        logging.getLogger(name).addFilter(relevant)
    warnings.filterwarnings("ignore", message=".*torchvision.*")
