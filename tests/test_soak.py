"""The short form of the soak, and what it holds against a run: ``make soak`` is the long one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soak


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills(tmp_path: Path) -> None:
    record = tmp_path / "soak.json"
    assert soak.main(["--kills=10", "--models=digits", "--only=erase", f"--record={record}"]) == 0
    (found,) = json.loads(record.read_text())
    assert (found["kills"], found["wrong"], found["commands"]) == (10, [], {"digits erase": 10})


def test_what_differs_is_told(tmp_path: Path) -> None:
    for side, loss in (("one", 1), ("two", 2)):
        out = tmp_path / side / "out"
        out.mkdir(parents=True)
        (out / "fdu.json").write_text(json.dumps({"loss": loss, "seconds": loss}))
        (out / "same.json").write_text(json.dumps({"seconds": loss}))
        (out / "page.md").write_text(f"took {loss}.5 s")
    (tmp_path / "two/out/images").mkdir()
    (tmp_path / "two/.out-half").mkdir()
    (tmp_path / "two/out.checkpoints").mkdir()
    one, two = (dict(soak.content(tmp_path / side / "out")) for side in ("one", "two"))
    assert soak.differences(one, two) == ["fdu.json", "images"] and not soak.differences(one, one)
    assert soak.left_over(tmp_path / "two") == ["left over: .out-half", "left over: out.checkpoints"]
    assert not soak.left_over(tmp_path / "one")
