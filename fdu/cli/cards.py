"""Graphics cards by name: their memory and speed, for estimates."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

REACHED = 0.35
"""The share of a card's figure that an erasure is assumed to reach; we measured none. Trainings of large transformers
on many GPUs report 0.21 to 0.46 (Chowdhery et al. 2022, arXiv 2204.02311, table 3)."""


@dataclasses.dataclass(frozen=True)
class GraphicsCard:
    """What a vendor says of a card."""

    memory: float
    """GiB; less than the name says where error correction takes a part."""
    tflops: float
    """10^12 floating-point operations per second of its matrix units in half precision, without sparsity and summed in
    float32."""
    source: str
    """Where the speed is stated."""
    half: tuple[str, ...] = ("bf16", "fp16")
    """The values of --mixed_precision that the speed holds for."""


GA102 = "NVIDIA Ampere GA102 whitepaper"
ADA = "NVIDIA Ada whitepaper"
CARDS = {
    "rtx-3060": GraphicsCard(12, 25.5, f"twice its float32 speed (NVIDIA's specification), as in the {GA102}"),
    "rtx-3090": GraphicsCard(24, 71, GA102),
    "rtx-4070-ti-super": GraphicsCard(16, 88.2, f"twice its float32 speed (NVIDIA's specification), as in the {ADA}"),
    "rtx-4080": GraphicsCard(16, 97.5, ADA),
    "rtx-4090": GraphicsCard(24, 165.2, ADA),
    "rtx-5090": GraphicsCard(32, 209.5, "NVIDIA RTX Blackwell whitepaper"),
    "t4": GraphicsCard(15, 65, "NVIDIA T4 data sheet; it has no bf16", half=("fp16",)),
    "l4": GraphicsCard(22.5, 121, "NVIDIA L4 data sheet, half of the figure with sparsity"),
    "l40s": GraphicsCard(45, 362, "NVIDIA L40S data sheet"),
    "a100-40gb": GraphicsCard(40, 312, "NVIDIA A100 data sheet"),
    "a100-80gb": GraphicsCard(80, 312, "NVIDIA A100 data sheet"),
    "h100": GraphicsCard(79.6, 989, "NVIDIA H100 data sheet (SXM), half of the figure with sparsity"),
    "h200": GraphicsCard(140.4, 989, "NVIDIA H200 data sheet (SXM), half of the figure with sparsity"),
    "mi300x": GraphicsCard(192, 1307, "AMD Instinct MI300X data sheet"),
}
if TYPE_CHECKING:
    CardName = str
else:
    CardName = Literal[tuple(CARDS)]
