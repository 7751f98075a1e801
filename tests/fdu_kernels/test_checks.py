"""Every refusal names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fdu_kernels as fk

ONES = torch.ones(2, 3)
BOTH = torch.ones(2, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pred": [1.0]}, TypeError, "pred.*tensor, not list"),
        ({"pred": torch.ones(2, 3, dtype=torch.int64)}, TypeError, r"pred.*float16.*not int64.*pred\.float\(\)"),
        ({"target": torch.ones(2, 3, dtype=torch.bool)}, TypeError, "target.*float16.*not bool"),
        ({"pred": ONES.to_sparse()}, TypeError, r"pred.*dense tensor.*pass pred\.to_dense\(\)"),
        ({"target": ONES.to_mkldnn()}, TypeError, "target.*dense tensor"),
        ({"pred": torch.nested.nested_tensor([ONES], layout=torch.jagged)}, TypeError, "pred.*dense.*padded"),
        ({"weight": ONES[:, 0].to_sparse()}, TypeError, "weight.*dense tensor"),
        ({"mask": ONES.to_sparse()}, TypeError, "mask.*dense tensor"),
        ({"sigma": np.float32(0.7)}, TypeError, r"not float32.*pass torch.as_tensor\(sigma\)"),
        ({"pred": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "not complex64"),
        ({"target": torch.ones(2, 4)}, ValueError, r"pred.*\[2, 3\].*target \[2, 4\]; expand"),
        ({"target": ONES.to("meta")}, ValueError, "pred.*cpu.*target.*meta; move"),
        ({"pred": torch.ones(()), "target": torch.ones(())}, ValueError, r"pred.*shape \[B.*pred\[None\]"),
        ({"pred": torch.ones(0, 3), "target": torch.ones(0, 3)}, ValueError, "skip the empty batch"),
        ({"sigma": 0.0}, ValueError, r"sigma.*positive, not 0\.0"),
        ({"sigma": float("nan")}, ValueError, "sigma.*positive, not nan"),
        ({"sigma": -1}, ValueError, "sigma.*positive, not -1"),
        ({"sigma": "1"}, TypeError, r"sigma.*number.*tensor \[B\], not str '1'"),
        ({"sigma": torch.tensor([1.0, 0.0])}, ValueError, "sigma.*positive.*smallest value.*0"),
        ({"sigma": torch.ones(3)}, ValueError, r"sigma.*one number per sample, shape \[2\], not \[3\]"),
        ({"sigma": torch.ones(2, dtype=torch.int32)}, TypeError, "sigma.*float16.*not int32"),
        ({"sigma": torch.ones(2, device="meta")}, ValueError, "sigma.*meta.*pred.*cpu"),
        ({"weight": 1.0}, TypeError, r"weight.*None.*tensor \[B\], not float"),
        (
            {"weight": torch.ones(2, 1)},
            ValueError,
            r"weight.*one number per sample, shape \[2\], not \[2, 1\]",
        ),
        ({"weight": torch.tensor([1.0, -2.0])}, ValueError, "weight.*not.*negative.*-2"),
        ({"weight": torch.tensor(1.0)}, ValueError, r"shape \[2\], not \[\]"),
        ({"mask": [True]}, TypeError, "mask.*None.*tensor, not list"),
        (
            {"mask": torch.ones(2, 3, dtype=torch.int64)},
            TypeError,
            r"mask.*bool.*floating, not int64.*mask\.bool",
        ),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask \[2, 4\].*not broadcast.*pred \[2, 3\]"),
        ({"mask": torch.ones(1, 2, 3)}, ValueError, r"mask \[1, 2, 3\] does not broadcast"),
        ({"mask": torch.full((2, 3), -1.0)}, ValueError, "mask.*not.*negative.*-1"),
        ({"mask": torch.ones(3, device="meta")}, ValueError, "mask.*meta.*pred.*cpu"),
        ({"distance": "max"}, ValueError, 'distance must be "mean" or "sum", not \'max\''),
        ({"reduction": "max"}, ValueError, 'reduction must be "none" or "mean" or "sum", not \'max\''),
        ({"divergence": "kll"}, ValueError, "unknown divergence 'kll'; closest: kl"),
        ({"grad_scale": "2"}, TypeError, "grad_scale.*number"),
        ({"grad_scale": np.float32(2)}, TypeError, r"not np.float32\(2.0\); pass float\(grad_scale\)"),
        (
            {"grad_scale": torch.ones(2)},
            ValueError,
            r"grad_scale.*number.*tensor \[\], not.*shape \[2\]",
        ),
        ({"grad_out": ONES.to_sparse()}, TypeError, "grad_out.*dense tensor"),
        ({"grad_out": torch.ones(3, 2)}, ValueError, "grad_out.*pred.*equal shapes"),
        ({"grad_out": ONES.double()}, TypeError, "grad_out.*dtype.*pred, float32, not float64"),
        ({"grad_out": ONES.clone().requires_grad_()}, ValueError, "grad_out.*written.*place"),
        ({"grad_out": ONES}, ValueError, r"grad_out.*not share.*storage.*pred.*empty_like\(pred\)"),
        ({"pred": ONES.clone(), "grad_out": ONES}, ValueError, "grad_out.*not share.*storage.*target"),
        ({"pred": BOTH[0], "grad_out": BOTH[1]}, ValueError, "grad_out.*not share.*storage.*pred"),
        ({"mask": BOTH[0], "grad_out": BOTH[1]}, ValueError, "grad_out.*not share.*storage.*mask"),
        ({"grad_out": torch.ones(1, 3).expand(2, 3)}, ValueError, "grad_out.*not.*expanded tensor"),
        ({"grad_out": torch.ones(2, 3)._neg_view()}, ValueError, "grad_out.*not.*negative bit"),
    ],
)
def test_gaussian_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"pred": ONES, "target": ONES, **arguments}
    with pytest.raises(error, match=message):
        fk.gaussian_divergence_value_and_grad(**arguments)
    if not {"grad_scale", "grad_out"} & set(arguments):
        with pytest.raises(error, match=message):
            fk.gaussian_divergence(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"log_ratio_p": torch.ones(3).cfloat()},
            TypeError,
            r"log_ratio_p.*float16.*view_as_real\(log_ratio_p\)",
        ),
        (
            {"log_ratio_p": torch.ones(4), "reduction": "none"},
            ValueError,
            r"log_ratio_p.*\[4\].*log_ratio_q \[3\]",
        ),
        ({"mask": torch.ones(4)}, ValueError, r"mask \[4\].*not broadcast.*log_ratio_p \[3\]"),
    ],
)
def test_variational_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"log_ratio_p": torch.ones(3), "log_ratio_q": torch.ones(3), **arguments}
    for function in (fk.variational_divergence, fk.variational_divergence_value_and_grad):
        with pytest.raises(error, match=message):
            function(**arguments)


FUNCTIONS = {
    fk.squared_distance: ("pred", "target"),
    fk.gaussian_divergence: ("pred", "target"),
    fk.gaussian_divergence_value_and_grad: ("pred", "target"),
    fk.variational_divergence: ("log_ratio_p", "log_ratio_q"),
    fk.variational_divergence_value_and_grad: ("log_ratio_p", "log_ratio_q"),
    fk.variational_model_loss: ("log_ratio_q",),
    fk.density_ratio_divergence: ("log_ratio",),
    fk.density_ratio_divergence_value_and_grad: ("log_ratio",),
}
WRONG: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "divergence": [
        ("helinger", ValueError, "unknown divergence 'helinger'; closest: squared_hellinger"),
        ("alpha:0", ValueError, 'alpha must not be 0.*"reverse_kl": use that'),
        ("alpha:1", ValueError, 'alpha must not be 1.*"kl": use that'),
        (None, TypeError, "divergence must be a name or a Divergence, not NoneType"),
    ],
    "sigma": [(0, ValueError, "sigma must be positive, not 0"), (-ONES[:, 0], ValueError, "smallest value is -1")],
    "weight": [
        (-ONES[:, 0], ValueError, "weight must not be negative, but its smallest value is -1"),
        (ONES[:, 0].int(), TypeError, "weight must be float16.* not int32"),
        (ONES[0], ValueError, r"weight must have one number per sample, shape \[2\], not \[3\]"),
        (ONES[:, 0].to("meta"), ValueError, "weight is on meta and .* on cpu"),
    ],
    "mask": [
        (-ONES, ValueError, "mask must not be negative, but its smallest value is -1"),
        (ONES.int(), TypeError, "mask must be bool or floating, not int32"),
        (ONES.T, ValueError, r"mask \[3, 2\] does not broadcast to .* \[2, 3\]"),
        (ONES.to("meta"), ValueError, "mask is on meta and .* on cpu"),
    ],
    "distance": [("max", ValueError, "distance must be")],
    "reduction": [("max", ValueError, "reduction must be")],
    "parametrization": [("gan", ValueError, 'parametrization must be "log_ratio" or "fgan", not \'gan\'')],
    "samples_from": [("r", ValueError, 'samples_from must be "q" or "p", not \'r\'')],
    "backend": [("cudda", ValueError, "backend asks for the unknown backend 'cudda'; known: .*torch")],
    "grad_scale": [
        ("2", TypeError, "grad_scale must be a number"),
        (ONES, ValueError, r"grad_scale must be a number or a tensor \[\]"),
    ],
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_refuses(function: Callable[..., Any]) -> None:
    tensors = dict.fromkeys(FUNCTIONS[function], ONES)
    for name in inspect.signature(function).parameters:
        for value, error, message in WRONG.get(name, []):
            with pytest.raises(error, match=message):
                function(**{**tensors, name: value})
    for name in tensors:
        with pytest.raises(TypeError, match=rf"{name} must be float16.*not int64.*{name}\.float\(\)"):
            function(**{**tensors, name: ONES.long()})
        with pytest.raises(TypeError, match=f"{name} must be float16.*not complex64.*view_as_real") as refusal:
            function(**{**tensors, name: ONES.cfloat()})
        assert ".float()" not in str(refusal.value)
        with pytest.raises(TypeError, match=f"{name} must be a tensor, not list"):
            function(**{**tensors, name: [1.0]})
        if len(tensors) > 1:
            with pytest.raises(ValueError, match="must.*one device.*on meta"):
                function(**{**tensors, name: ONES.to("meta")})
    if tensors.keys() & {"log_ratio", "log_ratio_q"}:
        with pytest.raises(ValueError, match='\'mse\'.*use "kl" or "jeffreys"'):
            function(**tensors, divergence="mse")


def test_values_of_tensors_are_read_on_the_cpu_only() -> None:
    # A meta tensor has no values: a look at them would raise.
    pred = torch.empty(2, 3, device="meta")
    sigma, mask = torch.empty(2, device="meta"), torch.empty(3, device="meta")
    assert fk.squared_distance(pred, pred, sigma, mask).shape == (2,)
