"""``fdu doctor``: check whether fdu can run here, and name the fix for each problem."""

from __future__ import annotations

import dataclasses
import importlib
import platform
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

OPTIONAL = {
    "triton": ("the fused kernels on GPUs", "pip install triton"),
    "ninja": ("building the compiled kernels", "pip install ninja"),
    "pybind11": ("building the compiled kernels", "pip install pybind11"),
    "bitsandbytes": ("--quantization nf4 and --optimizer adamw_8bit", "pip install bitsandbytes"),
    "prodigyopt": ("--optimizer prodigy", "pip install prodigyopt"),
    "schedulefree": ("--optimizer schedule_free", "pip install schedulefree"),
    "ray": ("fdu compare --launcher ray", "pip install ray"),
    "submitit": ("fdu compare --launcher slurm", "pip install submitit"),
    "tensorboard": ("--report_to tensorboard", "pip install tensorboard"),
    "gradio": ("fdu studio", "pip install gradio"),
    "nudenet": ("--target_judge nudenet", "pip install nudenet"),
    "scikit-learn": ("training the digits pipeline again", "pip install scikit-learn"),
    "resvg-py": ("training the emoji pipeline again", "pip install resvg-py"),
}
"""Optional distributions, with their use and the command that installs them."""
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
"""Import names that differ from the distribution's."""
REINSTALL = "install fdu again from its checkout or wheel: pip install --force-reinstall --no-deps PATH"
"""No registry has fdu, so its name alone would not do."""
LITTLE_DISK = 2 << 30
"""Bytes; a full pipeline of Stable Diffusion in fp16 takes about this much."""

BACKEND_REMEDIES = (
    (
        "cannot run the cuda kernels",
        "update the NVIDIA driver, or name an older CUDA toolkit: CUDA_HOME=... python -m fdu_kernels.build",
    ),
    (
        "without cuda kernels|nvcc",
        "install the CUDA toolkit, 12.4 or newer, and run python -m fdu_kernels.build; or stay with the other backends",
    ),
    ("without cuda, rocm", "with a GPU, install the CUDA, ROCm or XPU build of PyTorch for it; a CPU needs none"),
    ("cuda device|nvidia|gpu", "nothing to fix without an NVIDIA GPU; with one, check that `nvidia-smi` works"),
    ("cuda|cpu-only|driver", "install a CUDA build of PyTorch: pip install --force-reinstall torch"),
    ("triton", "pip install triton"),
    ("ninja", "pip install ninja"),
    ("pybind11", "pip install pybind11"),
    ("compiler|g\\+\\+|c\\+\\+|gcc|clang", "install a C++20 compiler, such as: apt install g++"),
    (
        "compiled|built|build|extension|_c\\b",
        "install fdu again from its wheel; in a checkout, "
        ".venv/bin/pip install --no-deps --no-build-isolation --editable .",
    ),
)
"""Patterns in the reason why a backend cannot run, each with its remedy; the first match counts."""

State = Literal["ok", "note", "fault"]


@dataclasses.dataclass
class Doctor:
    """Check whether fdu can run here: versions, devices, kernels, disk. Show how to fix each problem.

    Exit code 0 if fdu can run, otherwise 1.
    """

    examples: ClassVar[tuple[str, ...]] = ("fdu doctor",)

    def prepare(self, command: str) -> Callable[[], None]:
        """Return the work; there is nothing to check."""

        def work() -> None:
            findings = examine()
            print(render(findings))
            sys.exit(0 if healthy(findings) else 1)

        return work


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    subject: str
    state: State
    """"note": fdu runs without it; "fault": fdu cannot run."""
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Make all checks. Never raises: a check that fails is a finding, too."""
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    for look in (_packages, _devices, _kernels, _embedded, _disk):
        try:
            findings += look()
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            findings.append(Finding(look.__name__.strip("_"), "fault", detail, REINSTALL))
    return findings


def healthy(findings: list[Finding]) -> bool:
    """Whether fdu can run."""
    return all(finding.state != "fault" for finding in findings)


def render(findings: list[Finding]) -> str:
    """The findings as aligned text, with a conclusion in words."""
    marks = {"ok": "ok", "note": "note", "fault": "FAULT"}
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]:5}  {finding.subject:{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':5}  {'':{width}}  -> {finding.remedy}")
    faults = [finding.subject for finding in findings if finding.state == "fault"]
    lines += ["", f"fdu cannot run here; fix first: {', '.join(faults)}" if faults else "fdu can run here."]
    return "\n".join(lines)


def requirements() -> dict[str, SpecifierSet]:
    """The distributions that fdu's metadata require here, without extras, and the versions allowed."""
    from packaging.requirements import Requirement

    found = [Requirement(line) for line in requires("fdu") or ()]
    return {one.name: one.specifier for one in found if one.marker is None or one.marker.evaluate({"extra": ""})}


def _packages() -> list[Finding]:
    try:
        required = {name: versions for name, versions in requirements().items() if name not in OPTIONAL}
    except PackageNotFoundError:
        return [Finding("packages", "note", "fdu is not installed, so its requirements are unknown", "pip install .")]
    findings = [_required(name, versions) for name, versions in required.items()]
    return findings + [_optional(name, *use) for name, use in OPTIONAL.items()]


def _required(name: str, versions: SpecifierSet) -> Finding:
    remedy = f"pip install --upgrade '{name}{versions}'"
    try:
        importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # an installed package can fail to import in any way
        return Finding(name, "fault", f"cannot be imported: {error}", remedy)
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "ok", "version unknown")
    if not versions.contains(found, prereleases=True):
        return Finding(name, "fault", f"{found} is installed, but fdu needs {versions}", remedy)
    return Finding(name, "ok", found)


def _optional(name: str, use: str, remedy: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "note", f"not installed; only for {use}", remedy)


def _devices() -> list[Finding]:
    import torch

    hip, cuda = torch.version.hip, torch.version.cuda
    findings = [Finding("cpu", "ok", f"threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            # Builds for AMD's GPUs use the name cuda, too.
            capability = f"sm_{gpu.major}{gpu.minor}" if hip is None else gpu.gcnArchName
            detail = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}"
            findings.append(Finding(f"cuda:{index}", "ok", detail))
    elif hip is not None:
        detail, remedy = f"torch is built for ROCm {hip} but finds no device", "with an AMD GPU, run `rocminfo`"
        findings.append(Finding("rocm", "note", detail, f"{remedy}, which should list it"))
    elif cuda is not None:
        detail, remedy = f"torch is built for CUDA {cuda} but finds no device", "check that `nvidia-smi` works"
        findings.append(Finding("cuda", "note", detail, f"with an NVIDIA GPU, {remedy}"))
    elif not torch.xpu.is_available():
        remedy = "with an NVIDIA GPU: pip install --force-reinstall torch"
        findings.append(Finding("cuda", "note", "this torch is a build without CUDA", remedy))
    for index in range(torch.xpu.device_count()):
        intel = torch.xpu.get_device_properties(index)
        wide = "" if intel.has_fp64 else "; without float64"
        findings.append(Finding(f"xpu:{index}", "ok", f"{intel.name}, {intel.total_memory / 2**30:.0f} GiB{wide}"))
    if torch.backends.mps.is_available():
        findings.append(Finding("mps", "ok", "Apple GPU"))
    return findings


def _kernels() -> list[Finding]:
    import fdu_kernels

    findings = []
    for name, reason in fdu_kernels.backends().items():
        subject = f"kernels: {name}"
        if reason is None:
            findings.append(Finding(subject, "ok", "can run"))
        else:
            # The eager reference serves every device, so fdu can run without any other backend.
            findings.append(Finding(subject, "fault" if name == "torch" else "note", reason, remedy_for(reason)))
    return findings


def remedy_for(reason: str) -> str:
    """The remedy if a backend cannot run for ``reason``; "" if none is known."""
    return next((remedy for pattern, remedy in BACKEND_REMEDIES if re.search(pattern, reason.lower())), "")


def _embedded() -> list[Finding]:
    from fdu.subjects.embedded import EMBEDDED

    findings = []
    for one in EMBEDDED:
        missing = [path.name for path in (one.data / "model_index.json", one.classifier) if not path.is_file()]
        if missing:
            detail = f"{', '.join(missing)} missing: no demo on it, but fdu runs on other models"
            findings.append(Finding(f"pipeline {one.name}", "note", detail, REINSTALL))
        else:
            findings.append(Finding(f"pipeline {one.name}", "ok", "present"))
    return findings


def _disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 2**30:.1f} GiB free here"
    if free < LITTLE_DISK:
        detail += ": enough for LoRA weights, too little for a full pipeline"
        return [Finding("disk", "note", detail, "free some space")]
    return [Finding("disk", "ok", detail)]
