"""Two runs in one place are told apart, what killed runs leave is tidied up, and what is written reaches the disk."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import families
import pytest
from in_processes import SERVER
from test_comparison import PLAN

import fdu
from fdu.cli import FAILED, main
from fdu.comparison.results import check_folder
from fdu.storage.locks import PARTIAL, contents, sole_use
from fdu.storage.output import RECORD_FILE, RUN_LOCK, clear_run, strangers, whole_file, whole_folder, write_text


def fill_folder(stack: ExitStack, path: Path) -> None:
    (stack.enter_context(whole_folder(path, overwrite=True)) / RECORD_FILE).write_text("half")


def fill_file(stack: ExitStack, path: Path) -> None:
    stack.enter_context(whole_file(path)).write_text("half")


def stop_within(begin: Callable[[ExitStack, Path], None], path: Path, told: Connection) -> None:
    """Begin something and never end."""
    with ExitStack() as stack:
        begin(stack, path)
        told.send("begun")
        threading.Event().wait()


@contextmanager
def another_process(begin: Callable[[ExitStack, Path], None], path: Path) -> Iterator[None]:
    """Another process has begun, is in the midst of it, and is killed in the end."""
    told, tells = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=stop_within, args=(begin, path, tells))
    process.start()
    try:
        assert told.poll(100) and told.recv() == "begun"
        yield
    finally:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_does_not_write_to_the_same_output(tmp_path: Path) -> None:
    with another_process(fill_folder, tmp_path / "out"):
        with pytest.raises(BlockingIOError, match="output folder '.*out' is in use .*process \\d+ on .*choose another"):
            fill_folder(ExitStack(), tmp_path / "out")
        with whole_folder(tmp_path / "other") as fresh:
            fresh.joinpath("a").touch()


def test_a_run_that_is_refused_leaves_the_checkpoints_of_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "out.checkpoints" / "latents-1"
    write_text(kept, "of the run that is alive")
    with another_process(fill_folder, tmp_path / "out"):
        assert main(["erase", "digits", "--target=three", "--anchor=eight", f"--out={tmp_path / 'out'}"]) == FAILED
        assert "in use by another run" in capsys.readouterr().err
        assert kept.exists()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with another_process(fill_folder, tmp_path / "out"):
        pass
    left = names(tmp_path)
    assert len(left) == 2 and any(name.endswith(PARTIAL) for name in left)
    with whole_folder(tmp_path / "out") as fresh:
        fresh.joinpath("a").touch()
    assert names(tmp_path) == ["out"]


def test_a_result_in_a_folder_that_is_being_made_is_made_once(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as outer:
        with whole_folder(outer) as inner:
            assert inner == outer
            inner.joinpath("a").touch()
        with whole_folder(outer / "within") as inner:
            assert inner.parent == outer
        with pytest.raises(FileExistsError, match="not written by fdu"), whole_folder(outer):
            pytest.fail("it is no longer empty")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a", "within"]


def test_files_of_a_living_process_stay_and_those_of_a_dead_one_do_not(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    with another_process(fill_file, path):
        (living,) = names(tmp_path)
        write_text(path, "whole")
        assert names(tmp_path) == sorted([living, "entry"])
    write_text(tmp_path / "entry-2", "has a name that begins the same")
    assert living in names(tmp_path)
    write_text(path, "whole")
    assert names(tmp_path) == ["entry", "entry-2"]


def test_a_folder_with_leftovers_alone_is_as_good_as_empty(tmp_path: Path) -> None:
    """Those of the file that a killed run wrote into it first."""
    with another_process(fill_file, tmp_path / "out/first.json"):
        pass
    assert names(tmp_path / "out") and not contents(tmp_path / "out")
    check_folder(tmp_path / "out", PLAN)
    with whole_folder(tmp_path / "out") as fresh:
        fresh.joinpath("a").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]


def test_folders_that_only_look_like_leftovers_stay(tmp_path: Path) -> None:
    kept = [".out-abcdefgh", f".out-2-abcdefgh{PARTIAL}", f"out-abcdefgh{PARTIAL}", f".out-abc{PARTIAL}"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / f".out-12345678{PARTIAL}").symlink_to(tmp_path / kept[0])
    with whole_folder(tmp_path / "out") as fresh:
        fresh.joinpath("a").touch()
    assert names(tmp_path) == sorted([*kept, "out", f".out-12345678{PARTIAL}"])


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_run_killed_while_it_exchanges_folders_loses_neither(exchanged: bool, tmp_path: Path) -> None:
    former = tmp_path / ".out.former"
    former.mkdir()
    (former / RECORD_FILE).write_text("old")
    if exchanged:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / RECORD_FILE).write_text("new")
    with pytest.raises(FileExistsError, match="not empty"), whole_folder(tmp_path / "out"):
        pytest.fail("there is a result")
    assert (tmp_path / "out" / RECORD_FILE).read_text() == ("new" if exchanged else "old")
    assert names(tmp_path) == ["out"]


def test_a_result_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{handle}").split(PARTIAL)[-1])
        fsync(handle)

    def replaced(source: Path, destination: Path) -> None:
        events.append("renamed")
        replace(source, destination)

    with whole_folder(tmp_path / "out") as fresh:
        (fresh / "unet").mkdir()
        (fresh / "unet" / "weights").write_text("1")
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)
    assert events == ["/unet", "/unet/weights", "", "renamed", str(tmp_path)]
    events.clear()
    write_text(tmp_path / "page", "1")
    assert events == ["/page", "renamed", str(tmp_path)]


def test_an_interruption_while_files_go_to_the_disk_keeps_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as fresh:
        (fresh / "trained").write_text("for hours")
        monkeypatch.setattr(os, "fsync", interrupted)
    monkeypatch.undo()
    (kept,) = names(tmp_path)
    assert kept in capsys.readouterr().err
    with whole_folder(tmp_path / "out") as fresh:
        fresh.joinpath("a").touch()
    assert (tmp_path / kept / "trained").read_text() == "for hours"


def test_a_file_system_that_cannot_sync_folders_saves_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def partly(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", partly)
    with whole_folder(tmp_path / "out") as fresh:
        fresh.joinpath("a").touch()
    write_text(tmp_path / "page", "1")
    assert names(tmp_path) == ["out", "page"]


def test_a_full_disk_does_not_keep_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with sole_use(tmp_path / "lock", "the place"):
            pass
    with sole_use(tmp_path / "lock", "the place"):
        pass
    assert names(tmp_path) == []


def test_a_lock_is_for_one_thread_until_it_ends(tmp_path: Path) -> None:
    errors: list[str] = []

    def other() -> None:
        try:
            with sole_use(tmp_path / "lock", "the place"):
                errors.append("none")
        except BlockingIOError as error:
            errors.append(str(error))

    def ask() -> str:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return errors.pop()

    with sole_use(tmp_path / "lock", "the place"):
        with sole_use(tmp_path / "lock", "the place"):
            pass
        assert ask().startswith("the place is in use by another run (process")
    assert names(tmp_path) == []
    assert ask() == "none"


def test_a_lock_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(OSError, match="the place cannot be locked.*symbolic links.*remove that file"),
        sole_use(tmp_path / "lock", "the place"),
    ):
        pytest.fail("it was locked")
    assert (tmp_path / "precious").read_text() == "text"


def lock_checkpoints(stack: ExitStack, folder: Path) -> None:
    stack.enter_context(sole_use(folder / RUN_LOCK, "a run"))


def test_two_trainings_do_not_share_checkpoints(tmp_path: Path) -> None:
    def erase() -> None:
        pipeline = families.build("sd")
        settings: dict[str, Any] = {"max_train_steps": 1, "train_batch_size": 1, "num_latents": 2}
        fdu.erase(pipeline, "fox", "wolf", checkpoint_dir=str(tmp_path), num_inference_steps=1, **settings)

    with another_process(lock_checkpoints, tmp_path), pytest.raises(BlockingIOError, match="checkpoint_dir '.*' is in"):
        erase()
    assert not strangers(tmp_path)
    erase()
    assert RUN_LOCK not in names(tmp_path)
    clear_run(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize("save_as", ["lora", "kohya", "delta", "pipeline"])
def test_the_same_weights_are_the_same_bytes(save_as: str, tmp_path: Path) -> None:
    result = fdu.erase(families.build("sd"), "fox", "wolf", train_method="closed_form")
    saved = []
    for number in range(4):  # two orders of a few strings are the same by chance too often
        result.save(tmp_path / str(number), save_as=save_as)
        files = sorted((tmp_path / str(number)).rglob("*.safetensors"))
        saved.append({path.name: path.read_bytes() for path in files})
    assert saved[0] and all(one == saved[0] for one in saved)
