"""Build of the distribution, as pyproject.toml declares it. The C++ sources join the package that builds them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSources(build_py):
    """Put csrc/ into fdu_kernels, where fdu_kernels.build looks for it in an installation."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            source, target = Path(__file__).parent / "csrc", Path(self.build_lib) / "fdu_kernels" / "csrc"
            shutil.copytree(source, target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithSources})
