"""The doctor tells a machine that can run fdu from one that cannot, and names the remedy."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import types
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from setuptools.config.pyprojecttoml import load_file

import fdu_kernels
from fdu import cli
from fdu.cli import doctor, main
from fdu.cli.doctor import Finding, examine, healthy, remedy_for, render


def finding(findings: list[Finding], subject: str) -> Finding:
    return next(found for found in findings if found.subject == subject)


def test_this_machine_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == cli.OK
    output = capsys.readouterr().out
    assert output.endswith("fdu can run here.\n")
    for subject in (*doctor.requirements(), "python", "cpu", "kernels: torch", "pipeline digits", "disk"):
        assert subject in output


@pytest.mark.parametrize("extra", ["train", "track", "memory", "optimizers", "slurm", "ray", "studio"])
def test_the_packages_of_options_are_optional(extra: str) -> None:
    project = load_file(Path(__file__).parents[2] / "pyproject.toml")["project"]
    assert {Requirement(line).name for line in project["optional-dependencies"][extra]} <= doctor.OPTIONAL.keys()


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.import_module

    def broken(name: str, *arguments: Any) -> Any:
        if name == "peft":
            raise ImportError("no peft here")
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert main(["doctor"]) == cli.FAILED
    output = capsys.readouterr().out
    assert "FAULT  peft" in output and "no peft here" in output and "-> pip install --upgrade 'peft>=" in output
    assert output.endswith("fdu cannot run here; fix first: peft\n")


def test_a_backend_that_cannot_run_is_a_note_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"triton": "no CUDA device", "cpu": "the compiled extension was not built", "torch": None}
    monkeypatch.setattr(fdu_kernels, "backends", lambda: states)
    findings = examine()
    assert healthy(findings)
    assert finding(findings, "kernels: triton").detail == "no CUDA device"
    assert "nvidia-smi" in finding(findings, "kernels: triton").remedy
    assert "pip install" in finding(findings, "kernels: cpu").remedy
    assert finding(findings, "kernels: torch").state == "ok"


def test_the_gpus_of_amd_and_intel_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    amd = types.SimpleNamespace(name="AMD Instinct", total_memory=2**37, gcnArchName="gfx942", major=9, minor=4)
    intel = types.SimpleNamespace(name="Intel Arc", total_memory=2**34, has_fp64=False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: amd)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: intel)
    found = doctor._devices()
    assert finding(found, "cuda:0").detail == "AMD Instinct, 128 GiB, gfx942"
    assert finding(found, "xpu:0").detail == "Intel Arc, 16 GiB; without float64"


def test_without_the_reference_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fdu_kernels, "backends", lambda: {"torch": "broken"})
    assert not healthy(examine())


def test_a_look_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str | None]:
        raise RuntimeError("no backends today")

    monkeypatch.setattr(fdu_kernels, "backends", broken)
    assert finding(examine(), "kernels").detail == "RuntimeError: no backends today"


def test_optional_packages_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    findings = examine()
    assert healthy(findings)
    found = finding(findings, "scikit-learn")
    assert (found.state, found.remedy) == ("note", "pip install scikit-learn")


def test_a_missing_pipeline_and_a_full_disk_are_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    monkeypatch.setattr("fdu.subjects.embedded.Digits.data", tmp_path)
    findings = examine()
    assert healthy(findings)
    assert finding(findings, "disk").state == "note"
    assert "no demo" in finding(findings, "pipeline digits").detail


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("no CUDA device", "nvidia-smi"),
        ("torch was built without CUDA", "CUDA build of PyTorch"),
        ("this PyTorch is built without CUDA", "CUDA build of PyTorch"),
        ("this PyTorch is built without CUDA, ROCm and XPU", "CUDA, ROCm or XPU build of PyTorch"),
        ("no CUDA, ROCm or Intel GPU", "nothing to fix without"),
        ("built without CUDA kernels: there was no nvcc; install the CUDA toolkit", "CUDA toolkit, 12.4"),
        ("built without CUDA kernels: the machine that built them has no CUDA device", "CUDA toolkit, 12.4"),
        ("cuda:0 (sm_90) cannot run the CUDA kernels, built for 9.0 by nvcc 13.0: driver", "update the NVIDIA driver"),
        ("ninja is missing", "pip install ninja"),
        ("No C++ compiler found", "apt install g++"),
        ("something never heard of", ""),
    ],
)
def test_remedies(reason: str, remedy: str) -> None:
    assert remedy in remedy_for(reason)
    assert bool(remedy) == bool(remedy_for(reason))


def test_remedies_name_modules_and_make_targets_that_exist() -> None:
    remedies = "\n".join(remedy for _, remedy in doctor.BACKEND_REMEDIES)
    modules = re.findall(r"python -m ([\w.]+)", remedies)
    assert modules and all(importlib.util.find_spec(module) for module in modules)
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", remedies)) <= set(targets)


def test_alignment() -> None:
    lines = render([Finding("a", "ok", "one"), Finding("longer", "note", "two", "do this")]).splitlines()
    assert lines[0].index("one") == lines[1].index("two") == lines[2].index("->")


def test_a_package_that_is_too_old_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.0" if name == "diffusers" else real(name))
    found = finding(examine(), "diffusers")
    assert found.state == "fault" and found.detail.startswith("0.1.0 is installed, but fdu needs >=0.")
    assert found.remedy.startswith("pip install --upgrade 'diffusers>=0.")


def test_requirements_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.10", "winonly; sys_platform == 'win32'", 'scipy>=1; extra == "dev"', "triton>=3.6"]
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    assert {name: str(versions) for name, versions in doctor.requirements().items()} == {
        "torch": ">=2.10",
        "triton": ">=3.6",
    }
    assert finding(examine(), "triton").state in ("ok", "note")


def test_without_metadata_the_rest_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", absent)
    findings = examine()
    assert healthy(findings) and finding(findings, "packages").state == "note" and finding(findings, "kernels: torch")
