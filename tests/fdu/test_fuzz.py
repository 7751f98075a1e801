"""Fuzzing: whatever a file of strangers holds, it is read, or refused with the documented error and nothing changed.

Examples are the same in every run. FDU_FUZZ_MINUTES=60 (``make fuzz``) draws new ones instead, for as long in all.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from families import ALPHA, CONTEXT, add_adapter, change_weights
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_report import found, make_run
from torch import Tensor

from fdu.cli import COMMANDS, parse
from fdu.cli.options import option_names
from fdu.cli.program import USER_ERRORS
from fdu.comparison.sweep import Records
from fdu.concept_table import ConceptTable
from fdu.concepts import Concept
from fdu.config import EraseConfig
from fdu.models import parts
from fdu.presets import read_settings
from fdu.report import make_report
from fdu.storage.formats import write
from fdu.storage.readers import load_weights
from fdu.storage.tensor_checks import is_finite

MINUTES = float(os.environ.get("FDU_FUZZ_MINUTES", "0"))
"""Minutes for all tests together; 0: a fixed number of examples."""
TESTS = 8
SLOWEST = 60.0
"""Seconds of one example; one that never ends takes years."""
TEXT = st.text(max_size=12) | st.sampled_from(["", ".", "unet", "unet.", "\x1b[2J", "a" * 600, "../x", "<script>", "|"])
NUMBERS = st.sampled_from([0, -1, 1, 2.5, True, 10**400, math.nan, math.inf, -math.inf, 1e308, None, "1"])
JSON = st.recursive(
    NUMBERS | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


def fuzz(check: Callable[[Any], None], strategy: st.SearchStrategy[Any], examples: int) -> None:
    """Check examples, each within its time."""

    def timed(example: Any) -> None:
        began = time.monotonic()
        check(example)
        assert time.monotonic() - began < SLOWEST

    run = settings(
        max_examples=examples,
        derandomize=not MINUTES,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(given(example=strategy)(timed))
    end = time.monotonic() + 60 * MINUTES / TESTS
    run()
    while time.monotonic() < end:
        run()


# Weights


def others(tensor: Tensor) -> list[Tensor]:
    """What may stand where a tensor is: other shapes and dtypes, and what no weight is."""
    kinds = ["float16", "bfloat16", "float64", "float8_e4m3fn", "int8", "int64", "bool", "complex64", "uint8"]
    found = [tensor.to(getattr(torch, kind)) for kind in kinds]
    found += [torch.full_like(tensor, number) for number in (math.nan, math.inf, -1.0, 0.0, 1e38)]
    found += [torch.tensor(2.0), torch.ones(2), torch.tensor(3), torch.tensor(True), torch.zeros(0)]
    found += [tensor[:1], tensor.flatten(), tensor[None], tensor.mT, tensor[..., None], tensor.flatten()[:0]]
    return [*found, tensor.to("meta"), tensor.to_sparse(), torch.zeros(1).expand(tensor.shape)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and metadata of a file of each format."""
    found = []
    for form in ("delta", "lora", "kohya", "dora"):
        pipeline, folder = families.build("sd"), tmp_path_factory.mktemp(form)
        if form == "delta":
            changed = change_weights(pipeline, "unet", CONTEXT["sd"])
            embedding = pipeline.text_encoder.get_input_embeddings().weight
            before = embedding.detach().clone()
            embedding.data[[3, 7]] += 1
            name = next(name for name in parts.weights(pipeline) if name.endswith("token_embedding.weight"))
            changed[name] = (before, embedding.detach().clone())
            file = write(folder, "delta", pipeline, changed_weights=changed)
        else:
            layers = {"unet": add_adapter(pipeline, "unet", CONTEXT["sd"], dora=form == "dora")}
            layers["text_encoder"] = add_adapter(pipeline, "text_encoder", ("q_proj",), dora=form == "dora")
            kohya = "kohya" if form == "kohya" else "lora"
            file = write(folder, kohya, pipeline, layers, lora_alpha=ALPHA)  # type: ignore[arg-type]
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            metadata = json.loads(opened.read(length)).get("__metadata__", {})
        found.append((load_file(file), metadata))
    return found


class Loader:
    """A pipeline that files are loaded into; a new one after each that could be."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.pipeline = families.build("sd")
        self.before = {name: weight.detach().clone() for name, weight in parts.weights(self.pipeline).items()}

    def try_loading(self, file: Path, **settings: Any) -> bool:
        """Load a file, or be refused with nothing changed."""
        try:
            load_weights(self.pipeline, file, check_base=False, **settings)
        except ValueError as error:
            assert str(file) in str(error) and "\x1b" not in str(error)
            own = parts.weights(self.pipeline)
            assert all(torch.equal(own[name], tensor) for name, tensor in self.before.items())
            assert not any(parts.adapted(model) for model in parts.models(self.pipeline).values())
            return False
        for model in parts.models(self.pipeline).values():
            assert all(is_finite(parameter) for parameter in model.parameters())
        self.renew()
        return True


KEYS = st.sampled_from(["lora_adapter_metadata", "fdu_format", "base", "base_fingerprint"]) | TEXT
SETTINGS = st.sampled_from([f"unet.{key}" for key in ("lora_alpha", "alpha_pattern", "use_rslora")])
ENDS = st.sampled_from(
    [".alpha", ".dora_scale", ".lora_magnitude_vector", ":rows", ":indices", ".lora_mid.weight", ".x"]
)
PLACES = st.integers(0, 1000)
CHANGES = st.lists(
    st.tuples(st.just("drop"), PLACES)
    | st.tuples(st.just("rename"), PLACES, TEXT | st.sampled_from(["unet.{}", "{}.x", "text_encoder.text_model.{}"]))
    | st.tuples(st.just("other"), PLACES, PLACES)
    | st.tuples(st.just("part"), PLACES, ENDS, PLACES)
    | st.tuples(
        st.just("metadata"), KEYS, TEXT | st.builds(json.dumps, JSON | st.dictionaries(SETTINGS, JSON, max_size=2))
    ),
    max_size=3,
)


def malformed(
    tensors: dict[str, Tensor], metadata: dict[str, str], changes: list[Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata with some of them changed."""
    tensors, metadata = dict(tensors), dict(metadata)
    replaced: set[str] = set()
    for kind, place, *how in changes:
        if kind == "metadata":
            metadata[place] = how[0]
            continue
        name = sorted(tensors)[place % len(tensors)]
        if kind == "drop" and len(tensors) > 1:
            del tensors[name]
        elif kind == "rename":
            tensors[how[0].replace("{}", name)] = tensors.pop(name)
            replaced.add(how[0].replace("{}", name))
        elif kind == "other" and name not in replaced and tensors[name].ndim == 2:
            possible = others(tensors[name])
            tensors[name] = possible[how[0] % len(possible)]
            replaced.add(name)
        elif kind == "part":
            stem = name.partition(".lora_")[0].removesuffix(":rows").removesuffix(":indices")
            possible = others(torch.ones(3, 3))
            tensors[stem + how[0]] = possible[how[1] % len(possible)]
            replaced.add(stem + how[0])
    return tensors, metadata


def test_files_of_weights(weights: Any, tmp_path: Path) -> None:
    loader, loaded = Loader(), []

    def check(example: tuple[int, list[Any]]) -> None:
        tensors, metadata = malformed(*weights[example[0]], example[1])
        torch.save(tensors, tmp_path / "a.pt")
        loaded.append(loader.try_loading(tmp_path / "a.pt"))
        try:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors", metadata)
        except (ValueError, RuntimeError, KeyError, SafetensorError, NotImplementedError):
            return  # the format has no place for it
        loaded.append(loader.try_loading(tmp_path / "a.safetensors"))

    fuzz(check, st.tuples(st.integers(0, len(weights) - 1), CHANGES), 60)
    assert any(loaded) and not all(loaded), "both ways are tested"


@st.composite
def nested(draw: st.DrawFn) -> Any:
    """Dicts of dicts that may share or contain each other, of tensors and of anything else."""
    leaves: Any = NUMBERS | TEXT | st.builds(torch.zeros, st.integers(0, 3)) | st.just(torch.eye(2).to_sparse())
    dicts: list[dict[Any, Any]] = [{} for _ in range(draw(st.integers(1, 6)))]
    keys = TEXT | st.integers() | st.sampled_from(["state_dict", "unet", (1,), 1.5, None, True, b"x"])
    for one in dicts:
        for _ in range(draw(st.integers(0, 4))):
            one[draw(keys)] = draw(st.sampled_from(dicts) | leaves)
    return dicts[0]


def test_pickles_of_nested_dicts(tmp_path: Path) -> None:
    loader = Loader()

    def check(content: Any) -> None:
        torch.save(content, tmp_path / "a.bin")
        loader.try_loading(tmp_path / "a.bin")

    fuzz(check, nested(), 100)


EDITS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "insert", "end"]), st.binary(max_size=4)))


def edited(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """Bytes with some changes, most of them near the beginning, where the headers are."""
    for where, kind, new in edits[:5]:
        place = int(where**3 * len(data))
        if kind == "flip" and data:
            place = min(place, len(data) - 1)
            data = data[:place] + bytes([data[place] ^ (new[0] if new else 1)]) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place] + data[place + len(new) :]
        elif kind == "insert":
            data = data[:place] + new + data[place:]
        elif kind == "end":
            data = data[: len(data) - place]
    return data


def test_damaged_files_of_weights(weights: Any, tmp_path: Path) -> None:
    loader, originals = Loader(), {}
    for number, (tensors, metadata) in enumerate(weights):
        save_file(tensors, tmp_path / f"{number}.safetensors", metadata)
        torch.save(tensors, tmp_path / f"{number}.pt")
        torch.save(tensors, tmp_path / f"{number}.ckpt", _use_new_zipfile_serialization=False)
        for end in ("safetensors", "pt", "ckpt"):
            originals[f"{number}.{end}"] = (tmp_path / f"{number}.{end}").read_bytes()

    def check(example: tuple[str, list[tuple[float, str, bytes]]]) -> None:
        name, edits = example
        (tmp_path / name).write_bytes(edited(originals[name], edits))
        loader.try_loading(tmp_path / name)

    fuzz(check, st.tuples(st.sampled_from(sorted(originals)), EDITS), 100)


# Reports and records


def changed(content: Any, changes: list[tuple[list[int], str, Any]]) -> Any:
    """JSON in which some values, found by a way into it, are others or gone."""
    content = json.loads(json.dumps(content))
    for way, kind, new in changes:
        parent, last, here = None, None, content
        for step in way:
            if not isinstance(here, (dict, list)) or not here:
                break
            last = step % len(here) if isinstance(here, list) else sorted(here)[step % len(here)]
            parent, here = here, here[last]
        if parent is None:
            continue
        if kind == "drop":
            del parent[last]
        elif kind == "key" and isinstance(parent, dict):
            parent[str(new)[:20]] = here
        else:
            parent[last] = new
    return content


DIFFERENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.sampled_from(["drop", "key", "other"]), JSON),
    max_size=4,
)
MODES = ["L", "1", "P", "CMYK", "I;16", "RGBA"]


def test_folders_of_runs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", robustness=found(0.2))
    metrics = json.loads((folder / "metrics.json").read_text())
    image = folder / "images/00-target-three-before.png"
    whole, made = image.read_bytes(), []

    def check(example: tuple[list[Any], list[Any], tuple[str, int, int]]) -> None:
        differences, edits, (mode, width, height) = example
        (folder / "metrics.json").write_text(json.dumps(changed(metrics, differences)))
        image.write_bytes(edited(whole, edits))
        if mode:
            Image.new(mode, (width, height)).save(image, "PNG" if mode != "CMYK" else "TIFF")
        (folder / "report.html").unlink(missing_ok=True)
        try:
            page = make_report(folder).read_text(encoding="utf-8")
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error) and "\x1b" not in str(error)
            assert not (folder / "report.html").exists()
        else:
            made.append(page)
            assert "<script" not in page

    sizes = st.tuples(st.sampled_from(["", "", *MODES]), st.sampled_from([1, 8, 128, 4000]), st.integers(1, 300))
    fuzz(check, st.tuples(DIFFERENCES, st.just([]) | EDITS, sizes), 100)
    assert made


def test_bytes_that_are_no_json(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    whole = (folder / "metrics.json").read_bytes()

    def check(edits: list[tuple[float, str, bytes]]) -> None:
        (folder / "metrics.json").write_bytes(edited(whole, edits))
        try:
            make_report(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error) and "\x1b" not in str(error)
        (tmp_path / "prompts.txt").write_bytes(edited(b"# a\na cat\na dog\n", edits))
        try:
            assert Concept.from_file(tmp_path / "prompts.txt").prompts
        except ValueError as error:
            assert "prompts.txt" in str(error)

    fuzz(check, EDITS, 60)


# Settings, tables, records of comparisons, command lines


BOMB = "k0: &k0 [x]\n" + "".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}]\n" for n in range(1, 40))
"""YAML of a line per level that stands for 2^39 values."""
ODD_YAML = ["!!int ''", "!!bool x", "!!timestamp x", "2001-99-99", "!!python/object:os.system x", "[" * 2000, BOMB]
YAML = st.builds(lambda content: yaml.safe_dump(content, allow_unicode=True), JSON) | st.sampled_from(ODD_YAML)


def test_files_of_settings_and_tables(tmp_path: Path) -> None:
    names = st.sampled_from(EraseConfig.field_names()) | TEXT
    rows = st.lists(st.dictionaries(st.sampled_from(["target", "anchor", "type", "weight", "prompts"]) | TEXT, JSON))
    dumped = st.builds(lambda content: yaml.safe_dump(content, allow_unicode=True), st.dictionaries(names, JSON) | rows)
    good = "learning_rate: 0.001\ndivergence: mse\n", "- {target: fox, anchor: wolf, weight: 2}\n"
    settings_file, table, listed = tmp_path / "settings.yaml", tmp_path / "table.yaml", tmp_path / "table.csv"

    def check(example: tuple[str, list[Any]]) -> None:
        text, edits = example
        for path in (settings_file, table, listed):
            path.write_bytes(edited(text.encode("utf-8", "surrogatepass"), edits))
            read = read_settings if path is settings_file else ConceptTable.read
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error) and "\x1b" not in str(error) and len(str(error)) < 10_000

    texts = YAML | dumped | st.sampled_from([*good, "target,anchor\nfox,wolf\n"])
    fuzz(check, st.tuples(texts, st.just([]) | EDITS), 150)


def test_files_of_records(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    header = {"identity": {"settings": {"rank": 4}}, "device": "cpu", "versions": {"torch": "2"}}
    records = [
        {"name": f"run {number}", "identity": {"seed": number}, "probes": [{"hits": "01"}]} for number in range(3)
    ]
    kept = []

    def check(example: tuple[list[Any], list[Any]]) -> None:
        differences, edits = example
        lines = changed([header, *records], differences)
        text = "".join(json.dumps(line) + "\n" for line in lines) if isinstance(lines, list) else json.dumps(lines)
        path.write_bytes(edited(text.encode(), edits))
        found = Records(path)
        kept.append(len(found.found))
        for number in range(3):
            found.of(f"run {number}", {"seed": number, "settings": {"rank": 4}})

    fuzz(check, st.tuples(DIFFERENCES, st.just([]) | EDITS), 150)
    path.write_text("[" * 100_000 + "\n")
    assert not Records(path).found and max(kept) == 3 and min(kept) < 3


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {name: sorted(option_names(command)[0]) for name, command in COMMANDS.items()}
    values = TEXT | st.sampled_from(
        [
            "emoji",
            "digits",
            "fox",
            "auto",
            "0",
            "1",
            "-1",
            "1e400",
            "nan",
            "none",
            "fox.txt",
            "--",
            "-",
            "=",
            "a,b",
            "1:2:3",
        ]
    )
    command = st.sampled_from([*COMMANDS, "erse", ""])

    def check(example: tuple[str, list[str], list[tuple[int, list[str]]]]) -> None:
        name, words, typed = example
        known = options.get(name) or options["erase"]
        given = [word for place, taken in typed for word in (f"--{known[place % len(known)].lstrip('-')}", *taken)]
        try:
            parse([name, *words, *given]).prepare("fdu")
        except SystemExit as end:
            assert end.code in (0, 1, 2)
        except USER_ERRORS as error:
            assert str(error)

    with_values = st.tuples(PLACES, st.lists(values, max_size=2))
    fuzz(check, st.tuples(command, st.lists(values, max_size=3), st.lists(with_values, max_size=4)), 150)
    capsys.readouterr()
