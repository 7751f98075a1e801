"""The losses on a GPU: at the size of latents with the host's time, large ones against the bandwidth, a sweep of sizes.

A row is a candidate at a shape and dtype: ``cold_us`` on inputs that rotate through several times the L2 cache, with
quartiles, ``extra_bytes`` at the peak beyond inputs and gradients, and ``share_of_copy``: of the bandwidth that
torch.clone reaches on the same inputs, by the byte model (candidates.py) with ``passes``. At the size of latents also
``hot_us`` on the same inputs again, ``wall_us`` a call with the host's time, ``host_us`` until a call returns and
``graph_us`` in a replayed CUDA graph.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import host_levels
import torch
from candidates import CLONE_PASSES, DTYPES, FORMS, Call, candidate, check, fused_backends, inputs
from gpu_timing import CACHES, Pair, Plan, device_us, graph_us, host_us, l2_bytes, wall_us
from memory_peak import bytes_of, peak_bytes

import fdu_kernels as fk

Shape = tuple[int, ...]
LATENTS: tuple[Shape, ...] = ((1, 4, 64, 64), (16, 4, 64, 64), (4, 4, 128, 128))
FULL = 512 << 20
"""Bytes of a large tensor."""
LEAST_LARGE = 64 << 20
SWEEP = tuple(2**exponent for exponent in range(16, 30))
"""Bytes a tensor: 64 KiB to 512 MiB."""
TOY: Shape = (2, 4, 4, 4)
FUSED = "value_and_grad"
EAGER, COMPILED = "eager", "compiled"
LEAST, LEAST_COMPILED = 3.0, 12.0
"""Seconds that must be left for a row to be begun."""
MOST_PAIRS = 2048
ROUNDS = 60
"""Calls that are timed at most, each after a sleep of the device."""


class Task(NamedTuple):
    """What is measured together, on the same inputs."""

    form: str
    dtype: str
    shape: Shape
    baselines: tuple[str, ...] = (EAGER, COMPILED)
    """With none, ours by value_and_grad alone."""


def large_shapes(dtype: torch.dtype) -> list[Shape]:
    """64 and 512 MiB of latents, and 512 MiB in four long samples."""
    size = dtype.itemsize
    latents = [(bytes_ // (16 * 128 * 128 * size), 16, 128, 128) for bytes_ in (FULL, LEAST_LARGE)]
    return [*latents, (4, FULL // size // 4)]


def runs_of(task: Task, plan: Plan) -> Iterator[tuple[str, Call]]:
    """(candidate, call) of a form: clone, PyTorch, and ours by backend."""
    form = task.form
    yield "clone", lambda a, b: (a.detach().clone(),)
    for which in task.baselines:
        yield which, candidate(form, which, "torch", plan.compiler)
    for name in fused_backends(plan.device):
        if task.baselines:
            yield f"{name} autograd", candidate(form, "autograd", name)
        yield f"{name} {FUSED}", candidate(form, FUSED, name)
        if form == "gaussian" and task.baselines:
            yield (
                f"{name} tabulated",
                lambda a, b, name=name: fk.gaussian_divergence_value_and_grad(a, b, "jensen_shannon", backend=name),
            )


def pairs_of(task: Task, plan: Plan) -> list[Pair]:
    """Random inputs that are together several times as large as the L2 cache."""
    dtype = DTYPES[task.dtype]
    count = 2 if plan.rehearsal else pair_count(2 * math.prod(task.shape) * dtype.itemsize, l2_bytes(plan.device))
    pairs = [inputs(task.shape, dtype, plan.device, seed) for seed in range(count)]
    for _, second in pairs:
        second.requires_grad_(FORMS[task.form].wanted == 2)
    return pairs


def pair_count(size: int, cache: int) -> int:
    """How many pairs of so many bytes rotate."""
    return max(2, min(MOST_PAIRS, -(-CACHES * cache // size)))


def passes_of(task: Task, cache: int) -> int:
    """Tensors of N elements that value and gradients have to move, on a device with such a cache."""
    sample = 2 * math.prod(task.shape[1:]) * DTYPES[task.dtype].itemsize
    form = FORMS[task.form]
    return form.passes_of_long if sample > cache else form.passes


@dataclasses.dataclass
class Bench:
    """Measures the rows of a section."""

    plan: Plan
    with_host: bool
    """Whether to time the host, graphs, and inputs that are in the cache."""
    graph_error: str = ""
    """Why a call could not be captured: after one that could not, none is."""
    longest: dict[bool, float] = dataclasses.field(default_factory=dict)
    """Seconds of the longest row so far, compiled or not."""

    def may_begin(self, name: str) -> bool:
        """Whether there is time for another row."""
        compiled = name == COMPILED
        least = 0 if self.plan.rehearsal else LEAST_COMPILED if compiled else LEAST
        return self.plan.left() > max(least, 1.2 * self.longest.get(compiled, 0))

    def row(self, task: Task, name: str, run: Call, pairs: list[Pair], turns: Iterator[Pair]) -> dict[str, Any]:
        """A row, without its share; or why there is none."""
        began = time.monotonic()
        noted = {"shape": list(task.shape), "dtype": task.dtype, "form": task.form, "candidate": name}
        try:
            noted.update(self._figures(task, name, run, pairs, turns))
        except Exception as error:  # one candidate's failure must not lose the others' figures
            noted["error"] = _described(error)
        compiled = name == COMPILED
        self.longest[compiled] = max(self.longest.get(compiled, 0), time.monotonic() - began)
        return noted

    def _figures(self, task: Task, name: str, run: Call, pairs: list[Pair], turns: Iterator[Pair]) -> dict[str, Any]:
        a, b = pairs[0]
        checked = name != "clone" and not name.endswith("tabulated")
        if checked:
            check(run, task.form, a, b)
        rounds = 3 if self.plan.rehearsal else max(20, min(ROUNDS, 2**33 // (a.numel() * a.element_size())))
        cold = device_us(run, turns, rounds, self.plan.device)
        figures: dict[str, Any] = {
            "checked": checked,
            "cold_us": statistics.median(cold),
            "quartiles_us": statistics.quantiles(cold, n=4)[::2],
        }
        if self.with_host:
            figures.update(self._with_host(run, pairs[0], turns, rounds))
        if self.plan.device == "cuda":  # on the CPU the profiler's start takes longer than all the rest
            outcome = run(a, b)
            gradients = bytes_of(outcome[1:] if checked else outcome[-1:])
            del outcome
            figures["extra_bytes"] = peak_bytes(lambda: run(a, b), self.plan.device) - gradients
        return figures

    def _with_host(self, run: Call, pair: Pair, turns: Iterator[Pair], rounds: int) -> dict[str, Any]:
        device, toy = self.plan.device, self.plan.rehearsal
        calls = 2 if toy else 100
        figures: dict[str, Any] = {
            "hot_us": statistics.median(device_us(run, itertools.repeat(pair), rounds, device)),
            "wall_us": wall_us(run, turns, calls, device, repeats=1 if toy else 7),
            "host_us": host_us(run, pair, calls, device),
        }
        if device == "cuda" and not self.graph_error:
            try:
                figures["graph_us"] = graph_us(run, pair)
            except Exception as error:
                self.graph_error = figures["graph_error"] = _described(error)
        return figures


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def measure(plan: Plan, tasks: list[Task], with_host: bool) -> None:
    """Rows for every task, in their order, as far as the time goes."""
    rows: list[dict[str, Any]] = []
    left_out: list[Any] = []
    bench = Bench(plan, with_host)
    for number, task in enumerate(tasks):
        pairs = pairs_of(task, plan)
        # Across all candidates: none finds in the cache what the one before has read.
        turns = itertools.cycle(pairs)
        passes = passes_of(task, l2_bytes(plan.device))
        cloned = 0.0
        for name, run in runs_of(task, plan):
            if not bench.may_begin(name):
                if name != COMPILED:
                    return plan.keep({"complete": False, "left_out": [*left_out, *tasks[number:]], "rows": rows})
                left_out.append([*task[:3], name])
                continue
            row = bench.row(task, name, run, pairs, turns)
            if name == "clone" and "cold_us" in row:
                cloned = CLONE_PASSES / row["cold_us"]
            elif cloned and FUSED in name and "cold_us" in row:
                row.update(passes=passes, share_of_copy=passes / row["cold_us"] / cloned)
            rows.append(row)
            plan.keep({"complete": False, "left_out": [*left_out, *tasks[number:]], "rows": rows})
        del pairs, turns
    return plan.keep({"complete": not left_out, "left_out": left_out, "rows": rows})


def compile_in_this_process() -> None:
    """No pool of compilers beside what is timed."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # where something imported has read the environment already


def latents(plan: Plan) -> None:
    """The size of latents, with the host's time."""
    compile_in_this_process()
    measure(plan, latents_tasks(plan.rehearsal), with_host=True)


def latents_tasks(rehearsal: bool = False) -> list[Task]:
    """The first shape of every form and dtype comes first; the last one without torch.compile, which takes longest."""
    kinds = [("gaussian", "float32"), ("gaussian", "bfloat16"), ("variational", "float32"), ("mse", "float32")]
    if rehearsal:
        return [Task(*kind, TOY) for kind in kinds[::2]]
    baselines = [(EAGER, COMPILED)] * (len(LATENTS) - 1) + [(EAGER,)]
    return [Task(*kind, *at) for at in zip(LATENTS, baselines, strict=True) for kind in kinds]


def large(plan: Plan) -> None:
    """64 MiB and 512 MiB a tensor."""
    compile_in_this_process()
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
    shapes = [(max(1, size // 65536), 4, 64, 64) for size in SWEEP]
    measure(plan, [Task("gaussian", "float32", shape, ()) for shape in ([TOY] if plan.rehearsal else shapes)], False)


def host(plan: Plan) -> None:
    """What a call costs the host, by part (host_levels.py)."""
    shapes = (TOY,) if plan.rehearsal else host_levels.SHAPES
    rounds, iterations = (2, 2) if plan.rehearsal else (100, 10)
    rows: list[dict[str, Any]] = []
    for name, shape in itertools.product(fused_backends(plan.device), shapes):
        if plan.left() < 2:
            return plan.keep({"complete": False, "rows": rows})
        try:
            rows.append(host_levels.measure(shape, name, plan.device, rounds, iterations))
        except Exception as error:  # as in Bench
            rows.append({"shape": list(shape), "backend": name, "error": _described(error)})
        plan.keep({"complete": False, "rows": rows})
    return plan.keep({"complete": True, "rows": rows})
