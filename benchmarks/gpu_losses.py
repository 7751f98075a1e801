"""The losses on a GPU: at the size of latents with the host's time, large ones against the bandwidth, a sweep of sizes.

A row is a candidate at a shape and dtype: ``cold_us`` on inputs that rotate through more than the L2 cache, with
quartiles, ``hot_us`` on the same inputs again, ``wall_us`` a call with the host's time, ``host_us`` until a call
returns, ``graph_us`` in a replayed CUDA graph, ``extra_bytes`` at the peak beyond inputs and gradients, and
``share_of_copy``: of the bandwidth that torch.clone reaches on the same inputs, by the byte model (candidates.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import host_levels
import torch
from candidates import CLONE_PASSES, DTYPES, FORMS, Call, candidate, check, fused_backends, inputs
from gpu_timing import L2_BYTES, Plan, device_us, graph_us, host_us, wall_us
from memory_peak import bytes_of, peak_bytes
from torch import Tensor

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


def large_shapes(dtype: torch.dtype) -> list[Shape]:
    """64 and 512 MiB of latents, and 512 MiB in four long samples."""
    size = dtype.itemsize
    latents = [(bytes_ // (16 * 128 * 128 * size), 16, 128, 128) for bytes_ in (FULL, LEAST_LARGE)]
    return [*latents, (4, FULL // size // 4)]


def runs_of(form: str, plan: Plan, baselines: bool = True) -> Iterator[tuple[str, Call]]:
    """(candidate, call) of a form: clone, PyTorch, and ours by backend."""
    yield "clone", lambda a, b: (a.detach().clone(),)
    if baselines:
        for which in ("eager", "compiled"):
            yield which, candidate(form, which, "torch", plan.compiler)
    for name in fused_backends():
        if baselines:
            yield f"{name} autograd", candidate(form, "autograd", name)
        yield f"{name} {FUSED}", candidate(form, FUSED, name)
        if form == "gaussian" and baselines:
            yield (
                f"{name} tabulated",
                lambda a, b, name=name: fk.gaussian_divergence_value_and_grad(a, b, "jensen_shannon", backend=name),
            )


def pairs_of(shape: Shape, dtype: torch.dtype, plan: Plan, both: bool) -> list[tuple[Tensor, Tensor]]:
    """Random inputs that exceed the L2 cache together."""
    size = 2 * torch.Size(shape).numel() * dtype.itemsize
    count = 2 if plan.rehearsal else max(2, min(64, -(-L2_BYTES // size)))
    pairs = [inputs(shape, dtype, plan.device, seed) for seed in range(count)]
    for _, second in pairs:
        second.requires_grad_(both)
    return pairs


def measured(
    form: str, name: str, run: Call, pairs: list[tuple[Tensor, Tensor]], plan: Plan, with_host: bool
) -> dict[str, Any]:
    """A row, without its share."""
    a, b = pairs[0]
    checked = name not in ("clone",) and not name.endswith("tabulated")
    if checked:
        check(run, form, a, b)
    size = a.numel() * a.element_size()
    rounds = 3 if plan.rehearsal else max(20, min(200, 2**33 // size))
    cold = device_us(run, pairs, rounds, plan.device)
    row: dict[str, Any] = {
        "shape": list(a.shape),
        "dtype": str(a.dtype).removeprefix("torch."),
        "form": form,
        "candidate": name,
        "checked": checked,
        "cold_us": statistics.median(cold),
        "quartiles_us": statistics.quantiles(cold, n=4)[::2],
        "hot_us": statistics.median(device_us(run, pairs[:1], rounds, plan.device)),
    }
    if with_host:
        calls = 2 if plan.rehearsal else 100
        row["wall_us"] = wall_us(run, pairs, calls, plan.device, repeats=1 if plan.rehearsal else 7)
        row["host_us"] = host_us(run, pairs[0], calls, plan.device)
        row["graph_us"] = graph_us(run, pairs[0], plan.device)
    if plan.device == "cuda":  # on the CPU the profiler's start takes longer than all the rest
        outcome = run(a, b)
        gradients = bytes_of(outcome[1:] if checked else outcome[-1:])
        del outcome
        row["extra_bytes"] = peak_bytes(lambda: run(a, b), plan.device) - gradients
    return row


def measure(plan: Plan, tasks: list[tuple[str, str, Shape]], with_host: bool, baselines: bool = True) -> None:
    """Rows for every (form, dtype, shape), in their order, as far as the time goes."""
    rows: list[dict[str, Any]] = []
    for number, (form, dtype, shape) in enumerate(tasks):
        pairs = pairs_of(shape, DTYPES[dtype], plan, FORMS[form].wanted == 2)
        cloned = 0.0
        for name, run in runs_of(form, plan, baselines):
            if plan.left() < 3:
                return plan.keep({"complete": False, "left_out": tasks[number:], "rows": rows})
            try:
                row = measured(form, name, run, pairs, plan, with_host)
            except Exception as error:  # one candidate's failure must not lose the others' figures
                row = {"shape": list(shape), "dtype": dtype, "form": form, "candidate": name}
                row["error"] = f"{type(error).__name__}: {error}"[:400]
            if name == "clone" and "cold_us" in row:
                cloned = CLONE_PASSES / row["cold_us"]
            elif cloned and FUSED in name and "cold_us" in row:
                row["share_of_copy"] = FORMS[form].passes / row["cold_us"] / cloned
            rows.append(row)
            plan.keep({"complete": False, "left_out": tasks[number:], "rows": rows})
        del pairs
    return plan.keep({"complete": True, "left_out": [], "rows": rows})


def latents(plan: Plan) -> None:
    """The size of latents, with the host's time: the first shape of every form and dtype comes first."""
    shapes = (TOY,) if plan.rehearsal else LATENTS
    kinds = [("gaussian", "float32"), ("gaussian", "bfloat16"), ("variational", "float32"), ("mse", "float32")]
    if plan.rehearsal:
        kinds = kinds[::2]
    measure(plan, [(form, dtype, shape) for shape in shapes for form, dtype in kinds], with_host=True)


def large(plan: Plan) -> None:
    """64 MiB and 512 MiB a tensor; what is promised at 512 MiB comes first."""
    kinds = [(form, dtype) for form in ("gaussian", "variational") for dtype in ("float32", "bfloat16")]
    if plan.rehearsal:
        kinds = kinds[:2]
    per_kind = {kind: [TOY] if plan.rehearsal else large_shapes(DTYPES[kind[1]]) for kind in kinds}
    most = max(map(len, per_kind.values()))
    tasks = [(*kind, per_kind[kind][place]) for place in range(most) for kind in kinds if place < len(per_kind[kind])]
    if not plan.rehearsal:
        tasks.append(("density_ratio", "float32", per_kind[kinds[0]][0]))
    measure(plan, tasks, with_host=False)


def sweep(plan: Plan) -> None:
    """Ours and clone over all sizes, for the speed-of-light plot."""
    sizes = (2048,) if plan.rehearsal else SWEEP
    tasks = [("gaussian", "float32", (max(1, size // 65536), 4, 64, 64)) for size in sizes]
    measure(plan, [(*kind, TOY) for *kind, _ in tasks] if plan.rehearsal else tasks, with_host=False, baselines=False)


def host(plan: Plan) -> None:
    """What a call costs the host, by part (host_levels.py)."""
    shapes = (TOY,) if plan.rehearsal else host_levels.SHAPES
    rounds = 2 if plan.rehearsal else 100
    rows = []
    for name in fused_backends():
        for shape in shapes:
            if plan.left() < 2:
                return plan.keep({"complete": False, "rows": rows})
            rows.append(host_levels.measure(shape, name, plan.device, rounds, 2 if plan.rehearsal else 10))
            plan.keep({"complete": False, "rows": rows})
    return plan.keep({"complete": True, "rows": rows})
