"""What is written must come back: in plain diffusers, in kohya's names, as a pipeline, as a delta."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from families import ALPHA, CONTEXT, RANK, add_adapter, change_weights, output, tensors_of
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fdu.models import parts
from fdu.models.kohya_names import original_name
from fdu.storage import kohya, lora
from fdu.storage.fingerprint import fingerprint
from fdu.storage.formats import choose_format, write
from fdu.storage.merging import merge, merged
from fdu.storage.readers import Loaded, load_weights

pytestmark = pytest.mark.quick(name=["sd", "flux"])

ATTENTION = {
    "sd": ("to_q", "to_k", "to_v", "to_out.0"),
    "sdxl": ("to_q", "to_k", "to_v", "to_out.0"),
    "sd3": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "flux": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
}


def denoiser(pipeline: DiffusionPipeline) -> torch.nn.Module:
    return getattr(pipeline, parts.denoiser_name(pipeline))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def trained_with_lora(name: str, endings: Any = None, dora: bool = False) -> tuple[Any, families.Layers, torch.Tensor]:
    pipeline = families.build(name)
    before = output(pipeline, name)
    attribute = parts.denoiser_name(pipeline)
    layers = {attribute: add_adapter(pipeline, attribute, endings or CONTEXT[name], dora=dora)}
    after = output(pipeline, name)
    assert not close(before, after)
    return pipeline, layers, after


# LoRA in diffusers' names


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "sana"])
def test_plain_diffusers_loads_a_lora_and_drops_it_without_a_trace(name: str, dora: bool, tmp_path: Path) -> None:
    pipeline, layers, after = trained_with_lora(name, dora=dora)
    file = write(tmp_path, "lora", pipeline, layers, lora_alpha=ALPHA)
    assert file == tmp_path / "pytorch_lora_weights.safetensors" and file.is_file()
    plain = families.build(name)
    before, weights_before = output(plain, name), tensors_of(denoiser(plain))
    plain.load_lora_weights(tmp_path)
    assert close(output(plain, name), after)
    plain.unload_lora_weights()
    assert torch.equal(output(plain, name), before)
    assert all(torch.equal(tensor, weights_before[key]) for key, tensor in tensors_of(denoiser(plain)).items())


@pytest.mark.parametrize(
    ("name", "attributes"), [("sd", ["text_encoder"]), ("sdxl", ["text_encoder", "text_encoder_2"])]
)
def test_text_encoders_come_back_and_are_named_as_other_programs_name_them(
    name: str, attributes: list[str], tmp_path: Path
) -> None:
    pipeline = families.build(name)
    layers = {attribute: add_adapter(pipeline, attribute, ("q_proj", "v_proj")) for attribute in attributes}
    layers["unet"] = add_adapter(pipeline, "unet", CONTEXT[name])
    file = write(tmp_path, "lora", pipeline, layers, lora_alpha=ALPHA)
    assert f"{attributes[-1]}.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in load_file(file)
    plain = families.build(name)
    plain.load_lora_weights(tmp_path)
    assert close(output(plain, name), output(pipeline, name))


def test_layers_of_different_ranks_keep_their_scales(tmp_path: Path) -> None:
    pipeline, layers, _ = trained_with_lora("sd")
    first = next(iter(layers["unet"])).split(".lora_")[0]
    layers["unet"][f"{first}.lora_A.weight"] = layers["unet"][f"{first}.lora_A.weight"][:2]
    layers["unet"][f"{first}.lora_B.weight"] = layers["unet"][f"{first}.lora_B.weight"][:, :2]
    write(tmp_path, "lora", pipeline, layers, lora_alpha=ALPHA)
    plain = families.build("sd")
    plain.load_lora_weights(tmp_path, adapter_name="it")
    scalings = {layer.r["it"]: layer.scaling["it"] for layer in parts.adapted(plain.unet)}
    assert scalings == {2: ALPHA / 2, RANK: ALPHA / RANK}


# LoRA in kohya's names


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_plain_diffusers_loads_a_kohya_file(name: str, tmp_path: Path) -> None:
    # Of FLUX, diffusers reads the layers in blocks only; see below.
    pipeline, layers, after = trained_with_lora(name, CONTEXT[name][:2] if name == "flux" else None)
    file = write(tmp_path, "kohya", pipeline, layers, lora_alpha=ALPHA)
    plain = families.build(name)
    plain.load_lora_weights(str(file))
    assert close(output(plain, name), after)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_plain_diffusers_loads_text_encoders_of_a_kohya_file(name: str, tmp_path: Path) -> None:
    pipeline = families.build(name)
    layers = {"unet": add_adapter(pipeline, "unet", ATTENTION[name])}
    for attribute in ("text_encoder", "text_encoder_2"):
        if hasattr(pipeline, attribute):
            layers[attribute] = add_adapter(pipeline, attribute, ("q_proj", "out_proj", "fc1"))
    file = write(tmp_path, "kohya", pipeline, layers, lora_alpha=ALPHA)
    first = "lora_te" if name == "sd" else "lora_te1"
    assert f"{first}_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in load_file(file)
    for load in (lambda plain: plain.load_lora_weights(str(file)), lambda plain: load_weights(plain, file)):
        plain = families.build(name)
        load(plain)
        assert close(output(plain, name), output(pipeline, name))


@pytest.mark.parametrize(
    ("endings", "dora"),
    [("context", False), ("context", True), ("attention", True), ("everything", False)],
    ids=["context-lora", "context-dora", "attention-dora", "everything-lora"],
)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_kohya_files_come_back_bit_for_bit(name: str, endings: str, dora: bool, tmp_path: Path) -> None:
    everything = (*ATTENTION[name], "proj", "net.2", "linear", "linear_1", "context_embedder", "proj_out", "proj_mlp")
    chosen = {"context": CONTEXT[name], "attention": ATTENTION[name], "everything": everything}[endings]
    pipeline, layers, after = trained_with_lora(name, chosen, dora)
    file = write(tmp_path, "kohya", pipeline, layers, lora_alpha=ALPHA)
    attribute = parts.denoiser_name(pipeline)
    written = lora.from_layers(layers, ALPHA)[attribute]
    read = kohya.from_file(families.build(name), load_file(file))[attribute]
    if not dora:  # in a fused layer DoRA gives a magnitude to those without one
        assert read.keys() == written.keys()
    for layer, update in written.items():
        assert torch.equal(read[layer].down, update.down) and torch.equal(read[layer].up, update.up)
        assert read[layer].alpha == pytest.approx(update.alpha)
        assert update.magnitude is None or torch.equal(read[layer].magnitude, update.magnitude)
    plain = families.build(name)
    load_weights(plain, file)
    assert close(output(plain, name), after)


def test_kohya_files_are_named_as_sd_scripts_names_them() -> None:
    sdxl = SimpleNamespace(layers_per_block=2, up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    for layer, original in {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k": (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_k"
        ),
        "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block_1_transformer_blocks_9_ff_net_2",
        "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_out.0": (
            "output_blocks_2_1_transformer_blocks_3_attn2_to_out_0"
        ),
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
        "up_blocks.2.resnets.0.conv1": "output_blocks_6_0_in_layers_2",
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "add_embedding.linear_2": "label_emb_0_2",
    }.items():
        assert original_name(layer, sdxl) == original


def test_diffusers_reads_the_layers_of_an_sdxl_of_full_depth(tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 128),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(1, 2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        )
    pipeline = SimpleNamespace(unet=unet)
    ends = (
        *ATTENTION["sd"],
        "proj",
        "net.2",
        "proj_in",
        "proj_out",
        "conv1",
        "conv2",
        "time_emb_proj",
        "conv_shortcut",
    )
    updates = {
        name: lora.Update(torch.full((1, 1), float(index)), torch.zeros(1, 1), 1.0)
        for index, (name, _) in enumerate(unet.named_modules())
        if name.endswith(tuple(f".{end}" for end in ends))
    }
    assert len(updates) > 700
    file = kohya.write(tmp_path, pipeline, {"unet": updates}, {})
    tensors, _ = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=unet.config)
    read = lora.from_file(pipeline, tensors, {})["unet"]
    assert {name: update.down.item() for name, update in read.items()} == {
        name: update.down.item() for name, update in updates.items()
    }


def test_every_layer_of_a_unet_has_its_name_in_the_original_code() -> None:
    unet = families.build("sdxl").unet
    names = [
        original_name(name, unet.config)
        for name, layer in unet.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    assert None not in names and len(set(names)) == len(names)


def test_kohya_metadata_tells_the_family_and_the_rank(tmp_path: Path) -> None:
    for name, version, module in (
        ("sd", "sd_v1", "networks.lora"),
        ("sdxl", "sdxl_base_v1-0", "networks.lora"),
        ("sd3", "sd3", "networks.lora_sd3"),
        ("flux", "flux1", "networks.lora_flux"),
        ("flux2", "flux_2_dev", "networks.lora_flux_2"),
        ("flux2_klein", "flux_2_klein_4b", "networks.lora_flux_2"),
    ):
        pipeline, layers, _ = trained_with_lora(name, CONTEXT.get(name, ("add_k_proj",)))
        file = write(tmp_path, "kohya", pipeline, layers, lora_alpha=ALPHA, metadata={"fdu_target": "three"})
        with safe_open(file, "pt") as content:
            metadata = content.metadata()
        assert metadata["ss_base_model_version"] == version and metadata["ss_network_module"] == module
        assert metadata["ss_network_dim"] == str(RANK) and metadata["ss_network_alpha"] == str(ALPHA)
        assert metadata["ss_v2"] == "False" and metadata["fdu_target"] == "three"


def test_layers_of_one_fused_layer_may_differ_in_scale(tmp_path: Path) -> None:
    pipeline, layers, _ = trained_with_lora("flux")
    updates = lora.from_layers(layers, ALPHA)["transformer"]
    first = next(iter(updates))
    updates[first] = lora.Update(updates[first].down[:2], updates[first].up[:, :2], 8.0)
    file = kohya.write(tmp_path, pipeline, {"transformer": updates}, {})
    read = kohya.from_file(pipeline, load_file(file))["transformer"]
    for layer, update in updates.items():
        effect = update.alpha / update.rank * update.up @ update.down
        assert torch.allclose(read[layer].alpha / read[layer].rank * read[layer].up @ read[layer].down, effect)


def test_diffusers_reads_every_layer_of_a_flux_of_full_width(tmp_path: Path) -> None:
    """On the meta device: its reader knows the real width only."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    pipeline = SimpleNamespace(transformer=transformer)
    kinds = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "proj_mlp",
        "blocks.0.proj_out",
        "context_embedder",
        "text_embedder.linear_1",
    )
    generator = torch.Generator().manual_seed(0)
    updates = {
        name: lora.Update(
            torch.randn(1, layer.in_features, generator=generator), torch.randn(layer.out_features, 1), alpha=1.0
        )
        for name, layer in transformer.named_modules()
        if name.endswith(kinds)
    }
    assert len(updates) == 12
    file = kohya.write(tmp_path, pipeline, {"transformer": updates}, {})
    read = FluxPipeline.lora_state_dict(str(file))
    for layer, update in updates.items():
        # Outside of blocks, it forgets the prefix without which it loads nothing.
        name = f"transformer.{layer}" if "blocks" in layer else layer
        assert torch.equal(read.pop(f"{name}.lora_A.weight"), update.down)
        assert torch.equal(read.pop(f"{name}.lora_B.weight"), update.up)
    assert not any(tensor.any() for name, tensor in read.items() if "lora_B" in name)


NEWER = {
    "chroma": ("attn.add_k_proj", "double_blocks_0_txt_attn_qkv", "context_embedder", "txt_in"),
    "flux2": ("attn.add_k_proj", "double_blocks_0_txt_attn_qkv", "context_embedder", "txt_in"),
    "flux2_klein": (
        "attn.to_qkv_mlp_proj",
        "single_blocks_0_linear1",
        "ff_context.linear_in",
        "double_blocks_0_txt_mlp_0",
    ),
    "auraflow": ("attn.add_k_proj", "double_layers_0_attn_w1k", "context_embedder", "cond_seq_linear"),
    "lumina2": (
        "context_refiner.0.attn.to_k",
        "context_refiner_0_attention_qkv",
        "caption_embedder.1",
        "cap_embedder_1",
    ),
    "zimage": (
        "context_refiner.0.attention.to_k",
        "context_refiner_0_attention_qkv",
        "cap_embedder.1",
        "cap_embedder_1",
    ),
    "qwenimage": ("0.attn.add_k_proj", "transformer_blocks_0_attn_add_k_proj", "txt_in", "txt_in"),
    "wan": ("0.attn2.to_k", "blocks_0_cross_attn_k", "text_embedder.linear_1", "text_embedding_0"),
}
"""By family two layers with the names that ComfyUI, sd-scripts or musubi-tuner give them."""


@pytest.mark.parametrize("name", NEWER)
def test_the_layers_of_newer_families_have_the_names_of_their_original_code(name: str, tmp_path: Path) -> None:
    first, first_name, second, second_name = NEWER[name]
    pipeline, layers, after = trained_with_lora(name, (first, second))
    file = write(tmp_path, "kohya", pipeline, layers, lora_alpha=ALPHA)
    written = {key.partition(".")[0] for key in load_file(file)}
    assert written == {f"lora_unet_{first_name}", f"lora_unet_{second_name}"}
    plain = families.build(name)
    load_weights(plain, file)
    assert close(output(plain, name), after)


def test_diffusers_reads_a_wan_file_that_changes_every_layer_of_the_blocks(tmp_path: Path) -> None:
    pipeline, layers, after = trained_with_lora("wan", ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"))
    file = write(tmp_path, "kohya", pipeline, layers, lora_alpha=ALPHA)
    plain = families.build("wan")
    plain.load_lora_weights(str(file))
    assert close(output(plain, "wan"), after)


@pytest.mark.parametrize("name", ["qwenimage", "zimage", "flux2"])
def test_diffusers_reads_all_of_attention(name: str, tmp_path: Path) -> None:
    endings = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_k_proj",
        "to_add_out",
        "to_qkv_mlp_proj",
        "txt_in",
        "cap_embedder.1",
    )
    pipeline, layers, after = trained_with_lora(name, endings)
    file = write(tmp_path, "kohya", pipeline, layers, lora_alpha=ALPHA)
    plain = families.build(name)
    plain.load_lora_weights(str(file))
    assert close(output(plain, name), after)


def test_kohya_names_of_an_unknown_family_are_refused(tmp_path: Path) -> None:
    pipeline, layers, _ = trained_with_lora("sana")
    with pytest.raises(ValueError, match="not for SanaTransformer2DModel"):
        write(tmp_path, "kohya", pipeline, layers, lora_alpha=ALPHA)


# Full pipelines and deltas


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "sana"])
def test_a_pipeline_folder_has_the_changed_weights(name: str, tmp_path: Path) -> None:
    pipeline = families.build(name)
    before = output(pipeline, name)
    change_weights(pipeline, parts.denoiser_name(pipeline), CONTEXT.get(name, ("attn2.to_k", "attn2.to_v")))
    write(tmp_path, "pipeline", pipeline)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    own = parts.weights(pipeline)
    assert all(torch.equal(tensor, own[key]) for key, tensor in parts.weights(plain).items())
    assert close(output(plain, name), output(pipeline, name)) and not close(output(plain, name), before)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_a_pipeline_folder_has_adapters_merged_and_the_pipeline_keeps_them(
    name: str, dora: bool, tmp_path: Path
) -> None:
    pipeline, layers, after = trained_with_lora(name, dora=dora)
    if name == "sd":
        layers["text_encoder"] = add_adapter(pipeline, "text_encoder", ("q_proj",))
        after = output(pipeline, name)
    attributes = list(layers)
    own = {attribute: tensors_of(getattr(pipeline, attribute)) for attribute in attributes}
    write(tmp_path, "pipeline", pipeline, layers, lora_alpha=ALPHA)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    assert close(output(plain, name), after)
    assert not any("lora" in key for key in denoiser(plain).state_dict())
    assert torch.equal(output(pipeline, name), after)
    for attribute in attributes:
        now = tensors_of(getattr(pipeline, attribute))
        assert now.keys() == own[attribute].keys()
        assert all(torch.equal(tensor, own[attribute][key]) for key, tensor in now.items())


def test_what_is_merged_while_writing_fails_is_unmerged() -> None:
    pipeline, _, after = trained_with_lora("sd")
    own = tensors_of(pipeline.unet)
    with pytest.raises(OSError, match="full"), merged(pipeline):
        raise OSError("full")
    assert torch.equal(output(pipeline, "sd"), after)
    assert all(torch.equal(tensor, own[key]) for key, tensor in tensors_of(pipeline.unet).items())


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "sana"])
def test_a_delta_gives_the_same_weights_bit_for_bit_and_is_small(name: str, tmp_path: Path) -> None:
    pipeline = families.build(name)
    attribute = parts.denoiser_name(pipeline)
    changed = change_weights(pipeline, attribute, CONTEXT.get(name, ("attn2.to_k", "attn2.to_v")))
    file = write(tmp_path, "delta", pipeline, changed_weights=changed, base="org/base")
    assert load_file(file).keys() == changed.keys()
    plain = families.build(name)
    loaded = load_weights(plain, tmp_path)
    assert loaded == Loaded("fdu delta", len(changed), (attribute,))
    assert torch.equal(output(plain, name), output(pipeline, name))
    after = tensors_of(denoiser(plain))
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors_of(denoiser(pipeline)).items())


def test_a_delta_in_half_precision_is_stored_in_it(tmp_path: Path) -> None:
    pipeline = families.build("sd").to(torch.float16)
    changed = change_weights(pipeline, "unet", CONTEXT["sd"])
    file = write(tmp_path, "delta", pipeline, changed_weights=changed)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    plain = families.build("sd").to(torch.float16)
    load_weights(plain, file)
    after = tensors_of(plain.unet)
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors_of(pipeline.unet).items())


def test_a_delta_of_few_rows_holds_these_alone(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    embedding = pipeline.text_encoder.get_input_embeddings().weight
    before = embedding.detach().clone()
    embedding.data[[5, 9]] += 1
    name = next(key for key in parts.weights(pipeline) if key.endswith("token_embedding.weight"))
    changed = {name: (before, embedding.detach().clone())}
    file = write(tmp_path, "delta", pipeline, changed_weights=changed)
    assert sum(tensor.numel() for tensor in load_file(file).values()) == 2 * before.shape[1] + 2
    plain = families.build("sd")
    assert load_weights(plain, file).attributes == ("text_encoder",)
    assert torch.equal(plain.text_encoder.get_input_embeddings().weight, embedding)


def test_a_delta_of_a_weight_that_modules_share(tmp_path: Path) -> None:
    pipeline = families.build("flux")
    weight = pipeline.text_encoder_2.shared.weight
    names = [name for name, parameter in parts.weights(pipeline).items() if parameter is weight]
    assert len(names) == 2
    before = weight.detach().clone()
    weight.data[3] += 1
    file = write(tmp_path, "delta", pipeline, changed_weights={names[0]: (before, weight.detach().clone())})
    plain = families.build("flux")
    load_weights(plain, file)
    assert torch.equal(plain.text_encoder_2.encoder.embed_tokens.weight, weight)


def test_a_delta_holds_merged_adapters_on_top_of_changed_weights(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    changed = change_weights(pipeline, "unet", CONTEXT["sd"])
    add_adapter(pipeline, "unet", CONTEXT["sd"])
    after = output(pipeline, "sd")
    file = write(tmp_path, "delta", pipeline, changed_weights=changed)
    assert torch.equal(output(pipeline, "sd"), after)
    plain = families.build("sd")
    load_weights(plain, file)
    assert close(output(plain, "sd"), after)


def test_a_delta_is_refused_on_another_base_unless_asked_for(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    base = fingerprint(pipeline)
    changed = change_weights(pipeline, "unet", CONTEXT["sd"])
    file = write(tmp_path, "delta", pipeline, changed_weights=changed, base="org/base")
    other = families.build("sd")
    other.unet.conv_in.weight.data += 1
    own = tensors_of(other.unet)
    with pytest.raises(ValueError, match=f"org/base with fingerprint {base[:16]}.*has {fingerprint(other)[:16]}"):
        load_weights(other, file)
    assert all(torch.equal(tensor, own[key]) for key, tensor in tensors_of(other.unet).items())
    load_weights(other, file, check_base=False)
    key = next(iter(changed))
    assert torch.equal(parts.weights(other)[key], changed[key][1])


def test_a_delta_of_a_later_format_is_refused(tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "delta.safetensors", {"fdu_format": "delta 2"})
    with pytest.raises(ValueError, match="delta 2.*update fdu"):
        load_weights(families.build("sd"), tmp_path)


def test_nothing_to_save_is_an_error(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    weight = pipeline.unet.conv_in.weight
    with pytest.raises(ValueError, match="nothing to save"):
        write(tmp_path, "delta", pipeline, changed_weights={"unet.conv_in.weight": (weight, weight)})
    for form in ("lora", "kohya"):
        with pytest.raises(ValueError, match=f'"{form}" needs LoRA layers.*"delta"'):
            write(tmp_path, form, pipeline)  # type: ignore[arg-type]


# The choice of a format


@pytest.mark.parametrize(
    ("save_as", "train_method", "expected"),
    [
        ("auto", "lora", "lora"),
        ("auto", "dora", "lora"),
        ("auto", "token", "pipeline"),
        ("kohya", "dora", "kohya"),
        ("delta", "lora", "delta"),
        ("delta", "cross_attention", "delta"),
        ("pipeline", "lora", "pipeline"),
    ],
)
def test_the_format_that_save_as_means(save_as: str, train_method: str, expected: str) -> None:
    assert choose_format(save_as, train_method) == expected


def test_the_format_depends_on_what_the_family_can_have() -> None:
    pixart, sana = families.build("pixart"), families.build("sana")
    assert choose_format("auto", "lora", pixart) == "pipeline"
    assert choose_format("auto", "lora", sana) == "lora"
    with pytest.raises(ValueError, match="no LoRA format.*PixArtAlphaPipeline.*delta"):
        choose_format("lora", "lora", pixart)
    with pytest.raises(ValueError, match="not.*SanaTransformer2DModel.*delta"):
        choose_format("kohya", "lora", sana)


def test_a_format_that_cannot_be_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match='train_method "full" changes.*weights.*"delta"'):
        choose_format("kohya", "full")
    with pytest.raises(ValueError, match="save_as.*one.*auto, lora, kohya, pipeline, delta, got 'pt'"):
        choose_format("pt", "lora")


# Merging


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "sana"])
def test_merging_leaves_a_plain_model_that_computes_the_same(name: str, tmp_path: Path) -> None:
    pipeline, layers, _ = trained_with_lora(name)
    write(tmp_path, "lora", pipeline, layers, lora_alpha=ALPHA)
    plain = families.build(name)
    keys = denoiser(plain).state_dict().keys()
    load_weights(plain, tmp_path, strength=0.5)
    half = output(plain, name)
    merge(plain)
    assert close(output(plain, name), half) and denoiser(plain).state_dict().keys() == keys


def test_merging_where_it_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no active adapter"):
        merge(families.build("sd"))


# The fingerprint


def test_a_fingerprint_tells_any_changed_value_and_nothing_else() -> None:
    pipeline = families.build("sd3")
    found = fingerprint(pipeline)
    assert found == fingerprint(families.build("sd3")) and len(found) == 64
    pipeline.vae.encoder.conv_in.weight.data += 1
    assert fingerprint(pipeline) == found
    weight = pipeline.transformer.transformer_blocks[1].attn.to_k.weight
    weight.data[3, 5] += 1e-6
    assert fingerprint(pipeline) != found
    weight.data[3, 5] -= 1e-6
    text = pipeline.text_encoder_3.get_input_embeddings().weight
    text.data[-1, -1] += 1
    assert fingerprint(pipeline) != found


def test_a_fingerprint_depends_on_the_dtype_but_not_on_the_layout() -> None:
    pipeline = families.build("sd")
    found = fingerprint(pipeline)
    pipeline.unet.to(memory_format=torch.channels_last)
    assert fingerprint(pipeline) == found
    assert fingerprint(pipeline.to(torch.bfloat16)) != found


def test_adapters_do_not_count_in_a_fingerprint_and_replaced_weights_do() -> None:
    pipeline = families.build("flux")
    found = fingerprint(pipeline)
    add_adapter(pipeline, "transformer", CONTEXT["flux"])
    assert fingerprint(pipeline) == found
    name = next(iter(parts.weights(pipeline)))
    before = parts.weights(pipeline)[name].detach().clone()
    parts.weights(pipeline)[name].data += 1
    assert fingerprint(pipeline) != found
    assert fingerprint(pipeline, {name: before}) == found
    with pytest.raises(ValueError, match="'unet.no'"):
        fingerprint(pipeline, {"unet.no": before})


def test_weights_have_the_same_names_under_adapters() -> None:
    pipeline = families.build("sdxl")
    names = list(parts.weights(pipeline))
    assert names[0] == f"unet.{next(iter(dict(pipeline.unet.named_parameters())))}"
    add_adapter(pipeline, "unet", CONTEXT["sdxl"], dora=True)
    add_adapter(pipeline, "text_encoder_2", ("q_proj",))
    assert list(parts.weights(pipeline)) == names


def test_lora_metadata_of_the_file_is_what_diffusers_looks_for(tmp_path: Path) -> None:
    pipeline, layers, _ = trained_with_lora("sd")
    with safe_open(write(tmp_path, "lora", pipeline, layers, lora_alpha=ALPHA), "pt") as content:
        metadata = json.loads(content.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == RANK and metadata["unet.lora_alpha"] == ALPHA


def test_a_fingerprint_counts_adapters_if_asked() -> None:
    pipeline = families.build("sd")
    plain = fingerprint(pipeline, adapters=True)
    assert plain == fingerprint(pipeline)
    config = LoraConfig(r=2, target_modules=["attn2.to_k"], init_lora_weights=False)
    pipeline.unet.add_adapter(config, adapter_name="mine")
    with_adapter = fingerprint(pipeline, adapters=True)
    assert with_adapter != plain == fingerprint(pipeline)
    pipeline.unet.set_adapters(["mine"], weights=[0.5])
    assert fingerprint(pipeline, adapters=True) not in (plain, with_adapter)
    pipeline.unet.disable_lora()
    assert fingerprint(pipeline, adapters=True) == plain
