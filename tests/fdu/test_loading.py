"""What is loaded for the command line: models that are not there, records that are none, weights that are broken."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from fdu.report import check_record
from fdu.storage.loading import (
    HUB_PIPELINE,
    check_model,
    load_erased,
    load_model,
    read_record,
    result_bytes,
)
from fdu.storage.lora import LORA_FILE
from fdu.storage.output import RECORD_FILE, SMALL_RESULT
from fdu.subjects.digits.embedded import EmbeddedDigits

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
    assert result_bytes(tmp_path, "cross_attention") == SMALL_RESULT + 1000
    assert result_bytes(tmp_path, "lora") == result_bytes(None, "lora") == SMALL_RESULT
    assert result_bytes(None, "cross_attention") == HUB_PIPELINE
    assert result_bytes(EmbeddedDigits.data, "cross_attention") > SMALL_RESULT + 1_000_000


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
