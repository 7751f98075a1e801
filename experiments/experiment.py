"""Parts that all experiments share: the command line, comparisons and their records, and helpers for pages."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import scipy.stats
import torch

import fdu_kernels as fk
from fdu.comparison.plan import Candidate, Comparison, Drawing
from fdu.comparison.results import Results, conditions_of, read_results
from fdu.comparison.runs import jobs as jobs_of
from fdu.comparison.sweep import Job, Record, Records, digest, sweep
from fdu.config import EraseConfig
from fdu.evaluation.intervals import LEVEL
from fdu.report.run import IMAGES_FOLDER
from fdu.subjects.embedded import EmbeddedPipeline
from fdu.subjects.registry import subject_of

HERE = Path(__file__).parent
DRAWING = {
    "emoji": Drawing(images_per_class=8, images_of_target=40, num_inference_steps=12, guidance_scale=2.0),
    "digits": Drawing(images_per_class=16, images_of_target=48, num_inference_steps=12),
}
"""How the judged images of each pipeline are drawn."""
FIGURES = {"erased": 1, "retained": 1, "attributes": 1, "change": 2}
"""The figures of tables, with their decimals in percent."""
NOT_MEASURED = "Not measured yet."


def run(
    description: str | None,
    name: str,
    jobs: Callable[[Path], Sequence[Job]],
    write_page: Callable[[Path, Path], None],
) -> None:
    """The command of an experiment: make the records that are missing or outdated, then the page.

    Args:
        description: for ``--help``.
        name: the name of the JSON Lines file.
        jobs: returns all jobs, given a folder for shared data.
        write_page: writes the page into the folder docs (second argument) from the records in a folder (first one).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--only", default="", help="make only records whose name contains this, and their baselines")
    parser.add_argument("--page_only", action="store_true", help="make no record, only the page")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the records")
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = jobs(HERE / "cache")
    if not options.page_only:
        wanted = [job for job in every if options.only in job.name]
        suites = {job.name.partition("/")[0] for job in wanted}
        # A baseline without a suite is that of all.
        first = [job for job in every if job.first and job.name.partition("/")[0] in {*suites, job.name}]
        chosen = [job for job in every if job in wanted or job in first]
        tell = functools.partial(print, flush=True)
        sweep(chosen, options.results / f"{name}.jsonl", options.workers, tell=tell)
    there = current(options.results, name, every)
    missing = [job.name for job in every if job.name not in there]
    if missing:
        print(f"{len(missing)} of {len(every)} records are missing, outdated or failed, such as {missing[0]!r}")
    write_page(options.results, HERE.parent / "docs")


def current(results: Path, name: str, jobs: Sequence[Job]) -> dict[str, Record]:
    """The records that are up to date and did not fail, by name, in the order of the jobs."""
    records = Records(results / f"{name}.jsonl")
    found = {job.name: records.of(job.name, job.identity) for job in jobs}
    return {name: record for name, record in found.items() if record is not None and "failed" not in record}


@dataclasses.dataclass(frozen=True)
class Suite:
    """A comparison whose records share a file with others; its name and a slash begin the names of its records."""

    name: str
    comparison: Comparison

    def jobs(self, cache: Path) -> list[Job]:
        """Its jobs, as :func:`fdu.comparison.runs.jobs` makes them; their pictures are in a folder of its name."""
        anchors = dict(self.comparison.pairs)
        found = []
        for job in jobs_of(self.comparison, cache, cache / self.name / IMAGES_FOLDER):
            target = job.identity["target"]
            job = dated(job, (target, anchors[target]), model=self.comparison.model)
            found.append(dataclasses.replace(job, name=f"{self.name}/{job.name}"))
        return found

    def current(self, records: Records) -> Records:
        """Its records that are up to date, by their names in the comparison."""
        own = Records(Path())
        there = {job.name: records.of(job.name, job.identity) for job in self.jobs(Path())}
        own.found = {name.partition("/")[2]: record for name, record in there.items() if record is not None}
        return own

    def results(self, records: Records) -> Results | None:
        """The results of its records that are up to date; None, and a line that says so, if there are too few."""
        try:
            return read_results(self.comparison, self.current(records))
        except ValueError as error:
            print(f"{self.name}: {error}")
            return None


def changed(settings: Mapping[str, Any]) -> Candidate:
    """The default settings with these changed."""
    others = dict(settings)
    default = EraseConfig()
    divergence, s0 = others.pop("divergence", default.divergence), others.pop("s0", default.s0)
    return Candidate(divergence, s0, tuple(others.items()))


def changes(one: Candidate, usual: Mapping[str, Any]) -> str:
    """The settings of a candidate that are not the usual ones, in words."""
    default = EraseConfig()
    known = {"divergence": default.divergence, "s0": default.s0, **usual}
    different = {name: value for name, value in one.settings.items() if known.get(name) != value}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in different.items())


def told_of(suites: Sequence[Suite], records: Records, found: Sequence[Results | None]) -> dict[str, Any]:
    """What every page says of its runs: how many are finished, which failed, and on what device they were made."""
    jobs = {job.name: job for suite in suites for job in suite.jobs(Path()) if not job.first}
    there = {name: record for name, job in jobs.items() if (record := records.of(name, job.identity)) is not None}
    finished = [record for record in there.values() if "failed" not in record]
    failed = [f"{name} ({record['failed']})" for name, record in there.items() if "failed" in record]
    where, mixed = conditions_of(finished)
    note = next((one.mixed_note for one in found if one is not None and one.mixed), "") if mixed else ""
    return {
        "made": of_total(len(finished), len(jobs)),
        "failed": f"\nFailed, and left out of all figures: {'; '.join(failed)}.\n" if failed else "",
        "mixed": f" {note}" if note else "",
        **conditions(where),
    }


def all_jobs(suites: Sequence[Suite], cache: Path) -> list[Job]:
    """The jobs of all suites; where two suites of one name share a run, it is made once."""
    found: dict[str, Job] = {}
    for suite in suites:
        for job in suite.jobs(cache):
            found.setdefault(job.name, job)
    return list(found.values())


def dated(job: Job, *pairs: tuple[str, str], model: str = "", **content: Any) -> Job:
    """The job with digests of what its figures depend on besides settings and weights: a fix makes its record outdated.

    Args:
        job: if its identity or the settings in it name a divergence, the figures depend on that divergence's losses.
        pairs: targets and anchors; the figures depend on their prompts and on the judge.
        model: the pipeline of these concepts.
        content: whatever else the figures depend on, by name.
    """
    digests = {name: digest(one) for name, one in content.items()}
    divergence = {**job.identity, **job.identity.get("settings", {})}.get("divergence")
    if divergence:
        digests["losses"] = digest(losses(divergence))
    if pairs:
        digests |= {"asked": digest([asked(model, *pair) for pair in pairs]), "judge": judge(model)}
    return dataclasses.replace(job, identity={**job.identity, "content": digests})


@functools.cache
def losses(name: str) -> list[str]:
    """Values and gradients of the losses of a divergence, to six digits: they change with a fix, not with a rewrite."""
    divergence = fk.get_divergence(name)
    far = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    computed = [*fk.gaussian_divergence_value_and_grad(far[:, None], torch.zeros_like(far)[:, None], divergence)]
    if divergence.generator is not None:
        computed += fk.variational_divergence_value_and_grad(far, -far, divergence)
    return [f"{number:.5e}" for tensor in computed for number in tensor.flatten().tolist()]


def embedded(model: str) -> EmbeddedPipeline:
    """A pipeline that comes with fdu, by name."""
    subject = subject_of(model)
    assert isinstance(subject, EmbeddedPipeline)
    return subject


@functools.cache
def asked(model: str, target: str, anchor: str) -> list[tuple[str, ...]]:
    """The prompts of an erasure, and those that judge it."""
    content = embedded(model).content
    return [one.prompts for one in (*content.concepts(target, anchor), *content.probes(target, anchor=anchor))]


@functools.cache
def judge(model: str) -> str:
    """A digest of the judge of a pipeline."""
    return digest(embedded(model).classifier.read_bytes())


def fill(name: str, **fields: Any) -> str:
    """The page of a template, whose fields are those of :meth:`str.format`."""
    return (HERE / "templates" / name).read_text(encoding="utf-8").format(**fields)


def finding(verdict: str, **fields: Any) -> dict[str, Any]:
    """The outcome of a claim for a template: the verdict in a few words, as the start of a sentence, and figures."""
    return {"verdict": verdict, "said": verdict[0].upper() + verdict[1:], **fields}


def student(values: Sequence[float]) -> tuple[float, float]:
    """The mean of values, and the reach of its 95 % interval by Student's t."""
    error = stdev(values) / math.sqrt(len(values))
    return fmean(values), float(scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error


def conditions(record: Record) -> dict[str, str]:
    """Device and versions of a record, in words, without the version of fdu."""
    named = [f"{name} {number}" for name, number in record["versions"].items() if name != "fdu"]
    return {"device": record["device"].replace("cpu: ", "CPU with "), "versions": ", ".join(named)}


def of_total(made: int, total: int) -> str:
    """As "all 9" or "3 of 9"."""
    return f"all {total}" if made == total else f"{made} of {total}"
