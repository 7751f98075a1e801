"""Other tools' results on a pipeline: each layout as its maker writes it, and files that are refused."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from families import ALPHA, CONTEXT, add_adapter, change_weights, output, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdu.models import parts
from fdu.models.kohya_names import original_name
from fdu.storage import lora
from fdu.storage.formats import write
from fdu.storage.loading import load_model
from fdu.storage.readers import Loaded, load_weights


def after_erasure(name: str, endings: tuple[str, ...] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """A pipeline with new weights, and these by the denoiser's names."""
    pipeline = families.build(name)
    attribute = parts.denoiser_name(pipeline)
    changed = change_weights(pipeline, attribute, endings or CONTEXT[name])
    return pipeline, {key.removeprefix(f"{attribute}."): after for key, (_, after) in changed.items()}


def assert_same(pipeline: DiffusionPipeline, expected: DiffusionPipeline) -> None:
    own, other = parts.weights(pipeline), parts.weights(expected)
    assert all(torch.equal(own[key], tensor) for key, tensor in other.items())


def assert_refused(name: str, file: Path, match: str, error: type[Exception] = ValueError, **settings: Any) -> None:
    """The file is refused, and the pipeline as before, with no adapter and no changed weight."""
    pipeline = families.build(name)
    with pytest.raises(error, match=match):
        load_weights(pipeline, file, **settings)
    assert_same(pipeline, families.build(name))
    assert not any(parts.adapted(model) for model in parts.models(pipeline).values())


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("out of memory")


# Weights


def test_concept_ablation_delta(tmp_path: Path) -> None:
    pipeline, after = after_erasure("sd")
    # torch.save of parameters, by the UNet's own names.
    torch.save({"unet": {key: torch.nn.Parameter(tensor) for key, tensor in after.items()}}, tmp_path / "delta.bin")
    plain = families.build("sd")
    assert load_weights(plain, tmp_path) == Loaded("changed weights", len(after), ("unet",))
    assert_same(plain, pipeline)


def test_concept_ablation_delta_of_the_text_encoder_with_the_names_of_its_time(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    change_weights(pipeline, "text_encoder", ("token_embedding",))
    state = {f"text_model.{key}": tensor for key, tensor in tensors_of(pipeline.text_encoder).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save({"unet": {}, "text_encoder": OrderedDict(state)}, tmp_path / "delta.bin")
    plain = families.build("sd")
    assert load_weights(plain, tmp_path / "delta.bin").attributes == ("text_encoder",)
    assert_same(plain, pipeline)


def test_concept_ablation_delta_in_compvis_names(tmp_path: Path) -> None:
    pipeline, after = after_erasure("sd", ("attn2.to_k", "attn2.to_v", "attn2.to_out.0"))
    config = pipeline.unet.config
    # ...transformer_blocks_0_attn2_to_k has underscores for dots, in which the blocks' names have some of their own.
    state = {}
    for key, tensor in after.items():
        layer, _, parameter = key.rpartition(".")
        block = original_name(layer.split(".transformer_blocks")[0] + ".norm", config)
        dotted = (
            block.removesuffix("_norm").replace("blocks_", "blocks.").replace("block_", "block.").replace("_1", ".1")
        )
        state[
            f"model.diffusion_model.{dotted}.transformer_blocks{layer.split('.transformer_blocks')[1]}.{parameter}"
        ] = tensor
    torch.save({"state_dict": state, "global_step": 800}, tmp_path / "delta.ckpt")
    assert any(key.startswith("model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k") for key in state)
    plain = families.build("sd")
    assert load_weights(plain, tmp_path / "delta.ckpt").attributes == ("unet",)
    assert_same(plain, pipeline)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_esd_and_uce_safetensors(name: str, tmp_path: Path) -> None:
    pipeline, after = after_erasure(name, ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"))
    save_file(after, tmp_path / "esd-van_gogh-from-van_gogh-esdx.safetensors")
    plain = families.build(name)
    assert load_weights(plain, tmp_path).tensors == len(after)
    assert_same(plain, pipeline)


def test_uce_of_flux_safetensors(tmp_path: Path) -> None:
    pipeline, after = after_erasure("flux", ("context_embedder", "text_embedder.linear_1"))
    save_file(after, tmp_path / "uce.safetensors")
    plain = families.build("flux")
    assert load_weights(plain, tmp_path).attributes == ("transformer",)
    assert_same(plain, pipeline)


def test_fdmu_delta_of_flux(tmp_path: Path) -> None:
    """Its script for FLUX is not published: the layers are those that its arguments name, in the form of its files of
    Stable Diffusion."""
    layers = ("context_embedder", "text_embedder.linear_1", "text_embedder.linear_2")
    pipeline, after = after_erasure("flux", (*layers, *(f"{layer}.bias" for layer in layers)))
    assert len(after) == 6
    torch.save({"transformer": {key: tensor.clone() for key, tensor in after.items()}}, tmp_path / "delta.bin")
    plain = families.build("flux")
    assert load_weights(plain, tmp_path) == Loaded("changed weights", len(after), ("transformer",))
    assert_same(plain, pipeline)
    assert_refused("sd", tmp_path, "changes transformer.*StableDiffusionPipeline does not have")


def test_former_esd_pickles_hold_the_state_of_each_module(tmp_path: Path) -> None:
    pipeline, after = after_erasure("sd")
    modules = {f"unet.{key.removesuffix('.weight')}": OrderedDict(weight=tensor) for key, tensor in after.items()}
    torch.save(modules, tmp_path / "esd.pt")
    plain = families.build("sd")
    load_weights(plain, tmp_path / "esd.pt")
    assert_same(plain, pipeline)


def test_former_uce_pickles_hold_the_whole_unet(tmp_path: Path) -> None:
    pipeline, _ = after_erasure("sd")
    torch.save(pipeline.unet.state_dict(), tmp_path / "erased.pt")
    plain = families.build("sd")
    load_weights(plain, tmp_path / "erased.pt")
    assert_same(plain, pipeline)


def test_half_precision_weights_take_the_dtype_of_the_pipeline(tmp_path: Path) -> None:
    _, after = after_erasure("sd")
    save_file({key: tensor.bfloat16() for key, tensor in after.items()}, tmp_path / "esd.safetensors")
    plain = families.build("sd")
    load_weights(plain, tmp_path)
    key, tensor = next(iter(after.items()))
    assert torch.equal(parts.weights(plain)[f"unet.{key}"], tensor.bfloat16().float())


def test_weights_go_under_adapters(tmp_path: Path) -> None:
    pipeline, after = after_erasure("sd")
    save_file(after, tmp_path / "esd.safetensors")
    plain = families.build("sd")
    add_adapter(plain, "unet", CONTEXT["sd"])
    load_weights(plain, tmp_path)
    assert_same(plain, pipeline)


def test_strength_of_weights_goes_part_of_the_way(tmp_path: Path) -> None:
    _, after = after_erasure("sd")
    save_file(after, tmp_path / "esd.safetensors")
    before = {key: tensor.detach().clone() for key, tensor in parts.weights(families.build("sd")).items()}
    for strength in (0.0, 0.25, 2.0):
        plain = families.build("sd")
        load_weights(plain, tmp_path, strength=strength)
        now = parts.weights(plain)
        for key, tensor in after.items():
            expected = before[f"unet.{key}"] + strength * (tensor - before[f"unet.{key}"])
            assert torch.allclose(now[f"unet.{key}"], expected, atol=1e-6)


# LoRA


def test_diffusers_lora_by_folder_and_by_file_with_its_strength(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    layers = {"unet": add_adapter(pipeline, "unet", CONTEXT["sd"])}
    file = write(tmp_path, "lora", pipeline, layers, lora_alpha=ALPHA)
    for path in (tmp_path, file):
        plain = families.build("sd")
        loaded = load_weights(plain, path, adapter_name="erasure")
        assert loaded == Loaded("diffusers LoRA", len(layers["unet"]), ("unet",), "erasure")
        assert torch.allclose(output(plain, "sd"), output(pipeline, "sd"), atol=1e-5)
    half = families.build("sd")
    load_weights(half, file, strength=0.5)
    pipeline.set_adapters("fdu", 0.5)
    assert torch.allclose(output(half, "sd"), output(pipeline, "sd"), atol=1e-5)


def test_lora_of_former_diffusers_with_text_encoder(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    unet = convert_state_dict_to_diffusers(add_adapter(pipeline, "unet", CONTEXT["sd"]))
    former = {
        f"unet.{key.replace('.attn2.', '.attn2.processor.').replace('.lora.', '_lora.')}": tensor
        for key, tensor in unet.items()
    }
    text = convert_state_dict_to_diffusers(add_adapter(pipeline, "text_encoder", ("q_proj", "fc1")))
    former |= {f"text_encoder.text_model.{key}": tensor for key, tensor in text.items()}
    assert any(".processor.to_k_lora.down.weight" in key for key in former)
    assert any("q_proj.lora_linear_layer.up.weight" in key for key in former)
    save_file(former, tmp_path / "lora.safetensors")
    plain = families.build("sd")
    load_weights(plain, tmp_path)
    for model in (pipeline.unet, pipeline.text_encoder):
        for layer in parts.adapted(model):
            layer.set_scale("fdu", layer.r["fdu"] / ALPHA)  # such a file tells no alpha: it is the rank
    assert torch.allclose(output(plain, "sd"), output(pipeline, "sd"), atol=1e-5)


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_a_dora_of_a_text_encoder_keeps_its_magnitudes(form: Any, tmp_path: Path) -> None:
    pipeline = families.build("sd")
    layers = {"text_encoder": add_adapter(pipeline, "text_encoder", ("q_proj",), dora=True)}
    write(tmp_path, form, pipeline, layers, lora_alpha=ALPHA)
    plain = families.build("sd")
    load_weights(plain, tmp_path)
    assert torch.allclose(output(plain, "sd"), output(pipeline, "sd"), atol=1e-6)


def test_projections_of_text_encoders_by_their_first_names() -> None:
    stem = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors = {
        f"{stem}.{layer}_lora.{side}.weight": torch.zeros(1, 1)
        for layer in ("to_q", "to_out")
        for side in ("up", "down")
    }
    updates = lora.from_file(families.build("sd"), tensors, {})
    assert set(updates["text_encoder"]) == {
        f"text_model.encoder.layers.0.self_attn.{layer}" for layer in ("q_proj", "out_proj")
    }


def test_kohya_lora_of_a_slider(tmp_path: Path) -> None:
    """Concept sliders and LECO write diffusers' names with underscores, and one alpha a layer."""
    pipeline = families.build("sd")
    layers = add_adapter(pipeline, "unet", ("attn1.to_q", "attn2.to_k"))
    file = {}
    for key, tensor in layers.items():
        layer, _, part = key.rpartition(".lora_")
        name = "lora_unet_" + layer.replace(".", "_")
        file[f"{name}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        file[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(file, tmp_path / "slider.safetensors")
    plain = families.build("sd")
    assert load_weights(plain, tmp_path).format == "kohya LoRA"
    assert torch.allclose(output(plain, "sd"), output(pipeline, "sd"), atol=1e-5)


def test_erasures_stack_and_part_again(tmp_path: Path) -> None:
    files = []
    for index, endings in enumerate((("attn2.to_k",), ("attn2.to_k", "attn2.to_v"))):
        pipeline = families.build("sd")
        layers = {"unet": add_adapter(pipeline, "unet", endings)}
        (tmp_path / str(index)).mkdir()
        files.append(write(tmp_path / str(index), "lora", pipeline, layers, lora_alpha=ALPHA))
    plain = families.build("sd")
    before = output(plain, "sd")
    first = load_weights(plain, files[0], strength=0.5).adapter_name
    one = output(plain, "sd")
    second = load_weights(plain, files[1]).adapter_name
    both = output(plain, "sd")
    assert first != second and not torch.equal(one, both)
    plain.set_adapters([first, second], [0.5, 1.0])
    assert torch.allclose(output(plain, "sd"), both, atol=1e-6)
    lora.detach(plain, second, ["unet"])
    assert torch.equal(output(plain, "sd"), one)
    lora.detach(plain, first, ["unet"])
    assert torch.equal(output(plain, "sd"), before) and not parts.adapted(plain.unet)


# Refused, with nothing changed


def test_an_adapter_name_is_taken_on_the_models_that_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = families.build("sd")
    file = write(tmp_path, "lora", pipeline, {"unet": add_adapter(pipeline, "unet", CONTEXT["sd"])})
    plain = families.build("sd")
    add_adapter(plain, "text_encoder", ("q_proj",), adapter_name="it")
    with monkeypatch.context() as patch:
        patch.setattr(lora, "_inject", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            load_weights(plain, file, adapter_name="it")
    assert parts.adapted(plain.text_encoder), "the adapter of another model stays"
    assert load_weights(plain, file, adapter_name="it").adapter_name == "it"
    with pytest.raises(ValueError, match="'it' is taken"):
        load_weights(plain, file, adapter_name="it")


def test_a_pickle_that_would_execute_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    with (tmp_path / "delta.bin").open("wb") as file:
        pickle.dump({"unet": Harmful()}, file, protocol=2)
    torch.save({"unet": Harmful()}, tmp_path / "delta.pt")
    for name in ("delta.bin", "delta.pt"):
        assert_refused("sd", tmp_path / name, "would execute code.*not loaded.*safetensors")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", ["pipeline", "denoiser", "tokenizer"])
def test_code_in_a_model_folder_is_not_executed(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    families.build("sd").save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    code = f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\nclass Mine: ...\n"
    if place == "pipeline":
        index["_class_name"] = ["mine", "Mine"]
        (folder / "mine.py").write_text(code)
    elif place == "denoiser":
        index["unet"] = ["mine", "Mine"]
        (folder / "unet" / "mine.py").write_text(code)
    else:
        config = folder / "tokenizer" / "tokenizer_config.json"
        mapped = {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
        config.write_text(json.dumps(json.loads(config.read_text()) | mapped))
        (folder / "tokenizer" / "mine.py").write_text(code)
    (folder / "model_index.json").write_text(json.dumps(index))
    with suppress(OSError):  # it is refused, or the code is ignored
        load_model(str(folder))
    assert not (tmp_path / "executed").exists()


def test_broken_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    assert_refused("sd", tmp_path / "a.safetensors", "safetensors.*damaged")
    (tmp_path / "b.bin").write_bytes(b"")
    assert_refused("sd", tmp_path / "b.bin", "cannot be read .EOFError.; the file is damaged")
    torch.save({"step": 3}, tmp_path / "c.bin")
    assert_refused("sd", tmp_path / "c.bin", "holds no tensors")
    assert_refused("sd", tmp_path / "none.bin", "do not exist", FileNotFoundError)
    assert_refused("sd", tmp_path, "several files.*a.safetensors")
    (tmp_path / "d.txt").write_text("no")
    assert_refused("sd", tmp_path / "d.txt", r"none of .*\.safetensors")
    (tmp_path / "empty").mkdir()
    assert_refused("sd", tmp_path / "empty", "no file", FileNotFoundError)
    families.build("sd").save_pretrained(tmp_path / "whole")
    assert_refused("sd", tmp_path / "whole", "full pipeline.*from_pretrained")


def test_unknown_tensors(tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(1), "step": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert_refused("sd", tmp_path, "neither LoRA.*delta of fdu.*'encoder.weight', 'step'")


def test_weights_of_another_family(tmp_path: Path) -> None:
    _, after = after_erasure("sdxl", CONTEXT["sd"])
    save_file(after, tmp_path / "esd.safetensors")
    assert_refused("sd", tmp_path, r"unet\.\S+to_k\.weight has shape \(\d+, 16\) here, but \(\d+, 32\)")
    assert_refused("flux", tmp_path, "changes transformer.down_blocks.*FluxPipeline does not have")


def test_one_wrong_shape_changes_nothing(tmp_path: Path) -> None:
    _, after = after_erasure("sd")
    last = list(after)[-1]
    after[last] = after[last][:-1]
    save_file(after, tmp_path / "esd.safetensors")
    assert_refused("sd", tmp_path, last)


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_lora_of_another_family(form: Any, tmp_path: Path) -> None:
    pipeline = families.build("sdxl")
    layers = {"unet": add_adapter(pipeline, "unet", CONTEXT["sd"])}
    write(tmp_path, form, pipeline, layers, lora_alpha=ALPHA)
    assert_refused("sd", tmp_path, r"the update of unet\.\S+attn2.to_., down \(3, 32\) .*does not fit its weight")
    assert_refused(
        "sd3", tmp_path, "which this StableDiffusion3Pipeline does not have|StableDiffusion3Pipeline does not"
    )


def test_incomplete_and_foreign_updates(tmp_path: Path) -> None:
    pipeline = families.build("sd")
    layers = {"unet": add_adapter(pipeline, "unet", CONTEXT["sd"])}
    good = load_file(write(tmp_path, "kohya", pipeline, layers, lora_alpha=ALPHA))
    down = next(key for key in good if key.endswith("lora_down.weight"))
    name = down.partition(".")[0]
    for tensors, match in (
        ({key: tensor for key, tensor in good.items() if key != down}, "lacks its up or down matrix"),
        ({**good, f"{name}.hada_w1_a": torch.zeros(1)}, "not part of a LoRA"),
        ({**good, f"{name}.dora_scale": torch.ones(1, 16)}, "not one per output"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors")
        assert_refused("sd", tmp_path / "bad.safetensors", match)
    some = dict(layers["unet"])
    some.pop(next(key for key in some if "lora_B" in key))
    save_file(some, tmp_path / "bad.safetensors")
    assert_refused("sd", tmp_path / "bad.safetensors", "lacks its up matrix")


def test_a_pipeline_that_diffusers_gives_no_lora(tmp_path: Path) -> None:
    weight = families.build("pixart").transformer.transformer_blocks[0].attn2.to_k.weight
    update = lora.Update(torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1), 1.0)
    save_file(lora.state_dict({"transformer_blocks.0.attn2.to_k": update}), tmp_path / "lora.safetensors")
    assert_refused("pixart", tmp_path, "cannot put LoRA weights on a PixArtAlphaPipeline", TypeError)


def test_a_failure_while_the_second_model_is_loaded_takes_the_first_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = families.build("sd")
    layers = {"unet": add_adapter(pipeline, "unet", CONTEXT["sd"])}
    layers["text_encoder"] = add_adapter(pipeline, "text_encoder", ("q_proj",))
    file = write(tmp_path, "lora", pipeline, layers, lora_alpha=ALPHA)
    monkeypatch.setattr(type(pipeline), "load_lora_into_text_encoder", fail)
    assert_refused("sd", file, "out of memory", RuntimeError)


@pytest.mark.parametrize("strength", [float("nan"), "1", True, 1e300, pytest.param(10**400, id="long")])
def test_a_strength_that_is_no_number(strength: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="strength.*finite number"):
        load_weights(families.build("sd"), tmp_path, strength=strength)


def test_full_checkpoints_have_another_way(tmp_path: Path) -> None:
    save_file(
        {"model.diffusion_model.a": torch.zeros(1), "first_stage_model.b": torch.zeros(1)}, tmp_path / "x.safetensors"
    )
    assert_refused("sd", tmp_path, "from_single_file")
