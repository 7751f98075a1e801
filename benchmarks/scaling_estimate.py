"""Training on 8 and on 64 GPUs, estimated: writes docs/scaling.md. Run ``python benchmarks/scaling_estimate.py``.

Counted exactly, on models without memory: parameters, and the floating-point operations of one sample's step (forward
and backward pass of the trained denoiser, forward pass of the frozen one). Assumed: what a GPU and its links reach, as
named constants with their sources below. A GPU record in results/gpu/ replaces the assumed share of the peak by the
measured one.

A step takes the longer of computing and communicating if they overlap wholly, and their sum if they do not; the truth
lies between. All-reduce of P bytes over n GPUs: each sends and receives 2 (n-1)/n P; all-gather and reduce-scatter half
of that. Between machines every GPU has a link of its own and carries the share of P that it holds after the exchange
inside its machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sd15_shape
import sdxl_shape
import torch
from diffusers import UNet2DConditionModel
from gpu_bounds import training_rows
from markdown_table import markdown
from peft import LoraConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fdu.config import EraseConfig
from fdu.models.unet import UNetDenoiser
from fdu.storage.versions import versions

HERE = Path(__file__).parent
METHODS = ("lora", "cross_attention", "full")
GPUS = (8, 64)
BATCHES = (1, 2, 4, 8, 16)
"""Samples a GPU and step that go through the trained denoiser."""
MILLION = 1_000_000


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number that the estimate rests on."""

    name: str
    value: float
    unit: str
    source: str


PEAK = Constant(
    "bf16 matrix peak of an H100 SXM, dense", 989.4e12, "FLOP/s", "NVIDIA H100 data sheet (1,979 with sparsity, halved)"
)
SHARE = Constant("share of that peak in a UNet's step", 0.35, "", "assumed: no GPU record yet")
NVLINK = Constant("NVLink 4 of a GPU, each way", 450e9, "B/s", "NVIDIA H100 data sheet (900 GB/s, both ways)")
INFINIBAND = Constant("InfiniBand NDR, a link a GPU", 50e9, "B/s", "NVIDIA ConnectX-7 data sheet (400 Gb/s)")
LINKS = Constant("share of a link that a collective reaches", 0.8, "", "assumed")
LATENCY = Constant("latency of a hop of a collective", 5e-6, "s", "assumed")
BUCKET = Constant(
    "gradients that DDP sends at a time", 25 * 2**20, "B", "torch.nn.parallel.DistributedDataParallel's default"
)
MACHINE = Constant("GPUs in a machine", 8, "", "DGX and HGX H100")
DISK = Constant("reading from one NVMe drive", 7e9, "B/s", "data sheets of PCIe 4.0 x4 drives (7.0 to 7.4 GB/s)")
CONSTANTS = (PEAK, SHARE, NVLINK, INFINIBAND, LINKS, LATENCY, BUCKET, MACHINE, DISK)


@dataclasses.dataclass(frozen=True)
class Model:
    """A denoiser's shape: how to make it, and what it reads."""

    name: str
    config: Callable[[], dict[str, Any]]
    latent: tuple[int, ...]
    context: int
    pooled: int = 0

    def build(self) -> UNet2DConditionModel:
        """The denoiser on the meta device: shapes, and no memory."""
        with torch.device("meta"):
            return UNet2DConditionModel(**self.config()).eval()

    def call(self, unet: UNet2DConditionModel) -> torch.Tensor:
        """What it predicts for one sample."""
        with torch.device("meta"):
            added = None
            if self.pooled:
                added = {"text_embeds": torch.empty(1, self.pooled), "time_ids": torch.empty(1, 6)}
            context = torch.empty(1, sd15_shape.TOKENS, self.context)
            steps = torch.empty(1, dtype=torch.int64)
            return unet(torch.empty(1, *self.latent), steps, context, added_cond_kwargs=added).sample


MODELS = (
    Model("Stable Diffusion 1.5", lambda: sd15_shape.unet_config(1, 1, 1), (4, 64, 64), 768),
    Model("Stable Diffusion XL", sdxl_shape.unet_config, (4, 128, 128), sum(sdxl_shape.CONTEXT), sdxl_shape.POOLED),
)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one denoiser and one way of training, for one sample."""

    model: str
    method: str
    parameters: int
    trained: int
    forward: int
    """Floating-point operations of the forward pass."""
    backward: int

    def flops(self, kept: bool = False) -> int:
        """Of a sample's part in a step; with kept outputs the frozen denoiser does not run."""
        return self.forward + self.backward + (0 if kept else self.forward)


def count(model: Model, method: str) -> Counts:
    """Parameters and operations, by counting a forward and a backward pass that compute nothing."""
    unet = model.build()
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    unet.requires_grad_(False)
    if method == "full":
        unet.requires_grad_(True)
    else:
        endings = UNetDenoiser.context_projections
        layers = [name for name, part in unet.named_modules() if isinstance(part, nn.Linear) and name.endswith(endings)]
        if method == "lora":
            with torch.device("meta"):
                unet.add_adapter(
                    LoraConfig(r=EraseConfig.rank, lora_alpha=EraseConfig.lora_alpha, target_modules=layers)
                )
        else:
            for name in layers:
                unet.get_submodule(name).requires_grad_(True)
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    with FlopCounterMode(display=False) as forward:
        predicted = model.call(unet)
    with FlopCounterMode(display=False) as backward:
        predicted.sum().backward()
    return Counts(model.name, method, parameters, trained, forward.get_total_flops(), backward.get_total_flops())


# Time


def all_reduce(size: float, gpus: int) -> float:
    """Seconds to add up ``size`` bytes over all GPUs: scattered inside the machines, added between them, gathered."""
    inside = int(min(gpus, MACHINE.value))
    machines = math.ceil(gpus / inside)
    seconds = 2 * (inside - 1) / inside * size / (NVLINK.value * LINKS.value) + 2 * (inside - 1) * LATENCY.value
    if machines > 1:
        between = 2 * (machines - 1) / machines * (size / inside) / (INFINIBAND.value * LINKS.value)
        seconds += between + 2 * (machines - 1) * LATENCY.value
    return seconds


def gather(size: float, gpus: int) -> float:
    """Seconds for every GPU to have all of ``size`` bytes, of which each holds its share: half an all-reduce."""
    return all_reduce(size, gpus) / 2


def bucketed(size: float, gpus: int, exchange: Callable[[float, int], float]) -> float:
    """The same in pieces of BUCKET."""
    buckets = max(1, math.ceil(size / BUCKET.value))
    return buckets * exchange(size / buckets, gpus)


def ddp(counts: Counts, gpus: int) -> float:
    """Seconds of communication a step: fp32 gradients of what is trained."""
    return bucketed(4 * counts.trained, gpus, all_reduce)


def fsdp(counts: Counts, gpus: int, kept: bool = False) -> float:
    """Seconds of communication a step, whose weights lie in shards: they are gathered in bf16 for each pass over the
    denoiser (frozen forward, forward, backward), and gradients scattered in fp32.

    As fdu's ``shard`` does it, what is trained beside frozen weights stays whole and its gradients are added up.
    """
    frozen = counts.parameters - counts.trained if counts.method == "cross_attention" else counts.parameters
    passes = 2 if kept else 3
    if counts.method == "full":
        return passes * bucketed(2 * counts.parameters, gpus, gather) + bucketed(4 * counts.trained, gpus, gather)
    return passes * bucketed(2 * frozen, gpus, gather) + ddp(counts, gpus)


def computing(counts: Counts, batch: int, share: float, kept: bool = False) -> float:
    """Seconds that a GPU computes for ``batch`` samples."""
    return batch * counts.flops(kept) / (PEAK.value * share)


def takes_over(counts: Counts, seconds: float, share: float, kept: bool = False) -> int:
    """The least batch a GPU with which computing takes at least as long as communicating for ``seconds``."""
    return max(1, math.ceil(seconds / computing(counts, 1, share, kept)))


def state_bytes(counts: Counts, gpus: int, sharded: bool) -> float:
    """Bytes a GPU for weights (fp32 as fdu keeps what is trained, bf16 where frozen), gradients and AdamW's moments."""
    frozen = max(0, counts.parameters - counts.trained) if counts.method == "cross_attention" else counts.parameters
    if counts.method == "full":
        frozen_bytes = 2 * counts.parameters  # the copy whose outputs are the target
        state = 16 * counts.trained
        return (frozen_bytes + state) / (gpus if sharded else 1)
    return 2 * frozen / (gpus if sharded else 1) + 16 * counts.trained


def measured_share(folder: Path, counted: Sequence[Counts]) -> Constant:
    """The largest share of the peak that a bf16 step of the GPU records reached, or the assumed one.

    The steps train keys and values of cross-attention; another GPU's peak is taken to be that of PEAK.
    """
    shares = []
    names = dict(zip(("sd15", "sdxl"), (model.name for model in MODELS), strict=True))
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        for row in training_rows(record):
            for counts in counted:
                if (counts.model, counts.method) != (names[row["model"]], "cross_attention"):
                    continue
                if row["loop"] == "fdu" and row["precision"] == "bf16":
                    share = row["images_per_s"] * counts.flops(row["kept"]) / PEAK.value
                    shares.append((share, f"measured on {record['machine'].get('device', 'a GPU')}, {path.name}"))
    if not shares:
        return SHARE
    share, source = max(shares)
    return dataclasses.replace(SHARE, value=share, source=source)


# The page


def constant_rows(share: Constant) -> list[list[str]]:
    """Name, value, source."""
    return [
        [constant.name, f"{constant.value:.4g} {constant.unit}".strip(), constant.source]
        for constant in (share if constant is SHARE else constant for constant in CONSTANTS)
    ]


def count_rows(counted: list[Counts]) -> list[list[str]]:
    """Parameters and operations."""
    return [
        [
            counts.model,
            f"`{counts.method}`",
            f"{counts.parameters / 1e6:.1f}",
            f"{counts.trained / 1e6:.2f}",
            f"{counts.forward / 1e12:.2f}",
            f"{counts.backward / 1e12:.2f}",
            f"{counts.flops() / 1e12:.2f}",
            f"{counts.flops(kept=True) / 1e12:.2f}",
        ]
        for counts in counted
    ]


def time_rows(counted: list[Counts], share: float) -> list[list[str]]:
    """A row a model, method, number of GPUs and way: communication, where it takes over, and memory."""
    rows = []
    for counts in counted:
        for gpus in GPUS:
            for way, seconds in (("DDP", ddp(counts, gpus)), ("FSDP", fsdp(counts, gpus))):
                steps = [
                    f"{1e3 * max(computing(counts, batch, share), seconds):.0f} to "
                    f"{1e3 * (computing(counts, batch, share) + seconds):.0f}"
                    for batch in (BATCHES[0], BATCHES[-1])
                ]
                rows.append(
                    [
                        counts.model.replace("Stable Diffusion", "SD"),
                        f"`{counts.method}`",
                        str(gpus),
                        way,
                        f"{1e3 * seconds:.1f}",
                        *steps,
                        str(takes_over(counts, seconds, share)),
                        f"{state_bytes(counts, gpus, way == 'FSDP') / 1e9:.1f}",
                    ]
                )
    return rows


def cache_rows(counted: list[Counts], share: float) -> list[list[str]]:
    """What a million kept outputs cost: bytes, GPU hours to make, and how fast they have to be read again."""
    rows = []
    for model in MODELS:
        counts = next(one for one in counted if one.model == model.name and one.method == "lora")
        size = math.prod(model.latent)
        rate = 1 / computing(counts, 1, share, kept=True)
        for name, width in (("fp32", 4), ("bf16", 2)):
            output = width * size
            making = MILLION * counts.forward / (PEAK.value * share) / 3600
            rows.append(
                [
                    model.name,
                    name,
                    f"{output / 1024:.0f}",
                    f"{MILLION * output / 1e9:.0f}",
                    f"{2 * MILLION * output / 1e9:.0f}",
                    f"{making:.1f}",
                    f"{rate * 2 * output / 1e6:.1f}",
                    f"{DISK.value / (2 * output) / rate:.0f}",
                ]
            )
    return rows


PAGE = """# Beyond one machine

Made by `python benchmarks/scaling_estimate.py`. An **estimate**: nothing here ran on several GPUs. Parameters and
operations are counted ({versions});
what hardware reaches is from data sheets or assumed, as the table says.

## Constants

{constants}

## What a sample costs

Millions of parameters; 10^12 floating-point operations (a multiply-add counts two) of one sample: the trained
denoiser's forward and backward pass, and a whole step with and without the frozen denoiser's forward pass. Preservation
(the default) brings as many samples again. The backward pass of `lora` and `cross_attention` still goes through the
whole denoiser, but makes no gradients of frozen weights.

{counts}

## Step time

Milliseconds. "communication": of one step, whatever the batch. "step": for {least} and for {most} samples a GPU, from
whole overlap (the longer of the two counts) to none (their sum). "takes over": the batch a GPU below which
communication takes longer than computing. "state": GB a GPU for weights, gradients and AdamW's moments, without
activations (frozen weights in bf16, trained ones and their state in fp32). FSDP gathers the frozen weights in every
pass; for `full`, which `fdu` itself trains by DDP only, it is FSDP as PyTorch has it.

{times}

By DDP, `lora` and `cross_attention` communicate for at most {small} of the time that even one sample a GPU computes.
FSDP pays for its memory with gathered weights: with `lora` on SDXL, {gpus} GPUs and one sample each communicate
{fsdp_verdict} times as long as they compute. For `full` training of SDXL by DDP, {gpus} GPUs need
{full_verdict} samples each before computing takes as long.

## Kept frozen outputs

One output (`frozen_batches` with `cache_dir`) is as large as the latents. For a million samples: GB on disk for the
outputs, and with x_t beside them; GPU hours to make them; MB/s that one GPU reads when it trains `lora` on both; and
how many GPUs one drive feeds.

{cache}

A kept output saves its forward pass each time that it is used again: {saved} of a step's operations
where not the whole denoiser is trained.
"""


def page(counted: list[Counts], share: Constant) -> str:
    """The estimate as Markdown."""
    rate = share.value
    lora, full = (next(c for c in counted if c.model == MODELS[1].name and c.method == m) for m in ("lora", "full"))
    slower = fsdp(lora, GPUS[-1]) / computing(lora, 1, rate)
    sparing = [one for one in counted if one.method != "full"]
    small = max(ddp(one, gpus) / computing(one, 1, rate) for one in sparing for gpus in GPUS)
    bound = takes_over(full, ddp(full, GPUS[-1]), rate)
    saved = [one.forward / one.flops() for one in sparing]
    found = versions()
    return PAGE.format(
        versions=", ".join(f"{name} {found[name]}" for name in ("torch", "diffusers", "peft")),
        constants=markdown(["constant", "value", "source"], constant_rows(share)),
        counts=markdown(
            ["model", "trained", "M", "M trained", "forward", "backward", "step", "step, kept outputs"],
            count_rows(counted),
        ),
        least=BATCHES[0],
        most=BATCHES[-1],
        times=markdown(
            [
                "model",
                "trained",
                "GPUs",
                "by",
                "communication",
                f"step, {BATCHES[0]}",
                f"step, {BATCHES[-1]}",
                "takes over",
                "state",
            ],
            time_rows(counted, rate),
        ),
        gpus=GPUS[-1],
        small=f"{small:.0%}",
        fsdp_verdict=f"{slower:.1f}",
        full_verdict=bound,
        cache=markdown(
            [
                "model",
                "kept in",
                "KiB an output",
                "GB, outputs",
                "GB, with x_t",
                "GPU hours to make",
                "MB/s a GPU",
                "GPUs a drive",
            ],
            cache_rows(counted, rate),
        ),
        saved=f"{min(saved):.0%} to {max(saved):.0%}",
    )


def main() -> None:
    """Count, estimate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="where scaling.md goes")
    parser.add_argument("--records", type=Path, default=HERE / "results" / "gpu", help="GPU records to measure by")
    options = parser.parse_args()
    counted = [count(model, method) for model in MODELS for method in METHODS]
    text = page(counted, measured_share(options.records, counted))
    print(text)
    (options.docs / "scaling.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
