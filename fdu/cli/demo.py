"""``fdu demo``: erase a concept from the embedded pipeline, judge it, report it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import OmitArgPrefixes, arg

from fdu.cli.printing import print_evaluation
from fdu.cli.settings import Settings, check_images, grouped
from fdu.storage.loading import check_resolution, choose_device
from fdu.subjects.registry import subject_of


@dataclasses.dataclass
class Demo:
    """Erase a digit or an ink colour from the embedded pipeline, evaluate the result, and write a report.

    Needs no download and no GPU. OUT receives metrics.json, report.html, before-after.png and the weights in erased/.
    The output of an earlier demo is replaced.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "fdu demo",
        "fdu demo --target red --anchor black --out red-out",
        "fdu demo --divergence pearson_chi2 --s0 4 --max_train_steps 100",
    )

    out: Path = Path("demo-out")
    """Folder for the results."""
    target: str = "three"
    """Concept to erase: a digit (zero ... nine) or an ink colour (black, red, green, blue)."""
    anchor: str = "eight"
    """Concept that replaces it: another digit or ink colour, or "digit" for the superclass."""
    images_per_class: int = 32
    """Images per class for the judge, before and after, >= 1."""
    device: str = "cpu"
    """Device to run on: cpu, cuda, mps or auto."""
    settings: Annotated[OmitArgPrefixes[Settings], arg(name="")] = dataclasses.field(default_factory=grouped())

    def prepare(self, command: str) -> Callable[[], None]:
        """Check everything; the work is what comes back."""
        check_images(self.images_per_class)
        model = subject_of("embedded")
        pairs = model.pairs([self.target], [self.anchor])
        config = model.with_preserved(self.settings.checked(), [self.target])
        check_resolution(model.folder, config.resolution)
        from fdu.cli import demonstration
        from fdu.report import PICTURE, REPORT
        from fdu.storage.output import METRICS_FILE

        demonstration.check_demo_output(self.out)
        device = choose_device(self.device)

        def work() -> None:
            evaluation, probes = demonstration.run_demo(
                self.out, model, pairs[0], config, self.images_per_class, device, command
            )
            print_evaluation(evaluation, probes)
            print()
            print(f"report   {self.out / REPORT}")
            print(f"figures  {self.out / METRICS_FILE}")
            print(f"picture  {self.out / PICTURE}")
            print(f"weights  {self.out / demonstration.WEIGHTS}")

        return work
