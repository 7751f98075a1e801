"""The layout of fdu: imports point downwards, no name stands twice, ``__init__.py`` files hold no logic.

A training method, a family and a metric are a file and a line each: toys added so work from end to end.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import families
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fdu
from fdu.config import TRAIN_METHODS, TrainMethod, hints_of
from fdu.evaluation.metrics import catalogue
from fdu.evaluation.metrics.metric import PairMetric, SetMetric
from fdu.evaluation.tables import distance_table
from fdu.models import families as known_families
from fdu.models.denoiser import Denoiser
from fdu.models.kohya_names import KohyaNames, transformer_layers
from fdu.models.sana import SanaDenoiser
from fdu.report import EvaluatedRun, write_run
from fdu.storage.kohya import KOHYA_FILE
from fdu.training.methods import Trainable
from fdu.training.methods.full_weights import Weights
from fdu.training.methods.trainable import Request

ROOT = Path(fdu.__file__).parent
LAYERS = (
    ("concepts", "config"),
    ("models",),
    ("storage",),
    ("presets", "concept_table"),
    ("training",),
    ("evaluation",),
    ("subjects",),
    ("report",),
    ("result",),
    ("erasure",),
    ("comparison",),
    ("cli",),
)
"""The API's files and the packages, lowest first. What stands in one line may import one another."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def module_of(file: Path) -> str:
    """The dotted name of a file, and of a package's ``__init__.py``."""
    parts = file.with_suffix("").parts
    return ".".join(("fdu", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_of(file) for file in FILES}


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of fdu that a file imports anywhere, also within functions and by their name as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and (node.module == "fdu" or node.module.startswith("fdu.")):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name == "fdu" or alias.name.startswith("fdu."))


def test_every_file_has_its_place() -> None:
    top = {file.parts[0].removesuffix(".py") for file in FILES} - {"__init__", "__main__"}
    assert top == set(RANK)
    assert sum((ROOT / name).is_dir() for name in RANK) <= 8


def test_imports_point_downwards() -> None:
    upwards = []
    for file, tree in FILES.items():
        here = file.parts[0].removesuffix(".py")
        for module in imported(tree):
            there = module.split(".")[1] if "." in module else ""
            if here in RANK and there and RANK[there] > RANK[here]:
                upwards.append(f"{file}: {module}")
    assert not upwards


def test_no_module_imports_itself_through_others() -> None:
    arrows = {module_of(file): {name for name in imported(tree) if name != "fdu"} for file, tree in FILES.items()}

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = list(arrows[start])
        while ahead:
            module = ahead.pop()
            if module not in found:
                found.add(module)
                ahead += arrows.get(module, ())
        return found

    circles = [module for module in arrows if module != "fdu" and module in reached(module)]
    assert not circles


def test_no_name_stands_twice() -> None:
    files = Counter(file.stem for file in FILES if file.stem not in ("__init__", "__main__"))
    classes = Counter(node.name for tree in FILES.values() for node in tree.body if isinstance(node, ast.ClassDef))
    twice = [name for name, count in (files + classes).items() if count > 1]
    assert not twice


def test_packages_hold_no_logic() -> None:
    for file, tree in FILES.items():
        if file.name == "__init__.py" and file.parent != Path("."):
            kinds = {type(node) for node in tree.body}
            assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, f"{file} does more than import"


def test_a_new_training_method_trains(quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = families.build("sd")
    asked: list[Request] = []

    def make(denoiser: Denoiser, request: Request) -> Trainable:
        asked.append(request)
        weight = denoiser.pipeline.unet.conv_in.weight
        return Weights(denoiser.pipeline, {"unet.conv_in.weight": weight}, trains_text=False)

    with pytest.raises(ValueError, match="train_method.*one.*lora"):
        fdu.EraseConfig(train_method="toy")
    file = types.ModuleType("fdu.training.methods.toy")
    vars(file)["make"] = make
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setitem(TRAIN_METHODS, "toy", TrainMethod("toy"))
    monkeypatch.setattr("fdu.config.TrainMethodName", Literal[tuple(TRAIN_METHODS)])  # as when it is imported
    monkeypatch.setattr("fdu.config.hints_of", hints_of.__wrapped__)  # not from its cache
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    result = fdu.erase(pipeline, "three", "eight", **{**quick, "max_train_steps": 1}, train_method="toy")
    changed = [name for name, tensor in pipeline.unet.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["conv_in.weight"]
    assert asked[0].method == "toy" and tuple(asked[0].target_names) == ("three",) and asked[0].rank == quick["rank"]
    result.save(tmp_path / "out", save_as="delta")
    assert set(load_file(tmp_path / "out" / "delta.safetensors")) == {"unet.conv_in.weight"}


def test_the_command_line_offers_the_methods_without_importing_them() -> None:
    code = """if True:
        import sys, fdu.config
        assert not {"torch", "peft"} & {name.partition(".")[0] for name in sys.modules}
        from fdu.cli import main
        main(["erase", "--help"])
    """
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ",".join(TRAIN_METHODS) in "".join(shown.replace("│", "").split())


def test_every_method_has_its_file() -> None:
    folder = Path(fdu.__file__).parent / "training" / "methods"
    assert all("def make(" in (folder / f"{method.module}.py").read_text() for method in TRAIN_METHODS.values())


def test_a_new_family_writes_and_reads_its_kohya_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ToyDenoiser(SanaDenoiser):
        kohya = KohyaNames(
            transformer_layers({"toys": ("transformer_blocks", {("attn2.to_k", "attn2.to_v"): "kv"})}, {}),
            version=lambda pipeline: "toy",
        )

    erased, plain = families.build("sana"), families.build("sana")
    settings: dict[str, Any] = {"max_train_steps": 1, "train_batch_size": 2, "num_latents": 2, "num_inference_steps": 1}
    result = fdu.erase(erased, "three", "eight", **settings, rank=2, learning_rate=0.5, resolution=32)
    with pytest.raises(ValueError, match="not for SanaTransformer2DModel"):
        result.save(tmp_path / "refused", save_as="kohya")
    monkeypatch.setattr(known_families, "FAMILIES", (ToyDenoiser, *known_families.FAMILIES))
    assert isinstance(known_families.denoiser_of(plain, 32), ToyDenoiser)
    result.save(tmp_path / "out", save_as="kohya")
    names = {name.partition(".")[0] for name in load_file(tmp_path / "out" / KOHYA_FILE)}
    assert names == {"lora_unet_toys_0_kv", "lora_unet_toys_1_kv"}
    assert fdu.load_weights(plain, tmp_path / "out").format == "kohya LoRA"
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def output(denoiser: Denoiser) -> Tensor:
        with torch.no_grad():
            return denoiser.predict(noisy, torch.tensor([500]), denoiser.encode(["a photo of three"]))

    torch.testing.assert_close(output(known_families.denoiser_of(plain, 32)), output(result.denoiser))
    assert not torch.allclose(output(known_families.denoiser_of(families.build("sana"), 32)), output(result.denoiser))


def test_a_new_metric_is_in_the_figures_the_table_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def brightness(before: Tensor, after: Tensor, features: object) -> Tensor:
        return (after - before).flatten(1).double().mean(1)

    plain = PairMetric("distances.toy", "brighter", "How much brighter images are.", brightness, needs_features=False)
    linear = SetMetric("distances.linear", "linear", "Distance of the means.", lambda x, y: x.double() @ y.double().T)
    monkeypatch.setattr(catalogue, "METRICS", [*catalogue.METRICS, plain, linear])
    probes = [
        fdu.Probe("cat", ("a cat",), "target", lambda images: ["cat"] * len(images)),
        fdu.Probe("dog", ("a dog",), "retained", lambda images: ["dog"] * len(images)),
    ]
    before = fdu.Draws([torch.full((4, 3, 8, 8), 0.25), torch.full((4, 3, 8, 8), 0.5)])
    after = fdu.Draws([torch.full((4, 3, 8, 8), 0.75), torch.full((4, 3, 8, 8), 0.5)])
    assert set(fdu.evaluate(before, after, probes).distances) == {"toy"}
    evaluation = fdu.evaluate(before, after, probes, torch.nn.Flatten())
    write_run(tmp_path, EvaluatedRun.of(evaluation, probes, before, after))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["distances"]["toy"] == {"target": 0.5, "retained": 0.0, "near": 0.0}
    assert metrics["distances"]["linear"]["target"] == pytest.approx(0.5**2 * 3 * 8 * 8)
    assert metrics["intervals"]["distances.toy.target"] == [0.5, 0.5]
    assert distance_table(evaluation).splitlines()[0].split()[-2:] == ["brighter", "linear"]
    (page,) = tmp_path.glob("*.html")
    assert ">brighter</th>" in page.read_text() and plain.meaning in page.read_text()
