"""Models, records and weights that are loaded from folders, and output folders that are written whole or not at all."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import fdu
from fdu.report import check_record
from fdu.storage.loading import HUB_PIPELINE, check_model, load_erased, load_model, read_record, result_bytes
from fdu.storage.lora import LORA_FILE
from fdu.storage.output import RECORD_FILE, SMALL_RESULT, check_output, whole_folder, write_json
from fdu.storage.shapes import load_shapes
from fdu.subjects.embedded import Digits

RECORD: dict[str, Any] = {
    "target": {"name": "three", "prompts": ["three"]},
    "anchor": {"name": "eight", "prompts": ["eight"]},
    "config": {"divergence": "kl", "max_train_steps": 3, "seed": 0},
    "sigma": 0.1,
    "seconds": 1.5,
    "history": {"loss": [1.0, None]},
    "versions": {},
}


def test_a_folder_that_is_missing_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_model("models/missing")
    Path("models").mkdir()
    with pytest.raises(FileNotFoundError, match="MODEL 'models/missing'.*not exist.*folder 'models'"):
        check_model("models/missing")
    for name in ("./missing", "../missing", "/missing/model", "~/missing"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            check_model(name)


def test_a_whole_record_is_read(tmp_path: Path) -> None:
    assert read_record(str(tmp_path)) is None
    (tmp_path / RECORD_FILE).write_text(json.dumps(RECORD))
    assert read_record(str(tmp_path)) == RECORD


@pytest.mark.parametrize(
    "key", ["target.name", "anchor.prompts", "config.seed", "sigma", "seconds", "history", "versions"]
)
@pytest.mark.parametrize("wrong", ["absent", "null"])
def test_a_record_that_lacks_what_is_used_is_refused(key: str, wrong: str) -> None:
    check_record(RECORD, "here")
    record = copy.deepcopy(RECORD)
    *path, last = key.split(".")
    entry = record
    for name in path:
        entry = entry[name]
    if wrong == "absent":
        del entry[last]
    else:
        entry[last] = None
    with pytest.raises(ValueError, match=rf"here.*{last}"):
        check_record(record, "here")


@pytest.mark.parametrize("other", [{"a": 1}, [], 3, RECORD | {"history": {"loss": 3}}])
def test_other_json_is_no_record(other: Any) -> None:
    with pytest.raises(ValueError, match="here"):
        check_record(other, "here")


def test_room_for_a_result(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"x" * 1000)
    assert result_bytes([tmp_path], "cross_attention") == SMALL_RESULT + 1000
    assert result_bytes([tmp_path], "lora") == result_bytes([], "lora") == SMALL_RESULT
    assert result_bytes([], "cross_attention") == HUB_PIPELINE
    assert result_bytes([Digits.data], "cross_attention") > SMALL_RESULT + 1_000_000


def test_truncated_weights_are_an_error_in_one_line(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / LORA_FILE).write_bytes(b"\xff" * 40)
    with pytest.raises(OSError, match="weights '.*lora'.*not.*loaded: .*lora"):
        load_erased(pipeline, str(tmp_path / "lora"))
    pipeline.save_pretrained(tmp_path / "full")
    weights = next((tmp_path / "full" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OSError, match="model '.*full'.*not.*loaded"):
        load_model(str(tmp_path / "full"))


# Output


def test_a_new_and_an_empty_folder_are_fine(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deeper")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / RECORD_FILE).write_text("kept")
    with pytest.raises(FileExistsError, match="not empty.*--overwrite"):
        check_output(tmp_path / "full")
    check_output(tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / RECORD_FILE).read_text() == "kept"


@pytest.mark.parametrize("name", ["thesis.tex", "metrics.json"])
def test_what_fdu_did_not_write_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"accuracy": 0.5}')
    with pytest.raises(FileExistsError, match="not written.*fdu.*never overwrites"):
        check_output(tmp_path / "out", overwrite=True)


def test_metrics_of_fdu_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    metrics = {"before": {}, "after": {}, "target": "three", "images_per_class": 1}
    write_json(tmp_path / "out" / "metrics.json", metrics)
    check_output(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("out", ["models/sd", "models", "models/other/../sd", "link"])
def test_the_inputs_are_never_replaced(tmp_path: Path, out: str) -> None:
    (tmp_path / "models" / "other").mkdir(parents=True)
    (tmp_path / "models" / "sd").mkdir()
    (tmp_path / "models" / "sd" / RECORD_FILE).touch()
    (tmp_path / "link").symlink_to(tmp_path / "models")
    with pytest.raises(ValueError, match="is.*holds.*input '.*sd'"):
        check_output(tmp_path / out, overwrite=True, inputs=[tmp_path / "models" / "sd"])


def test_an_input_that_is_a_link_in_the_folder_is_seen(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds, the input"):
        check_output(tmp_path / "models", inputs=[tmp_path / "models" / "sd"])


def test_beside_and_inside_an_input_is_fine(tmp_path: Path) -> None:
    (tmp_path / "sd").mkdir()
    check_output(tmp_path / "sd2", inputs=[tmp_path / "sd"])
    check_output(tmp_path / "sd" / "erased", inputs=[tmp_path / "sd"])


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(ValueError, match="disk'.*mount point.*a folder inside"):
        check_output(tmp_path / "disk")


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deeper" / "out")
    with pytest.raises(OSError, match="MiB are needed"):
        check_output(tmp_path / "new" / "deeper" / "out", needed_bytes=1 << 60)
    assert not list(tmp_path.iterdir())


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    check_output(tmp_path / "out")


def test_a_file_is_never_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(OSError, match="cannot be written"):
        check_output(tmp_path / "file" / "below")


def test_an_unwritable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"out' cannot.*written \(Read-only file system\)"):
        check_output(tmp_path / "out")


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OSError, match="0 MiB free.*5 MiB.*needed"):
        check_output(tmp_path / "out", needed_bytes=5 << 20)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as fresh:
        (fresh / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD_FILE).write_text("old")
    with pytest.raises(RuntimeError, match="half way"), whole_folder(tmp_path / "out", overwrite=True) as fresh:
        (fresh / "new").write_text("new")
        raise RuntimeError("half way")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RECORD_FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with whole_folder(tmp_path / "out", overwrite=True) as fresh:
            (fresh / RECORD_FILE).touch()
            (fresh / content).touch()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {RECORD_FILE, "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parents_are_made_when_something_is_written(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "new" / "out") as fresh:
        (fresh / "a").touch()
    assert (tmp_path / "new" / "out" / "a").exists()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with whole_folder(tmp_path / "out") as fresh:
        (fresh / "a").touch()
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "a").exists()


def kept_result(message: str) -> Path:
    """The folder that a message says the result is kept in."""
    return Path(message.partition("it is kept in '")[2].partition("'")[0])


def test_a_folder_that_appears_meanwhile_costs_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="complete.*written") as caught, whole_folder(tmp_path / "out") as fresh:
        (fresh / "trained").write_text("for hours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("other")
    assert (kept_result(str(caught.value)) / "trained").read_text() == "for hours"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_costs_neither_result(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD_FILE).write_text("old")
    replace, calls = os.replace, iter(range(1, 10))

    def busy(source: Path, destination: Path) -> None:
        if next(calls) == failing:
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", busy)
    with (
        pytest.raises(OSError, match="complete.*not.*moved .*Device.*resource busy") as caught,
        whole_folder(tmp_path / "out", overwrite=True) as fresh,
    ):
        (fresh / "trained").write_text("for hours")
    kept = kept_result(str(caught.value))
    assert (kept / "trained").read_text() == "for hours"
    assert (tmp_path / "out" / RECORD_FILE).read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out", kept.name}


def test_an_old_folder_that_cannot_be_put_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD_FILE).write_text("old")
    replace, calls = os.replace, iter(range(10))

    def busy(source: Path, destination: Path) -> None:
        if next(calls):
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(OSError) as caught, whole_folder(tmp_path / "out", overwrite=True) as fresh:
        (fresh / "trained").touch()
    former = Path(str(caught.value).partition("what stood there is in '")[2].removesuffix("'"))
    assert (former / RECORD_FILE).read_text() == "old"


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"loss": [1.0, float("inf"), float("nan")], "pair": (1, {"x": float("-inf")})})
    text = (tmp_path / "file").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": [1.0, None, None], "pair": [1, {"x": None}]}


def test_a_repository_of_half_precision_files_alone_loads(tmp_path: Path) -> None:
    pipeline = families.build("sd").to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    loaded = load_model(str(tmp_path / "half"))
    assert loaded.unet.dtype == torch.float32
    assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight.float())
    # Of a damaged one, the message is that of its own files.
    next((tmp_path / "half" / "unet").glob("*.fp16.safetensors")).unlink()
    with pytest.raises(OSError, match="'.*half' could not be loaded: (?!.*fp16)"):
        load_model(str(tmp_path / "half"))


def test_damaged_files_are_not_replaced_by_those_of_half_precision(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    pipeline.save_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(OSError, match="could not be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("entry", [["diffusers", "FutureModel"], ["code_of_their_own", "OwnModel"], ["diffusers"]])
@pytest.mark.parametrize("load", [load_model, load_shapes])
def test_a_class_that_is_not_here_is_told_in_the_same_words(
    entry: list[str], load: Callable[[str], Any], tmp_path: Path
) -> None:
    families.build("sd").save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "unet": entry}))
    with pytest.raises(OSError, match=re.escape(f"model {str(tmp_path)!r} could not be loaded: ") + r"[^\n]+$"):
        load(str(tmp_path))


def test_a_revision_follows_the_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def from_pretrained(name: str, **given: Any) -> Any:
        asked.append((name, given["revision"]))
        raise OSError("not here")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    for model, name, revision in (("org/model@v1.0", "org/model", "v1.0"), ("org/model", "org/model", None)):
        check_model(model)
        with pytest.raises(OSError, match=f"model '{model}' could not be loaded: not here"):
            load_model(model)
        assert set(asked) == {(name, revision)}
        asked.clear()
    for wrong in ("org/model@", "org/model@a b"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            check_model(wrong)


def test_a_revision_by_itself_reaches_record_and_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, Any]] = []

    def from_pretrained(name: str, **given: Any) -> Any:
        asked.append((name, given["revision"]))
        pipeline = families.build("sd")
        pipeline.register_to_config(_name_or_path=name)
        return pipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    pipeline = fdu.load_pipeline("org/model", revision="v1.0")
    assert asked == [("org/model", "v1.0")]
    few = {"max_train_steps": 1, "num_latents": 2, "num_inference_steps": 1, "train_batch_size": 1}
    result = fdu.erase(pipeline, "three", "eight", **few)
    assert result.record()["revision"] == "v1.0"
    card = (result.save(tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert "org/model at v1.0" in card and 'from_pretrained("org/model", revision="v1.0")' in card
    for model in ("org/model@main", str(tmp_path)):
        with pytest.raises(ValueError, match="revision goes with a hub id"):
            fdu.load_pipeline(model, revision="v1.0")


def test_a_variant_is_loaded_alone(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    pipeline.save_pretrained(tmp_path)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.fill_(0.5)
    pipeline.save_pretrained(tmp_path, variant="mine")
    assert fdu.load_pipeline(tmp_path, variant="mine").unet.conv_in.weight.unique().tolist() == [0.5]
    assert len(fdu.load_pipeline(tmp_path).unet.conv_in.weight.unique()) > 1
    with pytest.raises(OSError, match="could not be loaded"):
        fdu.load_pipeline(tmp_path, variant="none")
