"""GitHub's files are valid, and name versions, targets and tools that exist here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_jsonschema import main as check_jsonschema
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
SCHEMAS = {
    "github-workflows": sorted(GITHUB.glob("workflows/*")),
    "github-actions": sorted(GITHUB.glob("actions/*/*")),
    "github-issue-forms": [GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "feature")],
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in SCHEMAS["github-workflows"]}
ACTION = yaml.safe_load((GITHUB / "actions" / "install" / "action.yml").read_text())


def errors(schema: str, *paths: Path) -> str:
    """What the schema of that name finds wrong in the files; empty if nothing."""
    ran = CliRunner().invoke(check_jsonschema, ["--builtin-schema", f"vendor.{schema}", *map(str, paths)])
    assert ran.exit_code in (0, 1), ran.output
    return ran.output if ran.exit_code else ""


def steps() -> list[dict[str, Any]]:
    jobs = [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]
    return [step for job in jobs for step in job["steps"]] + ACTION["runs"]["steps"]


def test_every_file_of_github_has_a_schema() -> None:
    checked = {path for paths in SCHEMAS.values() for path in paths}
    assert {path for path in GITHUB.rglob("*.y*ml")} <= checked


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_are_valid(schema: str) -> None:
    assert SCHEMAS[schema] and not errors(schema, *SCHEMAS[schema])


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ("github-workflows", "runs-on:", "runs_on:"),
        ("github-workflows", "timeout-minutes: 20", "timeout-minutes: soon"),
        ("github-workflows", "      - run: make lint", "      - runs: make lint"),
        ("github-actions", "using: composite", "using: composit"),
        ("github-issue-forms", "type: textarea", "type: textfield"),
        ("github-issue-config", "blank_issues_enabled: true", "blank_issues_enabled: maybe"),
    ],
)
def test_a_broken_file_is_found(schema: str, right: str, wrong: str, tmp_path: Path) -> None:
    text = SCHEMAS[schema][0].read_text()
    assert right in text
    broken = tmp_path / "broken.yml"
    broken.write_text(text.replace(right, wrong, 1))
    assert errors(schema, broken)


def test_expressions_name_inputs_and_columns_that_exist() -> None:
    """A schema does not see them: a misspelt one would be empty text."""
    for workflow in WORKFLOWS.values():
        for job in workflow["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {})
            columns = {*matrix, *(key for row in matrix.get("include", ()) for key in row)}
            assert set(re.findall(r"\bmatrix\.([\w-]+)", str(job))) <= columns
            for step in job["steps"]:
                if step.get("uses", "").startswith("./"):
                    assert set(step["with"]) == set(ACTION["inputs"])
                    assert (ROOT / step["uses"] / "action.yml").is_file()
    assert set(re.findall(r"\binputs\.([\w-]+)", str(ACTION))) == set(ACTION["inputs"])


def test_targets_and_scripts_that_workflows_call_exist() -> None:
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [shlex.split(line) for step in steps() for line in step.get("run", "").splitlines()]
    called = {words[1] for words in commands if words[0] == "make"}
    assert {"lint", "test", "install"} <= called <= set(targets)
    assert all((ROOT / words[1]).is_file() for words in commands if words[0] == "bash")


def test_tests_and_wheels_cover_the_versions_of_python_that_the_metadata_names() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    stated = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert WORKFLOWS["tests"]["jobs"]["quick"]["strategy"]["matrix"]["python-version"] == stated
    built = re.search(r'^build = "(.+)"', text, re.MULTILINE)
    assert built and built[1].split() == [f"cp{version.replace('.', '')}-*" for version in stated]


def test_wheels_take_the_build_requirements_of_the_project_and_leave_torch_out() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    settings = text.partition("[tool.cibuildwheel]")[2].partition("\n[")[0]
    for needed in re.findall(r"'([\w-]+>=[\d.]+)'", settings):
        assert f'"{needed}"' in text
    assert "--exclude libtorch_cpu.so" in settings and "--no-build-isolation" in settings


def test_hooks_run_tools_of_the_lock() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    commands = [hook["entry"].split() for hook in repository["hooks"]]
    assert {command[2] for command in commands} == {"ruff", "mypy"}
    assert all(command[:2] == [".venv/bin/python", "-m"] for command in commands)
    lock = (ROOT / "requirements.lock").read_text()
    assert all(re.search(f"^{command[2]}==", lock, re.MULTILINE) for command in commands)
