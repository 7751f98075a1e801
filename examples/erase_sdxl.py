"""Erase a style from Stable Diffusion XL on one GPU, with checkpoints: settings for a real model, as a start.

``python examples/erase_sdxl.py --target "van gogh" --anchor painting --out erased``. Any other pipeline that fdu knows
goes the same way: change the model, and the resolution if it has another. The command line does the same
(``fdu erase MODEL --target ... --out ...``).
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image

import fdu

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0", help="a hub id or a folder")
parser.add_argument("--target", default="van gogh")
parser.add_argument("--anchor", default="painting")
parser.add_argument("--out", type=Path, default=Path("erased"))
parser.add_argument("--device", default="cuda")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--resolution", type=int, default=1024)
options = parser.parse_args()

pipeline = AutoPipelineForText2Image.from_pretrained(options.model, dtype=torch.bfloat16).to(options.device)
result = fdu.erase(
    pipeline,
    options.target,
    options.anchor,
    concept_type="style",
    # What else should stay as it is: the neighbours of what is erased.
    preservation_prompts=("a painting by claude monet", "a painting by rembrandt", "a photo of a street"),
    resolution=options.resolution,
    max_train_steps=options.steps,
    learning_rate=2e-4,  # a large model needs smaller steps than the embedded one
    train_batch_size=2,  # as many again preserve
    gradient_accumulation_steps=2,
    mixed_precision="bf16",
    gradient_checkpointing=True,
    num_latents=64,
    num_inference_steps=25,
    guidance_scale=6.0,
    sample_batch_size=4,
    checkpoint_dir=f"{options.out}-checkpoints",
    resume_from_checkpoint="latest",  # called again, an interrupted run goes on
)
result.save(options.out)
print(f"pipeline.load_lora_weights({str(options.out)!r}) loads it in plain diffusers")
