"""The page of a run is whole, self-contained and honest; its charts and pictures show the data."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import fdu
from fdu.evaluation import Sampling
from fdu.evaluation.features import Features
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.evaluation.verdict import judge
from fdu.report import Conditions, EvaluatedRun, check_record, check_run, make_report, render, write_report
from fdu.report.charts import training_charts
from fdu.report.pictures import before_after, data_uri, gallery, strip, to_pil

VOID = {"meta", "img", "br", "rect", "line", "polyline", "polygon", "link", "input", "hr"}


class Page(HTMLParser):
    """What the tests ask of a page: its elements, whether they nest, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())


def by_brightness(images: torch.Tensor) -> list[str]:
    """A judge that reads the class from the mean of the image."""
    names = ("three", "eight", "nine")
    return [names[min(int(image.mean() * 3), 2)] for image in images]


PROBES = [
    fdu.Probe("three", ("three",), "target", by_brightness),
    fdu.Probe("eight", ("eight",), "retained", by_brightness),
    fdu.Probe("nine", ("nine",), "retained", by_brightness),
]


def make_draws(*levels: float) -> fdu.Draws:
    return fdu.Draws([torch.full((10, 3, 16, 16), level) for level in levels])


def make_record(**config: Any) -> dict[str, Any]:
    steps = [1.0, 0.5, 0.25, 0.125]
    return {
        "target": {"name": "three", "prompts": ["three"]},
        "anchor": {"name": "eight", "prompts": ["eight"]},
        "config": {
            "divergence": "squared_hellinger",
            "max_train_steps": 200,
            "seed": 0,
            "preservation_prompts": ["<b>"],
            **config,
        },
        "sigma": 0.25,
        "seconds": 12.5,
        "history": {"loss": steps, "divergence": steps, "preservation": [0.0, 0.1, 0.1, 0.0], "distance": steps},
        "versions": {"python": "3.11", "torch": "9.9.9"},
        "base": "org/model",
        "fingerprint": "0123456789abcdef" * 4,
        "command": "fdu erase org/model --target three",
    }


def make_page(tmp_path: Path, after: fdu.Draws | None = None, **settings: Any) -> Page:
    before = make_draws(0.1, 0.5, 0.9)
    after = after or make_draws(0.5, 0.5, 0.9)
    settings.setdefault("record", make_record())
    evaluation = fdu.evaluate(before, after, PROBES, settings.pop("features", None))
    run = EvaluatedRun.of(evaluation, PROBES, before, after, **settings)
    path = write_report(tmp_path / "report.html", run)
    return Page(path.read_text(encoding="utf-8"))


def test_several_targets_have_a_heat_map_and_a_table(tmp_path: Path) -> None:
    probes = [PROBES[0], dataclasses.replace(PROBES[1], role="target"), PROBES[2]]
    before, after = make_draws(0.1, 0.5, 0.9), make_draws(0.9, 0.5, 0.9)
    record = make_record() | {"concepts": [("three", "nine"), ("eight", "nine")]}
    run = EvaluatedRun.of(fdu.evaluate(before, after, probes), probes, before, after, record=record)
    assert (run.targets, run.target, run.anchor) == (["three", "eight"], "three and eight", "nine")
    page = Page(write_report(tmp_path / "report.html", run).read_text(encoding="utf-8"))
    assert not page.open and "three and eight → nine" in page.text
    assert "1 of 2 concepts is erased" in page.text
    # The heat map: three became nine, eight is still itself.
    assert "three, nine: 100 %" in page.text and "eight, itself: 100 %" in page.text and "nine 100 %" in page.text
    assert not any(one["class"] == "pairs target" for one in page.all("div") if one.get("class"))
    folder = tmp_path / "run"
    folder.mkdir()
    run.write(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["targets"] == ["three", "eight"] and metrics["after"]["became"]["eight"] == {"eight": 1.0}
    assert EvaluatedRun.read(folder).targets == run.targets
    named = dataclasses.replace(run, record=make_record() | {"concepts": [("three", "nine")]})
    assert named.anchor is None


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    page = make_page(tmp_path)
    assert not page.open
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    style = (tmp_path / "report.html").read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    style = style.replace("http-equiv", "")
    assert "@import" not in style and "url(" not in style and "http" not in style


def test_images_decode_and_are_described(tmp_path: Path) -> None:
    page = make_page(tmp_path)
    images = page.all("img")
    assert len(images) == 2 * 8 * len(PROBES)
    for image in images:
        data = (image["src"] or "").removeprefix("data:image/png;base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert picture.size == (16, 16)
    for image, side, seen in zip(images, ("before", "after"), ("three", "eight"), strict=False):
        assert re.search(rf"{side}.*'three'.*saw {seen}", image["alt"] or "")


def test_the_targets_pairs_come_first_with_their_prompts_and_the_answers_to_read(tmp_path: Path) -> None:
    prompts = tuple(f"a three, {number}" for number in range(3))
    probes = [dataclasses.replace(PROBES[0], prompts=prompts), *PROBES[1:]]
    before, after = make_draws(0.1, 0.5, 0.9), make_draws(0.5, 0.5, 0.9)
    run = EvaluatedRun.of(fdu.evaluate(before, after, probes), probes, before, after)
    page = Page(render(run))
    pairs = "".join(f" {prompts[number % 3]} before: three after: eight" for number in range(8))
    assert pairs in page.text
    assert page.text.index(pairs) < page.text.index("Its neighbours")
    assert " 'a three, 1'; the judge saw three" in str(page.all("img")[2]["alt"])
    assert not any(one.get("class") == "still" for one in page.all("b"))
    kept = Page(render(EvaluatedRun.of(fdu.evaluate(before, before, probes), probes, before, before)))
    assert [one.get("class") for one in kept.all("b")].count("still") == 8


def test_every_image_can_be_enlarged_from_the_keyboard_and_stays_in_its_place(tmp_path: Path) -> None:
    page = make_page(tmp_path)
    places = [one for _, one in page.elements if one.get("tabindex") == "0"]
    assert [str(one["class"]) for one in places] == ["shot"] * 16 + ["tile"] * 16
    assert [one["style"] for one in places[16:24]] == [f"--place: {place}" for place in range(8)]
    style = (tmp_path / "report.html").read_text(encoding="utf-8")
    for rule in (
        r"\.shot:hover img, \.shot:focus img \{ transform: scale",
        r"\.tile:focus \.lift \{\s+position: absolute",
    ):
        assert re.search(rule, style)


def test_large_images_are_shown_as_stored_for_the_target_and_smaller_for_others(tmp_path: Path) -> None:
    draws = fdu.Draws([torch.full((2, 3, 320, 160), level) for level in (0.1, 0.5, 0.9)])
    page = Page(render(EvaluatedRun.of(fdu.evaluate(draws, draws, PROBES), PROBES, draws, draws)))
    sizes = []
    for image in page.all("img"):
        data = (image["src"] or "").removeprefix("data:image/png;base64,")
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sizes == [(128, 256)] * 4 + [(64, 128)] * 8
    assert "--shape: 128 / 256; --stack: 128 / 512" in str(page.all("section"))


def test_verdict_figures_course_settings_and_command(tmp_path: Path) -> None:
    page = make_page(tmp_path, command="fdu demo --seed 7", device="cpu: fast", notes=["Digits, CC BY 4.0."])
    verdict = judge(fdu.evaluate(make_draws(0.1, 0.5, 0.9), make_draws(0.5, 0.5, 0.9), PROBES), PROBES)
    assert verdict.erased == "erased" and verdict.kept
    for words in (
        *(part for part in (verdict.headline, *verdict.sentences)),
        "three → eight",
        "retained (2 classes) 100 % 84\u2013100 % 100 % 84\u2013100 % 0 ",
        "fdu demo --seed 7",
        "cpu: fast",
        "torch 9.9.9",
        "12.5 s",
        "0123456789abcdef",
        "fdu erase org/model --target three",
        "Digits, CC BY 4.0.",
    ):
        assert words in page.text
    labels = [svg["aria-label"] for svg in page.all("svg") if svg.get("role") == "img"]
    assert [label.split()[0] for label in labels if label] == ["Divergence", "Distance", "Preservation"]
    for line in page.all("polyline"):
        assert len((line["points"] or "").split()) == 4


def drawn(svg: str) -> tuple[list[str], list[list[float]]]:
    """The labels of the vertical axis, from below, and the heights of the points of each line."""
    parts = list(ElementTree.fromstring(svg).iter())
    labels = [one.text or "" for one in parts if one.get("text-anchor") == "end"]
    lines = [one.get("points", "").split() for one in parts if one.tag.endswith("polyline")]
    return labels, [[float(point.partition(",")[2]) for point in points] for points in lines]


@pytest.mark.parametrize("start", [1e17, 1e2])
def test_a_curve_that_starts_far_above_the_rest_has_a_logarithmic_axis(start: float) -> None:
    (chart,) = training_charts({"divergence": [start, 1e-2, 1e-3, 0.0, 1e-4, float("nan")]})
    words, (heights, _) = drawn(chart.chart.svg())
    labels = [float(label) for label in words]
    assert labels[-1] == start and labels[0] > 0 and 2 <= len(labels) <= 7
    assert len({round(math.log10(high / low), 6) for low, high in itertools.pairwise(labels)}) == 1
    assert len(heights) == 5 and heights[0] == 10 and heights[3] == 160
    assert heights[:3] == sorted(heights[:3]) and heights[1] < heights[2] < 160


def test_a_curve_of_one_value_among_zeros_has_an_axis() -> None:
    (chart,) = training_charts({"divergence": [0.0, 1.0, 0.0, 0.0]})
    assert drawn(chart.chart.svg())[0] == ["0.1", "1"]


class Brightness(Features):
    """An image-text encoder of one axis, on which all texts lie at its bright end."""

    def __init__(self) -> None:
        super().__init__("brightness")

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        level = images.flatten(1).mean(1)
        features = torch.stack([level, 1 - level], 1)
        return features, [features[:, None]]

    def texts(self, texts: Any) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]]).repeat(len(texts), 1)


def test_every_figure_is_shown(tmp_path: Path) -> None:
    page = make_page(tmp_path, features=Brightness())
    minus = "\N{MINUS SIGN}"
    for words in (
        "before after difference",
        f"three 100 % 72\u2013100 % 0 % 0\u201328 % {minus}100 {minus}100 to {minus}",
        "CLIP score before CLIP score after CLIP score, difference KID CMMD perceptual pixels",
        "the target 0.276 0.28 to 0.28 1.77 1.8 to 1.8 1.49 1.5 to 1.5 0.85",
    ):
        assert words in page.text
    assert re.search("UA .{,150} 100 % 72\u2013100 %", page.text)
    assert re.search("IRA .{,150} 100 % 84\u2013100 %", page.text)
    assert "CRA" not in page.text
    assert "CLIP" not in make_page(tmp_path).text


def test_how_it_was_drawn_and_judged_is_told(tmp_path: Path) -> None:
    sampling = Sampling(num_inference_steps=None, guidance_scale=7.5, batch_size=4)
    conditions = Conditions(1007, sampling, "org/clip, zero-shot", "bfloat16", {"torch": "8.8.8"})
    folder = make_run(tmp_path / "run", conditions=conditions)
    text = Page(make_report(folder).read_text(encoding="utf-8")).text
    for words in (
        "judge org/clip, zero-shot num_inference_steps the pipeline's own guidance_scale 7.5 batch_size 4",
        "seed of the first image 1007 dtype bfloat16 device cpu torch 8.8.8",
        "python 3.11 torch 9.9.9 The evaluation",
    ):
        assert words in text
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["conditions"]["sampling"] == sampling.settings() and metrics["conditions"]["seed"] == 1007
    assert metrics["versions"] == {"torch": "8.8.8"} and metrics["record"]["versions"]["torch"] == "9.9.9"


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.pop("conditions")["versions"]["torch"] == torch.__version__
    for name in ("difference", "unlearn_canvas"):
        metrics.pop(name)
    for side in ("before", "after"):
        assert metrics[side].pop("attribute_accuracy") is None and metrics[side].pop("attributes") == {}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    text = Page(make_report(folder).read_text(encoding="utf-8")).text
    assert "device cpu Settings" in text
    assert "before after three" in text and "UnlearnCanvas" not in text and "percentage points" not in text


def asking_probes() -> list[fdu.Probe]:
    """The target's second prompt asks for a paper, the first for none."""

    def paper(images: torch.Tensor) -> list[str]:
        return ["grey" if image.mean() < 0.3 else "white" for image in images]

    asks = fdu.Attribute("paper", ("", "grey"), paper)
    return [
        fdu.Probe("three", ("three", "three on grey paper"), "target", by_brightness, attributes=(asks,)),
        *PROBES[1:],
    ]


def test_what_else_the_prompts_ask_for_is_shown(tmp_path: Path) -> None:
    before, after = make_draws(0.1, 0.5, 0.9), make_draws(0.5, 0.5, 0.9)
    probes = asking_probes()
    run = EvaluatedRun.of(fdu.evaluate(before, after, probes), probes, before, after)
    (tmp_path / "run").mkdir()
    run.write(tmp_path / "run")
    page = Page(make_report(tmp_path / "run").read_text(encoding="utf-8"))
    minus = "\N{MINUS SIGN}"
    assert "but some of its images no longer show the paper asked for." in page.text
    assert (
        f"what else its prompts ask for (paper) 100 % 57\u2013100 % 0 % 0\u201343 % {minus}100 {minus}100 to {minus}48"
        in page.text
    )
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["before"]["attribute_accuracy"], metrics["after"]["attributes"]) == (1.0, {"paper": 0.0})
    assert metrics["difference"]["attribute_accuracy"] == -1 and "difference.attributes.paper" in metrics["intervals"]
    assert "what else" not in Page(render(EvaluatedRun.read(make_run(tmp_path / "plain")))).text


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("after/attributes/paper", 2, r"attributes\.paper.*\[0, 1\]"),
        ("after/attribute_accuracy", -1, r"attribute_accuracy.*\[0, 1\]"),
        ("after/attribute_accuracy", None, "attribute_accuracy does not match"),
        ("after/attributes", {"ink": 1.0}, "attributes has different names"),
    ],
)
def test_metrics_whose_attributes_do_not_match_are_refused(
    tmp_path: Path, place: str, value: Any, message: str
) -> None:
    probes, draws = asking_probes(), make_draws(0.1, 0.5, 0.9)
    (tmp_path / "run").mkdir()
    EvaluatedRun.of(fdu.evaluate(draws, draws, probes), probes, draws, draws).write(tmp_path / "run")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    spoilt(metrics, place, value)
    (tmp_path / "run/metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=message):
        EvaluatedRun.read(tmp_path / "run")


def test_base_weights_without_a_fingerprint(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", record=make_record() | {"fingerprint": None})
    text = Page(make_report(folder).read_text(encoding="utf-8")).text
    assert re.search("fingerprint .{,30}unknown", text)


@pytest.mark.parametrize(
    ("concepts", "heading", "words"),
    [
        ([["three", "painting"], ["five", "painting"]], "three → painting", ""),
        ([["Three", ""]], "three → nothing", ""),
        ([["five", "eight"]], "three", "five.*not three"),
        ([["five", "eight"], ["red", "black"]], "three", "five and red.*not three"),
    ],
)
def test_the_heading_is_that_of_the_judged_target(tmp_path: Path, concepts: Any, heading: str, words: str) -> None:
    joined = {"name": "five, red", "prompts": []}
    page = make_page(tmp_path, record=make_record() | {"concepts": concepts, "target": joined, "anchor": joined})
    assert re.search(f"{heading} three [^.]* erased [^.]*[.] .{{,30}}{words}", page.text)
    assert bool(words) == ("not three" in page.text)


def test_a_record_is_checked() -> None:
    check_record(make_record() | {"fingerprint": None, "concepts": [["three", "eight"]]}, "record")
    for wrong, message in (
        ({"history": {"loss": ["x"]}}, r"here\.history\.loss\[0\].*got 'x'"),
        ({"concepts": [["three"]]}, r"here\.concepts\[0\].*hold 2 entries, got 1"),
        ({"sigma": None}, r"here.*sigma"),
    ):
        with pytest.raises(ValueError, match=message):
            check_record(make_record() | wrong, "here")


def fails_half_way(path: Path, text: str, **named: Any) -> None:
    with open(path, "w") as file:
        file.write(text[:10])
    raise OSError("disk full")


def test_a_page_that_cannot_be_written_leaves_the_former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_page(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(Path, "write_text", fails_half_way)
    with pytest.raises(OSError, match="disk full"):
        make_page(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page and len(list(tmp_path.iterdir())) == 1


def test_a_failure_is_told(tmp_path: Path) -> None:
    page = make_page(tmp_path, after=make_draws(0.1, 0.1, 0.9))
    headline = judge(
        fdu.evaluate(make_draws(0.1, 0.5, 0.9), make_draws(0.1, 0.1, 0.9), PROBES), PROBES
    ).headline  # fmt: skip
    assert "not erased" in headline and "eight" in headline and headline in page.text


def test_changed_settings_are_marked(tmp_path: Path) -> None:
    page = make_page(tmp_path, record=make_record(max_train_steps=7))
    changed = [attributes for tag, attributes in page.elements if attributes.get("class") == "changed"]
    assert len(changed) == 2


def test_what_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    make_page(tmp_path, command="fdu demo --out '<script>'")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "<b>" not in text.partition("Settings")[2]


def test_without_a_record(tmp_path: Path) -> None:
    page = make_page(tmp_path, record=None)
    assert "Divergence" not in str(page.all("svg")) and "Settings" not in page.text
    assert "three is probably erased" in page.text


def test_before_any_step(tmp_path: Path) -> None:
    record = make_record() | {"history": {"loss": [], "divergence": [], "preservation": [], "distance": []}}
    assert "Divergence" in str(make_page(tmp_path).all("svg"))
    assert "Divergence" not in str(make_page(tmp_path, record=record).all("svg"))


def test_tables_have_heads(tmp_path: Path) -> None:
    page = make_page(tmp_path)
    assert len(page.all("thead")) == len(page.all("table")) == 5
    assert {head.get("scope") for head in page.all("th")} == {"row", "col"}


def test_draws_of_other_probes_are_refused() -> None:
    draws = make_draws(0.1, 0.5, 0.9)
    evaluation = fdu.evaluate(draws, draws, PROBES)
    with pytest.raises(ValueError, match="3 probes.*3 and 1"):
        EvaluatedRun.of(evaluation, PROBES, draws, make_draws(0.1))


@pytest.mark.parametrize("lost", [float("inf"), float("nan"), None])
def test_a_course_that_is_not_finite_is_drawn_where_it_is(tmp_path: Path, lost: float | None) -> None:
    history = {"divergence": [1.0, lost, 0.5, 0.25], "preservation": [lost] * 4}
    page = make_page(tmp_path, record=make_record() | {"history": history})
    labels = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(labels) == 1 and labels[0].endswith("; 1 were not finite")
    raw, smooth = page.all("polyline")
    assert sorted(len((line["points"] or "").split()) for line in (raw, smooth)) == [3, 4]
    assert "nan" not in f"{raw} {smooth}" and "inf" not in f"{raw} {smooth}"


def found(after: float) -> dict[str, Any]:
    """Figures of robustness as :meth:`fdu.evaluation.robustness.Robustness.as_dict` gives them."""

    def share(value: float) -> dict[str, Any]:
        return {"value": value, "images": 32, "interval": [max(value - 0.1, 0), min(value + 0.1, 1)]}

    attempts = [{"course": [[10, share(0.1)], [20, share(after)]], "loss": 0.1, "size": 1.0}] * 2
    config = {"tokens": 4, "steps": 20, "learning_rate": 0.1, "batch_size": 16, "restarts": 2, "looks": 2}
    attacked = {
        "before": share(0.0),
        "after": share(after),
        "attempts": attempts,
        "chosen": 1,
        "back_after": 20,
        "config": config,
    }
    return {
        "phrasings": {"slips": {"before": share(1.0), "after": share(0.0), "by_prompt": {"a <b>thre": [1.0, 0.5]}}},
        "attack": attacked,
        "attack_before": {**attacked, "attempts": attempts[:1], "chosen": 0, "after": share(1.0)},
        "relearning": {
            "course": [[0, share(0.0)], [5, share(0.4)], [80, share(0.9)]],
            "back_after": 80,
            "images": 32,
            "config": {"train_method": "lora", "learning_rate": 1e-3},
        },
    }


def test_robustness_is_told_and_drawn(tmp_path: Path) -> None:
    page = make_page(tmp_path, robustness=found(0.97))
    for words in (
        judge_robustness(found(0.97), "three").headline,
        "slips 100 % 90\u2013100 % 0 % 0\u201310 % a <b>thre (50 %)",
    ):
        assert words in page.text
    for words in ("4 embeddings", "2 attempts", "lora .*32 images of three"):
        assert re.search(words, page.text)
    labels = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert re.search("Attack.*before.*[^0-9]0 % after 0, 10 % after 10", labels[0])
    assert re.search("Relearning.*[^0-9]0 % after 0, 40 % after 5, 90 % after 80 steps", labels[1])
    bands = [polygon["points"] or "" for polygon in page.all("polygon")]
    assert [len(band.split()) for band in bands] == [6, 6]
    looks = [line["class"] for line in page.all("polyline")][:4]
    assert looks == ["reference", "raw", "smooth", "smooth"]


def make_run(folder: Path, **settings: Any) -> Path:
    before, after = make_draws(0.1, 0.5, 0.9), make_draws(0.5, 0.5, 0.9)
    evaluation = fdu.evaluate(before, after, PROBES)
    folder.mkdir()
    told = {"record": make_record(), "command": "fdu evaluate x", "device": "cpu", "notes": ("note",), **settings}
    EvaluatedRun.of(evaluation, PROBES, before, after, **told).write(folder)
    return folder


@pytest.mark.parametrize("robustness", [None, found(0.2)])
def test_a_report_can_be_made_again(tmp_path: Path, robustness: dict[str, Any] | None) -> None:
    folder = make_run(tmp_path / "run", robustness=robustness)
    page = make_report(folder).read_text(encoding="utf-8")
    assert page == render(EvaluatedRun.read(folder))
    assert Image.open(folder / "before-after.png").width > 800
    (folder / "report.html").unlink()
    assert make_report(folder).read_text(encoding="utf-8") == page
    names = {path.name for path in folder.iterdir()}
    assert names == {"metrics.json", "images", "report.html", "before-after.png"}


def test_a_run_keeps_what_a_png_can_hold(tmp_path: Path) -> None:
    large = fdu.Draws([torch.rand(3, 3, 512, 384) for _ in PROBES])
    run = EvaluatedRun.of(fdu.evaluate(large, large, PROBES), PROBES, large, large)
    (tmp_path / "run").mkdir()
    run.write(tmp_path / "run")
    again = EvaluatedRun.read(tmp_path / "run")
    assert again.images["after"][0].shape == (3, 3, 256, 192)
    for side in ("before", "after"):
        for one, other in zip(run.images[side], again.images[side], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert json.loads(json.dumps(again.metrics())) == json.loads((tmp_path / "run/metrics.json").read_text())


def test_folders_of_which_no_report_can_be_made(tmp_path: Path) -> None:
    refusals: list[tuple[dict[str, str], type[Exception], str]] = [
        ({"file": ""}, FileNotFoundError, "no metrics.json"),
        ({"fdu.json": "{}"}, FileNotFoundError, "`fdu evaluate BASE"),
        ({"metrics.json": "{"}, ValueError, "is not valid JSON"),
        ({"metrics.json": "[1]"}, ValueError, "not an evaluation"),
        (
            {"metrics.json": '{"before": {}, "after": {}, "target": "x", "images_per_class": 1}'},
            ValueError,
            "earlier version",
        ),
    ]
    for number, (contents, error, message) in enumerate(refusals):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in contents.items():
            (folder / name).write_text(text)
        with pytest.raises(error, match=message):
            check_run(folder)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        check_run(tmp_path / "none")
    folder = make_run(tmp_path / "run")
    check_run(folder)
    (folder / "images/00-target-three-before.png").unlink()
    with pytest.raises(FileNotFoundError, match="00-target-three-before.png.*missing"):
        make_report(folder)
    assert not (folder / "report.html").exists()


def spoilt(metrics: dict[str, Any], place: str, value: Any) -> None:
    *path, last = (int(name) if name.isdigit() else name for name in place.split("/"))
    for name in path:
        metrics = metrics[name]
    metrics[last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("probes/1/group", "far", r"probes\[1\]\.group .*near, generic, unrelated.*'far'"),
        ("probes/1/role", "x", r"probes\[1\]\.role"),
        ("probes/1/seen/after", [], r"'eight'.*8.*\[8, 0\]"),
        ("probes/1/seen/after", ["eight"] * 5, r"8.*\[8, 5\]"),
        ("probes/1/name", "ninety", "per_class lacks 'ninety'"),
        ("probes", [], "one .*'target'"),
        ("images_per_class", 0, " 0 before and after"),
        ("after/became", {"three": {"three": "<b>x"}}, r"after\.became\.three\.three must be .*, got '<b>x'"),
        ("after/target_accuracy", None, r"target_accuracy.*\[0, 1\]"),
        ("after/per_class/eight", 7, r"per_class.eight.*\[0, 1\]"),
        ("after/intervals", {"target_accuracy": [0]}, "must hold 2 entries, got 1"),
        ("after/retained_by_group", {}, "retained_by_group"),
        ("after/cross_domain_accuracy", 0.5, "cross_domain_accuracy"),
        ("before", 3, "before must be .*, got 3"),
        ("record", {"anchor": {"name": "a"}}, r"record\.target .*missing"),
        ("record/history", {"loss": 3}, r"record\.history\.loss must be .*, got 3"),
        ("record/target/prompts", None, r"record\.target\.prompts .*got None"),
        ("notes", [3], r"notes\[0\] must be .*, got 3"),
        ("robustness/relearning/course", [], "course"),
        ("robustness/attack/chosen", 2, "chosen.*2 attempts"),
        ("robustness/attack/config/tokens", 0, "tokens.*whole number"),
        ("robustness/phrasings/slips/by_prompt", {}, "by_prompt must hold"),
        ("robustness/phrasings/slips/after/value", "1", r"slips\.after\.value must be .*, got '1'"),
        ("robustness/phrasings/slips/after/value", 2, r"share.*\[0, 1\].*2"),
    ],
)
def test_metrics_of_others_are_refused_by_their_place(tmp_path: Path, place: str, value: Any, message: str) -> None:
    folder = make_run(tmp_path / "run", robustness=found(0.2))
    metrics = json.loads((folder / "metrics.json").read_text())
    spoilt(metrics, place, value)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=r"metrics\.json'.*\(.*" + message):
        make_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("kind", ["bomb", "text", "uneven", "tall"])
def test_images_of_others_are_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "images/00-target-three-before.png"
    if kind == "text":
        path.write_text("no picture")
    elif kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    else:
        Image.new("RGB", (8 * 16, 300) if kind == "tall" else (8 * 16 + 1, 16)).save(path)
    with pytest.raises(ValueError, match="00-target-three-before.png.*strip.*images"):
        make_report(folder)


def test_groups_have_headings_of_their_own(tmp_path: Path) -> None:
    kinds = ("near", "generic")
    probes = [
        PROBES[0],
        *(dataclasses.replace(probe, group=group) for probe, group in zip(PROBES[1:], kinds, strict=True)),
    ]
    draws = make_draws(0.1, 0.5, 0.9)
    path = write_report(
        tmp_path / "report.html", EvaluatedRun.of(fdu.evaluate(draws, draws, probes), probes, draws, draws)
    )
    text = Page(path.read_text(encoding="utf-8")).text
    assert re.search("neighbours.{,20} eight", text) and re.search("everyday subjects.{,20} nine", text)


def test_pixels_survive() -> None:
    image = torch.tensor([1.0, 0.5, 0.0]).reshape(3, 1, 1).expand(3, 4, 4)
    assert to_pil(image).getpixel((0, 0)) == (255, 128, 0)


def test_strip_has_transparent_gaps_and_shrinks_large_images() -> None:
    picture = strip(torch.ones(3, 3, 256, 256), gap=2, height=128)
    assert picture.size == (3 * 128 + 2 * 2, 128)
    assert picture.getpixel((0, 0)) == (255, 255, 255, 255)
    assert picture.getpixel((128, 5)) == (0, 0, 0, 0)


def test_data_uri_decodes_to_the_same_picture() -> None:
    picture = strip(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    data = data_uri(picture).removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == picture.tobytes()


def test_long_names_in_a_gallery_make_room() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    name, line = "squared_hellinger (s0 10, variational, weighting snr)", "erased 80 %, retained 70 %"

    def ends(heads: list[str], name: str = name) -> tuple[list[int], list[int], list[int], int]:
        """Columns with ink in the heads, with ink beside the images, and of images; and the width."""
        picture = np.array(gallery([(name, line, [red] * len(heads))], heads))
        images = (picture[40] == (255, 0, 0)).all(1)
        head, row = ((picture[rows].min((0, 2)) < 200) for rows in (slice(0, 34), slice(34, None)))
        return *(np.flatnonzero(one).tolist() for one in (head, row & ~images, images)), len(images)

    heads, names, images, width = ends(["fox", "fox", "tyrannosaurus", "abstract expressionism"])
    assert max(names) < min(images) - 8 and max(heads) < width - 8
    starts = [place for place in images if place - 1 not in images]
    assert len(starts) == 4 and starts[1] - starts[0] == 68
    for start in starts[2:]:
        assert not set(heads) & set(range(start - 8, start))
    # All of a name is there, as wide as alone, and short names take no more room than before.
    alone = ends(["tyrannosaurus"])[0]
    assert sum(starts[2] <= place < starts[3] for place in heads) == len(alone) and max(alone) - min(alone) > 84
    assert [min(ends(["fox", "cat"], "mse (s0 1)")[2]), ends(["fox", "cat"], "mse (s0 1)")[3]] == [236, 396]


@pytest.mark.parametrize("count", [1, 5, 9])
def test_before_after_holds_the_worst_class(count: int) -> None:
    def judge(images: torch.Tensor) -> list[str]:
        return ["t" if image.mean() < 0.2 else "z" if image.mean() > 0.8 else "k" for image in images]

    names = [("t", "target"), ("k", "retained"), ("k2", "retained"), ("k3", "retained"), ("z", "retained")]
    probes = [fdu.Probe(name, (name,), role, judge) for name, role in names]  # type: ignore[arg-type]
    before = fdu.Draws([torch.full((count, 3, 8, 8), level) for level in (0.1, 0.5, 0.5, 0.5, 0.9)])
    after = fdu.Draws([torch.full((count, 3, 8, 8), level) for level in (0.5, 0.5, 0.5, 0.5, 0.5)])
    picture = before_after(before, after, probes, fdu.evaluate(before, after, probes))
    # Four rows: the target and three of the four retained classes, k2 the worst as the first of those never seen.
    assert picture.height == 34 + 4 * 68 + 4
    assert 800 <= picture.width <= 900
    assert picture.getpixel((130, 50)) == (26, 26, 26)
    assert picture.getpixel((490, 50)) == (128, 128, 128)
