"""Write fdu_kernels as a kernel of Hugging Face's library ``kernels``: python .ci/hub_kernel.py FOLDER

The folder then has the layout of a kernel repository whose code is Python: one package per kind of device in build/,
which ``kernels.get_local_kernel`` loads, and ``get_kernel`` once it is on the hub. It holds the Triton kernels and the
eager losses. What needs a compiler stays behind: the hub has no build of the C++ and CUDA kernels.

Several versions may live in one process, beside an installed fdu_kernels, so nothing may name the package: imports
become relative, and the ops have the namespace of the package that they are in.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fdu_kernels"
NAME = "fdu-kernels"
VERSION = 1
"""Of the kernel on the hub, a branch there; a change that breaks callers needs another."""
DEVICES = ("cpu", "cuda", "rocm", "xpu")
COMPILED = ("build.py", "kernels/native.py")
"""What builds and calls C++ and CUDA code, and, in the registry, the lines that name it."""
OLDEST_KERNELS = "0.17.0"
"""The oldest version of the library that the layout was tried with."""
CARD = f"""---
library_name: kernels
license: mit
tags: [kernels]
---

# {NAME}

f-divergence losses for PyTorch, used like `F.mse_loss`: fused Triton kernels on NVIDIA, AMD and Intel GPUs, eager
PyTorch elsewhere.

```python
from kernels import get_kernel

fk = get_kernel("OWNER/{NAME}", version={VERSION}, trust_remote_code=True)
loss = fk.gaussian_divergence(pred, target, "squared_hellinger", sigma=0.5)
```
"""


def sources() -> dict[Path, str]:
    """The Python files of the kernel, by their place in its package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        place = path.relative_to(ROOT / PACKAGE)
        if place.as_posix() in COMPILED:
            continue
        text = relative(path.read_text(encoding="utf-8"), len(place.parts))
        if place.name == "registry.py":
            text = re.sub(r'^ +"\w+": "\.kernels\.native:.*\n', "", text, flags=re.MULTILINE)
        found[place] = text
    return found


def relative(text: str, depth: int) -> str:
    """The text of a file with relative imports; ``depth`` is 1 in the package, 2 in a folder of it."""
    dots = "." * depth
    return re.sub(rf"^( *from ){PACKAGE}(?:\.([\w.]+))? import ", rf"\1{dots}\2 import ", text, flags=re.MULTILINE)


def write(folder: Path) -> None:
    """Write the repository, in place of what was there."""
    files = sources()
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:10]
    shutil.rmtree(folder, ignore_errors=True)
    for device in DEVICES:
        variant = folder / "build" / f"torch-{device}"
        for place, text in files.items():
            (variant / place).parent.mkdir(parents=True, exist_ok=True)
            (variant / place).write_text(text, encoding="utf-8")
        metadata = {
            "name": NAME,
            "id": f"_{PACKAGE}_{device}_{digest}",  # the name that the package is imported by
            "version": VERSION,
            "license": "MIT",
            "kernels-minver": OLDEST_KERNELS,
            "python-depends": [],
            "backend": {"type": device},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
