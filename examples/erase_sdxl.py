"""Erase a style from Stable Diffusion XL on one GPU, with checkpoints. Nobody has tuned the settings yet.

``python examples/erase_sdxl.py --target "van gogh" --anchor painting --out erased``. For another model change --model
and, if its images have another size, --resolution. The command line does the same: ``fdu erase MODEL --target ...``.
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
    # Neighbours of the target, which should stay as they are.
    preservation_prompts=("a painting by claude monet", "a painting by rembrandt", "a photo of a street"),
    resolution=options.resolution,
    max_train_steps=options.steps,
    learning_rate=2e-4,  # below the default of 0.004, which suits the small pipelines of fdu
    train_batch_size=2,  # plus 2 preserving samples
    gradient_accumulation_steps=2,
    mixed_precision="bf16",
    gradient_checkpointing=True,
    num_latents=64,
    num_inference_steps=25,
    sampling_guidance=6.0,
    sample_batch_size=4,
    checkpoint_dir=f"{options.out}-checkpoints",
    resume_from_checkpoint="latest",  # the same command resumes an interrupted run
)
result.save(options.out)
print(f"pipeline.load_lora_weights({str(options.out)!r}) loads it in plain diffusers")
