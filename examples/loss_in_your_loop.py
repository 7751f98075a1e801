"""The loss in your own loop: erase "three" from the digits pipeline in plain PyTorch.

``python examples/loss_in_your_loop.py`` takes half a minute on two CPU cores. ``fdu.erase`` does the same and more;
start here if you already have a trainer. The comment "the loss" marks the lines that differ from any other trainer.
"""

import argparse
import copy

import torch
from diffusers import DDPMScheduler

import fdu
import fdu_kernels  # the loss
from fdu.subjects.digits import pipeline as digits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--divergence", default="squared_hellinger", help="any of fdu_kernels.divergences()")
options = parser.parse_args()

torch.manual_seed(0)
pipeline = fdu.load_pipeline("digits")
pipeline.set_progress_bar_config(disable=True)
unet, frozen = pipeline.unet.requires_grad_(False), copy.deepcopy(pipeline.unet)
noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
trained = [weight for name, weight in unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
for weight in trained:
    weight.requires_grad_(True)
optimizer = torch.optim.AdamW(trained, lr=1e-3)

# The target's prompt should mean the anchor's; neighbours and the empty prompt should stay as they are.
kept = ["", *(f"a photo of the digit {digit}" for digit in ("eight", "two", "five", "nine"))]
prompts = {"target": ["a photo of the digit three"], "anchor": ["a photo of the digit eight"], "kept": kept}
latents = pipeline(prompts["target"] + kept, num_inference_steps=12, output_type="latent").images
with torch.no_grad():
    embeddings = {name: pipeline.encode_prompt(texts, "cpu", 1, False)[0] for name, texts in prompts.items()}

# sigma="auto" sets the scale from the first steps, so that the divergence matters: docs/losses.md, "sigma".
criterion = fdu_kernels.GaussianDivergenceLoss(options.divergence, sigma="auto")  # the loss
for step in range(options.steps):
    clean = latents[torch.randint(len(latents), (16,))]
    noise, timesteps = torch.randn_like(clean), torch.randint(1000, (16,))
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    others = embeddings["kept"][torch.randint(len(kept), (8,))]
    predicted = unet(noisy, timesteps, torch.cat([embeddings["target"].expand(8, -1, -1), others])).sample
    with torch.no_grad():
        wanted = frozen(noisy, timesteps, torch.cat([embeddings["anchor"].expand(8, -1, -1), others])).sample
    loss = criterion(predicted, wanted)  # the loss, instead of F.mse_loss(predicted, wanted)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")

judge = digits.judges()["digit"]
images = pipeline(["a photo of the digit three"] * 16, num_inference_steps=12, guidance_scale=3.0, output_type="pt")
print("now drawn for 'a photo of the digit three':", ", ".join(judge(images.images)))
