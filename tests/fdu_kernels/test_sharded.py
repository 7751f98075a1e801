"""DTensors on two devices, which are processes here: losses and gradients are those of the whole tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_testing import pairs

import fdu_kernels as fk

BACKENDS = [name for name in ("cpu", "torch") if fk.backends()[name] is None]
CASES = pairs(
    [0, 1, 2, "all"], ["none", "full", "samples", "shared"], ["mean", "sum", "none"], ["distributed", "plain"]
)
"""The sharded dimension, the mask, the reduction; and whether sigma, weight and mask are DTensors too."""
RUN = '''
import json, sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
import fdu_kernels as fk

torch.set_num_threads(1)
rank, store, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
pred, target = torch.randn(5, 4, 6), torch.randn(5, 4, 6)
sigma, weight = torch.rand(5) + 0.5, torch.rand(5)
masks = {"none": None, "full": torch.rand(5, 4, 6) > 0.3, "samples": torch.rand(5, 1, 1) > 0.2}
masks["shared"] = torch.rand(4, 6)

def spread(tensor, placement):
    """A DTensor, or a tensor that is the same in every process."""
    if tensor is None:
        return None
    if isinstance(placement, Shard) and (placement.dim >= tensor.ndim or tensor.shape[placement.dim] == 1):
        placement = Replicate()
    return distribute_tensor(tensor, mesh, [placement])

def same(found, expected):
    whole = found.full_tensor() if isinstance(found, DTensor) else found
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)

for place, name, reduction, constants in json.loads(sys.argv[4]):
    placement, mask = Replicate() if place == "all" else Shard(place), masks[name]
    options = dict(reduction=reduction, backend=backend, divergence="jensen_shannon")
    given = dict(sigma=sigma, weight=weight, mask=mask)
    spread_given = {k: spread(v, placement) if constants == "distributed" else v for k, v in given.items()}
    leaf = pred.clone().requires_grad_()
    expected = fk.gaussian_divergence(leaf, target, **given, **options)
    expected_grad = torch.autograd.grad(expected.sum(), leaf)[0]
    there = spread(pred, placement).requires_grad_()
    value, s = fk.gaussian_divergence(
        there, spread(target, placement), **spread_given, **options, return_distance=True
    )
    expected_s = fk.squared_distance(pred, target, sigma, mask).double()
    same(s, expected_s)
    assert isinstance(value, DTensor)
    same(value, expected)
    (grad,) = torch.autograd.grad(value.sum(), there)
    assert grad.placements == there.placements
    same(grad, expected_grad)
    both = fk.gaussian_divergence_value_and_grad(
        there, spread(target, placement), **spread_given, **options, grad_scale=2.0, return_distance=True
    )
    same(both[2], expected_s)
    same(both[0], expected)
    same(both[1], 2 * expected_grad)
    # Functions of the density ratio, sharded in any way.
    options = dict(reduction=reduction, backend=backend)
    for loss, kinds in (
        (fk.variational_model_loss, {"mask": (mask, spread_given["mask"])}),
        (fk.density_ratio_divergence, {"weight": (weight, spread_given["weight"])}),
    ):
        whole, parts = ({k: v[i] for k, v in kinds.items()} for i in (0, 1))
        leaf = pred.clone().requires_grad_()
        expected = loss(leaf, "kl", **whole, **options)
        value = loss(there, "kl", **parts, **options)
        same(value, expected)
        (grad,) = torch.autograd.grad(value.sum(), there)
        assert grad.placements == there.placements
        same(grad, torch.autograd.grad(expected.sum(), leaf)[0])
    both = fk.density_ratio_divergence_value_and_grad
    found = both(there, "kl", weight=spread_given["weight"], **options)
    for one, other in zip(found, both(pred, "kl", weight=weight, **options)):
        same(one, other)
# A model whose batch is sharded.
layer = torch.nn.Linear(6, 6)
module = torch.nn.Linear(6, 6)
module.load_state_dict(layer.state_dict())
module = torch.distributed.tensor.distribute_module(module, mesh)
fk.gaussian_divergence(layer(pred[:4]), target[:4]).backward()
fk.gaussian_divergence(module(spread(pred[:4], Shard(0))), spread(target[:4], Shard(0)), backend=backend).backward()
same(module.weight.grad, layer.weight.grad)
# sigma="auto" takes every device's samples.
whole, parts = (fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=2, backend=backend) for _ in range(2))
for scale in (1.0, 3.0, 5.0):  # the third call no longer calibrates
    expected, value = whole(scale * pred, target), parts(spread(scale * pred, Shard(0)), spread(target, Shard(0)))
    same(value, expected)
    same(parts.sigma, whole.sigma)
# Fewer samples than devices.
one = spread(pred[:1], Shard(0)).requires_grad_()
value = fk.gaussian_divergence(one, spread(target[:1], Shard(0)), backend=backend)
same(value, fk.gaussian_divergence(pred[:1], target[:1]))
same(torch.autograd.grad(value, one)[0], fk.gaussian_divergence_value_and_grad(pred[:1], target[:1])[1])
print("checked")
torch.distributed.destroy_process_group()
'''


@pytest.mark.quick(backend=["torch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_of_distributed_tensors(backend: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", RUN]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), backend, json.dumps(CASES)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        printed, errors = process.communicate(timeout=240)
        assert printed.strip() == "checked", errors
