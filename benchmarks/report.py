"""Write docs/performance.md and its figures from the committed records: ``python benchmarks/report.py``.

Nothing is measured. The records lie in benchmarks/results: losses/, host/, memory/ and scaling/ hold one file a
machine, as pytest-benchmark writes them (``make bench``), evaluation/ what bench_evaluation.py wrote, gpu/ what
gpu_suite.py wrote. A part whose record is missing
says by which command it is made.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import compare
import gpu_bounds
import plots
from markdown_table import markdown

HERE = Path(__file__).parent
SUITES = ("losses", "host", "memory", "scaling")
Notes = list[dict[str, Any]]


class Records:
    """The committed records of one machine, and those of GPUs."""

    def __init__(self, folder: Path, machine: str) -> None:
        self.folder, self.machine = folder, machine
        self.found: dict[str, dict[str, Any]] = {}
        for suite in SUITES:
            path = self.path(suite)
            if path.is_file():
                self.found[suite] = json.loads(path.read_text())
        gpus = sorted((folder / "gpu").glob("*.json"))
        self.gpus = {path.name: json.loads(path.read_text()) for path in gpus}

    def path(self, suite: str) -> Path:
        """Where a suite's record lies."""
        return self.folder / suite / f"{self.machine}.json"

    def notes(self, suite: str, form: str | None = None) -> Notes:
        """What a suite's benchmarks noted, of one form or of all."""
        entries = self.found.get(suite, {}).get("benchmarks", [])
        notes = [entry["extra_info"] for entry in entries]
        return [note for note in notes if form is None or note.get("form") == form]


def page(records: Records, figures: Path) -> str:
    """The page; its figures go into a folder."""
    parts = [
        HEAD,
        gpu_part(records, figures),
        cpu_part(records, figures),
        sizes_part(records, figures),
        host_part(records, figures),
        memory_part(records, figures),
        concepts_part(records),
        evaluation_part(records),
        losses_part(records),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def missing(suite: str) -> str:
    """What stands where a record should."""
    return f"No record yet: `make bench SUITES={suite}` makes it."


def machine_line(records: Records, suite: str) -> str:
    """Device, versions and commit of a suite's record."""
    return compare.machine(records.found[suite])


# GPU


def gpu_part(records: Records, figures: Path) -> str:
    """Every GPU record: promises, plots, training; or what waits for one."""
    if not records.gpus:
        rows = [[bound.what, f"{bound.sense} {bound.bound:g}"] for bound in gpu_bounds.bounds({})]
        return GPU_WAITS.format(table=markdown(["promise", "bound"], rows))
    return "\n\n".join(one_gpu(name, record, figures) for name, record in records.gpus.items())


def one_gpu(name: str, record: dict[str, Any], figures: Path) -> str:
    """A section for one record."""
    stem = Path(name).stem
    info = record.get("machine", {})
    verdicts = [
        [bound.what, f"{bound.sense} {bound.bound:g}", "" if bound.value is None else f"{bound.value:.3g}", bound.note,
         bound.verdict if bound.verdict != "fails" else "**fails**"]
        for bound in gpu_bounds.bounds(record)
    ]  # fmt: skip
    text = [
        f"## {info.get('device', 'GPU')}",
        gpu_line(name, info),
        markdown(["promise", "bound", "measured", "where", ""], verdicts),
    ]
    sweep = gpu_bounds.loss_rows(record, "sweep", "large")
    shares = gpu_lines(sweep, "share_of_copy")
    if shares:
        plots.speed_of_light(shares, figures / f"{stem}-speed-of-light.svg")
        plots.latency(gpu_lines(sweep, "cold_us"), figures / f"{stem}-latency.svg")
        text += [picture("Share of the copy bandwidth against size", f"{stem}-speed-of-light")]
        text += [picture("Microseconds a call against size", f"{stem}-latency")]
    latents = gpu_bounds.loss_rows(record, "latents")
    if latents:
        text += ["### At the size of latents", latents_table(latents)]
    host = [row for row in record.get("host", {}).get("rows", []) if "parts_us" in row]
    if host:
        plots.host_parts(parts_of(host), figures / f"{stem}-host.svg")
        text += ["### The host's time", picture("Microseconds of a call by part", f"{stem}-host")]
    training = gpu_bounds.training_rows(record)
    if training:
        text += ["### The training step", training_table(training)]
        lines = training_lines(training)
        if lines:
            plots.training(lines, figures / f"{stem}-training.svg")
            text += [picture("Images a second against the batch", f"{stem}-training")]
    return "\n\n".join(text)


def gpu_line(name: str, info: dict[str, Any]) -> str:
    """Device, driver, versions, commit."""
    versions = ", ".join(
        f"{key} {info[key]}" for key in ("python", "torch", "cuda", "triton", "diffusers") if info.get(key)
    )
    changed = " and changes" if info.get("changed") else ""
    commit = str(info.get("commit", ""))[:10] or "unknown"
    return f"{info.get('driver', '')}; {versions}; commit {commit}{changed}; {info.get('date', '')}; record `{name}`."


def gpu_lines(rows: Iterable[dict[str, Any]], figure: str) -> dict[str, plots.Line]:
    """float32 Gaussian rows of latents, as lines over the bytes of a tensor."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["form"] == "gaussian" and row["dtype"] == "float32" and row.get(figure) and len(row["shape"]) == 4:
            lines.setdefault(row["candidate"], {}).setdefault(gpu_bounds.size_of(row), row[figure])
    return {name: sorted(line.items()) for name, line in lines.items() if len(line) > 1}


def latents_table(rows: Notes) -> str:
    """Every candidate at every shape: with the host, on the device, in a graph."""
    cells = [
        [compare.name_of(tuple(row["shape"])), row["dtype"], f"{row['form']}: {row['candidate']}"]
        + [f"{row[key]:.1f}" if row.get(key) else "" for key in ("wall_us", "host_us", "cold_us", "hot_us", "graph_us")]
        for row in rows
    ]
    heads = ["shape", "dtype", "candidate", "with host, us", "host alone, us", "cold, us", "hot, us", "in a graph, us"]
    return markdown(heads, cells)


def training_table(rows: Notes) -> str:
    """Steps, memory, and the share of the loss."""
    cells = [
        [row["model"], row["name"], row["precision"], str(row["batch"]), f"{row['step_s'] * 1e3:.1f}",
         f"{row['images_per_s']:.1f}", f"{row['peak_mib'] / 1024:.2f}", f"{row['loss_us'] / row['step_s'] / 1e4:.2f}"]
        for row in rows
    ]  # fmt: skip
    heads = ["model", "loop", "precision", "batch", "ms a step", "images a second", "peak, GiB", "loss, % of the step"]
    return markdown(heads, cells)


def training_lines(rows: Notes) -> dict[str, plots.Line]:
    """Images a second against the batch, of what was run with several."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["precision"] == "bf16":
            lines.setdefault(f"{row['model']}, {row['name']}", []).append((row["batch"], row["images_per_s"]))
    return {name: sorted(line) for name, line in lines.items() if len(line) > 1}


# CPU


def cpu_part(records: Records, figures: Path) -> str:
    """Promises and bandwidth of the losses, and their times by size."""
    if "losses" not in records.found:
        return f"## CPU\n\n{missing('losses')}"
    groups, record = compare.read(records.path("losses"))
    shown = [
        {"bytes": 4 * math.prod(shape), "us": {name: seconds * 1e6 for name, seconds in times.items()}}
        for shape, times in groups["gaussian", "float32"].items()
    ]
    plots.latency(lines_of(shown, "bytes", lambda note: note["us"]), figures / "losses.svg")
    return CPU.format(
        picture=picture("Microseconds a call against size, gaussian float32", "losses"),
        machine=compare.machine(record),
        promises=compare.promise_table(groups, record),
        bandwidths=compare.bandwidth_table(record),
        allocator=compare.KEPT if record["machine_info"]["keeps_freed_memory"] else "",
    )


def lines_of(notes: Notes, over: str, of: Any) -> dict[str, plots.Line]:
    """Candidate -> (x, y) from the notes of a sweep."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for note in notes:
        for name, value in of(note).items():
            lines.setdefault(name, []).append((note[over], value))
    return {name: sorted(line) for name, line in lines.items()}


def sizes_part(records: Records, figures: Path) -> str:
    """Speed of light, latency, and the cost of an element by the size of samples."""
    text = ["## By size"]
    batches, elements = records.notes("scaling", "batch"), records.notes("scaling", "elements")
    if not batches and not elements:
        return "\n\n".join([*text, missing("scaling")])
    text.append(f"{machine_line(records, 'scaling')}\n{SIZES.strip()}")
    if batches:
        plots.speed_of_light(lines_of(batches, "bytes", lambda note: note["share"]), figures / "speed-of-light.svg")
        micro = lines_of(batches, "bytes", lambda note: {k: v * 1e6 for k, v in note["medians"].items()})
        plots.latency(micro, figures / "latency.svg")
        text += [picture("Share of the copy bandwidth against size", "speed-of-light")]
        text += [picture("Microseconds a call against size", "latency"), size_table(batches, "batch of 4x64x64", 0)]
    if elements:
        nano = lines_of(
            [{**note, "elements": note["shape"][1]} for note in elements],
            "elements",
            lambda note: {k: v * 4e9 / note["bytes"] for k, v in note["medians"].items()},
        )
        plots.scaling(nano, "elements a sample", figures / "elements.svg")
        text += [picture("Nanoseconds an element against the elements of a sample", "elements")]
        text += [size_table(elements, "elements a sample", 1)]
    return "\n\n".join(text)


def size_table(notes: Notes, label: str, place: int) -> str:
    """Microseconds and quartiles by candidate, and ours as a share of the copy bandwidth."""
    names = list(notes[0]["medians"])
    ours = [name for name in names if name not in ("clone", "eager", "compiled", "torch")]
    rows = []
    for note in notes:
        cells = [str(note["shape"][place]), f"{note['bytes'] / 2**20:.3g}"]
        for name in names:
            low, high = note["quartiles"][name]
            cells.append(f"{note['medians'][name] * 1e6:.1f} ({low * 1e6:.1f} to {high * 1e6:.1f})")
        rows.append([*cells, *(f"{note['share'][name]:.2f}" for name in ours)])
    return markdown([label, "MiB", *(f"{name}, us" for name in names), *(f"{name}: share" for name in ours)], rows)


def parts_of(rows: Notes) -> dict[str, dict[str, float]]:
    """Bars of host_parts: a backend and shape each."""
    return {f"{row['backend']} {compare.name_of(tuple(row['shape']))}": row["parts_us"] for row in rows}


def host_part(records: Records, figures: Path) -> str:
    """Microseconds of a call by part, and before and after the last change."""
    notes = records.notes("host", "host")
    if not notes:
        return f"## The host's time\n\n{missing('host')}"
    plots.host_parts(parts_of(notes), figures / "host.svg")
    names = list(notes[0]["medians_us"])
    rows = [
        [
            f"{note['backend']} {compare.name_of(tuple(note['shape']))}",
            *(f"{note['medians_us'][name]:.1f}" for name in names),
        ]
        for note in notes
    ]
    text = [
        f"## The host's time\n\n{machine_line(records, 'host')}\n{HOST.strip()}",
        picture("Microseconds of a call by part", "host"),
        markdown(["backend, shape", *(f"{name}, us" for name in names)], rows),
    ]
    text += [change_table(note) for note in records.notes("host", "host change")]
    return "\n\n".join(text)


def change_table(note: dict[str, Any]) -> str:
    """Another commit's calls against the recorded one's."""
    rows = [
        [name, f"{found['before_us']:.1f}", f"{found['after_us']:.1f}", f"{found['ratio']:.2f}"]
        for name, found in note["pieces"].items()
    ]
    table = markdown(["call", "before, us", "after, us", "ratio"], rows)
    return CHANGE.format(commit=note["commit"][:10], table=table)


def memory_part(records: Records, figures: Path) -> str:
    """Peak memory by form and candidate."""
    notes = records.notes("memory")
    if not notes:
        return f"## Peak memory\n\n{missing('memory')}"
    largest = max(max(one["input_bytes"] for one in note["memory"].values()) for note in notes)
    bars: dict[str, dict[str, float]] = {}
    rows = []
    for note in notes:
        of = {name: one["extra_bytes"] / one["input_bytes"] for name, one in note["memory"].items()}
        if max(one["input_bytes"] for one in note["memory"].values()) == largest:
            bars[f"{note['form']}\n{note['dtype']}"] = of
        cells = [f"{share:.3f}" for share in of.values()]
        rows.append([f"{note['form']} {note['dtype']}", compare.name_of(tuple(note["shape"])), *cells])
    plots.memory(bars, figures / "memory.svg")
    names = list(notes[0]["memory"])
    return "\n\n".join(
        [
            f"## Peak memory\n\n{machine_line(records, 'memory')}\n{MEMORY.strip()}",
            picture("Peak memory beyond inputs and gradients", "memory"),
            markdown(["form", "shape", *names], rows),
        ]
    )


def concepts_part(records: Records) -> str:
    """Step time by the number of concepts."""
    notes = records.notes("scaling", "concepts")
    if not notes:
        return ""
    rows = [[str(note["concepts"]), str(note["batch"]), f"{note['step'] * 1e3:.0f}"] for note in notes]
    steps = [note["step"] * 1e3 for note in notes]
    return CONCEPTS.format(least=min(steps), most=max(steps), table=markdown(["concepts", "batch", "ms a step"], rows))


def evaluation_part(records: Records) -> str:
    """How long an evaluation takes."""
    path = records.path("evaluation")
    if not path.is_file():
        return ""
    record = json.loads(path.read_text())
    total = sum(record["seconds"].values())
    return EVALUATION.format(
        classes=record["classes"],
        images=record["images_per_class"],
        device=record["device"],
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        date=record["date"],
        parts=", ".join(f"{name} {seconds:.0f} s" for name, seconds in record["seconds"].items()),
        total=total,
        bound=record["bound"],
        verdict="holds" if total <= record["bound"] else "**fails**",
    )


def losses_part(records: Records) -> str:
    """All tables of the losses."""
    if "losses" not in records.found:
        return ""
    groups, _ = compare.read(records.path("losses"))
    return "\n\n".join(["## All losses", LOSSES.strip(), *_sections(compare.loss_tables(groups))])


def _sections(tables: dict[str, str]) -> Iterator[str]:
    for title, table in tables.items():
        yield f"### {title}\n\n{table}"


def picture(alternative: str, stem: str) -> str:
    """A figure on the page."""
    return f"![{alternative}](performance/{stem}.svg)"


HEAD = """# How fast the losses are

Made by `make bench-report` from the records in `benchmarks/results`, which `make bench` and `benchmarks/gpu_suite.py`
make. The training has pages of its own: [training.md](training.md), where it is measured, and
[scaling.md](scaling.md), on several GPUs, estimated.

*Byte model.* Value and gradient have to read each input and write each gradient once: 3N bytes for the Gaussian losses
(N bytes a tensor), 4N for the variational bound, 2N for a density-ratio estimate; a copy moves 2N. A share of the copy
bandwidth compares these rates: 1 is the physical limit of memory that a copy reaches. On a GPU, where the two inputs
of one sample exceed the L2 cache, a Gaussian loss counts as 5N: a gradient needs the sum over its whole sample, so that
the inputs have to be read twice.
"""
GPU_WAITS = """## GPUs

No GPU has run this yet. `python benchmarks/gpu_suite.py --out DIR` builds, tests and times everything on one within
nine minutes (rehearsed on the CPU by `--rehearsal`), and its record goes into `benchmarks/results/gpu`. These lines
wait for it:

{table}
"""
CPU = """## CPU

{machine}

{promises}

The ratios are of calls on the same inputs, each timed after one that is not, as in ["All losses"](#all-losses); inputs
that come from memory every time lower them, see ["By size"](#by-size).

{picture}

Against `torch.clone`: gaussian float32, value_and_grad. Inputs are random and rotate through more memory than the
caches hold. A round times one call of each, on the next inputs; both allocate what they return. "share" is the median
over rounds of (3N / its time) / (2N / clone's time).
{allocator}

{bandwidths}
"""
SIZES = """Squared Hellinger in float32, value and gradient, on random inputs that rotate; the candidates take turns,
one call a round: medians, with quartiles in the tables. "torch" is our own reference backend. Small tensors stay in the
caches, where a copy is all overhead of its call: there the share says how little is added to it. From 64 MiB on a new
output is made of pages that the kernel has yet to clear, which takes longer than to fill it: there the share compares
how these are asked for, and may exceed 1.
"""
HOST = """One thread, float32. Nested pieces of the same call, each timed for itself, in turn: a part is what a piece
takes beyond the one inside it (`benchmarks/host_levels.py`); the first also has the calls of Python between the checks.
On the CPU the launch is the computation.
"""
CHANGE = """What one call object for all backends changed. *Prediction*, from the pieces alone: the checks look for
transforms, subclasses and sparse tensors as well, 1 us more; `FDU_BACKEND` is looked for without the error that
`os.environ` raises and catches inside where it is not set, 1 us less; a gradient that the forward pass has ready needs
no second call object, 1 us less with autograd. *Measurement*, against commit {commit}: two processes took turns, and
the ratio is the median of those of their turns.

{table}

*Learnt*: half of the choice of a backend was the look for a variable that is not set. `FDU_BACKEND` is still read at
every call, so that a change of it is never missed.
"""
MEMORY = """The most that a call holds at once beyond its inputs and the gradients it returns, in tensors as large as
one input. Ours hold nothing of that size.
"""
CONCEPTS = """## Several concepts at once

Steps of `fdu.erase` on the embedded pipeline. The concepts share the batch, so that a step
costs {least:.0f} to {most:.0f} ms, whatever their number; what grows is the number of prompts, which are encoded once.

{table}
"""
EVALUATION = """## An evaluation

{classes} classes x {images} images of the embedded pipeline, before and after, as `fdu evaluate` draws and judges them:
{total:.0f} s (promised {bound:.0f} s: {verdict}); {parts}. Made once, by
`python benchmarks/bench_evaluation.py --record benchmarks/results/evaluation/cpu.json`. {device}; {versions}; {date}.
"""
LOSSES = """Medians of one process. "eager" is the loss as one writes it in PyTorch with autograd (for mse,
`F.mse_loss`), "compiled" the same under `torch.compile(fullgraph=True)`, "autograd" ours in its place, "value_and_grad"
ours without a graph, "into_buffer" the same with `grad_out=`. The candidates of a line take turns: in each round every
one of them is called once, which is not timed, and then timed on the same inputs. Every candidate was compared with
eager PyTorch in float64 before.
"""


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the records lie")
    parser.add_argument("--machine", default="cpu", help="whose records, as their files are named")
    parser.add_argument(
        "--docs", type=Path, default=HERE.parent / "docs", help="where performance.md and its figures go"
    )
    options = parser.parse_args()
    text = page(Records(options.results, options.machine), options.docs / "performance")
    (options.docs / "performance.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
