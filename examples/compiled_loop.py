"""A training step under torch.compile: model and loss in one graph, while alpha and sigma change every step.

``python examples/compiled_loop.py`` takes about a minute on a CPU, most of it for compiling. A divergence passed as an
argument of the compiled function is data: its parameter may change without another compilation as long as alpha stays
between 0 and 1. A name is a constant.
"""

import argparse

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fdu_kernels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
options = parser.parse_args()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
inputs = torch.randn(256, 16)
targets = inputs.flip(1)
counter = CompileCounterWithBackend(options.compiler)


@torch.compile(fullgraph=True, dynamic=True, backend=counter)
def training_loss(x, target, divergence, sigma):
    """Model and loss."""
    return fdu_kernels.gaussian_divergence(model(x), target, divergence, sigma)


for step in range(options.steps):
    # From squared_hellinger (alpha 1/2) towards kl (alpha 1), while sigma shrinks.
    alpha, sigma = 0.5 + 0.49 * step / options.steps, 1.0 - 0.5 * step / options.steps
    loss = training_loss(inputs, targets, fdu_kernels.get_divergence("alpha", alpha=alpha), sigma)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == options.steps - 1:
        graphs = counter.frame_count
        print(f"step {step}: alpha {alpha:.2f}, sigma {sigma:.2f}, loss {loss.item():.4f}, graphs {graphs}")
