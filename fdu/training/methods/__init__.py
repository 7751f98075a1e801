"""What is trained, a file for each kind of method, and the frozen model beside it."""

from __future__ import annotations

from fdu.training.methods.attach import attach
from fdu.training.methods.trainable import Trainable

__all__ = ["Trainable", "attach"]
