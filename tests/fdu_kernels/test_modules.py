"""The modules: they equal the functions, and sigma="auto" finds, keeps and resumes its scale."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fdu_kernels as fk


def batches(count: int, size: int = 5, scale: float = 3.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 8, generator=generator) * scale, torch.randn(size, 8, generator=generator) * scale)
        for _ in range(count)
    ]


def test_modules_equal_the_functions() -> None:
    pred, target = batches(1)[0]
    weight, mask = torch.rand(5), torch.rand(8) > 0.3
    module = fk.GaussianDivergenceLoss("alpha:0.3", sigma=2.0, distance="sum", reduction="none")
    expected = fk.gaussian_divergence(
        pred, target, "alpha:0.3", sigma=2.0, weight=weight, mask=mask, distance="sum", reduction="none"
    )
    torch.testing.assert_close(module(pred, target, weight, mask), expected, rtol=0, atol=0)
    found, s = module(pred, target, weight, mask, return_distance=True)
    assert torch.equal(found, expected)
    torch.testing.assert_close(s.float(), fk.squared_distance(pred, target, 2.0, mask, "sum"))
    variational = fk.VariationalDivergenceLoss("kl", parametrization="fgan")
    torch.testing.assert_close(
        variational(pred, target), -fk.variational_divergence(pred, target, "kl", parametrization="fgan")
    )
    torch.testing.assert_close(
        variational.model_loss(target), fk.variational_model_loss(target, "kl", parametrization="fgan")
    )
    ratio = fk.DensityRatioDivergenceLoss("le_cam", samples_from="p")
    torch.testing.assert_close(ratio(pred, weight), fk.density_ratio_divergence(pred, "le_cam", "p", weight))


def test_auto_puts_the_median_of_all_calibration_samples_at_s0() -> None:
    loss = fk.GaussianDivergenceLoss(sigma="auto", s0=2.5, calibration_calls=3)
    seen = batches(3)
    for count, (pred, target) in enumerate(seen, start=1):
        loss(pred, target)
        s = torch.cat([fk.squared_distance(*pair, sigma=loss.sigma) for pair in seen[:count]])
        assert s.quantile(0.5).item() == pytest.approx(2.5, rel=1e-5)


def test_auto_uses_sigma_of_the_same_call() -> None:
    loss = fk.GaussianDivergenceLoss("kl", sigma="auto", reduction="none")
    pred, target = batches(1)[0]
    assert (2 * loss(pred, target)).quantile(0.5).item() == pytest.approx(1.0, rel=1e-5)


def test_auto_is_frozen_after_calibration_and_in_evaluation() -> None:
    loss = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=2)
    loss.eval()
    loss(*batches(1)[0])
    assert loss.sigma == 1
    loss.train()
    for pair in batches(2):
        loss(*pair)
    sigma = loss.sigma.clone()
    loss(*batches(1, scale=100)[0])
    assert loss.sigma == sigma != 1


def test_auto_resumes_exactly_in_the_middle_of_calibration() -> None:
    data = batches(6)
    whole = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=4)
    first = copy.deepcopy(whole)
    second = copy.deepcopy(whole)
    for pair in data:
        whole(*pair)
    for pair in data[:2]:
        first(*pair)
    second.load_state_dict(first.state_dict())
    for pair in data[2:]:
        second(*pair)
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    assert all(isinstance(value, Tensor) for value in whole.state_dict().values())


def test_auto_ignores_what_has_no_distance() -> None:
    loss = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=4)
    pred, target = batches(1)[0]
    value = loss(pred, pred.clone())
    assert loss.sigma == 1 and value == 0
    mask = torch.ones(5, 1, dtype=torch.bool)
    mask[3:] = False
    loss(pred, target, mask=mask)
    assert fk.squared_distance(pred, target, sigma=loss.sigma)[:3].median().item() == pytest.approx(1, rel=1e-5)
    sigma = loss.sigma.clone()
    assert loss(torch.full_like(pred, math.nan), target).isnan()
    assert loss.sigma == sigma


@pytest.mark.parametrize("size", [1, 2, 5, 128, 129, 256, 1000])
@pytest.mark.parametrize("calls", [1, 8])
def test_auto_finds_the_median_for_any_batch_size(size: int, calls: int) -> None:
    loss = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=calls)
    seen = batches(calls, size)
    for pred, target in seen:
        loss(pred, target)
    s = torch.cat([fk.squared_distance(*pair, sigma=loss.sigma) for pair in seen])
    # A batch of more samples than its call has places is known by its quantiles only.
    assert s.quantile(0.5).item() == pytest.approx(1.0, rel=1e-5 if size <= 1024 // calls else 0.01)


def test_auto_with_one_place_a_call_takes_the_median_of_medians() -> None:
    loss = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=600)
    medians = []
    for pred, target in batches(600, 2):
        loss(pred, target)
        medians.append(fk.squared_distance(pred, target).mean())
    assert loss.observed.shape == (600, 1)
    assert torch.as_tensor(loss.sigma).square().item() == pytest.approx(
        torch.stack(medians).quantile(0.5).item(), rel=1e-5
    )


def test_only_auto_has_a_state() -> None:
    fixed = fk.GaussianDivergenceLoss(sigma=0.5)
    assert not fixed.state_dict() and not list(fixed.buffers()) and fixed.sigma == 0.5
    assert set(fk.GaussianDivergenceLoss(sigma="auto").state_dict()) == {"sigma", "calls", "observed"}
    moved = fk.GaussianDivergenceLoss(sigma="auto").to("meta")
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}


def test_a_fixed_sigma_is_exact_and_needs_no_device() -> None:
    pred, target = (x.double() for x in batches(1)[0])
    for module in (fk.GaussianDivergenceLoss(sigma=0.1), fk.GaussianDivergenceLoss(sigma=0.1).half()):
        assert module(pred, target) == fk.gaussian_divergence(pred, target, sigma=0.1)
        assert fk.gaussian_divergence(pred, target, sigma=module.sigma) == module(pred, target)
    # The module was never moved: a fixed sigma has no device.
    assert fk.GaussianDivergenceLoss("mse", sigma=0.1)(pred.to("meta"), target.to("meta")).device.type == "meta"


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_auto_stays_float32_whatever_the_module_is_cast_to(cast: str) -> None:
    data = batches(4)
    plain, other = (fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=4) for _ in range(2))
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), other)
    for step, pair in enumerate(data):
        if step == 2:
            getattr(model, cast)()
        plain(*pair)
        other(*pair)
    assert model[0].weight.dtype != torch.float32
    for key, value in plain.state_dict().items():
        assert torch.equal(other.state_dict()[key], value) and other.state_dict()[key].dtype == value.dtype, key


def test_auto_follows_the_device_of_its_inputs() -> None:
    # Without an accelerator the other device is meta, off which a module gets by to_empty only.
    module = fk.GaussianDivergenceLoss(sigma="auto").to("meta").eval()
    module.to = lambda device: module.to_empty(device=device)  # type: ignore[method-assign]
    # What to_empty leaves there may be any number, also one that is no sigma.
    with contextlib.suppress(ValueError):
        module(*batches(1)[0])
    assert {buffer.device.type for buffer in module.buffers()} == {"cpu"}
    kept = fk.GaussianDivergenceLoss(sigma="auto").eval()
    with pytest.raises(ValueError, match="sigma.*cpu.*pred.*meta"):
        kept(*(x.to("meta") for x in batches(1)[0]))
    assert kept.sigma == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_module_left_on_the_cpu_takes_inputs_on_the_gpu() -> None:
    pred, target = (x.cuda() for x in batches(1)[0])
    for sigma in (0.5, "auto"):
        module = fk.GaussianDivergenceLoss(sigma=sigma)
        assert module(pred, target) == fk.gaussian_divergence(pred, target, sigma=module.sigma)


def test_repr() -> None:
    assert repr(fk.GaussianDivergenceLoss("hellinger", sigma=0.5)) == (
        "GaussianDivergenceLoss('squared_hellinger', sigma=0.5, distance='mean', reduction='mean')"
    )
    assert 'sigma="auto", s0=1' in repr(fk.GaussianDivergenceLoss(sigma="auto"))
    assert "'kl', parametrization='fgan'" in repr(fk.VariationalDivergenceLoss("kl", "fgan"))
    assert "'kl', samples_from='p'" in repr(fk.DensityRatioDivergenceLoss("kl", "p"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": "automatic"}, ValueError, "sigma must be .*auto"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive"),
        ({"sigma": torch.ones(2)}, TypeError, r"pass.*tensor \[B\].*gaussian_divergence"),
        ({"s0": 0.0}, ValueError, "s0.*positive number, not 0"),
        ({"s0": "1"}, ValueError, "s0.*positive number, not '1'"),
        ({"s0": float("inf")}, ValueError, "s0.*positive number, not inf"),
        ({"calibration_calls": 0}, ValueError, "calibration_calls.*integer.*least 1, not 0"),
        ({"calibration_calls": 2.5}, ValueError, "calibration_calls.*integer.*least 1, not 2.5"),
        ({"backend": "cudda"}, ValueError, "unknown backend 'cudda'; known: .*torch"),
        ({"distance": "median"}, ValueError, "distance must be"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
        ({"divergence": "hellinge"}, ValueError, "closest: squared_hellinger"),
    ],
)
def test_settings_are_checked_at_construction(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fk.GaussianDivergenceLoss(**options)  # type: ignore[arg-type]


def test_a_calibration_in_inference_mode_serves_training() -> None:
    loss = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=1)
    pred, target = torch.randn(4, 6), torch.zeros(4, 6)
    with torch.inference_mode():
        loss(pred, target)
    sigma = loss.sigma.clone()
    loss(pred.requires_grad_(), target).backward()
    assert pred.grad is not None and bool(pred.grad.isfinite().all()) and bool(pred.grad.any())
    again = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=1)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.sigma, sigma) and torch.equal(loss.sigma, sigma)


def test_the_state_can_be_made_after_the_module() -> None:
    with torch.device("meta"):
        late = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=2)
    late.to_empty(device="cpu").reset_parameters()
    loss = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=2)
    pred, target = torch.randn(4, 6), torch.zeros(4, 6)
    for _ in range(3):
        assert torch.equal(late(pred, target), loss(pred, target)) and torch.equal(late.sigma, loss.sigma)
    with pytest.raises(TypeError, match="pred.*tensor, not NoneType"):
        fk.GaussianDivergenceLoss(sigma="auto")(None, target)


def test_calls_while_calibrating_can_share_a_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 6, generator=generator).requires_grad_() for _ in range(2))
    target = torch.zeros(4, 6)
    criterion = fk.GaussianDivergenceLoss("squared_hellinger", sigma="auto")
    losses, sigmas = [], []
    for pred in (first, 3 * second.detach()):
        losses.append(criterion(pred.requires_grad_(), target))
        sigmas.append(float(criterion.sigma))
    (sum(losses) / 3).backward()
    assert sigmas[0] != sigmas[1]
    expected = fk.gaussian_divergence_value_and_grad(first.detach(), target, sigma=sigmas[0], grad_scale=1 / 3)[1]
    torch.testing.assert_close(first.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sigma_of_a_sample_is_sigma_times_its_scale(dtype: torch.dtype) -> None:
    pred, target = batches(1)[0]
    scale = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=dtype)
    module = fk.GaussianDivergenceLoss(sigma=0.3, reduction="none")
    expected = fk.gaussian_divergence(pred, target, sigma=0.3 * scale.float(), reduction="none")
    assert torch.equal(module(pred, target, sigma_scale=scale), expected)
    assert not torch.allclose(module(pred, target), expected)


def test_auto_calibrates_with_the_scale_in_it() -> None:
    loss = fk.GaussianDivergenceLoss(sigma="auto", s0=2.0, calibration_calls=2)
    scales = [torch.rand(5, generator=torch.Generator().manual_seed(seed)) + 0.1 for seed in range(2)]
    for pair, scale in zip(batches(2), scales, strict=True):
        loss(*pair, sigma_scale=scale)
    s = [fk.squared_distance(*pair, sigma=loss.sigma * scale) for pair, scale in zip(batches(2), scales, strict=True)]
    assert torch.cat(s).quantile(0.5).item() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("sigma", [1.0, "auto"])
@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (2.0, TypeError, "sigma_scale.*tensor"),
        (torch.ones(5, dtype=torch.int64), TypeError, "sigma_scale.*float16"),
        (torch.ones(()), ValueError, r"sigma_scale.*one number per sample, shape \[5\], not \[\]"),
        (torch.ones(5, 1), ValueError, r"sigma_scale.*one number per sample, shape \[5\], not \[5, 1\]"),
        (torch.ones(5, device="meta"), ValueError, "sigma_scale.*meta.*pred.*cpu"),
        (torch.tensor([1.0, 1, 1, 0, 1]), ValueError, "sigma_scale.*positive.*smallest value.*0"),
    ],
)
def test_sigma_scale_is_checked(sigma: float | str, scale: Tensor, error: type[Exception], message: str) -> None:
    module = fk.GaussianDivergenceLoss(sigma=sigma)
    with pytest.raises(error, match=message):
        module(*batches(1)[0], sigma_scale=scale)
    assert module.sigma == 1


CALIBRATE_IN_ONE_OF_TWO_PROCESSES = """
import json, sys
import torch
import fdu_kernels as fk

torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
losses = [fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=2, synchronize=s) for s in (True, False)]
# One process sees 3 samples a call, the other 6, of another size.
part = slice(None, 3) if rank == 0 else slice(3, None)
for call in range(3):
    pred = torch.randn(9, 4, generator=generator) * torch.arange(1.0, 10.0)[:, None]
    for loss in losses:
        loss(pred[part], torch.zeros_like(pred)[part])
print(json.dumps([loss.sigma.item() for loss in losses]))
"""


@pytest.mark.slow
def test_processes_calibrate_together_if_asked_to(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CALIBRATE_IN_ONE_OF_TWO_PROCESSES]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    (together, alone), (other_together, other_alone) = (
        json.loads(process.communicate(timeout=120)[0]) for process in processes
    )
    generator = torch.Generator().manual_seed(0)
    one_process = fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=2, synchronize=True)
    for _ in range(3):
        pred = torch.randn(9, 4, generator=generator) * torch.arange(1.0, 10.0)[:, None]
        one_process(pred, torch.zeros_like(pred))
    assert together == other_together == one_process.sigma.item()
    assert len({together, alone, other_alone}) == 3
