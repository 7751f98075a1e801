"""Tables of concepts: CSV and YAML give the same concepts, and a wrong row is named before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fdu import cli
from fdu.cli import main
from fdu.concept_table import ConceptTable
from fdu.concepts import Concept, concept_pairs

CSV = """\
target, anchor, type, weight, prompts, anchor_prompts
fox, wolf
"van gogh", painting, style, 2

r2d2, robot, , 1e-1, "a robot, r2d2 | r2d2", a robot|robot|
nothing, ""
"""
YAML = """\
- {target: fox, anchor: wolf}
- {target: van gogh, anchor: painting, type: style, weight: 2}
- target: r2d2
  anchor: robot
  weight: 0.1
  prompts: ["a robot, r2d2", r2d2]
  anchor_prompts: [a robot, robot]
- {target: nothing, anchor: ""}
"""


@pytest.mark.parametrize(("name", "text"), [("list.csv", CSV), ("list.yaml", YAML), ("list.csv", "\ufeff" + CSV)])
def test_both_kinds_of_tables_hold_the_same(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    table = ConceptTable.read(tmp_path / name)
    prompts = ("a robot, r2d2", "r2d2")
    assert table.targets == (
        *(Concept("fox"), Concept("van gogh", weight=2.0), Concept("r2d2", prompts, 0.1), Concept("nothing")),
    )
    assert table.anchors == (Concept("wolf"), Concept("painting"), Concept("robot", ("a robot", "robot")), Concept(""))
    assert table.types == ("object", "style", "object", "object")
    pairs = concept_pairs(table.targets, table.anchors, table.types)
    assert pairs[1][0].prompts[0] == "painting in the style of van gogh" and pairs[1][0].weight == 2.0
    assert pairs[2][1].prompts == ("a robot", "robot")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("list.txt", "fox", "must end in .csv, .yaml, .yml; a .txt file of prompts is a --target"),
        ("list.csv", "", "the first line names no column 'target'"),
        ("list.csv", "target,anchor\n", "holds no concept"),
        ("list.csv", "target,type\nfox,object\n", "the first line names no column 'anchor'"),
        (
            "list.csv",
            "target,anchor,wieght\nfox,wolf,2\n",
            "line 2: there is no column 'wieght'; did you",
        ),
        ("list.csv", "target,anchor\nfox,wolf\n,dog\n", "line 3: target is empty"),
        ("list.csv", "target,anchor,Anchor\nfox,wolf,dog\n", "names the column 'anchor' twice"),
        ("list.csv", "target;anchor\nfox;wolf\n", "with commas between them"),
        ("list.csv", "target,anchor\nfox,wolf,dog\n", "line 2 has 3 cells, the first line 2"),
        ("list.csv", 'target,anchor\n"fox"x,wolf\n', "line 2 is not CSV"),
        ("list.csv", "target,anchor,weight\nfox,wolf,heavy\n", "line 2: weight must be a"),
        ("list.csv", "target,anchor,weight\nfox,wolf,-1\n", "line 2: weight must be .*> 0"),
        ("list.csv", "target,anchor,type\nfox,wolf,animal\n", "line 2: type must be one of object, style"),
        ("list.csv", "target,anchor,anchor_prompts\nfox,wolf,a wolf\n", "anchor_prompts need prompts"),
        ("list.yaml", "fox: wolf", "must be a list with one entry per concept"),
        ("list.yaml", "- {target: [", "is not YAML"),
        ("list.yaml", "- {target: fox}", "entry 1: anchor is missing"),
        ("list.yaml", "- {target: 3, anchor: wolf}", "entry 1: target must be a text, got 3; put it into quotes"),
        ("list.yaml", "- {target: fox, anchor: wolf, prompts: a fox}", "prompts must be a list of texts"),
    ],
)
def test_a_wrong_table_is_refused_and_the_row_named(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        ConceptTable.read(tmp_path / name)


def test_a_thousand_concepts_are_checked_as_a_whole(tmp_path: Path) -> None:
    rows = [f"artist {number},painting,style" for number in range(1000)]
    file = tmp_path / "artists.csv"
    file.write_text("\n".join(["target,anchor,type", *rows]))
    table = ConceptTable.read(file)
    pairs = concept_pairs(table.targets, table.anchors, table.types)
    assert len(pairs) == 1000 and pairs[999][0].prompts[0] == "painting in the style of artist 999"
    file.write_text("\n".join(["target,anchor,type", *rows, rows[7]]))
    table = ConceptTable.read(file)
    with pytest.raises(ValueError, match="target names 'artist 7' twice"):
        concept_pairs(table.targets, table.anchors, table.types)


def test_the_command_takes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text("target,anchor,weight\nthree,eight,2\nred,green,\n")
    few = ["--max_train_steps", "1", "--num_latents", "4", "--num_inference_steps", "2"]
    command = ["erase", "digits", "--concepts", "list.csv", "--out", "out", *few]
    assert main([*command, "--target", "four"]) == cli.USAGE
    assert "leave out --target" in capsys.readouterr().err
    assert main(["erase", "digits", "--concepts", "missing.csv", "--out", "out"]) == cli.USAGE
    assert "concepts 'missing.csv' does not exist" in capsys.readouterr().err
    assert main(command) == cli.OK
    record = json.loads((Path("out") / "fdu.json").read_text())
    assert record["concepts"] == [["three", "eight"], ["red", "green"]]
    Path("list.csv").write_text("target,anchor\nthree,zebra\n")
    assert main([*command, "--overwrite"]) == cli.USAGE
    assert "zebra" in capsys.readouterr().err and (Path("out") / "fdu.json").is_file()
