"""The losses on a GPU: ``python benchmarks/gpu_losses.py latents``, or "large", "sweep", "host" or "machine".

A row is a competitor at a shape and dtype. ``cold_us`` is its time, with quartiles, when the calls cycle through sets
of inputs that together exceed the L2 cache several times. ``extra_bytes`` is the peak memory beyond inputs and
gradients. ``passes`` counts the tensors that our value_and_grad reads or writes, and ``share_of_copy`` compares the
bandwidth that follows with that of torch.clone on the same inputs. At the size of latents a row also has ``hot_us`` on
the same inputs, ``wall_us`` per call with the host's time, ``host_us`` until a call returns and ``graph_us`` in a
replayed CUDA graph. With ``--rehearsal`` all of this runs at toy size on the CPU.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import bench_host
import bench_memory
import competitors
import records
import torch
from competitors import COMPILED, DTYPES, EAGER, FORMS, FUSED, Call, Pair, Shape, competitors_of, fused_backends
from records import Row, Rows

import fdu_kernels as fk
from fdu_kernels.kernels.triton import tuning

LATENTS: tuple[Shape, ...] = ((1, 4, 64, 64), (16, 4, 64, 64), (4, 4, 128, 128))
FULL, LEAST_LARGE = 512 << 20, 64 << 20
"""Bytes of a large tensor."""
SWEEP = [(2**exponent // 65536, 4, 64, 64) for exponent in range(16, 30)]
"""64 KiB to 512 MiB per tensor in float32."""
TOY: Shape = (2, 4, 4, 4)
LEAST_COMPILED = 12.0
"""Seconds that must be left for a row with torch.compile."""
CACHES, MOST_PAIRS = 4, 2048
"""Cold calls cycle through pairs of inputs that fill this many L2 caches, but through at most this many pairs."""
MOST_ROUNDS = 60
ON_CHIP = {"cuda": 32_768, "triton": tuning.ON_CHIP_LIMIT["linear"]}
"""The largest sample that a block or program of a backend holds, in elements of one dtype."""
CLUSTER, LEAST_WITH_CLUSTERS = 32, (9, 0)
"""How many times as much a cluster of blocks of CUDA holds, and the first devices that can launch one."""
CLOCK_HZ = 2e9
"""The clock rate of a GPU, roughly."""
LEADS = (3e-4, 2e-3)
"""Seconds by which the host may get ahead of the device, at least and at most."""


class Task(NamedTuple):
    """Competitors that are measured on the same inputs."""

    form: str
    dtype: str
    shape: Shape
    baselines: tuple[str, ...] = (EAGER, COMPILED)
    """If empty, only clone and our value_and_grad run."""


def latents_tasks() -> list[Task]:
    """The first shape of every form and dtype comes first. The last shape goes without torch.compile, which is slow."""
    kinds = [("gaussian", "float32"), ("gaussian", "bfloat16"), ("variational", "float32"), ("mse", "float32")]
    baselines = [(EAGER, COMPILED)] * (len(LATENTS) - 1) + [(EAGER,)]
    return [Task(*kind, *at) for at in zip(LATENTS, baselines, strict=True) for kind in kinds]


def large_tasks() -> list[Task]:
    """512 and 64 MiB of latents, then of smaller and larger ones the Gaussian loss alone, since each size has a way of
    its own on the GPU; 512 MiB in four long samples; the density ratio."""
    kinds = [(form, dtype) for form in ("gaussian", "variational") for dtype in ("float32", "bfloat16")]

    def task(form: str, dtype: str, size: int, *sample: int, **baselines: Any) -> Task:
        return Task(form, dtype, (size // (DTYPES[dtype].itemsize * math.prod(sample)), *sample), **baselines)

    found = [task(*kind, size, 16, 128, 128) for size in (FULL, LEAST_LARGE) for kind in kinds]
    found += [task(*kind, FULL, 16, side, side, baselines=()) for side in (64, 256) for kind in kinds[:2]]
    found += [task(*kind, FULL, FULL // 4 // DTYPES[kind[1]].itemsize) for kind in kinds]
    return [*found, found[0]._replace(form="density_ratio")]


def passes_of(name: str, task: Task) -> int:
    """The tensors that value_and_grad of a competitor, or clone, reads or writes. Where a backend cannot hold a sample
    on chip, the gradient of a Gaussian loss reads it again."""
    backend, of, size = name.split()[0], FORMS[task.form], math.prod(task.shape[1:])
    if name == "clone":
        return competitors.CLONE_PASSES
    if backend not in ON_CHIP or of.ours[0] != "gaussian_divergence":
        return of.passes
    clusters = torch.cuda.is_available() and torch.cuda.get_device_capability() >= LEAST_WITH_CLUSTERS
    held = ON_CHIP[backend] * (CLUSTER if backend == "cuda" and clusters else 1)
    return of.passes if size <= held else of.passes + 2


def measure(make_tasks: Callable[[], list[Task]], rows: Rows, with_host: bool = False) -> None:
    """Rows for every task, in order. A rehearsal takes the first and the third task, at toy size."""
    # No pool of compilers may run during the timing. An imported module may already have read the environment.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    tasks = make_tasks()
    if rows.rehearsal:
        tasks = [task._replace(shape=TOY) for task in tasks[:3:2]]
    cache = torch.cuda.get_device_properties(0).L2_cache_size if rows.device == "cuda" else 1 << 20
    for task in tasks:
        if rows.leaves_out({"shape": task.shape, "dtype": task.dtype, "form": task.form}):
            continue  # before the inputs, up to gigabytes, are made
        most = 2 if rows.rehearsal else MOST_PAIRS
        pairs = competitors.rotating(task.form, task.shape, DTYPES[task.dtype], rows.device, CACHES * cache, most)
        turns = itertools.cycle(pairs)  # across all competitors: none finds in the cache what the one before has read
        copy: Row = {}
        for name, run in runs_of(task, rows).items():
            row = {"shape": task.shape, "dtype": task.dtype, "form": task.form, "candidate": name}
            if name == "clone" or FUSED in name:
                row["passes"] = passes_of(name, task)
            if name == "clone":
                copy = row
            figures = functools.partial(figures_of, row, copy, run, pairs, turns, rows, with_host)
            rows.add(row, figures, **({"least": LEAST_COMPILED, "kind": COMPILED} if name == COMPILED else {}))
        del pairs, turns


def runs_of(task: Task, rows: Rows) -> dict[str, Call]:
    """clone, all competitors, and tabulated divergences of ours."""
    backends, ours = fused_backends(rows.device), ("autograd", FUSED) if task.baselines else (FUSED,)
    runs: dict[str, Call] = {"clone": lambda a, b: (a, a.detach().clone())}
    compiler = "eager" if rows.rehearsal else "inductor"
    runs.update(competitors_of(task.form, backends, ours, task.baselines, compiler))
    if task.form == "gaussian" and task.baselines:
        for name in backends:
            tabulated = functools.partial(fk.gaussian_divergence_value_and_grad, backend=name)
            runs[f"{name} tabulated"] = lambda a, b, run=tabulated: run(a, b, "jensen_shannon")
    return runs


def figures_of(
    row: Row, copy: Row, run: Call, pairs: list[Pair], turns: Iterator[Pair], rows: Rows, with_host: bool
) -> Row:
    """The figures of a row; ``copy`` is the row of clone on the same inputs."""
    device, toy, (a, b) = rows.device, rows.rehearsal, pairs[0]
    checked = row["candidate"] != "clone" and not row["candidate"].endswith("tabulated")
    if checked:
        competitors.check(run, row["form"], a, b)
    rounds, calls = (3, 2) if toy else (max(20, min(MOST_ROUNDS, 2**33 // a.nbytes)), 100)
    cold = device_us(run, turns, rounds, device)
    figures: Row = {"checked": checked, "cold_us": statistics.median(cold)}
    figures["quartiles_us"] = statistics.quantiles(cold, n=4)[::2]
    if FUSED in row["candidate"] and "cold_us" in copy:
        share = row["passes"] / copy["passes"] * copy["cold_us"] / figures["cold_us"]
        figures["share_of_copy"] = share
    if with_host:
        figures["hot_us"] = statistics.median(device_us(run, itertools.repeat((a, b)), rounds, device))
        figures["wall_us"] = wall_us(run, turns, calls, device, repeats=1 if toy else 7)
        figures["host_us"] = host_us(run, (a, b), calls, device)
        if device == "cuda" and not any("graph_error" in other for other in rows.rows):
            figures.update(graph(run, (a, b)))
    if device == "cuda":  # on the CPU the profiler's start takes longer than all the rest
        figures["extra_bytes"] = bench_memory.measure(run, a, b)["extra_bytes"]
    return figures


def wait(device: str) -> None:
    """Until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_us(run: Call, turns: Iterator[Pair], rounds: int, device: str) -> list[float]:
    """Microseconds of each call on the device, on the next inputs each, after three that are not timed.

    The device sleeps before each call, while the host prepares it. Otherwise a short kernel would wait for the host
    between the two events, and that would be timed.
    """
    for _ in range(3):
        run(*next(turns))
    wait(device)
    if device != "cuda":
        return [span_us(functools.partial(run, *next(turns))) for _ in range(rounds)]
    lead = min(max(LEADS[0], 2e-6 * span_us(functools.partial(run, *next(turns)))), LEADS[1])
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for start, end in events:
        a, b = next(turns)
        torch.cuda._sleep(int(lead * CLOCK_HZ))
        start.record()
        run(a, b)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def span_us(call: Callable[[], object]) -> float:
    """Microseconds of one call on the wall clock."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def host_us(run: Call, pair: Pair, rounds: int, device: str) -> float:
    """Microseconds until a call returns, onto an idle device."""
    spans = []
    for _ in range(rounds):
        wait(device)
        spans.append(span_us(lambda: run(*pair)))
    return statistics.median(spans)


def wall_us(run: Call, turns: Iterator[Pair], calls: int, device: str, repeats: int = 7) -> float:
    """Microseconds per call, of many in a row until the device is done: the longer of host and device."""

    def many() -> None:
        for _ in range(calls):
            run(*next(turns))
        wait(device)

    many()
    return statistics.median(span_us(many) for _ in range(repeats)) / calls


def graph(run: Call, pair: Pair) -> Row:
    """Microseconds per call inside a replayed CUDA graph, or why there is none."""
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()
    try:
        return {"graph_us": 1e3 * do_bench_cudagraph(lambda: run(*pair), return_mode="median")}
    except Exception as error:  # after a failed capture, none is tried
        return {"graph_error": f"{type(error).__name__}: {error}"[:400]}


def host(rows: Rows) -> None:
    """What a call costs the host, by part (bench_host.py)."""
    shapes = (TOY,) if rows.rehearsal else bench_host.SHAPES
    rounds, iterations = (2, 2) if rows.rehearsal else (100, 10)
    for name, shape in itertools.product(fused_backends(rows.device), shapes):
        measured = functools.partial(bench_host.measure, shape, name, rows.device, rounds, iterations)
        rows.add({"shape": shape, "backend": name}, measured)


def machine(rows: Rows) -> None:
    """The machine, and which backends run on it."""
    rows.add({}, lambda: {**records.machine(), "backends": fk.backends()}, least=0.0)


SECTIONS: dict[str, Callable[[Rows], None]] = {
    "machine": machine,
    "latents": functools.partial(measure, latents_tasks, with_host=True),
    "large": functools.partial(measure, large_tasks),
    "sweep": functools.partial(measure, lambda: [Task("gaussian", "float32", shape, ()) for shape in SWEEP]),
    "host": host,
}

if __name__ == "__main__":
    records.run_section(SECTIONS)
