"""Per-sample gradients with torch.func: how much a divergence damps an outlier.

``python examples/per_sample_gradients.py`` takes a few seconds on a CPU. The same lines serve differentially private
training and influence functions: vmap over the samples makes one launch of the loss.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import fdu_kernels

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16))
parameters = {name: value.detach() for name, value in model.named_parameters()}
inputs, targets = torch.randn(32, 16), torch.randn(32, 16)
targets[0] *= 10  # one sample that the model cannot explain

for divergence in ("mse", "squared_hellinger"):

    def loss(parameters, x, target):
        """The loss of one sample."""
        predicted = functional_call(model, parameters, x[None])
        return fdu_kernels.gaussian_divergence(predicted, target[None], divergence)  # noqa: B023

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    norms = torch.sqrt(sum(gradient.flatten(1).square().sum(1) for gradient in gradients.values()))
    share = (norms[0] / norms.sum()).item()
    print(f"{divergence}: the outlier has {share:.0%} of the sum of all gradient norms")
