"""Presets and files of settings: what they set, that typed settings win, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import families
import pytest
import yaml

import fdu
from fdu import cli
from fdu.cli import main
from fdu.cli.erase import Erase
from fdu.cli.planning import Plan
from fdu.cli.program import parse
from fdu.config import EraseConfig
from fdu.models.sd3 import SD3Denoiser
from fdu.models.wan import WanDenoiser
from fdu.presets import PRESETS, check_preset, read_settings, write_settings

ERASE = ["erase", "digits", "--target", "three", "--anchor", "eight", "--out", "out"]
TINY = ["--max_train_steps=1", "--train_batch_size=1", "--num_latents=2", "--num_inference_steps=1"]
DOCS = Path(fdu.__file__).parents[1] / "docs" / "usage.md"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settings_of(*words: str) -> EraseConfig:
    """The settings of an erasure with these options."""
    command = parse([*ERASE, *words])
    assert isinstance(command, Erase)
    return command.settings.checked()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_set_of_settings_that_makes_sense(name: str) -> None:
    config = fdu.preset(name)
    assert {key: getattr(config, key) for key in PRESETS[name].settings} == dict(PRESETS[name].settings)
    assert settings_of("--preset", name) == config
    # Its row in the documentation is made of the table.
    assert f"| `{name}` | {PRESETS[name].meaning} | {PRESETS[name].source} |" in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", [name for name, one in PRESETS.items() if one.models in ("Stable Diffusion 3", "FLUX.1")]
)
def test_a_preset_reaches_all_of_the_text(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """In SD3 and FLUX a pooled embedding, too, tells every block of the prompt. What leaves it alone is told."""
    pipeline = families.build("sd3" if "3" in PRESETS[name].models else "flux")
    tiny = {"max_train_steps": 0, "num_latents": 2, "num_inference_steps": 1, "mixed_precision": "no"}
    result = fdu.erase(pipeline, "a cat", "a dog", config=fdu.preset(name, **tiny))
    trained = " ".join(result.trainable.named_parameters())
    assert all(layer in trained for layers in result.denoiser.text_inputs.values() for layer in layers)
    assert not caplog.records
    result.trainable.remove()
    for settings in ({"train_method": "cross_attention"}, {"adapter_layers": "cross_attention"}):
        fdu.erase(pipeline, "a cat", "a dog", **{**tiny, **settings}).trainable.remove()
        assert "leaves context_embedder and time_text_embed.text_embedder" in caplog.messages[-1]


def test_a_preset_for_another_kind_of_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ERASE, "--preset", "flux"]) == cli.FAILED
    refused = capsys.readouterr().err
    assert not Path("out").exists()
    assert main(["plan", "digits", "--preset", "flux"]) == cli.OK
    for told in (refused, capsys.readouterr().out):
        assert "preset 'flux' is for FLUX.1" in told and "choose fdmu or concept-ablation" in told
    check_preset("sd3", SD3Denoiser.family)
    with pytest.raises(ValueError, match="'fdmu' is for Stable Diffusion 1, and the model is Wan.*leave it out"):
        check_preset("fdmu", WanDenoiser.family)


def test_a_setting_beside_a_preset_wins_even_if_it_is_the_default() -> None:
    assert settings_of("--preset=fdmu", "--max-train-steps", "120").max_train_steps == EraseConfig.max_train_steps
    assert settings_of("--preset", "fdmu").max_train_steps == 500
    assert fdu.preset("fdmu", divergence="kl", max_train_steps=3).max_train_steps == 3
    with pytest.raises(ValueError, match="preset must be one of fdmu"):
        fdu.preset("sd")
    with pytest.raises(TypeError, match="unknown setting 'steps'"):
        fdu.preset("fdmu", steps=3)


def test_settings_survive_a_file() -> None:
    config = EraseConfig(
        learning_rate=1e-3, preservation_prompts=("a cat", "an: owl"), sigma=0.5, compile=True, training_cache="here"
    )
    write_settings("a.yaml", config)
    found = read_settings("a.yaml")
    assert "training_cache" not in found and found["preservation_prompts"] == ["a cat", "an: owl"]
    again = settings_of("--config", "a.yaml")
    assert again == dataclasses.replace(config, training_cache=None)
    Path("b.yaml").write_text("optimizer: AdamW")
    assert read_settings("b.yaml") == {"optimizer": "adamw"}
    # The file counts more than a preset, and what is typed more than both.
    both = settings_of("--preset", "fdmu", "--config=a.yaml", "--sigma", "2")
    assert (both.learning_rate, both.sigma) == (1e-3, 2.0)


def test_s0_beside_a_preset_replaces_its_sigma_with_which_it_would_do_nothing() -> None:
    assert (settings_of("--preset", "fdmu", "--s0", "10").sigma, fdu.preset("fdmu", s0=10.0).sigma) == ("auto", "auto")
    assert settings_of("--preset", "fdmu", "--s0", "10", "--sigma", "2").sigma == 2.0
    assert fdu.preset("fdmu").sigma == 1.0


def test_what_a_file_switches_on_can_be_switched_off() -> None:
    Path("on.yaml").write_text("compile: true\ngradient_checkpointing: true\nlearning_rate: 1e-3\n")
    assert read_settings("on.yaml")["learning_rate"] == 1e-3  # which YAML takes for a text
    config = settings_of("--config", "on.yaml", "--no_compile")
    assert (config.compile, config.gradient_checkpointing, config.learning_rate) == (False, True, 1e-3)
    assert settings_of("--config", "on.yaml", "--no-gradient-checkpointing").gradient_checkpointing is False
    with pytest.raises(ValueError, match="there is no option --no_rank"):
        settings_of("--no_rank")


def test_an_erasure_writes_its_settings_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ERASE, *TINY, "--rank", "2", "--save_config", "mine.yaml"]) == cli.OK
    # What follows from the target, or from another setting, is left to the next erasure.
    assert yaml.safe_load(Path("mine.yaml").read_text()) == {
        **{"rank": 2, "max_train_steps": 1, "train_batch_size": 1, "num_latents": 2, "num_inference_steps": 1}
    }
    assert settings_of("--config", "mine.yaml").rank == 2
    assert settings_of("--config", "mine.yaml", "--train_method", "full").learning_rate is None
    again = [*ERASE[:-1], "second", *TINY, "--save_config", "mine.yaml"]
    assert main(again) == cli.USAGE and "'mine.yaml' exists" in capsys.readouterr().err
    inside = [*ERASE[:-1], "third", *TINY, "--save_config", "third/mine.yaml"]
    assert main(inside) == cli.USAGE and "outside of OUT" in capsys.readouterr().err
    assert not Path("third").exists()


def test_a_file_also_says_how_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = {"dtype": "bfloat16", "revision": "v1.0", "quantization": "int8", "offload": True, "variant": "fp16"}
    words = ["--revision=v1.0", "--quantization=int8", "--offload", "--variant=fp16", "--dtype=bfloat16"]
    setting = ["--mixed_precision=bf16", "--gradient_checkpointing"]
    monkeypatch.setattr("fdu.erase", lambda *given, **settings: pytest.fail("unreached"))
    monkeypatch.setattr("fdu.subjects.subject.load_model", lambda *given: (_ for _ in ()).throw(OSError("not here")))
    command = ["erase", "org/model", *ERASE[2:]]
    assert main([*command, *words, *setting, "--save_config", "mine.yaml"]) == cli.FAILED
    written = yaml.safe_load(Path("mine.yaml").read_text())
    assert written == {**loading, "mixed_precision": "bf16", "gradient_checkpointing": True}
    again = parse([*command, "--config", "mine.yaml", "--no_offload", "--variant", "other"])
    assert isinstance(again, Erase)
    assert (again.dtype, again.settings.checked().mixed_precision) == ("bfloat16", "bf16")
    assert again.loading.given() == {"revision": "v1.0", "quantization": "int8", "variant": "other"}
    plan = parse(["plan", "org/model", "--config", "mine.yaml"])  # which reads no weights, whatever their variant
    assert isinstance(plan, Plan)
    assert plan.loading.given() == {"revision": "v1.0", "quantization": "int8", "offload": True}


def test_files_that_hold_no_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    contents = {
        "[1, 2]": "one setting per line",
        "a: {b": "is not YAML",
        "learning_rat: 1": "'learning_rat', which is not a setting; did you mean 'learning_rate'",
        "guidance_scale: 3": "'guidance_scale', which is not a setting; its name is 'sampling_guidance' now",
        "learning_rate: {a: 1}": "learning_rate must be a number",
        "rank: much": "config 'bad.yaml': rank must be a whole number >= 1, got 'much'",
        "rank: 2.5": "config 'bad.yaml': rank must be a whole number",
        "compile: 1": "config 'bad.yaml': compile must be True or False, got 1",
        "optimizer: sgd": "config 'bad.yaml': optimizer must be one of adamw",
        "divergence: 3": "config 'bad.yaml': divergence must be a text, got 3",
        "revision: 3": "config 'bad.yaml': revision must be a text, got 3",
        "quantization: int4": "config 'bad.yaml': quantization must be one of none",
        "device: cuda": "'device', which is not a setting",
        "preservation_prompts: a cat": "config 'bad.yaml': preservation_prompts must be a list of texts",
    }
    for text, message in contents.items():
        Path("bad.yaml").write_text(text)
        assert main([*ERASE, "--config", "bad.yaml"]) == cli.USAGE
        assert message in capsys.readouterr().err
    assert main([*ERASE, "--config", "gone.yaml"]) == cli.USAGE
    assert "'gone.yaml' does not exist" in capsys.readouterr().err
    assert main([*ERASE, "--preset", "gone"]) == cli.USAGE
    assert "preset must be one of" in capsys.readouterr().err
    assert not Path("out").exists()
