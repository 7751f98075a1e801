"""`fdu studio`: before and after from one pipeline, several erasures, the page in Gradio and in a browser."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from browser import Browser, find_browser
from PIL import Image, ImageChops

import fdu
from fdu import cli
from fdu.cli import main, studio
from fdu.cli.side_by_side import SideBySide, Suggestions, Tried, drawn_by, suggestions
from fdu.evaluation import Sampling
from fdu.report.pictures import to_pil
from fdu.storage.fingerprint import fingerprint
from fdu.storage.loading import load_erased, load_model
from fdu.storage.readers import load_weights
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.registry import subject_of

FORMATS = ("lora", "delta", "pipeline")
FAST = Sampling(num_inference_steps=2, guidance_scale=3.0)
SEED = 7
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="gradio is not installed, so the page was not served; .ci/run installs it for these tests",
)


@pytest.fixture(scope="module")
def erased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erasure in each format; "based" was made over a LoRA of the user, which stands beside it."""
    folder = tmp_path_factory.mktemp("erased")
    result = fdu.erase(digits.load_pipeline(), *digits.concepts("three", "eight"), train_method="closed_form")
    for format in FORMATS:
        result.save(folder / format, save_as=format)
    result = fdu.erase(digits.load_pipeline(), *digits.concepts("red", "black"), train_method="closed_form")
    result.save(folder / "red")
    base = fdu.load_pipeline("digits", base_lora=[folder / "red"])
    fdu.erase(base, *digits.concepts("three", "eight"), train_method="closed_form").save(
        folder / "based", save_as="delta"
    )
    return folder


@pytest.fixture(scope="module")
def drawer(erased: Path) -> SideBySide:
    """All formats of the same erasure, and another erasure."""
    return SideBySide(digits.load_pipeline(), [Tried.of(str(erased / name)) for name in (*FORMATS, "red")], FAST)


def drawn(pipeline: Any, prompt: str = "three in red ink") -> Image.Image:
    probe = fdu.Probe(prompt, (prompt,), "target", list)
    return to_pil(fdu.draw(pipeline, [probe], 1, SEED, **FAST.settings()).images[0][0])


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


def test_each_format_draws_as_after_loading_it_and_leaves_the_pipeline_as_it_was(
    drawer: SideBySide, erased: Path
) -> None:
    weights, plain = fingerprint(drawer.pipeline, adapters=True), drawn(digits.load_pipeline())
    for place, name in enumerate((*FORMATS, "red")):
        whole = name == "pipeline"
        alone = load_model(str(erased / name)) if whole else load_erased(digits.load_pipeline(), str(erased / name))
        before, after = drawer.draw("three in red ink", place, seed=SEED)
        assert same(before, plain) and same(after, drawn(alone)) and not same(before, after)
        assert same(drawer.draw("three in red ink", place, 0.0, SEED)[1], plain)
        assert fingerprint(drawer.pipeline, adapters=True) == weights
    assert same(drawn(drawer.pipeline), plain)


def test_strength_is_that_of_load_weights(drawer: SideBySide, erased: Path) -> None:
    for place, name in enumerate(FORMATS):
        alone = digits.load_pipeline()
        load_weights(alone, erased / ("delta" if name == "pipeline" else name), strength=0.5)
        half = drawer.draw("three in red ink", place, 0.5, SEED)[1]
        assert same(half, drawn(alone)) and not same(half, drawer.draw("three in red ink", place, 1.0, SEED)[1])


@pytest.mark.slow
def test_a_delta_that_holds_the_lora_of_its_base_replaces_it(erased: Path) -> None:
    lora = str(erased / "red")
    base = fdu.load_pipeline("digits", base_lora=[lora])
    expected = drawn(load_erased(fdu.load_pipeline("digits", base_lora=[lora]), str(erased / "based")))
    with_lora = drawn(base)
    both = SideBySide(base, [Tried.of(str(erased / "based")), Tried.of(str(erased / "lora"))], FAST)
    before, after = both.draw("three in red ink", 0, seed=SEED)
    assert same(before, with_lora) and same(after, expected)
    fdu.load_weights(alone := fdu.load_pipeline("digits", base_lora=[lora]), erased / "lora")
    assert same(both.draw("three in red ink", 1, seed=SEED)[1], drawn(alone))
    assert same(drawn(base), with_lora)


def test_the_image_before_is_drawn_once_and_one_at_a_time(drawer: SideBySide, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[str] = []
    running = threading.Lock()

    def draw(*arguments: Any, description: str, **settings: Any) -> fdu.Draws:
        assert running.acquire(blocking=False), "two drawings at once"
        time.sleep(0.02)
        sides.append(description)
        running.release()
        return fdu.Draws([torch.zeros(1, 3, 8, 8)])

    monkeypatch.setattr(fdu, "draw", draw)
    for strength in (0.5, 1.0):
        drawer.draw("one", 0, strength)
    drawer.draw("one", 3)
    assert sides == ["before", "after", "after", "after"]
    threads = [threading.Thread(target=drawer.draw, args=(str(number), 1)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sides[4:] == ["before", "after"] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"erasure": 4}, "erasure must be a number from 0 to 3, got 4"),
        ({"strength": 1.6}, "strength must be in"),
        ({"strength": float("nan")}, "strength must be in"),
        ({"seed": -1}, "seed"),
        ({"steps": 0}, "num_inference_steps"),
        ({"guidance": -1.0}, "guidance_scale"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(drawer: SideBySide, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawer.draw(**{"prompt": "three", **settings})


def test_an_erasure_of_another_model_is_refused_by_name(erased: Path, tmp_path: Path) -> None:
    other = families.build("sd")
    with pytest.raises(OSError, match="weights .*lora.* could not be loaded"):
        SideBySide(other, [Tried.of(str(erased / "lora"))], FAST)
    with pytest.raises((OSError, ValueError), match="pipeline"):
        SideBySide(other, [Tried.of(str(erased / "pipeline"))], FAST)


def test_names_headings_and_prompts_to_try(erased: Path) -> None:
    lora = Tried.of(str(erased / "lora"))
    assert lora.name == "three → eight (lora)" and studio.about(lora) == "## three, erased towards eight"
    found = suggestions(subject_of("digits"), lora)
    assert all("three" in prompt for prompt in found.asked) and len(found.asked) == 4
    assert not any("three" in prompt for prompt in found.kept) and len(found.kept) == 6
    fox = suggestions(subject_of("emoji"), Tried("fox", {"concepts": [["fox", "wolf"]]}))
    assert fox.asked[0] == "a fox" and all("fox" in prompt for prompt in fox.asked) and "a wolf" in fox.kept
    painter = suggestions(subject_of("org/model"), Tried("a", {"concepts": [["van gogh", "painting"]]}))
    assert any("monet" in prompt for prompt in painter.kept) and all("gogh" in prompt for prompt in painter.asked)
    many = Tried("runs/many", {"concepts": [[f"<b>{number}", ""] for number in range(30)]})
    assert many.name == "<b>0 → nothing, 29 more (many)" and "18 more" in studio.about(many)
    assert "<b>" not in studio.about(many)
    file = Tried.of(str(erased / "lora" / "pytorch_lora_weights.safetensors"))
    assert file.pairs == [] and suggestions(subject_of("digits"), file) == Suggestions()
    assert "pytorch_lora_weights" in studio.about(file)


def test_steps_and_guidance_are_the_pipelines_own_where_the_subject_names_none() -> None:
    own = drawn_by(families.build("sd"), subject_of("org/model").sampling)
    assert (own.num_inference_steps, own.guidance_scale) == (50, 7.5)
    assert drawn_by(families.build("sd"), FAST) == FAST


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits"], "ERASED is missing|required"),
        (["digits", "nowhere"], "ERASED 'nowhere' does not exist"),
        (["digits", "."], "contain no file"),
        (["nowhere", "."], "BASE 'nowhere' does not exist"),
        (["digits", ".", "--port", "70000"], "port must be in"),
        (["digits", ".", "--resolution", "7"], "resolution.*multiple of 8"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_loads(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)  # not even this
    monkeypatch.setattr(digits, "load_pipeline", None)
    assert main(["studio", *arguments]) == cli.USAGE
    assert re.search(message, capsys.readouterr().err)


def test_without_gradio_the_error_names_the_extra(
    erased: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["studio", "digits", str(erased / "lora")]) == cli.USAGE
    assert re.search(r"needs gradio .*pip install 'fdu\[studio\]'", capsys.readouterr().err)


def test_a_taken_port_is_named() -> None:
    with studio.bound(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        listener.listen()
        with pytest.raises(OSError, match="port .* cannot be used .*--port"):
            studio.bound(listener.getsockname()[1])


@pytest.fixture
def address(drawer: SideBySide, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The page, served."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        monkeypatch.setenv(name, "")  # restored at the end
    studio.check_gradio()
    blocks = studio.page(drawer, [suggestions(subject_of("digits"), one) for one in drawer.erasures])
    servers: list[Any] = []
    with studio.bound(0) as listener:
        thread = threading.Thread(target=studio.serve, args=(blocks, listener, servers.append))
        thread.start()
        try:
            wait_for(lambda: bool(servers) and servers[0].started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            servers[0].should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def status(address: str, **headers: str) -> tuple[int, str]:
    """The status of a page's answer and what it lets a browser load."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status, answer.headers["content-security-policy"]
    except urllib.error.HTTPError as error:
        return error.code, ""


@needs_gradio
def test_the_page_draws_for_itself_alone(address: str, drawer: SideBySide) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False, analytics_enabled=False)
    before, after = client.predict("three", 1, 0.5, SEED, 2, 3.0, api_name="/draw")
    expected = drawer.draw("three", 1, 0.5, SEED)
    # Gradio sends what changes beside an image.
    paths = [one["value"] if isinstance(one, dict) and "value" in one else one for one in (before, after)]
    assert all(same(Image.open(path).convert("RGB"), image) for path, image in zip(paths, expected, strict=True))
    with pytest.raises(AppError, match="prompt is empty; type what to draw"):
        client.predict("", 1, 0.5, SEED, 2, 3.0, api_name="/draw")
    code, policy = status(address)
    assert code == 200 and policy.startswith("default-src 'self'")
    port = address.rstrip("/").rpartition(":")[2]
    assert status(address, Host=f"localhost:{port}")[0] == 200
    assert status(address, Host=f"studio.example:{port}")[0] == 403  # a name that was turned to this machine
    assert status(f"{address}gradio_api/info", Origin="https://studio.example")[0] == 403  # another page


@needs_gradio
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_in_a_browser(address: str, width: int, dark: bool, tmp_path: Path) -> None:
    find_browser()
    with contextlib.closing(Browser(tmp_path / "browser", width, dark=dark)) as browser:
        browser.open(address)
        browser.wait("document.activeElement.value == 'three'")
        assert "three, erased towards eight" in browser.text()
        browser.value("document.activeElement.select()")
        browser.type("three in red ink")
        browser.press("Enter", 13)
        pictures = "[...document.querySelectorAll('.pictures img')].filter(one => one.complete && one.naturalWidth)"
        browser.wait(f"{pictures}.length == 2")
        places = browser.value(
            f"{pictures}.map(one => [one.getBoundingClientRect().width, one.getBoundingClientRect().top])"
        )
        # Large, of one size, and side by side, also on a phone.
        assert places[0] == places[1] and places[0][0] > 0.4 * min(width, 1080)
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        shown = "[...document.querySelectorAll('.pictures img')].map(one => one.src)"
        first = browser.value(shown)
        browser.value("document.querySelectorAll('input[type=radio]')[3].click()")
        browser.wait("document.body.innerText.includes('red, erased towards black')")
        browser.wait(f"({shown})[1] != {first[1]!r}")
        browser.value("(one => {one.focus(); one.select()})(document.querySelector('textarea'))")
        browser.type(" ")
        browser.value("[...document.querySelectorAll('button')].find(one => one.innerText.trim() == 'Draw').click()")
        browser.wait("document.body.innerText.includes('prompt is empty; type what to draw')")
        foreign = [one for one in browser.requests if not one.startswith((address, "data:", "blob:"))]
        assert not foreign and not browser.errors
        background = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 128) == dark


@needs_gradio
def test_the_command_serves_until_it_is_interrupted(
    erased: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        monkeypatch.setenv(name, "")  # restored at the end
    serve, seen = studio.serve, list[Any]()

    def interrupted(server: Any) -> None:
        def interrupt() -> None:
            wait_for(lambda: server.started)
            seen.append(Path(os.environ["GRADIO_TEMP_DIR"]))
            seen.append(seen[0].is_dir())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()

    monkeypatch.setattr(studio, "serve", lambda blocks, listener: serve(blocks, listener, interrupted))
    assert main(["studio", "digits", str(erased / "lora"), "--port", "0", "--device", "cpu"]) == cli.OK
    assert re.search(r"studio   http://127.0.0.1:\d+   .*studio   ended", capsys.readouterr().out, re.DOTALL)
    assert seen[1] and not seen[0].exists()
