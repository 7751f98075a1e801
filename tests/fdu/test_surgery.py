"""Gradient surgery: the projection, accumulation, loss scaling, and several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fdu.training.surgery import GradientSurgery


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def flat(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def gradient_of(module: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def losses(module: nn.Module, opposed: bool) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1))
    erasing = module(x).square().mean()
    return erasing, (-2 * erasing + module(y).mean() if opposed else 2 * erasing + module(y).mean() / 10)


def run(module: nn.Module, surgery: GradientSurgery, opposed: bool, scale: float = 1.0) -> None:
    erasing, preserving = losses(module, opposed)
    with surgery.preserving():
        (scale * preserving).backward(retain_graph=True)
    (scale * erasing).backward()


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_what_conflicts_with_preservation_is_projected_off(weight: float) -> None:
    module = network()
    erasing, preserving = (gradient_of(module, loss) for loss in losses(module, opposed=True))
    assert erasing @ preserving < 0
    surgery = GradientSurgery(module.parameters())
    run(module, surgery, opposed=True)
    surgery.combine(weight)
    projected = flat(module) - weight * preserving
    torch.testing.assert_close(projected, erasing - erasing @ preserving / (preserving @ preserving) * preserving)
    assert abs(projected @ preserving) < 1e-6 * erasing.norm() * preserving.norm()


def test_without_a_conflict_it_is_the_weighted_sum() -> None:
    module = network()
    erasing, preserving = (gradient_of(module, loss) for loss in losses(module, opposed=False))
    assert erasing @ preserving > 0
    surgery = GradientSurgery(module.parameters())
    run(module, surgery, opposed=False)
    surgery.combine(3.0)
    torch.testing.assert_close(flat(module), erasing + 3 * preserving)


def test_the_dot_product_runs_over_all_parameters_together() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    surgery = GradientSurgery([one, other])
    with surgery.preserving():
        one.grad, other.grad = torch.tensor([1.0, 0.0]), torch.tensor([2.0])
    one.grad, other.grad = torch.tensor([-1.0, 5.0]), torch.tensor([1.0])
    # The first conflicts, all of them together do not.
    surgery.combine(1.0)
    assert torch.equal(one.grad, torch.tensor([0.0, 5.0])) and torch.equal(other.grad, torch.tensor([3.0]))


def test_both_gradients_accumulate_before_they_are_joined() -> None:
    module = network()
    surgery = GradientSurgery(module.parameters())
    for _ in range(3):
        run(module, surgery, opposed=True)
    surgery.combine(1.0)
    tripled = flat(module)
    module.zero_grad()
    run(module, surgery, opposed=True)
    surgery.combine(1.0)
    torch.testing.assert_close(tripled, 3 * flat(module))


def test_joining_forgets_the_preserving_gradient() -> None:
    module = network()
    surgery = GradientSurgery(module.parameters())
    run(module, surgery, opposed=True)
    surgery.combine(1.0)
    module.zero_grad()
    erasing, _ = losses(module, opposed=True)
    erasing.backward()
    before = flat(module)
    surgery.combine(1.0)
    assert torch.equal(flat(module), before)


def test_parameters_that_one_loss_does_not_reach() -> None:
    erased, kept, neither = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    surgery = GradientSurgery([erased, kept, neither])
    with surgery.preserving():
        kept.grad = torch.tensor([2.0])
    erased.grad = torch.tensor([3.0])
    surgery.combine(0.5)
    assert erased.grad == 3 and kept.grad == 1 and neither.grad is None


def test_a_vanishing_preserving_gradient_changes_nothing() -> None:
    module = network()
    surgery = GradientSurgery(module.parameters())
    with surgery.preserving():
        (0 * module(torch.ones(1, 3)).sum()).backward()
    module(torch.ones(1, 3)).sum().backward()
    before = flat(module)
    surgery.combine(1.0)
    assert torch.equal(flat(module), before)


def test_the_result_scales_with_the_loss() -> None:
    results = []
    for scale in (1.0, 65536.0):
        module = network()
        surgery = GradientSurgery(module.parameters())
        run(module, surgery, True, scale)
        surgery.combine(1.0)
        results.append(flat(module) / scale)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("side", ["erasing", "preserving"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_what_is_not_finite_stays_for_the_scaler_to_find(side: str, value: float, weight: float) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    surgery = GradientSurgery([parameter])
    bad, good = torch.tensor([value, 1.0]), torch.tensor([1.0, -2.0])
    with surgery.preserving():
        parameter.grad = bad if side == "preserving" else good
    parameter.grad = good.clone() if side == "preserving" else bad
    surgery.combine(weight)
    assert not torch.isfinite(parameter.grad).all()


def test_an_error_while_preserving_leaves_the_gradients_in_place() -> None:
    module = network()
    surgery = GradientSurgery(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    before = flat(module)
    with pytest.raises(KeyboardInterrupt), surgery.preserving():
        raise KeyboardInterrupt
    assert torch.equal(flat(module), before)


TRAIN_IN_ONE_OF_TWO_PROCESSES = """
import contextlib, json, sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fdu.training.surgery import GradientSurgery

torch.set_num_threads(1)

def train(module, data, no_sync):
    surgery = GradientSurgery(module.parameters())
    for number, (x, y) in enumerate(data):
        with no_sync() if number + 1 < len(data) else contextlib.nullcontext():
            with surgery.preserving():
                (-module(y).square()).mean().backward()
            module(x).square().mean().backward()
    surgery.combine(0.5)
    return [round(g, 5) for p in module.parameters() for g in p.grad.flatten().tolist()]

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
data = [torch.randn(2, 6, 3) for _ in range(2)]
if len(sys.argv) == 1:
    print(json.dumps(train(module, data, contextlib.nullcontext)))
    sys.exit()
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
wrapped = DistributedDataParallel(module)
replicated = train(wrapped, [part[:, rank::2] for part in data], wrapped.no_sync)
print(json.dumps(replicated))
"""


@pytest.mark.slow
def test_two_processes_join_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAIN_IN_ONE_OF_TWO_PROCESSES]
    arguments = [[], *([str(rank), str(tmp_path / "store")] for rank in range(2))]
    processes = [subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True) for more in arguments]
    alone, first, second = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    assert first == second
    assert first == pytest.approx(alone, abs=2e-5)


def test_a_preserving_gradient_of_mere_rounding_turns_nothing() -> None:
    module = network()
    erasing, preserving = (gradient_of(module, loss) for loss in losses(module, opposed=True))
    assert erasing @ preserving < 0
    surgery = GradientSurgery(module.parameters())
    tiny = 1e-6 * float(erasing.norm() / preserving.norm())
    losses_again = losses(module, opposed=True)
    with surgery.preserving():
        (tiny * losses_again[1]).backward(retain_graph=True)
    losses_again[0].backward()
    surgery.combine(1.0)
    torch.testing.assert_close(flat(module), erasing + tiny * preserving)
