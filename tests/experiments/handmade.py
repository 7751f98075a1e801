"""Records of the experiments made by hand: what a judge would have seen, as shares of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiment import Suite, embedded

from fdu.comparison.front import ATTACKED, TARGET_ROLES, Judged
from fdu.comparison.plan import Run
from fdu.comparison.sweep import Record, Records

IMAGES = 40
CONDITIONS = {"device": "cpu: AVX512, 1 thread", "versions": {"fdu": "0", "torch": "9.9"}}


class Seen(NamedTuple):
    """The figures of a run."""

    erased: float = 0.0
    retained: float = 1.0
    change: float = 0.01
    attributes: float = 1.0
    held: float = 1.0
    """Under attack, where the comparison has one."""


def judged(suite: Suite, target: str, seen: Seen) -> list[dict[str, Any]]:
    """All probes of a target with these figures."""
    anchor = dict(suite.comparison.pairs)[target]
    found = []
    for probe in embedded(suite.comparison.model).content.probes(target, anchor=anchor):
        asking = probe.role in TARGET_ROLES
        share = 1 - seen.erased if asking else seen.retained
        asked = {"style": _first(seen.attributes)} if asking else {}
        found.append(Judged(probe.role, probe.name, _first(share), (seen.change,) * IMAGES, asked).as_dict())
    if suite.comparison.attacked:
        found.append(Judged(ATTACKED, target, _first(1 - seen.held)).as_dict())
    return found


def write_records(path: Path, suites: Sequence[Suite], figures: Callable[[Suite, Run], Seen | None]) -> None:
    """The records of the runs that have figures, and of all targets before."""
    records = Records(path)
    for suite in suites:
        identities = {job.name: job.identity for job in suite.jobs(Path())}
        runs = {f"{suite.name}/{run.name}": run for run in suite.comparison.runs()}
        for name, identity in identities.items():
            run = runs.get(name)
            seen = figures(suite, run) if run else Seen()
            if seen is not None:
                content: Record = {"judged": judged(suite, identity["target"], seen), **CONDITIONS}
                more = (
                    {"sigma": 0.1, "seconds": 4.0, "core_seconds": 36.0, "distance": "1 0.5 0.1"}
                    if run
                    else {"pictured": []}
                )
                records.found[name] = {"identity": identity, **content, **more}
    records.write([])


def _first(share: float) -> tuple[bool, ...]:
    return tuple(index < round(share * IMAGES) for index in range(IMAGES))
