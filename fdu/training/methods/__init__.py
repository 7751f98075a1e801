"""Training methods, one file per kind, and the frozen model next to the trained one."""

from __future__ import annotations

from fdu.training.methods.trainable import Request, Trainable, attach

__all__ = ["Request", "Trainable", "attach"]
