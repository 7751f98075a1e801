"""Several processes: the same course as one process with the whole batch, and one that writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import free_port, run
from safetensors import safe_open
from torch import Tensor

RUN = """
import sys
import torch
import fdu
from fdu.subjects.digits import pipeline as digits
torch.set_num_threads(1)
folder, runs = sys.argv[1], eval(sys.argv[2])
import os
rank = os.environ.get("RANK", "0")
for number, settings in enumerate(runs):
    result = fdu.erase(digits.load_pipeline(), *digits.concepts("three", "eight"), **settings)
    torch.save({**{n: p.data for n, p in result.trainable.named_parameters().items()}, **{
        "history " + n: torch.tensor(v) for n, v in result.history.items()}, "sigma": torch.tensor(result.sigma)},
        folder + f"/{number}-{rank}.pt")
"""
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "weights": {"train_method": "cross_attention", "gradient_accumulation_steps": 2, "gradient_surgery": True},
    "token": {"train_method": "token"},
    "critic": {"variational": True, "divergence": "jensen_shannon", "critic_warmup_steps": 2},
    "importance": {"timestep_sampling": "importance", "frozen_batches": 0},
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[dict[str, Tensor]]]]:
    """What each process ends with, by case: of one process with the whole batch, of two, and before the first step."""
    quick = {"max_train_steps": 12, "num_latents": 16, "num_inference_steps": 2, "rank": 4, "learning_rate": 1e-4}
    found: dict[str, dict[str, list[dict[str, Tensor]]]] = {name: {} for name in CASES}
    for kind, processes, settings in (
        ("one", 1, {"train_batch_size": 8}),
        ("two", 2, {"train_batch_size": 4}),
        ("start", 1, {"train_batch_size": 8, "max_train_steps": 0}),
    ):
        folder = tmp_path_factory.mktemp(kind)
        runs = [{**quick, **others, **settings} for others in CASES.values()]
        for ended in run(RUN, processes, str(folder), repr(runs)):
            assert ended.returncode == 0, ended.error
        for number, name in enumerate(CASES):
            paths = [folder / f"{number}-{rank}.pt" for rank in range(processes)]
            found[name][kind] = [torch.load(path, weights_only=True) for path in paths]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_whole_batch(
    ends: dict[str, dict[str, list[dict[str, Tensor]]]], case: str
) -> None:
    (one,), two, (start,) = (ends[case][kind] for kind in ("one", "two", "start"))
    for name in one:
        torch.testing.assert_close(two[0][name], two[1][name], rtol=0, atol=0)
        if name.startswith("history") or name == "sigma":
            if name != "history distance":  # a median of medians is another number
                torch.testing.assert_close(two[0][name], one[name], rtol=2e-3, atol=2e-5)
            continue
        # By the way the whole tensor went: where a gradient is next to nothing, Adam takes its sign from rounding.
        moved = torch.linalg.norm(one[name] - start[name])
        assert moved > 0 and torch.linalg.norm(two[0][name] - one[name]) <= 0.03 * moved, name


AFTER_ANOTHER = RUN.replace(
    "result = fdu.erase(digits.load_pipeline(),",
    """pipeline = digits.load_pipeline()
    fdu.erase(pipeline, *digits.concepts("three", "eight"), **{**settings, "train_method": "text_encoder"})
    result = fdu.erase(pipeline,""",
)


@pytest.mark.slow
def test_a_run_after_one_of_another_method_still_averages_its_gradients(quick: dict[str, Any], tmp_path: Path) -> None:
    for ended in run(AFTER_ANOTHER, 2, str(tmp_path), repr([quick])):
        assert ended.returncode == 0, ended.error
    one, other = (torch.load(tmp_path / f"0-{rank}.pt", weights_only=True) for rank in range(2))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi_gpu", "use_fsdp"])  # with --cpu the launcher would start a single process
def test_accelerate_launch_saves_one_result(tmp_path: Path, kind: str) -> None:
    options = ["--max_train_steps", "2", "--train_batch_size", "2", "--num_latents", "4", "--num_inference_steps", "1"]
    options += ["--checkpoint_dir", "state"]
    erase = ["erase", "embedded", "--target", "three", "--anchor", "eight", "--out", "out", "--device", "cpu", *options]
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
