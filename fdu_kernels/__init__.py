"""f-divergence losses for PyTorch: value and gradient from denoiser outputs or from density-ratio estimates.

    import fdu_kernels as fk

    loss = fk.gaussian_divergence(pred, target, "squared_hellinger")      # like F.mse_loss; target is a constant
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, "alpha:0.3")    # no autograd graph

docs/losses.md has the arguments, docs/mathematics.md the formulas, docs/design.md a map of the modules.
"""

from fdu_kernels.catalogue import divergences, get_divergence
from fdu_kernels.divergence import Divergence
from fdu_kernels.functional import (
    density_ratio_divergence,
    density_ratio_divergence_value_and_grad,
    gaussian_divergence,
    gaussian_divergence_value_and_grad,
    squared_distance,
    variational_divergence,
    variational_divergence_value_and_grad,
    variational_model_loss,
    warm_up,
)
from fdu_kernels.modules import DensityRatioDivergenceLoss, GaussianDivergenceLoss, VariationalDivergenceLoss
from fdu_kernels.registry import backends, use_backend

__all__ = [
    "DensityRatioDivergenceLoss", "Divergence", "GaussianDivergenceLoss", "VariationalDivergenceLoss", "backends",
    "density_ratio_divergence", "density_ratio_divergence_value_and_grad", "divergences", "gaussian_divergence",
    "gaussian_divergence_value_and_grad", "get_divergence", "squared_distance", "use_backend",
    "variational_divergence", "variational_divergence_value_and_grad", "variational_model_loss", "warm_up",
]  # fmt: skip
