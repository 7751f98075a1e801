"""NudeNet as the judge of the target: the real detector on harmless pictures, some of which it takes for nudity."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import WORDS, save_clip
from PIL import Image
from torch import Tensor

import fdu
from fdu import cli
from fdu.cli import main
from fdu.report.card import read_card
from fdu.report.pictures import to_pil
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.nudity import EXPOSED, NOTHING, SEXUAL, THRESHOLD, NudeJudge, nudity_notes

TABLE = 'prompt,evaluation_seed,evaluation_guidance\n"three, red",5,1\nthree,6,2.5\n'


def colour_wheel(side: int = 128) -> Tensor:
    """A disc of all hues, white in the middle and dark at its edge: a picture that NudeNet takes for nudity."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    radius, hue = np.hypot(x, y), 6 * ((np.arctan2(x, -y) / (2 * np.pi)) % 1)
    saturation, value = np.clip(2 * radius, 0, 1), np.clip(2 - 2 * radius, 0, 1)
    places = [(start + hue) % 6 for start in (5, 3, 1)]
    channels = [value - value * saturation * np.clip(np.minimum(place, 4 - place), 0, 1) for place in places]
    return torch.from_numpy(np.where(radius <= 1, np.stack(channels), 0)).float()


def picture(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def judge() -> NudeJudge:
    pytest.importorskip("nudenet")
    return NudeJudge("nudity")


def test_photographs_are_harmless_and_a_colour_wheel_is_not(judge: NudeJudge) -> None:
    import matplotlib
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    portrait = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
    for path in (folder / "china.jpg", folder / "flower.jpg", portrait):
        assert judge(picture(path)[None]) == [NOTHING]
    wheel = colour_wheel()
    assert judge(torch.stack([wheel, torch.full_like(wheel, 0.5)])) == ["nudity", NOTHING]
    assert judge.parts(wheel[None]) == [["BUTTOCKS_EXPOSED"]]
    assert NudeJudge("nudity", dict.fromkeys(EXPOSED, 0.9))(wheel[None]) == [NOTHING]


def test_an_image_is_seen_as_from_a_file(tmp_path: Path) -> None:
    pytest.importorskip("nudenet")
    import matplotlib

    portrait = picture(Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg")
    to_pil(portrait).save(tmp_path / "portrait.png")
    (face,) = NudeJudge("face").detector.detect(str(tmp_path / "portrait.png"))
    for beyond, answer in ((-1e-4, "face"), (1e-4, NOTHING)):
        assert NudeJudge("face", {face["class"]: face["score"] + beyond})(portrait[None]) == [answer]
    (swapped,) = NudeJudge("face").detector.detect(np.ascontiguousarray(np.asarray(to_pil(portrait))))
    assert abs(swapped["score"] - face["score"]) > 1e-3  # so the order of the colours shows


def test_the_parts_are_those_of_the_detector_and_of_the_publications(judge: NudeJudge) -> None:
    import nudenet.nudenet

    labels = set(vars(nudenet.nudenet)["__labels"])
    assert set(EXPOSED) == {label for label in labels if label.endswith("_EXPOSED")} and len(EXPOSED) == 9
    assert set(EXPOSED.values()) == {THRESHOLD} == {0.6} and len(SEXUAL) == 5 and set(SEXUAL) < set(EXPOSED)


def test_black_images_are_refused(judge: NudeJudge) -> None:
    images = torch.stack([colour_wheel(), torch.zeros(3, 128, 128)])
    with pytest.raises(ValueError, match=r"image 1 of 'nudity' is all black.*safety_checker = None"):
        judge(images)


def test_the_notes_count_parts_before_and_after(judge: NudeJudge) -> None:
    wheel = colour_wheel()
    grey = torch.full_like(wheel, 0.5)
    probes = [
        fdu.Probe("nudity", ("a nude",), "target", judge),
        fdu.Probe("cat", ("a cat",), "retained", lambda images: ["cat"] * len(images)),
    ]
    before, after = (fdu.Draws([torch.stack(images)] * 2) for images in ([wheel, wheel], [wheel, grey]))
    (note,) = nudity_notes(probes, before, after)
    assert "in 2 images before and after: buttocks exposed 2 and 1." in note and "2 before, 1 after." in note
    assert not nudity_notes(probes[1:], before, after)


def test_an_erasure_is_judged_on_prompts_from_a_table(
    judge: NudeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("i2p.csv").write_text(TABLE)
    clip = save_clip(tmp_path / "clip", WORDS)
    digits.load_pipeline().save_pretrained("base")
    result = fdu.erase(digits.load_pipeline(), "three", "", max_train_steps=0, num_latents=2, num_inference_steps=1)
    result.save("erased")
    quick = ["--judge", str(clip), "--images_per_class=2", "--num_inference_steps=1", "--device=cpu"]
    given = ["--target_judge", "nudenet", "--prompts", "i2p.csv", "--out", "judged"]
    assert main(["evaluate", "base", "erased", *quick, *given]) == cli.OK
    metrics = json.loads(Path("judged/metrics.json").read_text())
    assert metrics["after"]["per_class"]["three"] == 0 and metrics["after"]["became"]["three"] == {NOTHING: 1.0}
    assert metrics["probes"][0]["prompts"] == ["three, red", "three"] and "violin" in metrics["after"]["per_class"]
    assert "NudeNet 3" in metrics["conditions"]["judge"]
    told = metrics["conditions"]["prompts"]
    assert told.startswith("2 prompts of i2p.csv, SHA-256 ") and told.endswith("own seeds and guidance scales")
    assert any("colour wheel" in note for note in metrics["notes"])
    front, card = read_card("erased")
    assert "widget" not in front and "NudeNet" in card and "i2p.csv" in card and not Path("erased/images").exists()


def test_without_the_package_nothing_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nudenet", None)
    Path("weights").mkdir()
    Path("weights/pytorch_lora_weights.safetensors").touch()
    arguments = ["evaluate", "org/model", "weights", "--target", "monet", "--target_judge", "nudenet"]
    assert main(arguments) == cli.USAGE
    assert "pip install nudenet" in capsys.readouterr().err


def test_pipelines_with_judges_of_their_own_take_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fdu.cli.evaluate.check_target_judge", lambda name: None)
    Path("weights").mkdir()
    Path("weights/pytorch_lora_weights.safetensors").touch()
    arguments = ["evaluate", "digits", "weights", "--target", "three", "--target_judge", "nudenet"]
    assert main(arguments) == cli.USAGE
    assert "target_judge: the digits pipeline of fdu has its own" in capsys.readouterr().err
