"""The content of the wheel and its requirements."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

import fdu
from fdu.cli import main

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
def test_wheel_carries_the_compiled_kernels_and_their_platform(sources: Path, tmp_path: Path) -> None:
    from fdu_kernels import build

    try:
        build.recipe()
    except build.BuildError as error:
        pytest.skip(str(error))
    wheel, _ = build_wheel(sources, tmp_path)
    assert f"fdu_kernels/_C{build.EXTENSION_SUFFIX}" in wheel.namelist()
    tag = message_from_bytes(read_metadata(wheel, "WHEEL"))
    assert tag["Root-Is-Purelib"] == "false" and not tag["Tag"].endswith("any")
    wheel.extractall(tmp_path)
    script = "from fdu_kernels import build; module = build.load(); print(module.__file__); print(module.BUILD)"
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    place, information = ran.stdout.splitlines()
    assert place.startswith(str(tmp_path / "fdu_kernels")) and "has no bin/nvcc" in information


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


def test_kernels_need_only_torch() -> None:
    """fdu_kernels is for trainers that have no diffusers: no import of it may reach past torch and, later, triton."""
    script = f"""
import sys
unwanted = {["fdu", "diffusers", "transformers", "tokenizers", "peft", "accelerate", "jinja2", "tyro", "tqdm", "PIL"]}
sys.modules.update(dict.fromkeys(unwanted))  # importing a module that is None raises ImportError
import fdu_kernels
assert fdu_kernels.divergences()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
