"""``fdu evaluate``: draw before and after an erasure, and let an independent judge count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from tyro.conf import Positional

import fdu
from fdu.cli.printing import print_evaluation
from fdu.cli.settings import check_images
from fdu.loading import (
    EMBEDDED,
    check_erased,
    check_model,
    choose_device,
    describe_device,
    is_embedded,
    load_erased,
    load_model,
    read_record,
)


@dataclasses.dataclass
class Evaluate:
    """Draw with a pipeline before and after an erasure, and let an independent judge count.

    The judge of the embedded pipeline comes with fdu. For other models, give your own in Python: fdu.evaluate with
    fdu.Probe.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "fdu evaluate embedded erased",
        "fdu evaluate embedded erased --target three --out evaluation",
    )

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
        check_images(self.images_per_class)
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
            print_evaluation(evaluation, probes)
            if self.out is not None:
                with whole_folder(self.out, self.overwrite) as folder:
                    described = describe_device(device)
                    demo.write_figures(folder, evaluation, probes, before, after, record, command, described)
                print(f"\nreport   {self.out / demo.REPORT}\nfigures  {self.out / demo.METRICS}")

        return work
