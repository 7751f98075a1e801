"""``fdu demo``: erase a concept from a pipeline of fdu, judge the result, and report it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import OmitArgPrefixes, Positional, arg

import fdu
from fdu.cli.options import Settings, grouped
from fdu.config import Count, check_choice, check_number
from fdu.storage.loading import check_resolution, choose_device, describe_device
from fdu.storage.output import DEMO_FOLDER, WEIGHTS_FOLDER
from fdu.subjects.embedded import EMBEDDED


@dataclasses.dataclass
class Demo:
    """Erase a concept from a pipeline that comes with fdu, evaluate the result, and write a report.

    Needs no download and no GPU. OUT receives metrics.json, report.html, before-after.png and the weights in erased/.
    A demo replaces the output of an earlier demo.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "fdu demo",
        "fdu demo digits --target red --anchor black --out red-out",
        "fdu demo digits --divergence pearson_chi2 --s0 4 --max_train_steps 100",
    )

    model: Positional[str] = EMBEDDED[0].name
    """The pipeline: emoji in four styles, or digits in four inks. The digits are faster."""
    out: Path = Path(DEMO_FOLDER)
    """Folder for the results."""
    target: str | None = None
    """Concept to erase, one that `fdu names MODEL` lists. Default: fox, or three on the digits. Give both --target and
    --anchor, or neither."""
    anchor: str | None = None
    """Concept that replaces it, another one that `fdu names MODEL` lists. Default: wolf, or eight on the digits."""
    images_per_class: int = 24
    """Images per class for the judge, before and after, >= 1."""
    device: str = "cpu"
    """Device to run on: cpu, cuda, mps or auto."""
    settings: Annotated[OmitArgPrefixes[Settings], arg(name="")] = dataclasses.field(default_factory=grouped())

    def prepare(self, command: str) -> Callable[[], None]:
        """Check the arguments and return the work."""
        check_number("images_per_class", self.images_per_class, Count)
        check_choice("MODEL", self.model, [one.name for one in EMBEDDED])
        model = next(one() for one in EMBEDDED if one.name == self.model)
        if (self.target is None) != (self.anchor is None):
            missing = "anchor" if self.anchor is None else "target"
            raise ValueError(
                f"{missing} is missing; add --{missing} with one of the names that `fdu names {self.model}` lists"
            )
        named = model.example if self.target is None or self.anchor is None else (self.target, self.anchor)
        ((target, anchor),) = model.pairs([named[0]], [named[1]])
        config = model.with_preserved(self.settings.checked(), [(target.name, anchor.name)])
        exam = model.exam(target.name, record={"concepts": [[target.name, anchor.name]]})
        check_resolution(model.folder, config.size)
        check_demo_output(self.out)
        device = choose_device(self.device)

        def work() -> None:
            from fdu.evaluation import JUDGED_SEED
            from fdu.evaluation.tables import summary
            from fdu.report import PICTURE, REPORT, Conditions, EvaluatedRun, write_run
            from fdu.report.advice import next_lines
            from fdu.storage.output import METRICS_FILE, whole_folder

            with whole_folder(self.out, overwrite=True) as folder:
                result = fdu.erase(model.load(device=device), target, anchor, config=config)
                panel = exam.panel(device)
                seed = config.seed + JUDGED_SEED
                drawing = {"images_per_class": self.images_per_class, "seed": seed, **model.sampling.settings()}
                with result.original() as original:
                    before = fdu.draw(original, panel.probes, description="before", **drawing)
                after = fdu.draw(result.pipeline, panel.probes, description="after", **drawing)
                evaluation = fdu.evaluate(before, after, panel.probes, panel.features)
                result.save(folder / WEIGHTS_FOLDER, evaluation=evaluation, probes=panel.probes)
                told = (result.record(), command, describe_device(device), model.notes)
                conditions = Conditions(seed, model.sampling, panel.judge, "float32")
                run = EvaluatedRun.of(evaluation, panel.probes, before, after, *told, conditions=conditions)
                write_run(folder, run)
            print(f"\n{summary(evaluation, panel.probes)}\n\n{next_lines(run)}\n")
            written = {"report": REPORT, "figures": METRICS_FILE, "picture": PICTURE, "weights": WEIGHTS_FOLDER}
            for name, file in written.items():
                print(f"{name:8} {self.out / file}")

        return work


def check_demo_output(folder: Path) -> None:
    """Like :func:`fdu.storage.output.check_output`, but allow the output of an earlier demo.

    Raises:
        FileExistsError: the folder holds anything else.
        OSError: it cannot be written.
    """
    from fdu.report import IMAGES_FOLDER, PICTURE, REPORT
    from fdu.storage.output import METRICS_FILE, check_output, written_by_fdu

    former = {METRICS_FILE, REPORT, PICTURE, IMAGES_FOLDER, WEIGHTS_FOLDER} if written_by_fdu(folder) else set()
    others = sorted({path.name for path in folder.iterdir()} - former) if folder.is_dir() else []
    if others:
        raise FileExistsError(
            f"output folder {str(folder)!r} holds {others[0]!r}, which was not written by a demo; "
            "choose another with --out"
        )
    check_output(folder, overwrite=True)
