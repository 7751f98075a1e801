"""Output: folders checked before any work; folders, files and JSON written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fdu.storage.foreign import read_json

RECORD_FILE = "fdu.json"
"""File next to saved weights: what was erased, with which settings and versions, and the course of the training."""
PIPELINE_FILE = "model_index.json"
"""File in the folder of a diffusers pipeline."""
METRICS_FILE = "metrics.json"
"""File next to a report: the measured figures."""
METRICS_KEYS = {"before", "after", "target", "images_per_class"}
"""Keys that distinguish it from other programs' files of this name."""
DEMO_FOLDER, WEIGHTS_FOLDER = "demo-out", "erased"
"""The default output folder of ``fdu demo``, and its folder of weights in there."""
RUN_PREFIXES = ("checkpoint-", "prompts-", "latents-", "frozen-", "adversary-")
"""Prefixes of the files and folders that a run writes into a folder for checkpoints."""
SMALL_RESULT = 32 << 20
"""Upper bound in bytes of LoRA weights or a report."""


def check_output(
    folder: str | Path, overwrite: bool = False, needed_bytes: int = SMALL_RESULT, inputs: Sequence[str | Path] = ()
) -> None:
    """Check that ``folder`` can be written, before the work for it begins. Changes nothing.

    Args:
        folder: the folder, or a link to it.
        overwrite: replace the folder if fdu wrote it. Folders of others are never replaced.
        needed_bytes: bytes that will be written.
        inputs: files and folders that the work reads; none may be in ``folder``.

    Raises:
        ValueError: it is a mount point, or it is or holds the working folder, the home folder or one of ``inputs``.
        FileExistsError: it is a file, or not empty and either not fdu's or ``overwrite`` is false.
        PermissionError, OSError: it cannot be made or written, or its disk has less than ``needed_bytes`` free.
    """
    shown, folder = repr(str(folder)), Path(folder).resolve()
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise FileExistsError(f"output folder {shown} is a file; choose another name")
    protected = {"the working folder": Path.cwd(), **{f"the input {str(path)!r}": Path(path) for path in inputs}}
    with suppress(RuntimeError):  # not everybody has a home
        protected["the home folder"] = Path.home()
    for what, path in protected.items():
        real = (path.resolve(), path.parent.resolve() / path.name)  # a link may lie elsewhere than it points
        if any(folder in (place, *place.parents) for place in real):
            raise ValueError(
                f"output folder {shown} is, or holds, {what}, which would be replaced; choose a separate folder"
            )
    if os.path.ismount(folder):
        raise ValueError(f"output folder {shown} is a mount point, which cannot be replaced; choose a folder inside it")
    _check_replaceable(folder, shown, overwrite)
    parent = next(path for path in folder.parents if os.path.exists(path))
    try:
        with tempfile.TemporaryFile(dir=parent) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise type(error)(
            f"output folder {shown} cannot be written ({error.strerror or error}); "
            "choose another, or fix its disk or permissions"
        ) from error
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OSError(
            f"output folder {shown}: its disk has {free / 2**20:.0f} MiB free but "
            f"{needed_bytes / 2**20:.0f} MiB are needed; free space or choose another disk"
        )


@contextmanager
def whole_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder to fill, next to ``folder``; at the end it takes that name, after an error it is removed.

    A reader never sees a half-written folder, and what stood there before stays until the new one is complete.

    Raises:
        ValueError, OSError: of :func:`check_output`, at once; or the complete folder could not take the name. Then it
            is kept, and the message says where.
    """
    check_output(folder, overwrite)
    shown, folder = repr(str(folder)), Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _put_in_place(fresh, folder, shown, overwrite)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name to write to; at the end that file becomes ``path``, whole or not at all. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem[:40]}-", dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        yield fresh
        _open_to_readers(fresh)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the name
        os.replace(fresh, path)


def write_text(path: Path, text: str) -> None:
    """Write a file of text in UTF-8, whole or not at all."""
    with whole_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def strangers(folder: Path) -> list[Path]:
    """The files in a folder for checkpoints that no run of fdu wrote; empty if there is no folder."""
    if not folder.is_dir():
        return [folder] if folder.exists() else []
    return [path for path in folder.iterdir() if not path.name.lstrip(".").startswith(RUN_PREFIXES)]


def clear_run(folder: Path) -> None:
    """Remove what a run of fdu left in a folder for checkpoints, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    kept = set(strangers(folder))
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def written_by_fdu(folder: Path) -> bool:
    """Whether ``folder`` holds the record of an erasure or the metrics of an evaluation."""
    if (folder / RECORD_FILE).is_file():
        return True
    try:
        metrics = read_json(folder / METRICS_FILE, "run `fdu evaluate` again")
    except (OSError, ValueError):
        return False
    return isinstance(metrics, dict) and metrics.keys() >= METRICS_KEYS


def write_json(path: Path, content: Any) -> None:
    """Write JSON as of :func:`to_json`, whole or not at all."""
    write_text(path, to_json(content, indent=1) + "\n")


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinities, which it does not know, become null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_replaceable(folder: Path, shown: str, overwrite: bool) -> None:
    if not os.path.isdir(folder) or not any(folder.iterdir()):
        return
    if not written_by_fdu(folder):
        raise FileExistsError(
            f"output folder {shown} holds files not written by fdu (no {RECORD_FILE} or {METRICS_FILE} of its own), "
            "which it never overwrites; choose another, or remove it yourself"
        )
    if not overwrite:
        raise FileExistsError(
            f"output folder {shown} is not empty; choose another or overwrite it (overwrite=True, --overwrite)"
        )


def _put_in_place(fresh: Path, folder: Path, shown: str, overwrite: bool) -> None:
    """Give the complete ``fresh`` its name. Nothing is lost if that fails: the old folder comes back, both are kept."""
    aside = None
    try:
        _open_to_readers(fresh)
        _check_replaceable(folder, shown, overwrite)
        if os.path.isdir(folder) and any(folder.iterdir()):
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, aside / folder.name)
        os.replace(fresh, folder)
    except OSError as error:
        former = ""
        if aside is not None and (aside / folder.name).exists():
            try:
                os.replace(aside / folder.name, folder)
            except OSError:
                former = f"; what stood there is in {str(aside / folder.name)!r}"
        if aside is not None and not former:
            aside.rmdir()
        raise type(error)(
            f"the result is complete but could not be moved into place ({error.strerror or error}); "
            f"it is kept in {str(fresh)!r}{former}"
        ) from error
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _open_to_readers(written: Path) -> None:
    """Give the usual rights: temporary folders, and the files of safetensors, begin as their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (written, *written.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
