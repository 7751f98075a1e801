"""The code of README.md and of the hand-written pages runs; commands parse, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import families
import pytest

from fdu.cli import parse

ROOT = Path(__file__).parents[1]
README, USAGE, LOSSES = ROOT / "README.md", ROOT / "docs/usage.md", ROOT / "docs/losses.md"
OTHERS = ("docs/design.md", "examples/README.md", "CONTRIBUTING.md")
PAGES = [README, USAGE, LOSSES, *(ROOT / name for name in OTHERS)]
SMALLER = {
    "path/or/hub-id": "model",
    'device="cuda"': 'device="cpu"',
    ", seed=0)": ", max_train_steps=1, num_latents=2, num_inference_steps=2)",
    "max_train_steps=40": "max_train_steps=2, num_latents=4, num_inference_steps=2",
    "images_per_class=8": "images_per_class=2, num_inference_steps=2",
    "images=8": "images=2, num_inference_steps=2",
    'van gogh")': 'van gogh", num_inference_steps=2)',
    "steps=10, looks=2": "steps=1, looks=1",
}
"""What a page says, and what a test can afford."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [README, USAGE, LOSSES], ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(blocks(page, "python"))
    assert code
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
    assert len(fdus) > 8
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
