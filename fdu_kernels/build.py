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
import mmap
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MODULE = "fdu_kernels._C"
OLDEST_TORCH = (2, 10)
"""The first whose stable ABI and DLPack exchange table have what the sources call."""
COMPILERS = ("g++", "clang++", "c++")
SOURCES = ("module.cpp", "cpu.cpp", "memory.cpp", "threads.cpp")
KERNELS = "cpu_kernels.cpp"
"""Compiled once per instruction set."""
CUDA_SOURCES = ("cuda_module.cpp", "cuda.cu")
"""Compiled where there is nvcc, for some architectures."""
ARCHITECTURES = ("8.0", "9.0", "10.0+PTX")
"""Of a build for any machine, as TORCH_CUDA_ARCH_LIST would name them, which takes their place. Code for 8.0 runs on
all 8.x; newer devices than the last compile its PTX."""
OLDEST_ARCHITECTURE = (8, 0)
OLDEST_NVCC = (12, 4)
"""The first with __maxnreg__."""
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
    "-Wno-subobject-linkage", # each unit has its own scalar mathematics
    # What loops need to become vectors. NaN and infinity keep their meaning.
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
NVCC_FLAGS = (
    "-std=c++20", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
    "-Xcompiler=-Wno-subobject-linkage", "--diag-suppress=1675", # pragmas of GCC
)  # fmt: skip
NO_DEVICE = "the machine that built them has no CUDA device"
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
    objects: dict[str, tuple[str, str, tuple[str, ...]]]
    """Object -> compiler, source and flags."""
    linker: tuple[str, ...]
    """The command and its flags."""
    torch_version: str
    cuda: str
    """For which CUDA architectures, by which nvcc; or why for none."""
    architectures: tuple[str, ...]

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
            "architectures": list(self.architectures),
        }

    @property
    def key(self) -> str:
        """Two builds of one key are interchangeable on one machine."""
        parts = [self.information, self.compiler, str(self.sources), sorted(self.objects.items()), self.linker]
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


def recipe(architectures: Sequence[str] = (), why_none: str = NO_DEVICE) -> Recipe:
    """The recipe for this machine.

    Args:
        architectures: of the CUDA kernels, such as ARCHITECTURES. They are left out, and the module says why, if there
            are none or no nvcc that can compile for one of them.
        why_none: why there are none.

    Raises:
        BuildError: something is missing; says what, and the command that mends it.
    """
    sources = sources_folder()
    compiler = _find_compiler()
    torch_folder, torch_version = _find_torch()
    includes = [torch_folder / "include", _find_pybind11(), _find_python_headers()]
    included = tuple(flag for include in includes for flag in ("-isystem", str(include)))
    common = (*FLAGS, *included)
    objects = {}
    sets = INSTRUCTION_SETS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": ()}
    if len(sets) > 1:
        common = (*common, "-DFDU_X86")
    linker: tuple[str, ...] = (compiler,)
    libraries = ("-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu")
    cuda, toolkit = why_none, None
    if architectures:
        try:
            toolkit = _find_toolkit(architectures)
        except BuildError as error:
            cuda = str(error)
    if toolkit is not None:
        cuda = f"for {', '.join(toolkit.architectures)} by nvcc {'.'.join(map(str, toolkit.version))}"
        common = (*common, "-DFDU_CUDA")
        flags = (*NVCC_FLAGS, f"-ccbin={compiler}", *_code_flags(toolkit.architectures), *included)
        for source in CUDA_SOURCES:
            made = (toolkit.nvcc, source, flags) if source.endswith(".cu") else (compiler, source, common)
            objects[f"{Path(source).stem}.o"] = made
        # nvcc links CUDA's runtime statically; its names must not meet those of the runtime that torch brings.
        linker = (toolkit.nvcc, f"-ccbin={compiler}", "-nodlink", "-Xlinker=--exclude-libs=ALL")
    for source in SOURCES:
        objects[source.replace(".cpp", ".o")] = compiler, source, common
    for name, flags in sets.items():
        objects[f"kernels_{name}.o"] = compiler, KERNELS, (*common, *flags, f"-DFDU_KERNELS=kernels_{name}")
    return Recipe(
        compiler, _first_line(compiler, "--version"), _find_ninja(), sources, objects, (*linker, *libraries),
        torch_version, cuda, () if toolkit is None else toolkit.architectures,
    )  # fmt: skip


def architectures_to_distribute() -> tuple[str, ...]:
    """ARCHITECTURES, or those that TORCH_CUDA_ARCH_LIST names instead."""
    named = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    return tuple(name for name in named if name) or ARCHITECTURES


def architectures_of_devices() -> tuple[str, ...]:
    """Those of this machine's CUDA devices that the kernels support."""
    import torch

    # A forked child of a process that uses CUDA cannot ask.
    if torch.cuda._is_in_bad_fork() or not torch.cuda.is_available():
        return ()
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return tuple(f"{major}.{minor}" for major, minor in sorted(capabilities) if (major, minor) >= OLDEST_ARCHITECTURE)


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

    What is built now has CUDA kernels for the devices of this machine, and none where there is no device: nvcc takes
    most of a minute.

    Raises:
        BuildError: there is none and none can be built.
    """
    architectures = architectures_of_devices()
    installed = _installed_module(architectures)
    if installed is not None:
        return installed
    plan = recipe(architectures)
    try:
        return _import_file(built(plan))
    except BuildError as error:
        if not plan.architectures:
            raise
        # The CPU kernels need not suffer, but nobody should wonder where the others are.
        print(f"fdu_kernels: no CUDA kernels: {error}", file=sys.stderr)
        why = f"the build with nvcc failed; its log is {_folder_of(plan) / 'build' / 'build.log'}"
        return _import_file(built(recipe(why_none=why)))


def built(plan: Recipe) -> Path:
    """The extension module by a recipe, built unless it is in the cache.

    Raises:
        BuildError: the build failed, now or before.
    """
    folder = _folder_of(plan)
    target = folder / f"_C{extension_suffix()}"
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
    return target


def _folder_of(plan: Recipe) -> Path:
    return cache_folder() / plan.key


def cache_folder() -> Path:
    """Where builds at first use are kept, per user."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fdu_kernels"


def _installed_module(architectures: Sequence[str]) -> types.ModuleType | None:
    """The module that was built with the distribution, unless the sources have changed since, or it lacks CUDA kernels
    for a device of these architectures and they can be built here."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return None
    try:
        # Looked at before it is imported: pybind11 makes but one module of a name, so another could not follow it.
        information = information_of(Path(spec.origin))
        fits = information["sources"] == digest_of_sources(sources_folder())
        made: list[str] = information["architectures"]
        if fits and not all(any(_runs_on(code, device) for code in made) for device in architectures):
            with contextlib.suppress(BuildError):
                _find_toolkit(architectures)
                fits = False
        return importlib.import_module(MODULE) if fits else None
    except (ImportError, OSError, KeyError, ValueError, BuildError):
        return None


def _runs_on(code: str, device: str) -> bool:
    """Whether code for "8.0" or "9.0a", or that and its PTX as "10.0+PTX", runs on a device such as "8.6"."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", code)
    if match is None:
        return False
    (major, minor), wanted = (int(match[1]), int(match[2])), tuple(map(int, device.split(".")))
    if match[3] == "a":
        return wanted == (major, minor)
    return wanted >= (major, minor) and (wanted[0] == major or (bool(match[4]) and not match[3]))


def information_of(module: Path) -> dict[str, Any]:
    """What a built module tells of itself, read from its file; empty if it tells nothing."""
    with module.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb'\{"sources": [^\0]*\}', content)
        read: dict[str, Any] = json.loads(found[0]) if found else {}
    return read


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
        "  command = $compiler $flags -c $in -o $out",
        "rule link",
        # What is linked comes before the libraries.
        f"  command = {words(recipe.linker[0])} $in {words(*recipe.linker[1:])} -o $out",
    ]
    for made, (compiler, source, flags) in recipe.objects.items():
        lines += [f"build {made}: compile {path(recipe.sources / source)}"]
        lines += [f"  compiler = {words(compiler)}", f"  flags = {words('-I', folder, *flags)}"]
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


@dataclasses.dataclass(frozen=True)
class _Toolkit:
    """The CUDA toolkit, and for what it compiles."""

    nvcc: str
    version: tuple[int, int]
    architectures: tuple[str, ...]


def _find_toolkit(architectures: Sequence[str]) -> _Toolkit:
    home = os.environ.get("CUDA_HOME")
    wished = (f"{home}/bin/nvcc",) if home else ("nvcc", "/usr/local/cuda/bin/nvcc")
    nvcc = next(filter(None, map(shutil.which, wished)), None)
    if nvcc is None:
        missing = f"CUDA_HOME names {home}, which has no bin/nvcc" if home else "there was no nvcc"
        raise BuildError(f"{missing}; install the CUDA toolkit and build anew")
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    if version < OLDEST_NVCC:
        wanted = ".".join(map(str, OLDEST_NVCC))
        raise BuildError(f"{nvcc} is of CUDA {version[0]}.{version[1]}, which is too old; install {wanted} or newer")
    known = {_numbers(code) for code in re.findall(r"sm_(\d+)\b", _output(nvcc, "--list-gpu-code"))}
    return _Toolkit(nvcc, version, _compilable(architectures, known))


def _numbers(code: str) -> tuple[int, int]:
    """Of "90" or "100"."""
    return int(code[:-1]), int(code[-1])


def _compilable(architectures: Sequence[str], known: set[tuple[int, int]]) -> tuple[str, ...]:
    """Architectures as an nvcc takes them: the newest that it knows, as PTX, instead of one that it does not know."""
    found: dict[str, None] = {}
    for name in architectures:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST names {name!r}; name architectures such as 9.0 or 10.0+PTX")
        wanted = int(match[1]), int(match[2])
        if wanted < OLDEST_ARCHITECTURE:
            continue
        older = [each for each in known if OLDEST_ARCHITECTURE <= each <= wanted]
        if wanted in known:
            found[name] = None
        elif older:
            found["{}.{}+PTX".format(*max(older))] = None
    if not found:
        raise BuildError(f"of the architectures {', '.join(architectures)} nvcc has none from 8.0 on")
    return tuple(found)


def _code_flags(architectures: Sequence[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


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


def _output(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return (ran.stdout or ran.stderr).strip()


def _first_line(*command: str) -> str:
    return _output(*command).split("\n")[0]


def extension_suffix() -> str:
    """Of extension modules of this Python."""
    return importlib.machinery.EXTENSION_SUFFIXES[0]


def main() -> int:
    """Build the module for this machine, or find it, and print how and where: ``python -m fdu_kernels.build``."""
    try:
        module = load()
    except BuildError as error:
        print(f"fdu_kernels has no compiled kernels: {error}", file=sys.stderr)
        return 1
    print(f"module: {module.__file__}")
    for name, value in json.loads(module.BUILD).items():
        print(f"{name.replace('_', ' ')}: {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
