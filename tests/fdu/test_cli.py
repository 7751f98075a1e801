"""The command line: what it refuses and when, exit codes, help, `fdu erase` and `fdu divergences`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import fdu
import fdu_kernels
from fdu import cli
from fdu.cli import doctor, main
from fdu.cli.demo import Demo
from fdu.cli.divergences import page, rows
from fdu.cli.erase import Erase, _loading_line
from fdu.cli.options import GROUPS, grouped
from fdu.storage.output import SMALL_RESULT
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.registry import subject_of
from fdu.training.loop import Training

ERASE = ["erase", "digits", "--target", "three", "--anchor", "eight", "--out", "out"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading, erasing and drawing all fail the test."""

    def forbidden(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("work was done before the arguments were checked")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", forbidden)
    monkeypatch.setattr(digits, "load_pipeline", forbidden)
    monkeypatch.setattr(fdu, "erase", forbidden)
    monkeypatch.setattr(fdu, "draw", forbidden)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a refusal, which is one line and leaves nothing behind."""
    there = set(Path().rglob("*"))
    assert main(arguments) == cli.USAGE
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fdu: error: ")
    assert set(Path().rglob("*")) == there
    return lines[0].removeprefix("fdu: error: ")


def with_option(arguments: list[str], option: str, value: str) -> list[str]:
    """The arguments with the option's value replaced, or added."""
    if option in arguments:
        at = arguments.index(option)
        return [*arguments[: at + 1], value, *arguments[at + 2 :]]
    return [*arguments, option, value]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", ["erase", "demo"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--target", "", "target.*empty"),
        ("--target", "  ", "target.*empty"),
        ("--target", "eight", "target.*anchor.*'eight'"),
        ("--target", "missing.txt", "'missing.txt' does not exist"),
        ("--anchor", "missing.txt", "'missing.txt' does not exist"),
        ("--target", "cat", "target.*digit.*zero, one"),
        ("--anchor", "red", "anchor.*'digit'.*zero"),
        ("--divergence", "helinger", "divergence 'helinger'"),
        ("--max_train_steps", "-1", "max_train_steps.*>= 0.*-1"),
        ("--learning_rate", "nan", "learning_rate.*> 0.*nan"),
        ("--sigma", "-2", "sigma.*> 0"),
        ("--device", "nonsense", "device 'nonsense'"),
    ],
)
def test_erase_and_demo_refuse_before_any_work(
    command: str, option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ERASE if command == "erase" else ["demo", *ERASE[1:]]
    assert re.search(message, refused(with_option(arguments, option, value), capsys))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "MODEL.*empty"),
        ("./missing", "MODEL './missing' does not exist"),
        ("/missing/model", "MODEL '/missing/model' does not exist"),
        ("missing", "MODEL 'missing' does not exist"),
        ("folder/missing", "MODEL 'folder/missing' does not exist.*folder 'folder'"),
        ("~/missing", "MODEL '~/missing' does not exist"),
        ("folder", "MODEL 'folder'.*no model_index.json"),
    ],
)
def test_erase_refuses_a_model_that_is_not_there(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    assert re.search(message, refused(["erase", model, *ERASE[2:]], capsys))


@pytest.mark.usefixtures("no_work")
def test_erase_refuses_half_precision_without_autocast(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search("dtype.*float16.*mixed_precision", refused([*ERASE, "--dtype", "float16"], capsys))


@pytest.mark.usefixtures("no_work")
def test_existing_output_is_refused_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/precious").write_text("mine")
    assert re.search("'out'.*not written by fdu", refused(ERASE, capsys))
    assert "'out'" in refused(["demo", "--out", "out"], capsys)
    assert Path("out/precious").read_text() == "mine"
    Path("file").write_text("mine")
    assert "is a file" in refused(with_option(ERASE, "--out", "file"), capsys)
    assert "cannot be written" in refused(with_option(ERASE, "--out", "file/out"), capsys)


@pytest.mark.usefixtures("no_work")
def test_evaluate_refuses_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("lora").mkdir()
    Path("lora/pytorch_lora_weights.safetensors").touch()
    Path("model").mkdir()
    Path("model/model_index.json").touch()
    Path("full").mkdir()
    Path("full/file").touch()
    refusals = [
        (["./missing", "lora"], "BASE './missing' does not exist"),
        (["digits", "missing"], "ERASED 'missing' does not exist"),
        (["digits", "empty"], "'empty'.*[.]safetensors"),
        (["model", "lora"], "add --target"),
        (["org/model", "lora", "--target", "cat"], "no concept set 'cat'"),
        (["digits", "lora"], "add --target"),
        (["digits", "lora", "--target", "cat"], "target.*digit"),
        (["digits", "lora", "--target", "three", "--images_per_class", "0"], "images_per_class.*>= 1"),
        (["digits", "lora", "--target", "three", "--out", "full"], "not written by fdu"),
    ]
    for arguments, message in refusals:
        assert re.search(message, refused(["evaluate", *arguments], capsys))
    Path("lora/fdu.json").write_text("{")
    assert "is not valid JSON" in refused(["evaluate", "digits", "lora"], capsys)


def test_only_erase_runs_in_many_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["report", "."]) == cli.USAGE and "runs in one process" not in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    for words in (["report", "."], ["evaluate", "digits", "erased"]):
        assert main(words) == cli.USAGE
        assert f"fdu {words[0]} runs in one process, not in 2; start it without" in capsys.readouterr().err
    assert main(["erase", "digits"]) == cli.USAGE and "runs in one process" not in capsys.readouterr().err


def test_a_run_that_fails_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def offline(*arguments: Any, **settings: Any) -> None:
        raise OSError(f"no such repository org/model.{' And so on.' * 50}\nof many lines")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", offline)
    assert main(["erase", "org/model", *ERASE[2:]]) == cli.FAILED
    error = capsys.readouterr().err
    first, second = error.splitlines()
    assert re.match("fdu: error: .*'org/model'.*: no such repository org/model", first)
    assert len(first) < 250 and "--debug" in second
    assert "Traceback" not in error
    assert not Path("out").exists()


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 2 GiB", "can't allocate memory: 3 bytes"])
def test_where_memory_ran_out_the_plan_is_named(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError(words)

    monkeypatch.setattr(fdu, "erase", full)
    assert main(ERASE) == cli.FAILED
    told = capsys.readouterr().err
    assert "fdu plan MODEL --memory" in told and "docs/help/out-of-memory.md" in told
    page = Path(fdu.__file__).parents[1] / "docs" / "help" / "out-of-memory.md"
    assert "fdu plan MODEL --memory" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("by", ["option first", "option last", "environment"])
def test_debug_shows_the_traceback(
    by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "digits", "--target", "", "--anchor", "eight"]
    if by == "environment":
        monkeypatch.setenv("FDU_DEBUG", "1")
    else:
        arguments = ["--debug", *arguments] if by == "option first" else [*arguments, "--debug"]
    assert main(arguments) == cli.USAGE
    error = capsys.readouterr().err
    assert "Traceback" in error and "ValueError: " in error
    assert re.match("fdu: error: target.*empty", error.splitlines()[-1])


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("words", "package", "instead"),
    [
        ("--quantization nf4", "bitsandbytes", "'int8' or 'fp8'"),
        ("--optimizer prodigy", "prodigyopt", "'adamw'"),
        ("--optimizer schedule_free --lr_scheduler constant", "schedulefree", "'adamw'"),
        ("--report_to wandb", "wandb", "'none'"),
    ],
)
def test_a_package_that_is_missing_is_named_before_any_work(
    words: str, package: str, instead: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    name, value = words.removeprefix("--").split()[:2]
    message = f"{name} '{value}' needs {package}.*; pip install {package}, or choose {instead}"
    commands = [ERASE]
    commands += [["compare", *ERASE[1:]]] if package != "wandb" else []
    commands += [["evaluate", "digits", "lora"]] if package == "bitsandbytes" else []
    for command in commands:
        assert re.search(message, refused([*command, *words.split()], capsys))
    if package != "wandb":  # what never comes into memory needs no package
        assert main(["plan", "digits", *words.split()]) == cli.OK


@pytest.mark.parametrize("fault", [KeyError, ImportError])
def test_faults_of_fdu_keep_their_traceback(fault: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise fault("a fault")

    monkeypatch.setattr(doctor, "examine", broken)
    with pytest.raises(fault):
        main(["doctor"])


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert main(["doctor"]) == cli.INTERRUPTED
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "interrupted" in line


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_ends_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*([command] if command else []), "--help"]) == cli.OK
    output = capsys.readouterr().out
    assert output.startswith("usage: fdu")
    for example in cli.COMMANDS[command].examples if command else cli.EXAMPLES:
        assert f"  {example}\n" in output.partition("examples:")[2]


@pytest.mark.parametrize("command", ["demo", "erase"])
def test_every_setting_is_an_option_with_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    output = capsys.readouterr().out
    for name in fdu.EraseConfig.field_names():
        assert f"--{name} " in output or f"--{name}\n" in output
    assert "Optimizer steps" in output and "(default: 120)" in output and "(default: None)" not in output
    assert "MISSING" not in output
    assert list(GROUPS) == re.findall(r"\W\W (\w+) options \W\W", output)
    if command == "erase":  # the anchor that stands for nothing on other models
        assert re.search('pipelines of fdu do not know "".*superclass', " ".join(output.replace("│", " ").split()))


def test_every_setting_is_in_one_group() -> None:
    starts = [fdu.EraseConfig.field_names().index(first) for first in GROUPS.values()]
    assert starts[0] == 0 and starts == sorted(starts)
    assert tuple(grouped()().typed()) == fdu.EraseConfig.field_names()


def test_without_a_command_comes_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == cli.OK
    output = capsys.readouterr().out
    assert all(command in output for command in cli.COMMANDS)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ERASE, "--divergence", "alpha=0.3"], "mean alpha:0.3?"),
        (["demo", "digits", "--resolution", "7"], "resolution.*multiple of 8.*7; try 8.*32 x 32"),
        (["compare", *ERASE[1:], "--divergences", "mse,alpha=0.3"], "mean alpha:0.3?"),
        (["compare", *ERASE[1:], "--resolution", "7"], "resolution.*32 x 32"),
        ([*ERASE, "--height", "32", "--width", "7"], "width.*multiple of 8.*7; try 8.*32 x 32"),
        ([*ERASE, "--height", "32"], "height and width go together"),
        (["plan", "digits", "--height", "7", "--width", "32"], "height.*multiple of 8"),
        (["dem"], "'dem'.*mean demo?"),
        (["demo", "--steps", "3"], "--steps.*--max_train_steps?.*fdu demo --help"),
        (["erase", "digits", "--lr", "1"], "--lr.*--learning_rate?"),
        (["erase", "digits", "--cache_dir", "a"], "--cache_dir.*--training_cache .*HF_HUB_CACHE"),
        (["erase", "digits", "--guidance_scale", "1"], "--sampling_guidance .*--embedded_guidance"),
        (["plan", "digits", "--logging_dir=a"], "mean --tracking_dir?"),
        (["erase", "digits", "--use_8bit_adam"], "mean --optimizer adamw_8bit?"),
        (["erase", "digits", "--targt=three"], "--targt.*--target?"),
        (["compare", "digits", "--divergence", "kl"], "--divergence.*--divergences?"),
        (["doctor", "--json"], "--json.*fdu doctor --help"),
        ([*ERASE[:2], "--target", "three", "five", *ERASE[4:]], "--target three --target five"),
        ([*ERASE[:4], "--out", "out"], "--anchor.*missing"),
        ([*ERASE[:2], *ERASE[4:]], "--target.*missing"),
        (with_option(ERASE, "--target", "thre"), "'thre'.*'three'?"),
        (with_option(ERASE, "--anchor", "digits"), "'digits'.*'digit'?"),
        (["demo", "digits", "--target", "three"], "anchor is missing.*--anchor.*fdu names digits"),
        (["demo", "digits", "--anchor", "three"], "target is missing.*--target.*fdu names digits"),
    ],
)
def test_near_misses_are_told_what_was_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message.replace("?", "[?]"), refused(arguments, capsys))


def test_the_model_may_come_after_the_names() -> None:
    command = cli.parse(["erase", "--target", "three", "digits", "--anchor", "eight", "--out", "out"])
    assert isinstance(command, Erase) and command.model == "digits" and command.target == ("three",)


@pytest.mark.parametrize("arguments", [["dem"], ["demo", "--max_steps", "3"], ["erase"], ["demo", "--seed", "x"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == cli.USAGE
    output = capsys.readouterr()
    assert output.out == "" and output.err and "Traceback" not in output.err


def test_settings_are_read_and_hyphens_serve_as_underscores() -> None:
    given = ["demo", "--max-train-steps", "3", "--preservation_prompts", "a cat", "a dog", "--sigma", "0.5"]
    given += ["--optimizer", "AdamW", "--mixed-precision=BF16", "--target", "AdamW"]
    command = cli.parse(given)
    assert isinstance(command, Demo)
    config = command.settings.checked()
    assert type(config) is fdu.EraseConfig
    assert (config.max_train_steps, config.preservation_prompts, config.sigma) == (3, ("a cat", "a dog"), 0.5)
    assert (config.optimizer, config.mixed_precision, command.target) == ("adamw", "bf16", "AdamW")


def test_divergences_as_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["divergences"]) == cli.OK
    table = capsys.readouterr().out
    assert main(["divergences", "--json"]) == cli.OK
    found = json.loads(capsys.readouterr().out)
    assert [row["name"].partition(":")[0] for row in found] == list(fdu_kernels.divergences())
    for row in found:
        assert row["name"] in table and row["advice"] in table and row["profile"] in table
        assert fdu_kernels.get_divergence(row["name"]) == fdu_kernels.get_divergence(row["aliases"][0])


def test_the_page_of_divergences_is_that_of_the_catalogue() -> None:
    written = (Path(__file__).parents[2] / "docs" / "divergences.md").read_text()
    assert written == page(rows()) + "\n", "fdu divergences --markdown > docs/divergences.md"
    for name in fdu_kernels.divergences():
        assert f"| `{fdu_kernels.get_divergence(name)}` |" in written


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds this fdu."""
    environment = os.environ | {"PYTHONPATH": str(Path(fdu.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
    )


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys; from fdu.cli import main; main(['demo', '--help']); sys.exit('torch' in sys.modules)"
    ran = run_python("-c", script)
    assert ran.returncode == 0, ran.stderr


def test_python_dash_m() -> None:
    ran = run_python("-m", "fdu", "--version")
    assert (ran.returncode, ran.stdout) == (0, f"fdu {fdu.__version__}\n")


QUICK = ["--max_train_steps=2", "--train_batch_size=2", "--num_latents=4", "--num_inference_steps=2", "--rank=2"]


def test_erase_saves_and_says_how_to_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ERASE, *QUICK]) == cli.OK
    output = capsys.readouterr().out
    assert 'pipeline = fdu.load_pipeline("digits"); pipeline.load_lora_weights' in output
    record = json.loads(Path("out/fdu.json").read_text())
    assert record["target"]["prompts"] == list(digits.concepts("three", "eight")[0].prompts)
    assert record["config"]["preservation_prompts"] == list(digits.preserved("three"))

    assert main([*ERASE, *QUICK]) == cli.USAGE
    assert main([*ERASE, *QUICK, "--overwrite", "--train_method", "cross_attention"]) == cli.OK
    assert "DiffusionPipeline.from_pretrained('out')" in capsys.readouterr().out

    assert not Path("out.checkpoints").exists()


@pytest.mark.parametrize(
    ("format", "method", "words"),
    [
        ("delta", "full", "fdu.load_weights(pipeline, 'out')"),
        ("kohya", "lora", "ComfyUI.*out/kohya_lora.safetensors"),
        ("kohya", "dora", "fdu.load_weights(pipeline, 'out')"),
    ],
)
def test_every_format_can_be_loaded(format: str, method: str, words: str) -> None:
    line = _loading_line(subject_of("digits"), Path("out"), format, method)
    assert re.search(words.replace("(", "[(]").replace(")", "[)]"), line)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("out", ["models/sd", "models", "./models/../models/sd"])
def test_overwrite_never_replaces_the_model(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("models/sd").mkdir(parents=True)
    Path("models/sd/model_index.json").touch()
    Path("models/sd/fdu.json").touch()
    arguments = ["erase", "models/sd", "--target", "a", "--anchor", "b", "--out", out, "--overwrite"]
    assert "input 'models/sd'" in refused(arguments, capsys)


@pytest.mark.usefixtures("no_work")
def test_overwrite_never_replaces_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lora").mkdir()
    Path("lora/pytorch_lora_weights.safetensors").touch()
    Path("lora/prompts.txt").write_text("a seven")
    evaluate = ["evaluate", "digits", "lora", "--target", "three", "--out", "lora", "--overwrite"]
    assert "input 'lora'" in refused(evaluate, capsys)
    for option in ("--target", "--anchor"):
        erase = with_option([*ERASE, "--overwrite"], "--out", "lora")
        message = refused(with_option(erase, option, "lora/prompts.txt"), capsys)
        assert "input 'lora/prompts.txt'" in message


@pytest.mark.usefixtures("no_work")
def test_a_full_pipeline_needs_its_room(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    room = shutil.disk_usage(".")._replace(free=SMALL_RESULT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    for model in ("digits", "org/model"):
        full = ["erase", model, *ERASE[2:], "--out", "new/out", "--train_method", "cross_attention"]
        assert "MiB" in refused(full, capsys)
    cli.parse(ERASE).prepare("")


def test_truncated_weights_are_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lora").mkdir()
    Path("lora/pytorch_lora_weights.safetensors").write_bytes(b"\x10\0\0")
    quick = ["--target=three", "--images_per_class=1", "--num_inference_steps=1"]
    assert main(["evaluate", "digits", "lora", *quick]) == cli.FAILED
    error = capsys.readouterr().err
    assert "'lora'" in error and "Traceback" not in error


def test_an_output_that_appears_during_the_training_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fdu.erase

    def erase(*given: Any, **named: Any) -> Any:
        result = real(*given, **named)
        Path("out").mkdir()
        Path("out/mine").touch()
        return result

    monkeypatch.setattr(fdu, "erase", erase)
    assert main([*ERASE, *QUICK]) == cli.FAILED
    (kept,) = (path for path in map(Path, re.findall("'(.+?)'", capsys.readouterr().err)) if path.name != "out")
    assert (kept / "fdu.json").is_file() and [path.name for path in Path("out").iterdir()] == ["mine"]


def test_an_interrupted_run_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*QUICK, "--max_train_steps=6"]
    real = Training._stops
    monkeypatch.setattr(Training, "_stops", lambda self, stop: self.step == 3)
    assert main([*ERASE, *quick]) == cli.INTERRUPTED
    assert re.search("out[.]checkpoints.*--resume_from_checkpoint latest", capsys.readouterr().err)
    monkeypatch.setattr(Training, "_stops", real)
    assert main([*ERASE, *quick]) == cli.FAILED
    assert "resume_from_checkpoint 'latest'" in capsys.readouterr().err
    assert main([*ERASE, *quick, "--resume_from_checkpoint", "latest"]) == cli.OK
    assert len(json.loads(Path("out/fdu.json").read_text())["history"]["loss"]) == 6
    assert not Path("out.checkpoints").exists()


@pytest.mark.usefixtures("no_work")
def test_a_strangers_folder_for_checkpoints_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.checkpoints").mkdir()
    Path("out.checkpoints/notes.txt").write_text("mine")
    assert "'notes.txt'" in refused(ERASE, capsys)
    assert Path("out.checkpoints/notes.txt").read_text() == "mine"
