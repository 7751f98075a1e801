"""How the extension module ``fdu_kernels._C`` is built: one recipe for setup.py and for the build at first use.

Nothing but the standard library is imported at the top, so that setup.py can read this file by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

MODULE = "fdu_kernels._C"
OLDEST_TORCH = (2, 10)
"""The first whose stable ABI and DLPack exchange table have what the sources call."""
COMPILERS = ("g++", "clang++", "c++")
SOURCES = ("module.cpp", "cpu.cpp", "memory.cpp", "threads.cpp")
KERNELS = "cpu_kernels.cpp"
"""Compiled once per instruction set."""
INSTRUCTION_SETS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512",
    ),
}  # fmt: skip
FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized", # GCC's own intrinsics
    # What loops need to become vectors. NaN and infinity keep their meaning.
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
LOG_LINES = 15
"""Of the compiler's output, in an error."""


class BuildError(RuntimeError):
    """The extension module cannot be built, or was not; the message says why and what mends it."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything a build depends on."""

    compiler: str
    compiler_version: str
    ninja: str
    sources: Path
    objects: dict[str, tuple[str, tuple[str, ...]]]
    """Object -> source and flags."""
    link_flags: tuple[str, ...]
    torch_version: str
    cuda: str
    """The CUDA architectures, or why there are none."""

    @property
    def information(self) -> dict[str, object]:
        """What the built module tells of itself."""
        return {
            "sources": digest_of_sources(self.sources),
            "compiler": self.compiler_version,
            "flags": list(FLAGS),
            "instruction_sets": [name for name in INSTRUCTION_SETS if f"kernels_{name}.o" in self.objects],
            "torch": self.torch_version,
            "cuda": self.cuda,
        }

    @property
    def key(self) -> str:
        """Two builds of one key are interchangeable on one machine."""
        parts = [self.information, self.compiler, str(self.sources), sorted(self.objects.items()), self.link_flags]
        parts += [sys.version, sysconfig.get_platform()]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def sources_folder() -> Path:
    """csrc/: beside the package in a checkout, inside it where it was installed.

    Raises:
        BuildError: there is none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / KERNELS).is_file():
            return folder
    raise BuildError(f"the C++ sources are missing from {package}: pip install --force-reinstall fdu")


@functools.cache
def digest_of_sources(folder: Path) -> str:
    """Changes with any source."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def recipe() -> Recipe:
    """The recipe for this machine.

    Raises:
        BuildError: something is missing; says what, and the command that mends it.
    """
    sources = sources_folder()
    compiler = _find_compiler()
    torch_folder, torch_version = _find_torch()
    includes = [torch_folder / "include", _find_pybind11(), _find_python_headers()]
    common = (*FLAGS, *(flag for include in includes for flag in ("-isystem", str(include))))
    objects = {}
    sets = INSTRUCTION_SETS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": ()}
    if len(sets) > 1:
        common = (*common, "-DFDU_X86")
    for source in SOURCES:
        objects[source.replace(".cpp", ".o")] = source, common
    for name, flags in sets.items():
        objects[f"kernels_{name}.o"] = KERNELS, (*common, *flags, f"-DFDU_KERNELS=kernels_{name}")
    link_flags = ("-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu")
    return Recipe(
        compiler, _first_line(compiler, "--version"), _find_ninja(), sources, objects, link_flags, torch_version,
        "no CUDA kernels in this version",
    )  # fmt: skip


def compile_module(recipe: Recipe, target: Path, folder: Path) -> None:
    """Build the extension module as the file ``target``, with all that lies between in ``folder``.

    Raises:
        BuildError: the compiler failed; with its last lines and where the whole log is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build_info.h").write_text(f'#define FDU_BUILD R"json({json.dumps(recipe.information)})json"\n')
    (folder / "build.ninja").write_text(_ninja_file(recipe, folder))
    ran = subprocess.run([recipe.ninja, "-C", str(folder)], capture_output=True, text=True, check=False)
    log = folder / "build.log"
    log.write_text(ran.stdout + ran.stderr)
    if ran.returncode:
        errors = [line for line in ran.stdout.splitlines() if line.strip()][-LOG_LINES:]
        raise BuildError("\n".join(["the build of the C++ kernels failed:", *errors, f"the whole log is {log}"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Moved into place whole: another process may be importing it.
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(folder / "_C.so", partial)
    os.replace(partial, target)


@functools.cache
def load() -> types.ModuleType:
    """``fdu_kernels._C``: the installed one, else one built here before, else built now.

    Raises:
        BuildError: there is none and none can be built.
    """
    installed = _installed_module()
    if installed is not None:
        return installed
    plan = recipe()
    folder = cache_folder() / plan.key
    target = folder / f"_C{_extension_suffix()}"
    failure = folder / "failure.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if failure.exists():
                raise BuildError(f"{failure.read_text()}\nto try again, remove {folder}")
            if not target.exists():
                print(f"fdu_kernels: building the C++ kernels, once, into {folder}", file=sys.stderr)
                try:
                    compile_module(plan, target, folder / "build")
                except BuildError as error:
                    failure.write_text(str(error))
                    raise
    except OSError as error:
        raise BuildError(
            f"the C++ kernels cannot be built into {folder}: {error}; name another place: XDG_CACHE_HOME=..."
        ) from error
    return _import_file(target)


def cache_folder() -> Path:
    """Where builds at first use are kept, per user."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fdu_kernels"


def _installed_module() -> types.ModuleType | None:
    """The module that was built with the distribution, unless the sources have changed since."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None:
        return None
    try:
        module = importlib.import_module(MODULE)
        fits: bool = json.loads(module.BUILD)["sources"] == digest_of_sources(sources_folder())
    except (ImportError, AttributeError, BuildError):
        return None
    return module if fits else None


def _import_file(path: Path) -> types.ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{path} was built but cannot be loaded: {error}; remove it and try again") from error
    return module


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ninja_file(recipe: Recipe, folder: Path) -> str:
    def words(*parts: str | Path) -> str:
        return " ".join(shlex.quote(str(part)) for part in parts).replace("$", "$$")

    def path(part: str | Path) -> str:
        return str(part).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {words(recipe.compiler)} $flags -c $in -o $out",
        "rule link",
        f"  command = {words(recipe.compiler)} $in {words(*recipe.link_flags)} -o $out",
    ]
    for made, (source, flags) in recipe.objects.items():
        lines += [f"build {made}: compile {path(recipe.sources / source)}", f"  flags = {words('-I', folder, *flags)}"]
    lines += [f"build _C.so: link {' '.join(recipe.objects)}", "default _C.so", ""]
    return "\n".join(lines)


def _find_compiler() -> str:
    wished = os.environ.get("CXX")
    for name in (wished,) if wished else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    missing = f"CXX names {wished}, which is not there" if wished else "there is no C++ compiler"
    raise BuildError(f"{missing}; on Debian or Ubuntu: apt install g++")


def _find_torch() -> tuple[Path, str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed beside the build; pip install torch, then build without isolation")
    folder = Path(spec.origin).parent
    from importlib.metadata import version

    found = version("torch")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TORCH:
        raise BuildError(f"torch {found} is too old for the C++ kernels; pip install 'torch>=2.10'")
    if not (folder / "include/torch/csrc/stable/c/shim.h").is_file():
        raise BuildError(f"torch {found} in {folder} came without its C++ headers: pip install torch")
    return folder, found


def _find_pybind11() -> Path:
    spec = importlib.util.find_spec("pybind11")
    if spec is None or spec.origin is None:
        raise BuildError("pybind11 is not installed; pip install 'pybind11>=3.0'")
    return Path(spec.origin).parent / "include"


def _find_python_headers() -> Path:
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        raise BuildError(
            f"the headers of Python are missing ({folder}/Python.h); "
            f"on Debian or Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        )
    return folder


def _find_ninja() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    found = str(beside) if beside.is_file() else shutil.which("ninja")
    if not found:
        raise BuildError("ninja is not installed; pip install ninja")
    return found


def _first_line(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return (ran.stdout or ran.stderr).strip().split("\n")[0]


def _extension_suffix() -> str:
    return importlib.machinery.EXTENSION_SUFFIXES[0]
