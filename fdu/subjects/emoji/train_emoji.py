"""Train the emoji pipeline and its judge from scratch: ``python -m fdu.subjects.emoji.train_emoji --work FOLDER``.

Takes hours on two CPU cores. It trains the judge, then the autoencoder, then text encoder and denoiser together,
each from the same seed, and ends by measuring the stored pipeline. A process per core computes the gradient of its half
of every batch. Killed and started again with the same folders, it goes on from its last checkpoint and ends with the
same weights. Needs resvg-py, and the four packages of emoji, which it downloads unless they are in ``--packages``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fdu.storage.fingerprint import versions
from fdu.subjects.emoji import emoji_pipeline, objects
from fdu.subjects.emoji.classifier import EmojiClassifier
from fdu.subjects.emoji.drawings import (
    REGISTRY,
    fetch_packages,
    jitter,
    load_drawings,
    on_backgrounds,
)
from fdu.subjects.emoji.objects import ALL_THINGS, BACKGROUNDS, FRAMES, STYLES, THINGS
from fdu.subjects.emoji.quality import contact_sheet, judge_accuracy, measure
from fdu.subjects.from_scratch import (
    assemble,
    build_text_encoder,
    learn_tokenizer,
    standardise_latents,
)

MAX_TOKENS = 20
LATENT_CHANNELS = 8
EMPTY_SHARE, SUPERCLASS_SHARE, STYLE_NAMED_SHARE, BACKGROUND_NAMED_SHARE, SYNONYM_SHARE = 0.1, 0.09, 0.75, 0.5, 0.3
AVERAGE_DECAY = 0.998
CHECKPOINT_EVERY = 100


class Worker:
    """One of the processes that train together."""

    def __init__(self, rank: int, count: int, seed: int, work: Path) -> None:
        self.rank, self.count, self.seed, self.work = rank, count, seed, work

    def train(
        self,
        what: str,
        model: nn.Module,
        loss: Callable[[], Tensor],
        steps: int,
        learning_rate: float,
    ) -> nn.Module:
        """Minimise a loss with AdamW, warm-up and cosine decay, from the last checkpoint on; the averaged weights.

        The random numbers of a step follow from the seed, the step and the process alone.

        Raises:
            ValueError: the checkpoint is of a run with another seed, another number of processes or of steps.
        """
        run = {"seed": self.seed, "workers": self.count, "steps": steps}
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
        average = {name: value.clone() for name, value in model.state_dict().items()}
        path, start = self.work / f"{what}.checkpoint", 0
        if path.exists():
            saved = torch.load(path, weights_only=True)
            if saved["run"] != run:
                raise ValueError(f"{path} is of a run with {saved['run']}, not {run}; give another --work")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            average, start = saved["average"], saved["step"]
        model.train()
        bar = tqdm(range(start, steps), desc=what, initial=start, total=steps, disable=self.rank > 0, mininterval=10)
        for step in bar:
            torch.manual_seed((self.seed * 1_000_003 + step) * self.count + self.rank)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            optimizer.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            gradient = torch.cat([cast(Tensor, parameter.grad).flatten() for parameter in parameters])
            dist.all_reduce(gradient)
            gradient /= self.count
            pieces = gradient.split([parameter.numel() for parameter in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))
            for name, current in model.state_dict().items():
                if current.is_floating_point():
                    average[name].lerp_(current, 1 - decay)
                else:
                    average[name].copy_(current)
            if self.rank == 0 and step % 20 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
            if self.rank == 0 and ((step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps):
                saved = {
                    "run": run,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": step + 1,
                }
                torch.save(saved, path.with_suffix(".unfinished"))
                os.replace(path.with_suffix(".unfinished"), path)
        model.load_state_dict(average)
        return model.eval().requires_grad_(False)


def choose(count: int, size: int) -> Tensor:
    """Random indices [size] below ``count``."""
    return torch.randint(count, (size,))


def of_trained(drawings: Tensor) -> Tensor:
    """The drawings of the objects that are not held out."""
    return drawings[[place for place, thing in enumerate(ALL_THINGS) if not thing.held_out]]


def train_judge(worker: Worker, drawings: Tensor, steps: int) -> EmojiClassifier:
    """The judge. It sees real emoji only, jittered, softened, and with noise."""
    classifier = EmojiClassifier()
    size = 64

    def loss() -> Tensor:
        things, styles = choose(len(ALL_THINGS), size), choose(len(STYLES), size)
        moved = jitter(drawings[things, styles], torch.default_generator, degrees=12, scale=0.12, shift=0.06)
        images = on_backgrounds(moved, choose(len(BACKGROUNDS), size))
        softened = F.avg_pool2d(F.pad(images, (2,) * 4, mode="replicate"), 5, stride=1)
        images = images.lerp(softened, torch.rand(size, 1, 1, 1)) + 0.05 * torch.randn(images.shape)
        thing_logits, style_logits = classifier(images.clamp(0, 1))
        return F.cross_entropy(thing_logits, things, label_smoothing=0.05) + F.cross_entropy(style_logits, styles)

    return cast(EmojiClassifier, worker.train("judge", classifier, loss, steps, 3e-3))


def build_autoencoder() -> AutoencoderKL:
    """A 64x64x3 to 8x8x8 autoencoder. Each normalisation has one group; small groups would lose flat colours."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def train_autoencoder(worker: Worker, drawings: Tensor, steps: int) -> AutoencoderKL:
    """An autoencoder whose latents of drawings on white have mean 0 and standard deviation 1 in every channel.

    Its weights are rounded to half precision, in which they are stored.
    """
    autoencoder = build_autoencoder()
    trained = of_trained(drawings)

    def loss() -> Tensor:
        size = 8
        chosen = trained[choose(len(trained), size), choose(len(STYLES), size)]
        backgrounds = (choose(2 * len(BACKGROUNDS) - 1, size) - len(BACKGROUNDS) + 1).clamp_min(0)
        images = on_backgrounds(jitter(chosen, torch.default_generator), backgrounds) * 2 - 1
        posterior = autoencoder.encode(images).latent_dist
        error = autoencoder.decode(posterior.sample()).sample - images
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + error.square().mean() + edges + 3e-3 * posterior.kl().mean() / 512

    worker.train("autoencoder", autoencoder, loss, steps, 2e-3)
    white = torch.zeros(trained.shape[0] * trained.shape[1], dtype=torch.long)
    standardise_latents(autoencoder, encode(autoencoder, on_backgrounds(trained.flatten(0, 1), white)))
    return autoencoder.half().float()


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """The mean latents [N, 8, 8, 8] of images [N, 3, 64, 64] in [0, 1]."""
    return torch.cat([autoencoder.encode(batch * 2 - 1).latent_dist.mean for batch in images.split(64)])


def one_of(options: tuple[str, ...]) -> str:
    """One of these, by torch's generator."""
    return options[int(torch.randint(len(options), ()))]


def random_prompt(thing: int, style: int, background: int) -> tuple[str, int, int, int]:
    """A training prompt, and the indices of the object, style and background that it draws.

    They are the given ones, with two exceptions. If the prompt names a superclass, the object is one of it; if it names
    no background, the background is white. The empty prompt draws every background. If it drew only white, guidance
    would push pink towards yellow.
    """
    kind, named = torch.rand(()).item(), torch.rand(3).tolist()
    if kind < EMPTY_SHARE:
        return "", thing, style, background
    if named[1] >= BACKGROUND_NAMED_SHARE:
        background = 0
    if kind < EMPTY_SHARE + SUPERCLASS_SHARE:
        name = THINGS[thing].superclasses[int(named[2] < 0.5)]
        noun = one_of(objects.nouns(name))
    else:
        owner = THINGS[thing]
        name = one_of(owner.synonyms) if owner.synonyms and named[2] < SYNONYM_SHARE else owner.name
        noun = objects.nouns(name)[0] if torch.rand(()) < 0.5 else one_of(objects.nouns(name))
    return (
        objects.prompt(
            noun,
            one_of(objects.style_phrases(STYLES[style])) if named[0] < STYLE_NAMED_SHARE else "",
            one_of(objects.background_phrases(BACKGROUNDS[background])) if named[1] < BACKGROUND_NAMED_SHARE else "",
            one_of(FRAMES),
        ),
        thing,
        style,
        background,
    )


def build_denoiser() -> UNet2DConditionModel:
    """A two-level UNet over 8x8x8 latents with cross-attention at both levels."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of DDPM, which ends in noise alone, for velocity prediction.

    Stable Diffusion's schedule leaves half a percent of the image's variance in the noisiest latents, enough to tell
    these few images apart. A denoiser that learns to do so sees images in the noise that sampling starts from, whatever
    the prompt says.
    """
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )


def train_pipeline(worker: Worker, autoencoder: AutoencoderKL, drawings: Tensor, steps: int) -> StableDiffusionPipeline:
    """Train text encoder and denoiser together: velocity prediction, moving average of the weights."""
    tokenizer = learn_tokenizer(objects.corpus(), MAX_TOKENS)
    scheduler = build_scheduler()
    text_encoder = build_text_encoder(tokenizer, width=96, deviation=0.2)
    unet = build_denoiser().to(memory_format=torch.channels_last)  # a tenth faster
    models = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    trained = of_trained(drawings).flatten(0, 1)
    latents = torch.stack(
        [
            encode(autoencoder, on_backgrounds(trained, torch.full((len(trained),), place)))
            for place in range(len(BACKGROUNDS))
        ]
    ).unflatten(1, (len(THINGS), len(STYLES)))

    def loss() -> Tensor:
        wanted = torch.stack([choose(len(one), 64) for one in (THINGS, STYLES, BACKGROUNDS)], 1).tolist()
        drawn = [random_prompt(*one) for one in wanted]
        tokens = tokenizer(
            [prompt for prompt, *_ in drawn], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids
        clean = torch.stack([latents[background, thing, style] for _, thing, style, background in drawn])
        noise = torch.randn(clean.shape)
        timesteps = choose(len(scheduler.alphas_cumprod), len(clean))
        states = models["text_encoder"](tokens).last_hidden_state
        noisy = scheduler.add_noise(clean, noise, timesteps)
        velocity = scheduler.get_velocity(clean, noise, timesteps)
        return F.mse_loss(models["unet"](noisy, timesteps, states).sample, velocity)

    worker.train("denoiser", models, loss, steps, 1.5e-3)
    unet = unet.to(memory_format=torch.contiguous_format)
    return assemble(autoencoder, text_encoder, tokenizer, unet, scheduler)


def work_on(rank: int, options: argparse.Namespace) -> None:
    """Train all parts in one of the processes; the first one stores them."""
    torch.set_num_threads(1)
    rendezvous = f"file://{(options.work / 'rendezvous').resolve()}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=options.workers)
    worker = Worker(rank, options.workers, options.seed, options.work)
    drawings = load_drawings(options.packages)
    torch.manual_seed(options.seed)
    judge = train_judge(worker, drawings, options.judge_steps)
    torch.manual_seed(options.seed)
    autoencoder = train_autoencoder(worker, drawings, options.autoencoder_steps)
    torch.manual_seed(options.seed)
    pipeline = train_pipeline(worker, autoencoder, drawings, options.denoiser_steps)
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        save_file(judge.half().state_dict(), options.out / emoji_pipeline.CLASSIFIER_FILE)
        pipeline.to(dtype=torch.float16).save_pretrained(options.out / emoji_pipeline.PIPELINE_FOLDER.name)
    dist.destroy_process_group()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights in a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    """Train and store everything, then measure what is stored, write FOLDER/quality.json, and draw a contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=emoji_pipeline.DATA, help="default: the package's own")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--packages", type=Path, help="folder of the packages' archives (default: that of --work)")
    parser.add_argument("--registry", default=REGISTRY, help="registry of npm to download them from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes; another number gives other weights")
    parser.add_argument("--judge_steps", type=int, default=1500)
    parser.add_argument("--autoencoder_steps", type=int, default=4000)
    parser.add_argument("--denoiser_steps", type=int, default=6000)
    parser.add_argument("--images_per_class", type=int, default=20, help="samples per class for the measurement")
    options = parser.parse_args()
    options.packages = options.packages or options.work
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "rendezvous").unlink(missing_ok=True)
    fetch_packages(options.packages, options.registry)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # which ends the workers, too
    torch.multiprocessing.spawn(work_on, (options,), nprocs=options.workers, daemon=True)

    folder = options.out / emoji_pipeline.PIPELINE_FOLDER.name
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    drawings = load_drawings(options.packages)
    record = {
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "work", "packages")},
        "judge_on_real_emoji": judge_accuracy(emoji_pipeline.load_classifier(options.out), drawings, 5, options.seed),
        "pipeline": measure(pipeline, options.out, options.images_per_class, options.seed),
        "weights": digests(options.out),
        "machine": f"{platform.machine()}, {options.workers} processes of one thread",
        "versions": {**versions(), "resvg-py": metadata.version("resvg-py")},
    }
    (options.out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    contact_sheet(pipeline, drawings, options.seed).save(options.work / "sheet.png")


if __name__ == "__main__":
    main()
