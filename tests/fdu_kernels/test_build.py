"""The build of the compiled kernels: what is missing is named with its remedy, and what is built is built once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import fdu_kernels as fk
from fdu_kernels import build
from fdu_kernels.calls import Kind
from fdu_kernels.kernels.native import CudaBackend

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Builds go into a folder of the test, and nothing of an earlier test is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "fdu_kernels"


@pytest.fixture
def plan() -> build.Recipe:
    try:
        return build.recipe()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: build.Recipe) -> Path:
    """Sources that compile at once, into a library that only tells how it was built."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for name in (*build.SOURCES, build.KERNELS):
        (folder / name).write_text("")
    (folder / "module.cpp").write_text('#include "build_info.h"\nextern const char build[] = FDU_BUILD;\n')
    monkeypatch.setattr(build, "sources_folder", lambda: folder)
    monkeypatch.setattr(build, "INSTRUCTION_SETS", {"baseline": ()})
    return folder


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if Path(name).name in names else real(name))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *build.COMPILERS)
    with pytest.raises(build.BuildError, match=r"there.*no C\+\+ compiler; .*apt install g\+\+"):
        build.recipe()
    monkeypatch.setenv("CXX", "mycc")
    with pytest.raises(build.BuildError, match="CXX names mycc.*not"):
        build.recipe()


@pytest.mark.parametrize("name", ["torch", "pybind11"])
def test_no_package(monkeypatch: pytest.MonkeyPatch, plan: build.Recipe, name: str) -> None:
    real = build.importlib.util.find_spec
    monkeypatch.setattr(
        build.importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else real(wanted, *rest)
    )
    with pytest.raises(build.BuildError, match=f"{name} is not installed.*pip install"):
        build.recipe()


def test_no_ninja(monkeypatch: pytest.MonkeyPatch, plan: build.Recipe) -> None:
    hide(monkeypatch, "ninja")
    with pytest.raises(build.BuildError, match="ninja.*not installed; pip install ninja"):
        build.recipe()


def test_no_nvcc_leaves_the_cuda_kernels_out(monkeypatch: pytest.MonkeyPatch, plan: build.Recipe) -> None:
    hide(monkeypatch, "nvcc")
    without = build.recipe(build.ARCHITECTURES)
    assert re.search("no nvcc.*CUDA toolkit", without.cuda)
    assert without.architectures == () and "cuda.o" not in without.objects
    monkeypatch.setenv("CUDA_HOME", "/opt/none")
    assert re.match("CUDA_HOME.*/opt/none.*bin/nvcc", build.recipe(build.ARCHITECTURES).cuda)
    assert build.recipe().cuda == build.NO_DEVICE


def fake_nvcc(folder: Path, release: str, codes: str) -> None:
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "nvcc"
    script.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'nvcc, release {release}, V1' || printf '{codes}'\n")
    script.chmod(0o755)


def test_architectures_that_nvcc_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: build.Recipe) -> None:
    fake_nvcc(tmp_path, "12.6", "sm_75\\nsm_80\\nsm_86\\nsm_90\\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = build.recipe(build.ARCHITECTURES)
    assert found.architectures == ("8.0", "9.0", "9.0+PTX") and found.cuda == "for 8.0, 9.0, 9.0+PTX by nvcc 12.6"
    assert found.objects["cuda.o"][0] == found.linker[0] == str(tmp_path / "bin" / "nvcc")
    assert "-gencode=arch=compute_90,code=compute_90" in found.objects["cuda.o"][2]
    assert "-DFDU_CUDA" in found.objects["module.o"][2]
    assert build.recipe(("7.5", "8.6")).architectures == ("8.6",)
    assert "nvcc supports none" in build.recipe(("7.0",)).cuda
    assert "names 'Hopper'; name architectures such as 9.0" in build.recipe(("Hopper",)).cuda
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " 8.0 8.6;9.0+PTX")
    assert build.architectures_to_distribute() == ("8.0", "8.6", "9.0+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    assert build.architectures_to_distribute() == build.ARCHITECTURES


def test_an_old_nvcc_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: build.Recipe) -> None:
    fake_nvcc(tmp_path, "11.8", "sm_80\\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert re.search("11[.]8.*12[.]4", build.recipe(("8.0",)).cuda)


def test_no_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "fdu_kernels" / "build.py"))
    with pytest.raises(build.BuildError, match="sources.*missing.*install fdu again from its checkout or wheel"):
        build.sources_folder()


def test_a_build_is_made_once(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = build.built(build.recipe())
    assert "building the C++ kernels, once, into" in capsys.readouterr().err
    assert build.built(build.recipe()) == first and not capsys.readouterr().err
    assert build.information_of(first)["cuda"] == build.NO_DEVICE
    (small / "host.cpp").write_text("// changed\n")
    assert build.built(build.recipe()) != first


def test_a_broken_source_is_told_with_the_compilers_words_and_remembered_for_an_hour(
    small: Path, own_cache: Path
) -> None:
    (small / "host.cpp").write_text("#error this is broken\n")
    plan = build.recipe()
    with pytest.raises(build.BuildError, match="(?s)build.*C.. kernels failed.*#error.*broken.*whole log"):
        build.built(plan)
    with pytest.raises(build.BuildError, match="(?s)#error.*broken.*0 minutes ago; to try .*, remove .*fdu_kernels"):
        build.built(plan)
    (small / "host.cpp").write_text("")  # as a package that is installed mends what the recipe does not name
    failure = own_cache / plan.key / "failure.txt"
    for later in (-7200, 7200):  # the clock was set back, or time has passed
        failure.touch()
        os.utime(failure, (failure.stat().st_atime, failure.stat().st_mtime - later))
        build.built(plan).unlink()
        assert not failure.exists()
        failure.write_text("of a killed process")


def test_nothing_is_loaded_that_others_can_write(monkeypatch: pytest.MonkeyPatch, small: Path, own_cache: Path) -> None:
    plan = build.recipe()
    target = build.built(plan)
    for path in (own_cache, target.parent, target):
        assert not path.stat().st_mode & 0o022
        for mode in (0o720, 0o702):
            path.chmod(mode)
            with pytest.raises(build.BuildError, match=re.escape(f"can write {path}, ") + ".*remove it.*XDG_CACHE"):
                build.built(plan)
        path.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        if target.stat().st_uid:  # what root has written is trusted
            with pytest.raises(build.BuildError, match="others than you can write"):
                build.built(plan)
    target.unlink()
    own_cache.chmod(0o777)
    with pytest.raises(build.BuildError, match="others than you can write"):
        build.built(plan)


def test_a_lock_that_is_a_link_is_not_followed(small: Path, own_cache: Path, tmp_path: Path) -> None:
    plan = build.recipe()
    (own_cache / plan.key).mkdir(parents=True, mode=0o700)
    own_cache.chmod(0o700)
    (tmp_path / "precious").write_text("text")
    (own_cache / plan.key / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(build.BuildError, match="symbolic links.*XDG_CACHE_HOME"):
        build.built(plan)
    assert (tmp_path / "precious").read_text() == "text"


def test_a_cache_with_the_finished_module_may_be_read_only(
    monkeypatch: pytest.MonkeyPatch, small: Path, own_cache: Path
) -> None:
    plan = build.recipe()
    target = build.built(plan)

    def read_only(path: object, flags: int, mode: int = 0) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(Path, "mkdir", read_only)
    assert build.built(plan) == target


@pytest.mark.slow
def test_a_killed_build_is_waited_for_and_finished(small: Path, tmp_path: Path) -> None:
    # A compiler that waits for a file, also while its caller is killed.
    slow = tmp_path / "slow-g++"
    waits = f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done"
    slow.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *host.cpp*) {waits};; esac\nexec g++ "$@"\n'
    )
    slow.chmod(0o755)
    environment = {**os.environ, "CXX": str(slow)}
    script = f"""
from pathlib import Path
from fdu_kernels import build
build.sources_folder = lambda: Path({str(small)!r})
build.INSTRUCTION_SETS = {{"baseline": ()}}
print(build.built(build.recipe()))
"""

    def start() -> subprocess.Popen[str]:
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, env=environment, **piped)

    killed = start()
    deadline = time.monotonic() + 100
    while "host.cpp" not in (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else True:
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    following = start()
    assert following.stderr is not None and "waiting for another process" in following.stderr.readline()
    (tmp_path / "go").touch()
    out, error = following.communicate(timeout=100)
    assert Path(out.strip()).is_file(), error


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small / "host.cpp"))
    with pytest.raises(build.BuildError, match="cannot.*built.*name another place: XDG_CACHE_HOME"):
        build.built(build.recipe())


@pytest.mark.slow
def test_two_processes_at_once(small: Path) -> None:
    script = f"""
from pathlib import Path
from fdu_kernels import build
build.sources_folder = lambda: Path({str(small)!r})
build.INSTRUCTION_SETS = {{"baseline": ()}}
print(build.built(build.recipe()))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("building the C++ kernels" in errors for _, errors in outputs) == 1


@pytest.mark.slow
def test_a_failure_of_nvcc_leaves_the_cpu_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Path) -> None:
    fake_nvcc(tmp_path, "13.0", "sm_90\\n")  # which compiles nothing
    for name in (build.CUDA_MODULE, *build.CUDA_KERNELS):
        (small / name).write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "architectures_of_devices", lambda: ("9.0",))
    monkeypatch.setattr(build, "_installed_module", lambda architectures: None)
    monkeypatch.setattr(build, "_import_file", build.information_of)
    assert build.load.__wrapped__()["cuda"].startswith("the build with nvcc failed; its log is ")


def test_kernels_are_built_once_their_file_is_there(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setattr(build, "_installed_module", lambda architectures: None)
    assert not build.is_built(("9.0",))
    target = build.cache_folder() / build.recipe(("9.0",)).key / f"_C{build.EXTENSION_SUFFIX}"
    target.parent.mkdir(parents=True)
    target.touch()
    assert build.is_built(("9.0",)) and not build.is_built(())
    hide(monkeypatch, "ninja")
    assert not build.is_built(("9.0",))
    monkeypatch.setattr(build, "_installed_module", lambda architectures: build)
    assert build.is_built(("9.0",)) and not build.is_built(())


def test_the_installed_module_is_used_while_its_sources_are_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "_C.so"
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=str(path)))
    monkeypatch.setattr(build.importlib, "import_module", lambda name: name)
    digest = build.digest_of_sources(build.sources_folder())

    def is_used(devices: tuple[str, ...], sources: str, architectures: list[str]) -> bool:
        told = json.dumps({"sources": sources, "architectures": architectures})
        path.write_bytes(b"code\0" + told.encode() + b"\0more")
        return build._installed_module(devices) is not None

    assert is_used((), digest, []) and not is_used((), "another", [])
    # A device, but no CUDA kernels: they are built where there is nvcc.
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert is_used(("9.0",), digest, [])
    fake_nvcc(tmp_path, "13.0", "sm_90\\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert not is_used(("9.0",), digest, []) and is_used((), digest, [])
    # A device whose architecture it lacks is as bad, but newer ones of the same family run its code, and any its PTX.
    assert not is_used(("9.0",), digest, ["8.0"]) and not is_used(("8.6", "9.0"), digest, ["8.0"])
    assert is_used(("8.0", "8.6", "9.0"), digest, ["8.0", "9.0"]) and not is_used(("9.0",), digest, ["10.0"])
    assert is_used(("9.0", "12.0"), digest, ["8.0+PTX"]) and not is_used(("12.0",), digest, ["8.0", "10.0"])
    assert is_used(("9.0",), digest, ["9.0a"]) and not is_used(("10.3",), digest, ["10.0a"])
    path.write_bytes(b"of another program")
    assert build._installed_module(()) is None


def test_the_command_tells_what_was_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if fk.backends()["cpu"] is not None:
        pytest.skip(str(fk.backends()["cpu"]))
    environment = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"}
    command = [sys.executable, "-W", "error", "-m", "fdu_kernels.build"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    told = dict(line.split(": ", 1) for line in ran.stdout.splitlines())
    assert Path(told["module"]).is_file() and {"compiler", "instruction sets", "cuda", "torch"} <= set(told)
    monkeypatch.setenv("CXX", "mycc")
    monkeypatch.setattr(build, "_installed_module", lambda architectures: None)
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    assert build.main() == 1 and "no compiled kernels: CXX names mycc" in capsys.readouterr().err


@pytest.mark.parametrize(
    "cuda, devices, attributes, reason",
    [
        (None, 0, {}, "this PyTorch is built without CUDA"),
        ("13.0", 0, {}, "no CUDA device"),
        ("13.0", 1, {}, "built without CUDA kernels: there was no nvcc"),
        ("13.0", 1, {"cuda_gaussian": None, "cuda_why_unusable": lambda index: ""}, None),
        (
            "13.0", 1, {"cuda_gaussian": None, "cuda_why_unusable": lambda index: "too old a driver"},
            "cuda:0 (sm_90) cannot run the CUDA kernels, built there was no nvcc: too old a driver",
        ),
    ],
)  # fmt: skip
def test_why_the_cuda_backend_cannot_run(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, devices: int, attributes: dict[str, object], reason: str | None
) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    module = types.SimpleNamespace(BUILD=json.dumps({"cuda": "there was no nvcc"}), **attributes)
    monkeypatch.setattr(build, "load", lambda: module)
    backend = CudaBackend()
    assert backend.why_unavailable() == reason
    if devices:
        kind = Kind(torch.device("cuda", 0), torch.float32, torch.float32, "exponential")
        assert re.search("CUDA.*cpu", backend.why_unsuitable(kind._replace(device=torch.device("cpu"))) or "")
        assert re.search("float32.*float64", backend.why_unsuitable(kind._replace(dtype=torch.float64)) or "")
        assert not attributes or backend.why_unsuitable(kind) == reason
