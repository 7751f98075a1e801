"""``fdu evaluate`` draws before and after an erasure and measures both; ``fdu report`` regenerates its page."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

import fdu
from fdu.cli.options import HubOptions, LoadOptions, described
from fdu.config import Count, Natural, check_number, image_size
from fdu.storage.loading import (
    Dtype,
    check_encoder,
    check_erased,
    check_resolution,
    check_target_judge,
    choose_device,
    describe_device,
    erased_pairs,
    load_erased,
    load_model,
    read_record,
)
from fdu.storage.output import PIPELINE_FILE
from fdu.subjects.registry import subject_of
from fdu.subjects.subject import Exam, Subject, joint_panel

if TYPE_CHECKING:
    from fdu.evaluation import Sampling
    from fdu.evaluation.robustness import Examination
    from fdu.evaluation.robustness.phrasings import PromptSets


TargetJudge = Literal["nudenet"]
RobustnessTest = Literal[
    "phrasings", "attack", "relearning", "words", "direction", "inversion", "partial_noise", "inpainting"
]


@dataclasses.dataclass
class Evaluate:
    """Draw images before and after an erasure; report whether the concept is gone and what else changed.

    Classifiers judge emoji and digits. CLIP, used zero-shot, judges other models.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "fdu evaluate digits erased",
        "fdu evaluate digits erased --target three --out evaluation",
        "fdu evaluate org/model erased --target 'van gogh' --device cuda --out evaluation",
        "fdu evaluate org/model erased --prompts my-concept.txt --judge ./clip-vit-large-patch14",
        "fdu evaluate digits erased --robustness --out evaluation",
        "fdu evaluate digits erased --robustness phrasings attack",
        "fdu evaluate org/model erased --push_to_hub --hub_model_id me/model-without-van-gogh",
    )

    base: Positional[str]
    """The pipeline before: a folder, a .safetensors file, a hub id (org/name), "emoji" or "digits"."""
    erased: Positional[str]
    """Folder written by `fdu erase` or ErasureResult.save, whose model card receives the figures, or weights from
    another program in any format that fdu.load_weights reads."""
    target: UseAppendAction[tuple[str, ...]] = ()
    """Erased concept to judge; repeat for several. Default: all that ERASED records, or the one of --prompts."""
    prompts: str | None = None
    """Prompts to draw: a concept set of the package ("van gogh", monet, r2d2, snoopy, "grumpy cat", nemo), a .txt file
    in that format (see fdu/subjects/prompts.txt), or a .csv file of the target's prompts with a column prompt and, if
    wanted, evaluation_seed and evaluation_guidance, as of I2P. Default: the set with the target's name, otherwise the
    training prompts, plus everyday subjects to retain but no neighbours. Emoji and digits have their own."""
    judge: str | None = None
    """Image-text encoder that judges: a folder or hub id of CLIP or SigLIP. Default: openai/clip-vit-base-patch32. On
    emoji and digits it computes distances and CLIP scores, and their classifiers still judge."""
    target_judge: TargetJudge | None = None
    """Who judges the target's images, in place of the encoder: nudenet, for nudity (needs nudenet). The model card then
    shows no images."""
    images_per_class: int = 32
    """Images per class, before and after, >= 1."""
    num_inference_steps: int | None = None
    """Sampling steps per image, >= 1. Default: the pipeline's own; 20 on emoji and digits."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale, >= 0. Default: the pipeline's own; 2 on emoji, 3 on digits."""
    resolution: int | None = None
    """Height and width of the images in pixels, >= 1. Default: the pipeline's own."""
    height: int | None = None
    """Height in pixels of images that are not square, together with --width and instead of --resolution."""
    width: int | None = None
    """Width in pixels, together with --height."""
    batch_size: int | None = None
    """Images drawn at a time, >= 1. Default: 4; 32 on emoji and digits."""
    seed: int = 0
    """Random seed, >= 0. Images use the seeds from SEED + 1000 on; training uses those from SEED on, so that images and
    training share none."""
    robustness: Annotated[tuple[RobustnessTest, ...] | None, arg(metavar="[TEST ...]")] = None
    """Also test whether the erasure holds: phrasings (other prompts), attack (on the text embedding), relearning (from
    images), words (put before the prompts), direction (prompts without the name), inversion (of the name's embedding),
    partial_noise and inpainting (from images of the target). Without names: the first three."""
    robustness_batch_size: int | None = None
    """Images per batch in the robustness tests, >= 1; these also train and so need more memory. Default: --batch_size
    for drawing, 16 for training."""
    phrasings: Path | None = None
    """Text file for the test "phrasings": sections such as [paraphrases], one prompt per line. Default: the prompt sets
    of fdu."""
    out: Path | None = None
    """Folder for metrics.json, images and report.html. Default: none; the figures are only printed."""
    overwrite: bool = False
    """Replace OUT if fdu wrote it. Other files are never replaced."""
    dtype: Dtype = "auto"
    """Dtype of the pipeline's weights. auto: float32."""
    device: str = "auto"
    """Device to run on: cpu, cuda, mps, or auto for the first accelerator found."""
    loading: Annotated[OmitArgPrefixes[LoadOptions], arg(name="")] = dataclasses.field(
        default_factory=described(LoadOptions)
    )
    hub: Annotated[OmitArgPrefixes[HubOptions], arg(name="")] = dataclasses.field(default_factory=described(HubOptions))
    card_without_images: bool = False
    """Show no images in the model card of ERASED."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Check the arguments and return the work."""
        from fdu.report.card import CARD_FILE, fill_in, read_card
        from fdu.storage.output import METRICS_FILE, RECORD_FILE, check_output, sole_output, whole_folder

        base = subject_of(self.loading.location(self.base), "BASE")
        self.loading.check()
        check_erased(self.erased)
        check_number("images_per_class", self.images_per_class, Count)
        check_number("seed", self.seed, Natural)
        if self.judge is not None:
            check_encoder(self.judge)
        if self.target_judge is not None:
            check_target_judge(self.target_judge)
        record = read_record(self.erased)
        if record is not None:
            from fdu.report import check_record

            check_record(record, f"ERASED {self.erased!r}: record")
        erased = [target for target, _ in erased_pairs(record)] if record else []
        targets = self._targets(erased)
        erased = list(dict.fromkeys([*erased, *self.target]))
        exams = [base.exam(name, erased, self.prompts, record, self.judge, self.target_judge) for name in targets]
        first = exams[0]
        if self.out is not None:
            check_output(self.out, self.overwrite, inputs=self._inputs(base))
        from fdu.evaluation import JUDGED_SEED

        device = choose_device(self.device)
        sampling = self._sampling(base)
        size = self._size(base)
        settings: dict[str, Any] = {"images_per_class": self.images_per_class, "seed": self.seed + JUDGED_SEED}
        settings |= sampling.settings()
        if size is not None:
            settings |= {"height": size[0], "width": size[1]}
        sets = self._phrasing_sets(first)
        has_card = all((Path(self.erased) / name).is_file() for name in (RECORD_FILE, CARD_FILE))
        if self.hub.push_to_hub or has_card:
            read_card(self.erased)
        upload = self.hub.upload(Path(self.erased))
        if upload is not None and not os.access(self.erased, os.W_OK):
            raise PermissionError(
                f"ERASED {self.erased!r} cannot be written, but its card receives the figures; push from a copy"
            )
        if upload is not None and self.out and Path(self.erased).resolve() in self.out.resolve().parents:
            raise ValueError(f"out {str(self.out)!r} lies in ERASED, which is pushed whole; choose a folder outside")

        def work() -> None:
            from accelerate.utils import release_memory

            from fdu.evaluation.robustness.holding import judge_robustness
            from fdu.evaluation.tables import summary
            from fdu.models.offloading import drawable
            from fdu.report import REPORT, Conditions, EvaluatedRun, write_run
            from fdu.report.advice import next_lines
            from fdu.subjects.nudity import nudity_notes

            panel = joint_panel(exams, device)
            probes = panel.probes
            if all(probe.role != "retained" for probe in probes):
                raise ValueError(
                    "target: the concepts erased, by the record of ERASED or by --target, leave no class to retain, so "
                    "nothing would show what else the erasure changed; judge an erasure of fewer concepts"
                )
            dtype = "float32" if self.dtype == "auto" else self.dtype
            pipeline = base.load(dtype, device, *self.loading.arguments)
            before = fdu.draw(pipeline, probes, description="before", **settings)
            tests = self._examination(probes[0], sets, sampling, size)
            if tests is not None:
                with drawable(pipeline):
                    tests.before(pipeline)
            if (Path(self.erased) / PIPELINE_FILE).is_file():
                # Two models may not fit into memory.
                del pipeline
                release_memory()
                pipeline = load_model(self.erased, dtype, device, *self.loading.storage)
            else:
                pipeline = load_erased(pipeline, self.erased)
            after = fdu.draw(pipeline, probes, description="after", **settings)
            evaluation = fdu.evaluate(before, after, probes, panel.features)
            print(f"\n{summary(evaluation, probes)}")

            def run() -> EvaluatedRun:
                notes = [*base.notes, *nudity_notes(probes, before, after), *(tests.notes() if tests else ())]
                found = tests.found.as_dict() if tests and tests.found else None
                prompts = "; ".join(dict.fromkeys(exam.origin for exam in exams))
                conditions = Conditions(settings["seed"], sampling, panel.judge, dtype, size=size, prompts=prompts)
                told = (record, command, describe_device(device), notes, found, conditions)
                return EvaluatedRun.of(evaluation, probes, before, after, *told)

            def write(overwrite: bool) -> None:
                made = run()
                if self.out is not None:
                    with whole_folder(self.out, overwrite) as folder:
                        write_run(folder, made)
                if has_card:
                    try:
                        fill_in(self.erased, made, pictures=not (self.card_without_images or self.target_judge))
                    except OSError as error:
                        if upload is not None:
                            raise
                        print(f"fdu: the card in {self.erased} stays as it is: {error}", file=sys.stderr)

            # The tests take long and need more memory, so all results so far are saved before each of them.
            write(self.overwrite)
            with drawable(pipeline):
                for _ in tests.each_after(pipeline) if tests else ():
                    write(overwrite=True)
            if tests and tests.found:
                holds = judge_robustness(tests.found.as_dict(), first.target)
                print(f"\n{holds.headline}.", *holds.sentences, sep="\n  ")
            print(f"\n{next_lines(run())}")
            if self.out is not None:
                print(f"\nreport   {self.out / REPORT}\nfigures  {self.out / METRICS_FILE}")
            try:
                if tests:
                    tests.check()
            except RuntimeError:
                if upload is not None:
                    with suppress(OSError, ValueError):  # the failed test is what counts
                        upload.ready(self.erased)
                    print(f"fdu: not pushed; push with: {upload.command(self.erased)}", file=sys.stderr)
                raise
            if upload is not None:
                print(f"Pushed to {upload.push(self.erased)}")

        def alone() -> None:
            with ExitStack() as stack:
                if has_card:
                    try:
                        stack.enter_context(sole_output(self.erased))
                    except BlockingIOError:
                        raise
                    except OSError:  # where nothing can be written, the card stays as it is
                        if upload is not None:
                            raise
                if self.out is not None:
                    stack.enter_context(sole_output(self.out))
                    check_output(self.out, self.overwrite, inputs=self._inputs(base))
                work()

        return alone

    def _inputs(self, base: Subject) -> list[str | Path]:
        """The files and folders that the work reads."""
        named = [*base.places, *self.loading.base_lora, self.erased, self.phrasings]
        prompts = self.prompts if self.prompts and self.prompts.endswith((".txt", ".csv")) else None
        judge = self.judge if self.judge and Path(self.judge).is_dir() else None
        return [path for path in (*named, prompts, judge) if path is not None]

    def _sampling(self, base: Subject) -> Sampling:
        """How images are drawn."""
        size = self.robustness_batch_size
        if size is not None:
            check_number("robustness_batch_size", size, Count)
        defaults = base.sampling
        given = {name: getattr(self, name) for name in defaults.settings()}
        return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})

    def _size(self, base: Subject) -> tuple[int, int] | None:
        """Height and width of the images; None for the pipeline's own."""
        for name in ("resolution", "height", "width"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), Count)
        size = image_size(self.resolution, self.height, self.width)
        check_resolution(base.folder, size)
        return (size, size) if isinstance(size, int) else size

    def _targets(self, erased: list[str]) -> Sequence[str | None]:
        """The concepts to judge, from the command line or from the record; None for that of ``prompts``."""
        targets = self.target or (() if self.prompts else tuple(erased))
        twice = [name for name in targets if targets.count(name) > 1]
        if twice:
            raise ValueError(f"target names {twice[0]!r} twice; leave one out")
        if not targets and not self.prompts:
            raise ValueError(f"target is missing: ERASED {self.erased!r} does not record any concept; add --target")
        if len(targets) > 1 and self.prompts:
            raise ValueError(f"prompts: a concept set has one target, got {len(targets)}; give one --target")
        if len(targets) > 1 and self.robustness is not None:
            raise ValueError(f"robustness tests one concept, got {len(targets)} targets; choose one with --target")
        return targets or (None,)

    def _phrasing_sets(self, exam: Exam) -> PromptSets:
        """The prompt sets of the test "phrasings"; empty without that test."""
        if self.robustness is None:
            for name in ("phrasings", "robustness_batch_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect without --robustness; add that option, or leave {name} out")
            return {}
        if self.robustness and "phrasings" not in self.robustness:
            if self.phrasings is not None:
                raise ValueError("phrasings has no effect without the test of that name; add it to --robustness")
            return {}
        from fdu.evaluation.robustness.phrasings import packaged_sets, read_sets

        return read_sets(self.phrasings, exam.target) if self.phrasings else packaged_sets(exam.kind, exam.target)

    def _examination(
        self, probe: fdu.Probe, sets: PromptSets, sampling: Sampling, size: tuple[int, int] | None
    ) -> Examination | None:
        """The requested tests of robustness, with images drawn as for the evaluation; None if there are none."""
        if self.robustness is None:
            return None
        from fdu.evaluation.robustness import USUAL, AttackConfig, Examination, JudgedSampling, RelearningConfig

        batch: dict[str, Any] = {"batch_size": self.robustness_batch_size} if self.robustness_batch_size else {}
        return Examination(
            probe,
            sets,
            self.robustness or USUAL,
            attack_config=AttackConfig(**batch),
            relearning_config=RelearningConfig(**batch),
            drawing=JudgedSampling(images=self.images_per_class, seed=self.seed, **{**sampling.settings(), **batch}),
            size=size,
        )


@dataclasses.dataclass
class Report:
    """Regenerate the report of an evaluation, a self-contained HTML page, and its picture.

    Uses the figures and images that `fdu evaluate --out` or `fdu demo` has written there.
    """

    examples: ClassVar[tuple[str, ...]] = ("fdu report demo-out", "fdu report evaluation")

    run: Positional[Path]
    """Folder written by `fdu evaluate --out` or `fdu demo`. It receives report.html and before-after.png."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Check the arguments and return the work."""
        from fdu.report import PICTURE, check_run, make_report

        check_run(self.run)

        def work() -> None:
            path = make_report(self.run)
            print(f"report   {path}\npicture  {self.run / PICTURE}")

        return work
