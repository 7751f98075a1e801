"""Parts of a small Stable Diffusion pipeline trained from scratch, and of its judge."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def learn_tokenizer(corpus: list[str], max_length: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer with CLIP's conventions, whose tokens are the words of ``corpus``.

    Args:
        corpus: prompts.
        max_length: the most tokens of a prompt, with start and end.
    """
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    merges = learn_merges(Counter(word for text in corpus for word, _ in splitter.pre_tokenize_str(text.lower())))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    with tempfile.TemporaryDirectory() as folder:  # in the files of CLIP's published tokenizers
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)


def learn_merges(words: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding that make every word one token, the most frequent pair first.

    Of pairs that are equally frequent the first in the alphabet is merged. The trainer of the package tokenizers takes
    any of them, so that two processes could disagree on the numbers of words.

    Args:
        words: how often each word occurs.

    >>> learn_merges({"pig": 1, "pie": 1})
    [('p', 'i'), ('pi', 'e</w>'), ('pi', 'g</w>')]
    """
    parts = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        counts: Counter[tuple[str, str]] = Counter()
        for word, own in parts.items():
            for pair in pairwise(own):
                counts[pair] += words[word]
        if not counts:
            return merges
        merge = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(merge)
        for own in parts.values():
            place = 0
            while place < len(own) - 1:
                if tuple(own[place : place + 2]) == merge:
                    own[place : place + 2] = ["".join(merge)]
                place += 1


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, deviation: float) -> CLIPTextModel:
    """A CLIP text encoder of two layers.

    Args:
        tokenizer: gives the vocabulary and the number of positions.
        width: dimension of the embeddings.
        deviation: standard deviation of the token embeddings.
    """
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.convert_tokens_to_ids(START),
            eos_token_id=tokenizer.convert_tokens_to_ids(END),
            pad_token_id=tokenizer.convert_tokens_to_ids(END),
        )
    )
    nn.init.normal_(text_encoder.get_input_embeddings().weight, std=deviation)
    return text_encoder


def standardise_latents(autoencoder: AutoencoderKL, latents: Tensor) -> None:
    """Fold the mean and standard deviation of each latent channel into the two 1x1 convolutions around the latents."""
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encode_convolution, decode_convolution = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    decode_convolution.bias += decode_convolution.weight[:, :, 0, 0] @ mean
    decode_convolution.weight *= deviation[None, :, None, None]
    encode_convolution.weight[:channels] /= deviation[:, None, None, None]
    encode_convolution.bias[:channels] = (encode_convolution.bias[:channels] - mean) / deviation
    encode_convolution.bias[channels:] -= 2 * deviation.log()


def assemble(
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    """The pipeline of these parts, without a safety checker."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def convolutions(channels: tuple[int, ...]) -> list[nn.Module]:
    """Blocks of convolution, normalisation, ReLU and pooling; each halves height and width.

    Args:
        channels: of the images, then of each block.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return layers
