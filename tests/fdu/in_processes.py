"""Several processes of torch.distributed on this machine: tasks for them, which leave their findings in files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import families
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fdu
from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of
from fdu.subjects.digits import pipeline as digits
from fdu.training import sharding
from fdu.training.step import Stepper

RANK = os.environ.get("RANK", "0")
torch.set_num_threads(1)


class Ended(NamedTuple):
    """How a process ended."""

    returncode: int
    error: str


def free_port() -> str:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ended(folder: Path, task: str, *arguments: str, processes: int = 2) -> list[Ended]:
    """Run a task of this file in so many processes, and wait for all of them."""
    folder.mkdir(exist_ok=True)
    port, running = free_port(), []
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import in_processes; "
    command = [sys.executable, "-c", f"{code}in_processes.{task}(*sys.argv[1:])", str(folder), *arguments]
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    try:
        errors = [process.communicate(timeout=250)[1].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(process.returncode, error) for process, error in zip(running, errors, strict=True)]


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
        torch.save(found, Path(folder) / f"{number}-{RANK}.pt")
        if RANK == "0":
            result.save(Path(folder) / f"{number}-result")


def train_after_another(folder: str, settings: str) -> None:
    """An erasure after one of another method, for which accelerate has prepared the denoiser already."""
    pipeline = digits.load_pipeline()
    erase(pipeline, {**json.loads(settings), "train_method": "text_encoder"})
    torch.save(found_by(erase(pipeline, json.loads(settings))), Path(folder) / f"0-{RANK}.pt")


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
    (Path(folder) / f"{RANK}.json").write_text(json.dumps(found))


def fail_alone(folder: str, settings: str) -> None:
    """The second process fails in the third step, and the first is left waiting in a collective."""
    step = Stepper.step

    def failing(stepper: Stepper, number: int) -> Tensor:
        if number == 2 and RANK == "1":
            raise MemoryError("no memory left here")
        return step(stepper, number)

    Stepper.step = failing  # type: ignore[method-assign]
    sharding.PATIENCE /= 30
    try:
        erase(digits.load_pipeline(), json.loads(settings))
    except RuntimeError as raised:
        (Path(folder) / f"{RANK}.json").write_text(json.dumps(str(raised)))


def every_family(folder: str) -> None:
    """For each family: how whole and sharded modules differ, the share of weights held, and what is left."""
    PartialState(cpu=True)
    found: dict[str, dict[str, Any]] = {}
    for name in families.BUILDERS:
        for dtype in (torch.float32, torch.bfloat16) if name == "sd3" else (torch.float32,):
            pipeline = families.build(name)
            pipeline.to(dtype=dtype)
            denoiser = denoiser_of(pipeline, families.resolution(name))
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
    (Path(folder) / f"{RANK}.json").write_text(json.dumps(found))


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
