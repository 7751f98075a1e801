"""The emoji pipeline: a latent text-to-image pipeline of 195 objects in four styles; its concepts, probes and judges.

An ordinary diffusers ``StableDiffusionPipeline`` folder of 13 MB, trained from scratch by ``train_emoji.py`` on open
sets of emoji. No penalty separates its text embeddings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from fdu.concepts import Concept
from fdu.config import closest
from fdu.evaluation import Judge, Probe
from fdu.evaluation.drawing import Attribute, Group, Role
from fdu.evaluation.features import ModuleFeatures
from fdu.subjects.emoji.classifier import EmojiClassifier
from fdu.subjects.emoji.drawings import read_backgrounds
from fdu.subjects.emoji.objects import (
    ALL_THINGS,
    BACKGROUNDS,
    BY_NAME,
    FRAMES,
    NAMES,
    STYLES,
    SUPERCLASSES,
    THINGS,
    Thing,
    background_phrases,
    members,
    nouns,
    prompt,
    style_phrases,
)

DATA = Path(__file__).parent / "data"
PIPELINE_FOLDER, CLASSIFIER_FILE = DATA / "pipeline", "classifier.safetensors"

ANY_STYLE = "emoji"
"""The anchor of a style that stands for no style."""
OBJECTS = tuple(thing.name for thing in THINGS)
SEEN_FRAMES, UNSEEN_FRAMES = FRAMES[:4], FRAMES[4:]
"""Frames that erasures train on, and others that they never see."""
PROMPTS = 40
"""Prompts of a concept; a superclass has one per object if that is more."""
NEAR, FAR = 8, 8
"""The most neighbours, and the unrelated objects, that an evaluation draws."""
FAR_KEPT = 32
"""Objects of all superclasses to preserve besides the relatives, since an erasure also harms what only looks like its
target, such as an orange fruit beside a fox. An evaluation draws others, unless a wide superclass is erased."""
SPREAD = tuple(THINGS[61 * place % len(THINGS)] for place in range(len(THINGS)))
"""The objects in an order in which any few that follow one another are of many superclasses."""

NOTES = (
    "The images come from the emoji pipeline of fdu, trained from scratch on Noto Emoji (Google, Apache 2.0), Twemoji "
    "(Twitter, CC BY 4.0) and Fluent Emoji (Microsoft, MIT). The judge of objects and styles is a classifier trained "
    "only on the real emoji; backgrounds are read from the pixels at the edge. On new, slightly moved copies of these "
    "emoji it names every object and style right; its errors on other drawings are unknown.",
    "The text encoder of this small pipeline was trained with it, on short prompts about its own objects. A real CLIP "
    "knows more of what words mean. These figures compare methods and settings; they do not measure the effect on a "
    "large model.",
)
"""Notes on results from the emoji pipeline."""
JUDGE = "emoji classifier"
JUDGE_LAYERS = ("thing.3", "thing.7", "thing.11", "thing.15", "style.3", "style.7")
"""Submodules of the classifier: the outputs of its convolutional blocks."""
JUDGE_FEATURES = ("thing.16", "style.16")
"""The inputs of its last layers: the flattened outputs of the blocks."""


def load_classifier(folder: Path = DATA) -> EmojiClassifier:
    """The judge, which learnt from real emoji and never saw the pipeline."""
    classifier = EmojiClassifier()
    classifier.load_state_dict(load_file(folder / CLASSIFIER_FILE))
    return classifier.eval().requires_grad_(False)


@functools.cache
def judges(folder: Path = DATA) -> dict[str, Judge]:
    """The judges of "object", "style" and "background"."""
    classifier = load_classifier(folder)

    def judge(names: Sequence[str], read: Callable[[Tensor], Tensor]) -> Judge:
        return lambda images: [names[index] for index in read(images)]

    return {
        "object": judge([thing.name for thing in ALL_THINGS], lambda images: classifier(images)[0].argmax(1)),
        "style": judge(STYLES, lambda images: classifier(images)[1].argmax(1)),
        "background": judge(BACKGROUNDS, read_backgrounds),
    }


def judge_of(name: str, known: Mapping[str, Judge] | None = None) -> Judge:
    """The judge that recognises an object, a style, or a superclass in each of its objects.

    Args:
        name: the class.
        known: the judges; None: those of the package.
    """
    known = known or judges()
    if name in STYLES:
        return known["style"]
    judge = known["object"]
    if name not in SUPERCLASSES:
        return judge
    inside = {thing.name for thing in ALL_THINGS if name in thing.superclasses}
    return lambda images: [name if seen in inside else seen for seen in judge(images)]


def features() -> ModuleFeatures:
    """The judge's penultimate features, of object and style, with the outputs of its convolutional blocks as layers."""
    return ModuleFeatures(load_classifier(), JUDGE_LAYERS, JUDGE_FEATURES, JUDGE, 256)


def kind_of(target: str) -> str:
    """The type of concept for the packaged phrasings."""
    return "emoji style" if target in STYLES else "emoji"


def concepts(target: str, anchor: str) -> tuple[Concept, Concept]:
    """Target and anchor in the words of the pipeline, prompts aligned.

    Args:
        target: an object ("fox"), a superclass ("bird") or a style ("twemoji").
        anchor: another object or superclass; for a style another style, or "emoji", which stands for no style.

    Raises:
        ValueError: a name the pipeline does not know, or an anchor that does not go with the target.
    """
    check_target(target)
    known = (*STYLES, ANY_STYLE) if target in STYLES else (*SUPERCLASSES, *OBJECTS)
    if anchor not in known:
        kinds = f"one of {', '.join(known)}" if target in STYLES else "an object or a superclass, as the target is"
        raise ValueError(f"anchor must be {kinds}, got {anchor!r}{_hint(anchor, known)}")
    if anchor == target or (target in SUPERCLASSES and _inside(anchor) <= _inside(target)):
        raise ValueError(f"anchor {anchor!r} is the target {target!r} or a part of it; choose another anchor")
    pair = [tuple(one.text for one in phrases(target, name)) for name in (target, anchor)]
    return Concept(target, pair[0]), Concept(anchor, pair[1])


def check_target(target: str) -> None:
    """Refuse a target that the pipeline does not know.

    Raises:
        ValueError: neither an object, nor a superclass, nor a style.
    """
    if target not in NAMES:
        kinds = f"an object (such as {', '.join(OBJECTS[5:8])}), a superclass ({', '.join(SUPERCLASSES)})"
        kinds += f" or a style ({', '.join(STYLES)})"
        raise ValueError(f"target must be {kinds}, got {target!r}{_hint(target, NAMES)}")


def _hint(name: str, known: Sequence[str]) -> str:
    """The name that was probably meant."""
    owners = [thing.name for thing in THINGS if name in thing.synonyms]
    if owners:
        return f"; that is a synonym of {owners[0]!r}"
    if name in BY_NAME and BY_NAME[name].held_out:
        return "; the pipeline was trained without it"
    return "" if name in (*NAMES, ANY_STYLE) else closest(name, known)  # known, but of another kind


def _inside(name: str) -> set[str]:
    """The objects of a superclass; an object is its own."""
    return {thing.name for thing in members(name)} if name in SUPERCLASSES else {name}


def _gone(targets: Sequence[str]) -> set[str]:
    """What is erased with these targets: they, the objects of superclasses, and superclasses without other objects."""
    objects = set().union(*map(_inside, targets))
    return {*targets, *objects, *(name for name in SUPERCLASSES if _inside(name) <= objects)}


class Phrase(NamedTuple):
    """A prompt and what it names; "" for nothing."""

    text: str
    thing: str
    style: str
    background: str


def phrases(target: str, name: str, seen: bool = True) -> list[Phrase]:
    """Phrasings of ``target``, with ``name`` in its place: those of the training, or others that it never sees.

    Four of five name a style, every other a background. Unseen phrasings share no frame, noun or phrase with the seen
    ones, and an object's synonyms are among them. Those of a superclass name each of its objects in turn, and in every
    round in other styles and on other backgrounds.
    """
    frames = SEEN_FRAMES if seen else UNSEEN_FRAMES
    own = [target, *(thing.name for thing in SPREAD if target in thing.superclasses)]
    named = ("", *STYLES)
    again = 0
    found = []
    for place in range(max(PROMPTS, len(own))):
        words = 0 if seen else 1 + place // 2 % 2
        if target in STYLES:
            thing, style = SPREAD[2 * place + (not seen)].name, name
        else:
            turn = place if seen else place + PROMPTS
            again = turn // len(own) if len(own) > 1 else 0
            thing = own[turn % len(own)] if name == target else name
            style = named[(place + turn // math.lcm(len(own), len(named))) % len(named)]
        style = "" if style == ANY_STYLE else style
        shown = (place + place // 4 + again) % 2
        background = BACKGROUNDS[(place // 2 + again) % len(BACKGROUNDS)] if shown else ""
        synonyms = BY_NAME[thing].synonyms if thing in BY_NAME else ()
        options = nouns(thing)[:2] if seen else (*nouns(thing)[3:], *(nouns(word)[0] for word in synonyms))
        text = prompt(
            options[place // 4 % len(options)],
            style_phrases(style)[words] if style else "",
            background_phrases(background)[words] if background else "",
            frames[place % len(frames)],
        )
        found.append(Phrase(text, thing, style, background))
    return found


def relatives(target: str) -> list[Thing]:
    """The objects close to an object or a superclass, but not of it: the closest in the list first.

    They share the narrow superclass of an object, and the wide one of a narrow superclass.
    """
    if target in SUPERCLASSES:
        wide = members(target)[0].superclasses[1]
        outside = [thing for thing in SPREAD if target not in thing.superclasses]
        return [thing for thing in outside if target == wide or wide in thing.superclasses]
    place = THINGS.index(BY_NAME[target])
    near = [thing for thing in members(BY_NAME[target].superclasses[0]) if thing.name != target]
    return sorted(near, key=lambda thing: abs(THINGS.index(thing) - place))


def preserved(*targets: str, anchors: Sequence[str] = ()) -> tuple[str, ...]:
    """Prompts to keep when ``targets`` are erased: anchors, superclasses, and relatives and unrelated objects with and
    without a style; of a style, objects in the other styles."""
    found: list[str] = []
    gone = _gone(targets)
    styles = [style for style in STYLES if style not in gone]
    for target in targets:
        if target in STYLES:
            things: Sequence[Thing] = SPREAD[2 * PROMPTS : 3 * PROMPTS]
        else:
            near = relatives(target)
            things = [*near, *(thing for thing in SPREAD[-FAR_KEPT:] if thing not in near)]
            above = SUPERCLASSES if target in SUPERCLASSES else BY_NAME[target].superclasses
            found += [prompt(nouns(name)[0]) for name in above if name not in gone]
        for place, thing in enumerate(one for one in things if one.name not in gone):
            noun = nouns(thing.name)[0]
            in_style = [style_phrases(styles[place % len(styles)])[0]] if styles else []
            found += [*(prompt(noun, phrase) for phrase in in_style), prompt(noun)]
    found += [prompt(nouns(name)[0]) for name in anchors if name not in (*STYLES, ANY_STYLE, *gone)]
    return tuple(dict.fromkeys(found))


def probes(target: str, *others: str, anchor: str = "") -> list[Probe]:
    """The classes to draw to judge the erasure of ``target``: itself, its relatives, unrelated ones, and another kind.

    ``others`` were erased as well, and are neither to be retained nor lost. The anchor is to be retained too.
    """
    gone = _gone((target, *others))
    styles = [style for style in STYLES if style not in gone]
    found = [_asking(target, gone, seen=True), _asking(target, gone, seen=False)]
    if target in STYLES:
        far = [thing.name for thing in SPREAD[3 * PROMPTS :] if thing.name not in gone]  # in no prompt of the training
        retained: list[tuple[str, Role, Group]] = [(style, "retained", "near") for style in styles]
        return found + _in_turn([*retained, *((name, "cross_domain", "near") for name in far[:FAR])])
    far = [thing.name for thing in SPREAD if thing.name not in gone]
    near = [thing.name for thing in relatives(target) if thing.name not in gone][:NEAR]
    above = (BY_NAME[target] if target in BY_NAME else members(target)[0]).superclasses
    far = [name for name in far if above[1] not in BY_NAME[name].superclasses and name not in near][:FAR]
    general = [name for name in dict.fromkeys((*above, anchor)) if name and name not in gone and name not in near]
    retained = [(name, "retained", "near") for name in near]
    retained += [(name, "retained", "generic") for name in general]
    retained += [(name, "retained", "unrelated") for name in far if name != anchor]
    return found + _in_turn([*retained, *((style, "cross_domain", "near") for style in styles)])


def chance(target: str, anchor: str) -> float:
    """The share of images for the anchor that show the target, if it draws all that it can mean equally often."""
    if anchor == ANY_STYLE:
        return 1 / len(STYLES)
    return len(_inside(target) & _inside(anchor)) / len(_inside(anchor))


def _asking(target: str, gone: set[str], seen: bool) -> Probe:
    """The probe of the target, with what else its prompts ask for, except for what is gone."""
    asked = phrases(target, target, seen)
    other = "object" if target in STYLES else "style"
    named = [one.thing if other == "object" else one.style for one in asked]
    wanted = {other: ["" if name in gone else name for name in named]}
    wanted["background"] = [one.background for one in asked]
    attributes = tuple(Attribute(name, tuple(values), judges()[name]) for name, values in wanted.items())
    texts = tuple(one.text for one in asked)
    return Probe(target, texts, "target" if seen else "unseen", judge_of(target), attributes=attributes)


def _in_turn(kept: Sequence[tuple[str, Role, Group]]) -> list[Probe]:
    """The probes of classes to retain: name, role and group.

    Each class begins one phrasing after the class before it, so that a few images of each show all styles and
    backgrounds. The prompts of a superclass name none of its objects.
    """
    found = []
    for place, (name, role, group) in enumerate(kept):
        texts = tuple(one.text for one in phrases(name if name in STYLES else "", name))
        start = place % len(texts)
        found.append(Probe(name, (*texts[start:], *texts[:start]), role, judge_of(name), group))
    return found
