"""Pages and cards of what strangers wrote: shown as it is, or refused in words; no markup, no scripts, no fetches."""

from __future__ import annotations

import ast
import json
import re
import time
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from test_report import PROBES, Page, found, make_draws, make_run
from test_result import make_record

import fdu
from fdu.report import make_report, render
from fdu.report.card import write_card
from fdu.report.run import EvaluatedRun
from fdu.storage.loading import read_record
from fdu.storage.output import written_by_fdu

EVIL = (
    "\"><script>alert(1)</script><img src=https://evil.example/x onerror='x()'> [a](javascript:x) ![b](https://evil)`"
)
DEEP = "[" * 100_000 + "]" * 100_000


def with_evil_text(value: Any, keep: tuple[str, ...]) -> Any:
    """JSON with every text replaced by a hostile one, except those that have to be what they are."""
    if isinstance(value, dict):
        return {key: one if key in keep else with_evil_text(one, keep) for key, one in value.items()}
    if isinstance(value, list):
        return [with_evil_text(one, keep) for one in value]
    return value + EVIL if isinstance(value, str) else value


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", robustness=found(0.2))
    metrics = json.loads((folder / "metrics.json").read_text())
    keep = ("role", "group", "train_method", "worst_retained_class", "config")
    evil = with_evil_text(metrics, keep)
    evil["record"]["config"] = {**metrics["record"]["config"], "preservation_prompts": [EVIL], "extra": EVIL, EVIL: 1}
    # The names of classes are also keys.
    text = (
        json.dumps(evil).replace('"three"', json.dumps("three" + EVIL)).replace('"eight"', json.dumps("eight" + EVIL))
    )
    text = text.replace('"nine"', json.dumps("nine" + EVIL))
    (folder / "metrics.json").write_text(text)
    for path in (folder / "images").iterdir():
        place, role, rest = path.name.split("-", 2)
        side = rest.rpartition("-")[2]
        name = re.sub(r"[^\w-]+", "_", rest.rpartition("-")[0] + EVIL).strip("_")
        path.rename(path.with_name(f"{place}-{role}-{name}-{side}"))
    page = Page(make_report(folder).read_text(encoding="utf-8"))
    assert not page.open and page.text.count("alert(1)") > 20, "it is shown as text"
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or (attributes["src"] or "").startswith("data:image/png;base64,")
        assert "evil" not in (attributes.get("style") or "") + (attributes.get("class") or "")


def test_a_page_forbids_browsers_to_fetch_or_run_anything(tmp_path: Path) -> None:
    page = Page(make_report(make_run(tmp_path / "run")).read_text(encoding="utf-8"))
    first, policy = page.all("meta")[:2]
    assert first == {"charset": "utf-8"} and policy["http-equiv"] == "Content-Security-Policy"
    rules = dict(rule.strip().split(" ", 1) for rule in (policy["content"] or "").split(";"))
    assert rules.pop("style-src") == "'unsafe-inline'" and rules.pop("img-src") == "data:"
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DEEP, "not valid JSON"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "nests deeper"),
        ('{"a": 1' + "0" * 400 + "}", "too large"),
        ('{"a": 1e999}', "too large"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ('{"a": "\x1b[2J}', "not valid JSON"),
        ("\x00\xff", "not valid JSON"),
    ],
    ids=["deep", "nested", "number", "infinite", "half", "escape", "bytes"],
)
def test_json_that_no_file_of_fdu_holds(text: str, words: str, tmp_path: Path) -> None:
    for name in ("metrics.json", "fdu.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"metrics\.json.*{words}.*run `fdu evaluate` again") as caught:
        make_report(tmp_path)
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"fdu\.json.*{words}.*run `fdu erase` again"):
        read_record(str(tmp_path))
    (tmp_path / "fdu.json").unlink()
    assert not written_by_fdu(tmp_path)


def test_nan_in_json_is_what_null_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["record"]["history"]["divergence"][1] = None
    (folder / "metrics.json").write_text(json.dumps(metrics))
    page = make_report(folder).read_text()
    metrics["record"]["history"]["divergence"][1] = float("inf")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert "Infinity" in (folder / "metrics.json").read_text() and make_report(folder).read_text() == page
    metrics["images_per_class"] = float("nan")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="images_per_class"):
        make_report(folder)


@pytest.mark.parametrize(
    ("size", "form"), [((8 * 20_000, 200), "PNG"), ((8, 256), "PNG"), ((8 * 256, 1), "PNG"), ((128, 16), "GIF")]
)
def test_images_of_odd_sizes_or_kinds(size: tuple[int, int], form: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    Image.new("RGB", size).save(folder / "images/00-target-three-before.png", form)
    began = time.monotonic()
    with pytest.raises(ValueError, match="00-target-three-before.png.*strip.*images"):
        make_report(folder)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_images_outside_of_the_folder_are_not_shown(linked: str, tmp_path: Path) -> None:
    folder, other = make_run(tmp_path / "run"), tmp_path / "private"
    path = folder / "images/00-target-three-before.png"
    if linked == "file":
        path.rename(other)
        path.symlink_to(other)
    else:
        path.parent.rename(other)
        path.parent.symlink_to(other)
    with pytest.raises(ValueError, match=r"00-target-three-before.png' is a link out of the folder.*copy"):
        make_report(folder)
    assert not (folder / "report.html").exists()
    # A link to a run, and links within it, are the run's own.
    if linked == "file":
        path.unlink()
        other.rename(folder / "images/elsewhere.png")
        path.symlink_to("elsewhere.png")
        (tmp_path / "link").symlink_to(folder)
        assert make_report(tmp_path / "link").is_file()


def test_a_name_that_is_too_long_for_a_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    text = (folder / "metrics.json").read_text().replace('"three"', json.dumps("three" * 1000))
    (folder / "metrics.json").write_text(text)
    with pytest.raises(FileNotFoundError, match="is missing"):
        make_report(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop_at", "1"), ("learning_rate", None), ("learning_rate", "1"), ("train_method", "no"), ("init", [1])],
)
def test_settings_of_other_types(name: str, value: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    # Nothing is erased, so that the page tells how to go on.
    metrics["after"] = metrics["before"]
    metrics["record"]["config"][name] = value
    (folder / "metrics.json").write_text(json.dumps(metrics))
    try:
        assert "What to do next" in make_report(folder).read_text()
    except ValueError as error:
        assert name in str(error) and "metrics.json" in str(error)


def test_names_of_places_in_errors_are_printable(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["after"]["per_class"]["\x1b[2J"] = "x"
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="per_class") as caught:
        make_report(folder)
    assert "\x1b" not in str(caught.value)


# The model card


def test_no_text_of_a_record_becomes_markup_in_a_card(tmp_path: Path) -> None:
    evil = EVIL + " *b* _c_ ~d~ $e$ \\ # & <!-- \n```\n# heading\n| cell |"
    record = make_record("org/base", divergence="kl")
    record["target"]["name"] = record["config"]["adapter_layers"] = record["revision"] = evil
    record["concepts"], record["adapters"], record["versions"]["other"] = [[evil, evil]], [evil], evil
    probes = [fdu.Probe("three" + evil, ("three",), "target", lambda _: ["three" + evil] * 10), *PROBES[1:]]
    draws = make_draws(0.1, 0.5, 0.9)
    figures = fdu.evaluate(draws, draws, probes)
    for base in ("org/base", evil, "a" + evil + ".safetensors@" + evil):
        for form in ("lora", "delta"):
            text = write_card(
                tmp_path,
                form,
                families.build("sd"),
                {**record, "base": base},
                figures,
                probes,  # type: ignore[arg-type]
            ).read_text(encoding="utf-8")
            card = ModelCard(text)
            assert card.data.to_dict()["library_name"] == "diffusers"
            assert card.text.count("\n# ") == 1, "the title"
            fences = card.text.split("\n```")
            assert len(fences) == 5, "one block of code, and one of BibTeX"
            code = fences[1].removeprefix("python\n")
            ast.parse(code)
            called = {node.func.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
            assert called <= {"from_pretrained", "load_pipeline", "load_lora_weights", "load_weights", "set_adapters"}
            prose = "\n".join([fences[0], *fences[2::2]])
            prose = re.sub(r"`[^`\n]*`", "", prose.replace("\\`", ""))
            assert "<" not in prose and "](" not in prose.replace("\\](", "").replace(
                "[fdu](https://pypi.org/project/fdu/)", ""
            )
            assert not re.search(r"(?<!\\)[~$]|(?<![\\*])\*b\*|(?<!\\)_c_", prose)
            assert "`" not in prose


def test_usual_names_stay_as_they_are_in_a_card(tmp_path: Path) -> None:
    record = make_record("org/my_base-1.5")
    record["concepts"] = [["R2-D2 (robot), snake_case", "it's a 50 % off-white #1"]]
    text = write_card(tmp_path, "lora", families.build("sd"), record).read_text(encoding="utf-8")
    assert "| R2-D2 (robot), snake_case | it's a 50 % off-white #1 |" in text
    assert "erased from org/my_base-1.5" in text and 'from_pretrained("org/my_base-1.5")' in text


def test_images_of_two_sizes_are_shown() -> None:
    draws = fdu.Draws([torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 32), torch.rand(2, 3, 16, 16)])
    run = EvaluatedRun.of(fdu.evaluate(draws, draws, PROBES), PROBES, draws, draws)
    assert not Page(render(run)).open
