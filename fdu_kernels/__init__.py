"""Fused f-divergence losses for PyTorch: value and gradient over denoiser outputs and density-ratio estimates.

>>> import torch, fdu_kernels as fk
>>> pred, target = torch.zeros(2, 4, 8, 8, requires_grad=True), torch.ones(2, 4, 8, 8)
>>> round(fk.gaussian_divergence(pred, target, "squared_hellinger", sigma=0.5).item(), 4)
0.3935
"""

from fdu_kernels.backends import backends, use_backend
from fdu_kernels.catalogue import Divergence, divergences, get_divergence
from fdu_kernels.functional import (
    density_ratio_divergence,
    density_ratio_divergence_value_and_grad,
    gaussian_divergence,
    gaussian_divergence_value_and_grad,
    squared_distance,
    variational_divergence,
    variational_divergence_value_and_grad,
    variational_model_loss,
)
from fdu_kernels.modules import DensityRatioDivergenceLoss, GaussianDivergenceLoss, VariationalDivergenceLoss

__all__ = [
    "DensityRatioDivergenceLoss",
    "Divergence",
    "GaussianDivergenceLoss",
    "VariationalDivergenceLoss",
    "backends",
    "density_ratio_divergence",
    "density_ratio_divergence_value_and_grad",
    "divergences",
    "gaussian_divergence",
    "gaussian_divergence_value_and_grad",
    "get_divergence",
    "squared_distance",
    "use_backend",
    "variational_divergence",
    "variational_divergence_value_and_grad",
    "variational_model_loss",
]
