"""Output: folders checked before any work; folders, files and JSON written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fdu.storage.foreign import read_json
from fdu.storage.locks import PARTIAL, TemporaryFolder, contents, sole_use

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
RUN_LOCK = "run.lock"
"""The lock file in a folder for checkpoints."""
RUN_PREFIXES = ("checkpoint-", "prompts-", "latents-", "frozen-", "adversary-", RUN_LOCK)
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

    A reader never sees a half-written folder, and what stood there before stays until the new one is complete and on
    the disk. What killed processes left is tidied up first. In the folder of another call, while it is empty, it is
    that folder.

    Raises:
        BlockingIOError: another run writes to ``folder``.
        ValueError, OSError: of :func:`check_output`, at once; or the complete folder could not take the name. Then it
            is kept, and the message says where.
    """
    shown, folder = repr(str(folder)), Path(folder).resolve()
    if TemporaryFolder.is_one(folder) and not any(folder.iterdir()):
        yield folder
        return
    with sole_output(folder):
        check_output(folder, overwrite)
        with TemporaryFolder(folder.parent, folder.name) as fresh:
            yield fresh.path
            fresh.complete = True
            _put_in_place(fresh.path, folder, shown, overwrite)


@contextmanager
def sole_output(folder: str | Path) -> Iterator[None]:
    """Keep other runs from writing to an output folder, and bring back what stood there if one was killed while it
    exchanged the folder.

    Raises:
        BlockingIOError: another run does.
        OSError: the lock beside the folder cannot be written.
    """
    shown, folder = repr(str(folder)), Path(folder).resolve()
    with sole_use(folder.parent / f".{folder.name}.lock", f"output folder {shown}"):
        _bring_back(folder)
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name to write to; at the end that file becomes ``path``, whole or not at all. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFolder(path.parent, path.stem[:40]) as folder:
        fresh = folder.path / path.name
        yield fresh
        _open_to_readers(fresh)
        to_disk(fresh)
        os.replace(fresh, path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise  # some file systems do so for no folder
    finally:
        os.close(handle)


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
    if not os.path.isdir(folder) or not contents(folder):
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
    former = _former(folder)
    try:
        _open_to_readers(fresh)
        for path in (*fresh.rglob("*"), fresh):
            to_disk(path)
        _check_replaceable(folder, shown, overwrite)
        if os.path.isdir(folder) and any(folder.iterdir()):
            os.replace(folder, former)
        os.replace(fresh, folder)
    except BaseException as error:  # also an interruption, while files go to the disk
        if not fresh.exists():
            raise  # it has its name already
        kept, told = fresh, ""
        with suppress(OSError):  # away from the name of those that the next run removes
            visible = folder.with_name(fresh.name[1:].removesuffix(PARTIAL))
            os.replace(fresh, visible)
            kept = visible
        try:
            _bring_back(folder)
        except OSError:
            told = f"; what stood there is in {str(former)!r}"
        where = f"it is kept in {str(kept)!r}{told}"
        if not isinstance(error, OSError):
            print(f"fdu: the result is complete but was not moved into place; {where}", file=sys.stderr)
            raise
        raise type(error)(
            f"the result is complete but could not be moved into place ({error.strerror or error}); {where}"
        ) from error
    to_disk(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def _former(folder: Path) -> Path:
    """Where a folder waits while its successor takes its name."""
    return folder.with_name(f".{folder.name}.former")


def _bring_back(folder: Path) -> None:
    """After a process that was killed while it exchanged a folder: the former comes back, or is removed if the new one
    has taken its name."""
    former = _former(folder)
    if not former.is_dir():
        return
    if folder.is_dir() and any(folder.iterdir()):
        shutil.rmtree(former, ignore_errors=True)
    else:
        os.replace(former, folder)


def _open_to_readers(written: Path) -> None:
    """Give the usual rights: temporary folders, and the files of safetensors, begin as their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (written, *written.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
