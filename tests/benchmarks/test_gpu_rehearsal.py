"""The GPU suite from end to end, rehearsed on machines where something is broken: it costs its own section only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_suite
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="process groups"),
]

# Of each test its first item per backend, and of the file about trainings the shortest test.
BRIEF = """
import os

import pytest

KEPT = ("test_golden_critics", "test_clusters_and_tickets", "test_density_ratios", "test_an_erasure_is_drawn")


def fail():
    raise AssertionError("broken")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    kept = {}
    for item in items:
        if item.name.startswith(KEPT):
            given = item.callspec.params if hasattr(item, "callspec") else {}
            kept.setdefault((item.function, given.get("backend")), item)
    items[:] = kept.values()
    for item in items:
        if os.environ.get("BROKEN", "none") in item.name:
            item.runtest = fail
"""
WITHOUT_DIFFUSERS = """
import importlib.machinery

real = importlib.machinery.PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] == "diffusers" else real(name, path, target)


importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""
NVCC = """#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.48" ;;
    --list-gpu-code) echo "sm_80 sm_90" ;;
    *) echo "nvcc broke" >&2; exit 2 ;;
esac
"""


def rehearse(folder: Path, *names: str, **environment: str) -> tuple[dict[str, bool], str]:
    """Whether each section succeeded, and what the suite printed."""
    (folder / "brief.py").write_text(BRIEF)
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTEST_ADDOPTS": "-p brief", **environment}
    out = folder / "out"
    command = [
        sys.executable,
        gpu_suite.__file__,
        "--out",
        str(out),
        "--rehearsal",
        "--minutes",
        "20",
        "--only",
        *names,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    record = json.loads((out / gpu_suite.RECORD).read_text())
    by_name = {section.name: section for section in gpu_suite.sections(rehearsal=True)}
    good = {name: gpu_suite.succeeded(by_name[name], record[name]) for name in names}
    assert done.returncode == int(not all(good.values())), done.stdout + done.stderr
    return good, done.stdout + done.stderr


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("broken", [True, False], ids=["a broken CUDA build", "no nvcc"])
def test_without_cuda_kernels_the_tests_of_triton_pass(broken: bool, tmp_path: Path) -> None:
    toolkit = tmp_path / "toolkit"
    if broken:
        script(toolkit / "bin" / "nvcc", NVCC)
    # What is built here, without optimization, is never used again.
    compiler = script(tmp_path / "compiler", '#!/bin/sh\nexec g++ "$@" -O0\n')
    places = {"CUDA_HOME": str(toolkit), "CXX": compiler, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    good, printed = rehearse(tmp_path, "build", "cuda", "triton", **places)
    assert good == {"build": False, "cuda": False, "triton": True}, printed
    assert ("nvcc broke" if broken else "has no bin/nvcc") in printed


def test_without_a_wheel_the_tests_of_the_kernels_pass(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DIFFUSERS)
    good, printed = rehearse(tmp_path, "wheels", "triton", "fdu", "sd15", "sweep")
    assert good == {"wheels": False, "triton": True, "fdu": False, "sd15": False, "sweep": True}, printed
    assert "missing: diffusers==" in printed


def test_a_test_that_fails_costs_its_section_only(tmp_path: Path) -> None:
    good, printed = rehearse(tmp_path, "wheels", "triton", "fdu", BROKEN="test_density_ratios")
    assert good == {"wheels": True, "triton": False, "fdu": True}, printed
    assert "1 failed, 2 passed" in printed


def test_variants_are_probed(tmp_path: Path) -> None:
    good, printed = rehearse(tmp_path, "probe")
    assert good == {"probe": True}, printed
    rows = json.loads((tmp_path / "out" / gpu_suite.RECORD).read_text())["probe"]["rows"]
    assert rows[0]["variant"] == "copy" and not any("error" in row for row in rows)
    found = {(row["dtype"], row["elements"], row["threads"], row["cluster"], row["arrival"]) for row in rows[1:]}
    for dtype in ("float32", "bfloat16"):
        for arrival in ("early", "late"):
            assert {(dtype, 64, 64, 1, arrival), (dtype, 16, 64, 4, arrival)} <= found
        assert (dtype, 64, 512, 1, "ahead") in found
    assert len(found) == len(rows) - 1 and all(row["share"] > 0 for row in rows[1:])
