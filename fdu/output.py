"""Output folders: checked before any work, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(folder: str | Path, overwrite: bool = False, needed_bytes: int = 1 << 20) -> None:
    """Make sure that ``folder`` can be written, before work is spent on what goes into it.

    Raises:
        ValueError: it is the working or the home folder, or holds one of them.
        FileExistsError: it exists, is not an empty folder, and ``overwrite`` is false; or it is a file.
        PermissionError, OSError: it cannot be made or written, or its disk has less than ``needed_bytes`` free.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output folder {str(folder)!r} is a file; choose another name")
    resolved = folder.resolve()
    if any(resolved == kept or resolved in kept.parents for kept in (Path.cwd().resolve(), Path.home().resolve())):
        raise ValueError(
            f"output folder {str(folder)!r} is, or holds, the working or the home folder, which would be replaced; "
            "choose a folder of its own"
        )
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"output folder {str(folder)!r} exists and is not empty; choose another or overwrite it (--overwrite)"
        )
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise type(error)(
            f"output folder {str(folder)!r} cannot be written ({error.strerror or error}); "
            "choose another, or mend its disk or rights"
        ) from error
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OSError(
            f"output folder {str(folder)!r}: its disk has {free / 2**20:.0f} MiB free but "
            f"{needed_bytes / 2**20:.0f} MiB are needed; free space or choose another disk"
        )


@contextmanager
def whole_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder to fill beside ``folder``; at the end it takes that name, after an error it is removed.

    A reader never sees a half-written folder, and what stood there before stays until the new one is complete.
    """
    folder = Path(folder).absolute()
    check_output(folder, overwrite)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield fresh
        _open_to_readers(fresh)
        if folder.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old / folder.name)
            os.replace(fresh, folder)
            shutil.rmtree(old)
        else:
            os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Give the usual rights: temporary folders, and the files of safetensors, begin as their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
