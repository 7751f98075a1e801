"""The losses on a GPU: at the size of latents with the host's time, large ones against the bandwidth, a sweep of sizes.

A row is a competitor at a shape and dtype: ``cold_us`` on inputs that rotate through several times the L2 cache, with
quartiles, ``extra_bytes`` at the peak beyond inputs and gradients, and ``share_of_copy``: of the bandwidth that
torch.clone reaches on the same inputs, by the byte model (competitors.py) with ``passes``. At the size of latents also
``hot_us`` on the same inputs, ``wall_us`` per call with the host's time, ``host_us`` until a call returns and
``graph_us`` in a replayed CUDA graph.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import bench_host
import competitors
import gpu_timing
import torch
from bench_memory import bytes_of, peak_bytes
from competitors import COMPILED, DTYPES, EAGER, FORMS, FUSED, Call, Pair, Shape, competitors_of, fused_backends
from gpu_timing import Plan, described, device_us, graph_us, host_us, l2_bytes, wall_us

import fdu_kernels as fk

LATENTS: tuple[Shape, ...] = ((1, 4, 64, 64), (16, 4, 64, 64), (4, 4, 128, 128))
FULL, LEAST_LARGE = 512 << 20, 64 << 20
"""Bytes of a large tensor."""
SWEEP = tuple(2**exponent for exponent in range(16, 30))
"""Bytes per tensor: 64 KiB to 512 MiB."""
TOY: Shape = (2, 4, 4, 4)
LEAST, LEAST_COMPILED = 3.0, 12.0
"""Seconds that must be left for a row to be begun."""
CACHES, MOST_PAIRS = 4, 2048
"""Inputs that rotate are together as large as so many L2 caches, but at most so many pairs."""
ROUNDS = 60
"""Calls that are timed at most, each after a sleep of the device."""


class Task(NamedTuple):
    """What is measured together, on the same inputs."""

    form: str
    dtype: str
    shape: Shape
    baselines: tuple[str, ...] = (EAGER, COMPILED)
    """Without any, ours by value_and_grad alone."""


def large_shapes(dtype: torch.dtype) -> list[Shape]:
    """64 and 512 MiB of latents, and 512 MiB in four long samples."""
    size = dtype.itemsize
    latents = [(bytes_ // (16 * 128 * 128 * size), 16, 128, 128) for bytes_ in (FULL, LEAST_LARGE)]
    return [*latents, (4, FULL // size // 4)]


def runs_of(task: Task, plan: Plan) -> dict[str, Call]:
    """All competitors, with clone before and tabulated divergences of ours behind."""
    backends, ours = fused_backends(plan.device), ("autograd", FUSED) if task.baselines else (FUSED,)
    compiler = "eager" if plan.rehearsal else "inductor"
    clone: dict[str, Call] = {"clone": lambda a, b: (a.detach().clone(),)}
    runs = clone | competitors_of(task.form, backends, ours, task.baselines, compiler)
    if task.form == "gaussian" and task.baselines:
        for name in backends:
            tabulated = functools.partial(fk.gaussian_divergence_value_and_grad, backend=name)
            runs[f"{name} tabulated"] = lambda a, b, run=tabulated: run(a, b, "jensen_shannon")
    return runs


class Bench:
    """Measures what a section wants of a competitor."""

    def __init__(self, plan: Plan, with_host: bool) -> None:
        self.plan, self.with_host = plan, with_host
        self.graph_error = ""
        """Why a call could not be captured: after one that could not, none is."""

    def figures(self, form: str, name: str, run: Call, pairs: list[Pair], turns: Iterator[Pair]) -> dict[str, Any]:
        """Those of a row, without its share."""
        device, toy, (a, b) = self.plan.device, self.plan.rehearsal, pairs[0]
        checked = name != "clone" and not name.endswith("tabulated")
        if checked:
            competitors.check(run, form, a, b)
        rounds, calls = (3, 2) if toy else (max(20, min(ROUNDS, 2**33 // a.nbytes)), 100)
        cold = device_us(run, turns, rounds, device)
        quartiles = statistics.quantiles(cold, n=4)[::2]
        figures = {"checked": checked, "cold_us": statistics.median(cold), "quartiles_us": quartiles}
        if self.with_host:
            figures["hot_us"] = statistics.median(device_us(run, itertools.repeat((a, b)), rounds, device))
            figures["wall_us"] = wall_us(run, turns, calls, device, repeats=1 if toy else 7)
            figures["host_us"] = host_us(run, (a, b), calls, device)
            figures.update(self.graph(run, (a, b)))
        if device == "cuda":  # on the CPU the profiler's start takes longer than all the rest
            outcome = run(a, b)
            gradients = bytes_of(outcome[1:] if checked else outcome[-1:])
            del outcome
            figures["extra_bytes"] = peak_bytes(lambda: run(a, b), device) - gradients
        return figures

    def graph(self, run: Call, pair: Pair) -> dict[str, Any]:
        """The time in a graph, or why there is none."""
        if self.plan.device != "cuda" or self.graph_error:
            return {}
        try:
            return {"graph_us": graph_us(run, pair)}
        except Exception as error:
            self.graph_error = described(error)
            return {"graph_error": self.graph_error}


def measure(plan: Plan, tasks: list[Task], with_host: bool) -> None:
    """Rows for every task, in their order, as far as the time goes."""
    # No pool of compilers beside what is timed; in both places, as something imported may have read the environment.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    bench, cache = Bench(plan, with_host), l2_bytes(plan.device)
    for task in tasks:
        if not plan.may_begin(LEAST):
            plan.left_out.append(task[:3])
            continue
        form, dtype, shape, _ = task
        most = 2 if plan.rehearsal else MOST_PAIRS
        pairs = competitors.rotating(form, shape, DTYPES[dtype], plan.device, CACHES * cache, most)
        turns = itertools.cycle(pairs)  # across all competitors: none finds in the cache what the one before has read
        passes = FORMS[form].passes_for(shape, DTYPES[dtype], cache)
        cloned = 0.0
        for name, run in runs_of(task, plan).items():
            kind, least = (COMPILED, LEAST_COMPILED) if name == COMPILED else ("", LEAST)
            if not plan.may_begin(least, kind):
                plan.left_out.append([*task[:3], name])
                continue
            row = {"shape": list(shape), "dtype": dtype, "form": form, "candidate": name}
            plan.add(row, functools.partial(bench.figures, form, name, run, pairs, turns), kind)
            if name == "clone" and "cold_us" in row:
                cloned = competitors.CLONE_PASSES / row["cold_us"]
            elif cloned and FUSED in name and "cold_us" in row:
                row.update(passes=passes, share_of_copy=passes / row["cold_us"] / cloned)
        del pairs, turns
    plan.keep()


def latents(plan: Plan) -> None:
    """The size of latents, with the host's time."""
    measure(plan, latents_tasks(plan.rehearsal), with_host=True)


def latents_tasks(rehearsal: bool = False) -> list[Task]:
    """The first shape of every form and dtype comes first; the last one without torch.compile, which takes longest."""
    kinds = [("gaussian", "float32"), ("gaussian", "bfloat16"), ("variational", "float32"), ("mse", "float32")]
    if rehearsal:
        return [Task(*kind, TOY) for kind in kinds[::2]]
    baselines = [(EAGER, COMPILED)] * (len(LATENTS) - 1) + [(EAGER,)]
    return [Task(*kind, *at) for at in zip(LATENTS, baselines, strict=True) for kind in kinds]


def large(plan: Plan) -> None:
    """64 MiB and 512 MiB per tensor."""
    measure(plan, large_tasks(plan.rehearsal), with_host=False)


def large_tasks(rehearsal: bool = False) -> list[Task]:
    """What is promised at 512 MiB comes first, long samples and the density ratio last."""
    kinds = [(form, dtype) for form in ("gaussian", "variational") for dtype in ("float32", "bfloat16")]
    if rehearsal:
        return [Task(*kind, TOY) for kind in kinds[:2]]
    per_kind = [[Task(*kind, shape) for shape in large_shapes(DTYPES[kind[1]])] for kind in kinds]
    tasks = [task for at in zip(*per_kind, strict=True) for task in at]
    return [*tasks, tasks[0]._replace(form="density_ratio")]


def sweep(plan: Plan) -> None:
    """Ours and clone over all sizes, for the speed-of-light plot."""
    shapes = [TOY] if plan.rehearsal else [(max(1, size // 65536), 4, 64, 64) for size in SWEEP]
    measure(plan, [Task("gaussian", "float32", shape, ()) for shape in shapes], with_host=False)


def host(plan: Plan) -> None:
    """What a call costs the host, by part (bench_host.py)."""
    shapes = (TOY,) if plan.rehearsal else bench_host.SHAPES
    rounds, iterations = (2, 2) if plan.rehearsal else (100, 10)
    for name, shape in itertools.product(fused_backends(plan.device), shapes):
        if plan.may_begin(2.0):
            measured = functools.partial(bench_host.measure, shape, name, plan.device, rounds, iterations)
            plan.add({"shape": list(shape), "backend": name}, measured)
        else:
            plan.left_out.append([name, shape])
    plan.keep()


if __name__ == "__main__":
    gpu_timing.main({section.__name__: section for section in (latents, large, sweep, host)})
