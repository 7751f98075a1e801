"""The arguments of an erasure: settings and concepts, and the refusal of wrong ones by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import fdu_kernels
from fdu import EraseConfig
from fdu.cli.options import option_names
from fdu.cli.program import COMMANDS
from fdu.concepts import OBJECT_TEMPLATES, STYLE_TEMPLATES, Concept, Pair, concept_pairs
from fdu.config import RENAMED, TRAIN_METHODS, choices_of, updated


def concept_pair(*arguments: Any) -> Pair:
    """The only target and its anchor."""
    (pair,) = concept_pairs(*arguments)
    return pair


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("divergence", "helinger", "squared_hellinger|hellinger"),
        ("divergence", "alpha:0", "reverse_kl"),
        ("sigma", 0.0, "sigma.*> 0.*0.0"),
        ("sigma", float("inf"), "sigma.*> 0"),
        ("sigma", True, "sigma.*> 0"),
        ("adam_beta1", 1.5, "adam_beta1.*< 1.*1.5"),
        ("adam_beta2", -0.1, "adam_beta2.*>= 0"),
        ("preservation_prompts", ("a", 3), "preservation_prompts.*strings"),
        ("sigma", "median", "sigma"),
        ("s0", 0, "s0.*> 0.*0"),
        ("s0", float("nan"), "s0.*finite"),
        ("distance", "max", "distance.*mean, sum.*'max'"),
        ("train_method", "unet", "train_method.*lora, dora, text, cross_attention"),
        ("rank", 0, "rank.*whole number >= 1.*0"),
        ("max_train_steps", -1, "max_train_steps.*whole number >= 0"),
        ("max_train_steps", 1.5, "max_train_steps.*whole number >= 0"),
        ("train_batch_size", True, "train_batch_size.*whole number >= 1"),
        ("learning_rate", 0.0, "learning_rate.*finite number > 0"),
        ("learning_rate", float("inf"), "learning_rate.*finite number > 0"),
        ("lr_scheduler", "cosin", "lr_scheduler.*constant"),
        ("preservation_weight", -1.0, "preservation_weight.*>= 0"),
        ("preservation_prompts", "a digit", "preservation_prompts.*sequence"),
        ("num_latents", 1, "num_latents.*whole number >= 2"),
        ("mixed_precision", "fp8", "mixed_precision.*no, fp16, bf16"),
        ("seed", "0", "seed.*whole number >= 0"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        EraseConfig(**{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 64}, "height and width go together"),
        ({"width": 64}, "height and width go together"),
        ({"resolution": 64, "height": 64, "width": 64}, "resolution is for squares"),
        ({"height": 0, "width": 64}, "height.*whole number >= 1"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EraseConfig(**given)


def test_a_size_is_a_resolution_or_height_and_width() -> None:
    assert EraseConfig().size is None and EraseConfig(resolution=64).size == 64
    assert EraseConfig(height=64, width=96, train_method="closed_form").size == (64, 96)


@pytest.mark.parametrize(("former", "name"), RENAMED.items())
def test_a_former_name_is_told_its_new_one(former: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"unknown setting '{former}'; its name is '{name}' now"):
        EraseConfig.from_settings({former: 1})


@pytest.mark.parametrize("typed", ["alpha=0.3", "alpha 0.3", "alpha(0.3)", "alpha0.3", "Alpha:a=0.3", "alpha:=0.3"])
def test_a_parameter_typed_in_another_way_is_a_near_miss(typed: str) -> None:
    with pytest.raises(ValueError, match=r"mean alpha:0\.3\?"):
        EraseConfig(divergence=typed)


@pytest.mark.parametrize("typed", ["kl=0.3", "alpha=1", "alpha=x", "nothing=0.3"])
def test_no_near_miss_is_made_up(typed: str) -> None:
    with pytest.raises(ValueError) as refused:
        EraseConfig(divergence=typed)
    assert "mean" not in str(refused.value)


SAME = """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay checkpointing_steps checkpoints_total_limit
    gradient_accumulation_steps gradient_checkpointing hub_model_id hub_token learning_rate
    logit_mean logit_std lora_alpha lr_scheduler lr_warmup_steps max_grad_norm max_train_steps
    mixed_precision mode_scale offload optimizer push_to_hub rank report_to resolution
    resume_from_checkpoint revision sample_batch_size seed snr_gamma train_batch_size variant
    weighting_scheme
"""
"""Arguments of diffusers' DreamBooth scripts for LoRA that mean the same here. For two, it is more here: snr_gamma also
needs weighting min_snr, and offload also takes the denoiser's blocks off the device; the text encoders and the VAE
leave it without that."""
OTHERS = """
    adam_weight_decay_text_encoder allow_tf32 aspect_ratio_buckets bnb_quantization_config_path cache_dir
    cache_latents caption_column caption_dropout center_crop class_data_dir class_labels_conditioning
    class_prompt complex_human_instruction dataloader_num_workers dataset_config_name dataset_name
    do_edm_style_training do_fp8_training enable_npu_flash_attention enable_vae_tiling
    enable_xformers_memory_efficient_attention final_validation_prompt fsdp_text_encoder guidance_scale
    image_column image_interpolation_mode instance_data_dir instance_prompt local_rank
    logging_dir lora_blocks lora_dropout lora_layers lr_num_cycles lr_power max_sequence_length num_class_images
    num_train_epochs num_validation_images output_dir output_kohya_format pre_compute_text_embeddings
    precondition_outputs pretrained_model_name_or_path pretrained_text_encoder_4_name_or_path
    pretrained_tokenizer_4_name_or_path pretrained_vae_model_name_or_path prior_generation_precision
    prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction
    random_flip remote_text_encoder repeats scale_lr skip_final_inference text_encoder_lr
    text_encoder_out_layers text_encoder_use_attention_mask tokenizer_max_length tokenizer_name
    train_text_encoder upcast_before_saving use_8bit_adam use_aspect_ratio_buckets use_dora validation_epochs
    validation_images validation_prompt with_prior_preservation
"""
"""Their other arguments: of train_dreambooth_lora.py and of its forms for sdxl, sd3, flux, flux2, qwen_image, z_image
and sana, at commit 58eb52c of diffusers (August 2026)."""


def test_names_that_diffusers_uses_mean_the_same_or_are_refused() -> None:
    accepted = set().union(*(option_names(COMMANDS[name])[0] for name in ("demo", "erase", "compare", "plan")))
    assert accepted >= {*SAME.split()} and not accepted & {*OTHERS.split()}


def test_choices_that_diffusers_uses_mean_the_same_in_any_case() -> None:
    choices = choices_of(EraseConfig)
    assert set(choices["mixed_precision"]) == {"no", "fp16", "bf16"}
    assert set(choices["weighting_scheme"]) == {"sigma_sqrt", "logit_normal", "mode", "cosmap", "none"}
    others = {"cosine_with_restarts", "polynomial"}
    assert {*choices["lr_scheduler"], *others} == {"linear", "cosine", "constant", "constant_with_warmup", *others}
    assert EraseConfig(optimizer="AdamW").optimizer == "adamw"
    assert {"adamw", "prodigy"} <= set(choices["optimizer"])


def test_snr_gamma_is_never_without_effect() -> None:
    with pytest.raises(ValueError, match="snr_gamma needs weighting 'min_snr'"):
        EraseConfig(snr_gamma=5.0)
    given = EraseConfig(weighting="min_snr", snr_gamma=2.0), EraseConfig(weighting="min_snr"), EraseConfig()
    assert [config.as_dict()["snr_gamma"] for config in given] == [2.0, 5.0, None]
    assert [EraseConfig(**config.as_dict()).as_dict() for config in given] == [config.as_dict() for config in given]
    # Records and the files of earlier versions have it always.
    assert [config.recorded()["snr_gamma"] for config in given] == [2.0, 5.0, 5.0]
    assert updated({"snr_gamma": 5.0, "weighting": "unit"})["snr_gamma"] is None
    assert updated({"snr_gamma": 4.0, "weighting": "min_snr"})["snr_gamma"] == 4.0


def test_a_divergence_of_the_users_own_is_recorded_by_name() -> None:
    own = fdu_kernels.Divergence.from_generator(lambda u: (u - 1) ** 2, name="mine")
    assert json.loads(json.dumps(EraseConfig(divergence=own).as_dict()))["divergence"] == "mine"


# Concepts


def test_names_take_the_same_place_in_the_same_phrasings() -> None:
    target, anchor = concept_pair("cat", "dog")
    assert len(target.prompts) == len(OBJECT_TEMPLATES)
    assert [prompt.replace("cat", "dog") for prompt in target.prompts] == list(anchor.prompts)
    assert "a photo of a cat" in target.prompts


def test_a_style_is_the_anchor_with_the_style_named() -> None:
    target, anchor = concept_pair("van gogh", "painting", "style")
    assert len(target.prompts) == len(anchor.prompts) == len(STYLE_TEMPLATES)
    for with_style, without in zip(target.prompts, anchor.prompts, strict=True):
        assert "van gogh" in with_style and "van gogh" not in without
        assert with_style.startswith(without) and "painting" in without
        assert not without.endswith((",", " "))


def test_the_empty_anchor_is_one_empty_prompt_for_all() -> None:
    target, anchor = concept_pair("cat", "")
    assert anchor.prompts == ("",) * len(target.prompts)


def test_prompts_pair_in_order() -> None:
    target, anchor = concept_pair(["a cat", "one cat"], ["a pet", "one pet"])
    assert list(zip(target.prompts, anchor.prompts, strict=True)) == [("a cat", "a pet"), ("one cat", "one pet")]


def test_one_anchor_prompt_serves_all() -> None:
    _, anchor = concept_pair(Concept("cat", ("a cat", "one cat", "cats")), Concept("pet", ("a pet",)))
    assert anchor.prompts == ("a pet",) * 3


def test_a_named_target_keeps_the_anchors_own_prompts() -> None:
    target, anchor = concept_pair("cat", ["some animal"])
    assert len(target.prompts) == len(OBJECT_TEMPLATES)
    assert set(anchor.prompts) == {"some animal"}


def test_a_file_holds_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "cats.txt"
    file.write_text("# cats\n\na cat\n  a black cat \n")
    target, _ = concept_pair(str(file), "pet")
    assert target == Concept("cats", ("a cat", "a black cat"))


@pytest.mark.parametrize("empty", ["", "   ", [], [""], ["a cat", " "]])
def test_an_empty_target_is_refused(empty: object) -> None:
    with pytest.raises(ValueError, match="^target.*empty"):
        concept_pair(empty, "pet")


@pytest.mark.parametrize("anchor", ["cat", "Cat", " cat "])
def test_the_target_as_its_own_anchor_is_refused(anchor: str) -> None:
    with pytest.raises(ValueError, match="target.*anchor.*same, 'cat'.*superclass"):
        concept_pair("cat", anchor)


def test_a_prompt_on_both_sides_is_refused() -> None:
    with pytest.raises(ValueError, match="share the prompt 'a cat'"):
        concept_pair(["one cat", "a cat"], ["one pet", "a cat"])


def test_prompts_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="target.*3 prompts.*anchor.*2"):
        concept_pair(["a", "b", "c"], ["d", "e"])


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"concept file '.*gone\.txt'.*not exist"):
        concept_pair(str(tmp_path / "gone.txt"), "pet")


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"none\.txt' holds no prompt"):
        concept_pair("cat", str(tmp_path / "none.txt"))


def test_a_wrong_type_and_a_wrong_concept_type_are_refused() -> None:
    with pytest.raises(TypeError, match="target.*name.*got int"):
        concept_pair(3, "pet")
    with pytest.raises(ValueError, match="concept_type.*'object'.*'style', got 'person'"):
        concept_pair("cat", "pet", "person")


def test_the_mark_of_windows_editors_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "cats.txt").write_bytes("a cat\nein Kätzchen\n".encode("utf-8-sig"))
    assert Concept.from_file(tmp_path / "cats.txt").prompts == ("a cat", "ein Kätzchen")


def test_a_file_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "cats.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cats\.txt'.*not text.*UTF-8"):
        Concept.from_file(tmp_path / "cats.txt")


def test_several_concepts_pair_in_order_and_one_anchor_serves_all() -> None:
    pairs = concept_pairs([Concept("cat"), Concept("dog")], [Concept("pet"), Concept("animal")])
    assert [(target.name, anchor.name) for target, anchor in pairs] == [("cat", "pet"), ("dog", "animal")]
    assert [anchor.name for _, anchor in concept_pairs([Concept("cat"), Concept("dog")], "pet")] == ["pet", "pet"]
    (style, thing) = concept_pairs([Concept("van gogh"), Concept("cat")], "painting", ["style", "object"])
    assert "by van gogh" in style[0].prompts[3] and thing[0].prompts[0] == "cat"


def test_concepts_that_meet_lead_to_one_end() -> None:
    three = (Concept("three", ("three", "a red three")), Concept("eight", ("eight", "a red eight")))
    red = (Concept("red", ("a red three", "a red eight")), Concept("black", ("a black three", "a black eight")))
    towards_three = (*red[0].prompts, "a black three"), (*red[1].prompts, "a black eight")
    pairs = concept_pairs([three[0], Concept("red", towards_three[0])], [three[1], Concept("black", towards_three[1])])
    ends = {target: anchor for pair in pairs for target, anchor in zip(pair[0].prompts, pair[1].prompts, strict=True)}
    assert ends["a red three"] == ends["a red eight"] == "a black eight"


def test_several_concepts_that_do_not_fit_are_refused() -> None:
    cats = [Concept("cat"), Concept("dog")]
    with pytest.raises(ValueError, match="target holds 2 concepts.*anchor 3"):
        concept_pairs(cats, [Concept("a"), Concept("b"), Concept("c")])
    with pytest.raises(ValueError, match="target holds 2 concepts.*concept_type 1"):
        concept_pairs(cats, "pet", ["object"])
    with pytest.raises(ValueError, match="target names 'cat' twice"):
        concept_pairs([Concept("cat"), Concept("cat")], "pet")
    with pytest.raises(ValueError, match="cycle: 'dog' -> 'cat' -> 'dog'"):
        concept_pairs(cats, [Concept("dog"), Concept("cat")])


def test_an_anchor_that_names_another_target_is_led_on() -> None:
    targets = [Concept("three", ("three in red ink",)), Concept("red", ("the digit eight in red ink", "a red one"))]
    anchors = [
        Concept("eight", ("eight in red ink",)),
        Concept("black", ("the digit eight in black ink", "a black one")),
    ]
    pairs = concept_pairs(targets, anchors)
    assert pairs[0][1].prompts == ("eight in black ink",)
    assert pairs[1][1].prompts == ("the digit eight in black ink", "a black one")
    assert concept_pairs("cat", ["a catalogue with a cat on it"])[0][1].prompts[0] == "a catalogue with a cat on it"
    targets = [Concept("dog", ("a dog",)), Concept("fox", ("a fox", "the fox", "2 foxes"))]
    anchors = [Concept("owl", ("an owl",)), Concept("hot dog", ("a hot dog", "the dog", "a dog"))]
    assert concept_pairs(targets, anchors)[1][1].prompts == ("a hot dog", "the owl", "an owl")
    targets = [Concept("dog", ("a dog",)), Concept("twemoji", ("a dog in twemoji",))]
    anchors = [Concept("hot dog", ("a hot dog",)), Concept("noto", ("a dog in noto",))]
    assert concept_pairs(targets, anchors)[1][1].prompts == ("a hot dog in noto",)  # and not hotter and hotter
    anchors[0] = Concept("unicorn", ("a unicorn",))
    assert concept_pairs(targets, anchors)[1][1].prompts == ("a unicorn in noto",)


def test_names_that_lead_further_and_further_are_refused() -> None:
    with pytest.raises(ValueError, match="cycle"):
        concept_pairs(
            [Concept("a", ("one a",)), Concept("b", ("one b",))], [Concept("b", ("x b",)), Concept("a", ("x a",))]
        )


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("fox", "a photo of a fox"), ("apple", "a photo of an apple"), ("unicorn", "a photo of a unicorn")],
)
def test_the_article_goes_with_the_name(name: str, phrase: str) -> None:
    target, anchor = concept_pair(name, "animal")
    assert target.prompts[3] == phrase and anchor.prompts[3] == "a photo of an animal"
    target, _ = concept_pair("van gogh", name, "style")
    assert target.prompts[1] == f"{phrase.removeprefix('a photo of ')} of a house in the style of van gogh"


def test_every_method_has_a_learning_rate_of_its_own() -> None:
    rates = {name: EraseConfig(train_method=name).as_dict()["learning_rate"] for name in TRAIN_METHODS}
    assert rates["closed_form"] is None and rates["full"] < rates["cross_attention"] < rates["lora"] < rates["token"]
    assert EraseConfig(train_method="full", learning_rate=1e-3).as_dict()["learning_rate"] == 1e-3
    config = dataclasses.replace(EraseConfig(), train_method="token")
    assert config.peak_learning_rate == TRAIN_METHODS["token"].learning_rate
