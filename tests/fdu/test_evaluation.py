"""Evaluation: the counting, the same seeds before and after, the refusals, and the extractors of features."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import CLIP_LAYERS, CLIP_SIZE, save_clip
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor, nn
from transformers import CLIPModel

import fdu
from fdu.concepts import Concept
from fdu.evaluation import Attribute, Draws, Probe
from fdu.evaluation.drawing import JudgedSampling, joint_probes, seen_by_judge
from fdu.evaluation.features import ClipFeatures, Features, ModuleFeatures, as_features
from fdu.evaluation.intervals import lowest_interval, reach_unseen, wilson
from fdu.evaluation.metrics.perceptual import image_distance, perceptual_distance
from fdu.evaluation.tables import comparison
from fdu.models.families import denoiser_of
from fdu.subjects.clip_judges import CLIP_NOTES, ClipJudge, clip_probes
from fdu.subjects.concept_sets import ConceptSet
from fdu.subjects.digits import pipeline as digits

WORDS = "a photo of cat dog lynx violin painting"


def judge(images: Tensor) -> list[str]:
    """The class is written into the first pixel."""
    return [("cat", "dog", "cow")[int(image[0, 0, 0])] for image in images]


def image_of(*classes: int) -> Tensor:
    return torch.tensor(classes, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)


PROBES = [
    Probe("cat", ("a cat",), "target", judge),
    Probe("cat", ("one cat",), "unseen", judge),
    Probe("dog", ("a dog",), "retained", judge),
    Probe("cow", ("a cow",), "retained", judge),
]


def test_figures_count_what_the_judge_saw() -> None:
    before = Draws([image_of(0, 0, 0, 0), image_of(0, 0, 0, 1), image_of(1, 1, 1, 1), image_of(2, 2, 2, 2)])
    after = Draws([image_of(1, 1, 1, 0), image_of(2, 2, 2, 2), image_of(1, 1, 1, 1), image_of(2, 1, 2, 1)])
    result = fdu.evaluate(before, after, PROBES)
    assert (result.before.target_accuracy, result.before.unseen_accuracy) == (1.0, 0.75)
    assert (result.after.target_accuracy, result.after.unseen_accuracy) == (0.25, 0.0)
    assert result.after.retained_accuracy == 0.75
    assert (result.after.worst_retained_class, result.after.worst_retained_accuracy) == ("cow", 0.5)
    assert result.after.cross_domain_accuracy is None
    assert result.after.per_class == {"cat": 0.25, "dog": 1.0, "cow": 0.5}
    assert result.after.became == {"cat": {"dog": 0.75, "cat": 0.25}}
    retained = pytest.approx(0.25)
    assert result.change == {"target": 0.75, "unseen": pytest.approx(1.75), "retained": retained, "near": retained}
    assert result.difference["retained_accuracy"] == -0.25 and result.difference["per_class.cat"] == -0.75
    assert result.unlearn_canvas == {"UA": 0.75, "IRA": 0.75}
    assert result.distances == {} and result.features == ""
    assert result.images_per_class == 4


def second(images: Tensor) -> list[str]:
    """The style is written into the second channel."""
    return [("ink", "oil")[int(image[1, 0, 0])] for image in images]


def third(images: Tensor) -> list[str]:
    """The background is written into the third channel."""
    return [("blue", "red")[int(image[2, 0, 0])] for image in images]


def shown(*pixels: tuple[int, int, int]) -> Tensor:
    """Images whose first pixels name class, style and background."""
    return torch.tensor(pixels, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 2)


def asking(seen: tuple[Attribute, ...], unseen: tuple[Attribute, ...] = ()) -> list[Probe]:
    """Probes whose target has three prompts in seen phrasings and one in another."""
    target = Probe("cat", ("a cat in ink", "a cat in oil, blue", "a cat"), "target", judge, attributes=seen)
    return [target, Probe("cat", ("one cat in oil",), "unseen", judge, attributes=unseen), *PROBES[2:]]


STYLE = Attribute("style", ("ink", "oil", ""), second)
BACKGROUND = Attribute("background", ("", "blue", ""), third)
OTHERS = [image_of(1, 1, 1, 1), image_of(2, 2, 2, 2)]


def test_what_else_the_prompts_ask_for_is_counted_where_they_ask_for_it() -> None:
    probes = asking((STYLE, BACKGROUND), (Attribute("style", ("oil",), second),))
    seen = shown((0, 0, 1), (0, 1, 0), (0, 0, 1), (0, 0, 1))  # ink and oil on blue, nothing asked, ink again
    before = Draws([seen, shown(*[(0, 1, 1)] * 4), *OTHERS])
    # The first image loses its ink, the second its blue, and two unseen ones their oil.
    seen = shown((1, 1, 0), (1, 1, 1), (1, 1, 1), (1, 0, 1))
    after = Draws([seen, shown((1, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 0)), *OTHERS])
    result = fdu.evaluate(before, after, probes)
    assert result.before.attribute_accuracy == 1 and result.before.attributes == {"style": 1, "background": 1}
    # Asked: three styles and one background in seen phrasings, four styles in unseen ones.
    assert result.after.attribute_accuracy == pytest.approx(4 / 8)
    assert result.after.attributes == {"style": pytest.approx(4 / 7), "background": 0}
    assert result.difference["attribute_accuracy"] == pytest.approx(-0.5)
    assert result.difference["attributes.background"] == -1
    # Where all answers agree, the interval is that of the images asked about: seven, and one.
    assert result.before.intervals["attribute_accuracy"] == wilson(1, 7)
    assert result.after.intervals["attributes.background"] == wilson(0, 1)
    assert result.intervals["difference.attributes.background"] == (-1, pytest.approx(-1 + reach_unseen(1)))


def test_prompts_that_ask_for_nothing_else_have_no_such_figure() -> None:
    draws = Draws([shown(*[(0, 0, 0)] * 4), shown(*[(0, 0, 0)] * 4), *OTHERS])
    for probes in (PROBES, asking((Attribute("style", ("", "", ""), second),))):
        side = fdu.evaluate(draws, draws, probes).after
        assert side.attribute_accuracy is None and side.attributes == {}
        assert not [name for name in side.intervals if "attribute" in name]
    kept = [dataclasses.replace(PROBES[2], attributes=(Attribute("style", ("ink",), second),)), PROBES[3]]
    assert fdu.evaluate(draws, draws, [*PROBES[:2], *kept]).after.attribute_accuracy is None


def test_intervals_of_what_else_is_asked_count_the_images_that_were_asked_about_and_are_paired() -> None:
    """Of 40 images every second was asked about: as a share of 20."""
    asks = Attribute("style", ("ink", ""), second)
    probes = [Probe("cat", ("a cat in ink", "a cat"), "target", judge, attributes=(asks,)), PROBES[2]]

    def drawn(lost: int) -> Draws:
        return Draws([shown(*[(0, int(index < lost), 0) for index in range(40)]), image_of(*[1] * 40)])

    result = fdu.evaluate(drawn(12), drawn(16), probes)  # 6 and 8 of 20
    assert (result.before.attribute_accuracy, result.after.attribute_accuracy) == (0.7, 0.6)
    assert result.after.intervals["attribute_accuracy"] == pytest.approx(wilson(0.6, 20))
    # Two of 20 differ; apart, the two shares would leave 29 points to either side.
    low, high = result.intervals["difference.attribute_accuracy"]
    assert (low, high) == (pytest.approx(-0.25, abs=0.02), pytest.approx(0.07, abs=0.02))
    same = fdu.evaluate(drawn(12), drawn(12), probes).intervals["difference.attribute_accuracy"]
    assert same == (pytest.approx(-reach_unseen(20)), pytest.approx(reach_unseen(20)))


def test_attributes_hold_one_value_per_prompt() -> None:
    with pytest.raises(ValueError, match="'style' of the class 'cat'.* 1 prompts.*got 3"):
        Probe("cat", ("a cat",), "target", judge, attributes=(STYLE,))
    with pytest.raises(ValueError, match="two attributes of one name"):
        asking((STYLE, STYLE))


def test_a_judge_of_what_no_prompt_asks_for_is_not_called() -> None:
    def forbidden(images: Tensor) -> list[str]:
        raise AssertionError("the judge was called")

    assert Attribute("style", ("", "ink"), forbidden).found(torch.zeros(1, 3, 2, 2)) == (None,)
    assert STYLE.found(shown((0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0))) == (True, False, None, True)


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """Every number in nested dicts, by its name with dots."""
    if isinstance(value, dict):
        return {key: one for part in value for key, one in numbers(value[part], f"{name}.{part}".strip(".")).items()}
    return {name: value} if isinstance(value, float) else {}


def test_every_figure_has_an_interval_that_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = [torch.randint(0, 3, (12,), generator=generator).tolist() for _ in range(8)]
    before, after = (Draws([image_of(*one).clone() for one in side]) for side in (classes[:4], classes[4:]))
    module = torch.nn.Flatten()
    found = fdu.evaluate(before, after, PROBES, module).as_dict()
    sides = [found.pop("before"), found.pop("after")]
    for part in (*sides, found):
        intervals = part.pop("intervals")
        figures = numbers(part)
        assert set(figures) == set(intervals)
        for name, value in figures.items():
            low, high = intervals[name]
            assert low - 1e-9 <= value <= high + 1e-9, name
    assert json.loads(json.dumps(found)) and set(found["distances"]) == {"kid", "cmmd", "perceptual"}
    again = fdu.evaluate(before, after, PROBES, module).as_dict()
    assert again["intervals"] == intervals


def test_retained_classes_are_told_by_group() -> None:
    probes = [*PROBES[:3], Probe("cow", ("a cow",), "retained", judge, "unrelated")]
    draws = Draws([image_of(0, 0), image_of(0, 0), image_of(1, 0), image_of(2, 2)])
    result = fdu.evaluate(draws, draws, probes)
    assert result.after.retained_by_group == {"near": 0.5, "unrelated": 1.0}
    assert result.after.retained_accuracy == 0.75 and result.unlearn_canvas["IRA"] == 0.5
    assert set(result.change) == {"target", "unseen", "retained", "near", "unrelated"}


@pytest.fixture(scope="module")
def tiny() -> DiffusionPipeline:
    pipeline = families.build("sd")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_images_do_not_depend_on_the_batch_and_a_pipeline_equals_itself(tiny: DiffusionPipeline) -> None:
    probes = [
        Probe("three", ("three", "a three", "the digit three"), "target", lambda images: ["three"] * len(images)),
        Probe("eight", ("eight",), "retained", lambda images: ["eight"] * len(images)),
    ]
    whole = fdu.draw(tiny, probes, 5, num_inference_steps=2, batch_size=5)
    parts = fdu.draw(tiny, probes, 5, num_inference_steps=2, batch_size=2)
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-4)
    (three, _) = whole.images
    assert (
        three.shape == (5, 3, 16, 16) and 0 <= three.min() and three.max() <= 1 and not torch.equal(three[0], three[3])
    )
    result = fdu.evaluate(whole, tiny, probes, images_per_class=5, num_inference_steps=2, batch_size=5)
    assert set(result.change.values()) == {0.0}


def test_several_targets_are_counted_together_and_one_by_one() -> None:
    probes = [PROBES[0], Probe("dog", ("a dog",), "target", judge), PROBES[1], PROBES[3]]
    before = Draws([image_of(0, 0), image_of(1, 1), image_of(0, 0), image_of(2, 2)])
    after = Draws([image_of(2, 2), image_of(1, 2), image_of(0, 2), image_of(2, 2)])
    result = fdu.evaluate(before, after, probes)
    assert (result.before.target_accuracy, result.after.target_accuracy) == (1.0, 0.25)
    assert result.after.became == {"cat": {"cow": 1.0}, "dog": {"dog": 0.5, "cow": 0.5}}
    assert result.after.per_class == {"cat": 0.0, "dog": 0.5, "cow": 1.0} and result.after.unseen_accuracy == 0.5
    assert not any(name.startswith("became.") for name in result.difference)
    rows = comparison(result, probes)
    assert rows[0].label == "cat and dog" and rows[0].after == 0.25
    assert rows[1].label == "least erased: dog" and rows[1].after == 0.5


def test_joint_probes_retain_no_target_and_every_other_class_once() -> None:
    of_cat, of_dog = PROBES, [dataclasses.replace(PROBES[2], role="target"), *PROBES[3:]]
    joint = joint_probes([of_cat, of_dog])
    assert [(probe.name, probe.role) for probe in joint] == [
        ("cat", "target"),
        ("cat", "unseen"),
        ("dog", "target"),
        ("cow", "retained"),
    ]


def test_what_does_not_belong_together_is_refused(tiny: DiffusionPipeline) -> None:
    draws = Draws([image_of(0), image_of(0), image_of(1), image_of(2)])
    with pytest.raises(ValueError, match="at least one.*role 'target'"):
        fdu.evaluate(draws, draws, PROBES[1:])
    with pytest.raises(ValueError, match="unseen phrasings of 'cat', which is not a target"):
        fdu.evaluate(draws, draws, [dataclasses.replace(PROBES[0], name="lynx"), *PROBES[1:]])
    with pytest.raises(ValueError, match="same number of images"):
        fdu.evaluate(draws, Draws(draws.images[:3]), PROBES)
    with pytest.raises(ValueError, match="name.*class 'dog' twice"):
        fdu.evaluate(draws, draws, [*PROBES[:3], PROBES[2]])
    with pytest.raises(ValueError, match="images_per_class.*>= 1, got 0"):
        fdu.draw(tiny, PROBES, 0)
    with pytest.raises(ValueError, match="probes is empty"):
        fdu.draw(tiny, [])
    with pytest.raises(ValueError, match="the class 'cow'.*no prompts"):
        Probe("cow", (), "retained", judge)


def test_none_leaves_a_setting_to_the_pipeline() -> None:
    seen: list[dict[str, Any]] = []

    class Pipeline:
        def set_progress_bar_config(self, **settings: Any) -> None: ...

        def __call__(self, prompt: list[str], **settings: Any) -> Any:
            seen.append(settings)
            return type("Output", (), {"images": torch.zeros(len(prompt), 3, 4, 4)})

    probe = fdu.Probe("a", ("a",), "target", lambda images: ["a"] * len(images))
    fdu.draw(Pipeline(), [probe], 1, num_inference_steps=None, guidance_scale=1.5)  # type: ignore[arg-type]
    assert "num_inference_steps" not in seen[0] and seen[0]["guidance_scale"] == 1.5
    assert "height" not in seen[0] and "width" not in seen[0]
    fdu.draw(Pipeline(), [probe], 1)  # type: ignore[arg-type]
    assert set(seen[1]) == {"generator", "output_type"}


def test_images_that_are_not_square_are_drawn(tiny: DiffusionPipeline) -> None:
    probe = Probe("three", ("three",), "target", lambda images: ["three"] * len(images))
    (images,) = fdu.draw(tiny, [probe], 1, num_inference_steps=1, height=16, width=32).images
    assert images.shape == (1, 3, 16, 32)
    with pytest.raises(ValueError, match="height and width go together"):
        fdu.draw(tiny, [probe], 1, height=16)


def test_the_interval_of_a_class_grows_with_its_share() -> None:
    lows, highs = [], []
    for right in (0, 1, 2, 30, 31, 32):
        target = image_of(*[0] * right, *[1] * (32 - right))
        draws = Draws([target, image_of(0), image_of(1), image_of(2)])
        low, high = fdu.evaluate(draws, draws, PROBES).after.intervals["per_class.cat"]
        lows.append(low)
        highs.append(high)
    assert lows == sorted(set(lows)) and highs == sorted(set(highs))


def test_the_interval_of_the_worst_class_counts_that_it_was_chosen() -> None:
    probes = [*PROBES, Probe("lynx", ("a lynx",), "retained", lambda images: ["lynx"] * len(images))]
    target, dog, cow = [0] * 32, [1] * 24 + [0] * 8, [2] * 30 + [0] * 2
    draws = Draws([image_of(*one) for one in (target, target, dog, cow, target)])
    found = fdu.evaluate(draws, draws, probes)
    assert found.after.worst_retained_accuracy == 0.75
    low, high = found.after.intervals["worst_retained_accuracy"]
    assert (low, high) == found.before.intervals["worst_retained_accuracy"] == lowest_interval([24, 30, 32], [32] * 3)
    assert high > found.after.intervals["per_class.dog"][1]
    assert not any("worst" in name for name in found.intervals)


def test_one_image_a_class_tells_nothing_of_how_images_scatter() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(images: int) -> Draws:
        return Draws([torch.rand(images, 3, 2, 2, generator=generator) for _ in PROBES])

    module = torch.nn.Flatten()
    one, two, three = (fdu.evaluate(drawn(images), drawn(images), PROBES, module) for images in (1, 2, 3))
    assert one.change["target"] > 0
    assert not {name for name in one.intervals if name.startswith(("change", "distances"))}
    assert "change.target" in two.intervals and "distances.perceptual.target" in two.intervals
    assert not one.distances["kid"] and {"target", "retained"} <= two.distances["kid"].keys()
    assert not {name for name in two.intervals if name.startswith("distances.kid")}
    assert {"distances.kid.target", "distances.kid.retained"} <= three.intervals.keys()


def test_a_safety_checker_blackens_nothing() -> None:
    def blackens(images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
        return images * 0, [True] * len(images)

    def extractor(images: Any, return_tensors: str) -> Any:
        return SimpleNamespace(to=lambda device: SimpleNamespace(pixel_values=torch.zeros(1)))

    pipeline = families.build("sd")
    config = dict(pipeline.config)
    vars(pipeline).update(safety_checker=blackens, feature_extractor=extractor)
    assert pipeline(["three"], num_inference_steps=1, output_type="pt").nsfw_content_detected == [True]
    seen: list[float] = []
    probe = Probe("three", ("three",), "target", lambda images: [seen.extend(images.flatten(1).std(1).tolist()) or "a"])
    probe.judge(fdu.draw(pipeline, [probe], 1, num_inference_steps=1).images[0])
    seen_by_judge(denoiser_of(pipeline), [probe], JudgedSampling(images=1, num_inference_steps=1), "judged")
    assert len(seen) == 2 and min(seen) > 0.01
    assert pipeline.safety_checker is blackens and dict(pipeline.config) == config


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), WORDS)


@pytest.fixture(scope="module")
def encoder(clip_folder: Path) -> ClipFeatures:
    return ClipFeatures.load(str(clip_folder))


def noise(count: int, size: int = CLIP_SIZE, seed: int = 0) -> Tensor:
    """Images of whole levels of grey, so that no rounding hides in a comparison."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator) / 255


def normalised(image: Tensor) -> Tensor:
    """What CLIP reads of an image of its own size."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def test_clip_reads_images_as_the_model_does(clip_folder: Path, encoder: ClipFeatures) -> None:
    images = noise(5)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    output = model.vision_model(normalised(images), output_hidden_states=True)
    torch.testing.assert_close(encoder(images), model.visual_projection(output.pooler_output), rtol=1e-4, atol=1e-4)
    _, layers = encoder.extract(images)
    chosen = [2, 3, 4, 6]  # of six layers, rounded from 1.5, 3, 4.5 and 6
    assert CLIP_LAYERS == 6 and len(layers) == 4
    for layer, index in zip(layers, chosen, strict=True):
        torch.testing.assert_close(layer, output.hidden_states[index], rtol=1e-4, atol=1e-4)


def test_larger_images_are_reduced_and_cropped_as_pillow_does(encoder: ClipFeatures) -> None:
    assert CLIP_SIZE == 32
    (image,) = noise(1, 80)
    image = image[:, :, :64]
    array = (image * 255).round().byte().permute(1, 2, 0).numpy()
    reduced = (
        Image.fromarray(array).resize((CLIP_SIZE, 40), Image.Resampling.BICUBIC).crop((0, 4, CLIP_SIZE, 4 + CLIP_SIZE))
    )
    whole = torch.from_numpy(np.array(reduced)).permute(2, 0, 1) / 255
    torch.testing.assert_close(encoder(image[None]), encoder(whole[None]), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_clip_reads_text_as_the_model_does(clip_folder: Path, encoder: ClipFeatures) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    long = " ".join(["a photo of a violin"] * 10)
    found = encoder.texts(["cat", long])
    assert found.shape == (2, 16)
    tokens = encoder.tokenizer("cat", return_tensors="pt")
    alone = model.text_projection(model.text_model(**tokens).pooler_output)
    torch.testing.assert_close(found[:1], alone, rtol=1e-4, atol=1e-4)


def test_batches_change_nothing_and_features_are_computed_once(encoder: ClipFeatures) -> None:
    images, others = noise(5), noise(5, seed=1)
    small = ClipFeatures(encoder.model, encoder.tokenizer, encoder.processor, "small batches", batch_size=2)
    torch.testing.assert_close(small(images), encoder(images), rtol=1e-4, atol=1e-4)
    expected = perceptual_distance(encoder.extract(images)[1], encoder.extract(others)[1])
    torch.testing.assert_close(image_distance(images, others, small), expected, rtol=1e-4, atol=1e-6)
    kept = small(others)
    small.extract = None  # type: ignore[method-assign, assignment]
    assert small(others) is kept


def test_an_encoder_that_is_not_there_is_told(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(OSError, match="could not be loaded"):
        ClipFeatures.load(str(tmp_path))
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="could not be loaded"):  # no tokenizer
        ClipFeatures.load(str(tmp_path))
    with pytest.raises(OSError, match="a CLIPTextModel.*image-text encoder"):
        ClipFeatures.load(str(digits.PIPELINE_FOLDER / "text_encoder"))


def test_the_features_of_the_digits_lead_to_the_judgement() -> None:
    classifier, images = digits.load_classifier(), noise(7)
    features = digits.features()
    shape, colour = features(images).split([64 * 16, 24], 1)
    shown, media = classifier(images)
    torch.testing.assert_close(classifier.digit[-1](shape), shown, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(classifier.medium[-1](colour), media, rtol=1e-4, atol=1e-4)
    assert features.texts(["three"]) is None
    _, layers = features.extract(images)
    assert [tuple(layer.shape[1:]) for layer in layers] == [(256, 24), (64, 48), (16, 64), (256, 12), (64, 24)]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.inner(images).mean((2, 3)))


def test_a_module_of_the_user() -> None:
    module, images = Small(), noise(3)
    plain = as_features(module)
    assert isinstance(plain, ModuleFeatures) and plain.name == "Small"
    with torch.no_grad():
        torch.testing.assert_close(plain(images), module(images))
        inner = ModuleFeatures(module, layers=["inner"], features=["inner"])
        torch.testing.assert_close(inner(images), module.inner(images).flatten(1))
        expected = perceptual_distance(
            [module.inner(images).flatten(2).transpose(1, 2)], [module.inner(1 - images).flatten(2).transpose(1, 2)]
        )
    torch.testing.assert_close(image_distance(images, 1 - images, inner), expected, rtol=1e-5, atol=1e-8)
    assert not module.inner._forward_hooks
    with pytest.raises(ValueError, match="no submodule 'outer'"):
        ModuleFeatures(module, layers=["outer"])


def test_features_are_given_in_several_ways(clip_folder: Path) -> None:
    assert as_features(None) is None
    assert isinstance(as_features(str(clip_folder)), ClipFeatures)
    named = digits.features()
    assert isinstance(named, Features) and as_features(named) is named
    with pytest.raises(TypeError, match="features.*extractor.*module.*name, got int"):
        as_features(3)  # type: ignore[arg-type]


def test_the_judge_names_the_nearest_text(encoder: ClipFeatures) -> None:
    classes, images = ("cat", "dog", "violin"), noise(40)
    nearest = cosine_similarity(encoder(images), encoder.texts(classes)).argmax(1)
    seen = ClipJudge(encoder, classes)(images)
    assert seen == [classes[place] for place in nearest]
    with pytest.raises(ValueError, match="at least two"):
        ClipJudge(encoder, ("cat", "cat"))


def test_the_probes_of_a_set(encoder: ClipFeatures) -> None:
    def concept(name: str) -> Concept:
        return Concept(name, (f"a photo of {name}",))

    concepts = ConceptSet(
        concept("lynx"), concept("cat"), ("lynx",), (concept("dog"),), (concept("painting"),), (concept("violin"),)
    )
    probes = clip_probes(concepts, encoder)
    assert [(probe.name, probe.role, probe.group) for probe in probes if probe.role == "retained"] == [
        ("dog", "retained", "near"),
        ("cat", "retained", "generic"),
        ("painting", "retained", "generic"),
        ("violin", "retained", "unrelated"),
    ]
    assert [(probe.name, probe.role) for probe in probes[:2]] == [("lynx", "target"), ("lynx", "unseen")]
    assert not any(probe.attributes for probe in probes)  # of one prompt, no scene can be told apart
    judged = {(probe.name, probe.role): probe.judge.classes for probe in probes}  # type: ignore[attr-defined]
    assert judged["lynx", "target"] == judged["cat", "retained"] == ("lynx", "cat")
    assert judged["dog", "retained"] == ("dog", "cat")
    assert judged["violin", "retained"] == ("painting", "violin", "cat", "lynx")


def test_pairs_of_prompts_have_a_scene(encoder: ClipFeatures) -> None:
    scenes = ("a photo of a dog", "a painting of a cat", "a violin")
    target = Concept("lynx", tuple(f"{scene} lynx" for scene in scenes))
    images = noise(9)

    def asked(anchor: tuple[str, ...]) -> list[tuple[Attribute, ...]]:
        concepts = ConceptSet(target, Concept("painting", anchor), ("lynx",), (Concept("cat", ("a cat",)),))
        return [probe.attributes for probe in clip_probes(concepts, encoder)]

    (scene,), *others = asked(scenes)
    assert scene.name == "scene" and scene.wanted == scenes and not any(others)
    nearest = cosine_similarity(encoder(images), encoder.texts(scenes)).argmax(1)
    assert scene.found(images) == tuple(int(place) == index % 3 for index, place in enumerate(nearest))
    assert not any(asked(scenes[:2])) and not any(asked((scenes[0], scenes[1], scenes[0])))
    assert "scene" in CLIP_NOTES[0]
