"""Build, test and time everything on a GPU machine in one command: ``python benchmarks/gpu_suite.py --out DIR``.

Needs torch, triton, numpy, pytest and a C++ compiler (nvcc for the CUDA kernels); nothing is installed. Each stage is
written to DIR/gpu_suite.json as soon as it is done, so a run that is cut off keeps what it has. Ends within
``--minutes`` and says how far it got.

Times are medians of CUDA-event timings over inputs that rotate (cold: their sum exceeds the L2 cache) or stay (hot),
in microseconds. Beside each stands the share of the bandwidth that ``torch.Tensor.copy_`` reached in the same run, by
the byte model: value_and_grad moves 3N, the autograd form 5N, a density-ratio estimate 2N.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fdu_kernels as fk  # noqa: E402

RECORD = "gpu_suite.json"
SHAPES = [
    (1, 4, 64, 64), (16, 4, 64, 64), (64, 4, 64, 64), (16, 16, 128, 128), (64, 16, 128, 128), (512, 16, 128, 128),
    (4, 33_554_432),
]  # fmt: skip
"""From one SD latent to 512 MiB a tensor in fp32, the last with long samples."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
L2_BYTES = 128 << 20
"""Inputs that rotate exceed this together; more than any L2 cache of today."""
SANITIZED = "golden_values and mse or value_and_gradient and hellinger and 33"


@dataclasses.dataclass
class Suite:
    """The record of a run, its deadline, and where it goes."""

    out: Path
    deadline: float
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def keep(self, stage: str, result: Any) -> None:
        """Write a stage's result, whole or not at all."""
        self.record[stage] = result
        partial = self.out / f".{RECORD}"
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(partial, self.out / RECORD)

    def call(self, stage: str, command: list[str], seconds: float, environment: dict[str, str] | None = None) -> bool:
        """Run a command, keep its end; True if it succeeded."""
        limit = min(seconds, self.left())
        if limit < 5:
            self.keep(stage, {"skipped": "no time left"})
            return False
        log = self.out / f"{stage}.log"
        began = time.monotonic()
        try:
            with log.open("w") as stream:
                code: int | None = subprocess.run(
                    command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, timeout=limit, check=False,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
                ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
        tail = log.read_text(errors="replace").splitlines()[-8:]
        self.keep(stage, {"exit": code, "seconds": round(time.monotonic() - began, 1), "tail": tail})
        print(f"{stage}: {'timed out' if code is None else f'exit {code}'}", *tail[-2:], sep="\n  ", flush=True)
        return code == 0


def machine() -> dict[str, Any]:
    """Device, driver, versions, commit."""
    described: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
        "nvcc": _output(["nvcc", "--version"]).splitlines()[-1:],
        "driver": _output(["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.mem", "--format=csv,noheader"]),
        "backends": fk.backends(),
    }
    try:
        import triton

        described["triton"] = triton.__version__
    except ImportError:
        described["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described["device"] = properties.name
        described["multiprocessors"] = properties.multi_processor_count
        described["l2_bytes"] = properties.L2_cache_size
    return described


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def eager_hellinger(pred: Tensor, target: Tensor) -> Tensor:
    """1 - exp(-s/8) as one writes it in PyTorch."""
    s = (pred.float() - target.float()).square().flatten(1).mean(1)
    return -torch.expm1(s / -8).mean()


def eager_variational(p: Tensor, q: Tensor) -> Tensor:
    """The bound of jensen_shannon as one writes it in PyTorch."""
    softplus = torch.nn.functional.softplus
    return (0.6931471805599453 - softplus(-p.float())).mean() / 2 - (
        softplus(q.float()) - 0.6931471805599453
    ).mean() / 2


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], both: bool) -> Callable[[Tensor, Tensor], object]:
    """Value and gradient through autograd."""

    def run(a: Tensor, b: Tensor) -> object:
        a = a.detach().requires_grad_()
        b = b.detach().requires_grad_(both)
        return torch.autograd.grad(loss(a, b), (a, b) if both else (a,))

    return run


def candidates() -> Iterator[tuple[str, str, int, Callable[[Tensor, Tensor], object]]]:
    """(form, candidate, passes over N bytes, call)."""
    yield "copy", "copy", 2, lambda a, b: b.copy_(a)
    eager = {"gaussian": (eager_hellinger, False), "variational": (eager_variational, True)}
    for form, (loss, both) in eager.items():
        yield form, "eager", 0, with_gradient(loss, both)
        yield form, "compiled", 0, with_gradient(torch.compile(loss, fullgraph=True, dynamic=False), both)
    for name in ("triton", "cuda"):
        if fk.backends().get(name, "absent") is not None:
            continue
        yield (
            "gaussian",
            f"{name} autograd",
            5,
            with_gradient(
                lambda a, b, name=name: fk.gaussian_divergence(a, b, "squared_hellinger", backend=name), False
            ),
        )
        yield (
            "gaussian",
            f"{name} value_and_grad",
            3,
            lambda a, b, name=name: fk.gaussian_divergence_value_and_grad(a, b, "squared_hellinger", backend=name),
        )
        yield (
            "gaussian",
            f"{name} tabulated",
            3,
            lambda a, b, name=name: fk.gaussian_divergence_value_and_grad(a, b, "jensen_shannon", backend=name),
        )
        yield (
            "variational",
            f"{name} value_and_grad",
            4,
            (lambda a, b, name=name: fk.variational_divergence_value_and_grad(a, b, "jensen_shannon", backend=name)),
        )
        yield (
            "density_ratio",
            f"{name} value_and_grad",
            2,
            (lambda a, b, name=name: fk.density_ratio_divergence_value_and_grad(a, "kl", backend=name)),
        )


def timed(call: Callable[[Tensor, Tensor], object], pairs: list[tuple[Tensor, Tensor]], rounds: int) -> list[float]:
    """Microseconds of each call on the device, inputs in turn."""
    for a, b in pairs[:3]:
        call(a, b)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for index, (start, end) in enumerate(events):
        a, b = pairs[index % len(pairs)]
        start.record()
        call(a, b)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def host_time(call: Callable[[Tensor, Tensor], object], a: Tensor, b: Tensor, rounds: int = 300) -> float:
    """Microseconds of the host per call, the device kept from running full."""
    for _ in range(20):
        call(a, b)
    spans = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call(a, b)
        spans.append((time.perf_counter() - began) * 1e6)
    return statistics.median(spans)


def graphed(call: Callable[[Tensor, Tensor], object], a: Tensor, b: Tensor) -> float | None:
    """Microseconds of a call inside a CUDA graph of 20; None where it cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call(a, b)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                call(a, b)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    times = timed(lambda *_: graph.replay(), [(a, b)], 20)
    return statistics.median(times) / 20


def peak_memory(call: Callable[[Tensor, Tensor], object], a: Tensor, b: Tensor) -> int:
    """Bytes beyond the inputs at the worst moment of a call, what it returns included."""
    call(a, b)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(a, b)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(suite: Suite) -> None:
    """Time every candidate at every shape and dtype, the small ones first."""
    rows: list[dict[str, Any]] = []
    calls = list(candidates())
    for shape in SHAPES:
        for label, dtype in DTYPES.items():
            elements = torch.Size(shape).numel()
            size = elements * dtype.itemsize
            copies = max(1, min(64, -(-L2_BYTES // (2 * size))))
            generator = torch.Generator("cuda").manual_seed(0)
            pairs = [
                tuple(torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2))
                for _ in range(copies)
            ]
            copied = None
            for form, name, passes, call in calls:
                if suite.left() < 20:
                    suite.keep("timings", {"complete": False, "rows": rows})
                    return
                row: dict[str, Any] = {"shape": shape, "dtype": label, "form": form, "candidate": name}
                try:
                    rounds = max(20, min(200, 2**33 // max(size, 1)))
                    cold = timed(call, pairs, rounds)
                    row["cold_us"] = statistics.median(cold)
                    row["spread_us"] = [min(cold), max(cold)]
                    row["hot_us"] = statistics.median(timed(call, pairs[:1], rounds))
                    if elements <= 1 << 20:
                        row["host_us"] = host_time(call, *pairs[0])
                        row["graph_us"] = graphed(call, *pairs[0])
                    row["peak_bytes"] = peak_memory(call, *pairs[0])
                    bandwidth = passes * size / row["cold_us"]
                    copied = bandwidth if name == "copy" else copied
                    row["share_of_copy"] = bandwidth / copied if copied and passes else None
                except Exception as error:  # one candidate's failure must not lose the others' figures
                    row["error"] = f"{type(error).__name__}: {error}"[:400]
                rows.append(row)
            suite.keep("timings", {"complete": False, "rows": rows})
            del pairs
    suite.keep("timings", {"complete": True, "rows": rows})


def summary(record: dict[str, Any]) -> str:
    """A short table: each candidate beside eager and torch.compile at the same shape."""
    rows = record.get("timings", {}).get("rows", [])
    lines = [f"{'shape':>20} {'dtype':>9}  {'candidate':<34}{'us':>10}{'x eager':>9}{'x compile':>10}{'of copy':>9}"]
    for row in rows:
        if "cold_us" not in row:
            lines.append(
                f"{'x'.join(map(str, row['shape'])):>20} {row['dtype']:>9}  {row['candidate']:<34}{row['error']}"
            )
            continue
        peers = {
            other["candidate"]: other.get("cold_us")
            for other in rows
            if (other["shape"], other["dtype"], other["form"]) == (row["shape"], row["dtype"], row["form"])
        }
        ratios = [f"{peers[base] / row['cold_us']:.2f}" if peers.get(base) else "" for base in ("eager", "compiled")]
        share = f"{row['share_of_copy']:.2f}" if row.get("share_of_copy") else ""
        name = f"{row['form']}: {row['candidate']}"
        lines.append(
            f"{'x'.join(map(str, row['shape'])):>20} {row['dtype']:>9}  {name:<34}{row['cold_us']:>10.1f}"
            f"{ratios[0]:>9}{ratios[1]:>10}{share:>9}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the stages in order; 0 if all that ran succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the record and the logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop, at the latest")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(options.out, time.monotonic() + 60 * options.minutes - 10)

    built = suite.call("build", [sys.executable, "-m", "fdu_kernels.build"], 180)
    suite.keep("machine", machine())
    pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "tests/gpu"]
    tested = suite.call("tests", [*pytest, "--import-mode=importlib"], 180)
    if torch.cuda.is_available():
        measure(suite)
        print(summary(suite.record))
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if sanitizer:
            command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *pytest, "-k", SANITIZED]
            suite.call("sanitizer", [*command, "--import-mode=importlib"], 120)
        else:
            suite.keep("sanitizer", {"skipped": "there is no compute-sanitizer"})
    else:
        suite.keep("timings", {"skipped": "no CUDA device"})
    finished = suite.record.get("timings", {}).get("complete", False)
    stages = ", ".join(suite.record)
    print(f"{'complete' if finished else 'INCOMPLETE'}: {stages}; {suite.left():.0f} s left; {options.out / RECORD}")
    return int(not (built and tested and finished))


if __name__ == "__main__":
    sys.exit(main())
