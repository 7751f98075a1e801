"""Several processes, with copies of the denoiser or in shards: the course of one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import in_processes
import pytest
import torch
from diffusers import StableDiffusionPipeline
from in_processes import Before, ended, erase, found_by, free_port
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

import fdu
from fdu.subjects.digits import pipeline as digits
from fdu.training.sharding import check_shards, sharded

CASES: dict[str, dict[str, Any]] = {
    "lora": {"validation_prompts": ["the digit three"], "validation_steps": 3},
    "dora, accumulated": {"train_method": "dora", "gradient_accumulation_steps": 2, "frozen_batches": 3},
    "weights, surgery": {
        "train_method": "attention",
        "gradient_surgery": True,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "token, surgery": {"train_method": "token", "gradient_surgery": True},
    "critic": {"variational": True, "divergence": "jensen_shannon", "critic_warmup_steps": 2},
    "importance": {"timestep_sampling": "importance"},
    "trajectory": {"noisy_latents": "trajectory", "num_inference_steps": 2},
}


def done(folder: Path, task: Callable[..., object], *arguments: str, processes: int = 2) -> None:
    for process in ended(folder, task, *arguments, processes=processes):
        assert process.returncode == 0, process.error


def trained(folder: Path, number: int = 0, processes: int = 2) -> list[dict[str, Tensor]]:
    return [torch.load(folder / f"{number}-{rank}.pt", weights_only=True) for rank in range(processes)]


def found(folder: Path) -> list[Any]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def settings(folder: Path, **others: Any) -> dict[str, Any]:
    quick = {"max_train_steps": 6, "train_batch_size": 2, "num_latents": 8, "num_inference_steps": 1, "rank": 4}
    return {**quick, "learning_rate": 1e-4, "tracking_dir": str(folder / "logs"), **others}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process with the whole batch, by two in shards, and by two in copies."""
    folder = tmp_path_factory.mktemp("runs")
    cases = [settings(folder, **case) for case in CASES.values()]
    done(
        folder / "one", in_processes.train, json.dumps([{**case, "train_batch_size": 4} for case in cases]), processes=1
    )
    done(folder / "shards", in_processes.train, json.dumps([{**case, "shard": True} for case in cases]))
    done(folder / "copies", in_processes.train, json.dumps(cases))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_two_processes_are_one_with_the_whole_batch(runs: Path, number: int) -> None:
    (one,) = trained(runs / "one", number, processes=1)
    shards, copies = trained(runs / "shards", number), trained(runs / "copies", number)
    case = settings(runs, **list(CASES.values())[number])
    start = found_by(erase(digits.load_pipeline(), {**case, "train_batch_size": 4, "max_train_steps": 0}))
    for name in one:
        for two in (shards, copies):
            torch.testing.assert_close(two[0][name], two[1][name], rtol=0, atol=0)
        torch.testing.assert_close(shards[0][name], copies[0][name], rtol=1e-4, atol=1e-6)
        if name.startswith("history") or name in ("sigma", "unchanged"):
            if name != "history distance":  # a median of medians is another number
                torch.testing.assert_close(copies[0][name], one[name], rtol=2e-3, atol=2e-5)
            continue
        # By the way the whole tensor went: where a gradient is next to nothing, Adam takes its sign from rounding.
        moved = torch.linalg.norm(one[name] - start[name])
        assert moved > 0 and torch.linalg.norm(copies[0][name] - one[name]) <= 0.03 * moved, name
    assert all(process["unchanged"] for process in shards)


@pytest.mark.slow
def test_a_result_of_shards_loads_in_plain_diffusers(runs: Path, pipeline: StableDiffusionPipeline) -> None:
    folder = runs / "shards" / "0-result"
    pipeline.load_lora_weights(folder)
    weights = {name: each for name, each in pipeline.unet.named_parameters() if "lora_" in name}
    (mine, _) = trained(runs / "shards")
    assert len(weights) == sum("lora_" in name for name in mine) > 0
    for name, each in weights.items():
        torch.testing.assert_close(each.data, mine[f"unet.{name.replace('.default_0', '')}"], rtol=0, atol=0)
    assert json.loads((folder / "fdu.json").read_text())["config"]["shard"] is True
    assert (runs / "logs" / "validation" / "step-000006.png").is_file()


@pytest.mark.slow
def test_a_run_in_shards_that_was_killed_goes_on_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    kept = {"checkpoint_dir": str(tmp_path / "checkpoints"), "checkpointing_steps": 3}
    mortal = json.dumps([settings(tmp_path, shard=True, resume_from_checkpoint="latest", **kept, **CASES["lora"])])
    assert {process.returncode for process in ended(tmp_path, in_processes.die_and_go_on, mortal)} == {9}
    assert (tmp_path / "checkpoints" / "checkpoint-3").is_dir()
    done(tmp_path, in_processes.die_and_go_on, mortal)
    for whole, resumed in zip(trained(runs / "shards"), trained(tmp_path), strict=True):
        for name in whole:
            torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0)


@pytest.mark.slow
def test_after_an_error_the_pipeline_is_as_before_and_can_be_used_again(tmp_path: Path) -> None:
    done(tmp_path, in_processes.fail_together, json.dumps(settings(tmp_path, shard=True)))
    for process in found(tmp_path):
        assert "draws as before" in process["error"]
        assert process["unchanged"] and process["unchanged later"]


@pytest.mark.slow
def test_where_a_process_fails_alone_nobody_waits_for_ever(tmp_path: Path) -> None:
    done(tmp_path, in_processes.fail_alone, json.dumps(settings(tmp_path, shard=True)))
    first, second = found(tmp_path)
    assert "no memory left here" in second
    assert "load the pipeline afresh" in first and "load the pipeline afresh" in second


@pytest.mark.slow
def test_every_family_computes_in_shards_what_it_computes_whole(tmp_path: Path) -> None:
    done(tmp_path, in_processes.every_family)
    one, other = found(tmp_path)
    assert {name.split()[0] for name in one} == set(families.BUILDERS)
    for name in one:
        for process in (one, other):
            assert process[name]["difference"] < (0.02 if "bfloat16" in name else 1e-5), name
            assert process[name]["unchanged"], name
            assert process[name]["in shards"], name
        assert one[name]["held"] < 0.9 and one[name]["held"] + other[name]["held"] >= 1, name


@pytest.mark.slow
def test_a_run_after_one_of_another_method_still_averages_its_gradients(quick: dict[str, Any], tmp_path: Path) -> None:
    done(tmp_path, in_processes.train_after_another, json.dumps(quick))
    one, other = trained(tmp_path)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi_gpu", "use_fsdp"])  # with --cpu the launcher would start a single process
def test_accelerate_launch_saves_one_result(tmp_path: Path, kind: str) -> None:
    options = ["--max_train_steps", "2", "--train_batch_size", "2", "--num_latents", "4", "--num_inference_steps", "1"]
    options += ["--checkpoint_dir", "state"]
    erase = ["erase", "digits", "--target", "three", "--anchor", "eight", "--out", "out", "--device", "cpu", *options]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--{kind}", "--num_processes", "2"]
    command = [*launcher, "--num_machines", "1", "--main_process_port", free_port(), "-m", "fdu", *erase]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Saved to out") == 1
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "state"]
    with safe_open(tmp_path / "state" / "checkpoint-2" / "state.safetensors", "pt") as file:
        manifest = json.loads(file.metadata()["checkpoint"])["manifest"]
    assert manifest["processes"] == 2
    assert manifest["config"]["shard"] is (kind == "use_fsdp")


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def drawn(pipeline: StableDiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline("the digit three", num_inference_steps=1, output_type="latent", generator=generator).images


@pytest.mark.usefixtures("alone")
def test_afterwards_the_module_is_what_it_was(pipeline: StableDiffusionPipeline) -> None:
    unet, before = pipeline.unet, Before(pipeline)
    trained = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    picture = drawn(pipeline)
    for _ in range(2):
        with pytest.raises(KeyError, match="in the middle"), sharded(unet, [trained]):
            assert [each for each in unet.parameters() if not isinstance(each, DTensor)] == [trained]
            assert not any(each.numel() for each, _ in before.parameters if each is not trained)
            assert torch.equal(drawn(pipeline), picture)
            raise KeyError("in the middle")
        assert before.holds() and before.same_form()


@pytest.mark.usefixtures("alone")
def test_a_module_that_fsdp_refuses_is_whole_again(pipeline: StableDiffusionPipeline) -> None:
    before = Before(pipeline)
    convolution = pipeline.unet.conv_in.weight
    convolution.data = convolution.data.contiguous(memory_format=torch.channels_last)
    with pytest.raises(NotImplementedError, match="non-contiguous"), sharded(pipeline.unet, []):
        pass
    assert before.holds() and before.same_form()


def refused(module: nn.Module, processes: int = 2, **others: Any) -> str:
    with pytest.raises(ValueError) as raised:
        check_shards(module, fdu.EraseConfig(shard=True, **others), processes)
    return str(raised.value)


def test_what_cannot_be_split_is_refused(pipeline: StableDiffusionPipeline) -> None:
    unet = pipeline.unet
    check_shards(unet, fdu.EraseConfig(shard=True), 2)
    check_shards(unet, fdu.EraseConfig(train_method="full"), 1)
    assert "accelerate launch" in refused(unet, 1)
    assert "train_method 'full'" in refused(unet, train_method="full")
    assert "compile" in refused(unet, compile=True)
    unet.to(memory_format=torch.channels_last)
    assert "contiguous_format" in refused(unet)
    unet.to(memory_format=torch.contiguous_format)
    unet.conv_in.bias = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    assert "conv_in.bias" in refused(unet)


def test_the_launcher_may_ask_for_shards(
    pipeline: StableDiffusionPipeline, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="shard.*only one"):
        fdu.erase(pipeline, *digits.concepts("three", "eight"), **quick)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
