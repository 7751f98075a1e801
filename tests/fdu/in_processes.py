"""Processes of their own on this machine, alone or of torch.distributed, and tasks for them, which leave their findings
in files. They are forked from one process that has imported fdu, which takes seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fdu
from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.subjects.digits import pipeline as digits
from fdu.training import sharding
from fdu.training.step import Stepper

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])
SECONDS = 250
"""The most that a task may take."""
rank = "0"
"""Of this process, if several work on a task."""
torch.set_num_threads(1)


class Ended(NamedTuple):
    """How a process ended."""

    returncode: int | None
    error: str


def free_port() -> str:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def started(
    task: Callable[..., object], *arguments: Any, errors: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """A process that does a task of this file; what it writes to stderr is in the file ``errors``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the server, which begins with the first process
        process = SERVER.Process(target=_do, args=(task, arguments, errors, dict(environment or {})))
        process.start()
    return process


def _do(task: Callable[..., object], arguments: tuple[Any, ...], errors: Path, environment: dict[str, str]) -> None:
    global rank
    os.environ.update(environment)
    rank = os.environ.get("RANK", "0")
    with errors.open("w") as stderr, open(os.devnull, "w") as stdout:
        os.dup2(stderr.fileno(), 2)
        os.dup2(stdout.fileno(), 1)
    task(*arguments)


def ended(folder: Path, task: Callable[..., object], *arguments: str, processes: int = 2) -> list[Ended]:
    """Do a task of this file in so many processes of one group, and wait for all of them."""
    folder.mkdir(exist_ok=True)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = []
    for number in range(processes):
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        errors = folder / f"stderr-{number}"
        running.append((started(task, str(folder), *arguments, errors=errors, environment={**group, **place}), errors))
    for process, _ in running:
        process.join(SECONDS)
    for process, _ in running:
        process.kill()
        process.join()
    return [Ended(process.exitcode, errors.read_text()) for process, errors in running]


def erase_with_checkpoints(folder: str, settings: dict[str, Any]) -> None:
    """An erasure that leaves only its checkpoints."""
    fdu.erase(digits.load_pipeline(), "three", "eight", checkpoint_dir=f"{folder}/checkpoints", **settings)


def erase(pipeline: DiffusionPipeline, settings: dict[str, Any]) -> fdu.ErasureResult:
    return fdu.erase(pipeline, *digits.concepts("three", "eight"), **settings)


def found_by(result: fdu.ErasureResult) -> dict[str, Tensor]:
    """The trained weights, the history and sigma."""
    found = {name: parameter.data for name, parameter in result.trainable.named_parameters().items()}
    found |= {f"history {name}": torch.tensor(values) for name, values in result.history.items()}
    return {**found, "sigma": torch.tensor(result.sigma)}


def train(folder: str, settings: str) -> None:
    """An erasure for each of the settings, and its findings in ``folder/number-rank.pt``."""
    for number, one in enumerate(json.loads(settings)):
        pipeline = digits.load_pipeline()
        before = Before(pipeline)
        result = erase(pipeline, one)
        found = found_by(result)
        with result.original():
            found["unchanged"] = torch.tensor(before.holds())
        torch.save(found, Path(folder) / f"{number}-{rank}.pt")
        if rank == "0":
            result.save(Path(folder) / f"{number}-result")


def train_after_another(folder: str, settings: str) -> None:
    """An erasure after one of another method, for which accelerate has prepared the denoiser already."""
    pipeline = digits.load_pipeline()
    erase(pipeline, {**json.loads(settings), "train_method": "text_encoder"})
    torch.save(found_by(erase(pipeline, json.loads(settings))), Path(folder) / f"0-{rank}.pt")


def die_and_go_on(folder: str, settings: str) -> None:
    """Die after 4 steps, or resume if there is a checkpoint."""
    resumes = any(Path(one["checkpoint_dir"]).is_dir() for one in json.loads(settings))
    step = Stepper.step

    def mortal(stepper: Stepper, number: int) -> Tensor:
        if number == 4 and not resumes:
            os._exit(9)
        return step(stepper, number)

    Stepper.step = mortal  # type: ignore[method-assign]
    train(folder, settings)


def fail_together(folder: str, settings: str) -> None:
    """Two erasures of one pipeline, the first of which diverges."""
    pipeline = digits.load_pipeline()
    before, error = Before(pipeline), None
    try:
        erase(pipeline, {**json.loads(settings), "learning_rate": 1e30})
    except RuntimeError as raised:
        error = str(raised)
    found = {"error": error, "unchanged": before.holds(), "form": before.same_form()}
    result = erase(pipeline, json.loads(settings))
    with result.original():
        found["unchanged later"] = before.holds()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def fail_alone(folder: str, settings: str) -> None:
    """The second process fails in the third step, and the first is left waiting in a collective."""
    step = Stepper.step

    def failing(stepper: Stepper, number: int) -> Tensor:
        if number == 2 and rank == "1":
            raise MemoryError("no memory left here")
        return step(stepper, number)

    Stepper.step = failing  # type: ignore[method-assign]
    sharding.PATIENCE /= 30
    try:
        erase(digits.load_pipeline(), json.loads(settings))
    except RuntimeError as raised:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(str(raised)))


def every_family(folder: str) -> None:
    """For each family: how whole and sharded modules differ, the share of weights held, and what is left."""
    PartialState(cpu=True)
    found: dict[str, dict[str, Any]] = {}
    for name in families.BUILDERS:
        for dtype in (torch.float32, torch.bfloat16) if name == "sd3" else (torch.float32,):
            pipeline = families.build(name)
            pipeline.to(dtype=dtype)
            denoiser = families.denoiser(name, pipeline)
            module = denoiser.module.requires_grad_(False)
            before = Before(pipeline)
            whole, weights = computed(denoiser, dtype), sum(parameter.numel() for parameter in module.parameters())
            with sharding.sharded(module, []):
                split, held = computed(denoiser, dtype), weights_held(module)
                in_shards = all(not parameter.numel() or not parameter.ndim for parameter, _ in before.parameters)
            found[f"{name} {dtype}"] = {
                "difference": max(difference(one, other) for one, other in zip(whole, split, strict=True)),
                "held": held / weights,
                "in shards": in_shards,
                "unchanged": before.holds() and before.same_form(),
            }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def computed(denoiser: Denoiser, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The output without gradients, the one with them, and the gradient that passes through the frozen weights."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *denoiser.latent_shape, generator=generator).to(dtype)
    conditioning = denoiser.encode(["a photo", "the digit three"])
    indices = torch.tensor([100, 700])
    with torch.no_grad():
        frozen = denoiser.predict(noisy, indices, conditioning)
    output = denoiser.predict(noisy.requires_grad_(), indices, conditioning)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), [noisy])
    return frozen, output.detach(), gradient


def difference(one: Tensor, other: Tensor) -> float:
    """Of two tensors, relative to their largest element."""
    return float((one - other).abs().max() / one.abs().max())


def weights_held(module: nn.Module) -> int:
    """How many weights this process keeps of a module between its passes."""
    held: list[Tensor] = [each.to_local() if isinstance(each, DTensor) else each for each in module.parameters()]
    return sum(tensor.numel() for tensor in held)


class Before:
    """What a denoiser is: its parameters as objects, their values, and the forms of its modules."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.module: nn.Module = getattr(pipeline, parts.denoiser_name(pipeline))
        self.parameters = [(parameter, parameter.detach().clone()) for parameter in self.module.parameters()]
        self.forms = [form(part) for part in self.module.modules()]

    def holds(self) -> bool:
        """Whether the same parameter objects are there, with the same values, among no others than plain ones."""
        there = {id(parameter) for parameter in self.module.parameters()}
        return all(
            id(parameter) in there and type(parameter) is nn.Parameter and torch.equal(parameter, value)
            for parameter, value in self.parameters
        ) and not any(isinstance(parameter, DTensor) for parameter in self.module.parameters())

    def same_form(self) -> bool:
        """Whether classes, attributes and hooks are the same; only without adapters."""
        return self.forms == [form(part) for part in self.module.modules()]


def form(module: nn.Module) -> tuple[Any, ...]:
    hooks = {name: list(value) for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)}
    return type(module), sorted(map(str, vars(module))), hooks
