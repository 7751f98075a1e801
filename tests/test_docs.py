"""The code of README.md, docs/ and examples/ runs; commands parse, links lead somewhere, the reference is whole."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import competitors
import families
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import fdu
import fdu_kernels
from fdu.cli import parse
from fdu.cli.options import option_names
from fdu.cli.program import COMMANDS
from fdu.config import TRAIN_METHODS
from fdu.presets import PRESETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in OUTSIDE)]
SMALLER = {
    "path/or/hub-id": "model",
    'device="cuda"': 'device="cpu"',
    ", seed=0)": ", max_train_steps=1, num_latents=2, num_inference_steps=2)",
    "max_train_steps=40": "max_train_steps=2, num_latents=4, num_inference_steps=2",
    "images_per_class=8": "images_per_class=2",
    "images=8": "images=2, num_inference_steps=2",
    'van gogh")': 'van gogh", num_inference_steps=2)',
    "steps=10, looks=2": "steps=1, looks=1",
}
"""What a page says, and what a test can afford."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def clean() -> Iterator[None]:
    """Leaves no state of accelerate and no competitor of a page behind."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    competitors.FORMS["gaussian"].others.pop("mine", None)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: f"{page.relative_to(ROOT)}"
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import lightning" in page.read_text():
        pytest.importorskip("lightning")
    code = "\n".join(blocks(page, "python"))
    monkeypatch.chdir(tmp_path)
    for said, done in SMALLER.items():
        code = code.replace(said, done)
    if '"model"' in code:
        families.build("sd").save_pretrained("model")
    exec(compile(code, str(page), "exec"), {"__name__": "page"})


def test_commands_parse() -> None:
    text = "\n".join(block for page in PAGES for block in blocks(page, "console")).replace("\\\n", "")
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    fdus = [words[words.index("fdu") + 1 :] for words in commands if "fdu" in words]
    assert len(fdus) > 20
    for words in fdus:
        parse(words)


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor and file.is_file() else []
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            if not file.exists() or (anchor and anchor not in anchors):
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 130


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:2] == "| "]


def test_the_settings_of_a_model_are_those_of_the_plan() -> None:
    """The guide repeats figures of docs/memory.md: peaks, and for each the smallest card of which it fills 90 %."""
    memory = (DOCS / "memory.md").read_text()
    options = dict(re.findall(r"^\* \*\*([A-E])\*\*: `(.*)`$", memory, re.MULTILINE))
    _, by_card = memory.split("## Which options for my card")
    presets, estimates = by_card.split("## The estimates")
    known = {}
    for preset, model, first, second, *_ in (row for row in rows(presets) if row[0] in PRESETS):
        begun = f"--preset {preset} --mixed_precision bf16"
        known |= {(model, begun): first, (model, f"{begun} --gradient_checkpointing"): second}
    for model, _, *peaks in rows(estimates):
        known |= {(model, one): peak.split()[0] for one, peak in zip(options.values(), peaks, strict=True) if peak}
    sections = (DOCS / "guides/models.md").read_text().split("\n## ")[1:]
    told = [(section.splitlines()[0], *row) for section in sections for row in rows(section) if "GiB" in row[0]]
    assert len(told) > 12 and {model for model, *_ in told} <= {model for model, _ in known}
    for model, card, given, peak, trained in told:
        assert known[model, given.strip("`")] == peak, (model, given)
        assert card == next(f"{size} GiB" for size in (8, 12, 16, 24, 48, 80) if float(peak) <= 0.9 * size), (
            model,
            given,
        )
        named = re.search(r"--preset (\S+)", given)
        method = TRAIN_METHODS[PRESETS[named[1]].settings.get("train_method", "lora") if named else "lora"]
        assert trained == ("a LoRA" if method.result == "lora" else "weights"), (model, given)


@pytest.mark.parametrize("package", [fdu, fdu_kernels])
def test_the_reference_has_every_public_name(package: ModuleType) -> None:
    page = (DOCS / "reference" / f"{package.__name__}.md").read_text()
    assert sorted(re.findall(rf"^::: {package.__name__}\.(\w+)$", page, re.MULTILINE)) == sorted(package.__all__)


def test_the_command_line_has_a_page_with_every_option() -> None:
    """The site's build writes it; the options of each command are those of the parser."""
    hooks = site_hooks()
    parts = dict(part.split("\n", 1) for part in hooks.command_line().split("\n## ")[1:])
    settings, shared = hooks.settings(), "".join(parts[title] for title in parts if title.endswith(" options"))
    for name, command in COMMANDS.items():
        written = parts[f"fdu {name}"] + shared
        names, _, placed = option_names(command)
        for option in names - placed:
            assert re.search(rf"^`--{option}[ `]", written + "\n" + settings, re.MULTILINE), (name, option)
    defaults = re.findall(r"^`--(\w+)[^`]*`", settings, re.MULTILINE)
    assert tuple(defaults) == fdu.EraseConfig.field_names()


def test_links_out_of_docs_become_links_between_pages() -> None:
    hooks = site_hooks()
    places = {"examples/x.py": "examples/x.py.md"}
    config = SimpleNamespace(extra={"sources": {"a/b.md": "docs/a/b.md"}, "places": places})
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a/b.md"))
    text = "[x](../../examples/x.py#f) [y](../c.md) [z](https://x.org/examples/x.py) [w](#f)"
    linked = hooks.on_page_markdown(text, page, config, None)
    assert linked == text.replace("../../examples/x.py#", "../examples/x.py.md#")


def site_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_gives_what_is_stored(path: Path) -> None:
    module = runpy.run_path(str(DOCS / "notebooks" / "execute.py"))
    ran, stored = module["executed"](path), json.loads(path.read_text())
    for now, then in zip(ran.cells, stored["cells"], strict=True):
        kinds = [[sorted(one.get("data", ["text"])) for one in cell.get("outputs", ())] for cell in (now, then)]
        assert kinds[0] == kinds[1], "".join(then["source"])


EXAMPLES = ROOT / "examples"
PATCH = EXAMPLES / "train_text_to_image_lora.patch"
UPSTREAM = "1cf7638"
"""Of examples/text_to_image/train_text_to_image_lora.py in diffusers v0.40.0: how git abbreviates its blob's hash."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example as a script, in this process, where torch and diffusers are imported; returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_loss_in_your_loop_erases(run: Callable[..., str]) -> None:
    printed = run("loss_in_your_loop.py", "--steps", "9", "--divergence", "jensen_shannon")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 2 and all(0 < loss < 1 for loss in losses)
    # One line of the loop is the loss, and one makes it.
    marked = [line for line in (EXAMPLES / "loss_in_your_loop.py").read_text().splitlines() if "# the loss" in line]
    assert len(marked) == 3
    assert re.search(r"now drawn for .*: ((zero|one|two|three|four|five|six|seven|eight|nine)(, )?){16}$", printed)


def test_per_sample_gradients(run: Callable[..., str]) -> None:
    shares = dict(re.findall(r"(\w+): the outlier has (\d+)%", run("per_sample_gradients.py")))
    assert int(shares["squared_hellinger"]) < 5 < int(shares["mse"])


def test_the_compiled_loop_is_one_graph_and_learns(run: Callable[..., str]) -> None:
    torch._dynamo.reset()
    printed = run("compiled_loop.py", "--steps", "31", "--compiler", "aot_eager")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert set(re.findall(r"graphs (\d+)", printed)) == {"1"} and losses[-1] < losses[0] / 2


@pytest.mark.slow
def test_the_digits_example_saves_a_lora_that_plain_diffusers_draws_with(
    run: Callable[..., str], tmp_path: Path
) -> None:
    run("erase_digits.py", "--out", str(tmp_path / "erased"), "--steps", "2")
    with Image.open(tmp_path / "erased" / "drawn.png") as sheet:
        assert sheet.size == (512, 128)
        before, after = sheet.crop((0, 0, 128, 128)), sheet.crop((256, 0, 384, 128))
        assert before.tobytes() != after.tobytes()


def test_the_example_for_large_models_saves_a_lora_and_checkpoints(run: Callable[..., str], tmp_path: Path) -> None:
    families.build("sdxl").save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--device", "cpu", "--resolution", "16", "--steps", "1"]
    run("erase_sdxl.py", *arguments, "--out", str(tmp_path / "erased"))
    assert list((tmp_path / "erased").glob("*.safetensors"))
    assert any((tmp_path / "erased-checkpoints").iterdir())


def test_the_patch_is_one_import_and_one_line() -> None:
    lines = PATCH.read_text().splitlines()
    added = [line[1:].strip() for line in lines if line.startswith("+") and not line.startswith("+++")]
    removed = [line[1:].strip() for line in lines if line.startswith("-") and not line.startswith("---")]
    assert added == [
        "from fdu_kernels import gaussian_divergence",
        'loss = gaussian_divergence(model_pred, target, "squared_hellinger", sigma=0.3)',
    ]
    assert removed == ['loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")']
    assert f"index {UPSTREAM}.." in PATCH.read_text()
    guide = (DOCS / "guides/training-codes.md").read_text()
    assert all(line in guide for line in (*added, *removed))


def test_git_applies_the_patch(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    # The lines that the patch expects, where it expects them; what lies between them it does not look at.
    script, wanted = tmp_path / "examples" / "text_to_image" / "train_text_to_image_lora.py", {}
    for line in PATCH.read_text().splitlines():
        if hunk := re.match(r"@@ -(\d+)", line):
            number = int(hunk[1])
        elif line.startswith((" ", "-")) and not line.startswith("---"):
            wanted[number] = line[1:]
            number += 1
    script.parent.mkdir(parents=True)
    script.write_text("".join(f"{wanted.get(number, '')}\n" for number in range(1, max(wanted) + 2)))
    subprocess.run(["git", "apply", str(PATCH)], cwd=tmp_path, check=True)
    text = script.read_text()
    assert text.count("gaussian_divergence") == 2 and "mse_loss" not in text


def test_every_promise_names_a_test_that_exists() -> None:
    rows = [line for line in (DOCS / "promises.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    for row in rows:
        _, proof = row.strip("| ").rsplit("|", 1)
        if set(proof) <= {"-"} or proof.strip() == "test":
            continue
        file = ""
        for name in re.findall(r"`(\S+)`", proof):
            file, _, test = name.rpartition("::") if ".py" in name and "::" in name else (file, "", name)
            if name.endswith(".py"):
                assert (ROOT / "tests" / name).is_file() or (ROOT / "tests/fdu" / name).is_file(), row
            else:
                path = next(path for path in (ROOT / "tests" / file, ROOT / "tests/fdu" / file) if path.is_file())
                assert f"\ndef {test}(" in path.read_text(), row
