"""What the wheel holds, and what it asks of whoever installs it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fdu", "fdu_kernels")
NOT_SOURCES = (".*", "__pycache__", "*.egg-info", "build", "dist", "demo-out")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: what an earlier build left in build/ would find its way into the wheel."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "sources", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    made = subprocess.run([*build, "--wheel-dir", folder, folder / "sources"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    (path,) = folder.glob("fdu-*.whl")
    return zipfile.ZipFile(path)


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


def test_wheel_version_is_that_of_the_package(wheel: zipfile.ZipFile) -> None:
    stated = re.search(r'^__version__ = "(.+)"$', (ROOT / "fdu/__init__.py").read_text(), re.MULTILINE)
    assert stated and message_from_bytes(read_metadata(wheel, "METADATA"))["Version"] == stated[1]


def test_command_line_entry_point_resolves(wheel: zipfile.ZipFile) -> None:
    assert "fdu = fdu.cli:main" in read_metadata(wheel, "entry_points.txt").decode()
    from fdu.cli import main

    assert callable(main)


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
