"""Output folders: refused before any work, written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from fdu.output import check_output, whole_folder


def test_a_new_and_an_empty_folder_are_fine(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deeper")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    with pytest.raises(FileExistsError, match="exists and is not empty.*--overwrite"):
        check_output(tmp_path / "full")
    check_output(tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "kept").read_text() == "kept"


def test_a_file_is_never_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(OSError, match="cannot be written"):
        check_output(tmp_path / "file" / "below")


def test_an_unwritable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"out' cannot be written \(Read-only file system\)"):
        check_output(tmp_path / "out")


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OSError, match="0 MiB free but 5 MiB are needed"):
        check_output(tmp_path / "out", needed_bytes=5 << 20)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as fresh:
        (fresh / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(RuntimeError, match="half way"), whole_folder(tmp_path / "out", overwrite=True) as fresh:
        (fresh / "new").write_text("new")
        raise RuntimeError("half way")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with whole_folder(tmp_path / "out", overwrite=True) as fresh:
            (fresh / content).touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
