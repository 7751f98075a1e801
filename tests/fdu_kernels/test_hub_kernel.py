"""fdu_kernels as a kernel of Hugging Face's library ``kernels``: its layout, and its losses beside the package's.

The last test needs the library. .ci/run installs it for this test alone: beside it, bitsandbytes looks for kernels on
the hub.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BY_HAND = """
import importlib.util, json, sys
from pathlib import Path

variant = Path(sys.argv[1]) / "build" / "torch-cpu"
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
hub = importlib.util.module_from_spec(spec)
sys.modules[name] = hub
spec.loader.exec_module(hub)
"""
BY_THE_LIBRARY = """
import sys
from pathlib import Path
from kernels import get_local_kernel, get_kernel

hub = get_local_kernel(Path(sys.argv[1]))
assert get_kernel("owner/fdu-kernels", version=1) is hub
"""
ALONE = """
sys.modules["fdu_kernels"] = None  # importing it raises ImportError
"""
COMPARED = """
import torch
import fdu_kernels as own

name = hub.__name__
assert name.startswith("_fdu_kernels_cpu_") and str(Path(hub.__file__)).startswith(sys.argv[1])
assert list(hub.backends()) == ["triton", "torch"] and set(hub.backends().values()) == {None}
torch.manual_seed(0)
pred, target, mask = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.rand(3, 1, 5) > 0.2
ratio = torch.randn(6)
for backend in ("triton", "torch"):
    for divergence in ("squared_hellinger", "jensen_shannon"):
        def losses(fk, pred, ratio, chosen=backend, divergence=divergence):
            loss = fk.gaussian_divergence(pred, target, divergence, 0.7, mask=mask, backend=chosen)
            return loss + fk.density_ratio_divergence(ratio, divergence, backend=chosen)

        found = []
        for fk in (own, hub):
            inputs = pred.clone().requires_grad_(), ratio.clone().requires_grad_()
            loss = losses(fk, *inputs)
            loss.backward()
            found.append((loss, *(one.grad for one in inputs)))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs) and theirs.abs().sum() > 0, (backend, divergence)
criterion = hub.GaussianDivergenceLoss("kl", sigma="auto", backend="triton")
compiled = torch.compile(lambda x: hub.gaussian_divergence(x, target, "kl", 0.7, backend="triton"), backend="aot_eager")
assert criterion(pred, target) > 0
torch.testing.assert_close(compiled(pred), own.gaussian_divergence(pred, target, "kl", 0.7, backend="triton"))
assert hasattr(getattr(torch.ops, name), "gaussian_forward") and hasattr(torch.ops.fdu_kernels, "gaussian_forward")
print("compared")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    subprocess.run([sys.executable, ROOT / ".ci" / "hub_kernel.py", folder], check=True)
    return folder


def run(script: str, repository: Path) -> str:
    environment = {
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "LOCAL_KERNELS": f"owner/fdu-kernels={repository}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    ran = subprocess.run(
        [sys.executable, "-c", script, repository], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_layout_is_that_of_a_kernel_repository(repository: Path) -> None:
    variants = sorted((repository / "build").iterdir())
    assert [one.name for one in variants] == ["torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"]
    identities = set()
    for variant in variants:
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": variant.name.removeprefix("torch-")} and not metadata["python-depends"]
        identities.add(metadata["id"])
        assert metadata["id"].isidentifier() and (variant / "kernels" / "triton" / "gaussian.py").is_file()
    assert len(identities) == len(variants)
    # The same sources make the same names.
    again = repository.with_name("again")
    subprocess.run([sys.executable, ROOT / ".ci" / "hub_kernel.py", again], check=True)
    for path in repository.rglob("*.json"):
        assert path.read_text() == (again / path.relative_to(repository)).read_text()


@pytest.mark.slow
def test_the_kernel_needs_no_installed_package_and_minds_none(repository: Path) -> None:
    run(ALONE.join(["import sys\n", BY_HAND]) + "hub.gaussian_divergence", repository)
    assert run(BY_HAND + COMPARED, repository) == "compared\n"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="Hugging Face's kernels is not installed")
def test_the_library_loads_the_kernel(repository: Path) -> None:
    assert run(BY_THE_LIBRARY + COMPARED, repository) == "compared\n"
