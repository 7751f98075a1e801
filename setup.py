"""Build of the distribution, as pyproject.toml declares it: the C++ sources join the package, compiled where possible.

fdu_kernels/build.py has the recipe. Without a compiler, or without torch (as in pip's isolated builds), the package
comes without its compiled module, which is then built at first use; the install says so in one line.
"""

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def warn(what: str, reason: str) -> None:
    """One line: what is missing, the first error, and where the log is."""
    first, *rest = reason.splitlines()
    told = " ".join((first, *[line.strip() for line in rest if "error" in line][:1], *rest[-1:]))
    print(f"fdu: no {what} in this build, they are built at first use: {told}", file=sys.stderr)


# By itself: the package would import torch.
build = SimpleNamespace(**runpy.run_path(str(ROOT / "fdu_kernels" / "build.py")))
try:
    plan = build.recipe(build.architectures_to_distribute())
except build.BuildError as error:
    warn("compiled kernels", str(error))
    plan = None


class BuildWithSources(build_py):
    """Put csrc/ into fdu_kernels, where fdu_kernels.build looks for it in an installation."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "fdu_kernels" / "csrc"
            shutil.copytree(ROOT / "csrc", target, dirs_exist_ok=True)


class BuildKernels(build_ext):
    """Compile fdu_kernels._C. An editable install gets none: its sources change, and the cache of builds follows."""

    def run(self) -> None:
        if self.editable_mode or plan is None:
            return
        target = Path(self.get_ext_fullpath(build.MODULE)).resolve()
        attempts = [plan]
        if plan.architectures:  # the CPU kernels need not suffer
            attempts.append(build.recipe(why_none="their build failed when the distribution was made"))
        for attempt in attempts:
            try:
                build.compile_module(attempt, target, Path(self.build_temp).resolve() / attempt.key)
            except build.BuildError as error:
                warn("CUDA kernels" if attempt.architectures else "compiled kernels", str(error))
            else:
                return

    def get_outputs(self) -> list[str]:
        made = Path(self.get_ext_fullpath(build.MODULE))
        return [str(made)] if made.is_file() and not self.editable_mode else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    cmdclass={"build_py": BuildWithSources, "build_ext": BuildKernels},
    # Tags the wheel for this platform and Python.
    ext_modules=[] if plan is None else [Extension(build.MODULE, sources=[])],
)
