"""Training methods, one file per kind, and the frozen model beside the trained one."""

from __future__ import annotations

from fdu.training.methods.attach import attach
from fdu.training.methods.trainable import Trainable

__all__ = ["Trainable", "attach"]
