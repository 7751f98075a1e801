"""Checkpoints: everything a run needs to resume bit for bit; safetensors and JSON, whole or not at all.

Bit for bit on the CPU; on a GPU if ``deterministic`` is set, since some of its algorithms add in any order.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fdu.config import PLACES, updated
from fdu.storage.integrity import read_sealed, sealed
from fdu.storage.output import to_disk

LOGGER = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"
"""Its header holds, as JSON, all that is no tensor."""
HEADER = "checkpoint"
PREFIX = "checkpoint-"
FREE_SETTINGS = {
    *PLACES,
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "validation_prompts", "validation_steps"),
}
"""Settings that may change between a run and its continuation, because they do not affect the weights."""


class Damaged(ValueError):
    """A checkpoint is not as it was written."""


class Checkpoints:
    """The checkpoints of one run, in folders ``checkpoint-N`` after N steps.

    Args:
        folder: the folder of all checkpoints.
        limit: checkpoints to keep.
        manifest: description of the run, ready for JSON: "config", "base" (fingerprint), "processes", "versions", ...
    """

    def __init__(self, folder: str | Path, limit: int, manifest: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self.manifest = manifest

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after ``step`` steps and remove the oldest checkpoints above the limit.

        Raises:
            OSError: it cannot be written; what was there before is still there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        final = self.folder / f"{PREFIX}{step}"
        fresh = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=self.folder))
        try:
            tensors: dict[str, Tensor] = {}
            content = {"step": step, "manifest": self.manifest, "state": _pack(state, tensors, "")}
            try:
                save_file(tensors, fresh / STATE_FILE, sealed(tensors, {HEADER: json.dumps(content)}))
            except SafetensorError as error:
                raise OSError(str(error)) from error
            for path in (fresh / STATE_FILE, fresh):
                to_disk(path)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(fresh, final)
            to_disk(self.folder)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        others = [path for path in self.all() if path != final]
        for old in others[: len(others) - self.limit + 1]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def all(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
        return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))

    def load(self, choice: str, header_only: bool = False) -> tuple[int, dict[str, Any]] | None:
        """The step and the state of the "latest" checkpoint (None if there is none), or of the folder named.

        Of the latest, one that is damaged is named in a warning, and the one before it is taken.

        Args:
            choice: "latest" or a folder.
            header_only: check the checkpoint without reading its tensors; the state is empty.

        Raises:
            FileNotFoundError: there is no checkpoint in the folder named.
            ValueError: it cannot be read, or no latest one can, or it is one of another run: other settings, base model
                or number of processes.
        """
        if choice == "latest":
            paths = self.all()[::-1]
            for path in paths:
                try:
                    found = self._read(path, header_only)
                except Damaged as error:
                    LOGGER.warning("%s; looking for an older one", error)
                    continue
                break
            else:
                if paths:
                    raise ValueError(
                        f"no checkpoint in {str(self.folder)!r} can be read; the newest is {paths[0].name!r}. "
                        "Start from scratch in another folder"
                    )
                return None
        else:
            path = Path(choice)
            if not (path / STATE_FILE).is_file():
                raise FileNotFoundError(
                    f"resume_from_checkpoint {str(path)!r} holds no {STATE_FILE}; give a folder {PREFIX}N, or 'latest'"
                )
            found = self._read(path, header_only)
        step, manifest, state = found
        self._check_same_run(path, manifest)
        return step, state

    @staticmethod
    def _read(path: Path, header_only: bool) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Step, manifest and state of a checkpoint.

        Raises:
            Damaged: it is not as it was written.
        """
        try:
            tensors, metadata = read_sealed(path / STATE_FILE, header_only)
            content = json.loads(metadata[HEADER])
            step, manifest = content["step"], content["manifest"]
            if not isinstance(step, int) or not isinstance(manifest, dict):
                raise ValueError("its header is of another kind")
            return step, manifest, {} if header_only else _unpack(content["state"], tensors)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(
                f"checkpoint {str(path)!r} cannot be read ({error}); use an older one, or start from scratch"
            ) from error

    def _check_same_run(self, path: Path, other: dict[str, Any]) -> None:
        mine = json.loads(json.dumps(self.manifest))
        for name in ("base", "concepts", "weights", "processes", "mask"):
            if mine.get(name) != other.get(name):
                # The others are long, or say nothing.
                values = f", {other.get(name)!r} there, {mine.get(name)!r} here" if name == "processes" else ""
                name = "weights of concepts" if name == "weights" else name
                raise ValueError(
                    f"checkpoint {str(path)!r} belongs to another run: it differs in {name}{values}; "
                    f"resume with the same {name}, or choose another checkpoint_dir"
                )
        theirs = updated(other.get("config", {}))
        for name, value in mine["config"].items():
            if name not in FREE_SETTINGS and theirs.get(name, value) != value:
                raise ValueError(
                    f"checkpoint {str(path)!r} was made with {name} {theirs[name]!r}, this run has {value!r}; "
                    "resume with the same settings, or choose another checkpoint_dir"
                )


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """``value`` for JSON, its tensors put aside. Dicts may have keys of any JSON type."""
    if isinstance(value, Tensor):
        # A copy, because safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        packed = [_pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": packed}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__} ({name})")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
