"""Unpack what a GPU machine lacks to run fdu: ``python benchmarks/gpu_wheels.py --into SITE [--wheels FOLDER]``.

gpu_wheels.txt names the wheels. What is installed is left alone, whatever its version. The exit code is 1 if a wheel is
missing or diffusers cannot be imported afterwards; all wheels that are there are unpacked nevertheless.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
import zipfile
from pathlib import Path

NAMED = Path(__file__).with_suffix(".txt")
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
"""Packages whose module has another name."""


def named() -> dict[str, str]:
    """The version of each package, by its name as wheels write it."""
    return dict(re.findall(r"^(\w+)==(\S+)$", NAMED.read_text(), re.M))


def wheel_of(name: str, version: str, folder: Path) -> Path | None:
    """The wheel of a package for this Python."""
    own = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    found = sorted(folder.glob(f"{name}-{version}-*.whl"))
    return next((one for one in found if re.search(rf"-(py3|py2\.py3|{own})-", one.name)), None)


def main() -> int:
    """Unpack, import, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True, metavar="SITE", help="a folder that will be on PYTHONPATH")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="the folder of the wheels (default: none)")
    options = parser.parse_args()
    missing = []
    for name, version in named().items():
        if importlib.util.find_spec(MODULES.get(name, name)) is not None:
            print(f"{name}: installed")
        elif options.wheels is None or (wheel := wheel_of(name, version, options.wheels)) is None:
            missing.append(f"{name}=={version}")
        else:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(options.into)
            print(f"{name}: unpacked {wheel.name}")
    if missing:
        print(f"missing: {', '.join(missing)}; fetch them as {NAMED.name} says, and pass their folder as --wheels")
        return 1
    sys.path.insert(0, str(options.into))
    importlib.invalidate_caches()
    importlib.import_module("diffusers").DiffusionPipeline  # noqa: B018 - what it needs is imported only now
    return 0


if __name__ == "__main__":
    sys.exit(main())
