"""Erase "three" from the digits pipeline, save the LoRA, load it in plain diffusers and draw.

``python examples/erase_digits.py --out erased`` takes a minute on two CPU cores and downloads nothing.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import fdu
from fdu.subjects.digits import pipeline as digits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("erased"))
parser.add_argument("--steps", type=int, default=fdu.EraseConfig().max_train_steps)
options = parser.parse_args()

target, anchor = digits.concepts("three", "eight")
result = fdu.erase(
    fdu.load_pipeline("digits"),
    target,
    anchor,
    preservation_prompts=digits.preserved("three"),
    max_train_steps=options.steps,
)
result.save(options.out)

# Drawing needs plain diffusers only: the result is a LoRA like any other.
pipeline = StableDiffusionPipeline.from_pretrained(digits.PIPELINE_FOLDER, dtype=torch.float32)
prompts = ["a photo of the digit three", "a photo of the digit seven"]
drawn = []
for _ in ("before", "after"):
    images = pipeline(
        prompts, num_inference_steps=12, guidance_scale=3.0, generator=torch.Generator().manual_seed(1)
    ).images
    drawn += images
    pipeline.load_lora_weights(options.out)

sheet = drawn[0].resize((4 * 128, 128)).copy()
for place, image in enumerate(drawn):
    sheet.paste(image.resize((128, 128)), (place * 128, 0))
sheet.save(options.out / "drawn.png")
print(f"three and seven before, three and seven after: {options.out / 'drawn.png'}")
