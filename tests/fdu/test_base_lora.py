"""A LoRA that a pipeline carries before an erasure: it stays, counts as part of the base, and is not saved again."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import fdu
from fdu import cli
from fdu.cli import main
from fdu.comparison.plan import Candidate, Comparison
from fdu.comparison.results import check_folder, write_record
from fdu.comparison.runs import weights
from fdu.models import parts
from fdu.storage import lora
from fdu.storage.fingerprint import fingerprint
from fdu.storage.loading import load_erased

FEW = {"max_train_steps": 2, "train_batch_size": 1, "num_latents": 2, "num_inference_steps": 1, "learning_rate": 0.1}
OWN_RANK = families.RANK + 1
"""The rank of the erasure, by which its tensors can be told from the LoRA's."""


def drawn(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"}
    return pipeline("a photo of the digit three", **settings).images


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with a LoRA of the user's, on layers that the erasure trains and on others."""
    pipeline = families.build("sd")
    layers = {
        "unet": families.add_adapter(pipeline, "unet", ("attn2.to_k", "attn1.to_q", "ff.net.2")),
        "text_encoder": families.add_adapter(pipeline, "text_encoder", ("q_proj",)),
    }
    (tmp_path / "mine").mkdir()
    lora.write(tmp_path / "mine", pipeline, lora.from_layers(layers, families.ALPHA))
    return tmp_path / "mine"


def with_lora(mine: Path) -> StableDiffusionPipeline:
    pipeline = families.build("sd")
    pipeline.load_lora_weights(mine, adapter_name="mine")
    return pipeline


def parts_of(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    models = {name: getattr(pipeline, name) for name in ("unet", "text_encoder")}
    return {
        f"{attribute}.{name}": tensor.clone()
        for attribute, model in models.items()
        for name, tensor in get_peft_model_state_dict(model, adapter_name="mine").items()
    }


@pytest.mark.parametrize("method", ["lora", "dora", "closed_form"])
def test_a_lora_stays_and_the_saved_erasure_holds_nothing_of_it(method: str, mine: Path, tmp_path: Path) -> None:
    pipeline = with_lora(mine)
    before, given = drawn(pipeline), parts_of(pipeline)
    assert not torch.allclose(before, drawn(families.build("sd")), atol=1e-3)
    settings: dict[str, Any] = {} if method == "closed_form" else {**FEW, "rank": OWN_RANK}
    result = fdu.erase(pipeline, "three", "eight", train_method=method, **settings)
    after = drawn(pipeline)
    assert not torch.allclose(after, before, atol=1e-3)
    with result.original() as original:
        assert torch.equal(drawn(original), before)
    assert parts.active_adapters(pipeline) == ["fdu", "mine"]
    now = parts_of(pipeline)
    assert now.keys() == given.keys() and all(torch.equal(now[name], tensor) for name, tensor in given.items())
    folder = result.save(tmp_path / "out")
    tensors = load_file(folder / lora.LORA_FILE)
    trained = result.trainable.named_parameters()
    assert len(tensors) == len(trained) and all(name.startswith("unet.") and "attn2" in name for name in tensors)
    record = json.loads((folder / "fdu.json").read_text())
    assert record["adapters"] == ["mine"] and record["fingerprint"] == fingerprint(families.build("sd"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    whole = families.build("sd")
    whole.save_pretrained(tmp_path / "base")
    for ours, theirs in (("the/base/model", "base"), ("mine", "mine"), ("this/folder", "out")):
        code = code.replace(f"path/to/{ours}", str(tmp_path / theirs))
    names: dict[str, Any] = {}
    exec(code, names)
    torch.testing.assert_close(drawn(names["pipeline"]), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["kohya", "pipeline", "delta"])
def test_other_formats_say_whether_they_hold_the_lora(format: str, mine: Path, tmp_path: Path) -> None:
    result = fdu.erase(with_lora(mine), "three", "eight", **FEW, rank=OWN_RANK)
    after = drawn(result.pipeline)
    folder = result.save(tmp_path / "out", save_as=format)
    card = (folder / "README.md").read_text(encoding="utf-8")
    if format == "pipeline":
        loaded: Any = StableDiffusionPipeline.from_pretrained(folder)
    else:
        loaded = with_lora(mine) if format == "kohya" else families.build("sd")
        fdu.load_weights(loaded, folder)
    torch.testing.assert_close(drawn(loaded), after, rtol=0, atol=1e-4)
    assert ("mine, which the base carried, is merged" in card) == (format != "kohya")
    assert ("The base carried mine" in card) == (format == "kohya")


def test_a_lora_that_is_switched_off_is_no_part_of_the_base(mine: Path, tmp_path: Path) -> None:
    pipeline = with_lora(mine)
    pipeline.disable_lora()
    result = fdu.erase(pipeline, "three", "eight", **FEW)
    assert result.record()["adapters"] == []
    assert "mine" not in (result.save(tmp_path / "out") / "README.md").read_text(encoding="utf-8")


def test_the_command_line_loads_a_lora_and_names_it_in_what_it_proposes(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    families.build("sd").save_pretrained(tmp_path / "base")
    base, out = str(tmp_path / "base"), str(tmp_path / "out")
    tiny = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
    erase = ["erase", base, "--target", "three", "--anchor", "eight", *tiny, "--save_config", str(tmp_path / "a.yaml")]
    assert main([*erase, "--out", out, "--base_lora", str(mine)]) == cli.OK
    told = capsys.readouterr().out
    assert f"fdu evaluate {base} {out} --base_lora {mine}" in told
    record = json.loads((tmp_path / "out" / "fdu.json").read_text())
    assert record["adapters"] == ["mine"]
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["base_lora"] == [str(mine)]
    (code,) = re.findall(r"In Python:\n +(.*)", told)
    names: dict[str, Any] = {"fdu": fdu}
    exec(code, names)
    pipeline = with_lora(mine)
    fdu.load_weights(pipeline, out)
    assert torch.equal(drawn(names["pipeline"]), drawn(pipeline))
    assert not torch.allclose(drawn(pipeline), drawn(with_lora(mine)), atol=1e-3)
    assert main([*erase[:-1], str(tmp_path / "b.yaml"), "--out", f"{out}2", "--base_lora", "gone"]) == cli.USAGE
    assert "base_lora: weights 'gone' do not exist" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "cross_attention"])
def test_a_delta_takes_the_place_of_the_loras_that_it_holds(method: str, mine: Path, tmp_path: Path) -> None:
    families.build("sd").save_pretrained(tmp_path / "base")
    pipeline = fdu.load_pipeline(tmp_path / "base", base_lora=[mine, mine])  # twice, under two names
    result = fdu.erase(pipeline, "three", "eight", **FEW, train_method=method)
    after = drawn(pipeline)
    result.save(tmp_path / "delta", save_as="delta")
    again = fdu.load_pipeline(tmp_path / "base", base_lora=[mine, mine])
    assert parts.active_adapters(again) == ["mine", "mine_"]
    torch.testing.assert_close(drawn(load_erased(again, str(tmp_path / "delta"))), after, rtol=0, atol=1e-4)


def test_changed_weights_are_no_base_lora(mine: Path, tmp_path: Path) -> None:
    pipeline = families.build("sd")
    pipeline.save_pretrained(tmp_path / "base")
    fdu.erase(pipeline, "three", "eight", **FEW, train_method="cross_attention").save(tmp_path / "d", save_as="delta")
    with pytest.raises(OSError, match="base_lora '.*d' could not be loaded: it holds changed weights"):
        fdu.load_pipeline(tmp_path / "base", base_lora=[tmp_path / "d"])


def test_a_comparison_tells_a_model_with_a_lora_from_one_without(mine: Path, tmp_path: Path) -> None:
    families.build("sd").save_pretrained(tmp_path / "base")
    plain = Comparison(str(tmp_path / "base"), (("three", "eight"),), (Candidate("mse"),))
    other = dataclasses.replace(plain, base_lora=(str(mine),))
    found = [weights(*one.loading) for one in (plain, other)]
    assert found == [fingerprint(families.build("sd"))[:16], fingerprint(with_lora(mine), adapters=True)[:16]]
    check_folder(tmp_path / "compared", plain)
    (tmp_path / "compared").mkdir()
    write_record(tmp_path / "compared", plain, "")
    with pytest.raises(FileExistsError, match="comparison with base_lora"):
        check_folder(tmp_path / "compared", other)
