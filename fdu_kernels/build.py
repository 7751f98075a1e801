"""Build the extension module ``fdu_kernels._C``: one recipe for setup.py and for the build at first use.

Nothing but the standard library is imported at the top, so that setup.py can run this file by itself. A missing
tool or a failed build raises a BuildError that names the fix.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MODULE, EXTENSION_SUFFIX = "fdu_kernels._C", importlib.machinery.EXTENSION_SUFFIXES[0]
COMPILERS = ("g++", "clang++", "c++")
NVCC = ("nvcc", "/usr/local/cuda/bin/nvcc")
OLDEST_NVCC = "12.4"  # the first with __maxnreg__
OLDEST_TORCH = "2.10"  # the first whose stable ABI and DLPack exchange table have what the sources call
OLDEST_ARCHITECTURE = (8, 0)
ARCHITECTURES = ("8.0", "9.0", "10.0+PTX")
"""Of a build for any machine, as TORCH_CUDA_ARCH_LIST would name them, which takes their place. Code for 8.0 runs on
all 8.x; newer devices than the last compile its PTX."""
SOURCES = ("module.cpp", "cpu.cpp", "host.cpp")
KERNELS = "cpu_kernels.cpp"  # compiled once per instruction set
CUDA_MODULE = "cuda_module.cpp"  # compiled where there is nvcc, for some architectures, as are:
CUDA_KERNELS = ("cuda.cu", "cuda_walk.cu", "cuda_expectation.cu")
INSTRUCTION_SETS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
}
FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized", # GCC's own intrinsics
    "-Wno-subobject-linkage", # each unit has its own scalar mathematics
    # What loops need to become vectors. NaN and infinity keep their meaning.
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
NVCC_FLAGS = (
    "-std=c++20", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
    "-Xcompiler=-Wno-subobject-linkage", "--diag-suppress=1675", # pragmas of GCC
)  # fmt: skip
NO_DEVICE = "the machine that built them has no CUDA device"
LOG_LINES = 15  # of the compiler's output, in an error
FAILURE_LASTS = 3600  # seconds before a build that failed is tried again


class BuildError(RuntimeError):
    """The extension module cannot be built, or was not; the message says why and what mends it."""


class Recipe(NamedTuple):
    """Everything a build depends on."""

    ninja: str
    sources: Path
    objects: dict[str, tuple[str, str, list[str]]]  # object -> compiler, source and flags
    linker: list[str]  # the command and its flags
    cuda: str  # for which CUDA architectures, by which nvcc; or why for none
    architectures: tuple[str, ...]
    information: dict[str, Any]  # what the built module tells of itself

    @property
    def key(self) -> str:
        """Two builds of one key are interchangeable on one machine, also those of two checkouts of the same sources."""
        parts = [self.information, sorted(self.objects.items()), self.linker]
        parts += [sys.version, sysconfig.get_platform()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def recipe(architectures: Sequence[str] = (), why_none: str = NO_DEVICE) -> Recipe:
    """The recipe for this machine, with CUDA kernels for architectures such as ARCHITECTURES.

    If there are no architectures (the reason is ``why_none``) or nvcc supports none of them, the CUDA kernels are left
    out and the module reports why.
    """
    sources = sources_folder()
    wished = os.environ.get("CXX")
    missing = f"CXX names {wished}, which is not there" if wished else "there is no C++ compiler"
    compiler = _find_program((wished,) if wished else COMPILERS, f"{missing}; on Debian or Ubuntu: apt install g++")
    remedy = "pip install torch, then build without isolation"
    torch = _find_module("torch", f"is not installed where the build runs; {remedy}").parent
    torch_version = importlib.metadata.version("torch")
    if _numbers(torch_version) < _numbers(OLDEST_TORCH):
        raise BuildError(f"torch {torch_version} is too old for the C++ kernels; pip install 'torch>={OLDEST_TORCH}'")
    if not (torch / "include/torch/csrc/stable/c/shim.h").is_file():
        raise BuildError(
            f"torch {torch_version} in {torch} has no C++ headers; reinstall it (pip install --force-reinstall torch)"
        )
    pybind11 = _find_module("pybind11", "is not installed; pip install 'pybind11>=3.0'").parent
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        remedy = f"on Debian or Ubuntu: apt install python{sysconfig.get_python_version()}-dev"
        raise BuildError(f"the headers of Python are missing ({python}/Python.h); {remedy}")
    scripts = sysconfig.get_path("scripts")
    ninja = _find_program((f"{scripts}/ninja", "ninja"), "ninja is not installed; pip install ninja")

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    headers = (torch / "include", pybind11 / "include", python)
    included = [flag for folder in headers for flag in ("-isystem", str(folder))]
    common = [*FLAGS, *included, *(["-DFDU_X86"] if x86 else [])]
    units, linker = list(SOURCES), [compiler]
    objects: dict[str, tuple[str, str, list[str]]] = {}
    cuda, taken = why_none, tuple[str, ...]()
    if architectures:
        try:
            nvcc, version, taken = _find_nvcc(architectures)
        except BuildError as error:
            cuda = str(error)
        else:
            cuda = f"for {', '.join(taken)} by nvcc {version}"
            common.append("-DFDU_CUDA")
            units.append(CUDA_MODULE)
            device_flags = [*NVCC_FLAGS, f"-ccbin={compiler}", *_code_flags(taken), *included]
            objects |= {f"{Path(unit).stem}.o": (nvcc, unit, device_flags) for unit in CUDA_KERNELS}
            # nvcc links CUDA's runtime statically; its names must not meet those of the runtime that torch brings.
            linker = [nvcc, f"-ccbin={compiler}", "-nodlink", "-Xlinker=--exclude-libs=ALL"]
    objects |= {f"{Path(unit).stem}.o": (compiler, unit, common) for unit in units}
    sets = {name: flags for name, flags in INSTRUCTION_SETS.items() if x86 or not flags}
    for name, flags in sets.items():
        objects[f"kernels_{name}.o"] = compiler, KERNELS, [*common, *flags, f"-DFDU_KERNELS=kernels_{name}"]
    linker += ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    information = {
        "sources": digest_of_sources(sources), "compiler": _output(compiler, "--version").split("\n")[0],
        "flags": FLAGS, "instruction_sets": list(sets), "torch": torch_version, "cuda": cuda, "architectures": taken,
    }  # fmt: skip
    return Recipe(ninja, sources, objects, linker, cuda, taken, information)


def architectures_to_distribute() -> tuple[str, ...]:
    """ARCHITECTURES, or those that TORCH_CUDA_ARCH_LIST names instead."""
    return tuple(re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))) or ARCHITECTURES


def architectures_of_devices() -> tuple[str, ...]:
    """Those of this machine's CUDA devices that the kernels support."""
    import torch

    # A forked child of a process that uses CUDA cannot ask.
    if torch.cuda._is_in_bad_fork() or not torch.cuda.is_available():
        return ()
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return tuple(f"{major}.{minor}" for major, minor in sorted(capabilities) if (major, minor) >= OLDEST_ARCHITECTURE)


def compile_module(recipe: Recipe, target: Path, folder: Path, lock: Sequence[int] = ()) -> None:
    """Build the extension module as the file ``target``, with all that lies between in ``folder``.

    ninja and the compilers inherit the file descriptor ``lock``: if this process is killed, they hold it to their end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build_info.h").write_text(f'#define FDU_BUILD R"json({json.dumps(recipe.information)})json"\n')
    (folder / "build.ninja").write_text(_ninja_file(recipe, folder))
    command = [recipe.ninja, "-C", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=lock)
    log = folder / "build.log"
    log.write_text(ran.stdout + ran.stderr)
    if ran.returncode:
        errors = [line for line in ran.stdout.splitlines() if line.strip()][-LOG_LINES:]
        raise BuildError("\n".join(["the build of the C++ kernels failed:", *errors, f"the whole log is {log}"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Moved into place whole: another process may be importing it.
    partial = target.with_name(f"{target.name}.partial")
    shutil.copyfile(folder / "_C.so", partial)
    partial.chmod(0o755)
    os.replace(partial, target)


@functools.cache
def load(*wanted: str) -> types.ModuleType:
    """``fdu_kernels._C``: installed, else built here before, else built now.

    Args:
        wanted: the architectures of CUDA kernels, such as "9.0"; by default those of the devices.
    """
    architectures = wanted or architectures_of_devices()
    if (installed := _installed_module(architectures)) is not None:
        return installed
    plan = recipe(architectures)
    try:
        return _import_file(built(plan))
    except BuildError as error:
        if not plan.architectures:
            raise
        # The CPU kernels need not suffer, but nobody should wonder where the others are.
        print(f"fdu_kernels: no CUDA kernels: {error}", file=sys.stderr)
        why = f"the build with nvcc failed; its log is {cache_folder() / plan.key / 'build' / 'build.log'}"
        return _import_file(built(recipe(why_none=why)))


def is_built(architectures: Sequence[str]) -> bool:
    """Whether the extension module with CUDA kernels for these architectures, one at least, is there."""
    if not architectures or _installed_module(architectures) is not None:
        return bool(architectures)
    try:
        return (cache_folder() / recipe(architectures).key / f"_C{EXTENSION_SUFFIX}").exists()
    except BuildError:
        return False


def built(plan: Recipe) -> Path:
    """The extension module by a recipe, built unless it is in the cache. A failure is remembered for FAILURE_LASTS."""
    folder = cache_folder() / plan.key
    target, failure = folder / f"_C{EXTENSION_SUFFIX}", folder / "failure.txt"
    try:
        if not target.exists():  # it appears whole, so one that is there may be in a cache that is read-only
            folder.parent.parent.mkdir(parents=True, exist_ok=True)
            for private in (folder.parent, folder):
                private.mkdir(mode=0o700, exist_ok=True)
            _check_ours(folder.parent, folder)
            with _locked(folder / "lock") as lock:
                age = time.time() - failure.stat().st_mtime if failure.exists() else math.inf
                if 0 <= age < FAILURE_LASTS:
                    told = f"that was {age / 60:.0f} minutes ago; to try again at once, remove {failure}"
                    raise BuildError(f"{failure.read_text()}\n{told}")
                if not target.exists():
                    print(f"fdu_kernels: building the C++ kernels, once, into {folder}", file=sys.stderr)
                    try:
                        compile_module(plan, target, folder / "build", [lock])
                    except BuildError as error:
                        failure.write_text(str(error))
                        raise
                    failure.unlink(missing_ok=True)
        _check_ours(folder.parent, folder, target)
    except OSError as error:
        remedy = "name another place: XDG_CACHE_HOME=..."
        raise BuildError(f"the C++ kernels cannot be built into {folder}: {error}; {remedy}") from error
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Wait until no other process holds the file, and hold it."""
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("fdu_kernels: waiting for another process, which builds the C++ kernels", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _check_ours(*paths: Path) -> None:
    """Raise BuildError if others could have written one of these files or folders, which are about to be executed."""
    for path in paths:
        status = path.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
            raise BuildError(
                f"others than you can write {path}, so it is not used; remove it, or name another place: "
                "XDG_CACHE_HOME=..."
            )


def cache_folder() -> Path:
    """Where builds at first use are kept, per user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdu_kernels"


def _installed_module(architectures: Sequence[str]) -> types.ModuleType | None:
    """The module that was built with the distribution, unless the sources have changed since, or it lacks CUDA kernels
    for a device of these architectures and they can be built here."""
    try:
        # Looked at before it is imported: pybind11 makes but one module of a name, so another could not follow it.
        information = information_of(_find_module(MODULE, "was not built with the distribution"))
        if information["sources"] != digest_of_sources(sources_folder()):
            return None
        codes: list[str] = information["architectures"]
        if not all(any(_runs_on(code, device) for code in codes) for device in architectures):
            with contextlib.suppress(BuildError):
                _find_nvcc(architectures)
                return None
        return importlib.import_module(MODULE)
    except (ImportError, OSError, KeyError, ValueError, BuildError):
        return None


def information_of(module: Path) -> dict[str, Any]:
    """What a built module says about itself, read from its file; empty if it says nothing."""
    found = re.search(rb'\{"sources": [^\0]*\}', module.read_bytes())
    return json.loads(found[0]) if found else {}


def _import_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{path} was built but cannot be loaded: {error}; remove it and try again") from error
    return module


def _ninja_file(recipe: Recipe, folder: Path) -> str:
    """It names no sources: a change of one makes another key, and with it another folder."""

    def step(made: str, needed: Iterable[str], *command: str | Path) -> list[str]:
        words = " ".join(shlex.quote(str(word)) for word in (*command, "-o", made)).replace("$", "$$")
        return [f"build {made}: run {' '.join(needed)}", f"  command = {words}"]

    lines = ["rule run", "  command = $command"]
    for made, (compiler, source, flags) in recipe.objects.items():
        lines += step(made, (), compiler, "-I", folder, *flags, "-c", recipe.sources / source)
    # What is linked comes before the libraries.
    lines += step("_C.so", recipe.objects, recipe.linker[0], *recipe.objects, *recipe.linker[1:])
    return "\n".join([*lines, ""])


def sources_folder() -> Path:
    """csrc/: next to the package in a checkout, inside it where it was installed."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / KERNELS).is_file():
            return folder
    raise BuildError(f"the C++ sources are missing from {package}: install fdu again from its checkout or wheel")


def digest_of_sources(folder: Path) -> str:
    """Changes with any source."""
    sources = (path for path in sorted(folder.iterdir()) if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
    content = b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in sources)
    return hashlib.sha256(content).hexdigest()[:16]


def _find_nvcc(architectures: Sequence[str]) -> tuple[str, str, tuple[str, ...]]:
    """Path and version of nvcc, and the architectures as it takes them: instead of one that it does not know, the
    newest that it knows, as PTX."""
    home = os.environ.get("CUDA_HOME")
    missing = f"CUDA_HOME names {home}, which has no bin/nvcc" if home else "there was no nvcc"
    nvcc = _find_program((f"{home}/bin/nvcc",) if home else NVCC, f"{missing}; install the CUDA toolkit and rebuild")
    release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    version = release[1] if release else "0.0"
    if _numbers(version) < _numbers(OLDEST_NVCC):
        raise BuildError(f"{nvcc} is of CUDA {version}, which is too old; install {OLDEST_NVCC} or newer")
    known = [tuple(map(int, found)) for found in re.findall(r"sm_(\d+)(\d)\b", _output(nvcc, "--list-gpu-code"))]
    taken = []
    for name in architectures:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST names {name!r}; name architectures such as 9.0 or 10.0+PTX")
        usable = [each for each in known if OLDEST_ARCHITECTURE <= each <= _numbers(name)]
        if usable:
            taken.append(name if _numbers(name) in usable else "{}.{}+PTX".format(*max(usable)))
    if not taken:
        raise BuildError(f"nvcc supports none of the requested architectures ({', '.join(architectures)}) from 8.0 up")
    return nvcc, version, tuple(dict.fromkeys(taken))


def _code_flags(architectures: Sequence[str]) -> Iterable[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        for kind in ("sm", "compute") if name.endswith("+PTX") else ("sm",):
            flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return dict.fromkeys(flags)


def _runs_on(code: str, device: str) -> bool:
    """Whether code for "8.0" or "9.0a", or that and its PTX as "10.0+PTX", runs on a device such as "8.6"."""
    own, wanted = _numbers(code), _numbers(device)
    if "a" in code:  # for this architecture alone; "f" is for its family
        return wanted == own
    return wanted >= own and (wanted[0] == own[0] or ("+PTX" in code and "f" not in code))


def _numbers(text: str) -> tuple[int, ...]:
    """The first two of a version or architecture: (9, 0) of "9.0a+PTX"."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _find_module(name: str, missing: str) -> Path:
    """Its file. It is not imported, only the package around it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(f"{name} {missing}")
    return Path(spec.origin)


def _find_program(names: Iterable[str], missing: str) -> str:
    """The first of these that is there."""
    for name in names:
        if found := shutil.which(name):
            return found
    raise BuildError(missing)


def _output(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return (ran.stdout or ran.stderr).strip()


def main() -> int:
    """Build the module for this machine, or find it, and print how and where: ``python -m fdu_kernels.build``.

    Architectures such as 9.0 may follow, to build for other GPUs than there are.
    """
    try:
        module = load(*sys.argv[1:])
    except BuildError as error:
        print(f"fdu_kernels has no compiled kernels: {error}", file=sys.stderr)
        return 1
    print(f"module: {module.__file__}")
    for name, value in json.loads(module.BUILD).items():
        print(f"{name.replace('_', ' ')}: {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
