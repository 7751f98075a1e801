"""Memory of an erasure from published models, by the settings that save it: ``python vram.py`` writes docs/memory.md.

``configs/NAME.json`` holds a model's published configs and names their sources. Nothing is downloaded or trained:
``fdu plan`` estimates from shapes alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fdu import cli
from fdu.config import EraseConfig
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of
from fdu.models.quantization import quantize
from fdu.storage.shapes import load_shapes
from fdu.training.footprint import Estimator

HERE = Path(__file__).parent
CONFIGS, PAGE = HERE / "configs", HERE.parent / "docs" / "memory.md"
NAMES = (
    *("sd15", "sd21", "sdxl", "sd35-medium", "sd35-large", "flux1-schnell", "flux1-dev"),
    *("flux2-klein-base-4b", "flux2-dev", "qwen-image", "z-image"),
)
NO_SIZE = {"flux1-schnell": 1024, "flux1-dev": 1024}
"""Resolution of models that state none."""
LEAST = (
    *("--mixed_precision", "bf16", "--gradient_checkpointing", "--optimizer", "adamw_8bit"),
    *("--train_batch_size", "1", "--sample_batch_size", "1"),
)
"""Options of the plan that needs least memory."""


def unpack(name: str, folder: Path) -> Path:
    """Write the configs of a model as the folder of a pipeline without weights."""
    for file, config in json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))["files"].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def check() -> dict[str, Any]:
    """Run ``fdu plan`` on every model: parameters of the denoiser and seconds of the CPU; and the memory of it all."""
    models = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as told:
            size = ["--resolution", str(NO_SIZE[name])] if name in NO_SIZE else []
            started = time.process_time()
            if cli.main(["plan", str(unpack(name, Path(folder))), *size, *LEAST]) != cli.OK:
                raise SystemExit(f"fdu plan failed for {name}")
            seconds = time.process_time() - started
        lines = [line.split() for line in told.getvalue().splitlines()]
        counts = {line[0]: int(line[1].replace(",", "")) for line in lines if line[2:3] == ["parameters"]}
        models[name] = [counts.get("transformer", counts.get("unet")), seconds]
    return {"models": models, "bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


LEAN: dict[str, Any] = {
    **{"mixed_precision": "bf16", "gradient_checkpointing": True, "train_batch_size": 1, "sample_batch_size": 1}
}
"""Settings of all columns."""
COLUMNS = ("bf16, `--gradient_checkpointing`", "`--optimizer adamw_8bit`", "`--quantization nf4`", "`--offload`")


def peaks(name: str) -> list[str]:
    """The cells of a model's row."""
    eight_bit = EraseConfig(**LEAN, optimizer="adamw_8bit", resolution=NO_SIZE.get(name))
    with tempfile.TemporaryDirectory() as folder:
        unpack(name, Path(folder))
        estimate = Estimator(lambda config, quantization: shapes(folder, config, quantization))
        columns = [estimate(dataclasses.replace(eight_bit, optimizer="adamw")), estimate(eight_bit)]
        columns += [estimate(eight_bit, "nf4")]
        columns += [estimate(eight_bit, "nf4", offload=True)] if columns[0].blocks else []
        height = shapes(folder, eight_bit, "none").height
    cells = [
        f"{one.peak / 2**30:.1f} ({max(one.training, one.denoiser + one.sampling) / 2**30:.1f})" for one in columns
    ]
    model = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))["model"]
    return [model, str(height), *cells, *[""] * (len(COLUMNS) - len(cells))]


def shapes(folder: str, config: EraseConfig, quantization: str) -> Denoiser:
    """The denoiser of a model in shapes alone."""
    pipeline = load_shapes(folder, "bfloat16")
    quantize(pipeline, quantization)
    return denoiser_of(pipeline, config.resolution)


def page(cells: list[list[str]]) -> str:
    """The page with these rows."""
    header = ["model", "pixels", *COLUMNS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells])
    return f"""# Memory by model and options

`fdu plan` estimates these GiB from the published configs of each model, for a LoRA of rank {EraseConfig.rank} at the
model's own resolution, with `--mixed_precision bf16 --train_batch_size 1 --sample_batch_size 1`. Each column adds its
options to those of the columns before it. The first number is the peak, while all parts of the pipeline are on the
device to encode the prompts. The number in brackets is the peak afterwards, while latents are drawn and the LoRA is
trained. A GPU's context and allocator take some more: leave a tenth of its memory free. No GPU has confirmed the
numbers yet.

{table}

A step takes one erasing and one preserving sample here (`--train_batch_size 1`); with `--gradient_accumulation_steps`
it takes more of them in the same memory. A smaller `--resolution` needs less. `--offload` serves transformers alone.

`python benchmarks/vram.py` writes this page. The files in [benchmarks/configs](../benchmarks/configs) hold the configs
and name their sources.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only run fdu plan on every model, and print figures")
    if parser.parse_args().check:
        print(json.dumps(check()))
        sys.exit()
    rows: list[list[str]] = []
    for one in NAMES:
        rows.append(peaks(one))
        PAGE.write_text(page(rows), encoding="utf-8")
