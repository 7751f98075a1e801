"""Models in one file: recognised, checked and loaded with a pipeline's configs, erased from, saved and drawn again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

import fdu
from fdu import cli
from fdu.cli import main
from fdu.models.kohya_names import original_name
from fdu.storage.loading import at_revision, check_model, result_bytes, with_config
from fdu.storage.single_file import SingleFile, holds_all
from fdu.subjects.registry import subject_of

FEW = {"max_train_steps": 2, "train_batch_size": 1, "num_latents": 2, "num_inference_steps": 1, "rank": 2}
VAE_NAMES = (
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
"""diffusers' names within an autoencoder and those of its original code."""


OPEN_CLIP_NAMES = (
    (r"text_model\.encoder\.layers", "transformer.resblocks"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"text_projection\.weight", "text_projection"),
)
"""Those of a CLIP text encoder and OpenCLIP's, which holds query, key and value as one."""


def renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in names:
        name = re.sub(ours, theirs, name)
    return name


def in_open_clip(encoder: Any) -> dict[str, Tensor]:
    """The weights of a CLIP text encoder by OpenCLIP's names."""
    state, tensors = encoder.state_dict(), {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            stem, _, kind = name.partition(".q_proj.")
            joined = torch.cat([state[f"{stem}.{part}_proj.{kind}"] for part in "qkv"])
            block = renamed(stem, OPEN_CLIP_NAMES).removesuffix("self_attn")
            tensors[f"{block}attn.in_proj_{kind}"] = joined
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[renamed(name, OPEN_CLIP_NAMES)] = tensor.T if "text_projection" in name else tensor
    return tensors


def in_one_file(pipeline: Any) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1.x or XL pipeline by the names of its original code."""
    first = "cond_stage_model" if isinstance(pipeline, StableDiffusionPipeline) else "conditioner.embedders.0"
    tensors = {f"{first}.transformer.text_model.{name}": t for name, t in pipeline.text_encoder.state_dict().items()}
    if hasattr(pipeline, "text_encoder_2"):
        second = in_open_clip(pipeline.text_encoder_2)
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    for name, tensor in pipeline.unet.state_dict().items():
        layer, _, parameter = name.rpartition(".")
        inner = re.sub(r".*\.attentions\.\d+\.", "", layer) if ".attentions." in layer else ""
        original = original_name(layer, pipeline.unet.config) or ""
        outer = re.sub(r"(\.\d+)_", r"\1.", re.sub(r"_(\d+)", r".\1", original[: len(original) - len(inner)]))
        tensors[f"model.diffusion_model.{outer}{inner}.{parameter}"] = tensor
    last = len(pipeline.vae.config.up_block_types) - 1
    for name, tensor in pipeline.vae.state_dict().items():
        name = renamed(name, VAE_NAMES)
        name = re.sub(r"decoder\.up\.(\d+)", lambda match: f"decoder.up.{last - int(match[1])}", name)
        tensors[f"first_stage_model.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def store(pipeline: Any, folder: Path) -> tuple[Path, Path]:
    """Write a file with a pipeline's weights, and the folder of its configs and tokenizers, without weights."""
    pipeline.save_pretrained(folder / "configs")
    for weights in (folder / "configs").rglob("*.safetensors"):
        weights.unlink()
    save_file(in_one_file(pipeline), folder / "tiny.safetensors")
    return folder / "tiny.safetensors", folder / "configs"


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Stable Diffusion, as :func:`store` writes it."""
    return store(families.build("sd"), tmp_path)


def drawn(pipeline: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a photo of the digit three", num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_file_is_the_pipeline_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    # diffusers tells the text encoders of SDXL by their widths.
    made = families.build(name, **({"second_width": 32} if name == "sdxl" else {}))
    file, configs = store(made, tmp_path)
    loaded = fdu.load_pipeline(file, model_config=configs)
    assert type(loaded) is type(made)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if name == "sdxl" else [])):
        wanted = getattr(made, part).state_dict()
        found = getattr(loaded, part).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert (drawn(loaded) == drawn(made)).all()
    assert fdu.load_pipeline(f"{file}@{configs}", dtype="bfloat16").unet.dtype == torch.bfloat16


def test_a_file_is_erased_from_saved_and_drawn_again(stored: tuple[Path, Path], tmp_path: Path) -> None:
    file, configs = stored
    pipeline = fdu.load_pipeline(file, model_config=configs)
    result = fdu.erase(pipeline, "three", "eight", learning_rate=0.1, **FEW)
    with result.original() as original:
        before = drawn(original)
    after = drawn(result.pipeline)
    assert (before == drawn(families.build("sd"))).all() and (after != before).any()
    folder = result.save(tmp_path / "out")
    record = json.loads((folder / "fdu.json").read_text())
    whole = families.build("sd")
    assert record["base"] == "tiny.safetensors" and record["revision"] is None
    assert record["fingerprint"] == fdu.erase(whole, "three", "eight", **FEW).fingerprint()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert 'fdu.load_pipeline("path/to/tiny.safetensors", model_config="path/to/configs")' in card
    assert record["model_config"] == "configs" and str(tmp_path) not in card
    plain = StableDiffusionPipeline.from_single_file(str(file), config=str(configs))
    plain.load_lora_weights(folder)
    assert (drawn(plain) == after).all()
    whole = result.save(tmp_path / "whole", save_as="pipeline")
    assert str(tmp_path) not in (whole / "model_index.json").read_text()


@pytest.mark.slow
def test_the_commands_take_a_file(
    stored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, configs = stored
    few = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
    beside = ["--model_config", str(configs)]
    named = ["--target", "three", "--anchor", "eight", "--device", "cpu"]
    out = tmp_path / "out"
    assert main(["erase", str(file), *beside, *named, "--out", str(out), *few]) == cli.OK
    told = capsys.readouterr().out
    printed = f"fdu evaluate {file} {out} --model_config {configs}"
    assert printed in told and "fdu.load_pipeline(" in told
    assert main(["plan", str(file), *beside, *few]) == cli.OK
    planned = capsys.readouterr().out
    assert main(["plan", str(configs), *few]) == cli.OK
    assert capsys.readouterr().out == planned
    families.save_clip(tmp_path / "clip", " ".join(families.CORPUS))
    judged = ["--judge", str(tmp_path / "clip"), "--images_per_class", "1", "--num_inference_steps", "1"]
    assert main([*printed.split()[1:], *judged, "--device", "cpu"]) == cli.OK
    assert callable(cli.parse(["evaluate", f"{file}@{configs}", str(out), *judged]).prepare(""))


def test_a_denoiser_alone_takes_the_rest_from_its_pipeline(tmp_path: Path) -> None:
    made = families.build("flux_guidance")
    made.save_pretrained(tmp_path / "flux")
    (tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    file = tmp_path / "tuned.safetensors"
    tensors = {name: tensor + 1 for name, tensor in made.transformer.state_dict().items()}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"MODEL '.*tuned\.safetensors' holds no model.*model_config"):
        fdu.load_pipeline(file)
    loaded = fdu.load_pipeline(file, model_config=tmp_path / "flux")
    assert type(loaded) is FluxPipeline
    found = loaded.transformer.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(loaded.vae.decoder.conv_in.weight, made.vae.decoder.conv_in.weight)


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "black-forest-labs/FLUX.1-schnell"),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
                "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (8,),
            },
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
    ],
)
def test_without_a_config_the_pipeline_is_diffusers_choice(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], config: str
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    check_model(str(file))
    found = SingleFile.of(str(file))
    assert found is not None and found.pipeline_name == config
    assert found.config is None and subject_of(str(file)).folder is None
    assert result_bytes(subject_of(str(file)).places, "full") > file.stat().st_size
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("diffusers.DiffusionPipeline.load_config", _absent)
        with pytest.raises(OSError, match=f"model .* could not be loaded: no configs in '{config}'.*model_config"):
            fdu.load_pipeline(file)


def _absent(name: str, **others: Any) -> Any:
    raise OSError(f"{name} is not here")


@pytest.mark.parametrize(
    ("text_encoders", "names", "whole"),
    [
        (1, ["first_stage_model.x", "cond_stage_model.x"], True),
        (2, ["first_stage_model.x", "conditioner.embedders.0.x", "conditioner.embedders.1.x"], True),
        (2, ["first_stage_model.x", "conditioner.embedders.0.x", "conditioner.embedders.0.y"], False),
        (2, ["vae.x", "text_encoders.clip_l.x", "text_encoders.t5xxl.x"], True),
        (3, ["first_stage_model.x", "text_encoders.clip_l.x", "text_encoders.clip_g.x"], False),
        (1, ["cond_stage_model.x"], False),
        (2, ["double_blocks.x"], False),
    ],
)
def test_whether_a_file_holds_every_part_shows_in_its_names(text_encoders: int, names: list[str], whole: bool) -> None:
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"][:text_encoders]
    index = {**{name: ["transformers", "CLIPTextModel"] for name in encoders}, "text_encoder_4": [None, None]}
    assert holds_all(names, {**index, "_class_name": "StableDiffusionPipeline"}) == whole


def test_files_that_are_no_models_are_refused(tmp_path: Path, stored: tuple[Path, Path]) -> None:
    lora, damaged, pickle = (tmp_path / name for name in ("lora.safetensors", "damaged.safetensors", "old.ckpt"))
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2, 2)}, lora)
    damaged.write_bytes(b"damaged")
    pickle.write_bytes(b"")
    for file, error, message in (
        (tmp_path / "absent.safetensors", FileNotFoundError, "MODEL '.*absent.*' does not exist"),
        (lora, ValueError, "MODEL '.*lora.*' holds a LoRA.*base model"),
        (damaged, ValueError, "MODEL '.*damaged.*' is not a safetensors file"),
        (pickle, ValueError, r"MODEL '.*old\.ckpt' is a file of another kind than \.safetensors"),
        (f"{stored[0]}@{tmp_path}", FileNotFoundError, "model_config '.*' is not the folder of a diffusers pipeline"),
        (f"{stored[0]}@org/model@main", ValueError, "model_config 'org/model@main' must be.*without revision"),
        (f"{stored[0]}@{stored[0]}", ValueError, "model_config '.*' must be a folder"),
        (f"{stored[0]}@absent", FileNotFoundError, "model_config 'absent' does not exist"),
    ):
        with pytest.raises(error, match=message):
            check_model(str(file))


def test_what_does_not_go_with_a_file_is_refused(stored: tuple[Path, Path]) -> None:
    file, configs = map(str, stored)
    with pytest.raises(ValueError, match="revision goes with a hub id"):
        at_revision("models/sd.safetensors", "main")
    with pytest.raises(ValueError, match="variant chooses among the files of a pipeline"):
        fdu.load_pipeline(file, variant="fp16", model_config=configs)
    for model in (configs, "org/model", f"{file}@{configs}"):
        with pytest.raises(ValueError, match="model_config goes with a .safetensors file"):
            with_config(model, configs)


def test_weights_that_do_not_fit_are_refused_in_a_line(stored: tuple[Path, Path], tmp_path: Path) -> None:
    _, configs = stored
    tensors = in_one_file(families.build("sd"))
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(3, 4, 3, 3)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(OSError, match=r"model '.*other\.safetensors@.*' could not be loaded: [^\n]+$"):
        fdu.load_pipeline(tmp_path / "other.safetensors", model_config=configs)
    text = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    for absent in ("first_stage_model.post_quant_conv.weight", text):
        tensors = in_one_file(families.build("sd"))
        del tensors[absent]
        save_file(tensors, tmp_path / "less.safetensors")
        with pytest.raises(OSError, match="could not be loaded: it lacks weights of a StableDiffusionPipeline"):
            fdu.load_pipeline(tmp_path / "less.safetensors", model_config=configs)
