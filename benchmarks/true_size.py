"""Stable Diffusion 1.5 at its true size, on this machine: two steps of an erasure, saved, loaded, and an image drawn.

    python benchmarks/true_size.py [--record FILE]

The weights are random: 860 million parameters of the denoiser, in float32. Images have 256 pixels a side. The record
holds the peak of what PyTorch allocates beyond the weights, beside the estimate of ``fdu plan``.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_memory
import records
import shapes
import torch
from diffusers import DiffusionPipeline
from torch import nn

import fdu
from fdu.config import EraseConfig
from fdu.models.families import denoiser_of
from fdu.storage.shapes import load_shapes
from fdu.training.footprint import footprint

RECORD = records.HERE / "results" / "true_size.json"
SIDE = 256
SETTINGS: dict[str, Any] = {
    **{"max_train_steps": 2, "train_batch_size": 1, "num_latents": 2, "num_inference_steps": 1, "sample_batch_size": 1},
    "seed": 0,
}
FORMATS = ("lora", "kohya")


def save_configs(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline's folder without weights."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and not hasattr(part, "save_config"):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, nn.Module):
            part.save_config(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)


def measure(scale: shapes.Scale, side: int = SIDE) -> records.Row:
    """Erase, save in both formats, load each, and draw one image with it."""
    pipeline = shapes.sd15(scale)
    pipeline.set_progress_bar_config(disable=True)
    config = EraseConfig(resolution=side, **SETTINGS)
    row: records.Row = {"parameters": pipeline.unet.num_parameters(), "side": side, "settings": SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        save_configs(pipeline, Path(folder) / "configs")
        plan = footprint(denoiser_of(load_shapes(str(Path(folder) / "configs")), side), config)
        row["planned_bytes"] = max(plan.states + plan.step, plan.sampling)
        erased: list[fdu.ErasureResult] = []
        row["measured_bytes"] = bench_memory.once(
            lambda: erased.append(fdu.erase(pipeline, "house", "tree", config=config))
        )
        (result,) = erased
        row |= {"loss": result.history["loss"], "seconds": round(result.seconds, 1)}
        saved = {name: result.save(Path(folder) / name, save_as=name) for name in FORMATS}
        row["file_bytes"] = {
            name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for name, path in saved.items()
        }
        result.trainable.remove()
        images = {"none": _draw(pipeline, side)}
        for name, path in saved.items():
            fdu.load_weights(pipeline, str(path))
            images[name] = _draw(pipeline, side)
            pipeline.unload_lora_weights()
    row["formats_differ_by"] = float((images["lora"] - images["kohya"]).abs().max())
    row["image_changed_by"] = float((images["lora"] - images["none"]).abs().max())
    row["resident_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return row


def _draw(pipeline: DiffusionPipeline, side: int) -> torch.Tensor:
    drawn = pipeline(
        "a house by the sea",
        height=side,
        width=side,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return drawn.images[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, default=RECORD)
    started = time.perf_counter()
    found = measure(shapes.FULL)
    found["all_seconds"] = round(time.perf_counter() - started, 1)
    records.keep(parser.parse_args().record, "true_size", **found)
    print(found)
