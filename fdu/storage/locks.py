"""Locks, which end with the process that holds them: one run at a time in a folder, and temporary folders in use."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOGGER = logging.getLogger(__name__)

PARTIAL = f"-{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}.partial"
"""The end of the name of a temporary folder of this machine; locks of others may not be seen here."""
_ANY_PARTIAL = re.compile(r"\..+-[a-z0-9_]{8}-[0-9a-f]{8}\.partial")
"""The names of temporary folders of any machine."""
_HELD: dict[Path, int] = {}
"""The locks of this process, and the thread that holds each."""
_TEMPORARY: set[Path] = set()
"""The temporary folders of this process."""


@contextmanager
def sole_use(lock: Path, place: str) -> Iterator[None]:
    """Hold a lock file, which is removed at the end. A thread that holds it may ask for it again.

    A file system without locks gives a warning.

    Args:
        lock: the file; its folder is made.
        place: what it stands for, for the error.

    Raises:
        BlockingIOError: another run holds it.
        OSError: the file cannot be made.
    """
    lock = lock.parent.resolve() / lock.name
    if _HELD.get(lock) == threading.get_ident():
        yield
        return
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(lock, place)
    except BlockingIOError:
        raise
    except OSError as error:
        raise type(error)(
            f"{place} cannot be locked with {str(lock)!r} ({error.strerror or error}); remove that file if no run uses "
            "it, or choose another folder"
        ) from error
    _HELD[lock] = threading.get_ident()
    try:
        yield
    finally:
        _HELD.pop(lock, None)
        with suppress(OSError):
            lock.unlink()  # before the lock ends: who waits for it sees that the file is another
        os.close(handle)


def _locked(lock: Path, place: str) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise BlockingIOError(
                f"{place} is in use by another run ({holder}); wait for it to end, or choose another folder"
            ) from None
        except OSError as error:
            LOGGER.warning("%s cannot be locked (%s); see that no other run uses it", place, error.strerror or error)
            return handle
        if _is_file(handle, lock):
            with suppress(OSError):  # a full disk: the lock holds without a word about its holder
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
            return handle
        os.close(handle)  # its holder has removed it meanwhile


class TemporaryFolder:
    """A new hidden folder, removed at the end unless it is complete.

    Those that killed processes left under the same ``name`` in ``parent`` are removed first.
    """

    def __init__(self, parent: Path, name: str) -> None:
        _remove_dead(parent, name)
        self.path, self._handle = _claimed(parent, name)
        self.complete = False
        _TEMPORARY.add(self.path)

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether this process fills the folder as a temporary one."""
        return folder in _TEMPORARY

    def __enter__(self) -> TemporaryFolder:
        return self

    def __exit__(self, *raised: object) -> None:
        _TEMPORARY.discard(self.path)
        if not self.complete:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._handle)


def contents(folder: Path) -> list[str]:
    """The names in a folder, in order, without those of temporary folders, which a killed process may have left."""
    return sorted(path.name for path in folder.iterdir() if not _ANY_PARTIAL.fullmatch(path.name))


def _claimed(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=PARTIAL, dir=parent))
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # removed as dead before it was claimed
        with suppress(OSError):  # a file system without such locks: then nobody removes it
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _is_file(handle, folder):
            return folder, handle
        os.close(handle)


def _remove_dead(parent: Path, name: str) -> None:
    own = re.compile(rf"\.{re.escape(name)}-[a-z0-9_]{{8}}{re.escape(PARTIAL)}")
    for path in parent.iterdir():
        if not own.fullmatch(path.name):
            continue
        with suppress(OSError):  # in use, without locks, or of another user
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def _is_file(handle: int, path: Path) -> bool:
    """Whether the name still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
