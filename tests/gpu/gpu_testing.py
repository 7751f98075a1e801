"""Where the tests of this folder run: on a GPU, or in a rehearsal (FDU_REHEARSAL=1) on the CPU.

A rehearsal interprets Triton's kernels and emulates those of CUDA. It leaves out what is large and what only a GPU has.
"""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
REHEARSAL = not HAS_GPU and os.environ.get("FDU_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
ARCHITECTURE = "9.0"
"""For which a rehearsal builds CUDA kernels, as a machine with such a GPU would."""

anywhere = pytest.mark.skipif(not (HAS_GPU or REHEARSAL), reason="no CUDA device")
on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
