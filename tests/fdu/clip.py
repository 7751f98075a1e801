"""A CLIP model of random weights, small enough for a test, built from its config and saved as a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from fdu.subjects.digits.vocabulary import learn_tokenizer

SIZE = 32
"""Height and width of the images that its image encoder takes."""
LAYERS = 6
WORDS = "a photo of three eight two zero ink"
CONCEPTS = """[target] three
a photo of {}
[unseen]
a scan of {}
[anchor] eight
a photo of eight
[near] two
[generic] zero
a picture of {}
[unrelated] ink
in black ink
"""
"""A concept set, and some of its words, for the embedded pipeline taken for a pipeline like any other."""


def save_clip(folder: Path, words: str) -> Path:
    """Write model, tokenizer (of ``words``) and image processor into ``folder``."""
    tokenizer = learn_tokenizer(words.split(), 16)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    tokens = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**width, "num_hidden_layers": 2, **tokens},
        vision_config={**width, "num_hidden_layers": LAYERS, "image_size": SIZE, "patch_size": 8},
        projection_dim=16,
        # Random weights of the usual size would map all images to nearly one place.
        initializer_factor=20.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(folder)
    return folder
