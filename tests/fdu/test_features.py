"""Feature extractors and judges: a tiny CLIP saved as a folder, the embedded classifier, a user's module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from clip import LAYERS, SIZE, save_clip
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from fdu.concepts import Concept
from fdu.evaluation.features import ClipFeatures, Features, ModuleFeatures, as_features
from fdu.evaluation.metrics.perceptual import image_distance, perceptual_distance
from fdu.subjects.clip_judges import ClipJudge, clip_probes
from fdu.subjects.concept_sets import ConceptSet
from fdu.subjects.digits import pipeline as digits

WORDS = "a photo of cat dog lynx violin painting"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), WORDS)


@pytest.fixture(scope="module")
def encoder(clip_folder: Path) -> ClipFeatures:
    return ClipFeatures.load(str(clip_folder))


def noise(count: int, size: int = SIZE, seed: int = 0) -> Tensor:
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
    assert LAYERS == 6 and len(layers) == 4
    for layer, index in zip(layers, chosen, strict=True):
        torch.testing.assert_close(layer, output.hidden_states[index], rtol=1e-4, atol=1e-4)


def test_larger_images_are_reduced_and_cropped_as_pillow_does(encoder: ClipFeatures) -> None:
    (image,) = noise(1, 80)
    image = image[:, :, :64]
    array = (image * 255).round().byte().permute(1, 2, 0).numpy()
    reduced = Image.fromarray(array).resize((SIZE, 40), Image.Resampling.BICUBIC).crop((0, 4, SIZE, 4 + SIZE))
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


def test_the_embedded_features_lead_to_the_judgement() -> None:
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
    from sklearn.metrics.pairwise import cosine_similarity

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
    judged = {(probe.name, probe.role): probe.judge.classes for probe in probes}  # type: ignore[attr-defined]
    assert judged["lynx", "target"] == judged["cat", "retained"] == ("lynx", "cat")
    assert judged["dog", "retained"] == ("dog", "cat")
    assert judged["violin", "retained"] == ("painting", "violin", "cat", "lynx")
