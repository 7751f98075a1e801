"""How good the emoji pipeline and its judges are: shares of images, and a contact sheet of real and drawn emoji."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from fdu.evaluation import Probe, draw
from fdu.subjects.embedded import Emoji
from fdu.subjects.emoji import emoji_pipeline
from fdu.subjects.emoji.classifier import EmojiClassifier
from fdu.subjects.emoji.drawings import jitter, on_backgrounds, read_backgrounds
from fdu.subjects.emoji.objects import (
    ALL_THINGS,
    BACKGROUNDS,
    STYLES,
    SUPERCLASSES,
    THINGS,
    background_phrases,
    nouns,
    prompt,
    style_phrases,
)

SAMPLING = Emoji().sampling.settings()
SHEET_STEP, SHEET_COLUMNS = 4, 7
"""The contact sheet shows every fourth object, seven in a row."""


@torch.no_grad()
def judge_accuracy(classifier: EmojiClassifier, drawings: Tensor, copies: int, seed: int) -> dict[str, float]:
    """The share of real emoji that the judges name right, on new jittered and softened copies of those they learnt
    from.

    Args:
        classifier: the judge.
        drawings: [objects, styles, 4, 64, 64], as :func:`fdu.subjects.emoji.drawings.load_drawings` gives them.
        copies: copies of each drawing.
        seed: random seed.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    right = torch.zeros(3)
    for style in list(range(len(STYLES))) * copies:
        backgrounds = torch.randint(len(BACKGROUNDS), (len(drawings),), generator=generator)
        images = on_backgrounds(jitter(drawings[:, style], generator), backgrounds)
        images = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, stride=1)
        things, styles = (logits.argmax(1) for logits in classifier(images))
        found = (things == torch.arange(len(drawings)), styles == style, read_backgrounds(images) == backgrounds)
        right += torch.stack([one.float().mean() for one in found])
    names = ("object", "style", "background")
    return dict(zip(names, (right / copies / len(STYLES)).tolist(), strict=True))


def measure(pipeline: StableDiffusionPipeline, data: Path, per_class: int, seed: int) -> dict[str, Any]:
    """The shares of samples that show what their prompt asks for. Every prompt names a style and a background.

    Args:
        pipeline: the emoji pipeline.
        data: the folder of the judge.
        per_class: images of each object, superclass and synonym.
        seed: seed of the first image of each.
    """
    judges = emoji_pipeline.judges(data)
    styles = [STYLES[place % len(STYLES)] for place in range(per_class)]
    backgrounds = [BACKGROUNDS[place % len(BACKGROUNDS)] for place in range(per_class)]
    phrases = [
        (style_phrases(style)[0], background_phrases(background)[0])
        for style, background in zip(styles, backgrounds, strict=True)
    ]

    def drawn(names: dict[str, str]) -> tuple[dict[str, float], list[Tensor]]:
        """The share of each name's images that show the class given for it, and the images."""
        probes = []
        for name, shown in names.items():
            prompts = tuple(prompt(nouns(name)[0], *phrase) for phrase in phrases)
            probes.append(Probe(shown, prompts, "retained", emoji_pipeline.judge_of(shown, judges)))
        images = draw(pipeline, probes, per_class, seed, **SAMPLING).images
        answers = [probe.judge(one) for probe, one in zip(probes, images, strict=True)]
        shares = [one.count(probe.name) / per_class for probe, one in zip(probes, answers, strict=True)]
        return dict(zip(names, shares, strict=True)), images

    def agreeing(kind: str, images: list[Tensor], wanted: list[str]) -> float:
        answers = map(judges[kind], images)
        return fmean([answer == name for one in answers for answer, name in zip(one, wanted, strict=True)])

    by_object, images = drawn({thing.name: thing.name for thing in THINGS})
    by_superclass, _ = drawn({name: name for name in SUPERCLASSES})
    by_synonym, _ = drawn({name: thing.name for thing in THINGS for name in thing.synonyms})
    held_out, _ = drawn({thing.name: thing.name for thing in ALL_THINGS if thing.held_out})
    return {
        "images_per_class": per_class,
        "object_accuracy": fmean(by_object.values()),
        "style_accuracy": agreeing("style", images, styles),
        "background_accuracy": agreeing("background", images, backgrounds),
        "superclass_accuracy": fmean(by_superclass.values()),
        "synonym_accuracy": fmean(by_synonym.values()),
        "held_out_accuracy": fmean(held_out.values()),
        "objects_below_1": {name: share for name, share in by_object.items() if share < 1},
        "superclasses_below_1": {name: share for name, share in by_superclass.items() if share < 1},
        "synonyms_below_1": {name: share for name, share in by_synonym.items() if share < 1},
    }


def contact_sheet(pipeline: StableDiffusionPipeline, drawings: Tensor, seed: int) -> Image.Image:
    """Every fourth object in every style: the real emoji, and below each what the pipeline draws."""
    cells = []
    for thing in THINGS[::SHEET_STEP]:
        prompts = tuple(prompt(nouns(thing.name)[0], style_phrases(style)[0]) for style in STYLES)
        probe = Probe(thing.name, prompts, "retained", list)
        white = torch.zeros(len(STYLES), dtype=torch.long)
        real = on_backgrounds(drawings[ALL_THINGS.index(thing)], white)
        (images,) = draw(pipeline, [probe], len(STYLES), seed, **SAMPLING).images
        cells.append(torch.cat([torch.cat(list(real), 2), torch.cat(list(images), 2)], 1))
    cells += [torch.ones_like(cells[0])] * (-len(cells) % SHEET_COLUMNS)
    rows = [torch.cat(cells[start : start + SHEET_COLUMNS], 2) for start in range(0, len(cells), SHEET_COLUMNS)]
    pixels = torch.cat(rows, 1).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())
