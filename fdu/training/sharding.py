"""A sharded denoiser: each process holds a share of the frozen weights, and gathers a block only while it computes.

Uses FSDP 2 (torch.distributed.fsdp.fully_shard). Trained weights, their gradients and moments stay whole in every
process: an adapter is small, and optimizer, clipping, gradient surgery and checkpoints work as without shards. The
training averages the gradients.

Autocast keeps a half-precision copy of every float32 weight until the backward pass, which undoes the saving: load the
pipeline in half precision, or set gradient_checkpointing. Tested on CPUs with gloo only; NCCL is untested.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate.utils import parse_flag_from_env
from torch import distributed, nn

from fdu.config import TRAIN_METHODS, EraseConfig

LAUNCHER_FLAG = "ACCELERATE_USE_FSDP"
"""Set in the environment by accelerate's launcher with --use_fsdp."""
PATIENCE = timedelta(seconds=60)
"""How long a process waits for the others to give their shards back; one that failed alone waits for nobody longer."""


def with_launcher(config: EraseConfig) -> EraseConfig:
    """The settings, with ``shard`` where accelerate's launcher or its configuration asks for FSDP."""
    return dataclasses.replace(config, shard=True) if parse_flag_from_env(LAUNCHER_FLAG) else config


def check_shards(module: nn.Module, config: EraseConfig, processes: int) -> None:
    """Refuse settings that shards do not work with.

    Raises:
        ValueError: there is one process; nothing stays frozen; the denoiser is to be compiled; or its weights cannot be
            split.
    """
    if not config.shard:
        return
    if processes == 1:
        raise ValueError(
            "shard splits the denoiser across processes, and there is only one; "
            "start several with accelerate launch --num_processes N, or leave shard out"
        )
    if TRAIN_METHODS[config.train_method].trains_whole_denoiser:
        raise ValueError(
            f"shard splits the frozen weights, and train_method {config.train_method!r} leaves none; "
            "choose train_method 'lora', or leave shard out"
        )
    if config.compile:
        raise ValueError("shard and compile do not go together: graphs would end at every block; leave one of them out")
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.is_meta:
            raise ValueError(
                f"shard cannot split {name}, which is "
                f"{'not in memory' if parameter.is_meta else f'a {type(parameter).__name__} of {parameter.dtype}'}; "
                "load the pipeline without quantization and without offloading, or leave shard out"
            )
        if not parameter.is_contiguous():
            raise ValueError(
                f"shard cannot split {name}, which is not contiguous; "
                "call pipeline.unet.to(memory_format=torch.contiguous_format), or leave shard out"
            )


@contextmanager
def sharded(module: nn.Module, trained: Collection[nn.Parameter]) -> Iterator[None]:
    """Within this context the module is in shards, and all processes must make each of its forward passes together.

    Between the passes a process holds its share of the frozen weights. Afterwards, even after an error, the module is
    as before: the same parameter objects with the same bits, the same classes and hooks. Blocks are those that
    diffusers does not split over devices (``_no_split_modules``). Every process must start with the same weights.

    Args:
        module: a denoiser of diffusers.
        trained: its trained parameters, which stay whole.

    Raises:
        RuntimeError: at the end some process did not give its shards back; the module is unusable.
    """
    # A group apart: an error may leave the other groups in the middle of something.
    group: Any = distributed.new_group(backend="gloo", timeout=PATIENCE)
    shards = _Shards(module, trained)
    failure: BaseException | None = None
    try:
        shards.split()
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        shards.take_apart()
        try:
            # Without the barrier one that has failed alone would wait for the others' shards much longer.
            distributed.monitored_barrier(group, PATIENCE)
            shards.join(group)
        except RuntimeError as error:
            raise RuntimeError(
                f"some processes did not return their shards of the denoiser ({failure or error!r}); "
                "load the pipeline afresh"
            ) from (failure or error)
        finally:
            distributed.destroy_process_group(group)


class _Form(NamedTuple):
    """The attributes of a module that FSDP changes."""

    module: nn.Module
    type: type[nn.Module]
    attributes: set[str]
    tables: dict[str, dict[Any, Any]]
    """Its parameters and its hooks, by attribute."""


class _Shards:
    """A module, what it was, and the shards of its frozen parameters in this process."""

    def __init__(self, module: nn.Module, trained: Collection[nn.Parameter]) -> None:
        self.module = module
        # FSDP has no shards of a scalar.
        self.whole = {*trained, *(parameter for parameter in module.parameters() if not parameter.ndim)}
        self.forms = [
            _Form(part, type(part), set(vars(part)), {name: dict(table) for name, table in _tables(part).items()})
            for part in module.modules()
        ]
        self.shards: dict[nn.Parameter, Any] = {}

    def split(self) -> None:
        """Let FSDP split the module, a block after the other, each of which frees its memory at once."""
        from torch.distributed.device_mesh import init_device_mesh  # here: some builds of torch lack it
        from torch.distributed.fsdp import fully_shard

        device = next(self.module.parameters()).device
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        kinds = tuple(getattr(self.module, "_no_split_modules", None) or ())
        blocks = [part for part in self.module.modules() if type(part).__name__ in kinds]
        # The inner ones first, the module itself last.
        for block in dict.fromkeys([*reversed(blocks), self.module]):
            fully_shard(block, mesh=mesh, ignored_params=self.whole)
            for form in self.forms:
                for name, parameter in form.tables["_parameters"].items():
                    shard = form.module._parameters[name]
                    if shard is not parameter and parameter.numel():
                        self.shards[parameter] = shard
                        # Others hold this object too: it stays, and gets its values back in the end.
                        parameter.data = parameter.data.new_empty(0)

    def take_apart(self) -> None:
        """Give the module its form and its parameters back, not yet their values. FSDP has no way back itself."""
        from torch.distributed._composable_state import _module_state_mapping

        for form in self.forms:
            form.module.__class__ = form.type
            _module_state_mapping.pop(form.module, None)
            for name in set(vars(form.module)) - form.attributes:
                del vars(form.module)[name]
            for name, table in _tables(form.module).items():
                table.clear()
                table.update(form.tables[name])

    @torch.no_grad()
    def join(self, group: Any) -> None:
        """Give the parameters their values back. They pass through CPU memory, one after the other."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor

        mesh = DeviceMesh.from_group(group, "cpu")
        while self.shards:
            parameter, shard = self.shards.popitem()
            local = shard.to_local().cpu()
            shared = DTensor.from_local(local, mesh, shard.placements, shape=shard.shape, stride=shard.stride())
            parameter.data = shared.full_tensor().to(parameter.device)
        gc.collect()  # FSDP's own objects hold the shards, in cycles


def _tables(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """The dicts of a module's parameters and hooks, by attribute."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, dict) and (name == "_parameters" or "_hooks" in name)
    }
