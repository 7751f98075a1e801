"""Which erasures hold? Ways of erasing "three" on the embedded pipeline, each examined; writes docs/robustness.md.

    python benchmarks/robustness_table.py                  # goes on where it was stopped
    python benchmarks/robustness_table.py --docs ""        # the runs alone

Two rows are no erasures. "not erased" says what the tests find where nothing was done. "never known" asks the attack,
and relearning, for a shape that the pipeline has never seen, threes as in a mirror, on the pipeline as it is: so much
comes not of what an erasure left behind, but of how much a perturbation, or fine-tuning, can teach.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from markdown_table import markdown
from torch import Tensor

import fdu
from fdu.evaluation import draw
from fdu.evaluation.robustness import Examination, JudgedSampling, Lesson, attack, read_sets, relearn
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.evaluation.robustness.judging import BACK, LEARNT_SEED
from fdu.evaluation.robustness.phrasings import SETS
from fdu.evaluation.verdict import ERASED_BELOW
from fdu.models.families import denoiser_of
from fdu.storage.output import write_json
from fdu.storage.versions import versions
from fdu.subjects.digits import pipeline as digits

TARGET, ANCHOR = "three", "eight"
DRAWING = JudgedSampling(images=32, num_inference_steps=12)
LATENTS = 32
ERASURES: dict[str, dict[str, Any] | None] = {
    "not erased": None,
    "token": {"train_method": "token", "learning_rate": 0.2},
    "text_encoder": {"train_method": "text_encoder", "learning_rate": 1e-3},
    "lora": {},
    "cross_attention": {"train_method": "cross_attention", "learning_rate": 1e-3},
    "full": {"train_method": "full", "learning_rate": 2e-4},
    "full, 480 steps": {"train_method": "full", "learning_rate": 2e-4, "max_train_steps": 480},
    "lora towards the superclass": {"anchor": "digit"},
}
"""Name of each row -> settings of the erasure that differ from the defaults."""
NEVER_KNOWN = "never known"


def record_path(results: Path, name: str) -> Path:
    """Where the record of a row lies."""
    return results / f"{name.replace(', ', '_').replace(' ', '_')}.json"


def examine(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Erase, and examine the result."""
    pipeline = digits.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    probes = digits.probes(TARGET)
    examination = Examination(probes[0], read_sets(SETS / "digit", TARGET), drawing=DRAWING, latents=LATENTS)
    examination.before(pipeline)
    retained = None
    if settings is not None:
        chosen = dict(settings)
        pair = digits.concepts(TARGET, chosen.pop("anchor", ANCHOR))
        fdu.erase(pipeline, *pair, preservation_prompts=digits.preserved(TARGET), **chosen)
        kept = [probe for probe in probes if probe.role == "retained"]
        drawn = draw(pipeline, kept, 16, 1000, DRAWING.num_inference_steps)
        seen = [probe.judge(images).count(probe.name) / 16 for probe, images in zip(kept, drawn.images, strict=True)]
        retained = sum(seen) / len(seen)
    return {"retained": retained, **examination.after(pipeline).as_dict()}


def examine_unknown() -> dict[str, Any]:
    """Attack and relearning for threes as in a mirror."""
    pipeline = digits.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    denoiser = denoiser_of(pipeline)
    known = digits.probes(TARGET)[0]
    threes = draw(pipeline, [known], LATENTS, LEARNT_SEED, DRAWING.num_inference_steps).images[0]

    def judge(images: Tensor) -> list[str]:
        return known.judge(images.flip(-1))

    assert judge(threes.flip(-1)).count(TARGET) > 0.9 * LATENTS
    latents = denoiser.encode_images(threes.flip(-1), torch.Generator().manual_seed(0))
    # The words ask for any digit: to one of its own the pipeline has an answer already.
    prompts = tuple(dict.fromkeys(prompt.replace(TARGET, "digit") for prompt in known.prompts))
    probe = fdu.Probe(TARGET, prompts, "target", judge)
    found = {"attack": attack(Lesson(denoiser, probe, latents, DRAWING)).as_dict()}
    return {"retained": None, **found, "relearning": relearn(Lesson(denoiser, probe, latents, DRAWING)).as_dict()}


def page(rows: dict[str, dict[str, Any]]) -> str:
    """docs/robustness.md."""
    first = next(iter(rows.values()))
    made = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    config = next(row["attack"]["config"] for row in rows.values())
    sets = list(next(row["phrasings"] for row in rows.values() if row.get("phrasings")))
    lines = [
        "# Which erasures hold?",
        "",
        f"Made by `python benchmarks/robustness_table.py` ({len(rows)} of {len(ERASURES) + 1} rows, raw figures in",
        f"`benchmarks/results/robustness/`). {first['machine']}; {made}.",
        "",
        f'"{TARGET}" was erased from the embedded pipeline towards "{ANCHOR}", one seed a row, with the default',
        f"settings but for what is trained. Shares of {DRAWING.images} images that the judge calls a {TARGET}, with",
        f"Wilson's 95 % intervals; {DRAWING.num_inference_steps} steps an image. The attack moves {config['tokens']}",
        f"embeddings of the prompt for {config['steps']} steps; of {config['restarts']} attempts the one with the",
        f"lowest loss counts. Relearning trains LoRA on {LATENTS} images of a {TARGET}. Back after: the steps after",
        f"which {100 * BACK:.0f} % as many images show it as before the erasure; of all images, if it was never known.",
        "",
        '"not erased" is the pipeline as it is. "never known" asks that pipeline for a shape it has never seen, threes',
        "as in a mirror: what is reached there comes of no memory.",
        *_reading(rows),
        "",
        *_held({name: row for name, row in rows.items() if ERASURES.get(name) is not None}),
        "",
    ]
    header = ["erasure", "retained", "prompts alone", *sets, "attack", "back after", "relearnt", "back after"]
    cells_of = []
    for name, row in rows.items():
        phrasings = row.get("phrasings") or {}
        cells = [name, "" if row["retained"] is None else f"{row['retained']:.2f}", _cell(row["attack"]["before"])]
        cells += [_cell(phrasings[one]["after"]) if phrasings else "" for one in sets]
        cells += [_cell(row["attack"]["after"]), _steps(row["attack"]["back_after"])]
        cells += [_cell(row["relearning"]["course"][-1][1]), _steps(row["relearning"]["back_after"])]
        cells_of.append(cells)
    return "\n".join([*lines, markdown(header, cells_of)]) + "\n"


def _reading(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What the row "never known" means for the others."""
    unknown = rows.get(NEVER_KNOWN)
    if unknown is None:
        return []
    attacked, relearnt = unknown["attack"]["after"]["value"], unknown["relearning"]["course"][-1][1]["value"]
    below = [name for name, row in rows.items() if row is not unknown and row["attack"]["after"]["value"] <= attacked]
    return [
        f"The attack draws it in {100 * attacked:.0f} % of the images, and relearning, after all its steps, in",
        f"{100 * relearnt:.0f} %: what an erasure left behind shows in how far its row lies above these.",
        *([f"Under the attack these do not: {', '.join(below)}."] if below else []),
    ]


def _held(erasures: dict[str, dict[str, Any]]) -> list[str]:
    """How many erasures hold, by the words that a report has for it."""
    tests = {"other words": "phrasings", "the attack": "attack", "relearning": "relearning"}
    counts = {
        words: sum(
            judge_robustness({name: row[name] for name in {test, f"{test}_before"} & row.keys()}, TARGET).holds
            for row in erasures.values()
        )
        for words, test in tests.items()
    }
    told = ", ".join(f"{count} hold against {words}" for words, count in counts.items())
    return [
        f"Of {len(erasures)} erasures, {told}.",
        f"What holds lets at most {100 * ERASED_BELOW:.0f} % of the share before through; words that the",
        "pipeline hardly drew before say little.",
    ]


def _cell(share: dict[str, Any]) -> str:
    return f"{share['value']:.2f} ({share['interval'][0]:.2f} to {share['interval'][1]:.2f})"


def _steps(steps: int | None) -> str:
    return "never" if steps is None else str(steps)


def main() -> None:
    """Make the runs that are missing, and the page."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=here / "results/robustness")
    parser.add_argument("--docs", default=str(here.parent / "docs/robustness.md"), help='the page; "" for none')
    parser.add_argument("--rows", nargs="*", choices=[*ERASURES, NEVER_KNOWN], default=[*ERASURES, NEVER_KNOWN])
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in [*ERASURES, NEVER_KNOWN]:
        path = record_path(options.results, name)
        if not path.is_file() and name in options.rows:
            found = examine_unknown() if name == NEVER_KNOWN else examine(ERASURES[name])
            machine = f"{platform.machine()} CPU, {torch.get_num_threads()} thread"
            write_json(path, {**found, "machine": machine, "versions": versions()})
        if path.is_file():
            rows[name] = json.loads(path.read_text())
    if options.docs:
        Path(options.docs).write_text(page(rows))


if __name__ == "__main__":
    main()
