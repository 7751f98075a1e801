"""Memory of an erasure from published models, by the settings that save it: ``python vram.py`` writes docs/memory.md.

``configs/NAME.json`` holds a model's published configs and names their sources; "made_of" says where they are no plain
copies, and "few_steps" how many steps the model is made for, if it is distilled. Nothing is downloaded or trained:
``fdu plan`` estimates from shapes alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fdu import cli
from fdu.cli.planning import flags
from fdu.config import TRAIN_METHODS, EraseConfig
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of
from fdu.models.quantization import quantize
from fdu.presets import PRESETS, preset
from fdu.storage.shapes import load_shapes
from fdu.training.footprint import SHARE, Estimator, Footprint

HERE = Path(__file__).parent
CONFIGS, PAGE = HERE / "configs", HERE.parent / "docs" / "memory.md"
NAMES = (
    *("sd15", "sd21", "sdxl", "sd35-medium", "sd35-large", "flux1-schnell", "flux1-dev"),
    *("flux2-klein-base-4b", "flux2-dev", "qwen-image", "z-image"),
)


def read(name: str) -> dict[str, Any]:
    """What the file of a model says."""
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def unpack(name: str, folder: Path) -> Path:
    """Write the configs of a model as the folder of a pipeline without weights."""
    for file, config in read(name)["files"].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def check() -> dict[str, Any]:
    """Run ``fdu plan`` on every model: parameters of the denoiser and seconds of the CPU; and the memory of it all."""
    models = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as told:
            started = time.process_time()
            if cli.main(["plan", str(unpack(name, Path(folder))), *LEAST]) != cli.OK:
                raise SystemExit(f"fdu plan failed for {name}")
            seconds = time.process_time() - started
        lines = [line.split() for line in told.getvalue().splitlines()]
        counts = {line[0]: int(line[1].replace(",", "")) for line in lines if line[2:3] == ["parameters"]}
        models[name] = [counts.get("transformer", counts.get("unet")), seconds]
    # ru_maxrss would count the process that started this one.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return {"models": models, "bytes": 1024 * int(peak)}


STEPS: dict[str, dict[str, Any]] = {
    "A": {"mixed_precision": "bf16", "train_batch_size": 1, "sample_batch_size": 1},
    "B": {"gradient_checkpointing": True},
    "C": {"optimizer": "adamw_8bit"},
    "D": {"quantization": "nf4"},
    "E": {"offload": True},
}
"""The columns of the table, and what each adds to those before it."""
LEAST = flags(STEPS["A"] | STEPS["B"] | STEPS["C"]).split()
"""Options of the plan that needs least memory, before the weights are stored in another way."""
CARDS = (8, 12, 16, 24, 48, 80)
"""Memory of devices, in GiB."""
PRESET_STEPS: tuple[dict[str, Any], ...] = ({"mixed_precision": "bf16"}, {"gradient_checkpointing": True})
"""What saves memory beside a preset, in turn."""
Figures = list[tuple[str, str]]
"""By options: the peak in GiB, and the peak after the prompts are encoded; as the page shows them."""


def rows(name: str) -> tuple[list[str], list[str], Figures, list[list[str]]]:
    """Of a model: what to begin with, its name and pixels, its figures by step, and the rows of its presets."""
    model = read(name)["model"]
    with tempfile.TemporaryDirectory() as folder:
        unpack(name, Path(folder))
        denoiser = shapes(folder, EraseConfig(), "none")
        needed = few_step_settings(name, denoiser)
        estimate = Estimator(lambda config, quantization: shapes(folder, config, quantization))
        figures: Figures = []
        blocks: tuple[int, ...] = ()
        for given in cumulative(STEPS.values()):
            settings = {key: value for key, value in given.items() if key in EraseConfig.field_names()}
            if blocks or "offload" not in given:
                config = EraseConfig(**settings, **needed)
                found = estimate(config, given.get("quantization", "none"), "offload" in given)
                figures, blocks = [*figures, gib(found)], found.blocks
        named = []
        for label in presets_of(model, denoiser):
            tried = [preset(label, **settings) for settings in cumulative(PRESET_STEPS)]
            named.append([label, model, *(gib(estimate(config))[0] for config in tried)])
    return beginning(name, denoiser), [model, str(denoiser.height)], figures, named


def few_step_settings(name: str, denoiser: Denoiser) -> dict[str, Any]:
    """The settings without which a model distilled to few steps is refused; none for others."""
    if not denoiser.few_steps:
        return {}
    steps = read(name)["few_steps"]
    scale = denoiser.unguided_scale
    return {"timestep_sampling": "inference", "num_inference_steps": steps, "sampling_guidance": scale}


def presets_of(model: str, denoiser: Denoiser) -> list[str]:
    """The presets that were published for a model; none for one of few steps, at whose timesteps none trains."""
    return [name for name, one in PRESETS.items() if model.startswith(one.models) and not denoiser.few_steps]


def beginning(name: str, denoiser: Denoiser) -> list[str]:
    """A model's name, its presets, the options that it needs, and those that it has beside others."""
    model = read(name)["model"]
    presets = ", ".join(f"`--preset {label}`" for label in presets_of(model, denoiser))
    needed = flags(few_step_settings(name, denoiser))
    guided = f"`--embedded_guidance` (default {EraseConfig.embedded_guidance:g})" if denoiser.reads_guidance else ""
    return [model, presets or "the defaults", f"`{needed}`" if needed else "", guided]


def cumulative(steps: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step with those before it."""
    return list(itertools.accumulate(steps, lambda former, step: former | step))


def gib(found: Footprint) -> tuple[str, str]:
    """The two peaks of an estimate."""
    return f"{found.peak / 2**30:.1f}", f"{max(found.training, found.denoiser + found.sampling) / 2**30:.1f}"


def first_that_fits(peaks: Iterable[str], card: int) -> int | None:
    """The place of the first peak that leaves a device enough memory."""
    return next((place for place, peak in enumerate(peaks) if float(peak) <= SHARE * card), None)


def smallest(peaks: list[str], options: list[str]) -> list[str]:
    """The cells of the smallest device and of the options for it."""
    for card in CARDS:
        place = first_that_fits(peaks, card)
        if place is not None:
            return [f"{card} GiB", f"`{options[place]}`"]
    return ["none of these", ""]


def shapes(folder: str, config: EraseConfig, quantization: str) -> Denoiser:
    """The denoiser of a model in shapes alone."""
    pipeline = load_shapes(folder, "bfloat16")
    quantize(pipeline, quantization)
    return denoiser_of(pipeline, config.size)


def table(header: list[str], cells: list[list[str]]) -> str:
    """A table of the page."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells])


def page(models: list[tuple[list[str], Figures]], presets: list[list[str]], beginnings: list[list[str]]) -> str:
    """The page: of models their names, pixels and figures, the rows of the presets, and what to begin with."""
    letters, options = list(STEPS), [flags(step) for step in cumulative(STEPS.values())]
    columns = [f"{letter}: {'+ ' * (letter != 'A')}`{flags(step)}`" for letter, step in STEPS.items()]
    memory, chosen = [], []
    for named, figures in models:
        cells = [f"{peak} ({later})" for peak, later in figures]
        memory.append([*named, *cells, *[""] * (len(STEPS) - len(cells))])
        peaks = [peak for peak, _ in figures]
        places = [first_that_fits(peaks, card) for card in CARDS]
        chosen.append([named[0], *("" if place is None else letters[place] for place in places)])
    adapting = ", ".join(name for name in PRESETS if TRAIN_METHODS[preset(name).train_method].result != "weights")
    words = [f"--preset NAME {flags(step)}" for step in cumulative(PRESET_STEPS)]
    beside = [[*row, *smallest(row[2:], [one.replace("NAME", row[0]) for one in words])] for row in presets]
    made = [(read(name)["model"], read(name).get("made_of")) for name in NAMES]
    copied = ", ".join(model for model, how in made if how is None)
    return f"""# Memory by model and options

`fdu plan` estimates these GiB from the published configs of each model, for a LoRA of rank {EraseConfig.rank} at the
model's own resolution. No GPU has confirmed them yet.

## Which settings for my model

Begin with a preset or with the defaults, and add what the model needs. A guidance-distilled model reads a guidance
scale; `--embedded_guidance` is the one that it is told while it trains.

{table(["model", "begin with", "needed for few steps", "guidance-distilled"], beginnings)}

## Which options for my card

The first options that fit, by the memory of the card. A letter stands for its own options and those of the letters
before it. The estimate fills at most {SHARE:.0%} of the card, because a context and an allocator take some more.

{table(["model", *(f"{card} GiB" for card in CARDS)], chosen)}

{chr(10).join(f"* **{letter}**: `{words}`" for letter, words in zip(letters, options, strict=True))}

Quantization and offloading go with the presets that train a LoRA ({adapting}), as in the table above; the others train
weights.

{table(["preset", "model", *(f"`{one}`" for one in words), "card", "options"], beside)}

## The estimates

The first number is the peak, while all parts of the pipeline are on the device to encode the prompts. The number in
brackets is the peak afterwards, while latents are drawn and the LoRA is trained. With `--offload` the text encoders
read on the CPU, so both are the same.

{table(["model", "pixels", *columns], memory)}

A step takes one erasing and one preserving sample here (`--train_batch_size 1`); with `--gradient_accumulation_steps`
it takes more of them in the same memory. A smaller `--resolution` needs less. `--offload` serves transformers alone.
`fdu evaluate` takes the same `--quantization` and `--offload`.

## The configs

`python benchmarks/vram.py` writes this page. The files in `benchmarks/configs` hold the configs
and name their sources. None comes from its publisher directly. Copies of the published files are those of
{copied}. Of the others some details may differ:

{chr(10).join(f"* {model}: {how}." for model, how in made if how is not None)}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only run fdu plan on every model, and print figures")
    if parser.parse_args().check:
        print(json.dumps(check()))
        sys.exit()
    beginnings, named, figures, presets = zip(*map(rows, NAMES), strict=True)
    text = page(list(zip(named, figures, strict=True)), [row for rows in presets for row in rows], list(beginnings))
    PAGE.write_text(text, encoding="utf-8")
