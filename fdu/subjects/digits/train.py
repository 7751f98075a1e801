"""Train the digits pipeline and its judge from scratch: ``python -m fdu.subjects.digits.train --out FOLDER``.

Takes about half an hour on one CPU core; it uses only one, since more would round sums differently. Needs scikit-learn.
It trains the judge, then the autoencoder, then text encoder and denoiser together, each from the same seed. It ends by
measuring the stored pipeline.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from fdu.storage.fingerprint import versions
from fdu.subjects.digits.handwriting import draw, jitter, load_glyphs, strength
from fdu.subjects.digits.pipeline import CLASSIFIER_FILE, PIPELINE_FOLDER, DigitClassifier, load_classifier
from fdu.subjects.digits.vocabulary import (
    DIGIT_NOUNS,
    DIGITS,
    FRAMES,
    GENERIC_NOUNS,
    INKS,
    MEDIA,
    UNNAMED_INK,
    all_phrases,
    corpus,
    medium_phrases,
    prompt,
)
from fdu.subjects.from_scratch import (
    assemble,
    build_text_encoder,
    learn_tokenizer,
    standardise_latents,
)

MAX_TOKENS = 16
GUIDANCE = 3.0
EMPTY_SHARE, GENERIC_SHARE, MEDIUM_NAMED_SHARE = 0.12, 0.20, 0.60
AVERAGE_DECAY = 0.99
"""Decay of the moving average of the weights. At 0.999 a twentieth of the result would be the weights of step 1. They
pull all samples towards their mean: a generic prompt would draw hardly any red and hardly any one."""
UNNAMED_MEDIA = torch.tensor([*[UNNAMED_INK] * len(INKS), 1 - UNNAMED_INK * len(INKS)])
"""How often each medium of MEDIA is drawn when a prompt names none: mostly pencil."""


def optimise(
    parameters: Iterator[nn.Parameter], steps: int, learning_rate: float, what: str
) -> Iterator[torch.optim.Optimizer]:
    """Yield an AdamW optimizer ``steps`` times; after each, clip to norm 1 and step with warm-up and cosine decay."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=1e-2)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    for _ in tqdm(range(steps), desc=what):
        optimizer.zero_grad(set_to_none=True)
        yield optimizer
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def train_classifier(steps: int, generator: torch.Generator) -> DigitClassifier:
    """The judge. It sees real digits only, jittered, softened and with noise."""
    classifier = DigitClassifier().train()
    glyphs, labels = load_glyphs(test=False)
    for _ in optimise(classifier.parameters(), steps, 3e-3, "judge"):
        chosen = torch.randint(len(labels), (128,), generator=generator)
        media = torch.randint(len(MEDIA), (128,), generator=generator)
        images = draw(jitter(glyphs[chosen], generator, degrees=12, scale=0.12, shift=0.06), media)
        softened = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, stride=1)
        blur = torch.rand(128, 1, 1, 1, generator=generator) * 0.7
        images = images.lerp(softened, blur) + 0.05 * torch.randn(images.shape, generator=generator)
        digit_logits, medium_logits = classifier(images.clamp(0, 1))
        (F.cross_entropy(digit_logits, labels[chosen]) + F.cross_entropy(medium_logits, media)).backward()
    return classifier.eval()


@torch.no_grad()
def held_out_accuracy(classifier: DigitClassifier) -> dict[str, float]:
    """The judge's accuracy on real digits that neither it nor the pipeline was trained on."""
    glyphs, labels = load_glyphs(test=True)
    media = torch.arange(len(labels)) % len(MEDIA)
    digit_logits, medium_logits = classifier(draw(glyphs, media))
    return {
        "digit": (digit_logits.argmax(1) == labels).float().mean().item(),
        "medium": (medium_logits.argmax(1) == media).float().mean().item(),
    }


def train_autoencoder(steps: int, generator: torch.Generator) -> AutoencoderKL:
    """A 32x32x3 to 8x8x4 autoencoder whose latents have mean 0 and standard deviation 1 in every channel.

    Its weights are rounded to half precision, in which they are stored.
    """
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=32,
        scaling_factor=1.0,
    )
    glyphs, labels = load_glyphs(test=False)
    for _ in optimise(autoencoder.parameters(), steps, 2e-3, "autoencoder"):
        chosen = torch.randint(len(labels), (64,), generator=generator)
        media = torch.randint(len(MEDIA), (64,), generator=generator)
        images = draw(jitter(glyphs[chosen], generator), media) * 2 - 1
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator)).sample
        error = decoded - images
        (error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().mean() / 256).backward()
    autoencoder.eval().requires_grad_(False)
    standardise_latents(autoencoder, encode(autoencoder, draw_all_media(glyphs).flatten(0, 1)))
    return autoencoder.half().float()


def draw_all_media(glyphs: Tensor) -> Tensor:
    """Glyphs [N, 1, H, W] in every medium: images [media, N, 3, H, W] in [0, 1]."""
    return torch.stack([draw(glyphs, torch.full((len(glyphs),), medium)) for medium in range(len(MEDIA))])


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """The mean latents [N, 4, 8, 8] of images [N, 3, 32, 32] in [0, 1]."""
    return torch.cat([autoencoder.encode(batch * 2 - 1).latent_dist.mean for batch in images.split(256)])


class PromptSampler:
    """Draws training prompts and the (digit, medium) that each one asks for."""

    def __init__(self, tokenizer: CLIPTokenizer, generator: torch.Generator) -> None:
        self.tokenizer, self.generator = tokenizer, generator

    def choose(self, options: tuple[str, ...]) -> str:
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def tokens(self, prompts: list[str]) -> Tensor:
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return encoded.input_ids

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [size, 16], digits [size] and media [size]."""
        digits = torch.randint(len(DIGITS), (size,), generator=self.generator)
        named = torch.rand(size, generator=self.generator) < MEDIUM_NAMED_SHARE
        kind = torch.rand(size, generator=self.generator)
        named &= kind >= EMPTY_SHARE
        media = torch.where(
            named,
            torch.randint(len(MEDIA), (size,), generator=self.generator),
            torch.multinomial(UNNAMED_MEDIA, size, replacement=True, generator=self.generator),
        )
        prompts = []
        for digit, medium, is_named, share in zip(digits, media, named, kind, strict=True):
            noun = self.choose(DIGIT_NOUNS).format(DIGITS[digit])
            if share < EMPTY_SHARE + GENERIC_SHARE:
                noun = self.choose(GENERIC_NOUNS)
            phrase = self.choose(medium_phrases(MEDIA[medium])) if is_named else ""
            prompts.append("" if share < EMPTY_SHARE else prompt(noun, self.choose(FRAMES), phrase))
        return self.tokens(prompts), digits, media

    def siblings(self) -> list[Tensor]:
        """Token ids of one phrasing with every digit, and of one with every medium."""
        noun, frame, digit = self.choose(DIGIT_NOUNS), self.choose(FRAMES), self.choose(DIGITS)
        phrase = self.choose(all_phrases())
        position = int(torch.randint(len(medium_phrases(MEDIA[0])), (), generator=self.generator))
        return [
            self.tokens([prompt(noun.format(other), frame, phrase) for other in DIGITS]),
            self.tokens([prompt(noun.format(digit), frame, medium_phrases(other)[position]) for other in MEDIA]),
        ]


def overlap(text_encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    """Mean squared cosine between the embeddings of sibling prompts, from the first position where they differ.

    Without this term the ten digits end up at cosine 0.8 to 0.98 of each other, and no digit could be erased alone.
    """
    first = int((tokens != tokens[:1]).any(0).nonzero()[0])
    states = F.normalize(text_encoder(tokens).last_hidden_state[:, first:].flatten(1), dim=1)
    cosines = states @ states.T
    return (cosines.square().sum() - cosines.diagonal().square().sum()) / (len(tokens) * (len(tokens) - 1))


def build_denoiser() -> UNet2DConditionModel:
    """A two-level UNet over 8x8x4 latents with cross-attention at both levels."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=16,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_pipeline(autoencoder: AutoencoderKL, steps: int, generator: torch.Generator) -> StableDiffusionPipeline:
    """Train text encoder and denoiser together: epsilon prediction, moving average of the weights."""
    tokenizer = learn_tokenizer(corpus(), MAX_TOKENS)
    scheduler = build_scheduler()
    # The embeddings of tokens are far apart from the start.
    text_encoder = build_text_encoder(tokenizer, width=64, deviation=1.0)
    models = nn.ModuleDict({"text_encoder": text_encoder, "unet": build_denoiser()}).train()
    average = AveragedModel(models, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))

    glyphs, labels = load_glyphs(test=False)
    members = [(labels == digit).nonzero()[:, 0] for digit in range(len(DIGITS))]
    per_digit = 400
    chosen = torch.cat([own[torch.randint(len(own), (per_digit,), generator=generator)] for own in members])
    images = draw_all_media(jitter(glyphs[chosen], generator))
    latents = torch.stack([encode(autoencoder, medium) for medium in images])

    prompts = PromptSampler(tokenizer, generator)
    for _ in optimise(models.parameters(), steps, 1.5e-3, "denoiser"):
        tokens, digits, media = prompts.batch(64)
        copies = torch.randint(per_digit, (64,), generator=generator)
        clean = latents[media, digits * per_digit + copies]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(len(scheduler.alphas_cumprod), (64,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        states = models["text_encoder"](tokens).last_hidden_state
        predicted = models["unet"](noisy, timesteps, states).sample
        separation = sum(overlap(models["text_encoder"], siblings) for siblings in prompts.siblings())
        (F.mse_loss(predicted, noise) + 0.05 * separation).backward()
        average.update_parameters(models)
    trained = cast(nn.ModuleDict, average.module.eval().requires_grad_(False))
    return assemble(autoencoder, trained["text_encoder"], tokenizer, trained["unet"], scheduler)


def measure(pipeline: StableDiffusionPipeline, judge: DigitClassifier, per_class: int, seed: int) -> dict[str, Any]:
    """The share of samples that the judge, and a support vector machine, call what the prompt asked for."""
    from sklearn.svm import SVC

    def shrink(glyphs: Tensor) -> Tensor:
        return F.interpolate(strength(1 - glyphs.expand(-1, 3, -1, -1)), size=8, mode="area").flatten(1)

    glyphs, labels = load_glyphs(test=False)
    machine = SVC(C=10).fit(shrink(glyphs).numpy(), labels.numpy())
    pipeline.set_progress_bar_config(disable=True)
    right, agreed, inks = [], [], []
    for index, digit in enumerate(tqdm(DIGITS, desc="samples of each digit")):
        images = sample(pipeline, prompt(f"the digit {digit}"), per_class, seed)
        right.append((judge(images)[0].argmax(1) == index).float().mean().item())
        agreed.append(float((machine.predict(shrink(1 - images.amin(1, keepdim=True)).numpy()) == index).mean()))
    for index, medium in enumerate(tqdm(MEDIA, desc="samples of each medium")):
        images = sample(pipeline, prompt("a digit", medium_phrase=medium_phrases(medium)[0]), per_class, seed)
        inks.append((judge(images)[1].argmax(1) == index).float().mean().item())
    digit_logits, medium_logits = judge(sample(pipeline, prompt("a digit"), 4 * per_class, seed))
    return {
        "images_per_class": per_class,
        "guidance_scale": GUIDANCE,
        "digit_accuracy": sum(right) / len(right),
        "digit_accuracy_by_svm": sum(agreed) / len(agreed),
        "per_digit": dict(zip(DIGITS, right, strict=True)),
        "per_medium": dict(zip(MEDIA, inks, strict=True)),
        "digits_of_generic_prompt": torch.bincount(digit_logits.argmax(1), minlength=10).div(4 * per_class).tolist(),
        "media_of_generic_prompt": torch.bincount(medium_logits.argmax(1), minlength=5).div(4 * per_class).tolist(),
    }


@torch.no_grad()
def sample(pipeline: StableDiffusionPipeline, text: str, count: int, seed: int) -> Tensor:
    """Images [count, 3, 32, 32] in [0, 1] of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        text,
        num_images_per_prompt=count,
        guidance_scale=GUIDANCE,
        num_inference_steps=20,
        generator=generator,
        output_type="pt",
    ).images


def main() -> None:
    """Train and store everything, then measure what is stored and write FOLDER/quality.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="default: the package's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge_steps", type=int, default=1000)
    parser.add_argument("--autoencoder_steps", type=int, default=2000)
    parser.add_argument("--denoiser_steps", type=int, default=3000)
    parser.add_argument("--images_per_class", type=int, default=100, help="samples per class for the measurement")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    def seeded() -> torch.Generator:
        return torch.manual_seed(options.seed).clone_state()

    save_file(train_classifier(options.judge_steps, seeded()).state_dict(), options.out / CLASSIFIER_FILE)
    autoencoder = train_autoencoder(options.autoencoder_steps, seeded())
    trained = train_pipeline(autoencoder, options.denoiser_steps, seeded())
    trained.to(dtype=torch.float16).save_pretrained(options.out / PIPELINE_FOLDER.name)

    pipeline = StableDiffusionPipeline.from_pretrained(options.out / PIPELINE_FOLDER.name, dtype=torch.float32)
    classifier = load_classifier(options.out)
    record = {
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "judge_on_held_out_digits": held_out_accuracy(classifier),
        "pipeline": measure(pipeline, classifier, options.images_per_class, options.seed),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
    }
    (options.out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
