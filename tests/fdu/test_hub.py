"""Pushes to the Hugging Face hub, by its real client to a stand-in server: what arrives, is refused, or fails."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from hub_server import READS, WRITES, HubServer
from huggingface_hub import ModelCard
from test_hostile_pages import EVIL
from test_report import PROBES, found, make_draws

import fdu
from fdu import cli
from fdu.cli import main
from fdu.cli.program import _without_push
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.report.card import fill_in, read_card
from fdu.report.hub import Upload
from fdu.report.run import EvaluatedRun
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.embedded import Digits

ERASE = ["erase", "digits", "--target=three", "--anchor=eight", "--max_train_steps=2", "--num_inference_steps=2"]
ERASE += ["--rank=4", "--train_batch_size=2", "--num_latents=4", "--learning_rate=0.01", "--device=cpu"]
QUICK = ["--images_per_class=2", "--num_inference_steps=1", "--device=cpu"]
PUSH = ["--push_to_hub", "--hub_model_id=no-three", "--hub_token", WRITES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erasure that `fdu erase` saved, to copy."""
    out = tmp_path_factory.mktemp("saved") / "erased"
    assert main([*ERASE, f"--out={out}"]) == cli.OK
    return out


@pytest.fixture
def erased(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "erased"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, which has no stand-in
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # before it tries again
        monkeypatch.chdir(tmp_path)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def draw(pipeline: Any) -> torch.Tensor:
    probe = fdu.Probe("three", ("three in red ink",), "target", lambda images: ["three"] * len(images))
    return fdu.draw(pipeline, [probe], images_per_class=1, num_inference_steps=2).images[0]


def test_what_arrives_is_the_evaluated_erasure(
    hub: HubServer, erased: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((erased / "fdu.json").read_text())
    assert str(erased.parent) not in record["command"] and "--out=/" in record["command"]
    assert main(["evaluate", "digits", str(erased), *QUICK, *PUSH, "--hub_private_repo"]) == cli.OK
    assert f"Pushed to {hub.url}/me/no-three" in capsys.readouterr().out
    there = hub.folder("me/no-three")
    arrived = contents(there)
    assert arrived == contents(erased) and len(hub.commits) == 1
    assert hub.visibility == {"me/no-three": "private"}
    front, card = read_card(there)
    assert "| three |" in card and "The judge: digits classifier." in card and "Not measured" not in card
    assert [one["text"] for one in front["widget"]][:1] == record["target"]["prompts"][:1] and len(front["widget"]) == 4
    assert all((there / one["output"]["url"]).is_file() for one in front["widget"])
    assert "(images/card-overview.png)" in card and (there / "images/card-overview.png").is_file()
    assert "--out=erased" in json.loads(arrived["fdu.json"])["command"]
    assert not [name for name, content in arrived.items() if WRITES.encode() in content]

    plain = StableDiffusionPipeline.from_pretrained(Digits.data, dtype=torch.float32)
    before = draw(plain)
    plain.load_lora_weights(there)
    after = draw(plain)
    wanted = digits.load_pipeline()
    fdu.load_weights(wanted, erased)
    torch.testing.assert_close(after, draw(wanted))
    assert not torch.allclose(before, after, atol=1e-3)

    # Pushed again after another evaluation: large files that are there do not travel again, and images can go.
    sent = sum(request.startswith("PUT") for request in hub.log)
    again = ["evaluate", "digits", str(erased), "--images_per_class=1", *QUICK[1:], *PUSH, "--card_without_images"]
    assert main(again) == cli.OK
    assert sum(request.startswith("PUT") for request in hub.log) == sent
    front, card = read_card(there)
    assert "1 images per class" in card and "widget" not in front and "](images/" not in card
    assert contents(there) == contents(erased) and not list(there.glob("images/*"))


def test_a_card_that_cannot_be_written_stays_and_is_not_pushed(
    hub: HubServer, erased: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: object, **named: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("fdu.report.card.fill_in", full)
    before = contents(erased)
    quick = ["evaluate", "digits", "erased", "--images_per_class=1", *QUICK[1:]]
    assert main(quick) == cli.OK
    assert "stays as it is: No space left" in capsys.readouterr().err
    assert main([*quick, *PUSH]) == cli.FAILED
    assert "No space left" in capsys.readouterr().err and contents(erased) == before and not hub.visibility


@pytest.mark.parametrize(
    ("command", "given", "told"),
    [
        ("erase", ["--push_to_hub"], r"fdu evaluate digits out --push_to_hub"),
        ("erase", ["--push_unevaluated"], "no effect without --push_to_hub"),
        ("erase", ["--hub_model_id=me/x"], "hub_model_id has no effect without --push_to_hub"),
        ("both", ["--push_to_hub"], "hub_token is missing.*hf auth login"),
        ("both", ["--push_to_hub", f"--hub_token={READS}"], "can only read"),
        ("both", ["--push_to_hub", "--hub_token=wrong"], "the token was refused"),
        ("both", [*PUSH, "--hub_model_id=some one/x"], "hub_model_id 'some one/x'"),
        ("both", [*PUSH, "--hub_model_id=other/x"], "'other/x'.*'me'.*me, team"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_any_work(
    command: str,
    given: list[str],
    told: str,
    hub: HubServer,
    erased: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Digits, "load", lambda *arguments: pytest.fail("the pipeline was loaded"))
    commands = {"erase": [*ERASE, "--out=out"], "evaluate": ["evaluate", "digits", "erased"]}
    before = contents(erased)
    for name in ["erase", "evaluate"] if command == "both" else [command]:
        unevaluated = ["--push_unevaluated"] if command == "both" and name == "erase" else []
        capsys.readouterr()
        assert main([*commands[name], *given, *unevaluated]) == cli.USAGE

        assert re.search(told, capsys.readouterr().err)
    assert contents(erased) == before and not Path("out").exists() and not hub.visibility


@pytest.mark.parametrize(
    "push", [["--push_to_hub", "--hub_token", "secret"], ["--push-to-hub", "--hub-token=secret", "--hub_model_id=me/x"]]
)
def test_a_recorded_command_neither_pushes_nor_holds_the_token(push: list[str]) -> None:
    before, after = ["erase", "digits", "--target", "three"], ["--hub_private_repo", "--push_unevaluated", "--rank=4"]
    assert _without_push([*before, *push, *after]) == [*before, "--rank=4"]


def test_a_folder_without_a_card_cannot_be_pushed(hub: HubServer, erased: Path) -> None:
    (erased / "README.md").unlink()
    assert main(["evaluate", "digits", "erased", *PUSH]) == cli.USAGE
    with pytest.raises(FileNotFoundError, match="README.md"):
        Upload("me/x", WRITES).push(erased)
    (erased / "README.md").write_text("no metadata")
    with pytest.raises(ValueError, match="README.md.*correct it"):
        Upload("me/x", WRITES).push(erased)
    assert not hub.log


@pytest.mark.parametrize(
    ("fault", "where", "told"),
    [
        ("dies_at", "/blobs/", "no-three was not pushed"),
        ("dies_at", "/commit/", "no-three was not pushed"),
        ("forbids", "/repos/create", "may not write there"),
        ("forbids", "/commit/", "may not write there"),
    ],
)
def test_a_push_that_fails_loses_nothing_and_says_how_to_push_again(
    fault: str, where: str, told: str, hub: HubServer, erased: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (erased / ".unfinished").mkdir()
    (erased / ".unfinished/half").write_text("half")
    setattr(hub, fault, where)
    upload = Upload.checked("no-three", WRITES, private=True)
    before = contents(erased)
    with pytest.raises(OSError, match=told) as failed:
        upload.push(erased, unevaluated=True)
    kept = contents(erased)
    assert {**kept, "fdu.json": b""} == {**before, "fdu.json": b""} and not hub.commits
    assert WRITES not in str(failed.value)
    setattr(hub, fault, "")
    hub.dead = False
    command = shlex.split(str(failed.value).rpartition("push again with: ")[2])
    assert command[:2] == ["hf", "upload"] and command[-1] == "--private"
    if where == "/blobs/":
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITES, "HF_HUB_DISABLE_XET": "1"}
        program = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
        done = subprocess.run([*program, *command[1:]], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        upload.push(erased, unevaluated=True)
    assert {**contents(hub.folder("me/no-three")), ".unfinished/half": b"half"} == contents(erased)


def test_what_cannot_be_made_fit_for_others_is_not_pushed(
    hub: HubServer, erased: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("fdu.report.hub.write_json", full)
    with pytest.raises(OSError, match="not pushed: No space left.*writable and push again") as failed:
        Upload("me/x", WRITES).push(erased, unevaluated=True)
    assert "hf upload" not in str(failed.value) and not hub.log


def test_after_a_failed_test_the_command_that_is_named_pushes_no_private_path(
    hub: HubServer, erased: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("fdu.evaluation.robustness.examination.attack", fail)
    assert main(["evaluate", "digits", "erased", *QUICK, "--robustness", "attack", *PUSH]) == cli.FAILED
    told = capsys.readouterr().err
    assert "not pushed; push with: hf upload me/no-three erased . --exclude" in told and not hub.commits
    assert "--out=erased" in json.loads((erased / "fdu.json").read_text())["command"]


def test_after_a_training_a_failed_push_leaves_the_erasure(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.dies_at = "/commit/"
    monkeypatch.setenv("HF_TOKEN", WRITES)
    arguments = [*ERASE, "--max_train_steps=0", "--out=out", "--push_to_hub", "--push_unevaluated"]
    assert main(arguments) == cli.FAILED
    output = capsys.readouterr()
    assert "Saved to out" in output.out and "hf upload me/out out ." in output.err
    record = json.loads(Path("out/fdu.json").read_text())
    assert "push" not in record["command"] and Path("out/pytorch_lora_weights.safetensors").is_file()
    hub.dies_at, hub.dead = "", False
    assert Upload.checked("out").push("out", unevaluated=True) == f"{hub.url}/me/out"
    with pytest.raises(ValueError, match="no figures.*fdu evaluate"):
        Upload.checked("out").push("out")


def test_a_result_is_pushed_with_the_licence_of_its_base(hub: HubServer, quick: dict[str, Any]) -> None:
    hub.cards["org/base"] = {"license": "other", "license_name": "odd: 1.0", "license_link": "LICENSE.md"}
    pipeline = families.build("sd")
    pipeline.register_to_config(_name_or_path="org/base")
    result = fdu.erase(pipeline, "three", "eight", **quick, seed=0)
    draws = make_draws(0.1, 0.5, 0.9)
    evaluation = fdu.evaluate(draws, draws, PROBES)
    with pytest.raises(ValueError, match="evaluation is missing"):
        result.push_to_hub("team/x", token=WRITES)
    with pytest.raises(ValueError, match="before and after go together"):
        result.push_to_hub("team/x", evaluation, PROBES, before=draws, token=WRITES)
    assert not hub.log
    hub.forbids = "/commit/"
    with pytest.raises(OSError, match="call push_to_hub again"):
        result.push_to_hub("team/x", evaluation, PROBES, draws, draws, token=WRITES)
    hub.forbids = ""
    url = result.push_to_hub("team/x", evaluation, PROBES, draws, draws, save_as="pipeline", token=WRITES)
    assert url == f"{hub.url}/team/x" and hub.visibility == {"team/x": None}
    front, card = read_card(hub.folder("team/x"))
    assert front["base_model"] == "org/base" and front["base_model_relation"] == "finetune"
    assert front["license"] == "other" and front["license_name"] == "odd: 1.0"
    assert front["license_link"] == "https://huggingface.co/org/base/blob/main/LICENSE.md"
    assert front["widget"] and "| three |" in card
    loaded = DiffusionPipeline.from_pretrained(hub.folder("team/x"))
    inputs = torch.randn(1, 4, 8, 8), 10, torch.randn(1, 16, loaded.unet.config.cross_attention_dim)
    with torch.no_grad():
        torch.testing.assert_close(loaded.unet(*inputs).sample, result.pipeline.unet(*inputs).sample)


def test_a_base_in_a_folder_gives_its_licence(quick: dict[str, Any], tmp_path: Path) -> None:
    families.build("sd").save_pretrained(tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: openrail\ntags: [x]\n---\n# Base\n")
    result = fdu.erase(StableDiffusionPipeline.from_pretrained(tmp_path / "base"), "three", "eight", **quick)
    front, _ = read_card(result.save(tmp_path / "out"))
    assert front["license"] == "openrail" and "base_model" not in front and front["tags"][0] == "lora"


def test_only_figures_and_pictures_of_a_card_change(erased: Path) -> None:
    card = (erased / "README.md").read_text()
    card = card.replace("tags:\n", "language: en\ntags:\n").replace("## Limits", "## My words\n\nRead me.\n\n## Limits")
    (erased / "README.md").write_text(card)
    probes = [fdu.Probe("three" + EVIL, (EVIL + ": x\n---\n",), "target", lambda images: ["three"] * len(images))]
    draws = make_draws(0.1, 0.5, 0.9)
    probes += PROBES[1:]
    robustness = found(0.97)
    run = EvaluatedRun.of(fdu.evaluate(draws, draws, probes), probes, draws, draws, robustness=robustness)
    fill_in(erased, run)
    first = (erased / "README.md").read_text()
    front, body = read_card(erased)
    assert front["language"] == "en" and "## My words\n\nRead me.\n\n## Limits" in body and "## Use" in body
    assert front["widget"][0]["text"] == " ".join(f"{EVIL}: x ---".split())
    assert ModelCard(first).data.to_dict()["widget"] == front["widget"]
    figures = body.split("## Figures")[1].split("\n## ")[0]
    assert f"{judge_robustness(robustness, 'three').headline}." in figures
    assert "<" not in figures and body.count("\n## Figures\n") == 1
    fill_in(erased, run)
    assert (erased / "README.md").read_text() == first
    (erased / "README.md").write_text(first.replace("## Figures", "## Other"))
    fill_in(erased, run)
    assert read_card(erased)[1].count("\n## Figures\n") == 1
